//! GPTQ: column by column, each rounding error made up for by the columns not yet rounded.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use faer::{Mat, MatRef, Side};

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

    fn cost(&self) -> &'static str {
        "A factor of d³ / 3 multiply-adds per Gram matrix, and m d² / 2 per weight of m × d."
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

/// The factor of H, with columns in descending order of their diagonal.
#[expect(clippy::cast_possible_truncation, reason = "feedback is used as f32")]
fn factor(q: &Quadratic) -> Option<Factor> {
    let d = q.columns;
    factored(q, |order, lower| {
        let back = |at: usize| d - 1 - at;
        let entry = |k: usize, j: usize| {
            if k < j { (lower[(back(k), back(j))] / lower[(back(j), back(j))]) as f32 } else { 0.0 }
        };
        Factor { order: order.to_vec(), feedback: Panels::new(d, d, entry) }
    })
}

/// D of H = M D Mᵀ, column by column as they are stored: what a squared error counts that is left when its column's turn comes.
pub(super) fn column_pivots(q: &Quadratic) -> Option<Vec<f64>> {
    factored(q, |order, lower| {
        let mut pivots = vec![0.0; order.len()];
        for (place, column) in order.iter().enumerate() {
            let back = order.len() - 1 - place;
            // Of what is always 0 nothing is lost: the factor needs some number there.
            pivots[*column] = if q.h.at(*column, *column) > 0.0 { lower[(back, back)].powi(2) } else { 0.0 };
        }
        pivots
    })
}

