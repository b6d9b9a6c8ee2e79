//! Products of dynamically quantized activations back to plain ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::absorb_qdq::{grid_of, whole};
use crate::encoding::{self, Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Patch};
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
    weight: ValueId,
    encoding: Encoding,
    codes: Arc<Tensor>,
}

/// Turns every `MatMulInteger` of the codes of a `DynamicQuantizeLinear` with a constant, cast to float and multiplied with both
/// scales, into a `MatMul` of ai.onnx `opset` by the float weight that its codes stand for. Anything less stays as it is.
pub(super) fn absorb(graph: &Graph, users: &Users, opset: u32, patch: &mut Patch) {
    let mut gone: BTreeSet<NodeId> = BTreeSet::new();
    let mut quantizers: BTreeSet<NodeId> = BTreeSet::new();
    for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("MatMulInteger")) {
        let Some(product) = Product::at(graph, users, id, node) else { continue };
        let Ok(float) = product.encoding.decode(&product.codes) else { continue };
        let name = format!("{}.float", graph.value(product.weight).name);
        let weight = patch.constant(&name, Tensor::of(product.codes.shape(), float));
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
    fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let (quantize, quantizer) = graph.producer(node.input(0)?).filter(|(_, q)| q.op.is("DynamicQuantizeLinear"))?;
        let of_quantizer = |value: Option<ValueId>, output: usize| value.is_some() && value == quantizer.output(output);
        (of_quantizer(node.input(0), 0) && of_quantizer(node.input(2), 2)).then_some(())?;
        let (cast, 0) = users.only_input(node.output(0)?)? else { return None };
        let to_float = |cast: &&Node| cast.op.is("Cast") && cast.int("to", 0) == i64::from(DType::F32.code());
        let (scaled, place) = users.only_input(graph.node(cast).filter(to_float)?.output(0)?)?;
        let product = graph.node(scaled).filter(|node| node.op.is("Mul"))?;
        let (scales, both) = graph.producer(product.input(usize::from(1 - place))?).filter(|(_, n)| n.op.is("Mul"))?;
        users.only_input(both.output(0)?)?;
        let constant = (0..2).find(|input| graph.constant_input(both, *input).is_some())?;
        of_quantizer(both.input(1 - constant), 1).then_some(())?;
        let (weight, codes) = (node.input(1)?, graph.constant_input(node, 1)?);
        let encoding = weight_encoding(codes, graph.constant_input(both, constant)?, graph, node)?;
        Some(Self {
            scaled,
            inner: vec![scales, cast, id],
            quantize,
            activation: quantizer.input(0)?,
            dynamic: Encoding::dynamic(grid_of(DType::U8)?),
            weight,
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
