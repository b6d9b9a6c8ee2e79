//! Runs the data once, for all wishes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::{DataError, Dataset};
use crate::id::ValueId;
use crate::ir::Graph;
use crate::model::{Edit, Model, Patch, Plan, Statistic};
use crate::observe::{Ends, GramSums, Judges, Means, Peaks, Rows, Sketch};
use crate::padding::Mask;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simulate::Simulation;
use crate::tensor::Tensor;
use crate::{judges, ops, padding, parallel};

crate::declare_pass! {
    /// Measures the distribution of every tensor that later passes wish for, in one pass over the data.
    ///
    /// Per tensor a histogram over sign, exponent and six mantissa bits, with exact ends: fixed memory whatever the
    /// number of samples, and counts that do not depend on order, batching or threads. Where the tensors tapped at once
    /// would not fit the tap budget, they are tapped in groups, one pass over the data each. Second moments take a pass of
    /// their own, as they are summed in units of the peaks that the first one found. Positions that an input called
    /// `attention_mask` marks as padding are left out: nobody reads what is computed there.
    INFO {
        name: "calibrate",
        source: "analysis after DDSketch, arXiv:1908.10693; bucketing by bit pattern ours",
        cost: "One forward pass of the float model per sample; a second one where later passes wish for Gram matrices, with T d² multiply-adds for each of d columns over T rows, and 8 d² bytes per worker. Tensors wait for no other: memory holds one sample per worker.",
        requires: Facts::SHAPES,
        establishes: Facts::CALIBRATED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Calibrate)) };

/// See [`INFO`].
#[derive(Debug)]
struct Calibrate;

impl Pass for Calibrate {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let stats = model.stats();
        let open = |(value, wish): &(ValueId, Wish)| match wish {
            Wish::Distribution => stats.distribution(*value).is_none(),
            Wish::Judges => stats.judges(*value).is_none(),
            Wish::Means { .. } => stats.means(*value).is_none(),
            Wish::Peaks { axis } => stats.peaks(*value, *axis).is_none(),
            Wish::Ends { axis } => stats.ends(*value, *axis).is_none(),
            Wish::Gram(rows) => stats.gram(*value, *rows).is_none(),
        };
        let mut wanted: Vec<(ValueId, Wish)> = cx.wishes.iter().copied().filter(open).collect();
        let with_samples = cx.dataset.is_some_and(|d| !d.is_empty());
        let unfiled =
            |wish: &Wish| matches!(wish, Wish::Gram(_) | Wish::Peaks { .. } | Wish::Ends { .. } | Wish::Judges);
        if !with_samples && wanted.iter().all(|(_, wish)| unfiled(wish)) {
            // Statistics from files hold no matrices: what is rounded by data falls back to nearest and says so.
            wanted.clear();
        }
        if wanted.is_empty() {
            return Ok(patch);
        }
        let measured = collect(model.graph(), &wanted, cx)?;
        let of = |statistic: &Statistic| matches!(statistic, Statistic::Distribution(_));
        let distributed: BTreeSet<ValueId> =
            measured.iter().filter(|(_, statistic)| of(statistic)).map(|(value, _)| *value).collect();
        for (value, statistic) in measured {
            match &statistic {
                Statistic::Distribution(sketch) => note_oddities(model, value, sketch, &mut patch),
                Statistic::Peaks { peaks, .. } if peaks.nonfinite() > 0 && !distributed.contains(&value) => {
                    patch.note(diag::nonfinite(&model.graph().value(value).name, peaks.nonfinite()));
                }
                _ => {}
            }
            patch.count("measured", 1);
            patch.edit(Edit::Record { value, statistic });
        }
        Ok(patch)
    }
}

fn note_oddities(model: &Model, value: ValueId, sketch: &Sketch, patch: &mut Patch) {
    let place = || Place::Value(Arc::clone(&model.graph().value(value).name));
    let nonfinite = sketch.nonfinite();
    if nonfinite > 0 {
        let message = format!("{nonfinite} values were NaN or infinite in calibration and are left out of its range");
        patch.note(Diagnostic::new(diag::NONFINITE_ACTIVATION, Severity::Warning, place(), message));
    }
    if sketch.finite() == 0 {
        let message = "no sample gave it a finite value; what reads it stays in float";
        patch.note(Diagnostic::new(diag::NEVER_SEEN, Severity::Warning, place(), message));
    } else if sketch.finite() < 100 {
        let message = format!("only {} values were seen; its range is their minimum and maximum", sketch.finite());
        patch.note(Diagnostic::new(diag::FEW_SAMPLES, Severity::Note, place(), message));
    }
}

