//! Operators that go on computing in 32 bits in a graph of 16.

use crate::ir::{Graph, Node};
use crate::tensor::DType;

/// Whether `node` reads `input` in f32 in a graph that computes in f16.
pub(super) fn keeps_input(graph: &Graph, node: &Node, input: usize, from: DType) -> bool {
    // The factors of a Resize are f32 whatever it resizes.
    computes_in_f32(graph, node, from) || node.op.is("Resize") && input == 2
}

/// Operators that return f32 unless they are told otherwise.
pub(super) const WINDOWS: &[&str] = &["HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"];

/// Operators of ai.onnx whose floats have no form in 16 bits.
const ONLY_F32: &[&str] = &[
    "Range",
    "NonMaxSuppression",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "TfIdfVectorizer",
    "StringNormalizer",
    "HannWindow",
    "HammingWindow",
    "BlackmanWindow",
    "MelWeightMatrix",
    "SequenceConstruct",
    "SequenceInsert",
    "SequenceAt",
    "SequenceEmpty",
    "SequenceErase",
    "SplitToSequence",
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
];

/// Whether `node` goes on computing in f32: it has no form in 16 bits that is known here, or its scales would not be what they are.
pub(super) fn computes_in_f32(graph: &Graph, node: &Node, from: DType) -> bool {
    let foreign = !node.op.domain.is_empty();
    let named = ONLY_F32.iter().any(|name| node.op.is(name));
    foreign || named || holds(node, from) || is_dequantizer_in_f32(graph, node)
}

/// Scales that are computed or codes themselves, and those of 32-bit biases.
fn is_dequantizer_in_f32(graph: &Graph, node: &Node) -> bool {
    let dtype = node.input(0).and_then(|codes| graph.value(codes).ty.dtype());
    let multiples = dtype == Some(DType::F8E4M3Fn) && node.int("block_size", 0) == 0 && node.input(2).is_none();
    let computed = graph.constant_input(node, 1).is_none();
    node.op.is("DequantizeLinear") && (computed || multiples || dtype == Some(DType::I32))
}

/// Whether a graph inside `node` computes in `dtype`.
pub(super) fn holds(node: &Node, dtype: DType) -> bool {
    let typed = |graph: &Graph| graph.value_ids().any(|id| graph.value(id).ty.dtype() == Some(dtype));
    node.bodies.iter().any(|body| typed(&body.graph) || body.graph.nodes().any(|(_, node)| holds(node, dtype)))
}