/// What `make` makes of the columns, in descending order of their diagonal, and of the factor of H, both read backwards; damped until there
/// is one.
fn factored<T>(q: &Quadratic, make: impl Fn(&[usize], MatRef<'_, f64>) -> T) -> Option<T> {
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
        return Some(make(&order, factored.L()));
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

    /// H as it is factored: in the order of elimination, with 0.01 of its mean diagonal more.
    fn damped(q: &Quadratic, order: &[usize]) -> Vec<f64> {
        let d = order.len();
        let h = |i: usize, j: usize| f64::from(q.h.at(order[i], order[j]));
        let mean = (0..d).map(|j| h(j, j)).sum::<f64>() / d as f64;
        let entry = |at: usize| h(at / d, at % d) + if at / d == at % d { 0.01 * mean } else { 0.0 };
        (0..d * d).map(entry).collect()
    }

    /// D of h = M D Mᵀ, by plain elimination from the last column on.
    fn pivots(h: &[f64], d: usize) -> Vec<f64> {
        let mut rest = h.to_vec();
        for j in (0..d).rev() {
            for at in 0..j * j {
                let (i, k) = (at / j, at % j);
                rest[i * d + k] -= rest[i * d + j] * rest[k * d + j] / rest[j * d + j];
            }
        }
        (0..d).map(|j| rest[j * d + j]).collect()
    }

    #[test]
    fn the_factor_gives_the_damped_matrix_back() {
        for d in [1, 2, 5, 8, 13, 24] {
            let q = Quadratic::new(&random_quadratic(d, 3 * d), d);
            let Factor { order, feedback } = factor(&q).unwrap();
            assert!(order.windows(2).all(|pair| q.h.at(pair[0], pair[0]) >= q.h.at(pair[1], pair[1])));
            let h = damped(&q, &order);
            let pivots = pivots(&h, d);
            let by_column = column_pivots(&q).unwrap();
            for (place, column) in order.iter().enumerate() {
                let (got, want) = (by_column[*column], pivots[place]);
                assert!((got / want - 1.0).abs() < 1e-6, "{d} columns, {column}: {got} {want}");
            }
            let m = |i: usize, k: usize| if i == k { 1.0 } else { f64::from(feedback.at(i, k)) };
            for (at, want) in h.iter().enumerate() {
                let (i, j) = (at / d, at % d);
                let got: f64 = (0..d).map(|k| m(i, k) * pivots[k] * m(j, k)).sum();
                assert!((got - want).abs() < 1e-5 * h[0], "{d} columns, {i} {j}: {got} {want}");
            }
        }
    }

    /// Σⱼ Dⱼ (w'ⱼ − ŵⱼ)² is the loss, and every ŵⱼ the nearest to its w'ⱼ.
    #[test]
    fn what_is_lost_is_what_every_column_leaves_at_its_turn() {
        let d = 14;
        let q = Quadratic::new(&random_quadratic(d, 40), d);
        let factor = factor(&q).unwrap();
        let mut tile = random_tile(d, 4, 8);
        factor.eliminate(&mut tile, grid("int4"));
        let h = damped(&q, &factor.order);
        let pivots = pivots(&h, d);
        for lane in 0..LANES {
            let scale = |column: usize| f64::from(tile.scales[column / tile.block][lane]);
            let point = |column: usize| f64::from(tile.points[column][lane]);
            let error = |j: usize| {
                let column = factor.order[j];
                f64::from(tile.weights[column][lane]) - point(column) * scale(column)
            };
            let fed = |j: usize| (0..j).map(|k| error(k) * f64::from(factor.feedback.at(k, j))).sum::<f64>();
            let left = |j: usize| error(j) + fed(j);
            let by_turns: f64 = (0..d).map(|j| pivots[j] * left(j).powi(2)).sum();
            let whole: f64 = (0..d * d).map(|at| error(at / d) * h[at] * error(at % d)).sum();
            assert!((by_turns - whole).abs() < 1e-4 * whole, "lane {lane}: {by_turns} {whole}");
            // Where no point is at an end of the grid, no column leaves more than half a step.
            let inside = (0..d).all(|column| (-7.5..6.5).contains(&point(column)));
            let most: f64 = (0..d).map(|j| pivots[j] * (scale(factor.order[j]) / 2.0).powi(2)).sum();
            assert!(!inside || whole <= most * (1.0 + 1e-4), "lane {lane}: {whole}, at most {most}");
            for (j, &column) in factor.order.iter().enumerate() {
                let at = point(column) + left(j) / scale(column);
                let (found, best) = ((at - point(column)).abs(), (at - grid("int4").nearest(at)).abs());
                assert!(found < best + 1e-4, "lane {lane}, column {column}: {found} {best}");
            }
        }
    }

    /// Neither the unit of what a layer reads matters, nor the order of its columns.
    #[test]
    fn moments_of_any_size_and_columns_in_any_order_give_the_same_codes() {
        let d = 12;
        let h = random_quadratic(d, 40);
        let rounded = |h: &[f32], tile: &Tile| {
            let mut tile = tile.clone();
            let q = Quadratic::new(h, d);
            Gptq.prepare(&q).unwrap().round(&mut tile, grid("int4"), &q);
            tile.points
        };
        let tile = random_tile(d, d, 5);
        let points = rounded(&h, &tile);
        for size in [1e-6, 0.25, 64.0, 1e6] {
            let sized: Vec<f32> = h.iter().map(|v| v * size).collect();
            assert_eq!(rounded(&sized, &tile), points, "{size}");
        }
        let moved = |j: usize| (5 * j + 3) % d;
        let turned: Vec<f32> = (0..d * d).map(|at| h[moved(at / d) * d + moved(at % d)]).collect();
        let weights = (0..d).map(|j| tile.weights[moved(j)]).collect();
        let of_turned = rounded(&turned, &Tile { weights, ..tile.clone() });
        let back: Vec<Lanes> = (0..d).map(|j| points[moved(j)]).collect();
        assert_eq!(of_turned, back);
    }

    #[test]
    fn a_matrix_is_damped_until_it_has_a_factor() {
        // Eigenvalues are 1 more and 1 less than what is off the diagonal.
        let form = |beside: f32| Quadratic::new(&[1.0, beside, beside, 1.0], 2);
        for beside in [0.5, 1.005, 1.05, 1.5] {
            assert!(factor(&form(beside)).is_some(), "{beside}");
        }
        assert!(factor(&form(5.0)).is_none());
        assert!(factor(&Quadratic::new(&[0.0; 9], 3)).is_none());
        let row = [1.0, -2.0, 0.5, 3.0, 0.0, 1.0];
        let of_one_row: Vec<f32> = (0..36).map(|at| row[at / 6] * row[at % 6]).collect();
        let Factor { feedback, .. } = factor(&Quadratic::new(&of_one_row, 6)).unwrap();
        assert!((0..36).all(|at| feedback.at(at / 6, at % 6).is_finite()));
    }
}
