//! A whole run: import, passes, lower, emit, verify, in order.

use std::path::Path;
use std::time::Duration;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::exec::{Dataset, Executor, Progress};
use passes::imagine::Remembered;
use passes::ir::Graph;
use passes::model::Model;
use passes::pass::{Instrument, Pass, PassContext, PassManager, Pipeline, Trace};
use passes::reconstruct::{self, Costs};
use passes::target::{Lowered, Target};

use crate::dataset::Slot;
use crate::emit::{self, Emit, Staged};
use crate::load::Source;
use crate::max_drop::{self, Checkpoint, Search};
use crate::memory::Needs;
use crate::overrides::{Overrides, overrides};
use crate::recipe::{pipeline_text, pipelines};
pub(crate) use crate::refusals::guard_inputs;
use crate::refusals::{check_budget, check_request};
pub use crate::request::{Error, Kept, Request, Rest, Select};
use crate::resume::{keep_budgets, open_journal, paused, resumed};
use crate::stages::{Clock, StageTimes, outcome_notes};
use crate::verify::{self, Fidelity, Verdict};
use crate::{exec, import, lint, samples, stats};

/// A stage and the time it took.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Its time.
    pub time: Duration,
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The normalized float model with its plan.
    pub model: Model,
    /// What the passes did.
    pub trace: Trace,
    /// What the user should know, worst first.
    pub notes: Vec<Diagnostic>,
    /// Reading back the file; `None` when nothing was written.
    pub verdict: Option<Verdict>,
    /// Against the float model; `None` without samples.
    pub fidelity: Option<Fidelity>,
    /// What rounding costs to first order, place by place; `None` where that was not asked for, or gradients cannot tell.
    pub costs: Option<Costs>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// Bytes and opset of input and output.
    pub sizes: Sizes,
    /// The pipeline that ran.
    pub pipeline: String,
    /// What ran the float model.
    pub executor: String,
    /// How many samples it was fitted to.
    pub samples: usize,
    /// Whether `fidelity` is about other samples than those.
    pub held_out: bool,
    /// The peak memory that was expected before the first sample ran; `None` without samples.
    pub estimated_bytes: Option<u64>,
}

/// Bytes and opsets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// Of the input, external data included.
    pub input_bytes: u64,
    /// The ai.onnx version of the input.
    pub input_opset: u32,
    /// Of the output; what it would be where nothing was written.
    pub output_bytes: u64,
    /// The ai.onnx version of the output.
    pub output_opset: u32,
}

/// So many samples tell what rounding costs to first order.
const FIRST_ORDER: usize = 32;

