//! Scales of norms, fitted to what all that read a norm compute once those are rounded.
//!
//! Products with weights W, rounded to Q, read x̃ where the float model reads x. Of all channels of the norm multiplied by 1 + u, those lose least
//!
//! ```text
//! Σ E‖W x − Q diag(1 + u) x̃‖²:    (A + λ) u = r,    A = H ∘ Σ QᵀQ,    rⱼ = Σ [Qᵀ (W − Q) H + Qᵀ W D]ⱼⱼ
//! ```
//!
//! with H = E x̃ x̃ᵀ, D = E (x − x̃) x̃ᵀ, λ a hundredth of the mean diagonal of A. Sums read the norm as products with the identity do. Where a
//! bias takes the mean error, H and D are centered, and the bias is corrected anew.
//!
//! Source: Li et al. 2023 (norm tweaking), arXiv:2309.02784; the closed form: wakandaai/asrq, `norm_tweak.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};

use super::layer::Layer;
use super::norms::{self, Norm};
use super::prefix::{self, Inputs, Measured, Moments};
use super::round_in_order::correct;
use crate::encoding::Granularity;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{User, Users};
use crate::lockstep::{Lockstep, Span};
use crate::model::{Edit, Model, Plan};
use crate::observe::{Cross, Gram, Rows};
use crate::ops;
use crate::tensor::Tensor;

/// λ in mean diagonals of A.
const RIDGE: f64 = 0.01;
/// What u may be.
const BOUNDS: (f64, f64) = (-0.75, 3.0);
/// Sweeps of coordinate descent where u meets its bounds.
const SWEEPS: usize = 30;
/// Wider norms stay: equations of so many channels take a gigabyte.
const MOST_CHANNELS: usize = 4096;
/// Of fewer rows nothing is learned.
const LEAST_ROWS: u64 = 256;
/// Rows of a weight that are multiplied at once.
const ROWS: usize = 1024;

/// A norm, and what reads it: layers, and sums.
pub(super) struct Read {
    pub(super) norm: Norm,
    pub(super) value: ValueId,
    /// Rows of scales and shifts.
    sites: Vec<Site>,
    layers: Vec<NodeId>,
    sums: usize,
}

/// The norms that only layers among `layers`, and sums, read.
pub(super) fn find(model: &Model, users: &Users, layers: &[Inputs]) -> Vec<Read> {
    let (graph, plan) = (model.graph(), model.plan());
    let by_node: BTreeMap<NodeId, &Inputs> = layers.iter().map(|layer| (layer.node, layer)).collect();
    let of = |norm: Norm| {
        let (value, sites) = norm.returned(graph, users, plan)?;
        let mut read = Read { norm, value, sites, layers: Vec::new(), sums: 0 };
        for user in users.of_value(value) {
            let User::Input { node, input } = *user else { return None };
            let reads = |layer: &&Inputs| layer.reading.version.0 == value && layer.reading.rows == Rows::Last;
            if by_node.get(&node).is_some_and(reads) {
                read.layers.push(node);
            } else if is_sum(graph, node, input) {
                read.sums += 1;
            } else {
                return None;
            }
        }
        (!read.layers.is_empty()).then_some(read)
    };
    norms::find(graph, plan).into_iter().filter_map(of).collect()
}

/// Whether `node` adds something that is computed to what it reads at `input`, both of one rank.
fn is_sum(graph: &Graph, node: NodeId, input: u16) -> bool {
    let other = |node: &crate::ir::Node| {
        let (own, other) = (node.input(input.into())?, node.input(1 - usize::from(input.min(1)))?);
        let alike = graph.value(own).ty.rank() == graph.value(other).ty.rank();
        (node.op.is("Add") && alike && own != other && graph.constant(other).is_none()).then_some(())
    };
    graph.node(node).and_then(other).is_some()
}

impl Read {
    /// Whether its layers are those of `stage`, and rounding before the norm changed what it returns.
    pub(super) fn is_ready(&self, walk: &Lockstep<'_>, stage: usize) -> bool {
        let last = self.layers.iter().map(|node| walk.stage_of(*node)).max();
        last == Some(stage) && walk.touches(self.value)
    }

