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
use crate::reconstruct::Stakes;
use crate::simulate::{Crossing, Version};
use crate::tensor::Tensor;

/// A tensor that layers read, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reading {
    /// As the model reads it.
    pub(super) version: Version,
    /// How its rows are cut.
    pub(super) rows: Rows,
    /// The layer whose stakes the rows weigh; `None` where all weigh the same.
    pub(super) weighed_for: Option<NodeId>,
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
    /// Those of either half of the samples, where both have some.
    pub(super) halves: Option<[Arc<Gram>; 2]>,
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

/// Of the rows that layers read, per layer and sample, the roots of what they weigh, the largest of a layer 1; padding and all.
#[derive(Default)]
pub(super) struct Roots(BTreeMap<NodeId, Vec<Vec<f32>>>);

/// No row counts more than so many average ones.
const MOST: f64 = 32.0;

impl Roots {
    /// Rows that weigh what they have at stake in a `share` of their weight, and the same in the rest of it; those of samples that are
    /// `spared` have no say in what the others weigh.
    #[expect(clippy::cast_possible_truncation, reason = "from 0 to 1")]
    pub(super) fn of_stakes(stakes: Stakes, share: f64, spared: impl Fn(usize) -> bool) -> Self {
        let roots = |(node, samples): (NodeId, Vec<Vec<f32>>)| {
            let fitted = || samples.iter().enumerate().filter(|(at, _)| !spared(*at)).flat_map(|(_, rows)| rows);
            let mean = fitted().map(|w| f64::from(*w)).sum::<f64>() / fitted().count().max(1) as f64;
            let weight = |stake: f32| 1.0 - share + share * (f64::from(stake) / mean).min(MOST);
            let top = fitted().map(|stake| weight(*stake)).fold(0.0, f64::max);
            let root = |stake: &f32| (weight(*stake) / top).sqrt() as f32;
            (node, samples.iter().map(|rows| rows.iter().map(root).collect()).collect())
        };
        Self(stakes.into_iter().map(roots).collect())
    }

    /// Whether the rows of layer `node` weigh differently.
    pub(super) fn weigh(&self, node: NodeId) -> bool {
        self.0.contains_key(&node)
    }

    /// The roots for what `reading` reads of the sample in `pair`: a tensor of `shape`, without its padding where it had any.
    fn of(&self, reading: &Reading, pair: &Pair, shape: &[usize]) -> Option<Vec<f32>> {
        let roots = self.0.get(&reading.weighed_for?)?.get(pair.index)?;
        let whole = roots.len() == reading.rows.whole_count(shape);
        Some(if whole { roots.clone() } else { pair.unpadded_rows(roots) })
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

/// Whether moments are told of either half of the samples as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halves {
    Together,
    Apart,
}

/// Measures what `layers`, all of one stage, read.
pub(super) fn measure(
    walk: &Lockstep<'_>,
    graph: &crate::ir::Graph,
    plan: &Plan,
    layers: &[Inputs],
    samples: usize,
    (roots, halves): (&Roots, Halves),
) -> Result<Measured, PassError> {
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
    let mut measured = Measured::default();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::id::Site;
    use crate::model::{Edit, Model, Patch};
    use crate::seed::{mixed, uniform};

    /// Columns and rows of the weight.
    const D: usize = 4;
    const N: usize = 3;
    /// Rows of data.
    const SEEN: usize = 60;
    const DAMPING: f64 = 0.05;

    const PRODUCT: &str = "graph (%x: f32[60,4]) -> (%y: f32[60,3]) {
        %w = const f32[4,3] rand(seed=5, std=0.5)
        %y = MatMul(%x, %w)
    }";

    /// A product with an encoded weight, and its node.
    fn product() -> (Model, NodeId) {
        let mut model = crate::text::parse(PRODUCT).unwrap();
        let node = model.graph().nodes().next().unwrap().0;
        let encoding = Encoding::per_axis(crate::grid::find("int4").unwrap(), 1, vec![0.1; N]);
        let mut patch = Patch::on(&model);
        patch.edit(Edit::Encode { site: Site::Use { node, input: 1 }, encoding });
        model.apply(patch).unwrap();
        (model, node)
    }

    fn mean(of: impl Fn(usize) -> f64) -> f64 {
        (0..SEEN).map(of).sum::<f64>() / SEEN as f64
    }

    /// What the layer reads in float and as planned, and the error beside it.
    struct Data {
        float: Vec<[f64; D]>,
        planned: Vec<[f64; D]>,
        beside: Vec<[f64; N]>,
    }

