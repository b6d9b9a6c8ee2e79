//! Rows that are divided before they are rounded, ŵ = s · round(w / (s S)), and what that does to the layer quadratic.
//!
//! w is moved so near to the point that was chosen that it rounds to that while S is 1. What a method learns is ln S, from the
//! gradient straight through the rounding: ∂ŵ / ∂ ln S = −w / S.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use super::tile::{LANES, Lanes, Quadratic, Tile, WIDE};
use crate::grid::{self, Grid};
use crate::simd::vectorized;

/// One iteration costs as much as a sweep of descent; wider rows than this take minutes a layer.
pub(super) const MOST_COLUMNS: usize = 1152;

pub(super) const ITERATIONS: u16 = 400;
/// Of logarithms of divisors.
const RATE: f32 = 5e-3;
/// They stay within ±3.
const REACH: f32 = 3.0;
/// How far from a point what rounds to it may lie at the start, in gaps to its neighbor.
const APART: f32 = 0.25;

/// The rate falls to 0 along half a cosine.
pub(super) fn rate(iteration: u16) -> f32 {
    let progress = f32::from(iteration) / f32::from(ITERATIONS);
    0.5 * RATE * (1.0 + (std::f32::consts::PI * progress).cos())
}

/// The rows of a tile while divisors are learned.
#[derive(Debug)]
pub(super) struct Divided {
    /// As divided now.
    tile: Tile,
    /// In units of scales, column after column: what is divided.
    units: Vec<Lanes>,
    errors: Vec<Lanes>,
    /// Half the gradient of the loss by ln S of every element; 0 where nothing is multiplied.
    pub(super) slopes: Vec<Lanes>,
    /// The points of the smallest loss so far, per lane.
    best: Vec<Lanes>,
    lowest: [f64; LANES],
}

/// The weight of `lane` in `column` moved so near to its point that it rounds to it, in units of its scale.
#[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
fn within_reach(tile: &Tile, grid: &dyn Grid, column: usize, lane: usize) -> f32 {
    let block = column / tile.block;
    let (point, zero) = (tile.points[column][lane], f64::from(tile.zeros[block][lane]));
    let away = tile.weights[column][lane] / tile.scales[block][lane] - point;
    let next = (grid::neighbor(grid, f64::from(point) + zero, away > 0.0) - zero) as f32;
    let most = APART * (next - point).abs();
    point + away.clamp(-most, most)
}

impl Divided {
    /// With S = 1 the points of `tile`.
    pub(super) fn new(tile: &Tile, grid: &dyn Grid) -> Self {
        let columns = 0..tile.weights.len();
        Self {
            units: columns.map(|j| std::array::from_fn(|lane| within_reach(tile, grid, j, lane))).collect(),
            errors: tile.errors(),
            slopes: vec![[0.0; LANES]; tile.weights.len()],
            best: tile.points.clone(),
            lowest: [f64::INFINITY; LANES],
            tile: tile.clone(),
        }
    }

    /// Divides by `exp logs`, rounds, and finds the slopes there.
    pub(super) fn divide(&mut self, logs: &[Lanes], grid: &dyn Grid, q: &Quadratic) {
        vectorized(
            #[inline(always)]
            || {
                self.round(logs, grid, q);
                self.judge(grid, q);
            },
        );
    }

    /// The mean magnitude of all slopes of a lane.
    pub(super) fn mean_slopes(&self) -> Lanes {
        let mut sums = [0.0_f32; LANES];
        for slopes in &self.slopes {
            sums.iter_mut().zip(slopes).for_each(|(sum, slope)| *sum += slope.abs());
        }
        sums.map(|sum| sum / self.slopes.len().max(1) as f32)
    }

    /// The rows as they were where they lost least.
    pub(super) fn best(self) -> Tile {
        Tile { points: self.best, ..self.tile }
    }

    /// Leaves what was rounded in `slopes`.
    #[inline(always)]
    fn round(&mut self, logs: &[Lanes], grid: &dyn Grid, q: &Quadratic) {
        for (j, logs) in logs.iter().enumerate() {
            let (block, w) = (j / self.tile.block, &self.tile.weights[j]);
            let mut x = self.units[j];
            if q.h.at(j, j) > 0.0 {
                x.iter_mut().zip(logs).for_each(|(x, log)| *x *= (-log.clamp(-REACH, REACH)).exp());
            }
            let (points, s) = (self.tile.points_of(grid, block, x), &self.tile.scales[block]);
            self.errors[j] = std::array::from_fn(|l| points[l] * s[l] - w[l]);
            self.tile.points[j] = points;
            self.slopes[j] = x;
        }
    }

