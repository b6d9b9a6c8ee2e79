//! What a basis of a residual stream costs, from weights and second moments alone.

use super::orthogonal::Orthogonal;
use super::pivots::{Errors, Moments};
use super::rounding_loss::Rounding;
use crate::grad::gemm::{Matrix, multiply};
use crate::parallel;

/// A weight that reads a stream, or writes to it.
#[derive(Debug)]
pub(super) struct Weight {
    /// Rows of as many numbers as the stream has channels: one per output of a reader, one per input of a writer.
    pub(super) rows: Vec<f32>,
    /// What its errors count: one over the power of what it computes.
    pub(super) share: f64,
    pub(super) rounding: Rounding,
}

/// What weights have in common.
#[derive(Debug)]
pub(super) enum Group {
    /// They read one tensor; its moments where they were measured.
    Readers(Vec<Weight>, Option<Moments>),
    /// It writes to the stream; what an error in each of its inputs costs.
    Writer(Weight, Vec<f64>),
}

/// The loss of a basis R: over all weights, in shares of the power of what they compute, Σ costs · squared errors of rounding to nearest.
#[derive(Debug)]
pub(super) struct TurnedLoss {
    pub(super) width: usize,
    pub(super) groups: Vec<Group>,
    pub(super) errors: Errors,
    /// Levels of what is read, where it is rounded.
    pub(super) levels: Option<f64>,
}

/// So many groups are worked on at once, whatever the number of threads: each holds one of its weights turned, and the slopes of that.
pub(super) const AT_ONCE: usize = 4;

/// The power of the mean that stands for the largest of all channels.
const PEAK: i32 = 8;

/// So many standard deviations are within the range of an activation.
const REACH: f64 = 3.0;

impl TurnedLoss {
    /// The loss in the basis `r`.
    pub(super) fn at(&self, r: &Orthogonal) -> f64 {
        let single = r.single();
        let of_some = |some: &[Group]| parallel::map(some, |group| self.of_group(group, r, &single, None));
        self.groups.chunks(AT_ONCE).flat_map(of_some).sum()
    }

    /// The gradient, row by row, of the part of the loss that every `stride`-th group from `first` on makes.
    pub(super) fn gradient(&self, r: &Orthogonal, first: usize, stride: usize) -> Vec<f64> {
        let single = r.single();
        let chosen: Vec<&Group> = self.groups.iter().skip(first).step_by(stride.max(1)).collect();
        let mut sum = vec![0.0; self.width * self.width];
        for some in chosen.chunks(AT_ONCE) {
            let gradients = parallel::map(some, |group| {
                let mut gradient = vec![0.0; self.width * self.width];
                self.of_group(group, r, &single, Some(&mut gradient));
                gradient
            });
            for gradient in gradients {
                sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
            }
        }
        sum
    }

    /// The loss of `group`; adds its gradient to `gradient`.
    fn of_group(&self, group: &Group, r: &Orthogonal, single: &[f32], mut gradient: Option<&mut Vec<f64>>) -> f64 {
        let d = self.width;
        let (weights, moments) = match group {
            Group::Writer(weight, costs) => {
                let errors = weight.written(single, d, costs, gradient);
                return costs.iter().zip(&errors).map(|(cost, error)| cost * error).sum();
            }
            Group::Readers(weights, moments) => (weights, moments.as_ref()),
        };
        let measured = moments.and_then(|moments| {
            let turned = moments.turned(r);
            Some((moments, moments.costs(&turned, self.errors)?, turned))
        });
        let of_column = measured.as_ref().map_or_else(|| vec![1.0; d], |(_, costs, _)| costs.of_column.clone());
        let mut errors = vec![0.0; d];
        for weight in weights {
            let own = weight.read(single, d, &of_column, gradient.as_deref_mut());
            errors.iter_mut().zip(own).for_each(|(sum, e)| *sum += e);
        }
        let mut loss: f64 = of_column.iter().zip(&errors).map(|(cost, error)| cost * error).sum();
        let Some((moments, costs, turned)) = measured else { return loss };
        let ranges = self.levels.map(|levels| {
            let factor = weights.len() as f64 * (2.0 * REACH / (levels - 1.0).max(1.0)).powi(2) / 12.0;
            (factor, ranges(&turned, d))
        });
        if let Some((factor, (spanned, _))) = &ranges {
            loss += factor * spanned;
        }
        if let Some(gradient) = gradient {
            let mut m = moments.of_errors(&costs, &errors);
            if let Some((factor, (_, slopes))) = &ranges {
                slopes.iter().enumerate().for_each(|(j, slope)| m[j * d + j] += factor * slope);
            }
            gradient.iter_mut().zip(moments.gradient(r, &m)).for_each(|(sum, g)| *sum += g);
        }
        loss
    }
}

