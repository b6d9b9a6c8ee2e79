//! Moments of channels: what batch norms remember, what a batch of inputs has, and the gradient between them.

use crate::grad::{Array, GradError};
use crate::id::ValueId;
use crate::ir::Graph;

/// Channels of a smaller spread than this, of the largest one of their norm, count for nothing: training has let them die.
const DEAD: f32 = 1e-4;
/// A variance of less than this, of that of training, counts as this.
const LEAST: f64 = 1e-6;
/// Means that are further off than this, in spreads, pull no harder than from here.
const FAR: f64 = 1.0;

/// What a batch norm remembers of its result, channel by channel: mean β and spread |γ|·σ/√(σ² + ε).
#[derive(Clone, Debug)]
pub struct Remembered {
    /// Its result.
    pub(super) value: ValueId,
    pub(super) mean: Vec<f32>,
    /// 0 for channels that hardly ever change.
    pub(super) spread: Vec<f32>,
}

impl Remembered {
    /// The moments of all batch norms of `graph` that have learned, in the order of the graph.
    pub fn of(graph: &Graph) -> Vec<Self> {
        let one = |node: &crate::ir::Node| {
            let row = |input| Some(graph.constant_input(node, input)?.floats()?.into_owned());
            let (gamma, mean, variance) = (row(1)?, row(2)?, row(4)?);
            let epsilon = node.float("epsilon", 1e-5);
            let learned =
                node.int("training_mode", 0) == 0 && gamma.len() == mean.len() && gamma.len() == variance.len();
            let spread = |(gamma, variance): (&f32, &f32)| {
                let share = (variance / (variance + epsilon)).max(0.0).sqrt();
                Some(gamma.abs() * share).filter(|spread| spread.is_finite()).unwrap_or(0.0)
            };
            let mut spread: Vec<f32> = gamma.iter().zip(&variance).map(spread).collect();
            let largest = spread.iter().copied().fold(0.0, f32::max);
            spread.iter_mut().filter(|spread| **spread < DEAD * largest).for_each(|spread| *spread = 0.0);
            (learned && mean.iter().all(|m| m.is_finite())).then_some(Self { value: node.output(0)?, mean, spread })
        };
        graph.nodes().filter(|(_, node)| node.op.is("BatchNormalization")).filter_map(|(_, node)| one(node)).collect()
    }

    /// How many channels count.
    fn alive(&self) -> usize {
        self.spread.iter().filter(|spread| **spread > 0.0).count()
    }
}

/// Sums over a tensor whose axis 1 are channels, of what lies so many spreads from the mean.
#[derive(Clone, Debug)]
struct Sums {
    first: Vec<f64>,
    second: Vec<f64>,
    /// Elements per channel.
    count: usize,
}

/// The moments that inputs have at all batch norms.
#[derive(Clone, Debug)]
pub(super) struct Moments(Vec<Sums>);

impl Moments {
    /// Of no input, at `norms`.
    pub(super) fn none(norms: &[Remembered]) -> Self {
        let none = |norm: &Remembered| {
            let zeros = vec![0.0; norm.mean.len()];
            Sums { first: zeros.clone(), second: zeros, count: 0 }
        };
        Self(norms.iter().map(none).collect())
    }

    /// Takes in `value`, what norm number `at` returns for an input.
    pub(super) fn see(&mut self, at: usize, norm: &Remembered, value: &Array<f32>) -> Result<(), GradError> {
        let (channels, plane) = layout(norm, value.shape())?;
        let sums = &mut self.0[at];
        for (part, numbers) in planes(value, plane)?.enumerate() {
            let c = part % channels;
            if norm.spread[c] > 0.0 {
                let (mut first, mut second) = (0.0_f64, 0.0_f64);
                for z in numbers {
                    let u = f64::from((z - norm.mean[c]) / norm.spread[c]);
                    first += u;
                    second += u * u;
                }
                sums.first[c] += first;
                sums.second[c] += second;
            }
        }
        sums.count += value.len() / channels;
        Ok(())
    }

    /// Takes in what `other` has seen.
    pub(super) fn add(&mut self, other: &Self) {
        for (sums, other) in self.0.iter_mut().zip(&other.0) {
            sums.first.iter_mut().zip(&other.first).for_each(|(sum, x)| *sum += x);
            sums.second.iter_mut().zip(&other.second).for_each(|(sum, x)| *sum += x);
            sums.count += other.count;
        }
    }

    /// Mean, in spreads, and variance over that of training, of channel `c` at norm `at`.
    fn channel(&self, at: usize, c: usize) -> (f64, f64) {
        let sums = &self.0[at];
        let n = sums.count.max(1) as f64;
        let mean = sums.first[c] / n;
        (mean, (sums.second[c] / n - mean * mean).max(LEAST))
    }

    /// How far these moments are from those that `norms` remember: per channel the squared mean (linear from [`FAR`] on) and the
    /// squared logarithm of the spread, mean over channels, sum over norms.
    pub(super) fn loss(&self, norms: &[Remembered]) -> f64 {
        let of_norm = |(at, norm): (usize, &Remembered)| {
            let alive = (0..norm.mean.len()).filter(|c| norm.spread[*c] > 0.0);
            let of_channel = |c| {
                let (mean, variance) = self.channel(at, c);
                let off = if mean.abs() <= FAR { mean * mean } else { FAR * (2.0 * mean.abs() - FAR) };
                off + (0.5 * variance.ln()).powi(2)
            };
            alive.map(of_channel).sum::<f64>() / norm.alive().max(1) as f64
        };
        norms.iter().enumerate().map(of_norm).sum()
    }

