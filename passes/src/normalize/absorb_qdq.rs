//! Quantize and dequantize nodes into the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{absorb_blocks, absorb_qonnx, absorb_rows};
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
    /// itself is encoded; otherwise only those uses are. Pairs whose scales nodes compute from what they round, one
    /// per row, are encoded so too. Others with scales that are not constant, and grids that are not known here, stay as they are. A `MatMulNBits` becomes a `MatMul` with its weight encoded, and so does a
    /// `MatMulInteger` of what a `DynamicQuantizeLinear` returns, cast and scaled; its activation has the range of each run. A
    /// `GatherBlockQuantized` becomes a `Gather` from an encoded table, which a `MatMulNBits` by the same codes shares. Blocks whose scales are codes themselves, as
    /// `TensorRT` has them, are one encoding. Inputs that are caches in codes become float ones, read through their codes. A `Clip` between
    /// both nodes of a pair says how many of its type's codes are used; `Quant` and `FloatQuant` of QONNX are a pair in one node.
    INFO {
        name: "absorb-qdq",
        source: "ONNX operator specification, QuantizeLinear-21 and DequantizeLinear-21",
        cost: "One walk over the nodes; every constant in codes is decoded once.",
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
        let in_blocks = absorb_in_blocks(graph, &users, &mut pairs, &mut patch);
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("DequantizeLinear")) {
            if in_blocks.contains(&id) {
                continue;
            }
            if absorb_constant(graph, &users, id, node, &mut patch) {
                continue;
            }
            if let Some(pair) = Pair::at(graph, &users, id, node) {
                let Some(codes) = rounded_constant(graph, &pair).map(Arc::new) else {
                    pairs.entry(pair.source).or_default().push(pair);
                    continue;
                };
                if absorb_codes(&users, (id, node), &pair.encoding, &codes, &mut patch) {
                    pair.erase_makers(graph, &users, &mut patch);
                }
            }
        }
        for (id, node) in graph.nodes() {
            let Some(encoding) = absorb_qonnx::encoding_of(graph, node) else { continue };
            if let Some(codes) = absorb_qonnx::codes(graph, node, &encoding) {
                absorb_codes(&users, (id, node), &encoding, &Arc::new(codes), &mut patch);
            } else if let (Some(source), Some(result)) = (node.input(0), node.output(0)) {
                // One node is both: it rounds, and returns what is left.
                let makers = Vec::new();
                let pair =
                    Pair { source, quantize: id, between: None, dequantize: id, result, encoding, inner: None, makers };
                pairs.entry(source).or_default().push(pair);
            }
        }
        super::absorb_nbits::absorb(graph, model.meta.opset(), &mut patch);
        super::absorb_tables::absorb(graph, &users, model.meta.opset(), &mut patch);
        super::absorb_dynamic::absorb(model, &users, &mut patch);
        super::absorb_caches::absorb(graph, &users, model.meta.opset(), &mut patch);
        let results: BTreeSet<ValueId> = pairs.values().flatten().map(|pair| pair.result).collect();
        for (source, pairs) in pairs {
            // What is rounded twice is two roundings: the second one is carried, as one tensor has one encoding.
            let rounded = |pair: &Pair| {
                model.plan().encoding_of_use(graph, pair.quantize, 0).is_some_and(|e| *e != pair.encoding)
            };
            if !results.contains(&source) && !pairs.iter().any(rounded) {
                absorb_pairs(graph, &users, source, &pairs, &mut patch);
            }
        }
        if model.meta.opsets.contains_key(crate::ops::QONNX_DOMAIN) {
            absorb_qonnx::carry(model, &mut patch);
        }
        Ok(patch)
    }
}

/// Blocks with scales of their own format: constants become that, activations join `pairs`. Returns the nodes that are done with.
fn absorb_in_blocks(
    graph: &Graph,
    users: &Users,
    pairs: &mut BTreeMap<ValueId, Vec<Pair>>,
    patch: &mut Patch,
) -> BTreeSet<NodeId> {
    let mut done = BTreeSet::new();
    for (id, node) in graph.nodes() {
        let Some(blocks) = absorb_blocks::at(graph, users, node) else { continue };
        done.extend(blocks.scales.into_iter().chain([id]));
        if let Some(codes) = &blocks.codes {
            if absorb_codes(users, (id, node), &blocks.encoding, codes, patch) {
                blocks.scales.into_iter().for_each(|scales| patch.erase(scales));
            }
        } else if let Some(((encoding, codes), quantize)) = rounded_blocks(graph, &blocks) {
            if absorb_codes(users, (id, node), &encoding, &Arc::new(codes), patch) {
                let pair = Pair {
                    source: quantize.0,
                    quantize: quantize.1,
                    between: blocks.scales,
                    dequantize: id,
                    result: quantize.0,
                    encoding,
                    inner: None,
                    makers: Vec::new(),
                };
                pair.erase_makers(graph, users, patch);
            }
        } else if let (Some((source, quantize)), Some(result)) = (blocks.source, node.output(0)) {
            let encoding = blocks.encoding;
            let makers = Vec::new();
            let pair = Pair {
                source,
                quantize,
                between: blocks.scales,
                dequantize: id,
                result,
                encoding,
                inner: None,
                makers,
            };
            pairs.entry(source).or_default().push(pair);
        }
    }
    done
}

