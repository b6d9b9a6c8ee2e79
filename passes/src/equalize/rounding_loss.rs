//! What rounding rows of numbers to nearest loses, and how that depends on the numbers.

use crate::grid::Grid;

/// How rows are rounded: in blocks along them, each with the scale of [`SHARES`] that loses least.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounding {
    pub(super) grid: &'static dyn Grid,
    /// Numbers that share a scale.
    pub(super) block: usize,
    /// Whether a scale may be negative, which gives the longer tail the further bound of the grid.
    pub(super) negative: bool,
}

/// Scales that are tried, in those that put the largest number on the bound of the grid.
const SHARES: [f32; 6] = [1.25, 1.1, 1.0, 0.9, 0.8, 0.7];

/// The scale of a block.
#[derive(Clone, Copy, Debug)]
struct Fit {
    scale: f32,
    /// Where the number is that sets it, and the change of the scale per change of that number.
    at: usize,
    slope: f32,
    error: f32,
}

impl Rounding {
    /// The squared errors of `values`, rows of `columns` each, summed column by column. A block without a usable scale loses nothing.
    ///
    /// With `gradient`, every number there becomes the derivative of Σ `costs` · errors by the number in its place, straight through: codes
    /// move with what they round, and clamped numbers do not move theirs; the scale follows the number that sets it.
    pub(super) fn errors(
        &self,
        values: &[f32],
        columns: usize,
        mut gradient: Option<(&[f64], &mut [f32])>,
    ) -> Vec<f64> {
        let mut sums = vec![0.0; columns];
        let block = self.block.clamp(1, columns.max(1));
        let (mut points, mut tried) = (vec![0.0; block], vec![0.0; block]);
        for (r, row) in values.chunks_exact(columns.max(1)).enumerate() {
            for (b, w) in row.chunks(block).enumerate() {
                let (points, tried) = (&mut points[..w.len()], &mut tried[..w.len()]);
                let Some(fit) = self.fit(w, points, tried) else { continue };
                let from = b * block;
                for ((sum, w), p) in sums[from..].iter_mut().zip(w).zip(&*points) {
                    *sum += f64::from(p * fit.scale - w).powi(2);
                }
                if let Some((costs, gradient)) = &mut gradient {
                    let at = r * columns + from;
                    self.differentiate(w, points, fit, &costs[from..], &mut gradient[at..at + w.len()]);
                }
            }
        }
        sums
    }

    /// The scale for the block `w`, and its points.
    fn fit(&self, w: &[f32], points: &mut [f32], tried: &mut [f32]) -> Option<Fit> {
        let (at, peak) = w
            .iter()
            .enumerate()
            .fold((0, 0.0_f32), |(at, peak), (i, w)| if w.abs() > peak { (i, w.abs()) } else { (at, peak) });
        if !peak.is_normal() {
            return None;
        }
        let (low, high) = bounds(self.grid);
        let (sign, bound) = if self.negative && low + high < 0.0 { (w[at].signum(), low) } else { (1.0, high) };
        let mut best: Option<Fit> = None;
        for share in SHARES {
            let scale = sign * peak * share / bound;
            if !scale.is_normal() {
                continue;
            }
            tried.iter_mut().zip(w).for_each(|(t, w)| *t = w / scale);
            self.grid.snap(tried, 0.0);
            let error: f32 = tried.iter().zip(w).map(|(p, w)| (p * scale - w) * (p * scale - w)).sum();
            if error.is_finite() && best.is_none_or(|best| error < best.error) {
                points.copy_from_slice(tried);
                best = Some(Fit { scale, at, slope: sign * w[at].signum() * share / bound, error });
            }
        }
        best
    }

    /// See [`Self::errors`].
    #[expect(clippy::cast_possible_truncation, reason = "multiplied in f32")]
    fn differentiate(&self, w: &[f32], points: &[f32], fit: Fit, costs: &[f64], gradient: &mut [f32]) {
        let (low, high) = bounds(self.grid);
        let mut of_scale = 0.0;
        for (((w, p), cost), g) in w.iter().zip(points).zip(costs).zip(gradient.iter_mut()) {
            let (scale, position) = (f64::from(fit.scale), w / fit.scale);
            let error = f64::from(*p) * scale - f64::from(*w);
            if (low..=high).contains(&position) {
                // The error is the scale times a rest that stays.
                of_scale += 2.0 * cost * error * error / scale;
                *g = 0.0;
            } else {
                of_scale += 2.0 * cost * error * f64::from(*p);
                *g = (-2.0 * cost * error) as f32;
            }
        }
        gradient[fit.at] += (of_scale * f64::from(fit.slope)) as f32;
    }
}

