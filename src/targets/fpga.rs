//! What the targets for programmable logic share: a `Quant` node behind everything that is computed.

use std::borrow::Cow;

use passes::target::{Goal, Outcome, Rule, Scheme};

use super::ort_cpu;

/// What has a `Quant` behind it. Results are always codes: there is no float between two layers of hardware.
pub(super) static RULES: &[Rule] = &[
    Rule::always("Conv", Outcome::Codes),
    Rule::always("MatMul", Outcome::Codes),
    Rule::always("Gemm", Outcome::Codes),
    Rule::on_codes("Add", Outcome::Codes).with_clamp(),
    Rule::on_codes("Mul", Outcome::Codes).with_clamp(),
    Rule::on_codes("Concat", Outcome::Codes),
    Rule::on_codes("AveragePool", Outcome::Codes),
    Rule::on_codes("GlobalAveragePool", Outcome::Codes),
    Rule::on_codes("MaxPool", Outcome::Same),
    Rule::on_codes("Reshape", Outcome::Same),
    Rule::on_codes("Flatten", Outcome::Same),
    Rule::on_codes("Transpose", Outcome::Same),
];

/// The passes for `scheme`, with `prepare`, passes over the float graph, before anything is measured.
pub(super) fn pipeline(goal: Goal, scheme: &Scheme, prepare: &str) -> Cow<'static, str> {
    let text = ort_cpu::pipeline(goal, scheme);
    let clamps = if scheme.power_of_two { "fit-clamps, infer-shapes, drop-dead,\n" } else { "" };
    let at = text.find("calibrate").unwrap_or(text.len());
    format!("one-sample, {}{prepare}{clamps}{}", &text[..at], &text[at..]).into()
}

/// Why no reader of `Quant` nodes takes `scheme`, with activations of up to `most` bits.
pub(super) fn refuses(scheme: &Scheme, most: u32) -> Option<String> {
    let signs = scheme.weight_format == Some("bipolar");
    let integers = (scheme.weight_format.is_none() || signs && most > 7) && scheme.activation_format.is_none();
    let bits = |bits: u32| (2..=most).contains(&bits);
    let widths = scheme.weight_format.is_some() || (2..=8).contains(&scheme.weight_bits);
    let activations =
        scheme.activation_format.is_some_and(|name| name != "bipolar") || scheme.activation_bits.is_some_and(bits);
    let plain =
        scheme.block.is_none() && !scheme.asymmetric && scheme.dynamic.is_none() && scheme.block_format().is_none();
    (!(widths && activations && plain && (integers || most > 8))).then(|| {
        let floats = if most > 8 { ", or the small floats of `list formats` for both" } else { "" };
        format!(
            "it takes weights of 1 to 8 bits and activations of 2 to {most} bits{floats}, without blocks, zero points of weights and \
             ranges of each run: w8a8, w6a6 and w4a4 are usual"
        )
    })
}
