//! Codes learned from the whole model at once.

use super::block::Also;
use super::by_blocks::{edits, written};
use super::chain::{Budget, Chain, Pull};
use super::run::{Leaves, Outcome};
use super::settings::{Part, Settings, Usual};
use super::standing::Standing;
use super::train::{Course, Order};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::unpack;
use crate::exec::Dataset;
use crate::grad::GradError;
use crate::model::{Edit, Model, Patch, record};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Learns codes, scales, biases and norms of the whole model at once, by what its outputs lose.
    ///
    /// The model as planned goes forward and back on batches of samples; every weight starts at the codes that it has. The rate rises over the
    /// first fifth of the steps, and falls to nothing from there. Memory holds the
    /// tape of one block at a time. What is learned is kept only where it does better on the samples that are held out from it, one of
    /// eight where there are eight; codes that were chosen by those too look better on them than on others, unless `round-in-order{spare=1}`
    /// left them out. A run that is killed goes on from its last check, where the journal has room for all that is learned. Codes that came with the model are learned anew like all others; a constant that several nodes read stays.
    INFO {
        name: "distill",
        source: "divergence of the whole model: Chee et al. 2025 (DiscQuant), arXiv:2501.06417, section 4; scales end to end: Chen et \
                 al. 2024 (EfficientQAT), arXiv:2407.11062, section 3.3; blocks as segments ours",
        cost: "Per step of `batch` samples: the model forward twice and back once, in float. Memory: parameters of all weights, and the tape of one block at a time.",
        requires: Facts::ROUNDED,
        establishes: Facts::ROUNDED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "learn", doc: "what is learned of weights: latent (default), or any of `list parameterizations`" },
            OptionInfo { name: "iterations", doc: "steps, 200 by default" },
            OptionInfo { name: "batch", doc: "samples per step, 4 by default" },
            OptionInfo { name: "layers", doc: "the most weights of neighboring blocks whose tape is held at once, 4 by default" },
            OptionInfo { name: "rate", doc: "times the usual rate of the method, 1 by default" },
            OptionInfo { name: "patience", doc: "it ends where so many checks in a row, of ten or more on the way, find nothing better; 0 (default): never" },
            OptionInfo { name: "drop", doc: "the share of activations left in float, 0 by default" },
            OptionInfo { name: "codes", doc: "0 leaves codes as they are, and learns what they are multiplied with; 1 by default" },
            OptionInfo { name: "biases", doc: "0 leaves biases as they are, and norms where nothing is said of them; 1 by default" },
            OptionInfo { name: "norms", doc: "0 leaves scales and shifts of norms as they are; 1 by default" },
            OptionInfo { name: "scales", doc: "0 leaves scales of weights as they are; 1 by default" },
            OptionInfo { name: "steps", doc: "1 learns scales of activations too; 0 by default" },
            OptionInfo { name: "loss", doc: "fitting (default), kl or mse; `explain` has a page for each" },
        ],
    }
}

/// The pass.
pub(crate) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |options| Ok(Box::new(Distill::new(options)?)) };

const USUAL: Usual = Usual { learn: "latent", iterations: 200, batch: 4, norms: true, loss: "fitting", warmup: 0.2 };

/// See [`INFO`].
#[derive(Debug)]
struct Distill {
    settings: Settings,
    layers: usize,
}

/// Samples are drawn in an order of this seed.
const SEED: u64 = 0x0d15_7111;

impl Distill {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let nothing = || OptionError { option: "learn".into(), problem: "the pass does nothing else".into() };
        let settings = Settings::of(options, &USUAL)?.ok_or_else(nothing)?;
        if settings.loss.is_of_blocks() {
            let name = options.text("loss", USUAL.loss);
            let problem = format!("`{name}` is about blocks, and here the whole model is learned: fitting, kl or mse");
            return Err(OptionError { option: "loss".into(), problem });
        }
        Ok(Self { settings, layers: options.count("layers", 4)?.max(1) })
    }
}

