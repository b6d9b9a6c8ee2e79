//! tract, a runtime in Rust.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, Outcome, PerChannel, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct Tract;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "tract",
        doc: "The tract runtime. One scale per tensor, as it reads the first of several and no other; products of float activations with 4-bit weights in \
              blocks of 32 are MatMulNBits, which it keeps in 4 bits.",
        source: "tract-onnx 0.23 read and run",
    },
    version: "0.23",
};

// Its optimizer makes wrong numbers of codes behind a Softmax, which products of two activations read.
static ACCEPTS: Accepts =
    Accepts { per_channel: PerChannel::Only(&[]), products_of_activations: false, ..Accepts::USUAL };

/// It computes between dequantize and quantize in float: only what carries weights is worth rounding.
static RULES: &[Rule] = &[
    Rule::always("Conv", Outcome::Float),
    Rule::always("MatMul", Outcome::Float),
    Rule::always("Gemm", Outcome::Float),
];

impl Target for Tract {
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
        let integers = scheme.weight_format.is_none() && scheme.activation_format.is_none();
        let bytes =
            scheme.block.is_none() && scheme.activation_bits == Some(8) && (5..=8).contains(&scheme.weight_bits);
        let blocks =
            scheme.block == Some(32) && scheme.activation_bits.is_none() && matches!(scheme.weight_bits, 3 | 4);
        let plain = !scheme.asymmetric && scheme.dynamic.is_none();
        (!(integers && plain && (bytes || blocks))).then(|| {
            "it reads 8-bit types with one scale per tensor (w8a8) and MatMulNBits of 4 bits in blocks of 32 without zero points (w4a16g32); \
             it has no types of fewer bits, no small floats and no 16-bit codes"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ_AND_NBITS)
    }
}
