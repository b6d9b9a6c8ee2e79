//! What rounding rows of numbers to nearest loses, and how that depends on the numbers.

use crate::grid::{self, Grid};
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::pass::PassContext;
use crate::target::Scheme;

/// How rows are rounded: in blocks along them, each with the scale of [`SHARES`] that loses least.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounding {
    pub(super) grid: &'static dyn Grid,
    /// Numbers that share a scale.
    pub(super) block: usize,
    /// Whether a scale may be negative, which gives the longer tail the further bound of the grid.
    pub(super) negative: bool,
    /// Whether codes are shifted so that they reach from the least number to the greatest.
    pub(super) zero_points: bool,
}

/// Scales that are tried, in those that put the largest number on the bound of the grid.
const SHARES: [f32; 6] = [1.25, 1.1, 1.0, 0.9, 0.8, 0.7];

/// The scale of a block.
#[derive(Clone, Copy, Debug)]
struct Fit {
    scale: f32,
    /// The codes that there are, around that of 0.
    bounds: (f32, f32),
    /// Where the numbers are that set the scale, and its change per change of each.
    ends: [(usize, f32); 2],
    error: f32,
}

/// What a block spans, before any share of it is taken.
struct Span {
    scale: f32,
    /// The code of 0, and the codes that there are, around it.
    zero: f32,
    bounds: (f32, f32),
    ends: [(usize, f32); 2],
}

impl Rounding {
    /// How the `weight` of a node, with so many inputs, is rounded; `None` where it stays in float.
    pub(super) fn of(
        graph: &Graph,
        cx: &PassContext<'_>,
        (node, weight): (NodeId, ValueId),
        inputs: usize,
    ) -> Option<Self> {
        let names = [&graph.node(node)?.name, &graph.value(weight).name];
        if names.iter().any(|name| cx.keep_float.contains_key(&***name)) {
            return None;
        }
        let by_name = names.iter().find_map(|name| cx.schemes.get(&***name));
        let accepts = cx.target.accepts();
        let scheme = accepts.completed(by_name.copied().unwrap_or(cx.scheme));
        let (grid, block) = format(&scheme)?;
        let zero_points = scheme.asymmetric && scheme.weight_format.is_none();
        Some(Self { grid, block: block.unwrap_or(inputs), negative: accepts.negative_scales, zero_points })
    }

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
                    differentiate(w, points, fit, &costs[from..], &mut gradient[at..at + w.len()]);
                }
            }
        }
        sums
    }

    /// The scale for the block `w`, and its points.
    fn fit(&self, w: &[f32], points: &mut [f32], tried: &mut [f32]) -> Option<Fit> {
        let Span { scale: whole, zero, bounds, ends } = self.span(w)?;
        let mut best: Option<Fit> = None;
        for share in SHARES {
            let scale = whole * share;
            if !scale.is_normal() {
                continue;
            }
            tried.iter_mut().zip(w).for_each(|(t, w)| *t = w / scale);
            self.grid.snap(tried, zero);
            let error: f32 = tried.iter().zip(w).map(|(p, w)| (p * scale - w) * (p * scale - w)).sum();
            if error.is_finite() && best.is_none_or(|best| error < best.error) {
                points.copy_from_slice(tried);
                best = Some(Fit { scale, bounds, ends: ends.map(|(at, slope)| (at, slope * share)), error });
            }
        }
        best
    }

    /// What the block `w` spans; `None` where that is nothing, or no number.
    fn span(&self, w: &[f32]) -> Option<Span> {
        let (low, high) = bounds(self.grid);
        let furthest = |size: fn(f32) -> f32| {
            w.iter()
                .enumerate()
                .fold((0, 0.0), |(at, top), (i, w)| if size(*w) > top { (i, size(*w)) } else { (at, top) })
        };
        if self.zero_points {
            let ((top, most), (bottom, least)) = (furthest(|w| w), furthest(|w| -w));
            let unit = 1.0 / (high - low);
            let scale = (most + least) * unit;
            let slope = |reach: f32, slope: f32| if reach > 0.0 { slope } else { 0.0 };
            let zero = (low + least / scale).round_ties_even();
            let ends = [(top, slope(most, unit)), (bottom, slope(least, -unit))];
            return scale.is_normal().then_some(Span { scale, zero, bounds: (low - zero, high - zero), ends });
        }
        let (at, peak) = furthest(f32::abs);
        let (sign, bound) = if self.negative && low + high < 0.0 { (w[at].signum(), low) } else { (1.0, high) };
        let ends = [(at, sign * w[at].signum() / bound), (at, 0.0)];
        peak.is_normal().then_some(Span { scale: sign * peak / bound, zero: 0.0, bounds: (low, high), ends })
    }
}

