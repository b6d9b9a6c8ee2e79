//! Runs the data once, for all wishes.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::{Dataset, Executor, Progress};
use crate::id::ValueId;
use crate::ir::{Dim, Graph, TensorType, Type};
use crate::model::{Edit, Model, Patch, Plan, Statistic};
use crate::observe::{Means, Sketch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simulate::Simulation;
use crate::tensor::Tensor;
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
        let dataset = cx.dataset.filter(|d| !d.is_empty()).ok_or(PassError::NoData)?;
        let measured = collect(model.graph(), &wanted, cx.executor, dataset, cx.threads, cx.tap_budget, cx.progress)?;
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
/// [`PassError`] when a sample or the executor fails, or the user interrupts.
pub fn collect(
    graph: &Graph,
    wanted: &[(ValueId, Wish)],
    executor: &dyn Executor,
    dataset: &dyn Dataset,
    threads: usize,
    tap_budget: usize,
    progress: &dyn Progress,
) -> Result<Vec<Statistic>, CollectError> {
    let mut values: Vec<ValueId> = wanted.iter().map(|(value, _)| *value).collect();
    values.dedup();
    let groups = tap_groups(graph, &values, &dataset.sample(0)?, tap_budget / threads.max(1));
    progress.begin("calibrate", (groups.len() * dataset.len()) as u64);
    let mut finished = Vec::with_capacity(wanted.len());
    for group in groups {
        let simulation = Simulation::prepare(graph, &Plan::default(), executor, &group)?;
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

/// `wanted` cut into groups whose tensors, for one sample like `sample`, take at most `budget` bytes together (or are
/// alone). A tensor whose size does not follow from the sample counts as an even share of nothing: its group is the
/// current one.
pub fn tap_groups(graph: &Graph, wanted: &[ValueId], sample: &[Tensor], budget: usize) -> Vec<Vec<ValueId>> {
    let sizes = concrete_bytes(graph, sample);
    let mut groups: Vec<Vec<ValueId>> = vec![Vec::new()];
    let mut filled = 0_usize;
    let unique: BTreeSet<ValueId> = wanted.iter().copied().collect();
    debug_assert_eq!(unique.len(), wanted.len(), "a tensor is wished for once");
    for &value in wanted {
        let bytes = sizes[value.index()].unwrap_or(0);
        let last = groups.len() - 1;
        if filled.saturating_add(bytes) > budget && !groups[last].is_empty() {
            groups.push(Vec::new());
            filled = 0;
        }
        filled = filled.saturating_add(bytes);
        let last = groups.len() - 1;
        groups[last].push(value);
    }
    groups
}

/// The bytes of every value when the graph runs on `sample`, where they follow from the shape rules.
fn concrete_bytes(graph: &Graph, sample: &[Tensor]) -> Vec<Option<usize>> {
    let mut types: Vec<Option<TensorType>> = graph
        .value_ids()
        .map(|id| match &graph.value(id).ty {
            Type::Tensor(ty) => Some(TensorType::new(ty.dtype, ty.known_shape().and(ty.shape.clone()))),
            Type::Opaque(_) => None,
        })
        .collect();
    for (&input, tensor) in graph.inputs().iter().zip(sample) {
        types[input.index()] = Some(TensorType::of(tensor));
    }
    for (_, node) in graph.nodes() {
        let inputs = node.inputs.iter().map(|v| v.and_then(|v| types[v.index()].clone())).collect();
        for (output, inferred) in node.outputs.iter().zip(ops::infer(graph, node, inputs)) {
            if let Some(slot) = output.and_then(|output| types[output.index()].as_mut()) {
                *slot = slot.refined(&inferred);
            }
        }
    }
    let bytes = |ty: &TensorType| {
        let elements = ty.shape.as_ref()?.iter().try_fold(1_usize, |n, dim| match dim {
            Dim::Known(d) => n.checked_mul(*d),
            _ => None,
        })?;
        ty.dtype?.bytes_for(elements)
    };
    types.iter().map(|ty| ty.as_ref().and_then(bytes)).collect()
}
