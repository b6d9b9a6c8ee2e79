//! What runs float graphs, and what gives them data. No implementation: those lie above this crate.

use std::fmt::Debug;

use crate::ir::Graph;
use crate::tensor::Tensor;

/// Executors prepare weights below this for their kernels, which holds them once more.
pub const PREPACK_LIMIT: u64 = 256 << 20;

/// The bytes that a session of a graph with so many bytes of constants holds of them.
#[must_use]
pub fn held(constants: u64) -> u64 {
    if constants > PREPACK_LIMIT { constants } else { constants.saturating_mul(2) }
}

/// Runs float graphs.
pub trait Executor: Debug + Send + Sync {
    /// The name, as in `--executor`.
    fn name(&self) -> &'static str;
    /// What ran and why, for the summary.
    fn describe(&self) -> String {
        self.name().to_owned()
    }
    /// Makes `graph` ready to run. What it returns are the graph's outputs, in order.
    ///
    /// # Errors
    /// [`ExecError`] when an operator or element type is not supported.
    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError>;
}

/// A graph that is ready to run, from several threads at once.
pub trait Session: Send + Sync {
    /// Runs on `feeds`, one per graph input in order; returns one tensor per graph output in order.
    ///
    /// # Errors
    /// [`ExecError`] when the feeds do not fit the graph or an operator fails.
    fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError>;
}

/// Why a graph cannot be run.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the executor `{executor}` cannot run this graph: {message}")]
pub struct ExecError {
    /// Which executor.
    pub executor: &'static str,
    /// What it said, with the node or operator where it names one.
    pub message: String,
}

/// Calibration samples.
pub trait Dataset: Sync {
    /// How many samples.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// What sample `index` is called in messages.
    fn name(&self, index: usize) -> String;
    /// Sample `index`: one tensor per graph input, in the order of the graph.
    ///
    /// # Errors
    /// [`DataError`] when it cannot be read or does not fit the graph.
    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError>;
    /// The sample that sample `index` is a variant of: itself where it is none.
    fn origin(&self, index: usize) -> usize {
        index
    }
}

/// A sample that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{sample}: {problem}")]
pub struct DataError {
    /// Which sample or file.
    pub sample: String,
    /// What is wrong, with what was expected.
    pub problem: String,
}

/// Where long work reports to.
pub trait Progress: Sync {
    /// A stage of `total` steps begins.
    fn begin(&self, stage: &str, total: u64);
    /// One more step is done.
    fn step(&self);
    /// What is being learned loses so much on the samples that are held out, at the best so far.
    fn loss(&self, _: f64) {}
    /// The stage is over.
    fn end(&self);
    /// Whether the user wants the run to stop.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Reports to nobody.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn step(&self) {}
    fn end(&self) {}
}
