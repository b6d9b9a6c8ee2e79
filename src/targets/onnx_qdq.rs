//! Standard ONNX with quantize and dequantize nodes, for any consumer that reads them.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct OnnxQdq;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "onnx-qdq",
        doc: "Plain ONNX with QuantizeLinear and DequantizeLinear from ai.onnx opset 21. Placement as for ort-cpu, whose \
              rules are the widest that standard consumers share. Activations of other than 4, 8 and 16 bits are clamped between both \
              nodes.",
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

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        ort_cpu::OrtCpu.pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        ort_cpu::refuses(scheme, &[2, 3, 4, 5, 6, 7, 8, 16])
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ)
    }
}
