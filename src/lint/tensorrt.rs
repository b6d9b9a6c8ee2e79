//! `TensorRT`, explicit quantization.

use std::collections::BTreeSet;

use passes::tensor::DType;

use super::subject::Subject;
use super::{Lint, error, warning};

const PARSER: &str = "sources of its ONNX parser, 2024-06, and TensorRT 10 documentation";
const PLACEMENT: &str = "TensorRT documentation, recommended placement of Q/DQ layers";
const HEAVY: &[&str] = &["Conv", "ConvTranspose", "MatMul", "Gemm"];

fn is_heavy(node: &passes::ir::Node) -> bool {
    HEAVY.iter().any(|op| node.op.is(op))
}

/// Whether `node` computes on codes.
fn on_codes(s: &Subject<'_>, node: &passes::ir::Node) -> bool {
    is_heavy(node) && s.dequantizer(node, 0).is_some() && s.dequantizer(node, 1).is_some()
}

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8301",
        "a zero point is not 0",
        "quantize with --target tensorrt: codes are symmetric there",
        "assertion shiftIsAllZeros of the parser (TensorRT issues 2774, 4698)",
        |s, found| {
            for q in s.quantizers().filter(|q| !q.is_float8()) {
                if let Some(zero) = q.zeros().iter().find(|zero| **zero != 0) {
                    found.node(q.node, format!("it is {zero}"));
                }
            }
        },
    ),
    error("OQ8302", "codes are unsigned", "use int8", PARSER, |s, found| {
        for q in s.quantizers().filter(|q| matches!(q.storage, Some(DType::U8 | DType::U4 | DType::U16))) {
            found.node(q.node, format!("they are {}", q.storage.map_or("", DType::name)));
        }
    }),
    error(
        "OQ8303",
        "a scale is negative",
        "use positive scales",
        "\"Scale coefficients must all be positive\"",
        |s, found| {
            for q in s.quantizers().filter(|q| q.scales().iter().any(|scale| *scale < 0.0)) {
                found.node(q.node, "a scale is below 0");
            }
        },
    ),
    error("OQ8304", "an activation has several scales", "use one scale per activation", PARSER, |s, found| {
        // A weight may be rounded when the engine is built.
        let activation = |q: &&super::subject::Quantizer<'_>| q.quantizes && s.constant(q.node, 0).is_none();
        for q in s.quantizers().filter(activation).filter(|q| !q.per_tensor()) {
            found.node(q.node, format!("it has {} scales", q.scales().len()));
        }
    }),
    error(
        "OQ8305",
        "several scales without an axis",
        "write `axis`: the parser takes 0 where ONNX means 1",
        PARSER,
        |s, found| {
            for q in s.quantizers().filter(|q| !q.per_tensor() && !q.node.attrs.contains_key("axis")) {
                found.node(q.node, "the axis would be read as 0");
            }
        },
    ),
    error(
        "OQ8306",
        "a bias in 32-bit codes",
        "leave biases in float",
        "DequantizeLinear takes INT8, FP8 and INT4 (onnxruntime issue 14229)",
        |s, found| {
            for q in s.quantizers().filter(|q| q.storage == Some(DType::I32)) {
                found.node(q.node, "int32 is dequantized");
            }
        },
    ),
    error("OQ8307", "codes of a type it has not", "use int8, float8e4m3fn, int4 or float4e2m1", PARSER, |s, found| {
        let odd = [DType::I16, DType::F8E5M2, DType::F8E4M3FnUz, DType::F8E5M2FnUz, DType::I2, DType::U2];
        for q in s.quantizers().filter(|q| q.storage.is_some_and(|dtype| odd.contains(&dtype))) {
            found.node(q.node, format!("they are {}", q.storage.map_or("", DType::name)));
        }
    }),
    error(
        "OQ8308",
        "blocks of 4-bit weights that it does not take",
        "use blocks of 64 or 128 inputs",
        PARSER,
        |s, found| {
            for q in s.quantizers().filter(|q| q.storage == Some(DType::I4)) {
                if q.block() != 64 && q.block() != 128 {
                    found.node(
                        q.node,
                        if q.block() == 0 {
                            "4-bit weights have no blocks".into()
                        } else {
                            format!("blocks are of {}", q.block())
                        },
                    );
                }
            }
        },
    ),
    error(
        "OQ8309",
        "the last extent of 4-bit weights is odd",
        "pad it, or leave the product in float",
        PARSER,
        |s, found| {
            for q in s.quantizers().filter(|q| q.storage == Some(DType::I4)) {
                if let Some(last) = q.codes.and_then(|codes| codes.shape().last()).filter(|last| **last % 2 == 1) {
                    found.node(q.node, format!("it is {last}"));
                }
            }
        },
    ),
    error(
        "OQ8310",
        "the last block is not whole",
        "leave products whose inputs are no whole blocks in float",
        PARSER,
        |s, found| {
            for q in s.quantizers().filter(|q| q.block() > 0) {
                let Some(codes) = q.codes else { continue };
                let axis = passes::ops::positive_axis(q.node.int("axis", 1), codes.shape().len());
                let (Some(extent), Ok(block)) = (axis.map(|axis| codes.shape()[axis]), usize::try_from(q.block()))
                else {
                    continue;
                };
                if !extent.is_multiple_of(block) {
                    found.node(q.node, format!("{extent} is no multiple of {block}"));
                }
            }
        },
    ),
    error(
        "OQ8311",
        "an operator on codes that it does not have",
        "use quantize and dequantize nodes: `onnx-quant convert --target tensorrt`",
        PARSER,
        |s, found| {
            for (_, node) in s.nodes() {
                let standard =
                    ["DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"];
                let named = standard.iter().any(|op| node.op.is(op));
                let contrib = &*node.op.domain == "com.microsoft";
                if named || contrib {
                    found.node(node, format!("there is no {}", node.op.display()));
                }
            }
        },
    ),
    error(
        "OQ8312",
        "the opset is newer than its parser",
        "export for opset 21; 4-bit floats need 23",
        "TensorRT 10.0 reads opsets up to 21",
        |s, found| {
            let newest = if s.quantizers().any(|q| q.storage == Some(DType::F4E2M1)) { 23 } else { 21 };
            if s.opset > newest {
                found.model(format!("it is {}", s.opset));
            }
        },
    ),
    error("OQ8313", "tensors of double precision", "export in f32", PARSER, |s, found| {
        for id in s.graph.value_ids().filter(|id| s.graph.value(*id).ty.dtype() == Some(DType::F64)) {
            let used = !s.users.of_value(id).is_empty();
            if used {
                found.at(passes::diag::Place::Value(s.graph.value(id).name.clone()), "it is f64");
            }
        }
    }),
    error(
        "OQ8314",
        "8-bit integers and 8-bit floats in one model",
        "choose one",
        "TensorRT documentation: one of them per network region",
        |s, found| {
            let kinds: BTreeSet<bool> =
                s.quantizers().filter(|q| q.quantizes).map(super::subject::Quantizer::is_float8).collect();
            if kinds.len() > 1 {
                found.model("some activations are int8, others float8");
            }
        },
    ),
    warning(
        "OQ8320",
        "a quantizer stands between a heavy operator and its activation",
        "quantize behind the activation",
        PLACEMENT,
        |s, found| {
            for (_, node) in s.called(HEAVY).filter(|(_, node)| on_codes(s, node)) {
                let clamped = |q: &&super::subject::Quantizer<'_>| {
                    s.readers(q.node)
                        .iter()
                        .any(|dq| s.readers(dq).iter().any(|reader| reader.op.is("Relu") || reader.op.is("Clip")))
                };
                if s.quantized_by(node).iter().any(clamped) {
                    found.node(node, "it does not fuse with the activation behind it");
                }
            }
        },
    ),
    warning(
        "OQ8321",
        "both operands of an addition behind a convolution are in codes",
        "leave the operand that comes from the convolution in float",
        PLACEMENT,
        |s, found| {
            for (_, node) in s.called(&["Add"]) {
                let direct = |input: usize| {
                    let (_, quantize) = s.dequantizer(node, input).and_then(|dq| s.producer(dq.node, 0))?;
                    s.producer(quantize, 0).filter(|(_, source)| is_heavy(source))
                };
                let both = s.activation(node, 0).is_some() && s.activation(node, 1).is_some();
                if both && (direct(0).is_some() || direct(1).is_some()) {
                    found.node(node, "the convolution before it does not fuse with it");
                }
            }
        },
    ),
    warning(
        "OQ8322",
        "a small product on codes",
        "leave products with fewer than 16 inputs or outputs in float",
        "exclusions of the vendor's model optimizer",
        |s, found| {
            for (_, node) in s.called(&["MatMul", "Gemm"]).filter(|(_, node)| on_codes(s, node)) {
                let shape = s.weight(node, 1).and_then(|w| w.codes).map(passes::tensor::Tensor::shape);
                if let Some(small) = shape.and_then(|shape| shape.iter().find(|n| **n < 16)) {
                    found.node(node, format!("with {small} inputs or outputs it is slower than in float"));
                }
            }
        },
    ),
    warning("OQ8323", "inputs of a Concat have different scales", "give all one scale", PLACEMENT, |s, found| {
        for (_, node) in s.called(&["Concat"]) {
            let scales: Vec<Vec<f32>> =
                (0..node.inputs.len()).filter_map(|i| Some(s.activation(node, i)?.scales())).collect();
            if scales.windows(2).any(|pair| pair[0] != pair[1]) {
                found.node(node, "quantizers are not moved through it");
            }
        }
    }),
    warning(
        "OQ8324",
        "a pair between a Pad and the convolution that reads it",
        "quantize before the Pad, or fold it (`fold-pad`)",
        "28 ms instead of 21 ms (TensorRT issue 2592)",
        |s, found| {
            for (_, node) in s.called(&["Conv"]) {
                let quantize = s.activation(node, 0).and_then(|dq| s.producer(dq.node, 0));
                if quantize.and_then(|(_, q)| s.producer(q, 0)).is_some_and(|(_, source)| source.op.is("Pad")) {
                    found.node(node, "the Pad before it is not merged into it");
                }
            }
        },
    ),
];