/// The edits that all links together come to from where learning stands; none where it does no better. Every check is kept in the journal
/// under a key and in so many bytes, where it is to be `kept`; `patch` says where it takes more.
fn learn(
    model: &Model,
    cx: &PassContext<'_>,
    chain: &Chain,
    settings: &Settings,
    mut at: Standing<'_>,
    mut kept: Option<(&str, u64)>,
    patch: &mut Patch,
) -> Result<Vec<Edit>, PassError> {
    let mut order = Order::new(&chain.fitted, SEED);
    let first = at.steps;
    if first > 0 {
        tracing::debug!(steps = first, of = settings.iterations, "goes on from its last check");
    }
    for _ in 0..first {
        cx.progress.step();
        order.next(settings.batch);
    }
    for iteration in first..settings.iterations {
        cx.progress.step();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        if settings.is_check(iteration) && iteration > first {
            let before = at.best.0;
            at.best = better(model, chain, &at.courses, at.best, iteration).map_err(|reason| refused(&reason))?;
            cx.progress.loss(at.best.0);
            at.in_vain = if at.best.0 < before { 0 } else { at.in_vain + 1 };
            at.steps = iteration;
            if let Some((key, room)) = kept
                && !at.keep(cx.journal, key, room)?
            {
                kept = None;
                patch.note(unresumable(at.bytes()));
            }
        }
        if !settings.goes_on(at.in_vain) {
            return Ok(at.best.1);
        }
        let batch = order.next(settings.batch);
        if !step(model, chain, settings, &mut at.courses, iteration, &batch).map_err(|reason| refused(&reason))? {
            patch.note(no_numbers(iteration + 1));
            break; // what has been learned so far is judged as it is
        }
    }
    Ok(better(model, chain, &at.courses, at.best, settings.iterations).map_err(|reason| refused(&reason))?.1)
}

