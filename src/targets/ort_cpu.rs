//! ONNX Runtime's CPU execution provider.

use std::borrow::Cow;

use passes::about::About;
use passes::diag::{self, Diagnostic, Place, Severity};
use passes::ir::Node;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Goal, LowerError, Lowered, Outcome, RangesOf, Rule, Scheme, Target, TargetInfo};

use super::NORMALIZE;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct OrtCpu;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "ort-cpu",
        doc: "ONNX Runtime on a CPU. Quantize and dequantize nodes where its optimizer fuses them into integer kernels, and \
              nowhere else: unsigned 8-bit activations per tensor, signed 8-bit weights per output channel, 32-bit biases. \
              Products of float activations with weights in blocks are MatMulNBits.",
        source: "fusions read back from ONNX Runtime 1.31.1's optimized graphs, and its qdq_selectors.cc",
    },
    version: "1.31.1",
};

/// Nodes of ours compute with caches in codes.
pub(super) static ACCEPTS: Accepts = Accepts { caches: true, ..Accepts::USUAL };

/// What fuses. Everything else runs in float between dequantize and quantize, where those nodes would only cost time.
pub(super) static RULES: &[Rule] = &[
    // QLinearConv: without codes after it, the convolution runs in float and its weights are dequantized on every run.
    Rule::always("Conv", Outcome::Codes),
    // QLinearMatMul with codes after it, MatMulIntegerToFloat without.
    Rule::always("MatMul", Outcome::Float),
    // QGemm, with codes or float after it.
    Rule::always("Gemm", Outcome::Float),
    Rule::on_codes("Add", Outcome::Codes).with_clamp(),
    Rule::on_codes("Mul", Outcome::Codes).with_clamp(),
    Rule::on_codes("Concat", Outcome::Codes),
    Rule::on_codes("AveragePool", Outcome::Codes),
    Rule::on_codes("GlobalAveragePool", Outcome::Codes),
    Rule::on_codes("LeakyRelu", Outcome::Codes),
    Rule::on_codes("Sigmoid", Outcome::Codes),
    // Data movement on codes: the same scale and zero point on both sides.
    Rule::on_codes("MaxPool", Outcome::Same),
    Rule::on_codes("Reshape", Outcome::Same),
    Rule::on_codes("Transpose", Outcome::Same),
    Rule::on_codes("Flatten", Outcome::Same),
    Rule::on_codes("Squeeze", Outcome::Same),
    Rule::on_codes("Unsqueeze", Outcome::Same),
    Rule::on_codes("Slice", Outcome::Same),
    Rule::on_codes("Gather", Outcome::Same),
    Rule::on_codes("Expand", Outcome::Same),
    Rule::on_codes("Tile", Outcome::Same),
    Rule::on_codes("DepthToSpace", Outcome::Same),
];

impl Target for OrtCpu {
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
        passes(goal, scheme, true)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let formats = [scheme.activation_format, scheme.weight_format.filter(|_| scheme.activation_bits.is_some())];
        if scheme.activation_format.is_some_and(|name| matches!(name, "uint16" | "int16")) {
            return Some(
                "it computes on 16-bit codes in float, slower than without them: take w8a8, or `--target qnn` for a device that has them"
                    .into(),
            );
        }
        if let Some(format) = formats.into_iter().flatten().find(|name| is_native(name)) {
            return Some(format!(
                "ONNX Runtime {} does not load models that compute on {format} (its optimizer makes a QLinearConv of them, and \
                 fails on a Clip before them): use `--target onnx-qdq`, leave activations in float (a16), or take integers",
                INFO.version
            ));
        }
        refuses(scheme, &[4, 8])
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        let mut lowered = passes::lower::lower(model, Dialect::QDQ_AND_NBITS)?;
        let is_newer = |node: &Node| match &*node.op.name {
            "MatMulNBits" => node.int("bits", 4) != 4,
            // The older one knows tables of 4-bit integers, and nothing that a product shares.
            "GatherBlockQuantized" => node.attrs.contains_key("bits"),
            _ => false,
        };
        let newer = lowered.graph.nodes().filter(|(_, node)| is_newer(node)).count();
        if newer > 0 {
            let message = format!(
                "{newer} MatMulNBits or GatherBlockQuantized of 2 or 8 bits, or of one table: ONNX Runtime 1.22 computes those of 4 bits \
                 only, 1.31 all of them"
            );
            lowered.notes.push(
                Diagnostic::new(diag::NEWER_RUNTIME, Severity::Note, Place::Model, message)
                    .help("for 1.22 take w3 or w4, or --target onnx-qdq"),
            );
        }
        Ok(lowered)
    }
}

/// The passes for `scheme`, which other targets share.
pub(super) fn pipeline(goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
    passes(goal, scheme, false)
}