    /// Whether what sums make of the norm is read by another of the layers `here`, which were rounded for what it returned before.
    fn reaches_others(&self, graph: &Graph, users: &Users, here: &[Inputs]) -> bool {
        let others: BTreeSet<NodeId> =
            here.iter().map(|inputs| inputs.node).filter(|n| !self.layers.contains(n)).collect();
        let (mut open, mut seen) = (vec![self.value], BTreeSet::new());
        while let Some(value) = open.pop() {
            for user in users.of_value(value) {
                let User::Input { node, .. } = *user else { continue };
                if others.contains(&node) {
                    return true;
                }
                // What lies behind layers is of later stages.
                if !self.layers.contains(&node) && seen.insert(node) {
                    open.extend(graph.node(node).into_iter().flat_map(|node| node.outputs.iter().flatten()));
                }
            }
        }
        false
    }

    /// The stages that run again: from the norm's to that of its layers.
    pub(super) fn span(&self, stage_of: &BTreeMap<NodeId, usize>) -> Span {
        let stage = |node: &NodeId| stage_of.get(node).copied().unwrap_or(0);
        // What is read there of stages before is kept by its readers alone.
        Span {
            first: stage(&self.norm.node),
            last: self.layers.iter().map(stage).max().unwrap_or(0),
            reads: Vec::new(),
        }
    }

    /// The edits that fit the norm, its `layers` being rounded in `work`; `None` where nothing is gained, or they are not rounded by data. `users` tells biases, `of_sums` whether those take what sums lack.
    pub(super) fn fit(
        &self,
        work: &Model,
        users: &Users,
        here: &[Inputs],
        measured: &Measured,
        of_sums: bool,
    ) -> Option<Vec<Edit>> {
        let inputs = || here.iter().filter(|inputs| self.layers.contains(&inputs.node));
        let alone = self.sums == 0 || !self.reaches_others(work.graph(), users, here);
        (inputs().count() == self.layers.len() && alone).then_some(())?;
        let d = measured.of_reading.get(&inputs().next()?.reading)?.gram.columns;
        (d <= MOST_CHANNELS).then_some(())?;
        let mut normals = [Normal::new(d), Normal::new(d), Normal::new(d)];
        for (at, inputs) in inputs().enumerate() {
            let reader = Reader::of(work, users, inputs, measured)?;
            (reader.layer.columns == d).then_some(())?;
            let sums = if at == 0 { self.sums } else { 0 };
            reader.add_to(&mut normals, sums)?;
        }
        let bounds = bounds(work.plan(), inputs(), measured, d)?;
        let u = chosen(&normals, &bounds)?;
        let mut edits = self.scaled(work, &u)?;
        for inputs in inputs() {
            let sum = measured.of_sum.get(&inputs.node).filter(|_| of_sums);
            Reader::of(work, users, inputs, measured)?.correct(work, &u, sum, &mut edits);
        }
        Some(edits)
    }

    /// The edits that multiply scales and shifts by 1 + u.
    #[expect(clippy::cast_possible_truncation, reason = "scales and shifts are f32")]
    fn scaled(&self, work: &Model, u: &[f64]) -> Option<Vec<Edit>> {
        let of = |site: &Site| {
            let Site::Use { node, input } = *site else { return None };
            let graph = work.graph();
            let given = graph.constant_input(graph.node(node)?, input.into())?;
            let tensor = work.plan().substitute(*site).unwrap_or(given);
            let values = tensor.floats().filter(|values| values.len() == u.len())?;
            let values: Vec<f32> = values.iter().zip(u).map(|(v, u)| (f64::from(*v) * (1.0 + u)) as f32).collect();
            let finite = values.iter().all(|v| v.is_finite());
            finite.then(|| Edit::Substitute { site: *site, tensor: Arc::new(Tensor::of(tensor.shape(), values)) })
        };
        self.sites.iter().map(of).collect()
    }
}

