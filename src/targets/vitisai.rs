//! AMD's NPU and DPU, through Vitis AI.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{
    Accepts, Activations, Bias, Goal, LowerError, Lowered, Outcome, PerChannel, Rule, Scheme, Target, TargetInfo,
};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct VitisAi;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "vitisai",
        doc: "Vitis AI for convolutional networks: signed 8-bit codes with one power-of-two scale per tensor and zero points 0, quantize and \
              dequantize nodes around every operator that it runs.",
        source: "documentation of the XINT8 flow; no such device ran it here",
    },
    version: "XINT8",
};

static ACCEPTS: Accepts = Accepts {
    caches: false,
    activations: Activations::Symmetric,
    per_channel: PerChannel::Only(&[]),
    bias: Bias::Int32,
    narrow: false,
    power_of_two: true,
    negative_scales: false,
    whole_blocks: false,
    products_of_activations: true,
    half: false,
    one_sample: true,
};

/// Operators of convolutional networks; pools keep the scale of what they read.
static RULES: &[Rule] = &[
    Rule::always("Conv", Outcome::Codes),
    Rule::always("ConvTranspose", Outcome::Codes),
    Rule::always("MatMul", Outcome::Codes),
    Rule::always("Gemm", Outcome::Codes),
    Rule::on_codes("Add", Outcome::Codes).with_clamp(),
    Rule::on_codes("Mul", Outcome::Codes).with_clamp(),
    Rule::on_codes("Concat", Outcome::Codes),
    Rule::on_codes("AveragePool", Outcome::Same),
    Rule::on_codes("GlobalAveragePool", Outcome::Same),
    Rule::on_codes("MaxPool", Outcome::Same),
    Rule::on_codes("Reshape", Outcome::Same),
    Rule::on_codes("Transpose", Outcome::Same),
    Rule::on_codes("Flatten", Outcome::Same),
    Rule::on_codes("Squeeze", Outcome::Same),
    Rule::on_codes("Unsqueeze", Outcome::Same),
    Rule::on_codes("Slice", Outcome::Same),
];

impl Target for VitisAi {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        RULES
    }

    fn accepts(&self) -> &'static Accepts {
        &ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        format!("one-sample, {}", ort_cpu::pipeline(goal, scheme)).into()
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let odd_bits = scheme.weight_bits != 8 || scheme.activation_bits != Some(8);
        let odd_format = scheme.weight_format.is_some() || scheme.activation_format.is_some();
        (odd_bits || odd_format || scheme.block.is_some() || scheme.asymmetric || scheme.dynamic.is_some())
            .then(|| "it takes 8-bit weights and activations with fixed ranges: w8a8".into())
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ_OF_ONE)
    }
}
