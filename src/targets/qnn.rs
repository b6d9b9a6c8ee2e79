//! Qualcomm's NPU, through ONNX Runtime.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, Outcome, PerChannel, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct Qnn;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "qnn",
        doc: "ONNX Runtime's QNN execution provider. Quantize and dequantize nodes around every operator that it computes on codes, 8-bit \
              (w8a8) or 16-bit activations (w8auint16); a scale per output channel in convolutions only; shapes must be fixed.",
        source: "documentation and sources of the execution provider; no such device ran it here",
    },
    version: "ONNX Runtime 1.31",
};

static ACCEPTS: Accepts = Accepts { per_channel: PerChannel::Only(&["Conv", "ConvTranspose"]), ..Accepts::USUAL };

/// It has no float to fall back to: everything that has an integer form takes it.
static RULES: &[Rule] = &[
    Rule::always("Conv", Outcome::Codes),
    Rule::always("ConvTranspose", Outcome::Codes),
    Rule::always("MatMul", Outcome::Codes),
    Rule::always("Gemm", Outcome::Codes),
    Rule::on_codes("Add", Outcome::Codes).with_clamp(),
    Rule::on_codes("Sub", Outcome::Codes).with_clamp(),
    Rule::on_codes("Mul", Outcome::Codes).with_clamp(),
    Rule::on_codes("Div", Outcome::Codes).with_clamp(),
    Rule::on_codes("Concat", Outcome::Codes),
    Rule::on_codes("AveragePool", Outcome::Codes),
    Rule::on_codes("GlobalAveragePool", Outcome::Codes),
    Rule::on_codes("LeakyRelu", Outcome::Codes),
    Rule::on_codes("Relu", Outcome::Codes),
    Rule::on_codes("Sigmoid", Outcome::Codes),
    Rule::on_codes("Tanh", Outcome::Codes),
    Rule::on_codes("Gelu", Outcome::Codes),
    Rule::on_codes("Elu", Outcome::Codes),
    Rule::on_codes("HardSwish", Outcome::Codes),
    Rule::on_codes("HardSigmoid", Outcome::Codes),
    Rule::on_codes("Softmax", Outcome::Codes),
    Rule::on_codes("LayerNormalization", Outcome::Codes),
    Rule::on_codes("ReduceMean", Outcome::Codes),
    Rule::on_codes("Resize", Outcome::Codes),
    Rule::on_codes("MaxPool", Outcome::Same),
    Rule::on_codes("Reshape", Outcome::Same),
    Rule::on_codes("Transpose", Outcome::Same),
    Rule::on_codes("Flatten", Outcome::Same),
    Rule::on_codes("Squeeze", Outcome::Same),
    Rule::on_codes("Unsqueeze", Outcome::Same),
    Rule::on_codes("Slice", Outcome::Same),
    Rule::on_codes("Gather", Outcome::Same),
    Rule::on_codes("DepthToSpace", Outcome::Same),
];

impl Target for Qnn {
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
        let weights = scheme.weight_format.is_none() && matches!(scheme.weight_bits, 4..=8);
        let activations = match scheme.activation_format {
            Some(name) => name == "uint16",
            None => scheme.activation_bits == Some(8),
        };
        let plain = scheme.block.is_none() && !scheme.asymmetric && scheme.dynamic.is_none();
        (!(weights && activations && plain)).then(|| {
            "it takes weights of 4 to 8 bits and activations of 8 or 16 bits, all with ranges fixed beforehand: w8a8, w8auint16, w4auint16"
                .into()
        })
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QDQ_OF_ONE)
    }
}
