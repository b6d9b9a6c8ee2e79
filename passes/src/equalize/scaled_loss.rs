//! What factors of channels cost, from weights and moments alone.

use super::turned_loss::Weight;

/// What dividing the channels of a tensor by s, and multiplying the weights that read it by s, costs in shares of the power of what they
/// compute: what rounding those weights loses, and what the one range of all channels does where the tensor is rounded too.
///
/// ```text
/// Σ share · cost[j] / s[j]² · (Q(s[j] w[j]) − s[j] w[j])²  +  (2 ‖reach / s‖ / (levels − 1))² / 12 · Σ energy[j] s[j]²
/// ```
///
/// Factors do not mix channels: the pivot of a channel is divided by s² just as its power is, while channels keep their order.
#[derive(Debug)]
pub(super) struct ScaledLoss {
    /// The weights that read the tensor, undivided: as many numbers per row as it has channels.
    weights: Vec<Weight>,
    /// What an error in each channel of a weight costs, undivided.
    costs: Vec<f64>,
    range: Option<Range>,
}

/// A range for all channels.
#[derive(Debug)]
struct Range {
    /// The largest magnitude of every channel.
    reach: Vec<f64>,
    levels: f64,
    /// Σ share · w² of the weights that read a channel.
    energy: Vec<f64>,
}

/// The power of the norm that stands for the largest of all channels.
const PEAK: i32 = 16;

/// Squares of larger weights add up to infinity in f32, which would seem to be no error.
const LARGEST: f32 = 1e15;

impl ScaledLoss {
    /// For `weights` with what an error costs in every channel; where the tensor is rounded, with the largest magnitudes of its channels
    /// and the number of levels.
    pub(super) fn new(weights: Vec<Weight>, costs: Vec<f64>, rounded: Option<(&[f32], f64)>) -> Self {
        let range = rounded.map(|(peaks, levels)| {
            let mut energy = vec![0.0; costs.len()];
            for weight in &weights {
                for row in weight.rows.chunks_exact(costs.len().max(1)) {
                    energy.iter_mut().zip(row).for_each(|(e, w)| *e += weight.share * f64::from(*w).powi(2));
                }
            }
            Range { reach: peaks.iter().map(|p| f64::from(*p)).collect(), levels, energy }
        });
        Self { weights, costs, range }
    }

    /// How many channels there are.
    pub(super) fn width(&self) -> usize {
        self.costs.len()
    }

    /// The loss of dividing by `s`.
    pub(super) fn at(&self, s: &[f64]) -> f64 {
        let rounded: f64 = self.weights.iter().map(|weight| self.rounded(weight, s, (0, 1), None)).sum();
        rounded + self.range.as_ref().map_or(0.0, |range| range.at(s, None))
    }

    /// The derivatives by ln s, of every `stride`-th row of each weight from `first` on in the place of all.
    pub(super) fn gradient(&self, s: &[f64], first: usize, stride: usize) -> Vec<f64> {
        let mut gradient = vec![0.0; s.len()];
        for weight in &self.weights {
            self.rounded(weight, s, (first, stride), Some(&mut gradient));
        }
        if let Some(range) = &self.range {
            range.at(s, Some(&mut gradient));
        }
        gradient
    }

