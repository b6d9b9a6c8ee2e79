//! The choice between the embedded executors: by what can run the graph, then by measured speed.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::{Graph, walk};
use passes::model::Metadata;
use passes::tensor::Tensor;

use super::{rten, tract};

pub(super) static ABOUT: About = About {
    name: "auto",
    doc: "Runs the first sample of the first graph on each embedded executor and stays with one for the whole run: with \
          rten, unless it cannot run the graph or tract is more than twice as fast. Two runs choose alike unless the speeds \
          lie just at that border; --executor pins the choice. A part of the graph that the chosen one cannot run falls over \
          to the other, and the summary says so.",
    source: "onnx-quant",
};

const NAME: &str = "auto";
/// How many times faster tract must be to be taken: a wide margin, so that noise does not decide.
const CLEARLY_FASTER: f64 = 2.0;

/// See [`ABOUT`].
#[derive(Debug)]
pub struct Auto {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    executors: [Box<dyn Executor>; 2],
    /// The place of the chosen one in `executors`, and why.
    choice: OnceLock<(usize, String)>,
    choosing: Mutex<()>,
    fell_over: Mutex<Option<String>>,
}

impl Auto {
    /// An executor for graphs with the opsets of `meta`.
    pub fn new(meta: &Metadata) -> Self {
        let executors: [Box<dyn Executor>; 2] = [Box::new(rten::Rten::new(meta)), Box::new(tract::Tract::new(meta))];
        let shared =
            Shared { executors, choice: OnceLock::new(), choosing: Mutex::new(()), fell_over: Mutex::new(None) };
        Self { shared: Arc::new(shared) }
    }
}

impl Shared {
    /// The choice, made on `graph` and `feeds` when it is not made yet.
    fn choose(&self, graph: &Graph, feeds: &[Tensor]) -> Result<usize, ExecError> {
        let _one_at_a_time = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((choice, _)) = self.choice.get() {
            return Ok(*choice);
        }
        let last = last_result(graph);
        let trials = [0, 1].map(|index| trial(self.executors[index].as_ref(), &last, feeds));
        let (choice, reason) = match trials {
            [Ok(rten), Ok(tract)] => {
                let ratio = rten.as_secs_f64() / tract.as_secs_f64().max(1e-9);
                let choice = usize::from(ratio > CLEARLY_FASTER);
                (choice, format!("on one sample tract was {ratio:.1} times as fast as rten"))
            }
            [Ok(_), Err(error)] => (0, error.to_string()),
            [Err(error), Ok(_)] => (1, error.to_string()),
            [Err(a), Err(b)] => {
                let message = format!("{}; {}: {}", a.message, b.executor, b.message);
                return Err(ExecError { executor: a.executor, message });
            }
        };
        tracing::info!(executor = self.executors[choice].name(), reason, "chose an executor");
        Ok(self.choice.get_or_init(|| (choice, reason)).0)
    }

    fn note_fall(&self, error: &ExecError) {
        self.fell_over.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.to_string());
    }
}

/// The graph with only the result that is computed last, so that a trial does not hold all that will be measured.
fn last_result(graph: &Graph) -> Graph {
    let place = |id: &passes::id::ValueId| graph.producer(*id).and_then(|(node, _)| graph.nodes().position(|(n, _)| n == node));
    let last = graph.outputs().iter().max_by_key(|id| place(id)).copied();
    walk::extract(graph, graph.inputs(), last.as_slice())
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
        self.shared.choice.get().map_or(NAME, |(choice, _)| self.shared.executors[*choice].name())
    }

    fn describe(&self) -> String {
        let fell = self.shared.fell_over.lock().unwrap_or_else(PoisonError::into_inner);
        let fell = fell.as_ref().map_or(String::new(), |why| format!("; parts fell over to the other one: {why}"));
        match self.shared.choice.get() {
            Some((choice, reason)) => format!("{} ({reason}{fell})", self.shared.executors[*choice].name()),
            None => "none ran".into(),
        }
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        Ok(Box::new(AutoSession {
            shared: Arc::clone(&self.shared),
            graph: graph.clone(),
            sessions: [const { OnceLock::new() }; 2],
            broken: OnceLock::new(),
        }))
    }
}

/// A graph with a session per executor, each made when it is first needed.
struct AutoSession {
    shared: Arc<Shared>,
    graph: Graph,
    sessions: [OnceLock<Result<Box<dyn Session>, ExecError>>; 2],
    /// Set once the chosen executor failed on this graph.
    broken: OnceLock<()>,
}

impl AutoSession {
    fn run_on(&self, index: usize, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let session = self.sessions[index].get_or_init(|| self.shared.executors[index].prepare(&self.graph));
        session.as_ref().map_err(Clone::clone)?.run(feeds)
    }
}

impl Session for AutoSession {
    fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let chosen = match self.shared.choice.get() {
            Some((chosen, _)) => *chosen,
            None => self.shared.choose(&self.graph, feeds)?,
        };
        if self.broken.get().is_none() {
            match self.run_on(chosen, feeds) {
                Ok(results) => return Ok(results),
                Err(error) => {
                    self.shared.note_fall(&error);
                    self.broken.get_or_init(|| ());
                }
            }
        }
        self.run_on(1 - chosen, feeds)
    }
}
