//! The manager: applies, checks, counts, repeats.

use std::collections::{BTreeMap, BTreeSet};

use super::audit::Audit;
use super::{Facts, Fidelity, Pass, PassContext, PassEntry, PassError, PassInfo, Pipeline, Step, Wish};
use crate::diag::Diagnostic;
use crate::id::ValueId;
use crate::ir::check::CheckError;
use crate::model::{Edit, Model, PatchError};

/// More rounds than any honest rewrite chain needs; a pass that goes on is a bug and is named.
const MAX_ROUNDS: u32 = 200;

/// What one pass did.
#[derive(Clone, Debug, Default)]
pub struct StepRecord {
    /// Times it ran, the last one finding nothing.
    pub rounds: u32,
    /// Edits in all.
    pub edits: u64,
    /// What it counted.
    pub counts: BTreeMap<&'static str, u64>,
}

/// What happened.
#[derive(Debug, Default)]
pub struct Trace {
    /// Pass by pass, in the order they ran.
    pub steps: Vec<(&'static str, StepRecord)>,
    /// What the user should know, without repetitions.
    pub notes: Vec<Diagnostic>,
}

/// Timing, dumping, checking and bisecting live here, never in a pass.
pub trait Instrument {
    /// Before a pass.
    fn before(&mut self, _pass: &PassInfo, _model: &Model) {}
    /// After a pass.
    fn after(&mut self, _pass: &PassInfo, _model: &Model, _step: &StepRecord) {}
    /// Whether to stop here, after so many edits.
    fn stop(&self, _edits_so_far: u64) -> bool {
        false
    }
}

/// Why a pipeline stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A pass could not do its work.
    #[error("{pass}: {error}")]
    Pass {
        /// Which.
        pass: &'static str,
        /// Why.
        error: PassError,
    },
    /// A pass made a patch that the model refuses.
    #[error("a bug in onnx-quant: `{pass}` made a bad patch: {error}")]
    Patch {
        /// Which.
        pass: &'static str,
        /// Why.
        error: PatchError,
    },
    /// A pass broke its own promise.
    #[error("a bug in onnx-quant: `{pass}` {problem}")]
    Promise {
        /// Which.
        pass: &'static str,
        /// What it did.
        problem: String,
    },
    /// The graph breaks a rule after a pass.
    #[error("a bug in onnx-quant: after `{pass}`: {error}")]
    Check {
        /// Which.
        pass: &'static str,
        /// The rule.
        error: CheckError,
    },
}

/// Runs pipelines.
#[derive(Default)]
pub struct PassManager<'a> {
    instruments: Vec<Box<dyn Instrument + 'a>>,
    check: bool,
    audit: Audit,
    edits: u64,
}

impl std::fmt::Debug for PassManager<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PassManager({} instruments)", self.instruments.len())
    }
}

impl<'a> PassManager<'a> {
    /// A manager that `instruments` watch; with `check`, every promise is checked after every pass: structural rules, and
    /// that a second run changes nothing.
    pub fn new(instruments: Vec<Box<dyn Instrument + 'a>>, check: bool) -> Self {
        Self { instruments, check, audit: Audit::default(), edits: 0 }
    }

    /// The same, where what the rewriting passes of `table` do is checked on samples, and undone region by region where it changes what the
    /// model returns.
    #[must_use]
    pub fn audited(self, table: &'static [PassEntry]) -> Self {
        Self { audit: Audit::of(table), ..self }
    }
}