    /// What rounding some rows of `weight` loses, as if they were all; adds the derivatives to `gradient`.
    #[expect(clippy::cast_possible_truncation, reason = "rounded in f32")]
    fn rounded(
        &self,
        weight: &Weight,
        s: &[f64],
        (first, stride): (usize, usize),
        gradient: Option<&mut Vec<f64>>,
    ) -> f64 {
        let d = self.width().max(1);
        let all = weight.rows.len() / d;
        let stride = stride.clamp(1, all.max(1));
        let chosen = weight.rows.chunks_exact(d).skip(first % stride).step_by(stride);
        let scaled: Vec<f32> =
            chosen.flat_map(|row| row.iter().zip(s).map(|(w, s)| (f64::from(*w) * s) as f32)).collect();
        if scaled.iter().any(|w| w.abs() > LARGEST) {
            return f64::INFINITY;
        }
        let share = weight.share * all as f64 / (scaled.len() / d).max(1) as f64;
        let costs: Vec<f64> = self.costs.iter().zip(s).map(|(cost, s)| share * cost / (s * s)).collect();
        let mut slopes = vec![0.0; if gradient.is_some() { scaled.len() } else { 0 }];
        let told = gradient.is_some().then_some((costs.as_slice(), slopes.as_mut_slice()));
        let errors = weight.rounding.errors(&scaled, d, told);
        if let Some(gradient) = gradient {
            // Multiplied weights move by themselves as ln s does.
            for (slopes, row) in slopes.chunks_exact(d).zip(scaled.chunks_exact(d)) {
                for ((g, slope), w) in gradient.iter_mut().zip(slopes).zip(row) {
                    *g += f64::from(*slope) * f64::from(*w);
                }
            }
            gradient.iter_mut().zip(&costs).zip(&errors).for_each(|((g, cost), error)| *g -= 2.0 * cost * error);
        }
        costs.iter().zip(&errors).map(|(cost, error)| cost * error).sum()
    }
}

impl Range {
    /// What rounding in one range loses; adds the derivatives by ln s to `gradient`.
    fn at(&self, s: &[f64], gradient: Option<&mut Vec<f64>>) -> f64 {
        let reach = || self.reach.iter().zip(s).map(|(r, s)| r / s);
        let top = reach().fold(0.0, f64::max);
        if !top.is_normal() {
            return 0.0;
        }
        let norm = top * reach().map(|r| (r / top).powi(PEAK)).sum::<f64>().powf(1.0 / f64::from(PEAK));
        let noise = (2.0 * norm / (self.levels - 1.0).max(1.0)).powi(2) / 12.0;
        let through: f64 = self.energy.iter().zip(s).map(|(e, s)| e * s * s).sum();
        if let Some(gradient) = gradient {
            for (((g, r), e), s) in gradient.iter_mut().zip(reach()).zip(&self.energy).zip(s) {
                *g += 2.0 * noise * (e * s * s - (r / norm).powi(PEAK) * through);
            }
        }
        noise * through
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::orthogonal::tests::drawn;
    use super::super::rounding_loss::Rounding;
    use super::*;
    use crate::grid;

    pub(in super::super) const WIDTH: usize = 12;

    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    fn weight(draw: u64, rows: usize, block: usize) -> Weight {
        let rows = drawn(draw, rows * WIDTH).iter().map(|v| v.powi(3) as f32).collect();
        let rounding = Rounding { grid: grid::find("int3").unwrap(), block, negative: true, zero_points: false };
        Weight { rows, share: 0.01, rounding }
    }

    /// Two weights that read channels of which one is loud.
    pub(in super::super) fn loss(levels: Option<f64>) -> ScaledLoss {
        let costs = (0..WIDTH).map(|j| if j == 3 { 50.0 } else { 1.0 + j as f64 }).collect();
        let peaks: Vec<f32> = (0..WIDTH).map(|j| if j == 3 { 30.0 } else { 2.0 }).collect();
        let weights = vec![weight(1, 40, 4), weight(2, 24, 12)];
        ScaledLoss::new(weights, costs, levels.map(|levels| (peaks.as_slice(), levels)))
    }

    fn factors(draw: u64) -> Vec<f64> {
        drawn(draw, WIDTH).iter().map(|v| v.exp()).collect()
    }

    #[test]
    fn a_factor_for_all_channels_changes_nothing() {
        let loss = loss(Some(16.0));
        let s = factors(3);
        let twice: Vec<f64> = s.iter().map(|s| 2.0 * s).collect();
        assert!((loss.at(&s) / loss.at(&twice) - 1.0).abs() < 1e-6);
        let sum: f64 = loss.gradient(&s, 0, 1).iter().sum();
        let size: f64 = loss.gradient(&s, 0, 1).iter().map(|g| g.abs()).sum();
        assert!(sum.abs() < 1e-4 * size, "{sum} of {size}");
    }

    #[test]
    fn derivatives_of_the_range_are_those_of_central_differences() {
        let whole = loss(Some(16.0));
        let range = whole.range.as_ref().unwrap();
        let s = factors(4);
        let mut gradient = vec![0.0; WIDTH];
        range.at(&s, Some(&mut gradient));
        for (j, said) in gradient.iter().enumerate() {
            let along = |by: f64| {
                let moved: Vec<f64> =
                    s.iter().enumerate().map(|(i, s)| if i == j { s * by.exp() } else { *s }).collect();
                range.at(&moved, None)
            };
            let measured = (along(1e-5) - along(-1e-5)) / 2e-5;
            assert!((measured - said).abs() < 1e-6 * (1.0 + said.abs()), "{j}: {measured} for {said}");
        }
    }

    /// Where codes and scales stay, a weight in range has an error in units of its scale: only what costs move is left, and the weight
    /// that sets the scale of its block.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    fn derivatives_of_what_is_rounded_are_those_of_rounding_and_costs() {
        let loss = loss(None);
        let s = factors(5);
        let gradient = loss.gradient(&s, 0, 1);
        let mut expected = vec![0.0; WIDTH];
        for weight in &loss.weights {
            let scaled: Vec<f32> = weight
                .rows
                .chunks(WIDTH)
                .flat_map(|row| row.iter().zip(&s).map(|(w, s)| w * *s as f32).collect::<Vec<_>>())
                .collect();
            let costs: Vec<f64> = loss.costs.iter().zip(&s).map(|(c, s)| weight.share * c / (s * s)).collect();
            let mut slopes = vec![0.0; scaled.len()];
            let errors = weight.rounding.errors(&scaled, WIDTH, Some((&costs, &mut slopes)));
            for (at, slope) in slopes.iter().enumerate() {
                expected[at % WIDTH] += f64::from(slope * scaled[at]);
            }
            (0..WIDTH).for_each(|j| expected[j] -= 2.0 * costs[j] * errors[j]);
        }
        for (g, e) in gradient.iter().zip(&expected) {
            assert!((g - e).abs() < 1e-4 * (1.0 + e.abs()), "{g} for {e}");
        }
        assert!(gradient.iter().any(|g| g.abs() > 1e-4));
    }

