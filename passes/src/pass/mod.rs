//! Passes: pure functions from a model to a patch, and what runs them.

mod audit;
mod fact;
mod manager;
mod options;
mod pipeline;
mod rewrite;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

pub(crate) use audit::LEAST_RATIO;
pub use fact::Facts;
pub use manager::{Instrument, PassManager, RunError, StepRecord, Trace};
pub use options::{OptionError, OptionInfo, Options};
pub use pipeline::{Pipeline, PipelineError, Step, nearest};
pub use rewrite::{Miss, Rewrite, Site as RewriteSite, Sweep};

use crate::about::About;
use crate::exec::{DataError, Dataset, Executor, Progress, Silent};
use crate::id::ValueId;
use crate::journal::{Journal, NoJournal};
use crate::model::{Model, Patch};
use crate::observe::Rows;
use crate::simulate::SimulateError;
use crate::target::{KeepFloat, Scheme, Schemes, Target};

/// One step of the middle: a pure function from a model to a patch.
pub trait Pass: Debug + Send + Sync {
    /// Name, documentation, facts.
    fn info(&self) -> &'static PassInfo;
    /// What it may do to the function with the options that it has.
    fn fidelity(&self) -> Fidelity {
        self.info().fidelity
    }
    /// What this pass will read of which tensors; the nearest earlier `calibrate` measures it.
    fn wishes(&self, _model: &Model, _cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        BTreeSet::new()
    }
    /// Whether tensors of both models, float and as planned, wait between its steps for every sample.
    fn keeps_samples(&self) -> bool {
        false
    }
    /// The patch that does the work. An empty patch says that nothing is left to do.
    ///
    /// # Errors
    /// [`PassError`] for reasons in the model, the data or the executor.
    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError>;
}

/// What a pass wants measured of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// The distribution of all its values.
    Distribution,
    /// The same on samples that judge what others choose: those held out, or every eighth.
    Judges,
    /// The mean of every index of this axis.
    Means {
        /// Counted from the front.
        axis: usize,
    },
    /// The largest magnitude of every index of this axis.
    Peaks {
        /// Counted from the front.
        axis: usize,
    },
    /// The least, the largest and the mean value of every index of this axis.
    Ends {
        /// Counted from the front.
        axis: usize,
    },
    /// The second moments of the rows that a linear node reads; a second pass over the data.
    Gram(Rows),
}

/// What a pass says about itself.
#[derive(Debug)]
pub struct PassInfo {
    /// Name, documentation, source.
    pub about: About,
    /// What it takes: work, passes over the data, memory.
    pub cost: &'static str,
    /// Must hold before.
    pub requires: Facts,
    /// Hold after.
    pub establishes: Facts,
    /// Survive a patch that changes the graph; the others are dropped.
    pub preserves: Facts,
    /// What it may do to the function.
    pub fidelity: Fidelity,
    /// What can be set.
    pub options: &'static [OptionInfo],
}

/// What a pass may do to the function that the graph computes. Tests read this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fidelity {
    /// Bit-equal.
    Exact,
    /// Equal over the reals; sums are reassociated.
    UpToRounding,
    /// Equal over the reals on the calibration samples; others may come out otherwise.
    OnSamples,
    /// The graph is not touched.
    PlanOnly,
}

/// What a pass may use besides the model.
pub struct PassContext<'a> {
    /// Where the model will run.
    pub target: &'a dyn Target,
    /// In how many bits.
    pub scheme: Scheme,
    /// Runs float graphs.
    pub executor: &'a dyn Executor,
    /// Calibration samples; `None` when none were given.
    pub dataset: Option<&'a dyn Dataset>,
    /// Samples that nothing is fitted to, which judge what passes did; `None` when none were held out.
    pub held_out: Option<&'a dyn Dataset>,
    /// What later passes want measured; the manager fills it in.
    pub wishes: BTreeSet<(ValueId, Wish)>,
    /// What stays in float because the user said so.
    pub keep_float: &'a KeepFloat,
    /// Nodes or weights in other bits because the user said so.
    pub schemes: &'a Schemes,
    /// How tables that are gathered from are written; `None` leaves them in float.
    pub embeddings: Option<Scheme>,
    /// Worker threads.
    pub threads: usize,
    /// The most bytes that tensors held at once for measuring may take.
    pub tap_budget: u64,
    /// The most bytes that tensors of samples may take while they wait for the next stage of a walk.
    pub pair_budget: u64,
    /// The most bytes that what a pass keeps of all weights may take, beside samples that wait and what is measured.
    pub state_budget: u64,
    /// The same with samples that wait, for a pass during which nothing is measured: what sessions of the pass hold of weights comes out of it.
    pub lone_budget: u64,
    /// The bytes of tensors for one sample, where they are known; empty to have them worked out from the shapes.
    pub sizes: BTreeMap<ValueId, u64>,
    /// Told about long work.
    pub progress: &'a dyn Progress,
    /// Keeps what long work has come to.
    pub journal: &'a dyn Journal,
}

impl<'a> PassContext<'a> {
    /// A context for `w8a8` without samples, in which nothing is kept in float and nobody is told; one worker thread, 256 MiB for
    /// tensors held at once for measuring and 1 GiB for those that wait between stages. Callers set what differs.
    pub fn new(target: &'a dyn Target, executor: &'a dyn Executor) -> Self {
        static NOTHING_KEPT: KeepFloat = KeepFloat::new();
        static ALL_ALIKE: Schemes = Schemes::new();
        Self {
            target,
            scheme: Scheme::W8A8,
            executor,
            dataset: None,
            held_out: None,
            wishes: BTreeSet::new(),
            keep_float: &NOTHING_KEPT,
            schemes: &ALL_ALIKE,
            embeddings: None,
            threads: 1,
            tap_budget: 256 << 20,
            pair_budget: 1 << 30,
            state_budget: u64::MAX,
            lone_budget: u64::MAX,
            sizes: BTreeMap::new(),
            progress: &Silent,
            journal: &NoJournal,
        }
    }
}

/// Why a pass stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    /// The model or plan does not run.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// A sample cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The pass needs samples.
    #[error("calibration samples are needed, and none were given: pass them with --data")]
    NoData,
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Something in the model.
    #[error("{0}")]
    Model(String),
}

/// A pass in the catalogue.
pub struct PassEntry {
    /// Name, documentation, facts.
    pub info: &'static PassInfo,
    /// Makes it from its options.
    pub build: fn(&Options) -> Result<Box<dyn Pass>, OptionError>,
}
