//! What passes that rewrite did to the function, checked on samples, and undone region by region where they changed it.

use std::collections::BTreeSet;

use super::{Fidelity, Pass, PassContext, PassEntry, PassError};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Dataset;
use crate::id::NodeId;
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch, Plan};
use crate::ops::{self, Laws};
use crate::simulate::SimulateError;
use crate::slices;
use crate::tensor::Tensor;

/// An output may change by so much of its largest value where the function is to be the same: sums of floats come in another order. The
/// deepest model of the zoo changes by a tenth of that.
const MOST_CHANGE: f64 = 1e-4;

/// The least ratio of the power of an output to that of its change where the function is to be the same on samples alone: 50 dB.
pub(crate) const LEAST_RATIO: f64 = 1e5;

/// So many samples tell whether the function is the same.
const SAMPLES: usize = 2;

/// So many where it is to be that on samples alone.
const SAMPLES_OF_LOSSY: usize = 8;

/// So many nodes of what was undone are named.
const NAMED: usize = 8;

/// The most runs in search of the regions that change the function; what is then left open is undone.
const MOST_RUNS: usize = 48;

/// Checks the patches of some passes.
#[derive(Default)]
pub(super) struct Audit {
    /// The passes whose patches are checked.
    table: &'static [PassEntry],
    /// What the model returned last.
    last: Option<Returned>,
    /// The nodes of regions that were undone, by the pass: they are not tried again.
    refused: BTreeSet<(&'static str, Vec<NodeId>)>,
}

/// What a model returned for some samples.
struct Returned {
    of: Fidelity,
    samples: Vec<Vec<Tensor>>,
    held_out: bool,
    outputs: Vec<Vec<Tensor>>,
}

/// What a check came to.
pub(super) struct Verdict {
    /// What of the patch stands.
    pub(super) patch: Patch,
    /// Regions that were undone.
    pub(super) undone: u64,
    /// What the user should know.
    pub(super) notes: Vec<Diagnostic>,
}

impl Audit {
    /// Of the passes of `table`.
    pub(super) fn of(table: &'static [PassEntry]) -> Self {
        Self { table, ..Self::default() }
    }

    /// Whether patches of `pass` are checked.
    fn watches(&self, pass: &dyn Pass) -> bool {
        let rewrites = matches!(pass.fidelity(), Fidelity::UpToRounding | Fidelity::OnSamples);
        rewrites && self.table.iter().any(|entry| std::ptr::eq(entry.info, pass.info()))
    }

    /// The model changed by another way than a patch that stood here, or memory is needed for something else.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// What of `patch`, made by `pass`, leaves the outputs of `model` as they are on samples: those that `cx` holds out where the function is to be
    /// the same on samples alone. All of it where there are no samples, or nothing that the model returns tells.
    ///
    /// # Errors
    /// [`PassError`] where a sample cannot be read, or the user interrupts.
    pub(super) fn verdict(
        &mut self,
        pass: &dyn Pass,
        model: &Model,
        patch: Patch,
        cx: &PassContext<'_>,
    ) -> Result<Verdict, PassError> {
        let unseen = |patch| Ok(Verdict { patch, undone: 0, notes: Vec::new() });
        // Where the interface is another one, samples and outputs mean something else.
        let comparable = !patch.edits().iter().any(|edit| matches!(edit, Edit::Interface { .. }));
        if !comparable || !self.watches(pass) {
            if !comparable || pass.fidelity() != Fidelity::Exact {
                self.forget();
            }
            return unseen(patch);
        }
        let last = self.last.take().filter(|last| last.of == pass.fidelity());
        let Some(before) = last.map_or_else(|| before(pass.fidelity(), model, cx), |last| Ok(Some(last)))? else {
            return unseen(patch);
        };
        let regions = patch.regions(model.graph());
        let mut search = Search::new((pass, model, &patch), before, &regions, cx);
        let (mut undone, open) = self.known(pass, &patch, regions);
        search.settle(&open, &mut undone)?;
        let notes = search.notes(&undone);
        self.last = Some(search.reference());
        let name = pass.info().about.name;
        self.refused.extend(undone.iter().map(|region| (name, touched(&patch, region))));
        if undone.is_empty() {
            return Ok(Verdict { patch, undone: 0, notes });
        }
        let left = patch.without(&undone.iter().flatten().copied().collect());
        // Where nothing of it stands, nothing was to be recorded or forgotten.
        let stands = left.edits().iter().any(Edit::touches_graph);
        Ok(Verdict { patch: if stands { left } else { Patch::on(model) }, undone: undone.len() as u64, notes })
    }