    /// A weight of fewer rows than there are parts has each of its rows in several.
    #[test]
    fn rows_that_stand_for_all_say_on_average_what_all_do() {
        let few = ScaledLoss::new(vec![weight(1, 3, 4)], vec![1.0; WIDTH], None);
        for (loss, parts) in [(loss(None), 4), (few, 9)] {
            let s = factors(6);
            let whole = loss.gradient(&s, 0, 1);
            let mut mean = vec![0.0; WIDTH];
            for first in 0..parts {
                mean.iter_mut().zip(loss.gradient(&s, first, parts)).for_each(|(m, g)| *m += g / parts as f64);
            }
            assert!(whole.iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-6 * (1.0 + a.abs())), "{parts}: {mean:?}");
        }
    }

    #[test]
    fn factors_beyond_what_f32_holds_lose_everything() {
        let s: Vec<f64> = (0..WIDTH).map(|j| if j == 5 { 1e30 } else { 1.0 }).collect();
        assert!(loss(None).at(&s) == f64::INFINITY);
    }

    #[test]
    fn a_tensor_of_nothing_loses_nothing() {
        let silent = ScaledLoss::new(vec![weight(1, 4, 4)], vec![0.0; WIDTH], Some((&[0.0; WIDTH], 16.0)));
        let s = factors(7);
        assert!(silent.at(&s) == 0.0 && silent.gradient(&s, 0, 1).iter().all(|g| *g == 0.0));
    }
}
