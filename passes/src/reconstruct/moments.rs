//! How far what a group of samples gives is from what batch normalization saw in training, channel by channel.
//!
//! Source: Liu et al. 2023 (PD-Quant), arXiv:2212.07048, section 3.4; over groups, and in units of the deviations of training, ours.

use crate::grad::{Array, GradError};
use crate::model::Trained;

/// Deviations count as at least this share of the root mean square of all of a tensor.
const LEAST: f64 = 0.1;

/// Sums over a group, channel by channel.
#[derive(Clone, Debug, Default)]
pub(super) struct Moments {
    sums: Vec<f64>,
    squares: Vec<f64>,
    count: f64,
}

/// The values of a tensor of `channels` along its second axis, in runs of one channel each.
fn runs(array: &Array<f32>, channels: usize) -> Result<(Vec<f32>, usize), GradError> {
    let shape = array.shape();
    if shape.get(1) != Some(&channels) {
        return Err(GradError(format!("a tensor of shape {shape:?} does not have {channels} channels")));
    }
    Ok((array.iter().copied().collect(), shape[2..].iter().product::<usize>().max(1)))
}

impl Moments {
    pub(super) fn of(array: &Array<f32>, channels: usize) -> Result<Self, GradError> {
        let (values, width) = runs(array, channels)?;
        let mut all = Self { sums: vec![0.0; channels], squares: vec![0.0; channels], count: 0.0 };
        for (at, run) in values.chunks_exact(width).enumerate() {
            all.sums[at % channels] += run.iter().map(|v| f64::from(*v)).sum::<f64>();
            all.squares[at % channels] += run.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        }
        all.count = (values.len() / channels.max(1)) as f64;
        Ok(all)
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.sums.resize(other.sums.len(), 0.0);
        self.squares.resize(other.squares.len(), 0.0);
        self.sums.iter_mut().zip(&other.sums).for_each(|(sum, other)| *sum += other);
        self.squares.iter_mut().zip(&other.squares).for_each(|(sum, other)| *sum += other);
        self.count += other.count;
    }

    /// Mean and deviation of channel `c`.
    fn channel(&self, c: usize) -> (f64, f64) {
        let mean = self.sums[c] / self.count.max(1.0);
        (mean, (self.squares[c] / self.count.max(1.0) - mean * mean).max(0.0).sqrt())
    }
}

/// What deviations of `trained` count as.
fn units(trained: &Trained) -> Vec<f64> {
    let deviations = || trained.deviation.iter().map(|d| f64::from(*d));
    let power = deviations().map(|d| d * d).sum::<f64>() / trained.deviation.len().max(1) as f64;
    deviations().map(|d| d.max(LEAST * power.sqrt()).max(1e-12)).collect()
}

/// How far `moments` are from those of training.
pub(super) fn distance(trained: &Trained, moments: &Moments) -> f64 {
    let of = |(c, unit): (usize, f64)| {
        let (mean, deviation) = moments.channel(c);
        let apart = (mean - f64::from(trained.mean[c]), deviation - f64::from(trained.deviation[c]));
        (apart.0 / unit).powi(2) + (apart.1 / unit).powi(2)
    };
    units(trained).into_iter().enumerate().map(of).sum::<f64>() / trained.mean.len().max(1) as f64
}

/// The gradient of [`distance`] by `array`, a part of what `moments` are of.
#[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
pub(super) fn gradient(trained: &Trained, moments: &Moments, array: &Array<f32>) -> Result<Array<f32>, GradError> {
    let channels = trained.mean.len();
    let (mut values, width) = runs(array, channels)?;
    let share = 2.0 / (channels.max(1) as f64 * moments.count.max(1.0));
    let of = |(c, unit): (usize, f64)| {
        let (mean, deviation) = moments.channel(c);
        let by_mean = share * (mean - f64::from(trained.mean[c])) / (unit * unit);
        let by_deviation = share * (deviation - f64::from(trained.deviation[c])) / (unit * unit);
        // ds / da = (a − m) / (N s); what does not vary has no direction.
        (mean, by_mean, if deviation > 1e-6 * unit { by_deviation / deviation } else { 0.0 })
    };
    let factors: Vec<(f64, f64, f64)> = units(trained).into_iter().enumerate().map(of).collect();
    for (at, run) in values.chunks_exact_mut(width).enumerate() {
        let (mean, by_mean, by_spread) = factors[at % channels];
        run.iter_mut().for_each(|v| *v = (by_mean + by_spread * (f64::from(*v) - mean)) as f32);
    }
    Array::from_shape_vec(array.raw_dim(), values).map_err(|error| GradError(error.to_string()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    pub(in crate::reconstruct) fn drawn(seed: u64, shape: &[usize]) -> Array<f32> {
        let draw = |at: usize| (2.0 * uniform(mixed(seed) ^ at as u64) - 0.7) as f32;
        Array::from_shape_vec(shape.to_vec(), (0..shape.iter().product()).map(draw).collect()).unwrap()
    }

    pub(in crate::reconstruct) fn trained() -> Trained {
        Trained { mean: vec![0.4, -0.3, 0.1].into(), deviation: vec![0.9, 0.2, 0.6].into() }
    }

    /// Central differences of the distance of a group of two tensors.
    #[test]
    fn gradients_are_those_of_the_distance() {
        let trained = trained();
        let mut arrays = [drawn(1, &[1, 3, 4, 2]), drawn(2, &[1, 3, 4, 2])];
        let moments = |arrays: &[Array<f32>]| {
            let mut all = Moments::default();
            arrays.iter().for_each(|array| all.add(&Moments::of(array, 3).unwrap()));
            all
        };
        let got = gradient(&trained, &moments(&arrays), &arrays[1]).unwrap();
        let got: Vec<f32> = got.iter().copied().collect();
        for (i, g) in got.into_iter().enumerate() {
            let mut at = |by: f32| {
                *arrays[1].iter_mut().nth(i).unwrap() += by;
                distance(&trained, &moments(&arrays))
            };
            let (above, below) = (at(0.01), at(-0.02));
            at(0.01);
            let want = (above - below) / 0.02;
            assert!((f64::from(g) - want).abs() < 1e-3 * (0.1 + want.abs()), "{i}: {g} {want}");
        }
        assert!(Moments::of(&arrays[0], 4).is_err(), "other channels");
    }
}
