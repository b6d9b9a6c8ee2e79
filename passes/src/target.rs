//! Targets: what a place accepts and how a plan is spelled for it. A target is mostly a table.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::about::About;
use crate::diag::Diagnostic;
use crate::grid;
use crate::grid::block::{self, BlockFormat, BlockScale};
use crate::ir::{Graph, OpKey};
use crate::model::{Metadata, Model};

/// A place models run.
pub trait Target: Debug + Send + Sync {
    /// Name, documentation, source, version.
    fn info(&self) -> &'static TargetInfo;
    /// What it runs on codes, by operator.
    fn rules(&self) -> &'static [Rule];
    /// The files that it reads.
    fn container(&self) -> Container {
        Container::Onnx
    }
    /// How it wants numbers written.
    fn accepts(&self) -> &'static Accepts {
        &Accepts::USUAL
    }
    /// The passes that prepare a model for it.
    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str>;
    /// Why it cannot take `scheme`, with what it can; `None` when it can.
    fn refuses(&self, scheme: &Scheme) -> Option<String>;
    /// Spells the plan.
    ///
    /// # Errors
    /// [`LowerError`] for a plan that cannot be said here.
    fn lower(&self, model: &Model) -> Result<Lowered, LowerError>;

    /// The rule for `op`, where it has one.
    fn rule(&self, op: &OpKey) -> Option<&'static Rule> {
        self.rules().iter().find(|rule| op.domain.is_empty() && *rule.op == *op.name)
    }
}

/// What a target says about itself.
#[derive(Debug)]
pub struct TargetInfo {
    /// Name, documentation, source.
    pub about: About,
    /// The consumer's version that the rules were measured on.
    pub version: &'static str,
}

/// The files that a model becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// One ONNX file, with external data beside it where that is large.
    Onnx,
    /// A folder: an ONNX file whose weights lie in a `.safetensors` file, and a manifest.
    Packed,
    /// A folder: the weights of linear layers as compressed-tensors has them, and its configuration.
    CompressedTensors,
    /// A folder: the weights as the memories of a circuit, a C header, a manifest, and the model in QONNX.
    Memories,
}

/// How a target wants the numbers written that it computes on.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent properties of a target")]
pub struct Accepts {
    /// The integers that activations become.
    pub activations: Activations,
    /// The operators whose weights have one scale per output channel; those of others have one in all.
    pub per_channel: PerChannel,
    /// How biases are written.
    pub bias: Bias,
    /// Whether the most negative code of 8-bit weights is left out.
    pub narrow: bool,
    /// Whether every scale must be a power of two.
    pub power_of_two: bool,
    /// Whether the scale of a block may be negative, which gives its longer tail the extra code.
    pub negative_scales: bool,
    /// Whether weights that are no whole number of blocks stay in float.
    pub whole_blocks: bool,
    /// Whether products of two activations run on codes.
    pub products_of_activations: bool,
    /// Whether what stays in float may be written in 16 bits.
    pub half: bool,
    /// Whether caches of decoders may be codes whose scales come in beside them.
    pub caches: bool,
    /// Whether it runs one sample at a time: an open leading extent is written as 1.
    pub one_sample: bool,
}

impl Accepts {
    /// What most runtimes on processors take: unsigned activations with zero points, a scale per output channel, 32-bit biases.
    pub const USUAL: Self = Self {
        activations: Activations::Affine,
        per_channel: PerChannel::Everywhere,
        bias: Bias::Int32,
        narrow: false,
        power_of_two: false,
        negative_scales: true,
        whole_blocks: false,
        products_of_activations: true,
        half: false,
        caches: false,
        one_sample: false,
    };

    /// Whether weights of `op` have one scale per output channel.
    pub fn per_channel(&self, op: &OpKey) -> bool {
        match self.per_channel {
            PerChannel::Everywhere => true,
            PerChannel::Only(ops) => ops.iter().any(|name| op.is(name)),
        }
    }

    /// `scheme` with what this asks of every scheme.
    #[must_use]
    pub fn completed(&self, scheme: Scheme) -> Scheme {
        let rounds = scheme.weight_format.is_none() && scheme.activation_format.is_none();
        Scheme { power_of_two: scheme.power_of_two || self.power_of_two && rounds, ..scheme }
    }
}

/// The integers that activations become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Unsigned, with a zero point.
    Affine,
    /// Signed, the zero point 0.
    Symmetric,
    /// Unsigned for tensors that are never negative, signed for others; the zero point 0.
    BySign,
}

/// Where weights have one scale per output channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerChannel {
    /// Wherever there are output channels.
    Everywhere,
    /// In these ai.onnx operators.
    Only(&'static [&'static str]),
}

