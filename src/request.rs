//! What a user asks for, and why it can fail.

use std::path::PathBuf;

use passes::pass::{PassError, RunError};
use passes::target::{Goal, Scheme, Target};

use crate::dataset::ImageOptions;
use crate::emit::{self, Layout};
use crate::overrides::Set;
use crate::verify;

/// How samples are chosen out of more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Select {
    /// The first ones.
    #[default]
    First,
    /// Any, by a fixed draw.
    Random,
    /// Those whose second moments come nearest to those of all.
    Herding,
}

/// The type of what stays in float.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Rest {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits, where the target takes them.
    F16,
}

/// What a user asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The float model.
    pub input: PathBuf,
    /// Where the quantized model goes; `None` plans and writes nothing.
    pub output: Option<PathBuf>,
    /// Calibration samples.
    pub data: Option<PathBuf>,
    /// How pictures become samples.
    pub image: Option<ImageOptions>,
    /// At most so many samples.
    pub samples: Option<usize>,
    /// How those are chosen.
    pub select: Select,
    /// So many samples are left out of everything but judging.
    pub hold_out: usize,
    /// So many variants of every sample join it in what weights and ranges are fitted to; `None` leaves that to the recipe.
    pub augment: Option<usize>,
    /// So many views of every picture do.
    pub views: usize,
    /// Statistics measured before, instead of samples.
    pub stats: Option<PathBuf>,
    /// Where it will run.
    pub target: &'static dyn Target,
    /// How weights become memories, for targets that write those.
    pub layout: Layout,
    /// Bits.
    pub scheme: Scheme,
    /// How much it may cost.
    pub goal: Goal,
    /// Whether residual streams of decoders are turned into another basis.
    pub rotate: bool,
    /// The type of what stays in float.
    pub rest: Rest,
    /// What is learned of weights by gradients, block after block, with its options: `brecq{iterations=1000}`.
    pub learn: Option<String>,
    /// The same from what the whole model returns, after that.
    pub distill: Option<String>,
    /// The exact passes, instead of the target's.
    pub pipeline: Option<String>,
    /// Overrides the observer of the target's pipeline.
    pub observer: Option<String>,
    /// Overrides the rounding method of the target's pipeline.
    pub rounding: Option<String>,
    /// Patterns of node and tensor names that stay in float.
    pub keep_float: Vec<String>,
    /// Nodes and weights in other schemes, by pattern.
    pub set: Vec<Set>,
    /// How tables that are gathered from are written; `None` leaves them in float.
    pub embeddings: Option<Scheme>,
    /// Of a number in the caches of a decoder; `None` leaves them in float.
    pub cache: Option<u32>,
    /// The mean bits of a weight.
    pub budget: Option<f64>,
    /// The metric of `allocate-bits`, where not the usual one.
    pub sensitivity: Option<String>,
    /// Whether gradients tell what rounding costs at every layer.
    pub first_order: bool,
    /// The squared error of the outputs over their square that is allowed.
    pub max_drop: Option<f64>,
    /// The executor's name.
    pub executor: String,
    /// Worker threads.
    pub threads: usize,
    /// The most bytes that the run may take.
    pub max_memory: Option<u64>,
    /// What becomes of the journal that an earlier run has left.
    pub journal: Kept,
}

/// What becomes of what an interrupted run has learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kept {
    /// It is gone on from, where it is of the same run.
    #[default]
    Used,
    /// The same, and it has to be there.
    Needed,
    /// It is thrown away.
    Fresh,
}

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user's input or options.
    #[error("{0}")]
    Input(String),
    /// The target cannot take the model or the scheme.
    #[error("{0}")]
    Target(String),
    /// Memory or disk.
    #[error("{0}")]
    Resources(String),
    /// The user interrupted. Nothing was written.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// The same; what was learned is kept.
    #[error(
        "interrupted; no model was written. What has been learned is kept in {0}: the same command goes on from there"
    )]
    Paused(String),
}

impl Error {
    /// An error about the user's input.
    pub fn input(error: impl std::fmt::Display) -> Self {
        Self::Input(error.to_string())
    }
}

impl From<RunError> for Error {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Pass { error: PassError::Interrupted, .. } => Self::Interrupted,
            other => Self::Input(other.to_string()),
        }
    }
}

impl From<emit::WriteError> for Error {
    fn from(error: emit::WriteError) -> Self {
        Self::Resources(error.to_string())
    }
}

impl From<verify::VerifyError> for Error {
    fn from(error: verify::VerifyError) -> Self {
        Self::Input(format!("verifying the result: {error}"))
    }
}
