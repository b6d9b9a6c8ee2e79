//! Sums over all samples of what layers read, and of what differs from the float model.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Inputs, Measured, Moments, Reading, Roots};
use crate::id::NodeId;
use crate::lockstep::{Lockstep, Pair};
use crate::model::Plan;
use crate::observe::{CrossSums, GramSums, Peaks};
use crate::pass::PassError;
use crate::simulate::{Crossing, Version};
use crate::tensor::Tensor;

/// A layer, the other operand of the sum after it, and what the layer reads.
type Beside = (NodeId, Version, Reading);

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

/// Whether moments are told of either half of the samples as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rounding) enum Halves {
    Together,
    Apart,
}

/// Measures what `layers`, all of one stage, read.
pub(in crate::rounding) fn measure(
    walk: &Lockstep<'_>,
    graph: &crate::ir::Graph,
    plan: &Plan,
    layers: &[Inputs],
    samples: usize,
    (roots, halves): (&Roots, Halves),
) -> Result<Measured, PassError> {
    if layers.is_empty() {
        return Ok(Measured::default());
    }
    let crossing = Crossing::of(graph, plan);
    let readings: BTreeSet<Reading> = layers.iter().map(|layer| layer.reading).collect();
    let beside: Vec<Beside> =
        layers.iter().filter_map(|layer| Some((layer.node, layer.beside?, layer.reading))).collect();
    let ends = walk.each_fitted(usize::MAX, Ends::default, |ends, pair| {
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
    let odd = ends.planned.iter().filter(|(_, peaks)| peaks.nonfinite() > 0);
    let nonfinite = odd.map(|(reading, peaks)| (reading.version.0, peaks.nonfinite())).collect();
    let peaks = ends.planned.iter().map(|(reading, peaks)| (*reading, peaks.values().to_vec())).collect();
    let mut measured = Measured { nonfinite, peaks, ..Measured::default() };
    for batch in batches(&readings.into_iter().collect::<Vec<_>>(), &beside, &ends, (walk.sums_budget(), halves)) {
        let mine: Vec<Beside> =
            beside.iter().filter(|(_, _, reading)| batch.readings.contains(reading)).copied().collect();
        let start = || Sums::new(&batch.readings, &mine, &ends, (samples, halves));
        // Every worker has sums of its own, as far as memory allows.
        let workers = usize::try_from(walk.sums_budget() / batch.bytes.max(1)).unwrap_or(usize::MAX);
        let sums = walk.each_fitted(workers, start, |sums, pair| sums.see(pair, &crossing, roots))?;
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
fn batches(readings: &[Reading], beside: &[Beside], ends: &Ends, (budget, halves): (u64, Halves)) -> Vec<Batch> {
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
        // As much again for what drifted; for halves as much once more, and half of it for either's moments.
        let times = if halves == Halves::Apart { 4 } else { 2 };
        let bytes = sums.fold(second.saturating_mul(times), u64::saturating_add);
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
    /// With one sum for all samples, or one for either half.
    readings: Vec<(Reading, Vec<GramSums>, Option<CrossSums>)>,
    beside: Vec<(NodeId, Version, Reading, CrossSums)>,
}

fn drifts(peaks: &Peaks) -> bool {
    peaks.values().iter().any(|&peak| peak > 0.0)
}

impl Sums {
    fn new(readings: &[Reading], beside: &[Beside], ends: &Ends, (samples, halves): (usize, Halves)) -> Self {
        let of_reading = |reading: &Reading| {
            let peaks = ends.planned.get(reading)?.values();
            let drift = ends.drift.get(reading).filter(|drift| drifts(drift));
            let right = (reading.rows, peaks);
            let drift = drift.and_then(|drift| CrossSums::new((reading.rows, drift.values()), right, samples));
            let parts = if halves == Halves::Apart { 2 } else { 1 };
            let sums = (0..parts).map(|_| GramSums::new(reading.rows, peaks, samples)).collect::<Option<_>>()?;
            Some((*reading, sums, drift))
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

    fn see(&mut self, pair: &mut Pair, crossing: &Crossing, roots: &Roots) -> Result<(), PassError> {
        for (reading, halves, drift) in &mut self.readings {
            let Some((float, planned)) = both(pair, reading, crossing)? else { continue };
            let values = planned.values::<f32>().unwrap_or_default();
            let roots = roots.of(reading, pair, planned.shape());
            let roots = roots.as_deref();
            let parts = halves.len();
            halves[pair.half % parts].see_weighed(&values, planned.shape(), roots);
            if let (Some(cross), Some(drift)) = (drift, difference(&float, &planned)) {
                cross.see_weighed((&drift, planned.shape()), (&values, planned.shape()), roots);
            }
        }
        for (_, version, reading, cross) in &mut self.beside {
            let other = pair.planned(*version, crossing)?;
            let input = pair.planned(reading.version, crossing)?;
            let error = pair.float(version.0).and_then(|float| difference(&float, &other));
            if let (Some(error), Some(values)) = (error, input.values::<f32>()) {
                let roots = roots.of(reading, pair, input.shape());
                cross.see_weighed((&error, other.shape()), (&values, input.shape()), roots.as_deref());
            }
        }
        Ok(())
    }

    fn merge(mut self, other: &Self) -> Self {
        for ((_, halves, drift), (_, halves_too, drift_too)) in self.readings.iter_mut().zip(&other.readings) {
            halves.iter_mut().zip(halves_too).for_each(|(half, too)| half.merge(too));
            if let (Some(drift), Some(too)) = (drift, drift_too) {
                drift.merge(too);
            }
        }
        for ((.., cross), (.., too)) in self.beside.iter_mut().zip(&other.beside) {
            cross.merge(too);
        }
        self
    }

    fn finish(mut self) -> Measured {
        let of_reading = self.readings.iter_mut().filter_map(|(reading, parts, drift)| {
            let (whole, rest) = parts.split_first_mut()?;
            let half = rest.first().and_then(GramSums::finish);
            let halves = half.and_then(|half| Some([Arc::new(whole.finish()?), Arc::new(half)]));
            rest.iter().for_each(|half| whole.merge(half));
            let gram = Arc::new(whole.finish()?);
            Some((*reading, Moments { gram, halves, drift: drift.as_ref().and_then(CrossSums::finish) }))
        });
        let of_sum = self.beside.iter().filter_map(|(node, .., cross)| Some((*node, cross.finish()?)));
        Measured { of_reading: of_reading.collect(), of_sum: of_sum.collect(), ..Measured::default() }
    }
}
