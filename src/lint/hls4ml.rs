//! hls4ml.

use super::qonnx::{is_weight, numbers, quants};
use super::{Lint, error, warning};
use crate::targets::HLS4ML_OPERATORS;

const MEASURED: &str = "hls4ml 1.3.0: conversions compiled with g++ and compared with qonnx's executor";

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8421",
        "an operator that it does not know",
        "split the model before it, or write it with operators that it has",
        "\"Unsupported operation type\" of hls4ml 1.3.0",
        |s, found| {
            for (_, node) in s.nodes() {
                let quantizes = node.op.is("QuantizeLinear") || node.op.is("DequantizeLinear");
                if !quantizes && !HLS4ML_OPERATORS.contains(&&*node.op.name) {
                    found.node(node, format!("there is no {}", node.op.display()));
                }
            }
        },
    ),
    error(
        "OQ8422",
        "several scales in one tensor",
        "use one scale per tensor",
        "IndexError in InferPrecision, also for powers of two",
        |s, found| {
            for node in quants(s).filter(|node| numbers(s, node, 1).len() > 1) {
                found.node(node, format!("it has {}", numbers(s, node, 1).len()));
            }
        },
    ),
    error(
        "OQ8423",
        "a scale is no power of two",
        "quantize with --target hls4ml, or a pow2 scheme",
        "39 % and 16 % of outputs equal with scale 0.03",
        |s, found| {
            for node in quants(s) {
                let odd = |scale: &&f32| scale.to_bits().trailing_zeros() < 23;
                if let Some(scale) = numbers(s, node, 1).iter().find(odd) {
                    found.node(node, format!("with {scale} the result is not exact"));
                }
            }
        },
    ),
    error(
        "OQ8424",
        "a zero point is not 0",
        "use zero points of 0",
        "14 % of outputs equal with zero point 100",
        |s, found| {
            for node in quants(s).filter(|node| numbers(s, node, 2).iter().any(|zero| *zero != 0.0)) {
                found.node(node, "its results are wrong");
            }
        },
    ),
    error("OQ8425", "a Gemm without a bias", "add a bias of zeros", "IndexError in GemmToMatMul", |s, found| {
        for (_, node) in s.called(&["Gemm"]).filter(|(_, node)| node.input(2).is_none()) {
            found.node(node, "it has no third input");
        }
    }),
    error(
        "OQ8426",
        "a convolution with attributes left out",
        "write kernel_shape, strides, pads, dilations and group",
        "\"Required attribute dilations unspecified\"",
        |s, found| {
            for (_, node) in s.called(&["Conv"]) {
                let missing: Vec<&str> = ["kernel_shape", "strides", "pads", "dilations", "group"]
                    .into_iter()
                    .filter(|name| !node.attrs.contains_key(*name))
                    .collect();
                if !missing.is_empty() {
                    found.node(node, format!("it has no {}", missing.join(", ")));
                }
            }
        },
    ),
    error(
        "OQ8427",
        "a grouped convolution that is not depthwise",
        "write it as a dense one with zeros, or one per group",
        "\"Depth multiplier must be an integer\"; multiplier 2 is silently wrong",
        |s, found| {
            for (_, node) in s.called(&["Conv"]).filter(|(_, node)| node.int("group", 1) > 1) {
                let shape = s
                    .producer(node, 1)
                    .and_then(|(_, quant)| s.constant(quant, 0))
                    .or_else(|| s.constant(node, 1))
                    .map(passes::tensor::Tensor::shape);
                let groups = node.int("group", 1);
                let depthwise = matches!(shape, Some([outputs, 1, ..]) if i64::try_from(*outputs) == Ok(groups));
                if !depthwise {
                    found.node(node, format!("{} groups", node.int("group", 1)));
                }
            }
        },
    ),
    error(
        "OQ8428",
        "a dilated convolution",
        "write it with zeros between its taps",
        "AssertionError in layers.py",
        |s, found| {
            for (_, node) in s.called(&["Conv"]) {
                if node.ints("dilations").is_some_and(|list| list.iter().any(|n| *n != 1)) {
                    found.node(node, "its dilation is not 1");
                }
            }
        },
    ),
    error(
        "OQ8429",
        "a pool that it computes otherwise",
        "write it as a depthwise convolution, as --target hls4ml does for GlobalAveragePool",
        MEASURED,
        |s, found| {
            for (_, node) in s.called(&["GlobalAveragePool", "GlobalMaxPool", "AveragePool"]) {
                found.node(node, "no output of its C++ is that of the reference");
            }
        },
    ),
    error(
        "OQ8430",
        "a padded MaxPool",
        "pad before it",
        "assertion in nnet_utils with io_stream, 20 % of outputs equal with io_parallel",
        |s, found| {
            for (_, node) in s.called(&["MaxPool"]) {
                if node.ints("pads").is_some_and(|pads| pads.iter().any(|n| *n != 0)) {
                    found.node(node, "it has pads");
                }
            }
        },
    ),
    error(
        "OQ8431",
        "a result is read by several before it is rounded",
        "round it once, wide enough, and read that",
        "11 % of outputs equal",
        |s, found| {
            for (_, node) in s.called(&["Conv", "Gemm", "MatMul", "Add"]) {
                let readers = s.readers(node);
                if readers.len() > 1 && readers.iter().any(|reader| &*reader.op.name == "Quant") {
                    found.node(node, format!("{} nodes read it", readers.len()));
                }
            }
        },
    ),
    warning("OQ8432", "a weight or bias in float", "round it: it would become fixed<16,6>", MEASURED, |s, found| {
        for (_, node) in s.called(&["Conv", "Gemm", "MatMul"]) {
            for input in 1..node.inputs.len() {
                let values = s.constant(node, input).and_then(passes::tensor::Tensor::floats);
                if values.is_some_and(|values| values.iter().any(|v| *v != 0.0)) {
                    found.node(node, format!("its input {input} has no Quant"));
                }
            }
        }
    }),
    warning(
        "OQ8433",
        "an activation behind which nothing rounds",
        "put a Quant behind it",
        "fixed<16,6> is the default type: no output equal",
        |s, found| {
            for (_, node) in s.called(&["Relu", "LeakyRelu", "Sigmoid", "Tanh"]) {
                if !s.readers(node).iter().any(|reader| &*reader.op.name == "Quant") {
                    found.node(node, "its result is cut to the default type");
                }
            }
        },
    ),
    error(
        "OQ8434",
        "weights of one bit by BipolarQuant",
        "use Quant with two bits and narrow=1",
        "1 % of outputs equal",
        |s, found| {
            for (_, node) in s.nodes().filter(|(_, node)| &*node.op.name == "BipolarQuant") {
                if is_weight(s, node) {
                    found.node(node, "its results are wrong");
                }
            }
        },
    ),
];
