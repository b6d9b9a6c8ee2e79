//! A plan as operators on codes: `QLinearConv` and `QLinearMatMul`.

use std::sync::Arc;

use super::dialect::Dialect;
use super::qdq;
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Model, Patch};
use crate::ops::{self, Laws};
use crate::target::{LowerError, Lowered};
use crate::tensor::DType;

/// What quantize and dequantize nodes say, with every convolution and product on 8-bit codes as one operator on those. What has no such
/// operator stays in float between its nodes.
///
/// # Errors
/// [`LowerError`], as [`qdq::lower`].
pub fn lower_to_qoperators(model: &Model) -> Result<Lowered, LowerError> {
    let lowered = qdq::lower(model, Dialect::QDQ)?;
    let bug = |e: &dyn std::fmt::Display| LowerError {
        place: "the model".into(),
        problem: format!("a bug in onnx-quant: {e}"),
    };
    let mut whole = Model::new(lowered.graph, lowered.meta.as_ref().clone()).map_err(|e| bug(&e))?;
    let mut patch = Patch::on(&whole);
    fuse(whole.graph(), lowered.meta.opset(), &mut patch);
    whole.apply(patch).map_err(|e| bug(&e))?;
    let mut dead = Patch::on(&whole);
    erase_unread(whole.graph(), &mut dead);
    whole.apply(dead).map_err(|e| bug(&e))?;
    Ok(Lowered { graph: whole.graph().clone(), meta: lowered.meta, notes: lowered.notes })
}

fn fuse(graph: &Graph, opset: u32, patch: &mut Patch) {
    let users = Users::of(graph);
    for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("Conv") || node.op.is("MatMul")) {
        if let Some(fusion) = Fusion::at(graph, &users, id, node) {
            fusion.write(graph, node, opset, patch);
        }
    }
}

/// A heavy node between its quantizers.
struct Fusion {
    /// It, and the clamp that its quantizer implies.
    between: Vec<NodeId>,
    quantize: NodeId,
    /// Codes, scale and zero point of both operands.
    operands: [[ValueId; 3]; 2],
    bias: Option<ValueId>,
}

impl Fusion {
    fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let operands = [operand(graph, node, 0)?, operand(graph, node, 1)?];
        let bias = match node.input(2) {
            Some(value) => {
                let (_, bias) = graph.producer(value).filter(|(_, n)| n.op.is("DequantizeLinear"))?;
                has_product_scale(graph, bias, &operands).then_some(())?;
                Some(bias.input(0).filter(|codes| graph.value(*codes).ty.dtype() == Some(DType::I32))?)
            }
            None => None,
        };
        let mut between = vec![id];
        let (mut reader, _) = users.only_input(node.output(0)?)?;
        let mut next = graph.node(reader)?;
        if ops::laws(&next.op).contains(Laws::CLAMPS) {
            let (behind, _) = users.only_input(next.output(0)?)?;
            let quantize = graph.node(behind).filter(|n| n.op.is("QuantizeLinear"))?;
            is_implied(graph, next, quantize).then_some(())?;
            between.push(reader);
            (reader, next) = (behind, quantize);
        }
        let plain = next.op.is("QuantizeLinear") && graph.constant_input(next, 1).is_some_and(|scale| scale.len() == 1);
        let typed = graph.constant_input(next, 2).is_some_and(|zero| matches!(zero.dtype(), DType::U8 | DType::I8));
        let same = graph.constant_input(next, 2).map(|zero| zero.dtype()) == graph.value(operands[0][0]).ty.dtype();
        (plain && typed && same).then_some(Self { between, quantize: reader, operands, bias })
    }

    fn write(&self, graph: &Graph, node: &Node, opset: u32, patch: &mut Patch) {
        let Some(quantize) = graph.node(self.quantize) else { return };
        let mut inputs: Vec<Option<ValueId>> = self.operands.iter().flatten().copied().map(Some).collect();
        inputs.extend([quantize.input(1), quantize.input(2)]);
        inputs.extend(self.bias.map(Some));
        let (name, attrs) =
            if node.op.is("Conv") { ("QLinearConv", node.attrs.clone()) } else { ("QLinearMatMul", Attrs::new()) };
        let op = OpKey { domain: "".into(), name: name.into(), opset };
        let fused = Node { op, inputs, attrs, name: Arc::clone(&node.name), ..quantize.clone() };
        self.between.iter().for_each(|id| patch.erase(*id));
        patch.replace(self.quantize, fused);
    }
}