/// What can go wrong while collecting.
pub type CollectError = PassError;

/// A statistic in the making, of which every worker has its own.
#[derive(Clone)]
enum Gauge {
    Distribution(Sketch),
    Means(Means),
    Peaks(usize, Peaks),
    Ends(usize, Ends),
}

impl Gauge {
    /// `None` for what needs a pass of its own.
    fn for_wish(wish: Wish) -> Option<Self> {
        match wish {
            Wish::Distribution => Some(Self::Distribution(Sketch::default())),
            Wish::Means { axis } => Some(Self::Means(Means::along(axis))),
            Wish::Peaks { axis } => Some(Self::Peaks(axis, Peaks::along(axis))),
            Wish::Ends { axis } => Some(Self::Ends(axis, Ends::along(axis))),
            Wish::Gram(_) | Wish::Judges => None,
        }
    }

    fn see(&mut self, values: &[f32], shape: &[usize]) {
        match self {
            Self::Distribution(sketch) => sketch.see(values),
            Self::Means(means) => means.see(values, shape),
            Self::Peaks(_, peaks) => peaks.see(values, shape),
            Self::Ends(_, ends) => ends.see(values, shape),
        }
    }

    fn merge(&mut self, other: &Self) {
        match (self, other) {
            (Self::Distribution(mine), Self::Distribution(theirs)) => mine.merge(theirs),
            (Self::Means(mine), Self::Means(theirs)) => mine.merge(theirs),
            (Self::Peaks(_, mine), Self::Peaks(_, theirs)) => mine.merge(theirs),
            (Self::Ends(_, mine), Self::Ends(_, theirs)) => mine.merge(theirs),
            _ => unreachable!("every worker gauges the same wishes in the same order"),
        }
    }

    fn finish(self) -> Statistic {
        match self {
            Self::Distribution(sketch) => Statistic::Distribution(Arc::new(sketch)),
            Self::Means(means) => Statistic::Means(Arc::new(means)),
            Self::Peaks(axis, peaks) => Statistic::Peaks { axis, peaks: Arc::new(peaks) },
            Self::Ends(axis, ends) => Statistic::Ends { axis, ends: Arc::new(ends) },
        }
    }
}

/// What is wished for of `wanted`, over all samples: one pass over the data, and a second one for Gram matrices, whose
/// columns are measured in units of the peaks that the first one found.
///
/// # Errors
/// [`PassError`] when there are no samples, one of them or the executor fails, or the user interrupts.
pub fn collect(
    graph: &Graph,
    wanted: &[(ValueId, Wish)],
    cx: &PassContext<'_>,
) -> Result<Vec<(ValueId, Statistic)>, CollectError> {
    let dataset = cx.dataset.filter(|d| !d.is_empty()).ok_or(PassError::NoData)?;
    let mut sizes = ops::sizes::of(graph, &dataset.sample(0)?);
    sizes.extend(&cx.sizes);
    let wished: Vec<ValueId> = wanted.iter().map(|(value, _)| *value).collect();
    ops::sizes::by_likeness(graph, &wished, &mut sizes);
    let grams: Vec<(ValueId, Rows)> = wanted
        .iter()
        .filter_map(|(value, wish)| if let Wish::Gram(rows) = wish { Some((*value, *rows)) } else { None })
        .collect();
    let axis = |(value, rows): &(ValueId, Rows)| Some((*value, rows.channel_axis(graph.value(*value).ty.rank()?)));
    let mut gauged: BTreeSet<(ValueId, Wish)> = wanted.iter().copied().collect();
    gauged.extend(grams.iter().filter_map(axis).map(|(value, axis)| (value, Wish::Peaks { axis })));
    let own_pass = |wish: &Wish| matches!(wish, Wish::Gram(_) | Wish::Judges);
    let gauged: Vec<(ValueId, Wish)> = gauged.into_iter().filter(|(_, wish)| !own_pass(wish)).collect();
    let run = Run { graph, dataset, sizes, cx };
    let mut measured = run.gauges(&gauged)?;
    measured.extend(run.judges(wanted)?);
    let mut tables = Vec::new();
    for (value, rows) in grams {
        let Some((_, axis)) = axis(&(value, rows)) else { continue };
        let peaks = measured.iter().find_map(|(v, statistic)| match statistic {
            Statistic::Peaks { axis: a, peaks } if *v == value && *a == axis => Some(peaks.values()),
            _ => None,
        });
        tables.extend(peaks.map(|peaks| (value, rows, peaks.to_vec())));
    }
    measured.extend(run.grams(&tables)?);
    Ok(measured)
}

