//! A few rows of a weight, side by side, while they are rounded.
//!
//! Rows are independent and share the matrix H. A tile keeps [`LANES`] of them interleaved, so that every step works on all
//! lanes at once with what one row of H says. All sums run in a fixed order: results do not depend on threads or on the
//! instruction set.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use crate::grid::Grid;
use crate::simd::vectorized;

/// Rows in a tile.
pub(super) const LANES: usize = 16;

/// One number per lane.
pub(super) type Lanes = [f32; LANES];

/// Rows of a weight with their points and scales. Lanes beyond the last row hold zeros.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    /// So many lanes are rows.
    pub(super) live: usize,
    /// The float weight, column after column.
    pub(super) weights: Vec<Lanes>,
    /// Points of the grid, less zero points.
    pub(super) points: Vec<Lanes>,
    /// Scales, block after block.
    pub(super) scales: Vec<Lanes>,
    /// Zero points, block after block.
    pub(super) zeros: Vec<Lanes>,
    /// Columns that share a scale.
    pub(super) block: usize,
}

/// Columns of a matrix that are worked on together.
pub(super) const WIDE: usize = 4;

/// A matrix cut into panels of [`WIDE`] columns, each stored row by row; columns beyond the last are zero.
#[derive(Debug)]
pub(super) struct Panels {
    rows: usize,
    values: Vec<f32>,
}

impl Panels {
    /// The matrix with `entry(row, column)`.
    pub(super) fn new(rows: usize, columns: usize, entry: impl Fn(usize, usize) -> f32) -> Self {
        let mut values = Vec::with_capacity(columns.div_ceil(WIDE) * rows * WIDE);
        for start in (0..columns).step_by(WIDE) {
            for row in 0..rows {
                values.extend(
                    (start..start + WIDE).map(|column| if column < columns { entry(row, column) } else { 0.0 }),
                );
            }
        }
        Self { rows, values }
    }

    /// One entry.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> f32 {
        self.values[(column / WIDE * self.rows + row) * WIDE + column % WIDE]
    }

    /// Σ lanes\[k\] · entry(first + k, column) for the columns of the panel that begins at `start`.
    #[inline(always)]
    pub(super) fn dots(&self, lanes: &[Lanes], first: usize, start: usize) -> [Lanes; WIDE] {
        let at = (start / WIDE * self.rows + first) * WIDE;
        let rows = &self.values[at..at + lanes.len() * WIDE];
        let mut sums = [[0.0_f32; LANES]; WIDE];
        for (lane, row) in lanes.iter().zip(rows.chunks_exact(WIDE)) {
            for (sum, &factor) in sums.iter_mut().zip(row) {
                for (s, x) in sum.iter_mut().zip(lane) {
                    *s = x.mul_add(factor, *s);
                }
            }
        }
        sums
    }
}

/// What the squared error of a row is measured with.
#[derive(Debug)]
pub(super) struct Quadratic {
    /// H, symmetric.
    pub(super) h: Panels,
    /// Its extent.
    pub(super) columns: usize,
}

impl Quadratic {
    /// The form with the row-major symmetric matrix `h`.
    pub(super) fn new(h: &[f32], columns: usize) -> Self {
        Self { h: Panels::new(columns, columns, |row, column| h[row * columns + column]), columns }
    }
}

impl Tile {
    /// The points nearest to `values` in the scales of block `block`.
    #[inline(always)]
    pub(super) fn snapped(&self, grid: &dyn Grid, block: usize, values: &Lanes) -> Lanes {
        let scales = &self.scales[block];
        let mut x = [0.0; LANES];
        for lane in 0..LANES {
            x[lane] = values[lane] / scales[lane];
        }
        self.points_of(grid, block, x)
    }

    /// The points nearest to `x`, in units of the scales of block `block`.
    #[inline(always)]
    pub(super) fn points_of(&self, grid: &dyn Grid, block: usize, mut x: Lanes) -> Lanes {
        let zeros = &self.zeros[block];
        if zeros.iter().all(|z| z.to_bits() == zeros[0].to_bits()) {
            grid.snap(&mut x, zeros[0]);
        } else {
            for (x, zero) in x.iter_mut().zip(zeros) {
                grid.snap(std::slice::from_mut(x), *zero);
            }
        }
        x
    }

