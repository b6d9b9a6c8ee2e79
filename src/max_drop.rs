//! `--max-drop`: as few nodes in float as keep the loss small enough.

use std::cell::RefCell;
use std::rc::Rc;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::exec::Dataset;
use passes::id::NodeId;
use passes::model::{Model, Plan};
use passes::pass::{
    Facts, Instrument, PassContext, PassError, PassInfo, PassManager, Pipeline, RunError, StepRecord, Trace,
};
use passes::sensitivity::{Metric, Probe};

use crate::driver::Error;
use crate::overrides::kept_for_drop;

/// So many samples are run for every node.
const SAMPLES: usize = 4;

/// The model as it was after the last pass that measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoint(Rc<RefCell<Option<Model>>>);

impl Checkpoint {
    pub(crate) fn take(&self) -> Option<Model> {
        self.0.borrow_mut().take()
    }
}

impl Instrument for Checkpoint {
    fn after(&mut self, pass: &PassInfo, model: &Model, _: &StepRecord) {
        if pass.establishes.contains(Facts::CALIBRATED) {
            *self.0.borrow_mut() = Some(model.clone());
        }
    }
}

/// A planned model, what the passes did and what they said.
pub(crate) type Planned = (Model, Trace);

/// What is run again.
pub(crate) struct Search<'a> {
    /// The model before anything was decided.
    pub(crate) measured: Model,
    /// What decides; where weights can have more bits, with ever more of them.
    pub(crate) tails: Vec<Pipeline>,
    /// The loss allowed.
    pub(crate) allowed: f64,
    /// The samples by which losses are judged.
    pub(crate) judge: Option<&'a dyn Dataset>,
}

fn failed(error: PassError) -> Error {
    RunError::Pass { pass: "max-drop", error }.into()
}

/// `planned` where it loses little enough; otherwise planned again with more bits, and then with those nodes in float that cost most
/// alone: as many as it takes, found by doubling and halving.
///
/// # Errors
/// [`Error`] when a run fails or is interrupted.
pub(crate) fn keep_within(search: &Search<'_>, planned: Planned, cx: &PassContext<'_>) -> Result<Planned, Error> {
    let before = of_measuring(&planned.1);
    let first = search.drop_of(&planned.0, cx)?;
    if first <= search.allowed {
        return Ok(planned);
    }
    let (mut best, mut best_drop, mut best_kept) = (planned, first, 0);
    for tail in search.tails.iter().skip(1) {
        let trial = search.plan_with(tail, &[], cx)?;
        let drop = search.drop_of(&trial.0, cx)?;
        if drop < best_drop {
            (best, best_drop) = (trial, drop);
        }
        if best_drop <= search.allowed {
            return Ok(with_measuring(before, best));
        }
    }
    let Some(tail) = search.tails.last() else { return Ok(best) };
    let worst = by_cost(&best.0, &search.judging(cx))?;
    let (mut least, mut most) = (0, worst.len());
    let mut next = 1.min(most);
    // Invariant: `least` nodes are too few; `most` are enough, once one was.
    let mut found = false;
    while next > least && next <= most {
        let trial = search.plan_with(tail, &worst[..next], cx)?;
        let drop = search.drop_of(&trial.0, cx)?;
        tracing::info!(kept = next, drop, "max-drop");
        let enough = drop <= search.allowed;
        if enough || (!found && drop < best_drop) {
            (best, best_drop, best_kept) = (trial, drop, next);
        }
        if enough {
            (found, most) = (true, next);
        } else {
            least = next;
        }
        next = if found { least.midpoint(most) } else { (2 * next).min(most) };
    }
    best.1.notes.push(note(search.allowed, (first, best_drop), best_kept));
    Ok(with_measuring(before, best))
}