/// The same; where what has few bits is `simulated` in float, what matrix products read is turned while the model runs, and what nothing
/// multiplies has 8 bits.
fn passes(goal: Goal, scheme: &Scheme, simulated: bool) -> Cow<'static, str> {
    if !scheme.fixes_ranges() {
        return products(goal, scheme);
    }
    let fewer =
        |than: u32| scheme.activation_format.is_none() && scheme.activation_bits.is_some_and(|bits| bits < than);
    let others = if simulated && fewer(8) { ", others=8" } else { "" };
    let rest = match (scheme.activation_bits, goal) {
        (_, Goal::Fast) => {
            &format!("assign-encodings{{observer=min-max, weights=min-max{others}}}, round, correct-bias")
        }
        (Some(8), Goal::Balanced) if scheme.weight_bits == 8 => {
            "assign-encodings{observer=mse, weights=min-max}, round, correct-bias"
        }
        (_, Goal::Balanced) => &format!(
            "smooth, drop-dead,\ncalibrate, assign-encodings{{observer=mse, products=min-max, weights=mse{others}}}, \
             round{{method=gptq}}, refit-scales, correct-bias"
        ),
        (bits, Goal::Best) => {
            // What fewer bits would leave in float would be nearly everything.
            let least = if bits == Some(8) { ", least-db=31" } else { "" };
            // Of few codes none can be spared for outliers.
            let (turned, products) = if simulated && fewer(5) {
                (
                    "reparameterize-norms{to=bare}, defer-softmax, drop-dead,\ncalibrate, rotate-inputs, drop-dead,\ncalibrate, ",
                    "mse",
                )
            } else {
                ("", "min-max")
            };
            let (weights, refit) = if scheme.weight_bits == 8 { ("min-max", "") } else { ("mse", ", refit=3") };
            // Behind equalization: errors are the same for all channels of a basis.
            let bases = if scheme.weight_bits < 8 || fewer(8) { ", rotate-bottlenecks, infer-shapes" } else { "" };
            &format!(
                "{turned}smooth, equalize-layers{bases}, drop-dead,\ncalibrate, \
                 assign-encodings{{observer=mse, products={products}, weights={weights}{least}{others}}}, \
                 round-in-order{{method=enumerate{refit}}}, correct-bias"
            )
        }
    };
    format!("{NORMALIZE},\ncalibrate, {rest}").into()
}

/// The passes for schemes that fix no ranges of activations: only matrix products are about weights, so all of them become `MatMul`.
fn products(goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
    let rest = match (goal, scheme.dynamic) {
        (Goal::Fast, _) | (Goal::Balanced, Some(RangesOf::Tensor)) => "assign-encodings{weights=min-max}, round",
        (Goal::Balanced, _) => "assign-encodings{weights=mse}, round{method=gptq}",
        (Goal::Best, Some(RangesOf::Token) | None) => {
            let turned = scheme.dynamic.is_some() && scheme.activation_format.is_none();
            let turned = if turned { "rotate-inputs, drop-dead,\ncalibrate, " } else { "" };
            // Few bits are worth more gradients.
            let coupled = match scheme.weight_bits {
                ..4 => ", coupled=1",
                4..8 => ", coupled=0.5",
                8.. => "",
            };
            &format!("{turned}assign-encodings{{weights=mse}}, round-in-order{{refit=3{coupled}}}")
        }
        (Goal::Best, Some(RangesOf::Tensor)) => {
            "smooth, drop-dead,\ncalibrate, assign-encodings{observer=min-max, weights=min-max, least-db=31}, \
             round-in-order{method=enumerate}"
        }
    };
    format!("{NORMALIZE}, split-gemm, drop-dead,\ncalibrate, {rest}").into()
}

fn is_native(name: &str) -> bool {
    passes::grid::find(name).is_some_and(passes::lower::is_native)
}

/// Why no consumer of plain quantize and dequantize nodes takes `scheme`, with activations of one of these numbers of `bits`.
pub(super) fn refuses(scheme: &Scheme, bits: &[u32]) -> Option<String> {
    let weights = scheme.weight_format.is_some() || (2..=8).contains(&scheme.weight_bits);
    let activations = match scheme.activation_format {
        Some(name) => is_native(name),
        None => scheme.activation_bits.is_none_or(|n| bits.contains(&n)),
    };
    let in_blocks = scheme.block_format().is_none() || (scheme.activation_bits.is_none() && scheme.block.is_none());
    let blocks = match scheme.block {
        Some(size) => scheme.activation_bits.is_none() && (16..=256).contains(&size) && size.is_power_of_two(),
        None => true,
    };
    let dynamic = scheme.dynamic.is_none()
        || scheme.weight_format.is_none()
            && scheme.activation_format.is_none()
            && scheme.dynamic == Some(RangesOf::Tensor)
            && (5..=8).contains(&scheme.weight_bits)
            && scheme.activation_bits == Some(8)
            && !scheme.power_of_two;
    let zero_points = !scheme.asymmetric || scheme.activation_bits.is_none();
    (!(weights && activations && in_blocks && blocks && zero_points && dynamic)).then(|| {
        "it takes weights of 2 to 8 bits or any of `list formats`, activations of 4 or 8 bits or in float (a16), onnx-qdq also of other \
         numbers of bits and in 8-bit floats (afp8, afp8e5m2), and there zero points (w4a8asym) of weights of up to 4 bits; activations with the range of each run \
         (w8a8dyn) are of 8 bits, beside weights of 5 to 8; with that of each token (w4a4tok) only onnx-qdq, there also in small floats with 2 or 3 bits of mantissa (wfp4ae3m2tok); with float activations also blocks of 16, 32, 64, 128 or 256 inputs (g32), zero points \
         (asym) and block formats (wmxfp4a16)"
            .to_owned()
    })
}
