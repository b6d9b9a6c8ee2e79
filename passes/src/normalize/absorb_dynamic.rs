//! Products of dynamically quantized activations back to plain ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::absorb_qdq::{grid_of, whole};
use crate::encoding::{self, Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Model, Patch};
use crate::tensor::{DType, Tensor};

/// A `MatMulInteger` with what stands around it.
struct Product {
    /// The last of its nodes, which computes its result.
    scaled: NodeId,
    /// Those that go with it, last first.
    inner: Vec<NodeId>,
    quantize: NodeId,
    activation: ValueId,
    /// The encoding of the activation.
    dynamic: Encoding,
    /// Codes, scale and zero point.
    weight: (ValueId, ValueId, Option<ValueId>),
    encoding: Encoding,
    codes: Arc<Tensor>,
}

/// Turns every `MatMulInteger` of the codes of a `DynamicQuantizeLinear` with a constant, cast to float and multiplied with both
/// scales, into a `MatMul` by the float weight that its codes stand for. Anything less stays as it is.
pub(super) fn absorb(model: &Model, users: &Users, patch: &mut Patch) {
    let (graph, opset) = (model.graph(), model.meta.opset());
    let mut gone: BTreeSet<NodeId> = BTreeSet::new();
    let mut quantizers: BTreeSet<NodeId> = BTreeSet::new();
    // What several products share is made once.
    let mut made: BTreeMap<(ValueId, ValueId, Option<ValueId>), ValueId> = BTreeMap::new();
    for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("MatMulInteger")) {
        let Some(product) = Product::at(model, users, id, node) else { continue };
        let weight = if let Some(weight) = made.get(&product.weight) {
            *weight
        } else {
            let Ok(float) = product.encoding.decode(&product.codes) else { continue };
            let name = format!("{}.float", graph.value(product.weight.0).name);
            patch.constant(&name, Tensor::of(product.codes.shape(), float))
        };
        made.insert(product.weight, weight);
        let plain = Node {
            op: OpKey { domain: "".into(), name: "MatMul".into(), opset },
            inputs: vec![Some(product.activation), Some(weight)],
            outputs: graph.node(product.scaled).map(|scaled| scaled.outputs.clone()).unwrap_or_default(),
            attrs: Attrs::new(),
            ..node.clone()
        };
        patch.replace(product.scaled, plain);
        let at = |input| Site::Use { node: product.scaled, input };
        patch.edit(Edit::Encode { site: at(0), encoding: product.dynamic });
        patch.edit(Edit::Encode { site: at(1), encoding: product.encoding });
        patch.edit(Edit::Round { site: at(1), codes: product.codes });
        patch.count("dynamic products", 1);
        gone.insert(product.scaled);
        gone.extend(&product.inner);
        product.inner.into_iter().for_each(|inner| patch.erase(inner));
        quantizers.insert(product.quantize);
    }
    let is_read = |value: &ValueId| {
        users.of_value(*value).iter().any(|user| match user {
            User::Input { node, .. } => !gone.contains(node),
            User::Capture { .. } | User::Output => true,
        })
    };
    let idle = |id: &NodeId| graph.node(*id).is_some_and(|node| !node.outputs.iter().flatten().any(is_read));
    quantizers.iter().filter(|id| idle(id)).for_each(|id| patch.erase(*id));
}

impl Product {
    fn at(model: &Model, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let graph = model.graph();
        let (quantize, quantizer) = graph.producer(node.input(0)?).filter(|(_, q)| q.op.is("DynamicQuantizeLinear"))?;
        // What is constant needs no range, and what is rounded already would be rounded twice.
        let activation = quantizer.input(0).filter(|value| graph.constant(*value).is_none())?;
        let rounded = graph.producer(activation).is_some_and(|(_, node)| node.op.is("DequantizeLinear"))
            || model.plan().encoding_of_use(graph, quantize, 0).is_some();
        (!rounded).then_some(())?;
        let of_quantizer = |value: Option<ValueId>, output: usize| value.is_some() && value == quantizer.output(output);
        (of_quantizer(node.input(0), 0) && of_quantizer(node.input(2), 2)).then_some(())?;
        let (cast, 0) = users.only_input(node.output(0)?)? else { return None };
        let to_float = |cast: &&Node| cast.op.is("Cast") && cast.int("to", 0) == i64::from(DType::F32.code());
        let (scaled, place) = users.only_input(graph.node(cast).filter(to_float)?.output(0)?)?;
        let multiplies = |node: &Node| node.op.is("Mul") && node.inputs.len() == 2;
        let product = graph.node(scaled).filter(|node| multiplies(node))?;
        let other = 1_usize.checked_sub(place.into())?;
        let (scales, both) = graph.producer(product.input(other)?).filter(|(_, node)| multiplies(node))?;
        users.only_input(both.output(0)?)?;
        let constant = (0..2).find(|input| graph.constant_input(both, *input).is_some())?;
        of_quantizer(both.input(1 - constant), 1).then_some(())?;
        let (weight, codes) = (node.input(1)?, graph.constant_input(node, 1)?);
        let encoding = weight_encoding(codes, graph.constant_input(both, constant)?, graph, node)?;
        Some(Self {
            scaled,
            inner: vec![scales, cast, id],
            quantize,
            activation,
            dynamic: Encoding::dynamic(grid_of(DType::U8)?),
            weight: (weight, both.input(constant)?, node.input(3)),
            encoding,
            codes: Arc::clone(codes),
        })
    }
}

/// The encoding of the weight \[K, N\] of the `MatMulInteger` `node`: one scale or one per column.
fn weight_encoding(codes: &Tensor, scale: &Tensor, graph: &Graph, node: &Node) -> Option<Encoding> {
    let grid = grid_of(codes.dtype()).filter(|grid| grid.info().bits == 8)?;
    let [_, n] = *codes.shape() else { return None };
    let granularity = match scale.shape() {
        [] | [1] => Granularity::Tensor,
        [columns] if *columns == n => Granularity::Axis(1),
        _ => return None,
    };
    let scale = scale.values::<f32>().filter(|scale| scale.iter().all(|s| s.is_finite() && *s != 0.0))?;
    let zeros: Vec<i32> = match node.input(3) {
        Some(zero_point) => {
            let zeros = graph.constant(zero_point).filter(|zeros| zeros.dtype() == codes.dtype())?;
            encoding::unpack(zeros).into_iter().map(|code| whole(grid.decode(code))).collect()
        }
        None => vec![0],
    };
    let zero_point = match zeros.as_slice() {
        [one] => vec![*one; scale.len()],
        many if many.len() == scale.len() => zeros,
        _ => return None,
    };
    Some(Encoding { grid, granularity, scale: scale.into_owned().into(), zero_point: zero_point.into() })
}