/// What a dequantize node that `node` reads at `input` reads itself, where it is one of 8-bit codes.
fn operand(graph: &Graph, node: &Node, input: usize) -> Option<[ValueId; 3]> {
    let (_, dequantize) = graph.producer(node.input(input)?).filter(|(_, n)| n.op.is("DequantizeLinear"))?;
    let eight = matches!(graph.value(dequantize.input(0)?).ty.dtype(), Some(DType::U8 | DType::I8));
    let scales = graph.constant_input(dequantize, 1)?.len();
    // Only weights have several, one per output.
    let rank = graph.value(dequantize.input(0)?).ty.rank();
    let axis = ops::positive_axis(dequantize.int("axis", 1), rank.unwrap_or(0));
    let outputs = if node.op.is("Conv") { Some(0) } else { rank.and_then(|rank| rank.checked_sub(1)) };
    let by_output = input == 1 && axis.is_some() && axis == outputs;
    let sound = eight && (scales == 1 || by_output) && dequantize.int("block_size", 0) == 0;
    sound.then(|| Some([dequantize.input(0)?, dequantize.input(1)?, dequantize.input(2)?]))?
}

/// Whether the scales of `bias` are the products of those of both operands: the operator has no others.
fn has_product_scale(graph: &Graph, bias: &Node, operands: &[[ValueId; 3]; 2]) -> bool {
    let floats = |value: ValueId| Some(graph.constant(value)?.floats()?.into_owned());
    let scales = (bias.input(1).and_then(floats), floats(operands[0][1]), floats(operands[1][1]));
    let (Some(bias), Some(x), Some(w)) = scales else { return false };
    let (Some(x), whole) = (x.first(), w.len() == 1 || bias.len() == w.len()) else { return false };
    whole && bias.iter().enumerate().all(|(at, b)| b.to_bits() == (x * w[if w.len() == 1 { 0 } else { at }]).to_bits())
}

/// Whether `quantize` cuts off what `clamp` does.
fn is_implied(graph: &Graph, clamp: &Node, quantize: &Node) -> bool {
    let number =
        |node: &Node, input: usize| graph.constant_input(node, input)?.floats()?.first().copied().map(f64::from);
    let bounds =
        if clamp.op.is("Relu") { (Some(0.0), Some(f64::INFINITY)) } else { (number(clamp, 1), number(clamp, 2)) };
    let zero = graph.constant_input(quantize, 2).map(|zero| {
        let code = crate::encoding::unpack(zero).first().copied().unwrap_or(0);
        let signed = zero.dtype() == DType::I8;
        let (code, lowest) = (f64::from(code), if signed { -128.0 } else { 0.0 });
        (if signed && code >= 128.0 { code - 256.0 } else { code }, lowest)
    });
    let (Some((zero, lowest)), Some(scale)) = (zero, number(quantize, 1)) else { return false };
    let (from, to) = ((lowest - zero) * scale, (lowest + 255.0 - zero) * scale);
    let inside = |low: f64, high: f64| low <= from + 0.5 * scale && high >= to - 0.49 * scale;
    matches!(bounds, (Some(low), Some(high)) if inside(low, high))
}

/// Dequantize nodes that nobody reads any more.
fn erase_unread(graph: &Graph, patch: &mut Patch) {
    let users = Users::of(graph);
    let unread = |node: &Node| node.output(0).is_some_and(|value| users.of_value(value).is_empty());
    for (id, _) in graph.nodes().filter(|(_, node)| node.op.is("DequantizeLinear") && unread(node)) {
        patch.erase(id);
    }
}