/// Quantizes a model.
///
/// # Errors
/// [`Error`]; whatever stood at the output before still stands there.
pub fn quantize(request: &Request, progress: &dyn Progress) -> Result<Outcome, Error> {
    let mut clock = Clock::start();
    check_request(request)?;
    let imported = import::in_f32(&request.input).map_err(Error::input)?;
    let (mut notes, input_opset, external) = (imported.notes, imported.opset, imported.external);
    if let Some(output) = &request.output {
        guard_inputs(&emit::main_file(request.target, output), &request.input, &external)?;
    }
    let graph = imported.model.graph();
    let overrides = overrides(&request.keep_float, &request.set, graph, request.scheme, request.target)?;
    check_budget(request, &pipeline_text(request))?;
    clock.lap("import");
    let mut dataset = samples::open(request, Slot::of(graph))?;
    let held_out = samples::hold_out(request, dataset.as_mut())?;
    let request = &*samples::with_variants(request, dataset.as_ref(), graph, &mut notes)?;
    let text = pipeline_text(request);
    let pipeline = parsed(&text, &imported.model)?;
    let executor = executor(&request.executor, &imported.model)?;
    clock.lap("data");
    let judge = samples::all(None, held_out.as_ref().or(dataset.as_ref()));
    let mut cx = context(request, executor.as_ref(), (None, judge), &overrides, progress);
    let checkpoint = Checkpoint::default();
    let mut instruments: Vec<Box<dyn Instrument + '_>> = vec![Box::new(StageTimes::new(&mut clock))];
    if request.max_drop.is_some() {
        instruments.push(Box::new(checkpoint.clone()));
    }
    let mut manager = PassManager::new(instruments, false).audited(passes::equalize::PASSES);
    // Statistics go by the names that tensors have once the graph is plain.
    let (plain, rest) = pipeline.split_at_calibration();
    let remembered = Remembered::of(imported.model.graph());
    let (mut model, mut trace) = manager.run(&plain, imported.model, &mut cx)?;
    let given = model.graph().clone();
    if let Some(files) = dataset.as_mut().filter(|_| request.select == Select::Herding) {
        let mut pool = context(request, executor.as_ref(), (Some(files), None), &overrides, progress);
        fit_memory(request, &model, &mut pool, false)?;
        let chosen = samples::herded(request, &model, files, &pool)?;
        files.keep(&chosen);
    }
    let varied = samples::augmented(request, (&model, &remembered), dataset.as_ref(), executor.as_ref(), progress)?;
    let fitted_to = samples::all(varied.as_deref(), dataset.as_ref());
    let journal = open_journal(request, &text, &external)?;
    let apart = samples::all(None, held_out.as_ref());
    let mut cx = context(request, executor.as_ref(), (fitted_to, apart), &overrides, progress);
    let estimated_bytes = fit_memory(request, &model, &mut cx, rest.passes().any(Pass::keeps_samples))?;
    if let Some(path) = &request.stats {
        model = stats::attach(model, path)?;
    }
    if let Some(journal) = &journal {
        notes.extend(resumed(journal));
        cx.journal = journal;
        notes.extend(keep_budgets(journal, &text, &mut cx)?.inspect(|less| tracing::warn!("{}", less.message)));
    }
    let judge = samples::all(None, held_out.as_ref().or(dataset.as_ref()));
    let mut planned = manager.run(&rest, model, &mut cx).map_err(|error| paused(error.into(), journal.as_ref()))?;
    if let Some(allowed) = request.max_drop {
        let found = within_drop(request, allowed, (checkpoint.take(), planned), judge, &cx);
        planned = found.map_err(|error| paused(error, journal.as_ref()))?;
    }
    let (mut model, more) = planned;
    model.drop_moments();
    trace.steps.extend(more.steps);
    trace.notes.extend(more.notes);
    drop(manager);
    notes.append(&mut trace.notes);
    let lowered = lower(request, &model)?;
    notes.extend(lowered.notes.iter().cloned());
    refuse_rejected(request.target, &lowered)?;
    let output_opset = lowered.meta.opset();
    let (staged, output_bytes) = emitted(request, &model, lowered, &external)?;
    let input_bytes = input_bytes(&request.input, &external);
    let sizes = Sizes { input_bytes, input_opset, output_bytes, output_opset };
    clock.lap("emit");
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    let path = staged.as_ref().map(Staged::path);
    cx.dataset = judge;
    let (verdict, fidelity) =
        on_a_worker(|| check(path.as_deref(), (&model, &given), &mut cx, held_out.is_some(), &mut clock))?;
    finish(staged, verdict.as_ref())?;
    if let Some(journal) = &journal {
        journal.remove();
    }
    let costs = costs(request, &model, &cx, &mut notes, &mut clock);
    notes.extend(verdict.iter().flat_map(|v| v.findings.iter().cloned()));
    notes.extend(outcome_notes(&sizes, fidelity.as_ref(), model.graph()));
    notes.sort_by_key(|note| std::cmp::Reverse(note.severity));
    Ok(Outcome {
        model,
        trace,
        notes,
        verdict,
        fidelity,
        costs,
        stages: clock.stages,
        sizes,
        pipeline: text,
        executor: executor.describe(),
        samples: fitted_to.map_or(0, Dataset::len),
        held_out: held_out.is_some(),
        estimated_bytes,
    })
}

/// The passes that `text` names, of which the first finds in `model` what it needs.
///
/// # Errors
/// [`Error::Input`].
fn parsed(text: &str, model: &Model) -> Result<Pipeline, Error> {
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(text, &catalogue).map_err(Error::input)?;
    pipeline.check(model.facts(), &catalogue).map_err(Error::input)?;
    Ok(pipeline)
}

/// The files of `lowered` beside where they belong, and their bytes; nothing but the bytes where nothing is to be written.
fn emitted(
    request: &Request,
    model: &Model,
    lowered: Lowered,
    external: &[Source],
) -> Result<(Option<Staged>, u64), Error> {
    if let Some(output) = &request.output {
        let staged = emit::stage(request.target, (model, lowered), output, external, &request.layout)?;
        let bytes = staged.bytes()?;
        return Ok((Some(staged), bytes));
    }
    let name = output_name(request);
    let options = Emit { external: (!external.is_empty()).then(|| format!("{name}.data")), ..Emit::default() };
    Ok((None, emit::model(&lowered.graph, &lowered.meta, &options, &name).bytes()))
}

/// `model` as its target spells it.
fn lower(request: &Request, model: &Model) -> Result<Lowered, Error> {
    let lowered = request.target.lower(model);
    let narrowed = lowered.and_then(|lowered| match request.rest {
        Rest::F32 => Ok(lowered),
        Rest::F16 => passes::half::narrow(lowered),
    });
    narrowed.map_err(|e| Error::Target(e.to_string()))
}

