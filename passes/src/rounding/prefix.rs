//! What rounding upstream did to the input of a layer, and what the layer can do about it.
//!
//! A layer that reads x̃ where the float model reads x should not imitate its own weight W but make up for the difference:
//! the weight nearest to the float output is
//!
//! ```text
//! W* = argmin E‖W x + e − W* x̃‖² = W + (W E[(x − x̃) x̃ᵀ] + E[e x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹
//! ```
//!
//! and what is left is the quadratic form of x̃ around W*, which every rounding method works on unchanged. e is the error that
//! the other operand of a sum after the layer already carries, for layers that write into a residual stream.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};

use super::layer::Layer;
use crate::id::NodeId;
use crate::lockstep::{Lockstep, Pair};
use crate::model::Plan;
use crate::observe::{Cross, CrossSums, Gram, GramSums, Peaks, Rows};
use crate::pass::PassError;
use crate::simulate::{Crossing, Version};
use crate::tensor::Tensor;

/// A tensor that layers read, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reading {
    /// As the model reads it.
    pub(super) version: Version,
    /// How its rows are cut.
    pub(super) rows: Rows,
}

/// What a layer reads, and the other operand of the sum that alone reads its result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs {
    pub(super) node: NodeId,
    pub(super) reading: Reading,
    pub(super) beside: Option<Version>,
}

/// A layer, the other operand of the sum after it, and what the layer reads.
type Beside = (NodeId, Version, Reading);

/// Moments of one reading: of x̃, and of x − x̃ with x̃.
pub(super) struct Moments {
    pub(super) gram: Arc<Gram>,
    pub(super) drift: Option<Cross>,
}

/// What is measured for the layers of one stage.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) of_reading: BTreeMap<Reading, Moments>,
    /// E\[e x̃ᵀ\] and E\[e\] for layers beside which something drifted.
    pub(super) of_sum: BTreeMap<NodeId, Cross>,
}

impl Measured {
    fn extend(&mut self, other: Self) {
        self.of_reading.extend(other.of_reading);
        self.of_sum.extend(other.of_sum);
    }
}

/// Peaks of everything that is measured, per worker.
#[derive(Default)]
struct Ends {
    planned: BTreeMap<Reading, Peaks>,
    drift: BTreeMap<Reading, Peaks>,
    beside: BTreeMap<NodeId, Peaks>,
}

/// One pair of tensors of a reading: what the float model reads, and what the planned one does.
fn both(pair: &mut Pair, reading: &Reading, crossing: &Crossing) -> Result<Option<(Tensor, Tensor)>, PassError> {
    let planned = pair.planned(reading.version, crossing)?;
    Ok(pair.float(reading.version.0).map(|float| (float, planned)))
}

/// a − b, where both are f32 of one shape.
fn difference(a: &Tensor, b: &Tensor) -> Option<Vec<f32>> {
    let (x, y) = (a.values::<f32>()?, b.values::<f32>()?);
    (a.shape() == b.shape()).then(|| x.iter().zip(y.iter()).map(|(x, y)| x - y).collect())
}

/// Measures what `layers`, all of one stage, read.
pub(super) fn measure(
    walk: &Lockstep<'_>,
    graph: &crate::ir::Graph,
    plan: &Plan,
    layers: &[Inputs],
    samples: usize,
) -> Result<Measured, PassError> {
    let crossing = Crossing::of(graph, plan);
    let readings: BTreeSet<Reading> = layers.iter().map(|layer| layer.reading).collect();
    let beside: Vec<Beside> =
        layers.iter().filter_map(|layer| Some((layer.node, layer.beside?, layer.reading))).collect();
    let ends = walk.each(Ends::default, |ends, pair| {
        for reading in &readings {
            let Some((float, planned)) = both(pair, reading, &crossing)? else { continue };
            let axis = reading.rows.channel_axis(planned.shape().len());
            let peaks = |of: &mut BTreeMap<Reading, Peaks>, values: &[f32]| {
                of.entry(*reading).or_insert_with(|| Peaks::along(axis)).see(values, planned.shape());
            };
            peaks(&mut ends.planned, &planned.values::<f32>().unwrap_or_default());
            if let Some(drift) = difference(&float, &planned) {
                peaks(&mut ends.drift, &drift);
            }
        }
        for (node, version, reading) in &beside {
            let other = pair.planned(*version, &crossing)?;
            let Some(error) = pair.float(version.0).and_then(|float| difference(&float, &other)) else { continue };
            let axis = reading.rows.channel_axis(other.shape().len());
            ends.beside.entry(*node).or_insert_with(|| Peaks::along(axis)).see(&error, other.shape());
        }
        Ok(())
    })?;
    let ends = ends.into_iter().fold(Ends::default(), |mut all, one| {
        merge(&mut all.planned, one.planned);
        merge(&mut all.drift, one.drift);
        merge(&mut all.beside, one.beside);
        all
    });
    let mut measured = Measured::default();
    for batch in batches(&readings.into_iter().collect::<Vec<_>>(), &beside, &ends, walk.sums_budget()) {
        let mine: Vec<Beside> =
            beside.iter().filter(|(_, _, reading)| batch.readings.contains(reading)).copied().collect();
        let start = || Sums::new(&batch.readings, &mine, &ends, samples);
        // Every worker has sums of its own, as far as memory allows.
        let workers = usize::try_from(walk.sums_budget() / batch.bytes.max(1)).unwrap_or(usize::MAX);
        let sums = walk.each_on(workers, start, |sums, pair| sums.see(pair, &crossing))?;
        measured.extend(sums.into_iter().reduce(|all, one| all.merge(&one)).unwrap_or_else(start).finish());
    }
    Ok(measured)
}

