//! `TensorRT`, by explicit quantization.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{
    Accepts, Activations, Bias, Goal, LowerError, Lowered, Outcome, PerChannel, Rule, Scheme, Target, TargetInfo, When,
};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct TensorRt;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "tensorrt",
        doc: "TensorRT on a GPU. Symmetric quantize and dequantize nodes in front of heavy operators and of the skip input of additions, \
              nowhere behind an operator that fuses; biases in float; products with fewer than 16 inputs or outputs left alone.",
        source: "TensorRT 10 documentation on explicit quantization and the sources of its ONNX parser; no GPU ran it here",
    },
    version: "10",
};

static ACCEPTS: Accepts = Accepts {
    caches: false,
    activations: Activations::Symmetric,
    per_channel: PerChannel::Everywhere,
    bias: Bias::Float,
    narrow: true,
    power_of_two: false,
    negative_scales: false,
    whole_blocks: true,
    products_of_activations: true,
    half: true,
    one_sample: false,
};

/// Results stay in float: a quantizer behind a heavy operator keeps it from fusing with what follows.
static RULES: &[Rule] = &[
    Rule { absorbs_clamp: false, ..Rule::always("Conv", Outcome::Float) },
    Rule { absorbs_clamp: false, ..Rule::always("ConvTranspose", Outcome::Float) },
    Rule { absorbs_clamp: false, ..Rule::always("MatMul", Outcome::Float) }.from(16),
    Rule { absorbs_clamp: false, ..Rule::always("Gemm", Outcome::Float) }.from(16),
    Rule { when: When::Skip, ..Rule::on_codes("Add", Outcome::Float) },
];

impl Target for TensorRt {
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
        ort_cpu::pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let e4m3 = Some("float8e4m3fn");
        let both = |name: &str| scheme.weight_format == Some(name) && scheme.activation_format == Some(name);
        let blackwell = both("nvfp4") || both("mxfp8");
        let plain = !scheme.asymmetric && scheme.dynamic.is_none() && !scheme.power_of_two;
        let integers = scheme.weight_format.is_none() && scheme.activation_format.is_none() && scheme.block.is_none();
        let int8 = integers && scheme.weight_bits == 8 && scheme.activation_bits == Some(8);
        let fp8 = scheme.weight_format == e4m3 && scheme.activation_format == e4m3 && scheme.block.is_none();
        let blocks =
            scheme.weight_format.is_none() && scheme.weight_bits == 4 && matches!(scheme.block, Some(64 | 128));
        (!(plain && (int8 || fp8 || blocks && scheme.activation_bits.is_none() || blackwell))).then(|| {
            "it takes w8a8, wfp8afp8, on GPUs from Blackwell on wnvfp4anvfp4 and wmxfp8amxfp8, and 4-bit weights in blocks of 64 or 128 \
             inputs beside float activations (w4a16g128), all without zero points"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::TENSORRT)
    }
}
