//! NPUs behind ONNX Runtime: Qualcomm's and AMD's.

use passes::diag::Place;
use passes::tensor::DType;

use super::{Lint, error, warning};

const QNN_DOC: &str = "documentation and sources of the QNN execution provider";
const VITIS_DOC: &str = "documentation of the XINT8 flow of Vitis AI";

/// Both compile for fixed shapes.
pub(super) static SHAPES: &[Lint] = &[error(
    "OQ8601",
    "a shape is open",
    "fix all extents when exporting",
    "QNN and Vitis AI compile for fixed shapes",
    |s, found| {
        for &input in s.graph.inputs() {
            let shape = s.graph.value(input).ty.tensor().and_then(|ty| ty.shape.clone());
            if shape.is_none_or(|dims| dims.iter().any(|dim| dim.known().is_none())) {
                found.at(Place::Value(s.graph.value(input).name.clone()), "an extent is no number");
            }
        }
    },
)];

/// Qualcomm's.
pub(super) static QNN: &[Lint] = &[
    warning(
        "OQ8611",
        "an operator between codes runs in float",
        "quantize its result as well",
        "what has no codes on one side falls back to the processor",
        |s, found| {
            for (_, node) in
                s.nodes().filter(|(_, node)| !node.op.is("QuantizeLinear") && !node.op.is("DequantizeLinear"))
            {
                let reads = (0..node.inputs.len()).any(|input| s.activation(node, input).is_some());
                let clamped = s
                    .readers(node)
                    .iter()
                    .any(|n| (n.op.is("Relu") || n.op.is("Clip")) && !s.quantized_by(n).is_empty());
                if reads && !s.is_output(node) && s.quantized_by(node).is_empty() && !clamped {
                    found.node(node, "it reads codes and returns float");
                }
            }
        },
    ),
    error(
        "OQ8612",
        "several scales outside a convolution",
        "use one scale per tensor in products",
        QNN_DOC,
        |s, found| {
            for (_, node) in s.called(&["MatMul", "Gemm"]) {
                if s.weight(node, 1).is_some_and(|w| !w.per_tensor()) {
                    found.node(node, "its weight has a scale per output");
                }
            }
        },
    ),
    error(
        "OQ8613",
        "weights of 16 bits with a zero point",
        "use symmetric 16-bit weights, or 8 bits",
        QNN_DOC,
        |s, found| {
            for q in s.quantizers().filter(|q| q.codes.is_some() && q.storage == Some(DType::U16)) {
                found.node(q.node, "they are uint16");
            }
        },
    ),
];

/// AMD's.
pub(super) static VITISAI: &[Lint] = &[
    error(
        "OQ8621",
        "a scale is no power of two",
        "quantize with --target vitisai, or a pow2 scheme",
        VITIS_DOC,
        |s, found| {
            for q in s.quantizers() {
                if let Some(scale) = q.scales().iter().find(|scale| scale.to_bits().trailing_zeros() < 23) {
                    found.node(q.node, format!("it is {scale}"));
                }
            }
        },
    ),
    error("OQ8622", "several scales in one tensor", "use one scale per tensor", VITIS_DOC, |s, found| {
        for q in s.quantizers().filter(|q| !q.per_tensor()) {
            found.node(q.node, format!("it has {}", q.scales().len()));
        }
    }),
    error("OQ8623", "a zero point is not 0", "use symmetric codes", VITIS_DOC, |s, found| {
        for q in s.quantizers() {
            if let Some(zero) = q.zeros().iter().find(|zero| **zero != 0) {
                found.node(q.node, format!("it is {zero}"));
            }
        }
    }),
    warning(
        "OQ8624",
        "a pool or Concat changes the scale",
        "give its inputs and result one scale",
        VITIS_DOC,
        |s, found| {
            for (_, node) in s.called(&["Concat", "MaxPool", "AveragePool", "GlobalAveragePool"]) {
                let inputs = (0..node.inputs.len()).filter_map(|input| Some(s.activation(node, input)?.scales()));
                let mut scales: Vec<Vec<f32>> = inputs.chain(s.quantized_by(node).iter().map(|q| q.scales())).collect();
                scales.dedup();
                if scales.len() > 1 {
                    found.node(node, "its scales are not aligned");
                }
            }
        },
    ),
];