    /// The `regions` of a patch of `pass` that were undone before, and the others.
    fn known(&self, pass: &dyn Pass, patch: &Patch, regions: Vec<Vec<usize>>) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
        let name = pass.info().about.name;
        regions.into_iter().partition(|region| self.refused.contains(&(name, touched(patch, region))))
    }
}

/// What `model` returns for samples of `cx`; `None` where there are none, or it does not run, which whoever measures it will say.
fn before(of: Fidelity, model: &Model, cx: &PassContext<'_>) -> Result<Option<Returned>, PassError> {
    // What is drawn at random is never the same.
    if draws(model.graph()) {
        return Ok(None);
    }
    let (first, second) = if of == Fidelity::OnSamples { (cx.held_out, cx.dataset) } else { (cx.dataset, cx.held_out) };
    let Some(dataset) = first.or(second).filter(|dataset| !dataset.is_empty()) else { return Ok(None) };
    let held_out = of == Fidelity::OnSamples && cx.held_out.is_some();
    let samples = samples(of, model.graph(), dataset, cx)?;
    let outputs = match outputs(model.graph(), &samples, cx)? {
        Ok(outputs) => outputs,
        Err(error) => {
            tracing::debug!(%error, "nothing to compare with");
            return Ok(None);
        }
    };
    Ok(Some(Returned { of, samples, held_out, outputs }))
}

/// Whether anything in `graph` is drawn at random.
fn draws(graph: &Graph) -> bool {
    let by_itself = |node: &Node| ops::laws(&node.op).contains(Laws::RANDOM);
    graph.nodes().any(|(_, node)| by_itself(node) || node.bodies.iter().any(|body| draws(&body.graph)))
}

/// Samples spread over `dataset`, as many as the tensors of them fit the budget for what is measured.
fn samples(
    of: Fidelity,
    graph: &Graph,
    dataset: &dyn Dataset,
    cx: &PassContext<'_>,
) -> Result<Vec<Vec<Tensor>>, PassError> {
    // By their names: which ones they are must not depend on their order.
    let mut order: Vec<usize> = (0..dataset.len()).collect();
    order.sort_by_cached_key(|&index| dataset.name(index));
    let first = dataset.sample(order[0])?;
    let sizes = if cx.sizes.is_empty() { ops::sizes::of(graph, &first) } else { cx.sizes.clone() };
    let returned: u64 = graph.outputs().iter().filter_map(|value| sizes.get(value)).sum();
    let each = 2 * returned + sizes.values().max().copied().unwrap_or(0);
    let most = if of == Fidelity::OnSamples { SAMPLES_OF_LOSSY } else { SAMPLES };
    let fit = usize::try_from(cx.tap_budget / each.max(1)).unwrap_or(most);
    let n = most.min(dataset.len()).min(fit.max(1));
    let at = |i: usize| if i == 0 { Ok(first.clone()) } else { dataset.sample(order[i * dataset.len() / n]) };
    Ok((0..n).map(at).collect::<Result<_, _>>()?)
}