/// A layer that reads the norm, rounded.
struct Reader<'a> {
    layer: Layer<'a>,
    moments: &'a Moments,
    /// What its codes stand for, in the order of storage.
    rounded: Vec<f32>,
    bias: Option<Site>,
}

impl<'a> Reader<'a> {
    fn of(work: &'a Model, users: &Users, inputs: &Inputs, measured: &'a Measured) -> Option<Self> {
        let moments = measured.of_reading.get(&inputs.reading)?;
        let bias = ops::bias_site(work.graph(), users, inputs.node);
        let layer = Layer::of(work, inputs.node)?.behind(Arc::clone(&moments.gram), bias.is_some());
        (layer.has_gram() && layer.groups == 1 && moments.gram.count >= LEAST_ROWS).then_some(())?;
        let rounded = layer.encoding.decode(work.plan().codes(layer.site)?).ok()?;
        Some(Self { layer, moments, rounded, bias })
    }

    /// Qᵀ Q and Qᵀ (W − Q), d × d.
    fn products(&self) -> Option<(Mat<f64>, Mat<f64>)> {
        let (layer, weights) = (&self.layer, self.layer.weights()?);
        let d = layer.columns;
        let (mut squares, mut lost) = (Mat::<f64>::zeros(d, d), Mat::<f64>::zeros(d, d));
        for first in (0..layer.rows).step_by(ROWS) {
            let n = ROWS.min(layer.rows - first);
            let at = |i: usize, j: usize| layer.index(first + i, j);
            let q = Mat::from_fn(n, d, |i, j| f64::from(self.rounded[at(i, j)]));
            let error = Mat::from_fn(n, d, |i, j| f64::from(weights[at(i, j)]) - q[(i, j)]);
            squares += q.transpose() * &q;
            lost += q.transpose() * &error;
        }
        Some((squares, lost))
    }

    /// Adds its part to the equations by all samples and by either half, and that of so many `sums`.
    fn add_to(&self, normals: &mut [Normal; 3], sums: usize) -> Option<()> {
        let (squares, lost) = self.products()?;
        let halves = self.moments.halves.as_ref().map(|[a, b]| [a, b]);
        let grams = [Some(&self.moments.gram), halves.map(|h| h[0]), halves.map(|h| h[1])];
        for (normal, gram) in normals.iter_mut().zip(grams) {
            let Some(gram) = gram else { continue };
            let layer = self.layer.measured_by(Arc::clone(gram));
            let (h, keep) = (layer.quadratic(0)?, layer.share_kept());
            let drift = self.moments.drift.as_ref().map(|drift| prefix::centered(drift, 0, &layer));
            normal.add((&h, drift.as_deref(), keep), (&squares, &lost));
            normal.add_sums(sums as f64, gram, self.moments.drift.as_ref());
        }
        Some(())
    }

    /// Adds the correction of its bias for a weight that reads channels 1 + u times as large.
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    fn correct(&self, work: &Model, u: &[f64], sum: Option<&Cross>, edits: &mut Vec<Edit>) {
        let Some(bias) = self.bias else { return };
        let mut scaled = self.rounded.clone();
        for row in 0..self.layer.rows {
            for (column, u) in u.iter().enumerate() {
                let at = self.layer.index(row, column);
                scaled[at] = (f64::from(scaled[at]) * (1.0 + u)) as f32;
            }
        }
        if let Some(shift) = prefix::shift(&self.layer, self.moments, sum, &scaled) {
            correct(work, bias, &shift, edits); // total shift from the graph's own bias: replaces the first correction
        }
    }
}

/// The equations (A + λ) u = r.
struct Normal {
    a: Mat<f64>,
    r: Vec<f64>,
    /// Whether anything was added.
    told: bool,
}

impl Normal {
    fn new(d: usize) -> Self {
        Self { a: Mat::zeros(d, d), r: vec![0.0; d], told: false }
    }