/// What the passes up to the last that measured did and said: they are not run again.
fn of_measuring(trace: &Trace) -> Trace {
    let steps = trace.steps.iter().rposition(|(name, _)| *name == "calibrate").map_or(0, |at| at + 1);
    // Codes up to OQ3xxx are of loading, normalizing and calibrating.
    let notes = trace.notes.iter().filter(|note| note.code.0 < "OQ4").cloned().collect();
    Trace { steps: trace.steps[..steps].to_vec(), notes }
}

/// `planned` with what was measured before it, where it was planned again.
fn with_measuring(mut before: Trace, (model, trace): Planned) -> Planned {
    if trace.steps.iter().any(|(name, _)| *name == "calibrate") {
        return (model, trace);
    }
    before.steps.extend(trace.steps);
    before.notes.extend(trace.notes);
    (model, before)
}

fn note(allowed: f64, (first, last): (f64, f64), kept: usize) -> Diagnostic {
    if last <= allowed {
        let message = format!(
            "{kept} nodes stay in float: that lowers its loss from {first:.3e} to {last:.3e}, of {allowed:.3e} allowed"
        );
        return Diagnostic::new(diag::KEPT_FLOAT, Severity::Warning, Place::Model, message);
    }
    let message = format!("it loses {last:.3e} where {allowed:.3e} is allowed, with {kept} nodes in float");
    Diagnostic::new(diag::OVER_BUDGET, Severity::Error, Place::Model, message).help("allow more, or use --recipe best")
}

/// The names of the quantized nodes, the one that costs most alone first.
fn by_cost(model: &Model, cx: &PassContext<'_>) -> Result<Vec<String>, Error> {
    let graph = model.graph();
    // A clamp that the quantizer before it absorbs reads nothing in codes: its share is that node's.
    let reads_codes = |id: NodeId| {
        let inputs = graph.node(id).map_or(0, |node| node.inputs.len());
        (0..inputs)
            .filter_map(|input| u16::try_from(input).ok())
            .any(|input| model.plan().encoding_of_use(graph, id, input).is_some())
            || model.plan().transposed(graph, id).next().is_some()
    };
    let nodes: Vec<NodeId> =
        model.plan().decisions().filter(|(_, d)| d.quantized).map(|(id, _)| id).filter(|id| reads_codes(*id)).collect();
    let plans: Vec<Plan> = nodes.iter().map(|&node| model.plan().only_about(graph, node)).collect();
    let probe = Probe::new(graph, cx, SAMPLES, Metric::Error).map_err(failed)?;
    let losses = probe.losses(&plans, cx, "max-drop").map_err(failed)?;
    let mut ranked: Vec<(f64, NodeId)> = losses.into_iter().zip(nodes).filter(|(loss, _)| *loss > 0.0).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    Ok(ranked.into_iter().filter_map(|(_, id)| Some(graph.node(id)?.name.to_string())).collect())
}

impl Search<'_> {
    /// The context in which losses are judged.
    fn judging<'a>(&'a self, cx: &PassContext<'a>) -> PassContext<'a> {
        PassContext { dataset: self.judge, wishes: cx.wishes.clone(), sizes: cx.sizes.clone(), ..*cx }
    }

    /// The squared error of the outputs over their square.
    fn drop_of(&self, model: &Model, cx: &PassContext<'_>) -> Result<f64, Error> {
        let probe = Probe::new(model.graph(), &self.judging(cx), SAMPLES, Metric::Error).map_err(failed)?;
        probe.loss(model.plan()).map_err(failed)
    }

    /// Decides again, with the nodes called `names` in float too.
    fn plan_with(&self, tail: &Pipeline, names: &[String], cx: &PassContext<'_>) -> Result<Planned, Error> {
        let mut keep_float = kept_for_drop(names, self.allowed);
        keep_float.extend(cx.keep_float.clone());
        let mut cx = PassContext { keep_float: &keep_float, wishes: cx.wishes.clone(), sizes: cx.sizes.clone(), ..*cx };
        let mut manager = PassManager::default().audited(passes::equalize::PASSES);
        Ok(manager.run(tail, self.measured.clone(), &mut cx)?)
    }
}