    /// The gradient of the loss by `value`, what norm number `at` returns for one of the inputs that these moments are of.
    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    pub(super) fn gradient(&self, at: usize, norm: &Remembered, value: &Array<f32>) -> Result<Array<f32>, GradError> {
        let (channels, plane) = layout(norm, value.shape())?;
        let share = 1.0 / (norm.alive().max(1) as f64 * self.0[at].count.max(1) as f64);
        let mut out = Vec::with_capacity(value.len());
        for (part, numbers) in planes(value, plane)?.enumerate() {
            let c = part % channels;
            let spread = norm.spread[c];
            if spread > 0.0 {
                let (mean, variance) = self.channel(at, c);
                let unit = share / f64::from(spread);
                let steep = if variance > LEAST { variance.ln() / variance } else { 0.0 };
                // By u: 2·mean + (ln v / v)·(u − mean); u = (z − β) / spread.
                let (slope, base) = (unit * steep, unit * (2.0 * mean.clamp(-FAR, FAR) - steep * mean));
                let (slope, base) = ((slope / f64::from(spread)) as f32, base as f32);
                out.extend(numbers.iter().map(|z| base + slope * (z - norm.mean[c])));
            } else {
                out.extend(std::iter::repeat_n(0.0, numbers.len()));
            }
        }
        let out = ndarray::ArrayD::from_shape_vec(value.shape(), out);
        out.map(ndarray::ArrayBase::into_shared).map_err(|error| GradError(error.to_string()))
    }
}

/// How many channels a tensor of `shape` has, and how many neighboring elements belong to one.
fn layout(norm: &Remembered, shape: &[usize]) -> Result<(usize, usize), GradError> {
    let channels = norm.mean.len();
    if shape.get(1) != Some(&channels) || channels == 0 {
        return Err(GradError(format!("a batch norm of {channels} channels returns {shape:?}")));
    }
    Ok((channels, shape[2..].iter().product()))
}

/// The elements of `value`, so many at a time.
fn planes(value: &Array<f32>, plane: usize) -> Result<std::slice::Chunks<'_, f32>, GradError> {
    let numbers = value.as_slice().ok_or_else(|| GradError("a bug in onnx-quant: a tensor in pieces".into()))?;
    Ok(numbers.chunks(plane.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm() -> Remembered {
        let value = crate::text::parse("graph (%x: f32[1]) -> (%x) {\n}").unwrap().graph().inputs()[0];
        Remembered { value, mean: vec![0.5, -1.0, 2.0], spread: vec![2.0, 0.0, 0.25] }
    }

    fn drawn(seed: u64, shape: &[usize]) -> Array<f32> {
        let n: usize = shape.iter().product();
        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        let numbers = (0..n as u64).map(|i| 4.0 * crate::seed::uniform(seed << 20 | i) as f32 - 1.0).collect();
        ndarray::ArrayD::from_shape_vec(shape, numbers).unwrap().into_shared()
    }

    fn moments(values: &[Array<f32>]) -> Moments {
        let mut moments = Moments::none(&[norm()]);
        values.iter().for_each(|value| moments.see(0, &norm(), value).unwrap());
        moments
    }

    #[test]
    fn gradients_are_those_of_the_loss() {
        for seed in 0..10 {
            let mut values = [drawn(2 * seed, &[1, 3, 4, 2]), drawn(2 * seed + 1, &[1, 3, 4, 2])];
            let gradient = moments(&values).gradient(0, &norm(), &values[1]).unwrap();
            for i in 0..24 {
                let at = [0, i / 8, i % 8 / 2, i % 2];
                let mut loss = |by: f32| {
                    values[1][&at[..]] += by;
                    let loss = moments(&values).loss(&[norm()]);
                    values[1][&at[..]] -= by;
                    loss
                };
                let slope = (loss(1e-3) - loss(-1e-3)) / 2e-3;
                let got = f64::from(gradient[&at[..]]);
                assert!((slope - got).abs() < 1e-3 * (1.0 + slope.abs()), "{seed} {i}: {slope} {got}");
            }
        }
    }

    #[test]
    fn inputs_with_the_moments_of_training_lose_nothing() {
        let numbers: Vec<f32> = [(0.5, 2.0), (-1.0, 0.0), (2.0, 0.25_f32)]
            .iter()
            .flat_map(|(mean, spread)| [-1.0, 1.0].map(|u| mean + spread * u))
            .collect();
        let value = ndarray::ArrayD::from_shape_vec(vec![1, 3, 2], numbers).unwrap().into_shared();
        let moments = moments(std::slice::from_ref(&value));
        assert!(moments.loss(&[norm()]) < 1e-12);
        assert!(moments.gradient(0, &norm(), &value).unwrap().iter().all(|g| g.abs() < 1e-6));
        assert!(self::moments(&[(&value + 1.0).into_shared()]).loss(&[norm()]) > 1.0);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut moments = Moments::none(&[norm()]);
        for shape in [&[1, 4, 2][..], &[3], &[]] {
            assert!(moments.see(0, &norm(), &drawn(1, shape)).is_err(), "{shape:?}");
        }
    }
}