/// Refuses what the rules of the target say that it rejects, before anything is written.
pub(crate) fn refuse_rejected(target: &dyn Target, lowered: &Lowered) -> Result<(), Error> {
    let model = Model::new(lowered.graph.clone(), lowered.meta.as_ref().clone()).map_err(Error::input)?;
    let name = target.info().about.name;
    let found = lint::lint(&model, lowered.meta.opset(), name);
    let rejected: Vec<String> =
        found.iter().filter(|f| f.severity == Severity::Error).map(ToString::to_string).collect();
    if rejected.is_empty() {
        return Ok(());
    }
    Err(Error::Target(format!("target `{name}` cannot take this model; nothing was written\n{}", rejected.join("\n"))))
}

/// Runs `f` on a thread of its own. The allocator keeps what calibration's workers freed for other threads like them, not
/// for the main one: on the main thread the same work would take its memory from the system once more.
fn on_a_worker<T: Send>(f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let panicked = |payload| std::panic::resume_unwind(payload);
    std::thread::scope(|scope| scope.spawn(f).join().unwrap_or_else(panicked))
}

/// Reads the file at `path` back and compares it with the plan, and the plan with the float model: end to end with `given`, its graph
/// before anything was measured.
fn check(
    path: Option<&Path>,
    (model, given): (&Model, &Graph),
    cx: &mut PassContext<'_>,
    held_out: bool,
    clock: &mut Clock,
) -> Result<(Option<Verdict>, Option<Fidelity>), Error> {
    let verdict = path.map(|path| verify::artifact(path, model, cx)).transpose()?;
    clock.lap("verify");
    let most = if held_out { verify::HELD_OUT } else { verify::SAMPLES };
    let fidelity =
        cx.dataset.map(|samples| verify::fidelity(model, Some(given), cx.executor, samples, most)).transpose()?;
    clock.lap("compare");
    if cx.progress.cancelled() {
        return Err(Error::Interrupted);
    }
    Ok((verdict, fidelity))
}

/// What the plan of `model` costs to first order, where that is asked for. The output is in its place by then: what stands in the way, an
/// interruption too, is a note.
fn costs(
    request: &Request,
    model: &Model,
    cx: &PassContext<'_>,
    notes: &mut Vec<Diagnostic>,
    clock: &mut Clock,
) -> Option<Costs> {
    if !request.first_order {
        return None;
    }
    let found = reconstruct::first_order(model, cx, FIRST_ORDER, "first order");
    clock.lap("first order");
    let reason = match found {
        Ok(Ok(costs)) => return Some(costs),
        Ok(Err(reason)) => reason,
        Err(error) => error.to_string(),
    };
    let message = format!("--first-order: gradients do not tell what rounding costs: {reason}");
    notes.push(Diagnostic::new(diag::NO_GRADIENTS, Severity::Warning, Place::Model, message));
    None
}

/// Moves the files into place. A file that failed verification is written too, so that it can be looked at: the exit code
/// and the summary say that it failed.
fn finish(staged: Option<Staged>, verdict: Option<&Verdict>) -> Result<(), Error> {
    if let Some(verdict) = verdict.filter(|v| !v.passed) {
        tracing::error!(findings = verdict.findings.len(), "the written model failed verification");
    }
    staged.map_or(Ok(()), |staged| Ok(staged.publish()?))
}

/// `planned`, or what is planned instead from what was `measured`, so that no more is lost than `allowed`.
fn within_drop(
    request: &Request,
    allowed: f64,
    (measured, planned): (Option<Model>, max_drop::Planned),
    judge: Option<&dyn Dataset>,
    cx: &PassContext<'_>,
) -> Result<max_drop::Planned, Error> {
    let measured = measured.ok_or_else(|| {
        Error::Input("--max-drop plans again behind the last `calibrate`, which the pipeline does not have".into())
    })?;
    let catalogue = passes::catalogue::passes();
    let tail = |text: &String| Pipeline::parse(text, &catalogue).map(Pipeline::after_last_calibration);
    let tails = pipelines(request).iter().map(tail).collect::<Result<_, _>>().map_err(Error::input)?;
    let search = Search { measured, tails, allowed, judge };
    max_drop::keep_within(&search, planned, cx)
}

