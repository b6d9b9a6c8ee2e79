//! `OpenVINO`'s CPU plugin.

use passes::tensor::DType;

use super::{Lint, error, warning};

const PROBED: &str = "runtime models of OpenVINO 2026.4.1, read back";

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8201",
        "an operator of ONNX Runtime that the reader does not have",
        "convert it to pairs: `onnx-quant convert --target openvino-cpu`",
        "the list of operators of its ONNX frontend",
        |s, found| {
            for (_, node) in s.nodes() {
                // What it makes of codes for itself; operators that it shares with others are in the frontend.
                let made = ["QGemm", "QAttention", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"];
                let own = node.op.name.starts_with("QLinear") || made.contains(&&*node.op.name);
                if &*node.op.domain == "com.microsoft" && own {
                    found.node(node, format!("there is no {}", node.op.name));
                }
            }
        },
    ),
    warning(
        "OQ8202",
        "weights in unsigned codes with a zero point",
        "use signed codes with zero point 0",
        PROBED,
        |s, found| {
            for (_, node) in s.called(&["Conv", "MatMul", "Gemm"]) {
                if s.activation(node, 0).is_some() && s.weight(node, 1).is_some_and(|w| w.storage == Some(DType::U8)) {
                    found.node(node, "it and what stands before it run in float");
                }
            }
        },
    ),
    warning(
        "OQ8203",
        "16-bit codes of activations",
        "use 8 bits",
        "all in float, and 16-bit steps are lost: off by 0.07 in a small net",
        |s, found| {
            for q in s.quantizers().filter(|q| q.quantizes) {
                if matches!(q.storage, Some(DType::U16 | DType::I16)) {
                    found.node(q.node, "16-bit codes are dropped");
                }
            }
        },
    ),
    warning(
        "OQ8204",
        "ranges that each run chooses",
        "calibrate (w8a8), or leave activations in float (w8a16g128)",
        "decomposed into 32-bit operators with conversions",
        |s, found| {
            for (_, node) in s.called(&["DynamicQuantizeLinear"]) {
                found.node(node, "it is slower than float");
            }
        },
    ),
    warning(
        "OQ8205",
        "signed codes behind a clamp",
        "use unsigned codes with zero point 0",
        "the first of two convolutions ran in f32",
        |s, found| {
            for (_, clamp) in s.called(&["Relu", "Clip"]) {
                if s.quantized_by(clamp).iter().any(|q| q.storage == Some(DType::I8)) {
                    found.node(clamp, "the convolution before it runs in float");
                }
            }
        },
    ),
    warning("OQ8206", "codes around an operator that computes in float", "leave it in float", PROBED, |s, found| {
        for (_, node) in s.called(&["Softmax", "LayerNormalization", "Gelu", "Sigmoid", "HardSwish", "Exp", "Erf"]) {
            if s.activation(node, 0).is_some() && !s.quantized_by(node).is_empty() {
                found.node(node, format!("{} runs in float", node.op.name));
            }
        }
    }),
];