/// What a constant is in the blocks that every run would give it, and where it comes from.
fn rounded_blocks(graph: &Graph, blocks: &absorb_blocks::Blocks) -> Option<((Encoding, Tensor), (ValueId, NodeId))> {
    let (source, quantize) = blocks.source?;
    let tensor = graph.constant(source).filter(|tensor| tensor.dtype() == DType::F32)?;
    let values = tensor.floats()?;
    let encoding = blocks.encoding.of_run(&values, tensor.shape()).ok()?;
    let codes = encoding.encode(&values, tensor.shape()).ok()?;
    Some(((encoding, codes), (source, quantize)))
}

/// A constant behind a `DequantizeLinear`.
fn absorb_constant(graph: &Graph, users: &Users, id: NodeId, node: &Node, patch: &mut Patch) -> bool {
    let Some(codes) = graph.constant_input(node, 0) else { return false };
    let encoding = encoding_of(graph, node, codes.dtype(), codes.shape());
    encoding.is_some_and(|encoding| absorb_codes(users, (id, node), &encoding, codes, patch))
}

/// A node that returns what `codes` stand for becomes that constant.
fn absorb_codes(
    users: &Users,
    (id, node): (NodeId, &Node),
    encoding: &Encoding,
    codes: &Arc<Tensor>,
    patch: &mut Patch,
) -> bool {
    let Some(result) = node.output(0) else { return false };
    let readers = users.of_value(result);
    // A captured or returned weight has no use site to hang the encoding on.
    let plain = !readers.is_empty() && readers.iter().all(|user| matches!(user, User::Input { .. }));
    let Some(values) = encoding.decode(codes).ok().filter(|_| plain) else { return false };
    patch.edit(Edit::Freeze { value: result, tensor: Arc::new(Tensor::of(codes.shape(), values)) });
    patch.erase(id);
    for user in readers {
        if let User::Input { node, input } = *user {
            let site = Site::Use { node, input };
            patch.edit(Edit::Encode { site, encoding: encoding.clone() });
            patch.edit(Edit::Round { site, codes: Arc::clone(codes) });
        }
    }
    patch.count("constants", 1);
    true
}

/// A quantize node and one dequantize node that reads it, with the same parameters.
struct Pair {
    source: ValueId,
    quantize: NodeId,
    /// What stands between both: a clamp of codes, or what turns the scales of blocks into floats.
    between: Option<NodeId>,
    dequantize: NodeId,
    result: ValueId,
    encoding: Encoding,
    /// The dequantize node, where another behind it returns what it computes.
    inner: Option<NodeId>,
    /// What computes its scales.
    makers: Vec<NodeId>,
}

impl Pair {
    fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let (producer, made) = graph.producer(node.input(0)?)?;
        // Codes that are cut to those of a narrower grid in between.
        let clip = made.op.is("Clip").then_some((producer, made));
        let (quantize, q) = if clip.is_some() { graph.producer(made.input(0)?)? } else { (producer, made) };
        q.op.is("QuantizeLinear").then_some(())?;
        let storage = match q.input(2) {
            Some(zero_point) => graph.value(zero_point).ty.dtype()?,
            None => DType::from_code(q.int("output_dtype", 2)).unwrap_or(DType::U8),
        };
        let between = clip.map(|(id, _)| id);
        let is_constant = q.input(0).is_some_and(|value| graph.constant(value).is_some());
        let narrowed = |grid| clip.map_or(Some(grid), |(_, clip)| grid_between(graph, clip, grid, is_constant));
        let (source, result) = (q.input(0)?, node.output(0)?);
        if q.input(1).is_some_and(|scale| graph.constant(scale).is_none()) {
            let rows = absorb_rows::at(graph, q, node, narrowed(grid_of(storage)?)?)?;
            let (encoding, makers) = (rows.encoding, rows.makers);
            let (dequantize, result, inner) = match absorb_rows::behind(graph, users, id) {
                Some((reshape, result)) => (reshape, result, Some(id)),
                None => (id, result, None),
            };
            let pair = Self { source, quantize, between, dequantize, result, encoding, inner, makers };
            return (!is_constant).then_some(pair);
        }
        // Sizes play no part: an axis is counted from the end of as many as there are.
        let shape = vec![0; graph.value(q.input(0)?).ty.rank().unwrap_or(0)];
        let encoding = encoding_of(graph, node, storage, &shape)?;
        let same =
            encoding_of(graph, q, storage, &shape)? == encoding && encoding.scale.iter().all(|scale| *scale > 0.0);
        let (encoding, makers) = (Encoding { grid: narrowed(encoding.grid)?, ..encoding }, Vec::new());
        same.then_some(Self { source, quantize, between, dequantize: id, result, encoding, inner: None, makers })
    }
}