    /// Every weight to its nearest point.
    pub(super) fn nearest(&mut self, grid: &dyn Grid) {
        for column in 0..self.weights.len() {
            self.points[column] = self.snapped(grid, column / self.block, &self.weights[column]);
        }
    }

    /// Ŵ − W.
    pub(super) fn errors(&self) -> Vec<Lanes> {
        let error = |column: usize| {
            let (w, p, s) = (&self.weights[column], &self.points[column], &self.scales[column / self.block]);
            std::array::from_fn(|lane| p[lane] * s[lane] - w[lane])
        };
        (0..self.weights.len()).map(error).collect()
    }

    /// (Ŵ − W) H (Ŵ − W)ᵀ per lane.
    #[inline(always)]
    pub(super) fn losses(&self, q: &Quadratic) -> [f64; LANES] {
        let errors = self.errors();
        let mut losses = [0.0_f64; LANES];
        for (start, errors_here) in errors.chunks(WIDE).enumerate() {
            let gradients = q.h.dots(&errors, 0, start * WIDE);
            for (error, gradient) in errors_here.iter().zip(&gradients) {
                for lane in 0..LANES {
                    losses[lane] += f64::from(error[lane]) * f64::from(gradient[lane]);
                }
            }
        }
        losses
    }

    /// Per lane, takes over what `other` has where its loss is smaller; says how many lanes it took.
    pub(super) fn keep_better(&mut self, other: &Self, q: &Quadratic) {
        let (mine, theirs) = vectorized(
            #[inline(always)]
            || (self.losses(q), other.losses(q)),
        );
        for lane in (0..LANES).filter(|&lane| theirs[lane] < mine[lane]) {
            self.points.iter_mut().zip(&other.points).for_each(|(a, b)| a[lane] = b[lane]);
            self.scales.iter_mut().zip(&other.scales).for_each(|(a, b)| a[lane] = b[lane]);
        }
    }

    /// One sweep of exact coordinate descent: every point in turn to where the loss is smallest, all others held. Says
    /// whether any moved.
    #[inline(always)]
    pub(super) fn descend(&mut self, grid: &dyn Grid, q: &Quadratic, errors: &mut [Lanes]) -> bool {
        let mut moved = false;
        for start in (0..self.weights.len()).step_by(WIDE) {
            let mut gradients = q.h.dots(errors, 0, start);
            for column in start..(start + WIDE).min(self.weights.len()) {
                let curvature = q.h.at(column, column);
                if curvature <= 0.0 {
                    continue;
                }
                let gradient = gradients[column - start];
                let block = column / self.block;
                let (w, old) = (self.weights[column], errors[column]);
                let target: Lanes = std::array::from_fn(|l| w[l] + old[l] - gradient[l] / curvature);
                let points = self.snapped(grid, block, &target);
                if points.map(f32::to_bits) == self.points[column].map(f32::to_bits) {
                    continue;
                }
                moved = true;
                self.points[column] = points;
                let s = &self.scales[block];
                errors[column] = std::array::from_fn(|l| points[l] * s[l] - w[l]);
                let step: Lanes = std::array::from_fn(|l| errors[column][l] - old[l]);
                for later in column + 1..start + WIDE {
                    let factor = if later < q.columns { q.h.at(column, later) } else { 0.0 };
                    gradients[later - start].iter_mut().zip(&step).for_each(|(g, s)| *g += s * factor);
                }
            }
        }
        moved
    }

    /// The scale of every block in turn to where the loss is smallest, points and other scales held.
    #[inline(always)]
    pub(super) fn refit_scales(&mut self, q: &Quadratic, errors: &mut [Lanes]) {
        for block in 0..self.scales.len() {
            let columns = block * self.block..((block + 1) * self.block).min(self.weights.len());
            let (slope, curvature) = self.along_scale(q, errors, columns.clone());
            let scales = &mut self.scales[block];
            for l in 0..LANES {
                #[expect(clippy::cast_possible_truncation, reason = "scales are stored as f32")]
                let next = (f64::from(scales[l]) - slope[l] / curvature[l]) as f32;
                // A scale keeps its sign and its order of magnitude: everything else is noise in a flat direction.
                let ratio = next / scales[l];
                if curvature[l] > 0.0 && ratio.is_finite() && (0.25..=4.0).contains(&ratio) && next.is_normal() {
                    scales[l] = next;
                }
            }
            for column in columns {
                let (w, p, s) = (&self.weights[column], &self.points[column], &self.scales[block]);
                errors[column] = std::array::from_fn(|l| p[l] * s[l] - w[l]);
            }
        }
    }

