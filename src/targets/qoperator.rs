//! Operators on codes, for runtimes that know no quantize and dequantize pairs.

use std::borrow::Cow;

use passes::about::About;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct QOperator;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "qoperator",
        doc: "Plain ONNX in which convolutions and products are QLinearConv and QLinearMatMul; what has no such operator is float between \
              dequantize and quantize nodes. For runtimes that do not fuse those.",
        source: "ONNX operator specification, QLinearConv-10 and QLinearMatMul-21; run by ONNX Runtime 1.31.1",
    },
    version: "opset 21",
};

impl Target for QOperator {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        ort_cpu::RULES
    }

    fn accepts(&self) -> &'static Accepts {
        &Accepts::USUAL
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        ort_cpu::pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let bytes = scheme.activation_bits == Some(8) && (5..=8).contains(&scheme.weight_bits);
        let integers = scheme.weight_format.is_none() && scheme.activation_format.is_none();
        (!bytes || !integers || scheme.dynamic.is_some() || ort_cpu::refuses(scheme, &[8]).is_some())
            .then(|| "its operators take 8-bit activations with fixed ranges and weights of 5 to 8 bits: w8a8".into())
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower_to_qoperators(model)
    }
}