fn output_name(request: &Request) -> String {
    let path = request.output.as_deref().unwrap_or(&request.input);
    path.file_name().map_or_else(|| "model.onnx".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The executor called `name`.
pub(crate) fn executor(name: &str, model: &Model) -> Result<Box<dyn Executor>, Error> {
    let Some(entry) = exec::find(name) else {
        let names: Vec<&str> = exec::EXECUTORS.iter().map(|entry| entry.about.name).collect();
        return Err(Error::Input(format!("there is no executor `{name}`; there are {}", names.join(", "))));
    };
    (entry.build)(&model.meta).map_err(Error::input)
}

fn context<'a>(
    request: &Request,
    executor: &'a dyn Executor,
    (dataset, held_out): (Option<&'a dyn Dataset>, Option<&'a dyn Dataset>),
    overrides: &'a Overrides,
    progress: &'a dyn Progress,
) -> PassContext<'a> {
    PassContext {
        dataset,
        held_out,
        keep_float: &overrides.keep_float,
        schemes: &overrides.schemes,
        embeddings: request.embeddings,
        scheme: request.target.accepts().completed(request.scheme),
        threads: request.threads,
        progress,
        ..PassContext::new(request.target, executor)
    }
}

/// Fits the run of `cx` into the memory that `request` allows or the machine has, going by its first sample; returns what it will
/// take. `keeps_samples`: see [`Pass::keeps_samples`].
///
/// # Errors
/// [`Error::Resources`] when it does not fit, [`Error::Input`] when the sample cannot be read.
pub(crate) fn fit_memory(
    request: &Request,
    model: &Model,
    cx: &mut PassContext<'_>,
    keeps_samples: bool,
) -> Result<Option<u64>, Error> {
    let Some(dataset) = cx.dataset.filter(|d| !d.is_empty()) else { return Ok(None) };
    let needs = Needs::of(model, &dataset.sample(0).map_err(Error::input)?, request.target, cx.executor);
    let budget = needs.budget(request.max_memory, request.threads)?;
    tracing::info!(estimate = budget.estimate, threads = budget.threads, taps = budget.taps, "memory");
    let waiting = if keeps_samples { needs.waiting(budget.pairs, dataset.len()) } else { 0 };
    (cx.threads, cx.tap_budget, cx.pair_budget, cx.sizes) = (budget.threads, budget.taps, budget.pairs, needs.sizes);
    (cx.state_budget, cx.lone_budget) = (budget.state, budget.lone);
    Ok(Some(budget.estimate.saturating_add(waiting)))
}

/// The bytes of the model at `path` and of its external files.
fn input_bytes(path: &Path, external: &[Source]) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |data| data.len());
    size(path) + external.iter().map(|source| size(&source.path)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use passes::target::{Goal, Scheme};

    use super::*;
    use crate::emit::Layout;

    /// Stopped by the user when a stage of this name begins.
    struct Stopped(&'static str, AtomicBool);

    impl Progress for Stopped {
        fn begin(&self, stage: &str, _: u64) {
            self.1.fetch_or(stage == self.0, Ordering::Relaxed);
        }

        fn step(&self) {}

        fn end(&self) {}

        fn cancelled(&self) -> bool {
            self.1.load(Ordering::Relaxed)
        }
    }

    fn first_order(output: &Path) -> Request {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        Request {
            input: fixtures.join("models/digits-resnet.onnx"),
            output: Some(output.to_owned()),
            data: Some(fixtures.join("data/digits")),
            image: None,
            samples: Some(8),
            select: Select::First,
            hold_out: 0,
            augment: None,
            views: 0,
            stats: None,
            target: crate::targets::TARGETS[0],
            layout: Layout::default(),
            scheme: Scheme::W8A8,
            goal: Goal::Balanced,
            rotate: false,
            rest: Rest::F32,
            learn: None,
            distill: None,
            pipeline: None,
            observer: None,
            rounding: None,
            keep_float: Vec::new(),
            set: Vec::new(),
            embeddings: None,
            cache: None,
            budget: None,
            sensitivity: None,
            first_order: true,
            max_drop: None,
            executor: "auto".into(),
            threads: 1,
            max_memory: None,
            journal: Kept::Used,
        }
    }

    /// What is only told of the output does not take it away.
    #[test]
    fn an_interruption_while_costs_are_told_leaves_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("a.onnx");
        let request = first_order(&output);
        let outcome = quantize(&request, &Stopped("first order", AtomicBool::new(false))).unwrap();
        assert!(outcome.costs.is_none() && output.exists());
        let told = |note: &Diagnostic| note.code == diag::NO_GRADIENTS && note.message.contains("interrupted");
        assert!(outcome.notes.iter().any(told), "{:?}", outcome.notes);
        let told = quantize(&request, &Stopped("none", AtomicBool::new(false))).unwrap();
        assert!(told.costs.is_some_and(|costs| !costs.is_empty()));
    }
}