    /// Half the first and second derivative of the loss by the scale that `columns` share.
    #[inline(always)]
    fn along_scale(
        &self,
        q: &Quadratic,
        errors: &[Lanes],
        columns: std::ops::Range<usize>,
    ) -> ([f64; LANES], [f64; LANES]) {
        let (mut slope, mut curvature) = ([0.0_f64; LANES], [0.0_f64; LANES]);
        let first_panel = columns.start / WIDE * WIDE;
        for start in (first_panel..columns.end).step_by(WIDE) {
            let gradients = q.h.dots(errors, 0, start);
            let bends = q.h.dots(&self.points[columns.clone()], columns.start, start);
            for column in start.max(columns.start)..(start + WIDE).min(columns.end) {
                let (points, at) = (&self.points[column], column - start);
                for l in 0..LANES {
                    slope[l] += f64::from(points[l]) * f64::from(gradients[at][l]);
                    curvature[l] += f64::from(points[l]) * f64::from(bends[at][l]);
                }
            }
        }
        (slope, curvature)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    pub(in super::super) fn grid(name: &str) -> &'static dyn Grid {
        crate::grid::find(name).unwrap()
    }

    fn noise(state: &mut u64) -> f32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    /// E[x xᵀ] of `n` correlated rows.
    pub(in super::super) fn random_quadratic(d: usize, n: usize) -> Vec<f32> {
        let mut state = 7;
        let mut h = vec![0.0; d * d];
        for _ in 0..n {
            let common = noise(&mut state);
            let x: Vec<f32> = (0..d).map(|j| common * (1.0 + (j % 5) as f32) + noise(&mut state)).collect();
            for i in 0..d {
                for j in 0..d {
                    h[i * d + j] += x[i] * x[j] / n as f32;
                }
            }
        }
        h
    }

    pub(in super::super) fn random_tile(d: usize, block: usize, seed: u64) -> Tile {
        let mut state = seed;
        let weights: Vec<Lanes> = (0..d).map(|_| std::array::from_fn(|_| noise(&mut state))).collect();
        let blocks = d.div_ceil(block);
        Tile {
            live: LANES,
            weights,
            points: vec![[0.0; LANES]; d],
            scales: vec![[0.14; LANES]; blocks],
            zeros: vec![[0.0; LANES]; blocks],
            block,
        }
    }

    #[test]
    fn descent_and_refit_never_lose_and_settle() {
        let d = 40;
        let h = random_quadratic(d, 60);
        let q = Quadratic::new(&h, d);
        let mut tile = random_tile(d, 8, 11);
        tile.nearest(grid("int4"));
        let mut last = tile.losses(&q);
        let mut settled = false;
        for _ in 0..30 {
            let mut errors = tile.errors();
            settled = !tile.descend(grid("int4"), &q, &mut errors);
            let next = tile.losses(&q);
            assert!(next.iter().zip(&last).all(|(a, b)| *a <= b + 1e-6 * b.abs()), "{next:?} {last:?}");
            last = next;
            if settled {
                break;
            }
        }
        assert!(settled);
        let mut errors = tile.errors();
        tile.refit_scales(&q, &mut errors);
        let next = tile.losses(&q);
        assert!(next.iter().zip(&last).all(|(a, b)| *a <= b + 1e-6 * b.abs()));
        assert!(next.iter().sum::<f64>() < last.iter().sum::<f64>());
    }

    #[test]
    fn a_fixed_point_has_no_better_neighbor() {
        let d = 6;
        let h = random_quadratic(d, 20);
        let q = Quadratic::new(&h, d);
        let mut tile = random_tile(d, 6, 5);
        tile.nearest(grid("int4"));
        let mut errors = tile.errors();
        while tile.descend(grid("int4"), &q, &mut errors) {}
        let best = tile.losses(&q)[0];
        for column in 0..d {
            for step in [-1.0, 1.0] {
                let mut other = tile.clone();
                other.points[column][0] = (other.points[column][0] + step).clamp(-8.0, 7.0);
                assert!(other.losses(&q)[0] >= best - 1e-5);
            }
        }
    }