impl Pair {
    /// Removes what made the codes, where nobody else reads those.
    fn erase_makers(&self, graph: &Graph, users: &Users, patch: &mut Patch) {
        for before in
            self.inner.into_iter().chain(self.between).chain([self.quantize]).chain(self.makers.iter().copied())
        {
            if !patch.touches(before) && all_readers_erased(graph, users, before, patch) {
                patch.erase(before);
            }
        }
    }
}

/// The codes of what `pair` rounds, where that is a constant.
fn rounded_constant(graph: &Graph, pair: &Pair) -> Option<Tensor> {
    let values = graph.constant(pair.source).filter(|tensor| tensor.dtype() == DType::F32)?;
    pair.encoding.encode(&values.floats()?, values.shape()).ok()
}

fn absorb_pairs(graph: &Graph, users: &Users, source: ValueId, pairs: &[Pair], patch: &mut Patch) {
    if pairs.iter().any(|pair| !can_redirect(graph, pair.result, source)) {
        return;
    }
    let quantizers: Vec<NodeId> = pairs.iter().map(|pair| pair.quantize).collect();
    let only_read_by = |value: ValueId, nodes: &[NodeId]| {
        users.of_value(value).iter().all(|user| matches!(user, User::Input { node, .. } if nodes.contains(node)))
    };
    // Codes that are clamped for one reader and not for another are two encodings.
    let readers: Vec<NodeId> = pairs.iter().map(|pair| pair.between.unwrap_or(pair.dequantize)).collect();
    let whole = pairs.iter().filter(|pair| pair.between.is_some()).all(|pair| {
        let codes = graph.node(pair.quantize).and_then(|node| node.output(0));
        codes.is_some_and(|codes| only_read_by(codes, &readers))
    });
    // What runs give their scales lies along the axis that one product sums over.
    let whole = whole && !pairs.iter().any(|pair| pair.encoding.granularity.is_dynamic());
    let only_through_pairs = whole && only_read_by(source, &quantizers);
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
        pair.erase_makers(graph, users, patch);
        patch.count("pairs", 1);
    }
    if only_through_pairs && agree {
        patch.edit(Edit::Encode { site: Site::Value(source), encoding: pairs[0].encoding.clone() });
    }
}

/// Whether everyone who reads what `id` returns is gone.
fn all_readers_erased(graph: &Graph, users: &Users, id: NodeId, patch: &Patch) -> bool {
    let erased = |user: &User| matches!(user, User::Input { node, .. } if patch.touches(*node));
    let unread = |value: &ValueId| users.of_value(*value).iter().all(erased);
    graph.node(id).is_some_and(|node| node.outputs.iter().flatten().all(unread))
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
        [1] if block == 0 => Granularity::Tensor,
        [_] if block == 0 => Granularity::Axis(positive_axis(node.int("axis", 1), shape.len())?),
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

/// The grid of whose codes `clip`, a clamp of codes that `stored` reads, lets exactly those pass.
fn grid_between(graph: &Graph, clip: &Node, stored: &'static dyn Grid, is_constant: bool) -> Option<&'static dyn Grid> {
    let storage = stored.info().storage;
    let bound = |input: usize| {
        let bound = graph.constant_input(clip, input).filter(|c| c.dtype() == storage && c.len() == 1)?;
        Some(stored.decode(*crate::encoding::unpack(bound).first()?))
    };
    let (low, high) = (bound(1)?, bound(2)?);
    let between = |grid: &&dyn Grid| {
        let (from, to) = grid.range();
        (from - low).abs() < 0.5 && (to - high).abs() < 0.5 && grid.info().integer
    };
    // Of grids with the same codes rather the one that is stored as they are; constants are packed.
    let packed = |grid: &&dyn Grid| grid.info().storage.bits() == 4;
    let stored_so = |grid: &&dyn Grid| if is_constant { packed(grid) } else { grid.info().storage == storage };
    let found = || grid::GRIDS.iter().filter(|grid| between(grid));
    found().find(|grid| stored_so(grid)).or_else(|| found().next()).copied()
}

pub(super) fn grid_of(storage: DType) -> Option<&'static dyn Grid> {
    // Codes do not tell a narrow grid from a full one: the full one reads both.
    grid::GRIDS.iter().copied().find(|grid| grid.info().storage == storage)
}