    impl Data {
        /// Means are not 0, and errors are in part proportional to what is read.
        fn drawn(seed: u64) -> Self {
            let draw = |row: usize, at: usize| 2.0 * uniform(mixed(seed) ^ (row * 16 + at) as u64) - 1.0;
            let read = |r: usize, j: usize| 0.5 + draw(r, j) + 0.7 * draw(r, 15);
            let float: Vec<[f64; D]> = (0..SEEN).map(|r| std::array::from_fn(|j| read(r, j))).collect();
            let moved = |r: usize, j: usize| 0.1 + 0.9 * float[r][j] + 0.2 * draw(r, D + j);
            let planned: Vec<[f64; D]> = (0..SEEN).map(|r| std::array::from_fn(|j| moved(r, j))).collect();
            let error = |r: usize, k: usize| 0.1 + 0.3 * planned[r][k] + 0.2 * draw(r, 2 * D + k);
            let beside: Vec<[f64; N]> = (0..SEEN).map(|r| std::array::from_fn(|k| error(r, k))).collect();
            Self { float, planned, beside }
        }

        /// Second moments of what is read as planned, from so many rows that nothing is shrunk.
        #[expect(clippy::cast_possible_truncation, reason = "moments are f32")]
        fn gram(&self) -> Arc<Gram> {
            let x = &self.planned;
            let moments = (0..D * D).map(|at| mean(|r| x[r][at / D] * x[r][at % D]) as f32).collect();
            let means = (0..D).map(|j| mean(|r| x[r][j]) as f32).collect();
            Arc::new(Gram { columns: D, moments, means, count: SEEN as u64, effective: 1e12 })
        }

        fn drift(&self) -> Cross {
            let pairs = self.float.iter().zip(&self.planned);
            let drift: Vec<[f64; D]> = pairs.map(|(x, planned)| std::array::from_fn(|j| x[j] - planned[j])).collect();
            self.cross(&drift)
        }

        /// Mixed moments of `left` and what is read as planned.
        fn cross<const L: usize>(&self, left: &[[f64; L]]) -> Cross {
            let moments = (0..L * D).map(|at| mean(|r| left[r][at / D] * self.planned[r][at % D])).collect();
            let means = (0..L).map(|i| mean(|r| left[r][i])).collect();
            Cross { left: L, right: D, moments, means }
        }

        /// W x + e − V x̃ at output `k` of row `r`, for weights W and V.
        fn error(&self, layer: &Layer<'_>, (w, v): (&[f32], &[f32]), r: usize, k: usize) -> f64 {
            let of = |weight: &[f32], x: &[f64; D]| -> f64 {
                (0..D).map(|j| f64::from(weight[layer.index(k, j)]) * x[j]).sum()
            };
            of(w, &self.float[r]) + self.beside[r][k] - of(v, &self.planned[r])
        }

        /// E‖W x + e − V x̃‖² + λ ‖V − W‖², of centered numbers where a bias takes the mean error.
        fn objective(&self, layer: &Layer<'_>, (w, v): (&[f32], &[f32]), centered: bool) -> f64 {
            let spread = |of: &dyn Fn(usize) -> f64| {
                let center = if centered { mean(of) } else { 0.0 };
                mean(|r| (of(r) - center).powi(2))
            };
            let power = (0..D).map(|j| spread(&|r| self.planned[r][j])).sum::<f64>() / D as f64;
            let far: f64 = w.iter().zip(v).map(|(w, v)| (f64::from(*v) - f64::from(*w)).powi(2)).sum();
            let errors = (0..N).map(|k| spread(&|r| self.error(layer, (w, v), r, k))).sum::<f64>();
            errors + DAMPING * power * far
        }
    }