/// The data, and what runs it.
struct Run<'a> {
    graph: &'a Graph,
    dataset: &'a dyn Dataset,
    sizes: BTreeMap<ValueId, u64>,
    cx: &'a PassContext<'a>,
}

impl Run<'_> {
    /// Runs every sample once and shows `values` to `see`, with the state of the worker and the place among `values`; then
    /// `after` once per sample.
    fn each<S: Send>(
        &self,
        values: &[ValueId],
        start: impl Fn() -> S + Sync,
        see: impl Fn(&mut S, usize, Tensor) + Sync,
        after: impl Fn(&mut S) + Sync,
    ) -> Result<Vec<S>, PassError> {
        let simulation = Simulation::prepare(self.graph, &Plan::default(), self.cx.executor, values)?;
        parallel::workers(self.cx.threads, self.dataset.len(), start, |state, index| {
            if self.cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            let feeds = self.dataset.sample(index)?;
            let mask = Mask::of(self.graph, &feeds);
            simulation.run_with(&feeds, &mut |at, tensor| {
                see(state, at, padding::without(mask.as_ref(), tensor));
            })?;
            after(state);
            self.cx.progress.step();
            Ok(())
        })
    }

    fn gauges(&self, wanted: &[(ValueId, Wish)]) -> Result<Vec<(ValueId, Statistic)>, PassError> {
        let mut values: Vec<ValueId> = wanted.iter().map(|(value, _)| *value).collect();
        values.dedup();
        let budget = self.cx.tap_budget / self.cx.threads.max(1) as u64;
        let groups = tap_groups(&values, &self.sizes, budget);
        self.cx.progress.begin("calibrate", (groups.len() * self.dataset.len()) as u64);
        let mut finished = Vec::with_capacity(wanted.len());
        for group in groups {
            let gauges_of = |value: ValueId| -> Vec<Gauge> {
                wanted.iter().filter(|(v, _)| *v == value).filter_map(|(_, wish)| Gauge::for_wish(*wish)).collect()
            };
            let start = || -> Vec<Vec<Gauge>> { group.iter().map(|value| gauges_of(*value)).collect() };
            let see = |gauges: &mut Vec<Vec<Gauge>>, at: usize, tensor: Tensor| {
                if let Some(values) = tensor.values::<f32>() {
                    gauges[at].iter_mut().for_each(|gauge| gauge.see(&values, tensor.shape()));
                }
            };
            let states = self.each(&group, start, see, |_| ())?;
            let mut states = states.into_iter();
            let mut merged = states.next().unwrap_or_else(start);
            for state in states {
                let pairs = merged.iter_mut().flatten().zip(state.iter().flatten());
                pairs.for_each(|(into, from)| into.merge(from));
            }
            for (value, gauges) in group.iter().zip(merged) {
                finished.extend(gauges.into_iter().map(|gauge| (*value, gauge.finish())));
            }
        }
        self.cx.progress.end();
        Ok(finished)
    }

    /// Distributions on the samples that judge; none where there are too few samples.
    fn judges(&self, wanted: &[(ValueId, Wish)]) -> Result<Vec<(ValueId, Statistic)>, PassError> {
        let judged = wanted.iter().filter(|(_, wish)| *wish == Wish::Judges);
        let judged: Vec<(ValueId, Wish)> = judged.map(|(value, _)| (*value, Wish::Distribution)).collect();
        let origins: Vec<usize> = (0..self.dataset.len()).map(|index| self.dataset.origin(index)).collect();
        let some = Part { of: self.dataset, places: judges::split(&origins).0 };
        let apart = self.cx.held_out.filter(|held_out| !held_out.is_empty());
        let dataset = apart.unwrap_or(&some);
        if judged.is_empty() || dataset.is_empty() {
            return Ok(Vec::new());
        }
        let run = Run { graph: self.graph, dataset, sizes: self.sizes.clone(), cx: self.cx };
        let of = |(value, statistic): (ValueId, Statistic)| match statistic {
            Statistic::Distribution(sketch) => {
                let judges = Judges { sketch: sketch.as_ref().clone(), apart: apart.is_some() };
                Some((value, Statistic::Judges(Arc::new(judges))))
            }
            _ => None,
        };
        Ok(run.gauges(&judged)?.into_iter().filter_map(of).collect())
    }

    /// Gram matrices, a few tensors at a time: as many as the budget holds. Workers add to the same sums, which are exact.
    fn grams(&self, wanted: &[(ValueId, Rows, Vec<f32>)]) -> Result<Vec<(ValueId, Statistic)>, PassError> {
        let mut sizes = BTreeMap::new();
        for (value, rows, peaks) in wanted {
            // Sums are shared by the workers, taps are not.
            let tap = self.sizes.get(value).copied().unwrap_or(0).saturating_mul(self.cx.threads as u64);
            let size = sizes.entry(*value).or_insert(tap);
            *size = size.saturating_add(GramSums::bytes(*rows, peaks.len()).unwrap_or(0));
        }
        let mut values: Vec<ValueId> = wanted.iter().map(|(value, ..)| *value).collect();
        values.dedup();
        let groups = tap_groups(&values, &sizes, self.cx.tap_budget.saturating_mul(GRAM_SHARE));
        self.cx.progress.begin("second moments", (groups.len() * self.dataset.len()) as u64);
        let mut finished = Vec::new();
        for group in groups {
            let of_value = |value: &ValueId| -> Vec<(Rows, Mutex<GramSums>)> {
                let mine = wanted.iter().filter(|(v, ..)| v == value);
                mine.filter_map(|(_, rows, peaks)| {
                    Some((*rows, Mutex::new(GramSums::new(*rows, peaks, self.dataset.len())?)))
                })
                .collect()
            };
            let sums: Vec<Vec<(Rows, Mutex<GramSums>)>> = group.iter().map(of_value).collect();
            let add = |sum: &mut GramSums, tensor: &Tensor| {
                if let Some(values) = tensor.values::<f32>() {
                    sum.see(&values, tensor.shape());
                }
            };
            // A worker that finds a sum busy comes back to it when it has done the others.
            let see = |later: &mut Vec<(usize, usize, Tensor)>, at: usize, tensor: Tensor| {
                for (which, (_, sum)) in sums[at].iter().enumerate() {
                    match sum.try_lock() {
                        Ok(mut sum) => add(&mut sum, &tensor),
                        Err(_) => later.push((at, which, tensor.clone())),
                    }
                }
            };
            let after = |later: &mut Vec<(usize, usize, Tensor)>| {
                for (at, which, tensor) in later.drain(..) {
                    add(&mut sums[at][which].1.lock().unwrap_or_else(PoisonError::into_inner), &tensor);
                }
            };
            self.each(&group, Vec::new, see, after)?;
            for (value, sums) in group.iter().zip(sums) {
                for (rows, sum) in sums {
                    let gram = sum.into_inner().unwrap_or_else(PoisonError::into_inner).finish();
                    finished.extend(gram.map(|gram| (*value, Statistic::Gram { rows, gram: Arc::new(gram) })));
                }
            }
        }
        self.cx.progress.end();
        Ok(finished)
    }
}

