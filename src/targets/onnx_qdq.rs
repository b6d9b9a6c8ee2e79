//! Standard ONNX with quantize and dequantize nodes, for any consumer that reads them.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, RangesOf, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct OnnxQdq;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "onnx-qdq",
        doc: "Plain ONNX with QuantizeLinear and DequantizeLinear from ai.onnx opset 21. Placement as for ort-cpu, whose \
              rules are the widest that standard consumers share. Activations of other than 4, 8 and 16 bits are clamped between both \
              nodes. ONNX Runtime up to 1.22 hands the memory of 4-bit activations on to larger tensors and writes beyond it: run those \
              with enable_mem_reuse=False there, or 1.31. `tok` (w4a4tok): nodes compute the range of every token from what it is in each run; \
              small floats of 2 or 3 bits of mantissa (wfp4ae3m2tok, wfp4ae2m3tok) are written as the lowest codes of an 8-bit float, for numbers of up to 1e34.",
        source: "ONNX operator specification, opset 21",
    },
    version: "opset 21",
};

impl Target for OnnxQdq {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        ort_cpu::RULES
    }

    fn accepts(&self) -> &'static Accepts {
        &ort_cpu::ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        ort_cpu::OrtCpu.pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let bits = [2, 3, 4, 5, 6, 7, 8, 16];
        if scheme.dynamic != Some(RangesOf::Token) {
            // Of weights in 4-bit storage no operator with integers is made, which would want all zero points to be the same.
            let simulated = scheme.activation_bits.is_some() && scheme.weight_bits <= 4 && scheme.block.is_none();
            return ort_cpu::refuses(&Scheme { asymmetric: scheme.asymmetric && !simulated, ..*scheme }, &bits);
        }
        let signed = scheme
            .activation_format
            .and_then(passes::grid::find)
            .is_some_and(|g| g.info().integer && g.range().0 < 0.0);
        if signed || scheme.power_of_two {
            let what = if signed { "codes without a sign" } else { "scales as they come, no powers of two" };
            return Some(format!(
                "with the range of each token (tok) it takes {what}: w4a4tok, w8a8tok, wfp8afp8tok, wfp4ae3m2tok"
            ));
        }
        // Weights as they are beside float activations, and those as beside plain weights.
        let weights = Scheme { activation_bits: None, activation_format: None, dynamic: None, ..*scheme };
        let format = scheme.activation_format.and_then(passes::grid::find);
        let (activation_bits, activation_format) = match format.filter(|grid| passes::grid::carrier(*grid).is_some()) {
            // Written in codes of 8 bits.
            Some(_) => (Some(8), None),
            None => (scheme.activation_bits, scheme.activation_format),
        };
        let activations = Scheme { activation_format, ..Scheme::integers(8, activation_bits) };
        [weights, activations].iter().find_map(|half| ort_cpu::refuses(half, &bits))
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ_AND_ROWS)
    }
}