#[expect(clippy::cast_possible_truncation, reason = "bounds of grids are exact in f32")]
fn bounds(grid: &dyn Grid) -> (f32, f32) {
    let (low, high) = grid.range();
    (low as f32, high as f32)
}

#[cfg(test)]
mod tests {
    use super::super::orthogonal::tests::drawn;
    use super::*;
    use crate::grid;

    #[expect(clippy::cast_possible_truncation, reason = "values are f32")]
    fn values(draw: u64, n: usize) -> Vec<f32> {
        drawn(draw, n).iter().map(|v| v.powi(3) as f32).collect()
    }

    fn rounding(name: &str, block: usize, negative: bool) -> Rounding {
        Rounding { grid: grid::find(name).unwrap(), block, negative }
    }

    /// Two bits, −2 to 1, one block: with the largest number on −2 the scale is −1, and the codes are −2 and 1.
    #[test]
    fn a_block_by_hand() {
        let errors = rounding("int2", 2, true).errors(&[2.0, -0.875], 2, None);
        assert!(errors[0].abs() < 1e-12 && (errors[1] - 0.125_f64.powi(2)).abs() < 1e-9, "{errors:?}");
        // Without negative scales 2 has only the code 1, and both are far from what they become.
        let errors = rounding("int2", 2, false).errors(&[2.0, -0.875], 2, None);
        assert!(errors.iter().sum::<f64>() > 0.5, "{errors:?}");
        assert_eq!(rounding("int4", 4, true).errors(&[0.0, f32::NAN, 0.0, 0.0, f32::INFINITY], 5, None), [0.0; 5]);
    }

    /// The loss with the codes' rests, and clamped codes, held: what the gradient is that of.
    fn held(rounding: Rounding, at: &[f32], moved: &[f32], costs: &[f64]) -> f64 {
        let n = at.len();
        let (mut points, mut tried) = (vec![0.0; n], vec![0.0; n]);
        let fit = rounding.fit(at, &mut points, &mut tried).unwrap();
        let (low, high) = bounds(rounding.grid);
        let scale = f64::from(fit.scale) + f64::from(fit.slope) * f64::from(moved[fit.at] - at[fit.at]);
        let error = |i: usize| {
            let position = at[i] / fit.scale;
            if (low..=high).contains(&position) {
                scale * f64::from(points[i] - position)
            } else {
                scale * f64::from(points[i]) - f64::from(moved[i])
            }
        };
        (0..n).map(|i| costs[i] * error(i).powi(2)).sum()
    }

    #[test]
    fn gradients_are_those_of_central_differences() {
        let mut clamped = 0;
        for (name, negative) in [("int2", true), ("int3", true), ("int4", false), ("float4e2m1", true)] {
            for draw in 0..20 {
                let w = values(draw, 8);
                let costs: Vec<f64> = drawn(50 + draw, 8).iter().map(|v| 1.5 + v).collect();
                let rounding = rounding(name, 8, negative);
                let mut gradient = vec![0.0; 8];
                rounding.errors(&w, 8, Some((&costs, &mut gradient)));
                clamped += gradient.iter().filter(|g| **g != 0.0).count() - 1;
                for (i, said) in gradient.iter().enumerate() {
                    let by = 1.0 / 1024.0;
                    let along = |sign: f32| {
                        let mut moved = w.clone();
                        moved[i] += sign * by;
                        held(rounding, &w, &moved, &costs)
                    };
                    let measured = (along(1.0) - along(-1.0)) / (2.0 * f64::from(by));
                    let said = f64::from(*said);
                    assert!(
                        (measured - said).abs() < 1e-3 * (1.0 + said.abs()),
                        "{name} {draw} {i}: {measured}, {said}"
                    );
                }
            }
        }
        assert!(clamped > 10, "{clamped}");
    }

    #[test]
    fn blocks_are_rounded_alone_and_columns_add_up() {
        let w = values(3, 24);
        let rounding = rounding("int3", 4, true);
        let whole = rounding.errors(&w, 12, None);
        for b in 0..3 {
            let alone: Vec<Vec<f64>> =
                (0..2).map(|r| rounding.errors(&w[r * 12 + b * 4..r * 12 + b * 4 + 4], 4, None)).collect();
            for j in 0..4 {
                assert!((whole[b * 4 + j] - alone[0][j] - alone[1][j]).abs() < 1e-12);
            }
        }
    }
}
