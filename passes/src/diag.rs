//! Diagnostics: what a run tells its user, each with a stable code that `explain` has a page for.

use std::fmt;

use crate::id::Name;

/// A stable code, `OQ` and four digits: 1xxx load and import, 2xxx normalize, 3xxx calibrate, 4xxx equalize and
/// analysis, 5xxx rounding, 6xxx lower and emit, 7xxx verify. What is our own bug says so in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(pub &'static str);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// For information.
    Note,
    /// The result stands, but the user should look.
    Warning,
    /// The run, or what was asked of it, failed.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// What it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The model as a whole.
    Model,
    /// These nodes.
    Node(Name),
    /// This tensor.
    Value(Name),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model => f.write_str("the model"),
            Self::Node(name) => write!(f, "node `{}`", name.escape_debug()),
            Self::Value(name) => write!(f, "tensor `{}`", name.escape_debug()),
        }
    }
}

/// Something the user should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Which kind of thing.
    pub code: Code,
    /// How bad.
    pub severity: Severity,
    /// Where.
    pub place: Place,
    /// What and why, one sentence, lower case, no full stop.
    pub message: String,
    /// What to do about it, where something can be done.
    pub help: Option<String>,
}

impl Diagnostic {
    /// A diagnostic without help.
    pub fn new(code: Code, severity: Severity, place: Place, message: impl Into<String>) -> Self {
        Self { code, severity, place, message: message.into(), help: None }
    }

