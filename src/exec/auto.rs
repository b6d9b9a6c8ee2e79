//! The choice between the embedded executors: by what can run the graph, then by measured speed.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::model::Metadata;
use passes::tensor::Tensor;

use super::{rten, tract};

pub(super) static ABOUT: About = About {
    name: "auto",
    doc: "Runs a graph's first sample on each embedded executor, then stays with the faster one that could; a graph cut \
          from the same model takes the same one. Falls over to the other when one fails. The choice is made once per run \
          and reported.",
    source: "onnx-quant",
};

const NAME: &str = "auto";

/// See [`ABOUT`].
#[derive(Debug)]
pub struct Auto {
    executors: [Box<dyn Executor>; 2],
    /// What was measured on the first graph, shared by all later ones: results must not depend on timing twice.
    choice: OnceLock<usize>,
    fell_over: Mutex<Vec<String>>,
}

impl Auto {
    /// An executor for graphs with the opsets of `meta`.
    pub fn new(meta: &Metadata) -> Self {
        Self {
            executors: [Box::new(tract::Tract::new(meta)), Box::new(rten::Rten::new(meta))],
            choice: OnceLock::new(),
            fell_over: Mutex::new(Vec::new()),
        }
    }

    /// Runs `graph` on `feeds` with each executor and stays with the better: one that runs beats one that does not, and
    /// `tract` beats `rten` unless the latter is clearly faster. Returns its name, and why the other was not taken.
    ///
    /// # Errors
    /// [`ExecError`] when neither runs the graph: the message has both reasons.
    pub fn choose(&self, graph: &Graph, feeds: &[Tensor]) -> Result<(&'static str, String), ExecError> {
        let trials: Vec<Result<Duration, ExecError>> =
            self.executors.iter().map(|executor| trial(executor.as_ref(), graph, feeds)).collect();
        let (choice, reason) = match (&trials[0], &trials[1]) {
            (Ok(tract), Ok(rten)) if *rten * 10 < *tract * 9 => (1, speed("tract", *tract, *rten)),
            (Ok(tract), Ok(rten)) => (0, speed("rten", *rten, *tract)),
            (Ok(_), Err(e)) => (0, e.to_string()),
            (Err(e), Ok(_)) => (1, e.to_string()),
            (Err(a), Err(b)) => {
                let message = format!("{}; and {}: {}", a.message, b.executor, b.message);
                return Err(ExecError { executor: a.executor, message });
            }
        };
        let choice = *self.choice.get_or_init(|| choice);
        Ok((self.executors[choice].name(), reason))
    }

    /// What was run on the second choice, and why.
    pub fn fell_over(&self) -> Vec<String> {
        self.fell_over.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn speed(slower: &str, slow: Duration, fast: Duration) -> String {
    format!("{slower} took {:.1} times as long on one sample", slow.as_secs_f64() / fast.as_secs_f64().max(1e-9))
}

/// The time of a second run: the first one plans.
fn trial(executor: &dyn Executor, graph: &Graph, feeds: &[Tensor]) -> Result<Duration, ExecError> {
    let session = executor.prepare(graph)?;
    session.run(feeds)?;
    let start = Instant::now();
    session.run(feeds)?;
    Ok(start.elapsed())
}

impl Executor for Auto {
    fn name(&self) -> &'static str {
        self.choice.get().map_or(NAME, |&choice| self.executors[choice].name())
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        let first = self.choice.get().copied().unwrap_or(0);
        match self.executors[first].prepare(graph) {
            Ok(session) => Ok(session),
            Err(error) => {
                let session = self.executors[1 - first].prepare(graph)?;
                self.fell_over.lock().unwrap_or_else(PoisonError::into_inner).push(error.to_string());
                Ok(session)
            }
        }
    }
}