impl PassManager<'_> {
    /// Runs `pipeline` on `model`.
    ///
    /// # Errors
    /// [`RunError`] names the pass.
    pub fn run(
        &mut self,
        pipeline: &Pipeline,
        mut model: Model,
        cx: &mut PassContext<'_>,
    ) -> Result<(Model, Trace), RunError> {
        let mut trace = Trace::default();
        for (index, step) in pipeline.steps.iter().enumerate() {
            match step {
                Step::Once(pass) => {
                    cx.wishes = wishes(&pipeline.steps[index + 1..], &model, cx);
                    self.settle(pass.as_ref(), &mut model, cx, &mut trace)?;
                }
                Step::UntilStable(passes) => {
                    for round in 0.. {
                        let before = self.edits;
                        for pass in passes {
                            self.settle(pass.as_ref(), &mut model, cx, &mut trace)?;
                        }
                        if self.edits == before || self.stopped() {
                            break;
                        }
                        if round > MAX_ROUNDS {
                            let pass = passes[0].info().about.name;
                            return Err(RunError::Promise { pass, problem: "and its group never settle".into() });
                        }
                    }
                }
            }
            if self.stopped() {
                break;
            }
        }
        self.audit.forget();
        let mut seen = BTreeSet::new();
        trace.notes.retain(|note| seen.insert(note.to_string()));
        Ok((model, trace))
    }

    fn stopped(&self) -> bool {
        self.instruments.iter().any(|instrument| instrument.stop(self.edits))
    }

    /// Runs one pass until it finds nothing to do; a pass over the plan runs once.
    fn settle(
        &mut self,
        pass: &dyn Pass,
        model: &mut Model,
        cx: &PassContext<'_>,
        trace: &mut Trace,
    ) -> Result<(), RunError> {
        let info = pass.info();
        let name = info.about.name;
        self.instruments.iter_mut().for_each(|i| i.before(info, model));
        let span = tracing::info_span!("pass", name);
        let _entered = span.enter();
        let mut record = StepRecord::default();
        if info.fidelity == Fidelity::PlanOnly {
            self.audit.forget(); // it may take long, and all memory
        }
        let fail = |error| RunError::Pass { pass: name, error };
        let mut undone = 0;
        loop {
            record.rounds += 1;
            let mut patch = pass.run(model, cx).map_err(fail)?;
            let (counts, notes) = patch.report();
            let touches_graph = patch.edits().iter().any(Edit::touches_graph);
            let mut stands = true;
            if touches_graph {
                let verdict = self.audit.verdict(pass, model, patch, cx).map_err(fail)?;
                (patch, undone) = (verdict.patch, verdict.undone.max(undone));
                stands = !patch.is_empty();
                trace.notes.extend(verdict.notes);
            }
            // Of what was undone nothing was done.
            if stands {
                counts.into_iter().for_each(|(what, n)| *record.counts.entry(what).or_default() += n);
                trace.notes.extend(notes);
            }
            if patch.is_empty() {
                break;
            }
            if touches_graph && info.fidelity == Fidelity::PlanOnly {
                return Err(RunError::Promise { pass: name, problem: "may not touch the graph but did".into() });
            }
            let edits = patch.edits().len() as u64;
            record.edits += edits;
            self.edits += edits;
            model.apply(patch).map_err(|error| RunError::Patch { pass: name, error })?;
            if touches_graph {
                model.facts = model.facts.only(info.preserves);
            }
            if info.fidelity == Fidelity::PlanOnly || self.stopped() {
                break;
            }
            if record.rounds > MAX_ROUNDS {
                return Err(RunError::Promise { pass: name, problem: "never settles".into() });
            }
        }
        if undone > 0 {
            record.counts.insert("undone", undone);
        }
        model.facts = model.facts.and(info.establishes);
        // What was undone would be done again.
        if self.check && undone == 0 {
            self.check_promises(pass, model, cx)?;
        }
        tracing::debug!(rounds = record.rounds, edits = record.edits, "settled");
        self.instruments.iter_mut().for_each(|i| i.after(info, model, &record));
        trace.steps.push((name, record));
        Ok(())
    }

    /// Structural rules hold, and a pass that rewrites has nothing left to do.
    fn check_promises(&self, pass: &dyn Pass, model: &Model, cx: &PassContext<'_>) -> Result<(), RunError> {
        let name = pass.info().about.name;
        crate::ir::check::check(model.graph()).map_err(|error| RunError::Check { pass: name, error })?;
        if pass.info().fidelity == Fidelity::PlanOnly || self.stopped() {
            return Ok(());
        }
        let again = pass.run(model, cx).map_err(|error| RunError::Pass { pass: name, error })?;
        if !again.is_empty() {
            return Err(RunError::Promise { pass: name, problem: "changes its own result when run again".into() });
        }
        Ok(())
    }
}

/// What the passes of `steps`, up to the next that measures, want measured.
fn wishes(steps: &[Step], model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
    steps
        .iter()
        .flat_map(|step| match step {
            Step::Once(pass) => std::slice::from_ref(pass).iter(),
            Step::UntilStable(passes) => passes.iter(),
        })
        .take_while(|pass| !pass.info().establishes.contains(Facts::CALIBRATED))
        .flat_map(|pass| pass.wishes(model, cx))
        .collect()
}