    /// Adds H ∘ Qᵀ Q and diag(Qᵀ (W − Q) H + Qᵀ W D); D counts `keep`.
    fn add(&mut self, (h, drift, keep): (&[f32], Option<&[f64]>, f64), (squares, lost): (&Mat<f64>, &Mat<f64>)) {
        let d = self.r.len();
        for j in 0..d {
            for k in 0..d {
                let of = f64::from(h[k * d + j]);
                self.a[(k, j)] += of * squares[(k, j)];
                // QᵀQ is symmetric, Qᵀ(W − Q) is not: row j of it.
                let moved = drift.map_or(0.0, |drift| keep * drift[k * d + j]);
                self.r[j] += of * lost[(j, k)] + moved * (lost[(j, k)] + squares[(j, k)]);
            }
        }
        self.told = true;
    }

    /// Adds so many `sums`, which read the norm as products with the identity.
    fn add_sums(&mut self, sums: f64, gram: &Gram, drift: Option<&Cross>) {
        let d = self.r.len();
        for j in 0..d {
            self.a[(j, j)] += sums * f64::from(gram.group(0)[j * d + j]);
            self.r[j] += sums * drift.map_or(0.0, |drift| drift.group(0)[j * d + j]);
        }
    }

    /// What u saves: L(0) − L(u) = 2 rᵀu − uᵀA u.
    fn saved(&self, u: &[f64]) -> f64 {
        let d = u.len();
        let of = |j: usize| u[j] * (2.0 * self.r[j] - (0..d).map(|k| self.a[(k, j)] * u[k]).sum::<f64>());
        (0..d).map(of).sum()
    }

    /// u within `bounds`, with λ of so many mean diagonals; `None` where there is no solution.
    fn solved(&self, bounds: &[(f64, f64)], ridge: f64) -> Option<Vec<f64>> {
        let d = self.r.len();
        let mean = (0..d).map(|j| self.a[(j, j)]).sum::<f64>() / d.max(1) as f64;
        (mean.is_finite() && mean > 0.0).then_some(())?;
        let ridge = ridge * mean;
        let damped = Mat::from_fn(d, d, |i, j| self.a[(i, j)] + if i == j { ridge } else { 0.0 });
        let found = damped.llt(Side::Lower).ok()?.solve(&Mat::from_fn(d, 1, |j, _| self.r[j]));
        let mut u: Vec<f64> = (0..d).map(|j| found[(j, 0)]).collect();
        u.iter().all(|u| u.is_finite()).then_some(())?;
        if u.iter().zip(bounds).any(|(u, (low, high))| !(*low..=*high).contains(u)) {
            descend(&damped, &self.r, bounds, &mut u);
        }
        Some(u)
    }
}

/// Brings u within `bounds`, and moves the rest by coordinates: every step is the least of its coordinate.
fn descend(a: &Mat<f64>, r: &[f64], bounds: &[(f64, f64)], u: &mut [f64]) {
    let d = u.len();
    u.iter_mut().zip(bounds).for_each(|(u, (low, high))| *u = u.clamp(*low, *high));
    let mut left: Vec<f64> = (0..d).map(|i| r[i] - (0..d).map(|j| a[(j, i)] * u[j]).sum::<f64>()).collect();
    for _ in 0..SWEEPS {
        for j in 0..d {
            let by = (u[j] + left[j] / a[(j, j)]).clamp(bounds[j].0, bounds[j].1) - u[j];
            if by != 0.0 {
                u[j] += by;
                (0..d).for_each(|i| left[i] -= by * a[(i, j)]);
            }
        }
    }
}

/// u by all samples, where what either half of them tells saves loss on the other half, or where halves tell nothing, on all of them.
fn chosen(normals: &[Normal; 3], bounds: &[(f64, f64)]) -> Option<Vec<f64>> {
    let [all, first, second] = normals;
    let u = all.solved(bounds, RIDGE)?;
    let saves = if first.told && second.told {
        let (by_first, by_second) = (first.solved(bounds, RIDGE)?, second.solved(bounds, RIDGE)?);
        second.saved(&by_first) + first.saved(&by_second) > 0.0
    } else {
        true
    };
    (saves && all.saved(&u) > 0.0).then_some(u)
}

