//! Targets: what a place accepts and how a plan is spelled for it. A target is mostly a table.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::about::About;
use crate::diag::Diagnostic;
use crate::ir::{Graph, OpKey};
use crate::model::{Metadata, Model};

/// A place models run.
pub trait Target: Debug + Send + Sync {
    /// Name, documentation, source, version.
    fn info(&self) -> &'static TargetInfo;
    /// What it runs on codes, by operator.
    fn rules(&self) -> &'static [Rule];
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
}

/// When an operator is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always: it is where the time goes.
    Always,
    /// When all its activations already are codes.
    OnCodes,
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

/// Weights and activations, in how many bits: `w8a8`, `w4a16g32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Bits of weight codes.
    pub weight_bits: u32,
    /// Bits of activation codes; `None` leaves activations in float.
    pub activation_bits: Option<u32>,
    /// So many inputs of a matrix product share a scale; `None`: all of an output channel.
    pub block: Option<usize>,
    /// Whether weights have zero points.
    pub asymmetric: bool,
}

impl Scheme {
    /// Eight bits for both.
    pub const W8A8: Self = Self { weight_bits: 8, activation_bits: Some(8), block: None, asymmetric: false };
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "w{}a{}", self.weight_bits, self.activation_bits.unwrap_or(16))?;
        if let Some(block) = self.block {
            write!(f, "g{block}")?;
        }
        f.write_str(if self.asymmetric { "asym" } else { "" })
    }
}

/// What the user asked for beyond the recipe: nodes or tensors that stay in float, by name, with the pattern that says so.
pub type KeepFloat = BTreeMap<String, String>;