/// What `graph` returns for `samples`, or why it does not run.
fn outputs(
    graph: &Graph,
    samples: &[Vec<Tensor>],
    cx: &PassContext<'_>,
) -> Result<Result<Vec<Vec<Tensor>>, SimulateError>, PassError> {
    if cx.progress.cancelled() {
        return Err(PassError::Interrupted);
    }
    let mut found = vec![vec![None; graph.outputs().len()]; samples.len()];
    let ran = slices::run(graph, &Plan::default(), cx.executor, graph.outputs(), samples, &mut |sample, at, tensor| {
        found[sample][at] = Some(tensor);
    });
    Ok(ran.map(|()| found.into_iter().map(|outputs| outputs.into_iter().flatten().collect()).collect()))
}

/// The search for what of a patch changes the function.
struct Search<'a, 'c> {
    pass: &'a dyn Pass,
    model: &'a Model,
    patch: &'a Patch,
    before: Returned,
    /// What the model returns with what is kept.
    now: Option<Vec<Vec<Tensor>>>,
    /// The places of edits that are in any region.
    all: BTreeSet<usize>,
    /// The places of edits that stand.
    kept: BTreeSet<usize>,
    runs: usize,
    /// The places of edits that were not tried alone.
    untried: BTreeSet<usize>,
    cx: &'a PassContext<'c>,
}

impl<'a, 'c> Search<'a, 'c> {
    /// Nothing is kept yet of a patch in these `regions`.
    fn new(
        (pass, model, patch): (&'a dyn Pass, &'a Model, &'a Patch),
        before: Returned,
        regions: &[Vec<usize>],
        cx: &'a PassContext<'c>,
    ) -> Self {
        let all = regions.iter().flatten().copied().collect();
        let (kept, untried) = (BTreeSet::new(), BTreeSet::new());
        Self { pass, model, patch, before, now: None, all, kept, runs: 0, untried, cx }
    }

    /// What the next patch is compared with: what is lost on samples adds up, and is told against the first.
    fn reference(self) -> Returned {
        let now = if self.before.of == Fidelity::OnSamples { None } else { self.now };
        Returned { outputs: now.unwrap_or(self.before.outputs), ..self.before }
    }

    /// Keeps what it can of `regions`, beside what it has kept, by halves; the others are `undone`.
    fn settle(&mut self, regions: &[Vec<usize>], undone: &mut Vec<Vec<usize>>) -> Result<(), PassError> {
        if regions.is_empty() {
            return Ok(());
        }
        let tried = self.runs < MOST_RUNS;
        if tried
            && let Some(outputs) = self.returned_with(regions)?
            && self.stands(&outputs)
        {
            self.kept.extend(regions.iter().flatten());
            self.now = Some(outputs);
            return Ok(());
        }
        if regions.len() == 1 || self.runs >= MOST_RUNS {
            if !tried || regions.len() > 1 {
                self.untried.extend(regions.iter().flatten());
            }
            undone.extend(regions.iter().cloned());
            return Ok(());
        }
        let (first, second) = regions.split_at(regions.len() / 2);
        self.settle(first, undone)?;
        self.settle(second, undone)
    }

    /// What the model returns with `regions` and what is kept; `None` where it does not run.
    fn returned_with(&mut self, regions: &[Vec<usize>]) -> Result<Option<Vec<Vec<Tensor>>>, PassError> {
        self.runs += 1;
        let wanted: BTreeSet<usize> = self.kept.iter().chain(regions.iter().flatten()).copied().collect();
        let mut model = self.model.clone();
        if let Err(error) = model.apply(self.patch.without(&self.all.difference(&wanted).copied().collect())) {
            if wanted == self.all {
                return Err(PassError::Model(format!("a bug in onnx-quant: {error}")));
            }
            tracing::debug!(%error, "a part of a patch cannot stand alone");
            return Ok(None);
        }
        let outputs = outputs(model.graph(), &self.before.samples, self.cx)?;
        Ok(outputs.inspect_err(|error| tracing::debug!(%error, "what was rewritten does not run")).ok())
    }

    /// Whether `outputs` are those of before.
    fn stands(&self, outputs: &[Vec<Tensor>]) -> bool {
        let changes = changes(&self.before.outputs, outputs);
        changes.iter().all(|change| match self.before.of {
            Fidelity::OnSamples => change.keeps_power(),
            _ => change.is_rounding(),
        })
    }

    /// What the user should know of what was `undone`, and of what stands where that is the same on samples alone.
    fn notes(&self, undone: &[Vec<usize>]) -> Vec<Diagnostic> {
        let name = self.pass.info().about.name;
        let mut notes: Vec<Diagnostic> = undone.iter().map(|region| self.told(name, region)).collect();
        if let (Fidelity::OnSamples, Some(now)) = (self.before.of, &self.now)
            && changes(&self.before.outputs, now).iter().any(|change| change.compared)
        {
            let kept = changes(&self.before.outputs, now).iter().map(Change::decibels).fold(f64::INFINITY, f64::min);
            let which = if self.before.held_out { "held-out samples" } else { "samples, none of which were held out," };
            let kept = if kept.is_finite() { format!("{kept:.1} dB of") } else { "all of".into() };
            let message =
                format!("{name}: on {} {which} float outputs keep {kept} what they were", self.before.samples.len());
            notes.push(Diagnostic::new(diag::JUDGED, Severity::Note, Place::Model, message));
        }
        notes
    }

    fn told(&self, name: &str, region: &[usize]) -> Diagnostic {
        let untried = format!("was not told apart in {MOST_RUNS} runs from what changes what the model returns");
        let of = |id: &NodeId| Some(self.model.graph().node(*id)?.name.escape_debug().to_string());
        let nodes: Vec<String> = touched(self.patch, region).iter().filter_map(of).collect();
        let why = match self.before.of {
            _ if region.iter().any(|place| self.untried.contains(place)) => &untried,
            Fidelity::OnSamples => "leaves less than 50 dB of what the model returns for samples that judge it",
            _ => "changes what the model returns by more than its floats round",
        };
        let more = nodes.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} others") } else { String::new() };
        let named = nodes[..nodes.len().min(NAMED)].join("`, `");
        let message = format!("{name}: what it did to `{named}`{more} {why}, and was undone");
        Diagnostic::new(diag::UNDONE, Severity::Warning, Place::Model, message)
    }
}