/// Readings that are summed in one run over the samples.
#[derive(Default)]
struct Batch {
    readings: Vec<Reading>,
    bytes: u64,
}

/// `readings` in batches whose sums, with those beside them, take at most `budget` bytes, or are alone.
fn batches(readings: &[Reading], beside: &[Beside], ends: &Ends, budget: u64) -> Vec<Batch> {
    let channels = |peaks: Option<&Peaks>| peaks.map_or(0, |peaks| peaks.values().len());
    let mut batches: Vec<Batch> = Vec::new();
    for reading in readings {
        let d = channels(ends.planned.get(reading));
        let second = GramSums::bytes(reading.rows, d).unwrap_or(0);
        let of_sum = |(node, ..): &Beside| {
            let left = reading.rows.of_outputs(d)?;
            CrossSums::bytes((left, channels(ends.beside.get(node))), (reading.rows, d))
        };
        let sums = beside.iter().filter(|(_, _, mine)| mine == reading).filter_map(of_sum);
        // As much again for what drifted.
        let bytes = sums.fold(second.saturating_mul(2), u64::saturating_add);
        match batches.last_mut().filter(|batch| batch.bytes.saturating_add(bytes) <= budget) {
            Some(batch) => {
                batch.readings.push(*reading);
                batch.bytes += bytes;
            }
            None => batches.push(Batch { readings: vec![*reading], bytes }),
        }
    }
    batches
}

fn merge<K: Ord>(all: &mut BTreeMap<K, Peaks>, one: BTreeMap<K, Peaks>) {
    for (key, peaks) in one {
        match all.entry(key) {
            Entry::Occupied(mut entry) => entry.get_mut().merge(&peaks),
            Entry::Vacant(entry) => drop(entry.insert(peaks)),
        }
    }
}

/// The sums for one stage, of which every worker has its own.
struct Sums {
    readings: Vec<(Reading, GramSums, Option<CrossSums>)>,
    beside: Vec<(NodeId, Version, Reading, CrossSums)>,
}

fn drifts(peaks: &Peaks) -> bool {
    peaks.values().iter().any(|&peak| peak > 0.0)
}

impl Sums {
    fn new(readings: &[Reading], beside: &[Beside], ends: &Ends, samples: usize) -> Self {
        let of_reading = |reading: &Reading| {
            let peaks = ends.planned.get(reading)?.values();
            let drift = ends.drift.get(reading).filter(|drift| drifts(drift));
            let right = (reading.rows, peaks);
            let drift = drift.and_then(|drift| CrossSums::new((reading.rows, drift.values()), right, samples));
            Some((*reading, GramSums::new(reading.rows, peaks, samples)?, drift))
        };
        let of_beside = |(node, version, reading): &Beside| {
            let left = ends.beside.get(node).filter(|peaks| drifts(peaks))?.values();
            let right = ends.planned.get(reading)?.values();
            let outputs = reading.rows.of_outputs(right.len())?;
            Some((*node, *version, *reading, CrossSums::new((outputs, left), (reading.rows, right), samples)?))
        };
        Self {
            readings: readings.iter().filter_map(of_reading).collect(),
            beside: beside.iter().filter_map(of_beside).collect(),
        }
    }

    fn see(&mut self, pair: &mut Pair, crossing: &Crossing) -> Result<(), PassError> {
        for (reading, second, drift) in &mut self.readings {
            let Some((float, planned)) = both(pair, reading, crossing)? else { continue };
            let values = planned.values::<f32>().unwrap_or_default();
            second.see(&values, planned.shape());
            if let (Some(cross), Some(drift)) = (drift, difference(&float, &planned)) {
                cross.see((&drift, planned.shape()), (&values, planned.shape()));
            }
        }
        for (_, version, reading, cross) in &mut self.beside {
            let other = pair.planned(*version, crossing)?;
            let input = pair.planned(reading.version, crossing)?;
            let error = pair.float(version.0).and_then(|float| difference(&float, &other));
            if let (Some(error), Some(values)) = (error, input.values::<f32>()) {
                cross.see((&error, other.shape()), (&values, input.shape()));
            }
        }
        Ok(())
    }

