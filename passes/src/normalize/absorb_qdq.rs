//! Quantize and dequantize nodes into the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encoding::{Encoding, Granularity};
use crate::grid::{self, Grid};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch, can_redirect};
use crate::ops::positive_axis;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns `QuantizeLinear` and `DequantizeLinear` pairs into encodings of the plan, so that the graph is float again.
    ///
    /// A `DequantizeLinear` of a constant becomes the float constant it stands for, with its encoding and codes at every
    /// reader. A pair around an activation disappears: when all who read the tensor read it through the pair, the tensor
    /// itself is encoded; otherwise only those uses are. Pairs with scales that are not constant, or in grids that are
    /// not known here, stay as they are. A `MatMulNBits` becomes a `MatMul` with its weight encoded, and so does a
    /// `MatMulInteger` of what a `DynamicQuantizeLinear` returns, cast and scaled; its activation has the range of each run. A
    /// `GatherBlockQuantized` becomes a `Gather` from an encoded table, which a `MatMulNBits` by the same codes shares.
    INFO {
        name: "absorb-qdq",
        source: "ONNX operator specification, QuantizeLinear-21 and DequantizeLinear-21",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(AbsorbQdq)) };

/// See [`INFO`].
#[derive(Debug)]
struct AbsorbQdq;

impl Pass for AbsorbQdq {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let users = Users::of(graph);
        let mut patch = Patch::on(model);
        let mut pairs: BTreeMap<ValueId, Vec<Pair>> = BTreeMap::new();
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("DequantizeLinear")) {
            if absorb_constant(graph, &users, id, node, &mut patch) {
                continue;
            }
            if let Some(pair) = Pair::at(graph, id, node) {
                pairs.entry(pair.source).or_default().push(pair);
            }
        }
        super::absorb_nbits::absorb(graph, model.meta.opset(), &mut patch);
        super::absorb_tables::absorb(graph, &users, model.meta.opset(), &mut patch);
        super::absorb_dynamic::absorb(model, &users, &mut patch);
        for (source, pairs) in pairs {
            absorb_pairs(graph, &users, source, &pairs, &mut patch);
        }
        Ok(patch)
    }
}

/// A constant behind a `DequantizeLinear`.
fn absorb_constant(graph: &Graph, users: &Users, id: NodeId, node: &Node, patch: &mut Patch) -> bool {
    let absorbed = (|| {
        let codes = graph.constant_input(node, 0)?;
        let result = node.output(0)?;
        let readers = users.of_value(result);
        // A captured or returned weight has no use site to hang the encoding on.
        let plain = !readers.is_empty() && readers.iter().all(|user| matches!(user, User::Input { .. }));
        let encoding = encoding_of(graph, node, codes.dtype(), codes.shape()).filter(|_| plain)?;
        let values = encoding.decode(codes).ok()?;
        Some((result, readers, encoding, Arc::clone(codes), Tensor::of(codes.shape(), values)))
    })();
    let Some((result, readers, encoding, codes, tensor)) = absorbed else { return false };
    patch.edit(Edit::Freeze { value: result, tensor: Arc::new(tensor) });
    patch.erase(id);
    for user in readers {
        if let User::Input { node, input } = *user {
            let site = Site::Use { node, input };
            patch.edit(Edit::Encode { site, encoding: encoding.clone() });
            patch.edit(Edit::Round { site, codes: Arc::clone(&codes) });
        }
    }
    patch.count("constants", 1);
    true
}

/// A quantize node and one dequantize node that reads it, with the same parameters.
struct Pair {
    source: ValueId,
    quantize: NodeId,
    dequantize: NodeId,
    result: ValueId,
    encoding: Encoding,
}

impl Pair {
    fn at(graph: &Graph, id: NodeId, node: &Node) -> Option<Self> {
        let (quantize, q) = graph.producer(node.input(0)?).filter(|(_, q)| q.op.is("QuantizeLinear"))?;
        let storage = match graph.constant_input(q, 2) {
            Some(zero_point) => zero_point.dtype(),
            None => DType::from_code(q.int("output_dtype", 2)).unwrap_or(DType::U8),
        };
        let encoding = encoding_of(graph, node, storage, &[])?;
        let same = encoding_of(graph, q, storage, &[])? == encoding;
        same.then_some(Self { source: q.input(0)?, quantize, dequantize: id, result: node.output(0)?, encoding })
    }
}