/// See [`Rounding::errors`].
#[expect(clippy::cast_possible_truncation, reason = "multiplied in f32")]
fn differentiate(w: &[f32], points: &[f32], fit: Fit, costs: &[f64], gradient: &mut [f32]) {
    let (low, high) = fit.bounds;
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
    for (at, slope) in fit.ends {
        gradient[at] += (of_scale * f64::from(slope)) as f32;
    }
}

/// The points of weights in `scheme`, and how many of them share a scale.
fn format(scheme: &Scheme) -> Option<(&'static dyn Grid, Option<usize>)> {
    if let Some(format) = scheme.block_format() {
        return Some((format.element, Some(format.size)));
    }
    let grid = match scheme.weight_format {
        Some(name) => grid::find(name)?,
        None => grid::find(&format!("int{}", scheme.weight_bits))?,
    };
    Some((grid, scheme.block))
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
        Rounding { grid: grid::find(name).unwrap(), block, negative, zero_points: false }
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

    /// From -2 to 4 in three steps.
    #[test]
    fn zero_points_let_codes_reach_from_the_least_to_the_greatest() {
        let shifted = Rounding { zero_points: true, ..rounding("int2", 4, false) };
        let errors = shifted.errors(&[-2.0, 0.0, 2.0, 4.0], 4, None);
        assert_eq!(errors, [0.0; 4]);
        // 0 is among the codes even where all numbers lie on one side of it.
        assert_eq!(shifted.errors(&[4.0, 2.0, 6.0, 6.0], 4, None), [0.0; 4]);
        assert_eq!(shifted.errors(&[-4.0, -2.0, -6.0, -6.0], 4, None), [0.0; 4]);
        assert_eq!(shifted.errors(&[0.0; 4], 4, None), [0.0; 4]);
        for draw in 0..50 {
            let w: Vec<f32> = values(draw, 16).iter().map(|v| v + 1.0).collect();
            let of = |zero_points| Rounding { zero_points, ..rounding("int4", 16, false) }.errors(&w, 16, None);
            assert!(of(true).iter().sum::<f64>() < of(false).iter().sum(), "{draw}");
        }
    }

    /// The loss with the codes' rests, and clamped codes, held: what the gradient is that of.
    fn held(rounding: Rounding, at: &[f32], moved: &[f32], costs: &[f64]) -> f64 {
        let n = at.len();
        let (mut points, mut tried) = (vec![0.0; n], vec![0.0; n]);
        let fit = rounding.fit(at, &mut points, &mut tried).unwrap();
        let (low, high) = fit.bounds;
        let by = fit.ends.map(|(end, slope)| f64::from(slope) * f64::from(moved[end] - at[end]));
        let scale = f64::from(fit.scale) + by[0] + by[1];
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
        let some = [("int2", true), ("int3", true), ("int4", false), ("float4e2m1", true)].map(|(n, s)| (n, s, false));
        for (name, negative, zero_points) in some.into_iter().chain([("int2", false, true), ("int4", false, true)]) {
            for draw in 0..20 {
                let w = values(draw, 8);
                let costs: Vec<f64> = drawn(50 + draw, 8).iter().map(|v| 1.5 + v).collect();
                let rounding = Rounding { zero_points, ..rounding(name, 8, negative) };
                let mut gradient = vec![0.0; 8];
                rounding.errors(&w, 8, Some((&costs, &mut gradient)));
                clamped += gradient.iter().filter(|g| **g != 0.0).count() - 1 - usize::from(zero_points);
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