/// How biases are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// 32-bit integers at input scale times weight scale.
    Int32,
    /// As float numbers.
    Float,
}

/// How one operator runs on codes.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The ai.onnx operator.
    pub op: &'static str,
    /// When it is worth it.
    pub when: When,
    /// What its result must be.
    pub result: Outcome,
    /// Whether a clamp (Relu, Clip) that reads the result disappears into the quantizer after it.
    pub absorbs_clamp: bool,
    /// The fewest inputs and outputs of a matrix product that make it worth it.
    pub least: usize,
}

impl Rule {
    /// A rule for an operator that is always quantized, and absorbs a clamp.
    pub const fn always(op: &'static str, result: Outcome) -> Self {
        Self { op, when: When::Always, result, absorbs_clamp: true, least: 0 }
    }

    /// A rule for an operator that is quantized where its inputs are codes.
    pub const fn on_codes(op: &'static str, result: Outcome) -> Self {
        Self { op, when: When::OnCodes, result, absorbs_clamp: false, least: 0 }
    }

    /// The same, for an operator that absorbs a clamp.
    #[must_use]
    pub const fn with_clamp(self) -> Self {
        Self { absorbs_clamp: true, ..self }
    }

    /// The same, for an operator that is not worth it below so many inputs and outputs.
    #[must_use]
    pub const fn from(self, least: usize) -> Self {
        Self { least, ..self }
    }
}

/// When an operator is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always: it is where the time goes.
    Always,
    /// When all its activations already are codes.
    OnCodes,
    /// An addition that fuses into the heavy operator in front of it: only what comes from elsewhere is read as codes.
    Skip,
}

/// What the result of a quantized operator must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Codes, or the operator stays in float.
    Codes,
    /// Float is fine and loses less.
    Float,
    /// Codes with the scale and zero point of input 0.
    Same,
}

/// How much a run may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The fastest run.
    Fast,
    /// The default.
    Balanced,
    /// The best result.
    Best,
}

/// No longer the float model: its own type, so that no pass can be run on it by mistake.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// With quantize and dequantize nodes.
    pub graph: Graph,
    /// Carried to the wire.
    pub meta: Arc<Metadata>,
    /// What the user should know.
    pub notes: Vec<Diagnostic>,
}

/// Why a plan cannot be spelled.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct LowerError {
    /// The node or tensor.
    pub place: String,
    /// What cannot be said.
    pub problem: String,
}

/// Whose range every run chooses by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangesOf {
    /// That of a whole tensor.
    Tensor,
    /// That of every token: of all channels at one place.
    Token,
}

/// How schemes say it.
const RANGES_OF: &[(&str, RangesOf)] = &[("dyn", RangesOf::Tensor), ("tok", RangesOf::Token)];

/// Weights and activations, in how many bits or in which format: `w8a8`, `w4a16g32`, `wfp8afp8`, `w8a8pow2`, `w8a8dyn`,
/// `w4a4tok`, `wnvfp4anvfp4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Bits of weight codes.
    pub weight_bits: u32,
    /// The grid or block format of weights, where it is not the integers of so many bits.
    pub weight_format: Option<&'static str>,
    /// Bits of activation codes; `None` leaves activations in float.
    pub activation_bits: Option<u32>,
    /// The grid of activations, where it is not the integers of so many bits.
    pub activation_format: Option<&'static str>,
    /// So many inputs of a matrix product share a scale; `None`: all of an output channel.
    pub block: Option<usize>,
    /// Whether weights have zero points.
    pub asymmetric: bool,
    /// Whether every scale is a power of two: what multiplies by it is a shift.
    pub power_of_two: bool,
    /// Whose ranges every run chooses anew, where it does.
    pub dynamic: Option<RangesOf>,
}

impl Scheme {
    /// Eight bits for both.
    pub const W8A8: Self = Self::integers(8, Some(8));

    /// Integers of so many bits, one scale per output channel, no zero points for weights.
    pub const fn integers(weight_bits: u32, activation_bits: Option<u32>) -> Self {
        let (weight_format, activation_format) = (None, None);
        Self {
            weight_bits,
            weight_format,
            activation_bits,
            activation_format,
            block: None,
            asymmetric: false,
            power_of_two: false,
            dynamic: None,
        }
    }

    /// Whether activations have ranges that are fixed beforehand, by calibration.
    pub fn fixes_ranges(&self) -> bool {
        self.activation_bits.is_some() && self.dynamic.is_none() && self.activation_block().is_none()
    }