/// The nodes that a region of `patch` takes away or replaces.
fn touched(patch: &Patch, region: &[usize]) -> Vec<NodeId> {
    let of = |place: &usize| match &patch.edits()[*place] {
        Edit::Replace { id, .. } | Edit::Erase(id) => Some(*id),
        _ => None,
    };
    region.iter().filter_map(of).collect()
}

/// How an output changed, over samples.
#[derive(Clone, Copy, Default)]
struct Change {
    /// Whether there was any number.
    compared: bool,
    largest: f64,
    difference: f64,
    signal: f64,
    noise: f64,
}

impl Change {
    /// Adds the numbers of a sample; where one is finite and was not, or is not any more, all is lost.
    fn see(&mut self, before: &Tensor, after: &Tensor) {
        let Some((before, after)) = before.values::<f32>().zip(after.values::<f32>()) else { return };
        if before.len() != after.len() {
            (self.difference, self.noise) = (f64::INFINITY, f64::INFINITY);
        }
        // One that is no number, or without end, must be the same.
        let differs = |(a, b): &(&f32, &f32)| {
            a.is_finite() || b.is_finite() || (a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()))
        };
        for (a, b) in before.iter().zip(after.iter()).filter(differs) {
            self.compared = true;
            let (a, b) = (f64::from(*a), f64::from(*b));
            if !(a.is_finite() && b.is_finite()) {
                (self.difference, self.noise) = (f64::INFINITY, f64::INFINITY);
                continue;
            }
            let difference = (a - b).abs();
            self.largest = self.largest.max(a.abs());
            self.difference = self.difference.max(difference);
            self.signal += a * a;
            self.noise += difference * difference;
        }
    }

    fn is_rounding(&self) -> bool {
        self.difference <= MOST_CHANGE * self.largest
    }

    fn keeps_power(&self) -> bool {
        self.noise * LEAST_RATIO <= self.signal
    }

    fn decibels(&self) -> f64 {
        if self.noise > 0.0 { 10.0 * (self.signal / self.noise).log10() } else { f64::INFINITY }
    }
}