    fn merge(mut self, other: &Self) -> Self {
        for ((_, second, drift), (_, second_too, drift_too)) in self.readings.iter_mut().zip(&other.readings) {
            second.merge(second_too);
            if let (Some(drift), Some(too)) = (drift, drift_too) {
                drift.merge(too);
            }
        }
        for ((.., cross), (.., too)) in self.beside.iter_mut().zip(&other.beside) {
            cross.merge(too);
        }
        self
    }

    fn finish(&self) -> Measured {
        let of_reading = self.readings.iter().filter_map(|(reading, second, drift)| {
            let moments =
                Moments { gram: Arc::new(second.finish()?), drift: drift.as_ref().and_then(CrossSums::finish) };
            Some((*reading, moments))
        });
        let of_sum = self.beside.iter().filter_map(|(node, .., cross)| Some((*node, cross.finish()?)));
        Measured { of_reading: of_reading.collect(), of_sum: of_sum.collect() }
    }
}

/// W* of `layer` in the order of storage, λ being `damping` mean diagonals; `None` where nothing drifted, or the regression has no solution.
#[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
pub(super) fn target(layer: &Layer<'_>, drift: Option<&Cross>, sum: Option<&Cross>, damping: f64) -> Option<Vec<f32>> {
    if drift.is_none() && sum.is_none() {
        return None;
    }
    let weights = layer.weights()?;
    let mut target = weights.to_vec();
    let (d, per_group) = (layer.columns, layer.rows / layer.groups);
    for group in 0..layer.groups {
        let h = layer.quadratic(group)?;
        let mean = (0..d).map(|j| f64::from(h[j * d + j])).sum::<f64>() / d as f64;
        if mean <= 0.0 {
            continue;
        }
        let damped = |i: usize, j: usize| f64::from(h[i * d + j]) + if i == j { damping * mean } else { 0.0 };
        let factor = Mat::from_fn(d, d, damped).llt(Side::Lower).ok()?;
        let rows = group * per_group..(group + 1) * per_group;
        let keep = layer.share_kept();
        let mut pull = Mat::<f64>::zeros(d, per_group);
        if let Some(drift) = drift {
            let moved = centered(drift, group, layer);
            let w = Mat::from_fn(d, per_group, |j, r| f64::from(weights[layer.index(rows.start + r, j)]));
            let moved = Mat::from_fn(d, d, |i, j| keep * moved[i * d + j]);
            pull += moved.transpose() * &w;
        }
        if let Some(sum) = sum.filter(|sum| layer.groups == 1 && sum.left == layer.rows && sum.right == d) {
            let moved = centered(sum, group, layer);
            pull += Mat::from_fn(d, per_group, |j, r| keep * moved[r * d + j]);
        }
        let step = factor.solve(&pull);
        for (r, row) in rows.enumerate() {
            for j in 0..d {
                let at = layer.index(row, j);
                target[at] = (f64::from(weights[at]) + step[(j, r)]) as f32;
            }
        }
    }
    target.iter().all(|w| w.is_finite()).then_some(target)
}

/// E\[a x̃ᵀ\], less the product of the means where a bias takes those.
fn centered(cross: &Cross, group: usize, layer: &Layer<'_>) -> Vec<f64> {
    let mut moments = cross.group(group).to_vec();
    if let Some(means) = layer.means(group) {
        for (row, a) in moments.chunks_exact_mut(cross.right).zip(cross.group_means(group)) {
            row.iter_mut().zip(means).for_each(|(m, x)| *m -= a * f64::from(*x));
        }
    }
    moments
}

/// What has to be added to the bias of `layer`, per output channel, so that its mean output (and that of the sum after it) is the
/// float model's, when the weight becomes `rounded`.
pub(super) fn shift(layer: &Layer<'_>, moments: &Moments, sum: Option<&Cross>, rounded: &[f32]) -> Option<Vec<f64>> {
    let weights = layer.weights()?;
    let per_group = layer.rows / layer.groups;
    let of_row = |row: usize| -> f64 {
        let group = row / per_group;
        let means = moments.gram.group_means(group);
        let drift = moments.drift.as_ref().map(|drift| drift.group_means(group));
        let at = |j: usize| {
            let index = layer.index(row, j);
            let (w, q, x) = (f64::from(weights[index]), f64::from(rounded[index]), f64::from(means[j]));
            (w - q) * x + drift.map_or(0.0, |drift| w * drift[j])
        };
        let beside =
            sum.filter(|sum| layer.groups == 1 && sum.left == layer.rows).map_or(0.0, |sum| sum.group_means(0)[row]);
        (0..layer.columns).map(at).sum::<f64>() + beside
    };
    Some((0..layer.rows).map(of_row).collect())
}
