//! `OpenVINO`'s CPU plugin.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, Outcome, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct OpenVinoCpu;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "openvino-cpu",
        doc: "OpenVINO on a CPU. Quantize and dequantize nodes that its low-precision transformations take: unsigned 8-bit activations per \
              tensor, signed 8-bit weights per output channel; weights of 4 or 8 bits in blocks beside float activations stay in few bits \
              in memory.",
        source: "precisions read back from OpenVINO 2026.4.1's runtime models",
    },
    version: "2026.4.1",
};

static ACCEPTS: Accepts = Accepts { narrow: true, ..Accepts::USUAL };

/// What its low-precision transformations keep in integers.
static RULES: &[Rule] = &[
    Rule::always("Conv", Outcome::Codes),
    Rule::always("MatMul", Outcome::Float),
    Rule::always("Gemm", Outcome::Float),
    Rule::on_codes("Add", Outcome::Codes).with_clamp(),
    Rule::on_codes("Mul", Outcome::Codes).with_clamp(),
    Rule::on_codes("Concat", Outcome::Codes),
    Rule::on_codes("AveragePool", Outcome::Codes),
    Rule::on_codes("GlobalAveragePool", Outcome::Codes),
    Rule::on_codes("MaxPool", Outcome::Same),
    Rule::on_codes("Reshape", Outcome::Same),
    Rule::on_codes("Transpose", Outcome::Same),
    Rule::on_codes("Flatten", Outcome::Same),
    Rule::on_codes("Squeeze", Outcome::Same),
    Rule::on_codes("Unsqueeze", Outcome::Same),
    Rule::on_codes("Slice", Outcome::Same),
];

impl Target for OpenVinoCpu {
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
        if scheme.dynamic.is_some() {
            return Some(
                "it computes DynamicQuantizeLinear and MatMulInteger in 32 bits, slower than float: take w8a16g128, whose activations it \
                 rounds by itself"
                    .into(),
            );
        }
        let widths = matches!(scheme.weight_bits, 4 | 8)
            || scheme.activation_bits.is_some() && (5..=8).contains(&scheme.weight_bits);
        let integers = scheme.weight_format.is_none() && scheme.activation_format.is_none();
        let plain = integers && widths && scheme.activation_bits.is_none_or(|bits| bits == 8);
        (!plain || ort_cpu::refuses(scheme, &[8]).is_some()).then(|| {
            "it keeps in few bits what has 8-bit activations and weights of 5 to 8 bits (w8a8), or float activations and weights of 4 or 8 \
             bits, also in blocks of 32, 64 or 128 inputs (w4a16g32, w4a16g128asym)"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ)
    }
}