/// How every output changed.
fn changes(before: &[Vec<Tensor>], after: &[Vec<Tensor>]) -> Vec<Change> {
    let mut changes = vec![Change::default(); before.first().map_or(0, Vec::len)];
    for (before, after) in before.iter().zip(after) {
        for ((change, before), after) in changes.iter_mut().zip(before).zip(after) {
            change.see(before, after);
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::DataError;
    use crate::pass::{Facts, OptionInfo, PassInfo, PassManager, Pipeline};
    use crate::reconstruct::testing::{Drawn, NoTarget, Tapes};

    const MODEL: &str = "graph (%x: f32[1,4]) -> (%y: f32[1,3], %z: f32[1,3]) {
        %a = const f32[4,5] rand(seed=1)
        %b = const f32[5,3] rand(seed=2)
        %c = const f32[4,3] rand(seed=3)
        %d = const f32[4,3] rand(seed=4)
        %p = MatMul(%x, %a)
        %h = Relu(%p)
        %y = MatMul(%h, %b)
        %q = MatMul(%x, %c)
        %r = MatMul(%x, %d)
        %z = Add(%q, %r)
    }";

    const NO_OPTIONS: &[OptionInfo] = &[];

    /// What a pass says that is `fidelity`, and its table.
    macro_rules! of_fidelity {
        ($info:ident, $table:ident, $fidelity:ident) => {
            static $info: PassInfo = PassInfo {
                about: crate::about::About { name: "scale", doc: "", source: "" },
                cost: "",
                requires: Facts::NONE,
                establishes: Facts::NONE,
                preserves: Facts::ALL,
                fidelity: Fidelity::$fidelity,
                options: NO_OPTIONS,
            };
            static $table: [PassEntry; 1] = [PassEntry { info: &$info, build: |_| unreachable!() }];
        };
    }

    of_fidelity!(EXACT, OF_EXACT, UpToRounding);
    of_fidelity!(ON_SAMPLES, OF_ON_SAMPLES, OnSamples);

    /// Multiplies weights, each by its factor, where they are what they were.
    #[derive(Debug)]
    struct Scale(&'static PassInfo, &'static [(&'static str, f32)]);

    impl Pass for Scale {
        fn info(&self) -> &'static PassInfo {
            self.0
        }

        fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
            let (mut patch, graph) = (Patch::on(model), model.graph());
            for (name, by) in self.1 {
                let (id, node) = graph.producer(graph.find(name).unwrap()).unwrap();
                let weight = graph.constant_input(node, 1).unwrap();
                let old = graph.value(node.input(1).unwrap()).name.to_string();
                if old.ends_with(".scaled") {
                    continue;
                }
                let scaled = Tensor::of(weight.shape(), weight.floats().unwrap().iter().map(|w| w * by).collect());
                let input = Some(patch.constant(&format!("{old}.scaled"), scaled));
                patch.replace(id, Node { inputs: vec![node.input(0), input], ..node.clone() });
            }
            Ok(patch)
        }
    }

    /// The names of weights that `pass` left scaled in [`MODEL`], by `table`, what it counted as undone, and what it said.
    fn scaled(
        pass: Scale,
        table: &'static [PassEntry],
        (dataset, held_out): (Option<&dyn Dataset>, Option<&dyn Dataset>),
    ) -> (Vec<String>, u64, Vec<Diagnostic>) {
        let mut cx = PassContext { dataset, held_out, ..PassContext::new(&NoTarget, &Tapes) };
        let pipeline = Pipeline { steps: vec![crate::pass::Step::Once(Box::new(pass))] };
        let model = crate::text::parse(MODEL).unwrap();
        let (model, trace) = PassManager::default().audited(table).run(&pipeline, model, &mut cx).unwrap();
        let weights = model
            .graph()
            .nodes()
            .filter_map(|(_, node)| model.graph().value(node.input(1)?).name.strip_suffix(".scaled"));
        (weights.map(str::to_owned).collect(), trace.steps[0].1.counts.get("undone").copied().unwrap_or(0), trace.notes)
    }

    #[test]
    fn what_changes_the_function_is_undone_and_the_rest_stands() {
        // A millionth is rounding, a thousandth is not.
        let factors: &[_] = &[("y", 1.0 + 1e-6), ("q", 1.001), ("r", 1.0)];
        let (kept, undone, notes) = scaled(Scale(&EXACT, factors), &OF_EXACT, (Some(&Drawn(4)), None));
        assert_eq!((kept, undone), (vec!["b".to_owned(), "d".to_owned()], 1));
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].code == diag::UNDONE && notes[0].to_string().contains("changes what the model returns"));
        let all = vec!["b".to_owned(), "c".to_owned(), "d".to_owned()];
        // Nothing is judged without samples, or of passes that are in no table.
        assert_eq!(scaled(Scale(&EXACT, factors), &OF_EXACT, (None, None)), (all.clone(), 0, Vec::new()));
        assert_eq!(scaled(Scale(&EXACT, factors), &[], (Some(&Drawn(4)), None)), (all, 0, Vec::new()));
    }

    /// The numbers of [`Drawn`], the second one of them beyond what others are.
    struct Beyond(f32);

    impl Dataset for Beyond {
        fn len(&self) -> usize {
            2
        }

        fn name(&self, index: usize) -> String {
            Drawn(2).name(index)
        }

        fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
            let sample = Drawn(2).sample(index)?;
            let by = if index == 1 { self.0 } else { 1.0 };
            Ok(sample
                .iter()
                .map(|t| Tensor::of(t.shape(), t.floats().unwrap().iter().map(|v| v * by).collect()))
                .collect())
        }
    }

    #[test]
    fn what_is_the_same_on_samples_alone_is_judged_by_those_held_out() {
        // By hand: 1 % of an output is 40 dB, a tenth of that 60.
        let factors: &[_] = &[("y", 1.001), ("q", 1.1)];
        let judges = Beyond(3.0);
        let (kept, undone, notes) =
            scaled(Scale(&ON_SAMPLES, factors), &OF_ON_SAMPLES, (Some(&Drawn(4)), Some(&judges)));
        assert_eq!((kept, undone), (vec!["b".to_owned()], 1));
        let told = |code, text: &str| notes.iter().any(|note| note.code == code && note.to_string().contains(text));
        assert!(
            told(diag::UNDONE, "samples that judge it")
                && told(diag::JUDGED, "2 held-out samples float outputs keep 60.0 dB"),
            "{notes:?}"
        );
        let (_, _, notes) = scaled(Scale(&ON_SAMPLES, &[("y", 1.001)]), &OF_ON_SAMPLES, (Some(&Drawn(4)), None));
        assert!(notes.iter().any(|note| note.to_string().contains("none of which were held out")), "{notes:?}");
    }

    #[test]
    fn numbers_that_are_finite_no_more_are_a_change() {
        let of = |before: &[f32], after: &[f32]| {
            let tensor = |values: &[f32]| vec![vec![Tensor::of([values.len()], values.to_vec())]];
            changes(&tensor(before), &tensor(after))[0]
        };
        assert!(!of(&[1.0, f32::NAN], &[1.0, 3.0]).is_rounding() && !of(&[1.0], &[f32::NAN]).is_rounding());
        assert!(of(&[1.0, f32::NAN], &[1.0, f32::NAN]).is_rounding());
        assert!(!of(&[1.0], &[f32::INFINITY]).keeps_power() && !of(&[1.0, 2.0], &[1.0]).is_rounding());
        assert!(of(&[0.0], &[0.0]).is_rounding() && !of(&[0.0], &[1e-9]).is_rounding());
        assert!(of(&[f32::INFINITY], &[f32::INFINITY]).is_rounding());
    }
}