/// The square of what one range for all channels spans, over the mean power: d ‖h‖₈ / Σ h for the diagonal h of the moments; and its
/// derivatives, for a fixed Σ h.
fn ranges(turned: &[f64], d: usize) -> (f64, Vec<f64>) {
    let power = |j: usize| turned[j * d + j].max(0.0);
    let sum: f64 = (0..d).map(power).sum();
    let top = (0..d).map(power).fold(0.0, f64::max);
    if !sum.is_normal() {
        return (0.0, vec![0.0; d]);
    }
    let norm = top * (0..d).map(|j| (power(j) / top).powi(PEAK)).sum::<f64>().powf(1.0 / f64::from(PEAK));
    let slope = |j: usize| d as f64 / sum * (power(j) / norm).powi(PEAK - 1);
    (d as f64 * norm / sum, (0..d).map(slope).collect())
}

impl Weight {
    fn count(&self, d: usize) -> usize {
        self.rows.len() / d.max(1)
    }

    /// A R, rounded along its rows: what each column loses, in shares. `costs` are those of a column.
    fn read(&self, single: &[f32], d: usize, costs: &[f64], gradient: Option<&mut Vec<f64>>) -> Vec<f64> {
        let m = self.count(d);
        let (a, r) = (Matrix::new(&self.rows, m, d), Matrix::new(single, d, d));
        let mut turned = vec![0.0; m * d];
        multiply(&mut turned, a, r, false);
        self.rounded(&turned, costs, gradient, |sum, slopes| {
            multiply(sum, a.t(), Matrix::new(slopes, m, d), false);
        })
    }

    /// (A R)ᵀ, rounded along its rows: what each input loses, in shares. `costs` are those of an input.
    fn written(&self, single: &[f32], d: usize, costs: &[f64], gradient: Option<&mut Vec<f64>>) -> Vec<f64> {
        let m = self.count(d);
        let (a, r) = (Matrix::new(&self.rows, m, d), Matrix::new(single, d, d));
        let mut turned = vec![0.0; m * d];
        multiply(&mut turned, r.t(), a.t(), false);
        self.rounded(&turned, costs, gradient, |sum, slopes| {
            multiply(sum, a.t(), Matrix::new(slopes, d, m).t(), false);
        })
    }

    /// What the columns of `turned` lose; `back` makes of the slopes of that the gradient with respect to R.
    fn rounded(
        &self,
        turned: &[f32],
        costs: &[f64],
        gradient: Option<&mut Vec<f64>>,
        back: impl Fn(&mut [f32], &[f32]),
    ) -> Vec<f64> {
        let mut slopes = vec![0.0; if gradient.is_some() { turned.len() } else { 0 }];
        let told = gradient.is_some().then_some((costs, slopes.as_mut_slice()));
        let mut errors = self.rounding.errors(turned, costs.len(), told);
        errors.iter_mut().for_each(|error| *error *= self.share);
        if let Some(gradient) = gradient {
            let mut sum = vec![0.0; gradient.len()];
            back(&mut sum, &slopes);
            gradient.iter_mut().zip(sum).for_each(|(to, g)| *to += self.share * f64::from(g));
        }
        errors
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::hadamard::Hadamard;
    use super::super::orthogonal::tests::drawn;
    use super::super::pivots::tests::moments;
    use super::*;
    use crate::grid;

    const WIDTH: usize = 12;

    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    fn weight(draw: u64, rows: usize, block: usize) -> Weight {
        let rows = drawn(draw, rows * WIDTH).iter().map(|v| v.powi(3) as f32).collect();
        let rounding = Rounding { grid: grid::find("int3").unwrap(), block, negative: true, zero_points: false };
        Weight { rows, share: 0.5, rounding }
    }

    /// Two readers of one tensor with moments, one without, and two writers.
    pub(in super::super) fn loss(errors: Errors, levels: Option<f64>) -> TurnedLoss {
        let costs = |draw: u64, n: usize| drawn(draw, n).iter().map(|v| 1.5 + v).collect();
        let groups = vec![
            Group::Readers(vec![weight(1, 20, 4), weight(2, 9, 12)], Some(moments(3, WIDTH, 60))),
            Group::Readers(vec![weight(4, 5, 4)], None),
            Group::Writer(weight(5, 8, 4), costs(6, 8)),
            Group::Writer(weight(7, 16, 16), costs(8, 16)),
        ];
        TurnedLoss { width: WIDTH, groups, errors, levels }
    }

    #[test]
    fn the_gradient_is_the_sum_of_those_of_all_groups() {
        let r = Orthogonal::of(&Hadamard::new(WIDTH, 1));
        for errors in [Errors::Stay, Errors::Compensated] {
            let loss = loss(errors, Some(16.0));
            let whole = loss.gradient(&r, 0, 1);
            let mut parts = vec![0.0; WIDTH * WIDTH];
            for first in 0..3 {
                parts.iter_mut().zip(loss.gradient(&r, first, 3)).for_each(|(sum, g)| *sum += g);
            }
            assert!(whole.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-9 * (1.0 + a.abs())));
            assert!(whole.iter().any(|g| g.abs() > 1e-3));
        }
    }