    /// Numbers drawn one after the other from a seed.
    struct Draws {
        seed: u64,
        count: u64,
    }

    impl Draws {
        fn new(seed: u64) -> Self {
            Self { seed: mixed(seed), count: 0 }
        }

        fn below(&mut self, n: usize) -> usize {
            self.count += 1;
            usize::try_from(mixed(self.seed ^ self.count) % n as u64).unwrap()
        }

        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        fn between(&mut self, low: f64, high: f64) -> f32 {
            self.count += 1;
            (low + (high - low) * uniform(self.seed ^ self.count)) as f32
        }

        fn scale(&mut self) -> f32 {
            let size = self.between(0.05, 0.3);
            if self.below(4) == 0 { -size } else { size }
        }

        /// `n` correlated rows of `d` numbers.
        fn rows(&mut self, d: usize, n: usize) -> Vec<Vec<f32>> {
            let row = |_: usize| {
                let common = self.between(-1.0, 1.0);
                (0..d).map(|_| common + self.between(-1.0, 1.0)).collect::<Vec<f32>>()
            };
            (0..n).map(row).collect()
        }
    }

    /// E[x xᵀ] of `rows`.
    fn moments(rows: &[Vec<f32>]) -> Vec<f32> {
        let d = rows[0].len();
        let entry = |at: usize| rows.iter().map(|x| x[at / d] * x[at % d]).sum::<f32>() / rows.len() as f32;
        (0..d * d).map(entry).collect()
    }

    /// A tile, a form and a grid of any kind: blocks that do not fill the row, few rows measured or many, at times a
    /// column that nothing is multiplied with, at times a lane of zeros.
    pub(in super::super) fn random_case(seed: u64) -> (Tile, Quadratic, &'static dyn Grid) {
        let mut draws = Draws::new(seed);
        let d = 1 + draws.below(24);
        let (block, n) = (1 + draws.below(d), 1 + draws.below(3 * d));
        let grid = grid(["int2", "int4", "uint4", "float4e2m1", "nf4"][draws.below(5)]);
        let mut rows = draws.rows(d, n);
        if draws.below(3) == 0 {
            let dead = draws.below(d);
            rows.iter_mut().for_each(|row| row[dead] = 0.0);
        }
        let blocks = d.div_ceil(block);
        let (low, high) = grid.range();
        let scales: Vec<Lanes> = (0..blocks).map(|_| std::array::from_fn(|_| draws.scale())).collect();
        let mut zero = || if low < 0.0 { 0.0 } else { draws.below(16) as f32 };
        let zeros: Vec<Lanes> = (0..blocks).map(|_| std::array::from_fn(|_| zero())).collect();
        // Some lie beyond what the grid reaches.
        let beyond = 0.1 * (high - low);
        let mut weight = |j: usize, l: usize| {
            let unit = draws.between(low - beyond, high + beyond);
            (unit - zeros[j / block][l]) * scales[j / block][l]
        };
        let mut weights: Vec<Lanes> = (0..d).map(|j| std::array::from_fn(|l| weight(j, l))).collect();
        if draws.below(3) == 0 {
            let lane = draws.below(LANES);
            weights.iter_mut().for_each(|column| column[lane] = 0.0);
        }
        let q = Quadratic::new(&moments(&rows), d);
        (Tile { live: LANES, weights, points: vec![[0.0; LANES]; d], scales, zeros, block }, q, grid)
    }

    /// What a lane loses, in f64, and what it would lose if no two terms had opposite signs: f32 is off by a share of
    /// that.
    #[derive(Debug)]
    pub(in super::super) struct Exact {
        pub(in super::super) loss: f64,
        pub(in super::super) size: f64,
    }

    impl Exact {
        pub(in super::super) fn is_at_most(&self, other: &Self) -> bool {
            self.loss <= other.loss + 1e-5 * (self.size + other.size) + 1e-8
        }
    }