    /// Whether a number of every activation is measured beforehand: its range, or the factor of the scales that runs give its blocks.
    pub fn measures(&self) -> bool {
        self.fixes_ranges() || self.activation_block().is_some_and(|format| format.scale == BlockScale::Float8)
    }

    /// The block format of activations, where they have one: every run then gives their blocks scales.
    pub fn activation_block(&self) -> Option<&'static BlockFormat> {
        block::find(self.activation_format?)
    }

    /// The block format of weights, where they have one.
    pub fn block_format(&self) -> Option<&'static BlockFormat> {
        block::find(self.weight_format?)
    }

    /// The scheme that `text` names, as [`std::fmt::Display`] writes it; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('w')?;
        text.match_indices('a').find_map(|(at, _)| Self::of(&text[..at], &text[at + 1..]))
    }

    /// The scheme of weights `weight` and what comes after them.
    fn of(weight: &str, rest: &str) -> Option<Self> {
        let of_run = |(suffix, of): &(&str, RangesOf)| Some((rest.strip_suffix(suffix)?, Some(*of)));
        let (rest, dynamic) = RANGES_OF.iter().find_map(of_run).unwrap_or((rest, None));
        let (rest, power_of_two) = rest.strip_suffix("pow2").map_or((rest, false), |rest| (rest, true));
        let (rest, asymmetric) = rest.strip_suffix("asym").map_or((rest, false), |rest| (rest, true));
        let (activation, block) = rest.split_once('g').map_or((rest, None), |(a, g)| (a, Some(g)));
        let block = block.map(|g| g.parse().ok().filter(|&g: &usize| g > 0)).map_or(Some(None), |g| g.map(Some))?;
        let (weight_bits, weight_format) = number(weight)?;
        let (activation_bits, activation_format) = match number(activation)? {
            (16 | 32, None) => (None, None),
            (bits, format) => (Some(bits), format),
        };
        let of_blocks = activation_format.is_some_and(|name| block::find(name).is_some());
        let scheme = Self {
            weight_bits,
            weight_format,
            activation_bits,
            activation_format,
            block,
            asymmetric,
            power_of_two,
            dynamic,
        };
        let plain = weight_format.is_none() || !asymmetric && (scheme.block_format().is_none() || !power_of_two);
        let ranged = dynamic.is_none() || activation_bits.is_some();
        let of_blocks = !of_blocks || activation_format == weight_format && dynamic.is_none() && block.is_none();
        (of_blocks && plain && ranged).then_some(scheme)
    }
}

/// Short names of formats in schemes.
const ALIASES: &[(&str, &str)] = &[
    ("1", "bipolar"),
    ("fp8", "float8e4m3fn"),
    ("fp8e5m2", "float8e5m2"),
    ("fp8fnuz", "float8e4m3fnuz"),
    ("fp4", "float4e2m1"),
];

/// Bits, and the name of the format where `text` is no number.
fn number(text: &str) -> Option<(u32, Option<&'static str>)> {
    let alias = ALIASES.iter().find(|(short, _)| *short == text);
    if let (None, Ok(bits)) = (alias, text.parse()) {
        return Some((bits, None));
    }
    let name = alias.map_or(text, |(_, name)| name);
    if let Some(format) = block::find(name) {
        return Some((format.element.info().bits, Some(format.about.name)));
    }
    // Of integers only those that are no plain number of bits: 16 alone leaves activations in float.
    let info = grid::find(name).filter(|grid| !grid.info().integer || matches!(name, "uint16" | "int16"))?.info();
    Some((info.bits, Some(info.about.name)))
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short =
            |name: &'static str| ALIASES.iter().find(|(_, long)| *long == name).map_or(name, |(short, _)| short);
        match self.weight_format {
            Some(name) => write!(f, "w{}", short(name))?,
            None => write!(f, "w{}", self.weight_bits)?,
        }
        match self.activation_format {
            Some(name) => write!(f, "a{}", short(name))?,
            None => write!(f, "a{}", self.activation_bits.unwrap_or(16))?,
        }
        if let Some(block) = self.block {
            write!(f, "g{block}")?;
        }
        f.write_str(if self.asymmetric { "asym" } else { "" })?;
        f.write_str(if self.power_of_two { "pow2" } else { "" })?;
        f.write_str(RANGES_OF.iter().find(|(_, of)| self.dynamic == Some(*of)).map_or("", |(suffix, _)| suffix))
    }
}

/// Nodes or tensors that stay in float, by name, with the option that says so: `--keep-float head*`.
pub type KeepFloat = BTreeMap<String, String>;

/// Nodes or weights that are written in another scheme than the rest, by name.
pub type Schemes = BTreeMap<String, Scheme>;