    #[test]
    fn groups_beyond_those_that_are_worked_on_at_once_count_too() {
        let r = Orthogonal::of(&Hadamard::new(WIDTH, 1));
        let mut twice = loss(Errors::Compensated, Some(16.0));
        let once = twice.at(&r);
        twice.groups.extend(loss(Errors::Compensated, Some(16.0)).groups);
        assert!(twice.groups.len() > AT_ONCE);
        assert!((twice.at(&r) - 2.0 * once).abs() < 1e-9 * once);
    }

    #[test]
    fn ranges_are_least_where_channels_are_even_and_slope_as_differences_do() {
        let turned = |powers: &[f64]| -> Vec<f64> {
            let d = powers.len();
            (0..d * d).map(|at| if at / d == at % d { powers[at / d] } else { 0.3 }).collect()
        };
        let even = ranges(&turned(&[2.0; 4]), 4).0;
        assert!((even - 4.0_f64.powf(0.125)).abs() < 1e-12, "{even}");
        let (loud, slopes) = ranges(&turned(&[4.0, 2.0, 1.0, 1.0]), 4);
        assert!(loud > even);
        // From one channel to another, so that the sum stays.
        let t = 1e-6;
        let by = |sign: f64| ranges(&turned(&[4.0 + sign * t, 2.0 - sign * t, 1.0, 1.0]), 4).0;
        let measured = (by(1.0) - by(-1.0)) / (2.0 * t);
        assert!((measured - (slopes[0] - slopes[1])).abs() < 1e-6, "{measured}");
        assert!(ranges(&[0.0; 4], 2).0 == 0.0);
    }

    /// Aᵀ times the slopes at A R, entry by entry; those themselves are compared with differences in `rounding_loss`.
    #[test]
    fn slopes_of_weights_are_pulled_back_to_the_basis() {
        let r = Orthogonal::of(&Hadamard::new(WIDTH, 1));
        let single = r.single();
        let costs = vec![1.0; WIDTH];
        let reader = weight(11, 6, 4);
        let mut gradient = vec![0.0; WIDTH * WIDTH];
        reader.read(&single, WIDTH, &costs, Some(&mut gradient));
        let mut turned = vec![0.0_f32; 6 * WIDTH];
        multiply(&mut turned, Matrix::new(&reader.rows, 6, WIDTH), Matrix::new(&single, WIDTH, WIDTH), false);
        let mut slopes = vec![0.0; turned.len()];
        reader.rounding.errors(&turned, WIDTH, Some((&costs, &mut slopes)));
        for (at, g) in gradient.iter().enumerate() {
            let (i, j) = (at / WIDTH, at % WIDTH);
            let sum: f64 =
                (0..6).map(|n| f64::from(reader.rows[n * WIDTH + i]) * f64::from(slopes[n * WIDTH + j])).sum();
            assert!((g - reader.share * sum).abs() < 1e-5 * (1.0 + sum.abs()), "{i} {j}: {g} for {sum}");
        }
        // A writer whose blocks are its columns is a reader of the transposed weight in the transposed basis.
        let writer = weight(12, 8, 4);
        let costs = vec![1.0; 8];
        let mut gradient = vec![0.0; WIDTH * WIDTH];
        writer.written(&single, WIDTH, &costs, Some(&mut gradient));
        let mut turned = vec![0.0_f32; 8 * WIDTH];
        let a = Matrix::new(&writer.rows, 8, WIDTH);
        multiply(&mut turned, Matrix::new(&single, WIDTH, WIDTH).t(), a.t(), false);
        let mut slopes = vec![0.0; turned.len()];
        writer.rounding.errors(&turned, 8, Some((&costs, &mut slopes)));
        for (at, g) in gradient.iter().enumerate() {
            let (i, j) = (at / WIDTH, at % WIDTH);
            let sum: f64 = (0..8).map(|n| f64::from(writer.rows[n * WIDTH + i]) * f64::from(slopes[j * 8 + n])).sum();
            assert!((g - writer.share * sum).abs() < 1e-5 * (1.0 + sum.abs()), "{i} {j}: {g} for {sum}");
        }
    }
}