/// Moves all links against what they lose on `batch`; whether every gradient was a number.
fn step(
    model: &Model,
    chain: &Chain,
    settings: &Settings,
    courses: &mut [Course<'_>],
    iteration: usize,
    batch: &[usize],
) -> Result<bool, GradError> {
    let weights = |at: usize| chain.links[at].program.weights_of(model.plan());
    let progress = iteration as f32 / settings.iterations as f32;
    let courses = std::cell::RefCell::new(courses);
    let mut finite = true;
    let mut leaves = |at: usize, back: bool| {
        let (weights, course) = (weights(at)?, &mut courses.borrow_mut()[at]);
        course.soften(&weights, progress);
        let leaves = chain.links[at].program.leaves(&weights, &course.at);
        // On the way back the step needs them once more.
        if !back {
            course.at.units.clear();
        }
        leaves
    };
    chain.sweep(batch, (settings.drop, iteration as u64), Pull::Errors, &mut leaves, &mut |at, grads| {
        finite &= grads.are_finite();
        let course = &mut courses.borrow_mut()[at];
        if finite {
            course.step(&weights(at)?, &grads, progress);
        }
        course.at.units.clear();
        Ok(())
    })?;
    Ok(finite)
}

/// The better one on the samples that are held out: what was `best` so far, or what the `courses` have come to.
fn better(
    model: &Model,
    chain: &Chain,
    courses: &[Course<'_>],
    best: (f64, Vec<Edit>),
    iteration: usize,
) -> Result<(f64, Vec<Edit>), GradError> {
    let mut made: Option<Vec<Edit>> = Some(Vec::new());
    let mut leaves = |at: usize| -> Result<Leaves, GradError> {
        let link = &chain.links[at];
        let weights = link.program.weights_of(model.plan())?;
        let mut hard: Outcome = courses[at].hardened(&weights);
        match (edits(model, &link.block, &link.program, &weights, &hard), &mut made) {
            (Some(edits), Some(made)) => {
                // Judged as it will be written: biases in codes of the new scales.
                hard.biases = written(&link.program, model.plan(), &edits, hard.biases);
                made.extend(edits);
            }
            _ => made = None,
        }
        link.program.leaves(&weights, &hard)
    };
    let loss = chain.held_out_loss(&mut leaves)?;
    tracing::debug!(iteration, loss, best = best.0, "distilled");
    // A bias that does not fit its codes any more leaves what there was.
    Ok(made.filter(|_| loss < best.0).map_or(best, |made| (loss, made)))
}

impl Pass for Distill {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn keeps_samples(&self) -> bool {
        true
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        cx.dataset.filter(|data: &&dyn Dataset| !data.is_empty()).ok_or(PassError::NoData)?;
        // All options of the pass: what was learned by others is another answer.
        let key = format!("distilled by {self:?} from {:016x}", record::digest(model.plan()));
        let made = if let Some(made) = record::kept(cx.journal, &key) {
            made
        } else {
            let made = self.learn_on(model, cx, &key, &mut patch)?;
            record::keep(cx.journal, &key, &made).map_err(PassError::Model)?;
            made
        };
        let weights = made.iter().filter(|edit| matches!(edit, Edit::Round { .. })).count();
        patch.count("weights learned from the whole model", weights as u64);
        let codes = codes_changed(model, &made);
        patch.count("codes changed", codes);
        if codes == 0 && weights > 0 && self.settings.learns(Part::Codes) {
            let message = "distill: all codes are what they were; what it gained it gained by scales, biases and norms";
            let note = Diagnostic::new(diag::CODES_STAYED, Severity::Note, Place::Model, message.to_owned());
            patch.note(
                note.help(
                    "codes=0 learns those alone, in less memory; more iterations, or a higher rate, change codes",
                ),
            );
        }
        made.into_iter().for_each(|edit| patch.edit(edit));
        Ok(patch)
    }
}

/// How many codes of weights are others in `made` than in the plan of `model`. Biases, of 32 bits, do not count.
fn codes_changed(model: &Model, made: &[Edit]) -> u64 {
    let changed = |edit: &Edit| {
        let Edit::Round { site, codes } = edit else { return 0 };
        let kind = |tensor: &Tensor| (tensor.dtype(), tensor.shape().to_vec());
        let old = model.plan().codes(*site).filter(|old| old.dtype() != DType::I32 && kind(old) == kind(codes));
        old.map_or(0, |old| unpack(old).iter().zip(&unpack(codes)).filter(|(old, new)| old != new).count() as u64)
    };
    made.iter().map(changed).sum()
}

/// What stands in the way, and what to do.
fn refused(reason: &impl std::fmt::Display) -> PassError {
    PassError::Model(format!(
        "gradients do not pass the model: {reason}; leave `distill` out of the pipeline, or learn by blocks with --learn"
    ))
}

impl Distill {
    /// What is learned on `model`, from where the journal says that `key` stood.
    fn learn_on(
        &self,
        model: &Model,
        cx: &PassContext<'_>,
        key: &str,
        patch: &mut Patch,
    ) -> Result<Vec<Edit>, PassError> {
        let free = cx.scheme.block_format().is_none() && !cx.scheme.power_of_two;
        let settings = self.settings.with_scales(free);
        let also =
            Also { steps: settings.learns(Part::Steps), norms: settings.learns(Part::Norms), inputs: true, rest: 0 };
        let chain = Chain::linked(model.graph(), model.plan(), cx, self.layers, also)?;
        let mut chain = chain.map_err(|reason| refused(&reason))?;
        if !settings.learns(Part::Biases) {
            let links = chain.links.iter_mut();
            links.for_each(|link| link.program.hold_biases(model.graph(), model.plan(), &link.block));
        }
        let (for_samples, left) = split(&settings, &chain, cx)?;
        let budget = Budget { samples: for_samples, all: for_samples.saturating_add(left), batch: settings.batch };
        let chain = chain.with_samples(model.graph(), cx, budget, settings.loss)?;
        let chain = chain.map_err(|reason| refused(&reason))?;
        let given = cx.dataset.map_or(0, Dataset::len);
        if chain.samples() < given {
            patch.note(fewer(chain.samples(), given));
        }
        cx.progress.begin(INFO.about.name, settings.iterations as u64);
        let begin = || Standing::begin(model, &chain, &settings, SEED).map_err(|reason| refused(&reason));
        let mut at = begin()?;
        let room = cx.journal.room().map(|room| room.min(left));
        let bytes = at.bytes();
        let kept = room.filter(|room| bytes <= *room).map(|room| (key, room));
        if room.is_some() && kept.is_none() {
            patch.note(unresumable(bytes));
        }
        // What does not fit may have changed what was there.
        let stood = cx.journal.standing(key).filter(|_| kept.is_some()).and_then(|state| at.put_back(&state));
        at = if let Some(at) = stood.filter(|at| at.steps < settings.iterations) {
            at
        } else {
            let mut at = begin()?;
            at.best.0 = start_loss(model, &chain).map_err(|reason| refused(&reason))?;
            at
        };
        cx.progress.loss(at.best.0);
        let learned = learn(model, cx, &chain, &settings, at, kept, patch);
        cx.progress.end();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        learned
    }
}

/// The loss of the plan as it is, on the samples that are held out.
fn start_loss(model: &Model, chain: &Chain) -> Result<f64, GradError> {
    chain.held_out_loss(&mut |at| {
        let program = &chain.links[at].program;
        let weights = program.weights_of(model.plan())?;
        program.leaves(&weights, &program.start(&weights))
    })
}

fn unresumable(bytes: u64) -> Diagnostic {
    let message = format!("it takes {} MB: stopped on its way, it would be learned from the start", bytes / 1_000_000);
    Diagnostic::new(diag::UNRESUMABLE, Severity::Note, Place::Model, message)
}

fn no_numbers(step: usize) -> Diagnostic {
    let message = format!("gradients were no numbers in step {step}: what was learned until then is judged as it is");
    Diagnostic::new(diag::NO_GRADIENTS, Severity::Warning, Place::Model, message)
        .help("a lower rate may keep them finite; where they are none in step 1, an operator has none at what it reads (Sqrt at 0)")
}

fn fewer(samples: usize, given: usize) -> Diagnostic {
    let message =
        format!("{samples} of {given} samples fit into memory beside what is learned: it is learned from those");
    Diagnostic::new(diag::FEWER_SAMPLES, Severity::Note, Place::Model, message)
        .help("allow more with --max-memory, or learn less with codes=0")
}

/// The bytes that samples may take beside what is learned of all weights at once, and those that both leave. What is learned comes first:
/// there can be fewer samples, or their targets computed anew.
///
/// # Errors
/// Where memory does not hold what is learned, with what takes less.
fn split(settings: &Settings, chain: &Chain, cx: &PassContext<'_>) -> Result<(u64, u64), PassError> {
    if !settings.learns(Part::Codes) {
        return Ok((cx.pair_budget, cx.lone_budget.saturating_sub(cx.pair_budget)));
    }
    let weights = chain.links.iter().flat_map(|link| &link.program.weights).map(|(.., tensor)| tensor.len() as u64);
    let weights: u64 = weights.sum();
    let needed = weights.saturating_mul(settings.method.bytes_per_weight());
    if let Some(left) = cx.lone_budget.checked_sub(needed) {
        let for_samples = left.min(cx.pair_budget);
        return Ok((for_samples, left - for_samples));
    }
    let name = settings.method.about().name;
    Err(PassError::Model(format!(
        "what {name} learns of {weights} weights takes {} MB, and {} MB are left: leave codes as they are (codes=0), take a \
         method that keeps less (q-galore, lrq), or give more memory",
        needed / 1_000_000,
        cx.lone_budget / 1_000_000
    )))
}

#[cfg(test)]
mod tests {
    use super::super::measure::Wish;
    use super::super::testing::{Drawn, Memory, NoTarget, Tapes, two_products, two_products_around};
    use super::*;
    use crate::journal::{Journal, NoJournal};
    use crate::pass::{PassManager, Pipeline};
    use crate::rounding;

    /// A digest of what the pipeline `text` learns with `journal`, and how often it says that it cannot go on from a check.
    fn distilled(text: &str, journal: &dyn Journal) -> (u64, usize) {
        let data = Drawn(9);
        let mut cx = PassContext { dataset: Some(&data), journal, ..PassContext::new(&NoTarget, &Tapes) };
        let pipeline = Pipeline::parse(text, &crate::catalogue::passes()).unwrap();
        let model = rounding::in_nearest(&two_products(0.7)).unwrap();
        let (model, trace) = PassManager::default().run(&pipeline, model, &mut cx).unwrap();
        let notes = trace.notes.iter().filter(|note| note.code == diag::UNRESUMABLE).count();
        (record::digest(model.plan()), notes)
    }

    /// At a rate of 0 nothing is learned, so that both begin at the same plan.
    #[test]
    fn other_options_are_another_question() {
        for rate in [0, 30] {
            let pass = |layers: u8| format!("distill{{iterations=20, drop=0.5, rate={rate}, layers={layers}}}");
            let text = [pass(1), pass(4)].join(", ");
            let journal = Memory { room: u64::MAX, ..Memory::default() };
            assert_eq!(distilled(&text, &journal), distilled(&text, &NoJournal), "{rate}");
            assert_eq!(journal.records.lock().unwrap().len(), 2, "{rate}: one answer for both");
        }
    }

    /// At a rate too low for codes scales are learned all the same, and a note says so.
    #[test]
    fn codes_that_cannot_change_are_told() {
        let data = Drawn(9);
        let told = |options: &str| {
            let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let model = rounding::in_nearest(&two_products(0.7)).unwrap();
            let pipeline = Pipeline::parse(&format!("distill{{{options}}}"), &crate::catalogue::passes()).unwrap();
            let (_, trace) = PassManager::default().run(&pipeline, model, &mut { cx }).unwrap();
            let of = |what| trace.steps[0].1.counts[what];
            (
                [of("weights learned from the whole model"), of("codes changed")],
                trace.notes.iter().any(|note| note.code == diag::CODES_STAYED),
            )
        };
        let (counts, stayed) = told("iterations=20, rate=0.1");
        assert!(counts[0] > 0 && counts[1] == 0 && stayed, "{counts:?}");
        let (counts, stayed) = told("iterations=20, rate=0.1, codes=0");
        assert!(counts[0] > 0 && counts[1] == 0 && !stayed, "{counts:?}");
        let (counts, stayed) = told("iterations=200, rate=10");
        assert!(counts[0] > 0 && counts[1] > 0 && !stayed, "{counts:?}");
    }

    /// Hears how many steps were made, and the losses.
    #[derive(Default)]
    struct Heard(std::sync::Mutex<(usize, Vec<f64>)>);

    impl crate::exec::Progress for Heard {
        fn begin(&self, _: &str, _: u64) {
            *self.0.lock().unwrap() = (0, Vec::new());
        }
        fn step(&self) {
            self.0.lock().unwrap().0 += 1;
        }
        fn loss(&self, loss: f64) {
            self.0.lock().unwrap().1.push(loss);
        }
        fn end(&self) {}
    }

    /// What `options` come to: the plan before and after, so many steps, and the losses that were told.
    fn ran(options: &str) -> (Model, Model, usize, Vec<f64>) {
        let (data, heard) = (Drawn(9), Heard::default());
        let mut cx = PassContext { dataset: Some(&data), progress: &heard, ..PassContext::new(&NoTarget, &Tapes) };
        let before = rounding::in_nearest(&two_products(0.7)).unwrap();
        let pipeline = Pipeline::parse(&format!("distill{{{options}}}"), &crate::catalogue::passes()).unwrap();
        let (after, _) = PassManager::default().run(&pipeline, before.clone(), &mut cx).unwrap();
        let (steps, losses) = heard.0.into_inner().unwrap();
        (before, after, steps, losses)
    }

    #[test]
    fn it_ends_early_where_nothing_better_is_found_and_tells_its_losses() {
        // At a rate of 0 no check finds anything better.
        let (.., steps, losses) = ran("iterations=100, rate=0, patience=3");
        assert_eq!((steps, losses.len()), (31, 4), "{losses:?}");
        let (.., steps, _) = ran("iterations=100, rate=0");
        assert_eq!(steps, 100);
        let (.., losses) = ran("iterations=100, rate=3");
        assert!(losses.last() < losses.first() && losses.windows(2).all(|pair| pair[1] <= pair[0]), "{losses:?}");
    }

    /// A root of 0 has no gradient: nothing is learned, nothing is lost, and it is told.
    #[test]
    fn gradients_that_are_no_numbers_end_it_with_a_note() {
        let data = Drawn(9);
        let text = "%r = Relu(%p) %h = Sqrt(%r)";
        let before = rounding::in_nearest(&two_products_around(text, 5, 0.7)).unwrap();
        let run = |pass: &str, model: Model| {
            let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let pipeline = Pipeline::parse(pass, &crate::catalogue::passes()).unwrap();
            let (model, trace) = PassManager::default().run(&pipeline, model, &mut { cx }).unwrap();
            let told = trace.notes.iter().filter(|note| note.code == diag::NO_GRADIENTS);
            (record::digest(model.plan()), told.map(|note| note.message.clone()).collect::<Vec<_>>())
        };
        let (after, told) = run("distill{iterations=20}", before.clone());
        assert_eq!(after, record::digest(before.plan()));
        assert!(told.len() == 1 && told[0].contains("in step 1"), "{told:?}");
        let by_blocks = |learn: &str| run(&format!("round-in-order{{{learn}}}"), two_products_around(text, 5, 0.7));
        let (alone, none) = by_blocks("learn=none");
        let (learned, told) = by_blocks("learn=latent, iterations=20, layers=4");
        assert!(learned == alone && none.is_empty(), "{none:?}");
        assert!(told.len() == 1 && told[0].contains("no numbers in step 1"), "{told:?}");
    }

    /// Whatever the method and however wild the rate, what is kept loses no more on the samples that are held out.
    #[test]
    fn what_is_kept_is_never_worse_on_samples_that_are_held_out() {
        let data = Drawn(9);
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let loss = |model: &Model| {
            let also = Also { steps: false, norms: true, inputs: true, rest: 0 };
            let chain = Chain::linked(model.graph(), model.plan(), &cx, 4, also).unwrap().unwrap();
            let all = Budget { samples: cx.pair_budget, all: cx.lone_budget, batch: 4 };
            start_loss(model, &chain.with_samples(model.graph(), &cx, all, Wish::Fitting).unwrap().unwrap()).unwrap()
        };
        for method in super::super::PARAMETERIZATIONS {
            let name = method.about().name;
            for rate in ["0.1", "30", "1000"] {
                let (before, after, ..) = ran(&format!("learn={name}, iterations=30, rate={rate}"));
                let (first, last) = (loss(&before), loss(&after));
                assert!(last <= first * (1.0 + 1e-6), "{name} at {rate}: {first} {last}");
            }
        }
    }

    #[test]
    fn no_standing_is_larger_than_there_is_room_for() {
        let text = "distill{learn=q-galore, iterations=20, rate=30}";
        let roomy = Memory { room: u64::MAX, ..Memory::default() };
        let (wanted, notes) = distilled(text, &roomy);
        let largest = roomy.standings.lock().unwrap().iter().copied().max();
        let (Some(largest), 0) = (largest, notes) else { panic!("{largest:?} {notes}") };
        let tight = Memory { room: largest - 1, ..Memory::default() };
        assert_eq!(distilled(text, &tight), (wanted, 1));
        assert!(tight.standings.lock().unwrap().is_empty());
    }

    #[test]
    fn samples_that_do_not_fit_are_counted_in_a_note() {
        let data = Drawn(9);
        let pipeline = Pipeline::parse("distill{iterations=2}", &crate::catalogue::passes()).unwrap();
        for (budget, noted) in [(u64::MAX, false), (40, true)] {
            let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let mut cx = PassContext { lone_budget: budget.saturating_add(1 << 16), pair_budget: budget, ..cx };
            let model = rounding::in_nearest(&two_products(0.7)).unwrap();
            let (_, trace) = PassManager::default().run(&pipeline, model, &mut cx).unwrap();
            let notes: Vec<&str> = trace.notes.iter().map(|note| &*note.message).collect();
            assert_eq!(notes.iter().any(|note| note.contains("of 9 samples")), noted, "{budget}: {notes:?}");
        }
    }

    #[test]
    fn what_is_learned_comes_before_samples() {
        let data = Drawn(9);
        let learned = |lone_budget: u64, pair_budget: u64| {
            let cx =
                PassContext { dataset: Some(&data), lone_budget, pair_budget, ..PassContext::new(&NoTarget, &Tapes) };
            let model = rounding::in_nearest(&two_products(0.7)).unwrap();
            let also = Also { steps: false, norms: true, inputs: true, rest: 0 };
            let chain = Chain::linked(model.graph(), model.plan(), &cx, 1, also).unwrap().unwrap();
            let settings = Settings::of(&Options::default(), &USUAL).unwrap().unwrap();
            let (for_samples, left) = split(&settings, &chain, &cx).map_err(|error| error.to_string())?;
            let budget = Budget { samples: for_samples, all: for_samples.saturating_add(left), batch: settings.batch };
            let chain = chain.with_samples(model.graph(), &cx, budget, settings.loss);
            let chain = chain.map_err(|error| error.to_string())?.unwrap();
            Ok::<_, String>((for_samples, left, chain.samples()))
        };
        // Latent takes 12 bytes for each of 4 · 5 + 5 · 3 weights: 420.
        assert_eq!(learned(1 << 16, 1000), Ok((1000, (1 << 16) - 1420, 9)));
        assert_eq!(learned(u64::MAX, 1000), Ok((1000, u64::MAX - 1420, 9)));
        let (for_samples, left, samples) = learned(1 << 16, 40).unwrap();
        assert_eq!((for_samples, left), (40, (1 << 16) - 460));
        assert!((1..9).contains(&samples), "{samples}");
        // What is left is too little for a step.
        let said = learned(460, 460).unwrap_err();
        assert!(["layers=1", "codes=0", "--max-memory"].iter().all(|fix| said.contains(fix)), "{said}");
        let said = learned(400, 400).unwrap_err();
        assert!(said.contains("q-galore") && said.contains("more memory"), "{said}");
    }

    /// Fewer lanes side by side, and tapes in parts, come to the same; where not even that fits, the fix is named.
    #[test]
    fn memory_decides_how_the_chain_runs_and_not_what_is_learned() {
        let data = Drawn(9);
        let before =
            rounding::in_nearest(&two_products_around("%q = Tanh(%p) %r = Sigmoid(%q) %h = Tanh(%r)", 40, 0.7))
                .unwrap();
        let pipeline =
            Pipeline::parse("distill{iterations=8, batch=8, rate=3, layers=2}", &crate::catalogue::passes()).unwrap();
        let learned = |room: u64| {
            let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            // What 280 weights take, and samples.
            let mut cx = PassContext { lone_budget: 12 * 280 + 2000 + room, pair_budget: 2000, ..cx };
            let planned = PassManager::default().run(&pipeline, before.clone(), &mut cx);
            planned.map(|(model, _)| record::digest(model.plan())).map_err(|error| error.to_string())
        };
        let plenty = learned(1 << 30).unwrap();
        assert_ne!(plenty, record::digest(before.plan()));
        let all: Vec<_> = (0..60).map(|step| learned(step * 512)).collect();
        let fits = all.iter().position(Result::is_ok).unwrap();
        assert!(fits > 0 && all[fits..].iter().all(|found| *found == Ok(plenty)), "{fits} {all:?}");
        let refused = all[0].as_ref().unwrap_err();
        assert!(["--max-memory", "layers=1", "batch="].iter().all(|fix| refused.contains(fix)), "{refused}");
    }
}
