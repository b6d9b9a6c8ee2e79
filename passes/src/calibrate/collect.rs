//! Runs the data once, for all wishes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::ValueId;
use crate::ir::Graph;
use crate::model::{Edit, Model, Patch, Plan, Statistic};
use crate::observe::{Means, Sketch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simulate::Simulation;
use crate::{ops, parallel};

crate::declare_pass! {
    /// Measures the distribution of every tensor that later passes wish for, in one pass over the data.
    ///
    /// Per tensor a histogram over sign, exponent and six mantissa bits, with exact ends: fixed memory whatever the
    /// number of samples, and counts that do not depend on order, batching or threads. Where the tensors tapped at once
    /// would not fit the tap budget, they are tapped in groups, one pass over the data each.
    INFO {
        name: "calibrate",
        source: "analysis after DDSketch, arXiv:1908.10693; bucketing by bit pattern ours",
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
        let open = |(value, wish): &(ValueId, Wish)| match wish {
            Wish::Distribution => model.stats().distribution(*value).is_none(),
            Wish::Means { .. } => model.stats().means(*value).is_none(),
        };
        let wanted: Vec<(ValueId, Wish)> = cx.wishes.iter().copied().filter(open).collect();
        if wanted.is_empty() {
            return Ok(patch);
        }
        let measured = collect(model.graph(), &wanted, cx)?;
        for ((value, _), statistic) in wanted.into_iter().zip(measured) {
            if let Statistic::Distribution(sketch) = &statistic {
                note_oddities(model, value, sketch, &mut patch);
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

/// A statistic in the making.
#[derive(Clone)]
enum Gauge {
    Distribution(Sketch),
    Means(Means),
}

impl Gauge {
    fn for_wish(wish: Wish) -> Self {
        match wish {
            Wish::Distribution => Self::Distribution(Sketch::default()),
            Wish::Means { axis } => Self::Means(Means::along(axis)),
        }
    }

    fn see(&mut self, values: &[f32], shape: &[usize]) {
        match self {
            Self::Distribution(sketch) => sketch.see(values),
            Self::Means(means) => means.see(values, shape),
        }
    }

    fn merge(&mut self, other: &Self) {
        match (self, other) {
            (Self::Distribution(mine), Self::Distribution(theirs)) => mine.merge(theirs),
            (Self::Means(mine), Self::Means(theirs)) => mine.merge(theirs),
            _ => unreachable!("every worker gauges the same wishes in the same order"),
        }
    }

    fn finish(self) -> Statistic {
        match self {
            Self::Distribution(sketch) => Statistic::Distribution(Arc::new(sketch)),
            Self::Means(means) => Statistic::Means(Arc::new(means)),
        }
    }
}

/// What is wished for of `wanted`, in their order, over all samples.
///
/// # Errors
/// [`PassError`] when there are no samples, one of them or the executor fails, or the user interrupts.
pub fn collect(
    graph: &Graph,
    wanted: &[(ValueId, Wish)],
    cx: &PassContext<'_>,
) -> Result<Vec<Statistic>, CollectError> {
    let dataset = cx.dataset.filter(|d| !d.is_empty()).ok_or(PassError::NoData)?;
    let (threads, progress) = (cx.threads, cx.progress);
    let mut values: Vec<ValueId> = wanted.iter().map(|(value, _)| *value).collect();
    values.dedup();
    let mut sizes = cx.sizes.clone();
    if sizes.is_empty() {
        sizes = ops::sizes::of(graph, &dataset.sample(0)?);
    }
    let groups = tap_groups(&values, &sizes, cx.tap_budget / threads.max(1) as u64);
    progress.begin("calibrate", (groups.len() * dataset.len()) as u64);
    let mut finished = Vec::with_capacity(wanted.len());
    for group in groups {
        let simulation = Simulation::prepare(graph, &Plan::default(), cx.executor, &group)?;
        let gauges_of = |value: ValueId| -> Vec<Gauge> {
            wanted.iter().filter(|(v, _)| *v == value).map(|(_, wish)| Gauge::for_wish(*wish)).collect()
        };
        let start = || -> Vec<Vec<Gauge>> { group.iter().map(|value| gauges_of(*value)).collect() };
        let states = parallel::workers(threads, dataset.len(), start, |gauges, index| {
            if progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            simulation.run_with(&dataset.sample(index)?, &mut |at, tensor| {
                if let Some(values) = tensor.values::<f32>() {
                    gauges[at].iter_mut().for_each(|gauge| gauge.see(&values, tensor.shape()));
                }
            })?;
            progress.step();
            Ok(())
        })?;
        let mut states = states.into_iter();
        let mut merged = states.next().unwrap_or_else(start);
        for state in states {
            let pairs = merged.iter_mut().flatten().zip(state.iter().flatten());
            pairs.for_each(|(into, from)| into.merge(from));
        }
        finished.extend(merged.into_iter().flatten().map(Gauge::finish));
    }
    progress.end();
    Ok(finished)
}

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