    /// The loss of every lane.
    pub(in super::super) fn exact_losses(tile: &Tile, q: &Quadratic) -> Vec<Exact> {
        let d = q.columns;
        let error = |j: usize, lane: usize| {
            let scale = f64::from(tile.scales[j / tile.block][lane]);
            f64::from(tile.points[j][lane]) * scale - f64::from(tile.weights[j][lane])
        };
        let of_lane = |lane: usize| {
            let mut exact = Exact { loss: 0.0, size: 0.0 };
            for at in 0..d * d {
                let term = error(at / d, lane) * f64::from(q.h.at(at / d, at % d)) * error(at % d, lane);
                exact.loss += term;
                exact.size += term.abs();
            }
            exact
        };
        (0..LANES).map(of_lane).collect()
    }

    fn all_at_most(these: &[Exact], those: &[Exact]) -> bool {
        these.iter().zip(those).all(|(this, that)| this.is_at_most(that))
    }

    #[test]
    fn no_step_raises_the_loss_of_any_lane_whatever_the_case() {
        for seed in 0..200 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            let mut last = exact_losses(&tile, &q);
            let mut settled = false;
            for _ in 0..60 {
                let mut errors = tile.errors();
                let moved = tile.descend(grid, &q, &mut errors);
                let next = exact_losses(&tile, &q);
                assert!(all_at_most(&next, &last), "case {seed}: {next:?} {last:?}");
                // f32 may break a tie either way, every time.
                settled = !moved || all_at_most(&last, &next);
                last = next;
                if settled {
                    break;
                }
            }
            assert!(settled, "case {seed}");
            let scales = tile.scales.clone();
            let mut errors = tile.errors();
            tile.refit_scales(&q, &mut errors);
            let next = exact_losses(&tile, &q);
            assert!(all_at_most(&next, &last), "case {seed}, scales: {next:?} {last:?}");
            let mut pairs = scales.iter().flatten().zip(tile.scales.iter().flatten());
            assert!(pairs.all(|(before, after)| before * after > 0.0), "case {seed}");
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 4 bits are exact in f32")]
    fn a_fixed_point_has_no_better_point_anywhere_on_the_grid() {
        for seed in 0..40 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            crate::rounding::descend::descend(&mut tile, grid, &q, 60);
            let best = exact_losses(&tile, &q);
            for column in 0..q.columns {
                for point in (0..16).map(|code| grid.decode(code) as f32) {
                    let mut other = tile.clone();
                    other.points[column] = tile.zeros[column / tile.block].map(|zero| point - zero);
                    assert!(all_at_most(&best, &exact_losses(&other, &q)), "case {seed}, column {column}: {point}");
                }
            }
        }
    }

    #[test]
    fn nearest_is_a_fixed_point_where_inputs_do_not_correlate() {
        for seed in 0..24 {
            let (mut tile, correlated, grid) = random_case(seed);
            let d = correlated.columns;
            let entry = |at: usize| {
                let (i, j) = (at / d, at % d);
                if i == j && i % 4 < 3 { correlated.h.at(i, j) } else { 0.0 }
            };
            let q = Quadratic::new(&(0..d * d).map(entry).collect::<Vec<f32>>(), d);
            tile.nearest(grid);
            let mut errors = tile.errors();
            assert!(!tile.descend(grid, &q, &mut errors), "case {seed}");
        }
    }

    #[test]
    fn a_loss_is_the_mean_square_of_what_the_output_is_off_by() {
        for d in [1, 2, 3, 5, 7, 10, 13, 23] {
            let rows = Draws::new(d as u64).rows(d, 2 * d + 1);
            let q = Quadratic::new(&moments(&rows), d);
            let mut tile = random_tile(d, 3, 9);
            tile.nearest(grid("int4"));
            for (lane, loss) in tile.losses(&q).into_iter().enumerate() {
                let error = |j: usize| {
                    let scale = f64::from(tile.scales[j / tile.block][lane]);
                    f64::from(tile.points[j][lane]) * scale - f64::from(tile.weights[j][lane])
                };
                let output = |row: &Vec<f32>| (0..d).map(|j| f64::from(row[j]) * error(j)).sum::<f64>();
                let want = rows.iter().map(|row| output(row).powi(2)).sum::<f64>() / rows.len() as f64;
                assert!((loss - want).abs() < 1e-4 * want + 1e-6, "{d} columns: {loss} {want}");
            }
        }
    }
}
