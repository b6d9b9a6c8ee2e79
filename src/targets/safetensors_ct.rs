//! Weights of linear layers as compressed-tensors has them.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Container, Goal, LowerError, Lowered, Outcome, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct SafetensorsCt;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "safetensors-ct",
        doc: "A folder with model.safetensors and config.json for readers of compressed-tensors: linear layers alone, [outputs, inputs], \
              called after their weights; integers of 2 to 8 bits as pack-quantized, 8-bit floats as float-quantized.",
        source: "compressed-tensors, source of 2026-08; read back here by safetensors 0.8, not by its own reader",
    },
    version: "source of 2026-08-06",
};

static ACCEPTS: Accepts = Accepts { negative_scales: false, whole_blocks: true, ..Accepts::USUAL };

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
        let format = scheme.weight_format.is_none_or(|name| name == "float8e4m3fn" && scheme.block.is_none());
        let weights = format && (2..=8).contains(&scheme.weight_bits) && scheme.activation_bits.is_none();
        (!weights || ort_cpu::refuses(scheme, &[8]).is_some()).then(|| {
            "it holds weights alone, of 2 to 8 bits (w4a16g128, w4a16g32asym, w8a16) or in 8-bit floats (wfp8a16); nvfp4, mxfp4 and \
             activations in codes are not written yet"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ)
    }
}
