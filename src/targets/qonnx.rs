//! The QONNX dialect, for tools that build hardware.

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
pub(super) struct Qonnx;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "qonnx",
        doc: "QONNX: Quant and FloatQuant nodes of any width behind weights, biases and results. Weights are symmetric with a scale per \
              output channel; activations are unsigned where they are never negative, signed elsewhere, without zero points.",
        source: "operator definitions of qonnx 1.0.0, executed with its reference executor",
    },
    version: "1.0.0",
};

static ACCEPTS: Accepts = Accepts {
    caches: false,
    activations: Activations::BySign,
    per_channel: PerChannel::Everywhere,
    bias: Bias::Int32,
    narrow: true,
    power_of_two: false,
    negative_scales: false,
    whole_blocks: false,
    products_of_activations: true,
    half: false,
    one_sample: true,
};

impl Target for Qonnx {
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
        fpga::pipeline(goal, scheme, "")
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        fpga::refuses(scheme, 15)
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QONNX)
    }
}
