//! hls4ml, which writes C++ for high-level synthesis.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{
    Accepts, Activations, Bias, Goal, LowerError, Lowered, PerChannel, Rule, Scheme, Target, TargetInfo,
};

use super::fpga;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct Hls4ml;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "hls4ml",
        doc: "QONNX as hls4ml turns it into fixed-point C++: one power-of-two scale per tensor, zero points 0, a Quant behind every \
              input, weight, bias and result, so that every type is exact and its emulation computes the very numbers of ours.",
        source: "hls4ml 1.3.0: conversions compiled with g++ and compared with its reference executor",
    },
    version: "1.3.0",
};

pub(super) static ACCEPTS: Accepts = Accepts {
    caches: false,
    activations: Activations::BySign,
    per_channel: PerChannel::Only(&[]),
    bias: Bias::Int32,
    narrow: true,
    power_of_two: true,
    negative_scales: false,
    whole_blocks: false,
    products_of_activations: true,
    half: false,
    one_sample: true,
};

/// What its reader of ONNX knows.
pub(crate) static OPERATORS: &[&str] = &[
    "MatMul",
    "Gemm",
    "Relu",
    "Tanh",
    "Sigmoid",
    "LeakyRelu",
    "ThresholdedRelu",
    "Elu",
    "Selu",
    "PRelu",
    "Softmax",
    "Softsign",
    "Softplus",
    "BatchNormalization",
    "Transpose",
    "Reshape",
    "Flatten",
    "Resize",
    "Pad",
    "AveragePool",
    "MaxPool",
    "GlobalMaxPool",
    "GlobalAveragePool",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Average",
    "Max",
    "Min",
    "Concat",
    "Sum",
    "Conv",
    "Dropout",
    "Identity",
    "Quant",
    "IntQuant",
    "BipolarQuant",
];

impl Target for Hls4ml {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        fpga::RULES
    }

    fn accepts(&self) -> &'static Accepts {
        &ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        fpga::pipeline(goal, scheme, "pool-to-conv, infer-shapes,\n")
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        if scheme.weight_format == Some("bipolar") {
            return Some(
                "it computes wrong results from weights of one bit (OQ8434): take w2a8, or --target finn".into(),
            );
        }
        fpga::refuses(scheme, 8)
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QONNX)
    }
}