    #[test]
    fn a_layer_behind_nothing_that_drifted_keeps_its_own_weight() {
        let (model, node) = product();
        let layer = Layer::of(&model, node).unwrap().behind(Data::drawn(1).gram(), false);
        assert!(target(&layer, None, None, DAMPING).is_none());
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn nothing_near_the_target_comes_nearer_to_the_float_output() {
        let (model, node) = product();
        for seed in 0..6 {
            // What drifts: the input, the other operand, or both; and whether a bias takes the mean error.
            for (input, other, centered) in
                [(true, false, false), (false, true, false), (true, false, true), (true, true, true)]
            {
                let mut data = Data::drawn(seed);
                if !input {
                    data.float.clone_from(&data.planned);
                }
                if !other {
                    data.beside.fill([0.0; N]);
                }
                let layer = Layer::of(&model, node).unwrap().behind(data.gram(), centered);
                let (drift, sum) = (input.then(|| data.drift()), other.then(|| data.cross(&data.beside)));
                let found = target(&layer, drift.as_ref(), sum.as_ref(), DAMPING).unwrap();
                let weights = layer.weights().unwrap().into_owned();
                let lowest = data.objective(&layer, (&weights, &found), centered);
                let own = data.objective(&layer, (&weights, &weights), centered);
                assert!(lowest <= own + 1e-9, "{input} {other} {centered}: {lowest} {own}");
                for moved in 0..20_u64 {
                    let by = |at: usize| 0.1 * (uniform(mixed(moved) ^ at as u64) - 0.5);
                    let near: Vec<f32> = found.iter().enumerate().map(|(at, w)| w + by(at) as f32).collect();
                    let there = data.objective(&layer, (&weights, &near), centered);
                    assert!(lowest <= there + 1e-9, "{input} {other} {centered}: {lowest} {there}");
                }
            }
        }
    }

    #[test]
    fn a_shift_is_the_mean_error_of_the_output() {
        let (model, node) = product();
        let mut data = Data::drawn(3);
        let layer = Layer::of(&model, node).unwrap().behind(data.gram(), true);
        let weights = layer.weights().unwrap().into_owned();
        let rounded: Vec<f32> = weights.iter().map(|w| (w * 5.0).round() / 5.0).collect();
        let moments = Moments { gram: data.gram(), halves: None, drift: Some(data.drift()) };
        let sum = data.cross(&data.beside);
        let with = shift(&layer, &moments, Some(&sum), &rounded).unwrap();
        for (k, shift) in with.iter().enumerate() {
            let want = mean(|r| data.error(&layer, (&weights, &rounded), r, k));
            assert!((shift - want).abs() < 1e-5, "{k}: {shift} {want}");
        }
        data.beside.fill([0.0; N]);
        let without = shift(&layer, &moments, None, &rounded).unwrap();
        for (k, shift) in without.iter().enumerate() {
            let want = mean(|r| data.error(&layer, (&weights, &rounded), r, k));
            assert!((shift - want).abs() < 1e-5, "{k}: {shift} {want}");
        }
    }

    #[test]
    fn rows_with_as_much_at_stake_weigh_the_same() {
        let node = NodeId(0);
        let varied = vec![vec![0.5, 3.0, 0.0], vec![100.0]];
        for (samples, share) in [(vec![vec![0.7; 5], vec![0.7; 2]], 0.9), (varied, 0.0)] {
            let roots = Roots::of_stakes(BTreeMap::from([(node, samples)]), share, |_| false);
            assert!(roots.weigh(node) && !roots.weigh(NodeId(1)));
            assert!(roots.0[&node].iter().flatten().all(|root| (root - 1.0).abs() < 1e-6));
        }
    }

    #[test]
    fn spared_samples_have_no_say_in_what_others_weigh() {
        let node = NodeId(0);
        let fitted = vec![vec![0.5, 3.0, 0.0], vec![1.0]];
        let all = vec![fitted[0].clone(), vec![100.0], fitted[1].clone()];
        let alone = Roots::of_stakes(BTreeMap::from([(node, fitted)]), 0.8, |_| false);
        let beside = Roots::of_stakes(BTreeMap::from([(node, all)]), 0.8, |at| at == 1);
        assert_eq!([&beside.0[&node][0], &beside.0[&node][2]], [&alone.0[&node][0], &alone.0[&node][1]]);
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn roots_lie_between_0_and_1_in_the_order_of_stakes() {
        let node = NodeId(0);
        for seed in 0..50 {
            // Over eight orders of magnitude.
            let draw = |at: u64| 10.0_f64.powf(8.0 * uniform(mixed(seed) ^ at) - 4.0) as f32;
            let samples: Vec<Vec<f32>> = (0..5).map(|s| (0..7).map(|r| draw(7 * s + r)).collect()).collect();
            let stakes: Vec<f32> = samples.iter().flatten().copied().collect();
            let roots = Roots::of_stakes(BTreeMap::from([(node, samples)]), uniform(seed), |_| false);
            let mut pairs: Vec<(f32, f32)> = stakes.into_iter().zip(roots.0[&node].iter().flatten().copied()).collect();
            pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(pairs.iter().all(|(_, root)| (0.0..=1.0).contains(root)), "{pairs:?}");
            assert!(pairs.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{pairs:?}");
            assert!((pairs[34].1 - 1.0).abs() < 1e-6, "{pairs:?}");
        }
    }
}
