//! GPTQ: column by column, each rounding error made up for by the columns not yet rounded.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use faer::{Mat, Side};

use super::tile::{LANES, Lanes, Panels, Quadratic, Tile, WIDE};
use super::{Method, Prepared};
use crate::about::About;
use crate::grid::Grid;
use crate::simd::vectorized;

pub(super) static ABOUT: About = About {
    name: "gptq",
    doc: "Columns in the order of their power, each error compensated by the columns still to come, in the form that needs no \
          inverse: H = R Rᵀ with R upper triangular, M = R diag(R)⁻¹, w'ⱼ = wⱼ + Σ_{k<j} (w − ŵ)ₖ Mₖⱼ. Scales stay as assigned. A \
          row that ends worse than rounding to nearest keeps nearest.",
    source: "Frantar et al. 2022, arXiv:2210.17323; triangular form after Chee et al. 2023, arXiv:2307.13304",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Gptq;

/// M, in the order of elimination.
struct Factor {
    order: Vec<usize>,
    /// Mₖⱼ for k < j, zero otherwise.
    feedback: Panels,
}

impl Method for Gptq {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>> {
        Some(Box::new(factor(q)?))
    }
}

impl Prepared for Factor {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
        tile.nearest(grid);
        let mut fed = tile.clone();
        vectorized(
            #[inline(always)]
            || self.eliminate(&mut fed, grid),
        );
        tile.keep_better(&fed, q);
    }
}

impl Factor {
    #[inline(always)]
    fn eliminate(&self, tile: &mut Tile, grid: &dyn Grid) {
        let d = self.order.len();
        let mut errors: Vec<Lanes> = vec![[0.0; LANES]; d];
        for start in (0..d).step_by(WIDE) {
            let mut back = self.feedback.dots(&errors[..start], 0, start);
            for j in start..(start + WIDE).min(d) {
                let column = self.order[j];
                let w = tile.weights[column];
                let target: Lanes = std::array::from_fn(|l| w[l] + back[j - start][l]);
                let block = column / tile.block;
                let points = tile.snapped(grid, block, &target);
                let s = &tile.scales[block];
                let error: Lanes = std::array::from_fn(|l| w[l] - points[l] * s[l]);
                tile.points[column] = points;
                for later in j + 1..(start + WIDE).min(d) {
                    let factor = self.feedback.at(j, later);
                    back[later - start].iter_mut().zip(&error).for_each(|(b, e)| *b += e * factor);
                }
                errors[j] = error;
            }
        }
    }
}

/// The factor of H, with columns in descending order of their diagonal; damped until it exists.
#[expect(clippy::cast_possible_truncation, reason = "feedback is used as f32")]
fn factor(q: &Quadratic) -> Option<Factor> {
    let d = q.columns;
    let diagonal = |j: usize| f64::from(q.h.at(j, j));
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)).then(a.cmp(&b)));
    let mean = (0..d).map(diagonal).sum::<f64>() / d as f64;
    if mean <= 0.0 || !mean.is_finite() {
        return None;
    }
    for damping in [0.01, 0.1, 1.0] {
        // The Cholesky factor of the matrix read backwards is R read backwards.
        let entry = |i: usize, j: usize| {
            let (a, b) = (order[d - 1 - i], order[d - 1 - j]);
            let value = f64::from(q.h.at(a, b));
            if i == j { if value > 0.0 { value + damping * mean } else { mean } } else { value }
        };
        let Ok(factored) = Mat::from_fn(d, d, entry).llt(Side::Lower) else { continue };
        let lower = factored.L();
        let feedback = Panels::new(d, |k, j| {
            let back = |at: usize| d - 1 - at;
            if k < j { (lower[(back(k), back(j))] / lower[(back(j), back(j))]) as f32 } else { 0.0 }
        });
        return Some(Factor { order, feedback });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_quadratic, random_tile};
    use super::*;

    /// tr(Δ H Δᵀ) = Σⱼ Dⱼ (w'ⱼ − ŵⱼ)² holds for any quantizer: here through the loss of the result on a diagonal H.
    #[test]
    fn a_diagonal_matrix_gives_nearest() {
        let d = 12;
        let mut h = vec![0.0; d * d];
        (0..d).for_each(|j| h[j * d + j] = 1.0 + j as f32);
        let q = Quadratic::new(&h, d);
        let mut tile = random_tile(d, 4, 3);
        let mut nearest = tile.clone();
        nearest.nearest(grid("int4"));
        Gptq.prepare(&q).unwrap().round(&mut tile, grid("int4"), &q);
        assert_eq!(tile.points, nearest.points);
    }

    #[test]
    fn correlated_inputs_gain_and_no_row_loses() {
        let d = 48;
        let h = random_quadratic(d, 64);
        let q = Quadratic::new(&h, d);
        let mut tile = random_tile(d, 16, 5);
        let mut nearest = tile.clone();
        nearest.nearest(grid("int4"));
        Gptq.prepare(&q).unwrap().round(&mut tile, grid("int4"), &q);
        let (after, before) = (tile.losses(&q), nearest.losses(&q));
        assert!(after.iter().zip(&before).all(|(a, b)| a <= b), "{after:?} {before:?}");
        assert!(after.iter().sum::<f64>() < 0.8 * before.iter().sum::<f64>());
    }
}
