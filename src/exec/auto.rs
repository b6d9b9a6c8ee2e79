//! The choice between the embedded executors.
//!
//! rten first: on the zoo's larger models it calibrates faster than tract, on the digits networks somewhat slower, and on all of
//! them in less memory, without a plan per shape (`tests/bench/executors.py` measures it). The order is fixed, not timed at
//! run time: the two differ in the last bits, so a race would make the result depend on the clock.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::model::Metadata;
use passes::tensor::Tensor;

use super::{rten, tract};

pub(super) static ABOUT: About = About {
    name: "auto",
    doc: "Takes rten, which on the measured models is the faster one where it matters and always the leaner, and falls over to \
          tract where rten cannot run a graph; the summary says what ran and why. The order is fixed by measurement and not \
          timed in the run, so that equal input gives equal bytes.",
    source: "tests/bench/executors.py",
};

const NAME: &str = "auto";

/// See [`ABOUT`].
#[derive(Debug)]
pub struct Auto {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// In the order in which they are tried.
    executors: [Box<dyn Executor>; 2],
    /// Why the second one ran something.
    fell_over: Mutex<Option<String>>,
}

impl Auto {
    /// An executor for graphs with the opsets of `meta`.
    pub fn new(meta: &Metadata) -> Self {
        let executors: [Box<dyn Executor>; 2] = [Box::new(rten::Rten::new(meta)), Box::new(tract::Tract::new(meta))];
        Self { shared: Arc::new(Shared { executors, fell_over: Mutex::new(None) }) }
    }
}

impl Executor for Auto {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        let [first, second] = &self.shared.executors;
        match &*self.shared.fell_over.lock().unwrap_or_else(PoisonError::into_inner) {
            None => first.name().to_owned(),
            Some(why) => format!("{} where {} could not: {why}", second.name(), first.name()),
        }
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        let sessions = [const { OnceLock::new() }; 2];
        Ok(Box::new(AutoSession { shared: Arc::clone(&self.shared), graph: graph.clone(), sessions }))
    }
}

/// A graph with a session per executor, each made when it is first needed.
struct AutoSession {
    shared: Arc<Shared>,
    graph: Graph,
    sessions: [OnceLock<Result<Box<dyn Session>, ExecError>>; 2],
}

impl AutoSession {
    fn run_on(&self, index: usize, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let session = self.sessions[index].get_or_init(|| self.shared.executors[index].prepare(&self.graph));
        session.as_ref().map_err(Clone::clone)?.run(feeds)
    }
}

impl Session for AutoSession {
    fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let first = match self.run_on(0, feeds) {
            Ok(results) => return Ok(results),
            Err(error) => error,
        };
        let results = self.run_on(1, feeds).map_err(|second| ExecError {
            executor: first.executor,
            message: format!("{}; {}: {}", first.message, second.executor, second.message),
        })?;
        // Of several reasons the smallest text is kept, so that the report does not depend on who came first.
        let mut fell_over = self.shared.fell_over.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = first.to_string();
        if fell_over.as_ref().is_none_or(|kept| reason < *kept) {
            *fell_over = Some(reason);
        }
        Ok(results)
    }
}
