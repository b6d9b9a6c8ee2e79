//! The QONNX dialect.

use passes::ir::Node;

use super::subject::Subject;
use super::{Lint, error, warning};

const EXECUTOR: &str = "qonnx 1.0.0, operator definitions and reference executor";

/// The `Quant` nodes of `s`.
pub(super) fn quants<'a>(s: &Subject<'a>) -> impl Iterator<Item = &'a Node> {
    let domain = |node: &Node| [passes::ops::QONNX_DOMAIN, "onnx.brevitas"].contains(&&*node.op.domain);
    s.nodes().map(|(_, node)| node).filter(move |node| domain(node) && matches!(&*node.op.name, "Quant" | "IntQuant"))
}

/// The numbers at `input` of `node`, where they are constant.
pub(super) fn numbers(s: &Subject<'_>, node: &Node, input: usize) -> Vec<f32> {
    let Some(tensor) = s.constant(node, input) else { return Vec::new() };
    let whole = || tensor.integers().map(|values| values.into_iter().map(|value| value as f32).collect());
    tensor.floats().map(std::borrow::Cow::into_owned).or_else(whole).unwrap_or_default()
}

/// Whether `node` rounds a constant.
pub(super) fn is_weight(s: &Subject<'_>, node: &Node) -> bool {
    s.constant(node, 0).is_some()
}

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8401",
        "QuantizeLinear and DequantizeLinear in a model for readers of Quant",
        "convert it: `onnx-quant convert --target qonnx`",
        "hls4ml issue 1197; FINN converts Quant nodes only",
        |s, found| {
            if let Some(q) = s.quantizers().next() {
                found.node(q.node, format!("there are {} such nodes", s.quantizers().count()));
            }
        },
    ),
    error(
        "OQ8402",
        "a scale does not broadcast against its tensor",
        "give it the rank of the tensor, or one element",
        EXECUTOR,
        |s, found| {
            for node in quants(s) {
                let (Some(scale), Some(value)) = (s.constant(node, 1), node.input(0)) else { continue };
                let Some(rank) = s.graph.value(value).ty.rank() else { continue };
                if scale.len() > 1 && scale.shape().len() != rank {
                    found.node(node, format!("a scale of shape {:?} for {rank} dimensions", scale.shape()));
                }
            }
        },
    ),
    error(
        "OQ8403",
        "a number of bits that is not whole, or not one",
        "write one whole number",
        EXECUTOR,
        |s, found| {
            for node in quants(s) {
                let bits = numbers(s, node, 3);
                if bits.len() != 1 || bits[0].fract() != 0.0 || bits[0] < 1.0 {
                    found.node(node, format!("its bits are {bits:?}"));
                }
            }
        },
    ),
    warning(
        "OQ8404",
        "IntQuant on a constant",
        "call it Quant: the clean-up folds the other name into a float constant",
        "hls4ml then types such weights as its default, fixed<16,6>",
        |s, found| {
            for node in quants(s).filter(|node| &*node.op.name == "IntQuant" && is_weight(s, node)) {
                found.node(node, "it is folded away");
            }
        },
    ),
    error(
        "OQ8405",
        "the number of samples is open",
        "fix it to 1, as --target qonnx does",
        "qonnx: shape mismatch, found (0, ...)",
        |s, found| {
            for &input in s.graph.inputs() {
                let first = s.graph.value(input).ty.tensor().and_then(|ty| ty.shape.as_ref()?.first().cloned());
                if first.is_some_and(|dim| dim.known().is_none()) {
                    found.at(
                        passes::diag::Place::Value(s.graph.value(input).name.clone()),
                        "its first extent is no number",
                    );
                }
            }
        },
    ),
    error(
        "OQ8406",
        "a Quant that nobody reads",
        "remove it: `onnx-quant opt --pipeline drop-dead`",
        "IndexError in the readers' precision inference",
        |s, found| {
            for node in quants(s).filter(|node| s.readers(node).is_empty() && !s.is_output(node)) {
                found.node(node, "its result is not read");
            }
        },
    ),
    error(
        "OQ8407",
        "a Gemm with a factor",
        "fold alpha and beta, as `onnx-quant quantize` does",
        "GemmToMatMul inserts a product of doubles",
        |s, found| {
            for (_, node) in s.called(&["Gemm"]) {
                let other = |name: &str| (node.float(name, 1.0) - 1.0).abs() >= f32::EPSILON;
                if other("alpha") || other("beta") {
                    found.node(node, "its alpha or beta is not 1");
                }
            }
        },
    ),
];