    /// What is beyond the grid feels only what brings it back.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the ends of grids of up to 16 bits are exact in f32")]
    fn judge(&mut self, grid: &dyn Grid, q: &Quadratic) {
        let (low, high) = grid.range();
        let (low, high) = (low as f32, high as f32);
        let mut losses = [0.0_f64; LANES];
        for start in (0..q.columns).step_by(WIDE) {
            let gradients = q.h.dots(&self.errors, 0, start);
            for j in start..(start + WIDE).min(q.columns) {
                let (gradient, x) = (&gradients[j - start], self.slopes[j]);
                let block = j / self.tile.block;
                let (s, z) = (&self.tile.scales[block], &self.tile.zeros[block]);
                let alive = if q.h.at(j, j) > 0.0 { 1.0 } else { 0.0 };
                for l in 0..LANES {
                    losses[l] += f64::from(self.errors[j][l]) * f64::from(gradient[l]);
                    let slope = -alive * gradient[l] * s[l] * x[l];
                    let inside = x[l] >= low - z[l] && x[l] <= high - z[l];
                    self.slopes[j][l] = if inside { slope } else { slope.min(0.0) };
                }
            }
        }
        for (lane, loss) in losses.into_iter().enumerate() {
            if loss < self.lowest[lane] {
                self.lowest[lane] = loss;
                self.best.iter_mut().zip(&self.tile.points).for_each(|(best, points)| best[lane] = points[lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::random_case;
    use super::*;

    fn logs(columns: usize, log: impl Fn(usize, usize) -> f32) -> Vec<Lanes> {
        (0..columns).map(|j| std::array::from_fn(|lane| log(j, lane))).collect()
    }

    #[test]
    fn divisors_of_1_give_the_points_that_were_chosen() {
        for seed in 0..60 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            // Also where points are far from nearest.
            tile.points.rotate_right(usize::try_from(seed).unwrap() % q.columns);
            if !grid.info().about.name.starts_with("int") {
                tile.nearest(grid);
            }
            let mut divided = Divided::new(&tile, grid);
            divided.divide(&logs(q.columns, |_, _| 0.0), grid, &q);
            assert_eq!(divided.tile.points, tile.points, "case {seed}");
        }
    }

    #[test]
    fn signs_stay_whatever_the_divisor() {
        for seed in 0..60 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            let mut divided = Divided::new(&tile, grid);
            for log in [-1e9_f32, -2.0, 0.3, 2.0, f32::MAX] {
                divided.divide(&logs(q.columns, |j, _| if j % 2 == 0 { log } else { -log }), grid, &q);
                for (points, units) in divided.tile.points.iter().zip(&divided.units) {
                    let mut pairs = points.iter().zip(units);
                    assert!(pairs.all(|(point, unit)| point * unit >= 0.0), "case {seed}, {log}");
                }
                assert!(divided.slopes.iter().flatten().all(|slope| slope.is_finite()), "case {seed}, {log}");
            }
        }
    }

    /// Where rounding is straight, the loss of ŵ = w / S falls against the slopes: central differences of it.
    #[test]
    fn slopes_are_the_gradient_of_what_is_not_rounded() {
        for seed in 0..40 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            let mut divided = Divided::new(&tile, grid);
            let at = logs(q.columns, |j, lane| 0.1 * ((3 * j + lane) % 7) as f32 - 0.3);
            divided.divide(&at, grid, &q);
            let (low, high) = grid.range();
            for j in (0..q.columns).filter(|&j| q.h.at(j, j) > 0.0) {
                for (lane, log) in at[j].iter().enumerate() {
                    let block = j / tile.block;
                    let s = f64::from(tile.scales[block][lane]);
                    let unit = |log: f64| f64::from(divided.units[j][lane]) * (-log).exp();
                    let here = unit(f64::from(*log));
                    let zero = f64::from(tile.zeros[block][lane]);
                    if here <= low - zero || here >= high - zero {
                        continue;
                    }
                    let pull: f64 =
                        (0..q.columns).map(|k| f64::from(divided.errors[k][lane]) * f64::from(q.h.at(k, j))).sum();
                    let (log, step) = (f64::from(*log), 1e-4);
                    let want = pull * s * (unit(log + step) - unit(log - step)) / (2.0 * step);
                    let got = f64::from(divided.slopes[j][lane]);
                    assert!((got - want).abs() < 2e-4 * (1.0 + want.abs()), "case {seed}, {j}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn the_best_is_what_lost_least() {
        for seed in 0..40 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            let mut divided = Divided::new(&tile, grid);
            let mut least = [f64::INFINITY; LANES];
            for step in 0..20_u8 {
                let at = logs(q.columns, |j, lane| f32::from(step) * 0.1 * ((j + lane) % 5) as f32 - 0.4);
                divided.divide(&at, grid, &q);
                let losses = divided.tile.losses(&q);
                least.iter_mut().zip(losses).for_each(|(least, loss)| *least = least.min(loss));
            }
            let found = divided.best().losses(&q);
            for (found, least) in found.into_iter().zip(least) {
                assert!((found - least).abs() <= 1e-6 * least.abs().max(1e-3), "case {seed}: {found} {least}");
            }
        }
    }
}