/// Some samples of a dataset.
struct Part<'a> {
    of: &'a dyn Dataset,
    places: Vec<usize>,
}

impl Dataset for Part<'_> {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn name(&self, index: usize) -> String {
        self.of.name(self.places[index])
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        self.of.sample(self.places[index])
    }

    fn origin(&self, index: usize) -> usize {
        self.of.origin(self.places[index])
    }
}

/// Gram matrices are worth more memory than taps: every further group runs the whole model once more.
const GRAM_SHARE: u64 = 4;

/// `wanted` cut into groups whose tensors, by `sizes` for one sample, take at most `budget` bytes together (or are alone). A
/// tensor of unknown size counts as much as the largest known one.
pub fn tap_groups(wanted: &[ValueId], sizes: &BTreeMap<ValueId, u64>, budget: u64) -> Vec<Vec<ValueId>> {
    let largest = sizes.values().copied().max().unwrap_or(0);
    let mut groups: Vec<Vec<ValueId>> = Vec::new();
    let mut filled = 0_u64;
    for &value in wanted {
        let bytes = sizes.get(&value).copied().unwrap_or(largest);
        if let Some(group) = groups.last_mut().filter(|_| filled.saturating_add(bytes) <= budget) {
            group.push(value);
        } else {
            groups.push(vec![value]);
            filled = 0;
        }
        filled = filled.saturating_add(bytes);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_stay_within_the_budget_and_lose_nothing() {
        let wanted: Vec<ValueId> = (0..5).map(ValueId).collect();
        let sizes: BTreeMap<ValueId, u64> = wanted.iter().copied().zip([4, 4, 9, 1]).collect();
        // The last one is of unknown size: it counts 9.
        let groups: Vec<usize> = tap_groups(&wanted, &sizes, 10).iter().map(Vec::len).collect();
        assert_eq!(groups, [2, 2, 1]);
        assert_eq!(tap_groups(&wanted, &sizes, 0).len(), 5);
        assert!(tap_groups(&[], &sizes, 10).is_empty());
    }
}