/// What u may be, channel by channel: no channel grows beyond a range of codes that is fixed.
fn bounds<'a>(
    plan: &Plan,
    inputs: impl Iterator<Item = &'a Inputs>,
    measured: &Measured,
    d: usize,
) -> Option<Vec<(f64, f64)>> {
    let mut bounds = vec![BOUNDS; d];
    for inputs in inputs {
        let Some(encoding) = inputs.reading.version.1.and_then(|site| plan.encoding(site)) else { continue };
        let reach = match encoding.granularity {
            Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => continue,
            Granularity::Tensor => {
                let (low, high) = encoding.grid.range();
                let (scale, zero) = (f64::from(encoding.scale[0]), f64::from(encoding.zero_point[0]));
                (high - zero).min(zero - low).max(0.0) * scale
            }
            _ => return None,
        };
        let peaks = measured.peaks.get(&inputs.reading)?;
        for (bound, peak) in bounds.iter_mut().zip(peaks) {
            let most = reach / f64::from(*peak).max(f64::MIN_POSITIVE) - 1.0;
            bound.1 = bound.1.min(most.max(0.0));
        }
    }
    Some(bounds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    const D: usize = 5;
    const N: usize = 7;
    const SEEN: usize = 80;

    fn drawn(seed: u64, rows: usize, columns: usize) -> Mat<f64> {
        Mat::from_fn(rows, columns, |i, j| 2.0 * uniform(mixed(seed) ^ (i * 64 + j) as u64) - 1.0)
    }

    /// What a product with W, rounded to Q, reads in float and as planned, one row per sample.
    struct Case {
        w: Mat<f64>,
        q: Mat<f64>,
        float: Mat<f64>,
        planned: Mat<f64>,
    }

    impl Case {
        fn drawn(seed: u64) -> Self {
            let (w, float) = (drawn(seed, N, D), drawn(seed ^ 1, SEEN, D));
            let noise = drawn(seed ^ 2, SEEN, D);
            let planned = Mat::from_fn(SEEN, D, |i, j| 0.8 * float[(i, j)] + 0.2 * noise[(i, j)]);
            let error = drawn(seed ^ 3, N, D);
            let q = Mat::from_fn(N, D, |i, j| w[(i, j)] + 0.2 * error[(i, j)]);
            Self { w, q, float, planned }
        }

        /// The equations, with so many sums that read the norm as well.
        fn normal(&self, sums: usize) -> Normal {
            let mean = |a: &Mat<f64>, b: &Mat<f64>, i: usize, j: usize| {
                (0..SEEN).map(|row| a[(row, i)] * b[(row, j)]).sum::<f64>() / SEEN as f64
            };
            let lost = Mat::from_fn(N, D, |i, j| self.w[(i, j)] - self.q[(i, j)]);
            let (squares, lost) = (self.q.transpose() * &self.q, self.q.transpose() * &lost);
            let x = &self.planned;
            let moved = Mat::from_fn(SEEN, D, |i, j| self.float[(i, j)] - x[(i, j)]);
            #[expect(clippy::cast_possible_truncation, reason = "moments are f32")]
            let h: Vec<f32> = (0..D * D).map(|at| mean(x, x, at / D, at % D) as f32).collect();
            let drift: Vec<f64> = (0..D * D).map(|at| mean(&moved, x, at / D, at % D)).collect();
            let mut normal = Normal::new(D);
            normal.add((&h, Some(&drift), 1.0), (&squares, &lost));
            for j in 0..D {
                normal.a[(j, j)] += sums as f64 * f64::from(h[j * D + j]);
                normal.r[j] += sums as f64 * drift[j * D + j];
            }
            normal
        }

        /// E‖W x − Q diag(1 + u) x̃‖², and of every sum E‖x − (1 + u) x̃‖².
        fn loss(&self, u: &[f64], sums: usize) -> f64 {
            let of_row = |row: usize| {
                let product = |i: usize| {
                    let of = |j: usize| {
                        self.w[(i, j)] * self.float[(row, j)] - self.q[(i, j)] * (1.0 + u[j]) * self.planned[(row, j)]
                    };
                    (0..D).map(of).sum::<f64>().powi(2)
                };
                let own = |j: usize| (self.float[(row, j)] - (1.0 + u[j]) * self.planned[(row, j)]).powi(2);
                (0..N).map(product).sum::<f64>() + sums as f64 * (0..D).map(own).sum::<f64>()
            };
            (0..SEEN).map(of_row).sum::<f64>() / SEEN as f64
        }
    }

    #[test]
    fn what_is_saved_is_what_products_and_sums_lose_less() {
        for seed in 0..50 {
            for sums in [0, 2] {
                let case = Case::drawn(seed);
                let normal = case.normal(sums);
                let u: Vec<f64> = (0..D).map(|j| uniform(mixed(seed ^ 9) ^ j as u64) - 0.5).collect();
                let fell = case.loss(&[0.0; D], sums) - case.loss(&u, sums);
                assert!((normal.saved(&u) - fell).abs() < 1e-5, "{seed}, {sums}: {} {fell}", normal.saved(&u));
                let best = normal.solved(&[BOUNDS; D], 0.0).unwrap();
                assert!(normal.saved(&best) >= normal.saved(&u) - 1e-9, "{seed}: nothing saves more");
            }
        }
    }

    #[test]
    fn a_scale_that_was_lost_comes_back_and_what_lacks_nothing_stays() {
        let Case { w, float, .. } = Case::drawn(4);
        let lost = [0.5, 1.0, 2.0, 0.8, 1.25];
        let planned = Mat::from_fn(SEEN, D, |i, j| float[(i, j)] / lost[j]);
        let case = Case { q: w.clone(), w, float, planned };
        let u = case.normal(0).solved(&[BOUNDS; D], 0.0).unwrap();
        assert!(u.iter().zip(lost).all(|(u, lost)| (1.0 + u - lost).abs() < 1e-5), "{u:?}");
        let same = Case { planned: case.float.clone(), ..case };
        assert_eq!(same.normal(1).solved(&[BOUNDS; D], RIDGE).unwrap(), [0.0; D]);
    }

    /// Within bounds that bind, no coordinate alone saves more, and nothing is lost against leaving all as it is.
    #[test]
    fn bounds_hold_and_the_rest_is_solved_around_them() {
        for seed in 0..50 {
            let (case, bounds) = (Case::drawn(seed), [(-0.05, 0.1); D]);
            let normal = case.normal(0);
            let u = normal.solved(&bounds, 0.0).unwrap();
            assert!(u.iter().zip(bounds).all(|(u, (low, high))| (low..=high).contains(u)), "{u:?}");
            assert!(normal.saved(&u) >= 0.0);
            for j in 0..D {
                for by in [-0.01, 0.01] {
                    let mut other = u.clone();
                    other[j] = (other[j] + by).clamp(bounds[j].0, bounds[j].1);
                    assert!(normal.saved(&other) <= normal.saved(&u) + 1e-9, "{seed}: channel {j}");
                }
            }
        }
    }

    /// What half of the samples tells has to save on the other half.
    #[test]
    fn what_holds_for_one_half_alone_is_not_taken() {
        let (a, b) = (Case::drawn(1), Case::drawn(2));
        let both = || {
            let mut all = a.normal(0);
            let other = b.normal(0);
            all.a += &other.a;
            all.r.iter_mut().zip(&other.r).for_each(|(r, more)| *r += more);
            all
        };
        let against = |case: &Case| {
            let mut normal = case.normal(0);
            normal.r.iter_mut().for_each(|r| *r = -*r);
            normal
        };
        assert!(chosen(&[both(), a.normal(0), a.normal(0)], &[BOUNDS; D]).is_some());
        assert!(chosen(&[both(), a.normal(0), against(&a)], &[BOUNDS; D]).is_none());
        assert!(chosen(&[both(), Normal::new(D), Normal::new(D)], &[BOUNDS; D]).is_some(), "no halves, no judge");
    }
}
