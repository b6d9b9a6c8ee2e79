//! Weights of linear layers as compressed-tensors has them.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{
    Accepts, Activations, Bias, Container, Goal, LowerError, Lowered, Outcome, Rule, Scheme, Target, TargetInfo,
};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct SafetensorsCt;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "safetensors-ct",
        doc: "A folder with model.safetensors and config.json for readers of compressed-tensors: linear layers alone, [outputs, inputs], \
              called after their weights; integers of 2 to 8 bits as pack-quantized, beside 8-bit activations as int-quantized, 8-bit floats \
              as float-quantized (naive-quantized beside float activations), and nvfp4, mxfp4 and mxfp8.",
        source: "compressed-tensors 0.20, whose own reader decompresses what is written",
    },
    version: "0.20.0",
};

static ACCEPTS: Accepts = Accepts {
    activations: Activations::Symmetric,
    bias: Bias::Float,
    negative_scales: false,
    whole_blocks: true,
    products_of_activations: false,
    ..Accepts::USUAL
};

/// Linear layers, their activations in float.
static RULES: &[Rule] = &[Rule::always("MatMul", Outcome::Float), Rule::always("Gemm", Outcome::Float)];

impl Target for SafetensorsCt {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        RULES
    }

    fn container(&self) -> Container {
        Container::CompressedTensors
    }

    fn accepts(&self) -> &'static Accepts {
        &ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        ort_cpu::pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let e4m3 = Some("float8e4m3fn");
        let weights_alone = scheme.activation_bits.is_none();
        let both = scheme.block.is_none() && scheme.dynamic.is_none() && !scheme.asymmetric;
        let int8 = scheme.weight_format.is_none() && scheme.weight_bits == 8 && scheme.activation_bits == Some(8);
        let int8 = int8 && scheme.activation_format.is_none();
        let fp8 = scheme.weight_format == e4m3 && scheme.activation_format == e4m3;
        let weights = match scheme.weight_format {
            None => (2..=8).contains(&scheme.weight_bits),
            Some("float8e4m3fn") => scheme.block.is_none(),
            Some(name) => matches!(name, "nvfp4" | "mxfp4" | "mxfp8"),
        };
        let taken = weights && weights_alone && ort_cpu::refuses(scheme, &[8]).is_none() || both && (int8 || fp8);
        (!taken).then(|| {
            "it holds weights of 2 to 8 bits (w4a16g128, w4a16g32asym, w8a16), in 8-bit floats (wfp8a16) or in blocks (wnvfp4a16, wmxfp4a16, \
             wmxfp8a16), and weights beside activations of 8 bits (w8a8, wfp8afp8)"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ)
    }
}