fn absorb_pairs(graph: &Graph, users: &Users, source: ValueId, pairs: &[Pair], patch: &mut Patch) {
    if pairs.iter().any(|pair| !can_redirect(graph, pair.result, source)) {
        return;
    }
    let quantizers: Vec<NodeId> = pairs.iter().map(|pair| pair.quantize).collect();
    let only_through_pairs = users.of_value(source).iter().all(|user| match user {
        User::Input { node, .. } => quantizers.contains(node),
        User::Capture { .. } | User::Output => false,
    });
    let agree = pairs.iter().all(|pair| pair.encoding == pairs[0].encoding);
    if !(only_through_pairs && agree) {
        let returned = |pair: &Pair| users.of_value(pair.result).iter().any(|u| !matches!(u, User::Input { .. }));
        if pairs.iter().any(returned) {
            return;
        }
    }
    for pair in pairs {
        patch.edit(Edit::Redirect { from: pair.result, to: source });
        if !(only_through_pairs && agree) {
            for user in users.of_value(pair.result) {
                if let User::Input { node, input } = *user {
                    patch.edit(Edit::Encode { site: Site::Use { node, input }, encoding: pair.encoding.clone() });
                }
            }
        }
        patch.erase(pair.dequantize);
        if !patch.touches(pair.quantize) && all_readers_absorbed(graph, users, pair.quantize, pairs) {
            patch.erase(pair.quantize);
        }
        patch.count("pairs", 1);
    }
    if only_through_pairs && agree {
        patch.edit(Edit::Encode { site: Site::Value(source), encoding: pairs[0].encoding.clone() });
    }
}

fn all_readers_absorbed(graph: &Graph, users: &Users, quantize: NodeId, pairs: &[Pair]) -> bool {
    let codes = graph.node(quantize).and_then(|q| q.output(0));
    codes.is_some_and(|codes| {
        users.of_value(codes).iter().all(|user| match user {
            User::Input { node, .. } => pairs.iter().any(|pair| pair.dequantize == *node),
            User::Capture { .. } | User::Output => false,
        })
    })
}

/// The encoding that a quantize or dequantize node spells, when its scale is a constant and its grid is known here.
fn encoding_of(graph: &Graph, node: &Node, storage: DType, shape: &[usize]) -> Option<Encoding> {
    let scale = graph.constant_input(node, 1).filter(|scale| scale.dtype() == DType::F32)?;
    let grid = grid_of(storage)?;
    let zero_point: Vec<i32> = match node.input(2) {
        Some(zero_point) => {
            let codes = graph.constant(zero_point).filter(|codes| codes.dtype() == storage)?;
            crate::encoding::unpack(codes).into_iter().map(|code| whole(grid.decode(code))).collect()
        }
        None => vec![0; scale.len()],
    };
    let block = usize::try_from(node.int("block_size", 0)).ok()?;
    let granularity = match scale.shape() {
        [] => Granularity::Tensor,
        [1] if block == 0 && shape.len() != 1 => Granularity::Tensor,
        [_] if block == 0 => Granularity::Axis(positive_axis(node.int("axis", 1), shape.len().max(1))?),
        _ if block > 0 => Granularity::Block { axis: positive_axis(node.int("axis", 1), shape.len())?, size: block },
        _ => return None,
    };
    let scale: Arc<[f32]> = scale.floats()?.into_owned().into();
    // The sign of a constant's scale says which end of its codes reaches further.
    let constant = !shape.is_empty();
    let sound = |s: &f32| s.is_finite() && (*s > 0.0 || (constant && *s < 0.0));
    (scale.len() == zero_point.len() && scale.iter().all(sound)).then(|| Encoding {
        grid,
        granularity,
        scale,
        zero_point: zero_point.into(),
    })
}

#[expect(clippy::cast_possible_truncation, reason = "points of integer grids are whole and below 2^31")]
pub(super) fn whole(point: f64) -> i32 {
    point as i32
}

pub(super) fn grid_of(storage: DType) -> Option<&'static dyn Grid> {
    // Codes do not tell a narrow grid from a full one: the full one reads both.
    grid::GRIDS.iter().copied().find(|grid| grid.info().storage == storage)
}
