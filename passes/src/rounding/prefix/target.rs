//! The weight that is nearest to the float output behind what rounding upstream did, and the bias that keeps its mean.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};

use super::Moments;
use crate::observe::Cross;
use crate::rounding::layer::Layer;

/// W* of `layer` in the order of storage, λ being `damping` mean diagonals; `None` where nothing drifted, or the regression has no solution.
#[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
pub(in crate::rounding) fn target(
    layer: &Layer<'_>,
    drift: Option<&Cross>,
    sum: Option<&Cross>,
    damping: f64,
) -> Option<Vec<f32>> {
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
        // What is multiplied apart makes up for nothing here.
        layer.kept().iter().for_each(|&j| (0..per_group).for_each(|r| pull[(j, r)] = 0.0));
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
pub(in crate::rounding) fn centered(cross: &Cross, group: usize, layer: &Layer<'_>) -> Vec<f64> {
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
pub(in crate::rounding) fn shift(
    layer: &Layer<'_>,
    moments: &Moments,
    sum: Option<&Cross>,
    rounded: &[f32],
) -> Option<Vec<f64>> {
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
    use std::sync::Arc;

    use super::*;
    use crate::encoding::Encoding;
    use crate::id::{NodeId, Site};
    use crate::model::{Edit, Model, Patch};
    use crate::observe::Gram;
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
}