    /// The same with a way out.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]: {}\n  at {}", self.severity, self.code.0, self.message, self.place)?;
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

/// That so many of what was seen of the tensor `name` were no numbers, where second moments are summed.
pub(crate) fn nonfinite(name: &Name, count: u64) -> Diagnostic {
    let message = format!("{count} values were NaN or infinite where second moments were summed, and count as 0 there");
    Diagnostic::new(NONFINITE_ACTIVATION, Severity::Warning, Place::Value(name.clone()), message)
}

/// The page of one code.
#[derive(Clone, Copy, Debug)]
pub struct CodePage {
    /// The code.
    pub code: Code,
    /// One line.
    pub title: &'static str,
    /// What it means and what to do.
    pub text: &'static str,
}

macro_rules! codes {
    ($($name:ident = $code:literal, $title:literal, $text:literal;)*) => {
        $(#[doc = $title] pub const $name: Code = Code($code);)*
        /// Every code, in order.
        pub static CODES: &[CodePage] = &[$(CodePage { code: $name, title: $title, text: $text }),*];
    };
}

codes! {
    NEWER_IR = "OQ1001", "the model is written for a newer IR than this tool knows",
        "Fields that the newer IR added are not carried. Re-export the model for an IR up to 14, or update onnx-quant.";
    OPAQUE_OPERATOR = "OQ1002", "an operator is not known here and is carried untouched",
        "The operator's domain or name is not in the operator table. It keeps its inputs, outputs and attributes, stays in float, and statistics of what it computes come from the executor, if that knows it.";
    UNCONVERTED_OPSET = "OQ1003", "the model's opset is newer than 21 and is kept",
        "Operators are converted up to opset 21. A model that already imports a newer one is carried as it is.";
    FOLD_TOO_LARGE = "OQ2001", "a constant expression was not folded because its result would be large",
        "Folding is capped at 64 MiB per result, and what grows a constant more than 16 times beyond a mebibyte is left to the runtime, so that a small file cannot ask for terabytes.";
    BLOCKED_REWRITE = "OQ2002", "a rewrite saw its pattern but declined",
        "The message names the reason. Nothing was changed.";
    NONFINITE_ACTIVATION = "OQ3001", "a tensor had NaN or infinite values in calibration",
        "They are counted and left out of the range, so that no infinity sets a scale. Infinite masks are usual and harmless in attention; anything else deserves a look at the data.";
    FEW_SAMPLES = "OQ3002", "very few values were seen for a tensor",
        "With fewer than 100 values a percentile or an entropy search says little; the range falls back to minimum and maximum.";
    NEVER_SEEN = "OQ3003", "a tensor was never computed during calibration",
        "No sample reached it, as in a branch that was not taken. What needs its range stays in float.";
    NO_MOMENTS = "OQ3004", "a method that rounds by data had no data",
        "Its second moments come from calibration samples; files of statistics do not hold them. Weights were rounded to nearest.";
    NO_GRADIENTS = "OQ3005", "gradients do not pass a part of the model, or tell nothing of it",
        "The message names the operator or the reason. What would have been learned or told by them is left as it was.";
    VARIANTS = "OQ3006", "the recipe drew variants of the samples",
        "Weights of few bits are rounded by second moments, and few words leave directions in them that rounding spends its freedom on. Where --recipe best rounds for float activations, or for a range per token, it draws variants of every sample until there are enough words, as --augment N does; --augment 0 draws none.";
    BEYOND_DATA = "OQ3007", "a weight of few bits is not rounded by data",
        "Rounding by data sums second moments of what a layer reads, row by row. The message says why that is not done for this layer: its weight goes to the nearest points, which at few bits loses more. Where several nodes read one weight, give each its own; write automatic padding out.";
    KEPT_FLOAT = "OQ4001", "a node that could be quantized stays in float",
        "The message gives the reason: an option, a shape, a missing constant, or a rule of the target.";
    SMALL_RANGE = "OQ4002", "a tensor was all zero in calibration",
        "It gets scale 1 and zero point 0. If the tensor is really dead, its consumers do nothing; if not, the data does not exercise the model.";
    ALLOCATED = "OQ4003", "bits were given to weights by what they cost",
        "Each weight was rounded alone and the loss at the outputs measured; the reason of every layer gives its share. Losses are taken to add up, and rounding by data lowers them: the fidelity of the summary is what came of it.";
    OVER_BUDGET = "OQ4004", "the result loses more than --max-drop allows",
        "More bits and more nodes in float were tried, as far as the scheme and the budget for bits allow, and the best is what was written. Allow more, use --recipe best, or more samples.";
    FLOAT_CACHE = "OQ4005", "an input that looks like a cache stays in float",
        "A cache in codes is a float input that a Concat reads, first of two along an axis before the last, whose result the model returns; the extent of its last axis is known. Beside it, Shape may read the input, and one other node where nothing in the model reads the result. Inputs in 16-bit floats are none: what is computed here is f32, behind a Cast; export the model with its caches in f32. Operators that hold the cache inside (GroupQueryAttention, Attention) have no such place: export the model with attention written out.";
    RELAXED = "OQ4006", "what clamps let pass is the same for the samples only",
        "relax-clamps takes the end of a clamp away where calibration never came to it, so that scales can pass; equalize-layers{clamps=M} scales channels in front of clamps that stay, so that what no sample brought may be clamped earlier or later. Data that is unlike the samples may go beyond; leave the pass or its option out, or give more samples.";
    LEARNED_BASIS = "OQ4007", "a residual stream was turned into a basis that was learned",
        "The note of the model says what rounding the weights around the stream loses, in shares of the power of what they compute, before and after. That of a tensor gives the logarithm of its quantization space utilization rate per channel: 0 where a range for all channels is filled evenly, less where some channels are louder than others, or depend on one another.";
    HELD_OUT = "OQ4008", "codes that some samples chose were judged by the others",
        "Where there are fewer than five independent rows of samples for two columns and codes have fewer than eight bits, a few rows of a layer are rounded by the second moments of one half of the samples and judged by those of the other, around the weight that all samples ask for. The message says what they lose there, beside nearest codes: near 1 the samples tell next to nothing about the worst layer, and more of them, or --augment, would help. Where it saves loss, such moments are trusted less.";
    UNDONE = "OQ4009", "what a pass rewrote changed what the model returns, and was undone",
        "Passes that rewrite keep the function. The float model is run before and after each on one or two samples: where an output changes by more than 1e-4 of its largest value, the parts that the pass changed independently of one another are tried by halves, and those that change it are put back. Where a pass keeps the function on samples alone, up to eight samples judge, those of --hold-out where there are any, and 50 dB must be left. Numbers too large or too small for floats are the usual cause.";
    JUDGED = "OQ4010", "a step that may lose something was judged by samples",
        "Of a pass that keeps the function on samples alone, the message says what is left of the float outputs on the samples that judge: those of --hold-out, which nothing is fitted to, or where there are none those that the pass itself went by. Of ranges that leave outliers out, it says how many do: a range is cut only where the error on the samples that judge is smaller too, those of --hold-out or else every eighth, without which the cut was found; where there are neither, nobody judges, and the expected error alone decides.";
    BIAS_SATURATED = "OQ5001", "a bias did not fit 32 bits at its scale and the weight scale was raised",
        "The bias is stored at input scale times weight scale. Where the weights of a channel are tiny, that product is too fine for the bias; the channel's weight scale was raised until it fits.";
    RESUMED = "OQ5002", "the run went on from what an earlier one has learned",
        "The journal beside the output held what an interrupted run with the same model, data and options had come to. The bytes are those of a run that was never interrupted; --fresh learns anew.";
    CUT_IN_HALF = "OQ5003", "numbers beyond 65504 were cut at that, the largest of 16-bit floats",
        "With --rest f16 what stays in float is written in 16 bits. Masks of attention, which add -1e9 or the like before a Softmax, do the same at -65504; a weight, a bias or a factor that large does not. Leave --rest f16 out where that matters: the fidelity of the summary is that of the numbers as they were cut.";
    UNRESUMABLE = "OQ5004", "what is learned of the whole model is too large for the journal",
        "A run that is stopped while it learns the whole model goes on from its last check where that takes less than a gibibyte and less than the memory that is left; the message says what it takes. Stopped there it learns the whole model from the start; the bytes are the same. Fewer numbers are learned with codes=0, or with a method that keeps less (signround, lrq).";
    FEWER_SAMPLES = "OQ5005", "memory holds fewer samples than were given to learn from",
        "What is learned of the whole model is held for all weights at once, and samples take what that leaves: as many as fit, spread over all. Allow more with --max-memory, or learn less (codes=0, or a method that keeps less: signround, lrq).";
    CODES_STAYED = "OQ5006", "no code changed while the whole model was learned",
        "A weight has to be moved by a quarter of a step of its grid before its code is another, and few steps at a low rate do not move it so far: what was gained was gained by scales, biases and norms. With codes=0 the same is learned in less memory; more steps, or a higher rate, change codes.";
    GREW = "OQ6002", "the quantized model is not smaller than the float model",
        "Little of the model is weights that could be quantized. The summary says what was quantized and what was not.";
    NOT_WRITABLE = "OQ6003", "a number format has no ONNX operator that reads it",
        "Weights in it are written as float constants that hold exactly the numbers which their codes stand for: the model computes what the format would, but is not smaller. Formats with an operator are integers of up to 8 bits and the four 8-bit floats.";
    NEWER_RUNTIME = "OQ6004", "what was written needs a newer runtime than the oldest that is still common",
        "The message names what older runtimes lack. Where the file must run there, take the bits that they have, or --target onnx-qdq, which writes plain operators.";
    TIES_DIFFER = "OQ6005", "ties round otherwise in the dialect that was written",
        "QONNX adds the zero point before it rounds, ONNX after: where a value lies exactly between two codes and the zero point is odd, the code is the other of the two. Everything else is the same; symmetric codes (--target qonnx makes those) have no such case.";
    VERIFY_STRUCTURE = "OQ7001", "the written model does not read back as what was planned",
        "The file was imported again and differs from the plan it was written from. This is a bug in onnx-quant: please report it with the model.";
    VERIFY_NUMBERS = "OQ7002", "the written model does not compute what was simulated",
        "The file was imported again and run on calibration samples; a tensor differs from the simulation. This is a bug in onnx-quant: please report it with the model.";
    LOW_FIDELITY = "OQ7003", "the quantized model is far from the float model",
        "End to end the outputs differ more than a usual 8-bit model's do. See the worst layers in the summary, and keep those in float with --keep-float.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_in_order() {
        assert!(CODES.windows(2).all(|pair| pair[0].code < pair[1].code));
    }
}
