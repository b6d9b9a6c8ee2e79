//! How far an output is from its target.

use super::channels;
use super::samples::Sample;
use super::softmax::Softmax;
use crate::grad::{Array, GradError};
use crate::seed;
use crate::simd::vectorized;

pub(super) use super::losses::{Kind, LOSSES, Wish};

/// One output.
#[derive(Clone, Copy, Debug)]
pub(super) enum Measure {
    /// Σ (z − t)² over the mean square of all targets.
    Square(f64),
    /// The same over the mean square of each row, which is at least this.
    Rows(f64),
    /// Σ w (z − t)² over this: the mean square of all targets times the mean weight.
    Weighed(f64),
    /// How far means and variances of channels are apart, in units of this power.
    Channels(f64),
    /// As [`Self::Rows`], and twice the length of each row times Σ p ln (p / q) of the softmax of rows over their root mean square.
    Hidden(f64),
    /// Σ p ln (p / q) of the softmax of each row.
    Divergence,
    /// Σ p ln (p / q) − p + q of each row, which need not sum to 1 once it is in codes.
    OfProbabilities,
}

/// A probability is held for no less than this: one in codes may be 0.
const LEAST: f32 = 1e-6;

/// A row is worth no more than one of this share of the usual mean square.
const FLOOR: f64 = 1e-4;

impl Measure {
    /// The measure of an `output` of this `kind`.
    pub(super) fn of(wish: Wish, samples: &[Sample], output: usize, kind: Kind) -> Self {
        let rank = samples.first().map_or(0, |sample| sample.targets[output].ndim());
        // One number is no distribution.
        let classes = samples.first().and_then(|sample| sample.targets[output].shape().last().copied()).unwrap_or(0);
        // Of more dimensions it is not known which one classes lie along.
        let kind = if classes > 1 && matches!(rank, 2 | 3) { kind } else { Kind::Numbers };
        let power = power(samples, output);
        match wish {
            _ if kind == Kind::Logits => Self::Divergence,
            _ if kind == Kind::Probabilities && samples.iter().all(|sample| sums_to_one(sample, output)) => {
                Self::OfProbabilities
            }
            Wish::Fisher | Wish::FisherEach => {
                Self::Weighed((power * mean_weight(samples, output)).max(f64::MIN_POSITIVE))
            }
            Wish::Channels => Self::Channels(power),
            Wish::Hidden if classes > 1 && matches!(rank, 2 | 3) => Self::Hidden(power * FLOOR),
            _ if rank == 3 => Self::Rows(power * FLOOR),
            _ => Self::Square(power),
        }
    }

    /// Whether a row has one error, instead of one for each number.
    fn counts_rows(self) -> bool {
        matches!(self, Self::Divergence | Self::OfProbabilities)
    }

    /// How many errors an output of `shape` has.
    pub(super) fn count(self, shape: &[usize]) -> usize {
        let all: usize = shape.iter().product();
        if matches!(self, Self::Channels(_)) {
            return channels::count(shape);
        }
        if self.counts_rows() { all / shape.last().copied().unwrap_or(1).max(1) } else { all }
    }

    /// Error over signal, as a sum and a count, of `got` for `sample`.
    pub(super) fn error(
        self,
        sample: &Sample,
        output: usize,
        got: Option<&Array<f32>>,
    ) -> Result<(f64, usize), GradError> {
        let mut sum = (0.0, 0);
        let weights = sample.weights(output);
        let place = (sample.targets[output].shape(), sample.words[output].as_deref());
        self.each_row(sample, output, got, |target, got, range| {
            if let Self::Channels(power) = self {
                sum = (channels::error(target, got, place, power), channels::count(place.0));
                return;
            }
            sum.0 += self.row_error(target, got, weights.get(range).unwrap_or_default());
            sum.1 += if self.counts_rows() { 1 } else { got.len() };
        })?;
        Ok(sum)
    }

    /// Half the gradient of the sum of errors by `got`.
    pub(super) fn gradient(
        self,
        sample: &Sample,
        output: usize,
        got: Option<&Array<f32>>,
    ) -> Result<Array<f32>, GradError> {
        let shape = sample.targets[output].raw_dim();
        let mut grad = vec![0.0; sample.targets[output].len()];
        let weights = sample.weights(output);
        let place = (sample.targets[output].shape(), sample.words[output].as_deref());
        self.each_row(sample, output, got, |target, got, range| {
            if let Self::Channels(power) = self {
                channels::gradient(target, got, place, power, &mut grad[range]);
                return;
            }
            let weights = weights.get(range.clone()).unwrap_or_default();
            self.row_gradient(target, got, weights, &mut grad[range]);
        })?;
        Array::from_shape_vec(shape, grad).map_err(|error| GradError(error.to_string()))
    }

    /// A gradient g drawn at random, with the mean over draws of (g · e)² the mean error that a small change e of `got` makes: for logits
    /// g = √q ∘ r − q (√q · r), whose second moment is diag(q) − q qᵀ, for probabilities r / √q, for squares r alone, with random signs r.
    pub(super) fn drawn(
        self,
        sample: &Sample,
        output: usize,
        got: Option<&Array<f32>>,
        seed: u64,
    ) -> Result<Array<f32>, GradError> {
        let shape = sample.targets[output].raw_dim();
        let mut grad = vec![0.0; sample.targets[output].len()];
        let mut errors = 0;
        self.each_row(sample, output, got, |target, got, range| {
            errors += if self.counts_rows() { 1 } else { got.len() };
            let start = range.start as u64;
            let weights = sample.weights(output).get(range.clone()).unwrap_or_default();
            let grad = &mut grad[range];
            self.row_drawn(target, got, grad, |at| seed::uniform(seed ^ seed::mixed(start + at as u64)));
            if matches!(self, Self::Weighed(_)) {
                grad.iter_mut().zip(weights).for_each(|(g, w)| *g *= w.sqrt());
            }
        })?;
        let share = 1.0 / (errors.max(1) as f32).sqrt();
        grad.iter_mut().for_each(|g| *g *= share);
        Array::from_shape_vec(shape, grad).map_err(|error| GradError(error.to_string()))
    }

    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    fn row_drawn(self, target: &[f32], got: &[f32], grad: &mut [f32], draw: impl Fn(usize) -> f64) {
        let mut signs = |power: f64| {
            let size = power.sqrt().recip() as f32;
            grad.iter_mut().enumerate().for_each(|(at, g)| *g = if draw(at) < 0.5 { -size } else { size });
        };
        match self {
            // Nothing is drawn where errors are means of many numbers, or compared twice: both are about blocks, and gradients of outputs.
            Self::Square(power) | Self::Weighed(power) | Self::Channels(power) => signs(power),
            Self::Rows(floor) | Self::Hidden(floor) => signs(mean_square(target).max(floor)),
            Self::OfProbabilities => {
                for (at, (g, q)) in grad.iter_mut().zip(got).enumerate() {
                    // Half of the square is the divergence.
                    let size = (2.0 * q.max(LEAST)).sqrt().recip();
                    *g = if draw(at) < 0.5 { -size } else { size };
                }
            }
            Self::Divergence => {
                let q = Softmax::of(got);
                let mut sum = 0.0;
                for (at, (g, e)) in grad.iter_mut().zip(&q.exp).enumerate() {
                    let root = (f64::from(*e) / q.sum).sqrt();
                    let signed = if draw(at) < 0.5 { -root } else { root };
                    sum += signed;
                    *g = signed as f32;
                }
                // Half of the square is the divergence.
                let half = std::f64::consts::FRAC_1_SQRT_2;
                for (g, e) in grad.iter_mut().zip(&q.exp) {
                    *g = (half * (f64::from(*g) - f64::from(*e) / q.sum * sum)) as f32;
                }
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    fn row_gradient(self, target: &[f32], got: &[f32], weights: &[f32], grad: &mut [f32]) {
        let mut plain = |power: f64| {
            let factor = (1.0 / power) as f32;
            grad.iter_mut().zip(got.iter().zip(target)).for_each(|(g, (q, t))| *g = (q - t) * factor);
        };
        match self {
            Self::Square(power) => plain(power),
            Self::Rows(floor) => plain(mean_square(target).max(floor)),
            Self::Hidden(floor) => {
                let power = mean_square(target).max(floor);
                plain(power);
                let (target, got) = (over_root(target, power), over_root(got, power));
                let mut of_softmax = vec![0.0; grad.len()];
                Self::Divergence.row_gradient(&target, &got, &[], &mut of_softmax);
                let share = (2.0 * grad.len() as f64 / power.sqrt()) as f32;
                grad.iter_mut().zip(of_softmax).for_each(|(g, own)| *g += share * own);
            }
            // Not by rows: see `gradient`.
            Self::Channels(_) => {}
            Self::Weighed(power) => {
                // Weights may be far from 1, all of them.
                let pairs = got.iter().zip(target).zip(weights);
                grad.iter_mut().zip(pairs).for_each(|(g, ((q, t), w))| *g = (q - t) * (f64::from(*w) / power) as f32);
            }
            Self::OfProbabilities => {
                let pairs = got.iter().zip(target);
                grad.iter_mut().zip(pairs).for_each(|(g, (q, p))| *g = 0.5 * (1.0 - p.max(LEAST) / q.max(LEAST)));
            }
            Self::Divergence => {
                let (p, q) = (Softmax::of(target), Softmax::of(got));
                let (of_p, of_q) = ((0.5 / p.sum) as f32, (0.5 / q.sum) as f32);
                vectorized(|| {
                    grad.iter_mut().zip(q.exp.iter().zip(&p.exp)).for_each(|(g, (q, p))| *g = q * of_q - p * of_p);
                });
            }
        }
    }

    fn row_error(self, target: &[f32], got: &[f32], weights: &[f32]) -> f64 {
        let square = || got.iter().zip(target).map(|(q, t)| f64::from(q - t) * f64::from(q - t)).sum::<f64>();
        match self {
            Self::Square(power) => square() / power,
            Self::Rows(floor) => square() / mean_square(target).max(floor),
            Self::Hidden(floor) => {
                // Of small errors e that do not depend on p, the divergence is half the mean of e².
                let power = mean_square(target).max(floor);
                let (of_target, of_got) = (over_root(target, power), over_root(got, power));
                square() / power + 2.0 * target.len() as f64 * Self::Divergence.row_error(&of_target, &of_got, &[])
            }
            // Not by rows: see `error`.
            Self::Channels(_) => 0.0,
            Self::Weighed(power) => {
                let squares = got.iter().zip(target).zip(weights);
                squares.map(|((q, t), w)| f64::from(*w) * f64::from(q - t) * f64::from(q - t)).sum::<f64>() / power
            }
            Self::OfProbabilities => {
                let term = |(q, p): (&f32, &f32)| {
                    let (p, q) = (f64::from(p.max(LEAST)), f64::from(q.max(LEAST)));
                    p * (p / q).ln() - p + q
                };
                got.iter().zip(target).map(term).sum::<f64>().max(0.0)
            }
            Self::Divergence => {
                // Σ p (ln p − ln q), with both logarithms as the logits have them.
                let (p, q) = (Softmax::of(target), Softmax::of(got));
                let apart = |((t, z), e): ((&f32, &f32), &f32)| f64::from(*e) * f64::from((t - p.top) - (z - q.top));
                let terms = target.iter().zip(got).zip(&p.exp).filter(|(_, e)| **e > 0.0).map(apart);
                (terms.sum::<f64>() / p.sum - p.sum.ln() + q.sum.ln()).max(0.0)
            }
        }
    }

    /// Shows the rows that are no padding, with where they lie; all in one where rows play no part.
    fn each_row(
        self,
        sample: &Sample,
        output: usize,
        got: Option<&Array<f32>>,
        mut see: impl FnMut(&[f32], &[f32], std::ops::Range<usize>),
    ) -> Result<(), GradError> {
        let target = &sample.targets[output];
        let fits = got.filter(|got| got.shape() == target.shape());
        let Some(got) = fits else {
            return Err(GradError(format!("a result does not have the shape {:?} of its target", target.shape())));
        };
        let (got, target) = (got.as_standard_layout(), target.as_standard_layout());
        let (Some(got), Some(target)) = (got.as_slice(), target.as_slice()) else {
            return Err(GradError("a bug in onnx-quant: a copy is not contiguous".into()));
        };
        if matches!(self, Self::Weighed(_)) && sample.weights(output).len() != target.len() {
            return Err(GradError("a bug in onnx-quant: errors do not have a weight each".into()));
        }
        let last = sample.targets[output].shape().last().copied().unwrap_or(1).max(1);
        let words = sample.words[output].as_deref().filter(|_| !matches!(self, Self::Channels(_)));
        let width = match (words, self) {
            (Some(words), _) => (target.len() / words.len().max(1)).max(1),
            (None, Self::Square(_) | Self::Weighed(_) | Self::Channels(_)) => target.len().max(1),
            (None, _) => last,
        };
        for (at, (target, got)) in target.chunks_exact(width).zip(got.chunks_exact(width)).enumerate() {
            if words.is_none_or(|words| words.get(at).copied().unwrap_or(true)) {
                see(target, got, at * width..(at + 1) * width);
            }
        }
        Ok(())
    }
}

/// Whether every row of what the float model returned is a distribution.
fn sums_to_one(sample: &Sample, output: usize) -> bool {
    let rows = sample.targets[output].rows();
    rows.into_iter().all(|row| row.iter().all(|p| *p >= 0.0) && (row.sum() - 1.0).abs() < 1e-3)
}

/// `row` over the root of `power`.
#[expect(clippy::cast_possible_truncation, reason = "a factor in f32")]
fn over_root(row: &[f32], power: f64) -> Vec<f32> {
    let by = power.sqrt().recip() as f32;
    row.iter().map(|v| v * by).collect()
}

fn mean_square(row: &[f32]) -> f64 {
    row.iter().map(|z| f64::from(*z) * f64::from(*z)).sum::<f64>() / row.len().max(1) as f64
}

/// Σ z² of an output over all samples, per element that counts.
fn power(samples: &[Sample], output: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0_usize);
    for sample in samples {
        let target: Vec<f32> = sample.targets[output].iter().copied().collect();
        sample.rows(output, &target, |row| {
            sum += row.iter().map(|z| f64::from(*z) * f64::from(*z)).sum::<f64>();
            count += row.len();
        });
    }
    (sum / count.max(1) as f64).max(1e-30)
}

/// The mean weight of an output over all samples, of the elements that count.
fn mean_weight(samples: &[Sample], output: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0_usize);
    for sample in samples {
        sample.rows(output, sample.weights(output), |row| {
            sum += row.iter().map(|w| f64::from(*w)).sum::<f64>();
            count += row.len();
        });
    }
    (sum / count.max(1) as f64).max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWN: [Measure; 4] = [Measure::Square(1.7), Measure::Rows(1e-9), Measure::Weighed(0.8), Measure::Divergence];

    /// Central differences of the summed error.
    #[test]
    fn gradients_are_those_of_the_errors() {
        let target = Array::from_shape_vec(vec![1, 2, 3], vec![0.3, -1.2, 0.7, 2.0, 0.1, -0.4]).unwrap();
        let weights = vec![vec![0.5, 2.0, 0.0, 1.0, 0.25, 3.0]];
        let sample = Sample { feeds: Vec::new(), targets: vec![target], words: vec![None], weights };
        let got = vec![0.1_f32, -1.0, 0.9, 1.5, 0.4, -0.1];
        for measure in DRAWN.into_iter().chain([Measure::Channels(1.7), Measure::Hidden(1e-9)]) {
            let shaped = |values: Vec<f32>| Array::from_shape_vec(vec![1, 2, 3], values).unwrap();
            let gradient = measure.gradient(&sample, 0, Some(&shaped(got.clone()))).unwrap();
            for (i, g) in gradient.iter().enumerate() {
                let error = |by: f32| {
                    let mut moved = got.clone();
                    moved[i] += by;
                    measure.error(&sample, 0, Some(&shaped(moved))).unwrap().0
                };
                let want = (error(0.01) - error(-0.01)) / 0.04;
                assert!((f64::from(*g) - want).abs() < 1e-3, "{measure:?} {i}: {g} {want}");
            }
        }
    }

    #[test]
    fn gradients_that_are_drawn_tell_the_errors_of_small_changes() {
        let of = |values: &[f32]| Array::from_shape_vec(vec![1, 2, 3], values.to_vec()).unwrap();
        let target = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4];
        let change = [0.01, -0.02, 0.015, 0.0, 0.03, -0.01];
        let moved: Vec<f32> = target.iter().zip(&change).map(|(t, c)| t + c).collect();
        let weights = vec![vec![0.5, 2.0, 0.0, 1.0, 0.25, 3.0]];
        let sample = Sample { feeds: Vec::new(), targets: vec![of(&target)], words: vec![None], weights };
        for measure in DRAWN {
            let (sum, count) = measure.error(&sample, 0, Some(&of(&moved))).unwrap();
            let draws = 4000_u64;
            let square = |seed: u64| {
                let g = measure.drawn(&sample, 0, Some(&of(&target)), seed::mixed(seed)).unwrap();
                g.iter().zip(&change).map(|(g, c)| f64::from(g * c)).sum::<f64>().powi(2)
            };
            let mean = (0..draws).map(square).sum::<f64>() / draws as f64;
            let want = sum / count as f64;
            assert!((mean / want - 1.0).abs() < 0.1, "{measure:?}: {mean} {want}");
        }
    }

    /// Softmax of `logits`, in rows of three.
    #[expect(clippy::cast_possible_truncation, reason = "probabilities as a model returns them")]
    fn softmax(logits: &[f32]) -> Array<f32> {
        let rows = logits.chunks(3).flat_map(|row| {
            let q = Softmax::of(row);
            q.exp.iter().map(|e| e / q.sum as f32).collect::<Vec<_>>()
        });
        Array::from_shape_vec(vec![1, logits.len() / 3, 3], rows.collect()).unwrap()
    }

    /// Behind a softmax and before it, the same is lost; and gradients are those of the loss.
    #[test]
    fn probabilities_lose_what_their_logits_do() {
        let (target, got) = ([0.3, -1.2, 0.7, 2.0, 0.1, -0.4], [0.1_f32, -1.0, 0.9, 1.5, 0.4, -0.1]);
        let sample =
            |target| Sample { feeds: Vec::new(), targets: vec![target], words: vec![None], weights: vec![Vec::new()] };
        let (p, q) = (softmax(&target), softmax(&got));
        let of_p = sample(p.clone());
        let raw = |values: &[f32]| Array::from_shape_vec(vec![1, 2, 3], values.to_vec()).unwrap();
        let measure = Measure::of(Wish::Fitting, std::slice::from_ref(&of_p), 0, Kind::Probabilities);
        let error = |q: &Array<f32>| measure.error(&of_p, 0, Some(q)).unwrap();
        let of_logits = Measure::Divergence.error(&sample(raw(&target)), 0, Some(&raw(&got))).unwrap();
        assert!(
            (error(&q).0 - of_logits.0).abs() < 1e-6 && error(&q).1 == of_logits.1,
            "{:?} {of_logits:?}",
            error(&q)
        );
        assert!(error(&p).0.abs() < 1e-9);
        let gradient = measure.gradient(&of_p, 0, Some(&q)).unwrap();
        for (i, g) in gradient.iter().enumerate() {
            let moved = |by: f32| {
                let mut moved: Vec<f32> = q.iter().copied().collect();
                moved[i] += by;
                error(&raw(&moved)).0
            };
            let want = (moved(1e-3) - moved(-1e-3)) / 4e-3;
            assert!((f64::from(*g) - want).abs() < 1e-3, "{i}: {g} {want}");
        }
        // In codes one may be 0, and rows need not sum to 1.
        let in_codes = raw(&[0.0, 0.2, 0.7, 1.0, 0.0, 0.0]);
        let lost = error(&in_codes).0;
        assert!(lost > 0.0 && lost.is_finite(), "{lost}");
        // What is not a distribution is none.
        let numbers = sample(raw(&[0.5, 0.2, 0.2, 1.0, 0.0, 0.0]));
        let measure = Measure::of(Wish::Fitting, &[numbers], 0, Kind::Probabilities);
        assert!(matches!(measure, Measure::Rows(_)), "{measure:?}");
    }

    #[test]
    fn gradients_drawn_of_probabilities_tell_small_changes() {
        let p = softmax(&[0.3, -1.2, 0.7, 2.0, 0.1, -0.4]);
        let change = [0.001, -0.002, 0.001, 0.0005, 0.002, -0.0025];
        let shape = |values: Vec<f32>| Array::from_shape_vec(vec![1, 2, 3], values).unwrap();
        let moved = shape(p.iter().zip(&change).map(|(p, c)| p + c).collect());
        let sample =
            Sample { feeds: Vec::new(), targets: vec![p.clone()], words: vec![None], weights: vec![Vec::new()] };
        let measure = Measure::OfProbabilities;
        let (sum, count) = measure.error(&sample, 0, Some(&moved)).unwrap();
        let square = |seed: u64| {
            let g = measure.drawn(&sample, 0, Some(&p), seed::mixed(seed)).unwrap();
            g.iter().zip(&change).map(|(g, c)| f64::from(g * c)).sum::<f64>().powi(2)
        };
        let mean = (0..4000).map(square).sum::<f64>() / 4000.0;
        let want = sum / count as f64;
        assert!((mean / want - 1.0).abs() < 0.1, "{mean} {want}");
    }

    /// A sample of two rows of three numbers, with what their errors weigh.
    fn weighed(weights: [f32; 6]) -> Sample {
        let target = Array::from_shape_vec(vec![1, 2, 3], vec![0.3, -1.2, 0.7, 2.0, 0.1, -0.4]).unwrap();
        Sample { feeds: Vec::new(), targets: vec![target], words: vec![None], weights: vec![weights.to_vec()] }
    }

    #[test]
    fn weights_count_by_their_shares() {
        let got = Array::from_shape_vec(vec![1, 2, 3], vec![0.1, -1.0, 0.9, 1.5, 0.4, -0.1]).unwrap();
        let error = |wish, samples: &[Sample]| {
            let measure = Measure::of(wish, samples, 0, Kind::Numbers);
            let errors = samples.iter().map(|sample| measure.error(sample, 0, Some(&got)).unwrap().0);
            (errors.sum::<f64>(), measure.gradient(&samples[0], 0, Some(&got)).unwrap())
        };
        // All alike: whatever they are, plain squares; of four dimensions, where words are not told apart.
        let flat = |sample: Sample| Sample {
            targets: sample.targets.into_iter().map(|t| t.into_shape_with_order(vec![1, 2, 3, 1]).unwrap()).collect(),
            ..sample
        };
        let got = got.clone().into_shape_with_order(vec![1, 2, 3, 1]).unwrap();
        let plain = {
            let samples = [flat(weighed([0.0; 6]))];
            Measure::of(Wish::Square, &samples, 0, Kind::Numbers).error(&samples[0], 0, Some(&got)).unwrap()
        };
        for weight in [1.0, 3e-20, 7e9] {
            let samples = [flat(weighed([weight; 6]))];
            let measure = Measure::of(Wish::Fisher, &samples, 0, Kind::Numbers);
            let found = measure.error(&samples[0], 0, Some(&got)).unwrap();
            assert!((found.0 / plain.0 - 1.0).abs() < 1e-6 && found.1 == plain.1, "{weight}: {found:?} {plain:?}");
        }
        // A sample that weighs three times as much as another has three quarters of all.
        let (both, gradient) = error(Wish::Fisher, &[weighed([3.0; 6]), weighed([1.0; 6])]);
        let (same, plain) = error(Wish::Fisher, &[weighed([1.0; 6]), weighed([1.0; 6])]);
        assert!((both / same - 1.0).abs() < 1e-6, "{both} {same}");
        assert!(gradient.iter().zip(&plain).all(|(g, p)| (g / p - 1.5).abs() < 1e-5), "{gradient} {plain}");
        // What weighs nothing makes no error, nor a gradient.
        let nothing = weighed([0.0; 6]);
        let silent = Sample { targets: vec![nothing.targets[0].mapv(|_| 0.0).into_shared()], ..nothing.clone() };
        for sample in [nothing, silent] {
            let (none, gradient) = error(Wish::Fisher, &[sample]);
            assert!(none == 0.0 && gradient.iter().all(|g| *g == 0.0), "{none} {gradient}");
        }
    }

    #[test]
    fn errors_without_a_weight_each_are_refused() {
        let sample = weighed([1.0; 6]);
        let got = sample.targets[0].clone();
        let short = Sample { weights: vec![vec![1.0; 5]], ..sample };
        assert!(Measure::Weighed(1.0).error(&short, 0, Some(&got)).is_err());
        assert!(Measure::Weighed(1.0).gradient(&short, 0, Some(&got)).is_err());
    }

    #[test]
    fn one_number_is_no_distribution() {
        let target = Array::from_shape_vec(vec![3, 1], vec![0.3, -1.2, 0.7]).unwrap();
        let sample = [Sample { feeds: Vec::new(), targets: vec![target], words: vec![None], weights: Vec::new() }];
        let measure = Measure::of(Wish::Fitting, &sample, 0, Kind::Logits);
        assert!(matches!(measure, Measure::Square(_)), "{measure:?}");
        let drawn = measure.drawn(&sample[0], 0, Some(&sample[0].targets[0]), 7).unwrap();
        assert!(drawn.iter().all(|g| *g != 0.0), "{drawn:?}");
    }

    #[test]
    fn padding_counts_for_nothing() {
        let target = Array::from_shape_vec(vec![1, 2, 2], vec![1.0, 1.0, 5.0, 5.0]).unwrap();
        let sample = Sample {
            feeds: Vec::new(),
            targets: vec![target],
            words: vec![Some(vec![true, false])],
            weights: Vec::new(),
        };
        let got = Array::from_shape_vec(vec![1, 2, 2], vec![1.0, 1.0, 0.0, 0.0]).unwrap();
        for measure in [Measure::Rows(1e-9), Measure::Channels(1.0), Measure::Hidden(1e-9)] {
            assert!(measure.error(&sample, 0, Some(&got)).unwrap().0 < 1e-12, "{measure:?}");
        }
        assert!(Measure::Square(1.0).gradient(&sample, 0, Some(&got)).unwrap().iter().all(|g| *g == 0.0));
    }

    fn of_rows(values: Vec<f32>) -> Array<f32> {
        Array::from_shape_vec(vec![1, 3, values.len() / 3], values).unwrap()
    }

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn logits(seed: u64) -> Vec<f32> {
        (0..24_u64).map(|at| (120.0 * seed::uniform(seed::mixed(seed) ^ at) - 60.0) as f32).collect()
    }

    /// Σ p ln (p / q) of the softmax of two rows.
    fn divergence(target: &[f32], got: &[f32]) -> f64 {
        let logarithms = |row: &[f32]| -> Vec<f64> {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let apart = |z: &f32| f64::from(*z) - f64::from(top);
            let sum: f64 = row.iter().map(|z| apart(z).exp()).sum();
            row.iter().map(|z| apart(z) - sum.ln()).collect()
        };
        logarithms(target).iter().zip(logarithms(got)).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    /// Half of it is mse, whatever the units are.
    #[test]
    fn of_small_errors_both_halves_of_the_hidden_loss_are_alike() {
        for scale in [1.0_f32, 40.0] {
            let flat: Vec<f32> = (0..256_u16).map(|at| scale * if at % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let moved = flat.iter().enumerate().map(|(at, v)| v + scale * if at % 4 < 2 { 0.02 } else { -0.02 });
            let got = Array::from_shape_vec(vec![1, 1, 256], moved.collect()).unwrap();
            let target = Array::from_shape_vec(vec![1, 1, 256], flat).unwrap();
            let sample = Sample { feeds: Vec::new(), targets: vec![target], words: vec![None], weights: Vec::new() };
            let error = |measure: Measure| measure.error(&sample, 0, Some(&got)).unwrap().0;
            let (both, squares) = (error(Measure::Hidden(1e-9)), error(Measure::Rows(1e-9)));
            assert!((both / squares - 2.0).abs() < 0.1, "{both} {squares}");
        }
        let map = weighed([1.0; 6]).targets[0].clone().into_shape_with_order(vec![1, 2, 3, 1]).unwrap();
        let sample = [Sample { targets: vec![map], ..weighed([1.0; 6]) }];
        assert!(matches!(Measure::of(Wish::Hidden, &sample, 0, Kind::Numbers), Measure::Square(_)));
    }

    #[test]
    fn what_hits_the_target_has_no_error_and_nothing_has_less() {
        for seed in 0..200 {
            let (target, got) = (logits(seed), logits(seed + 1000));
            let sample = Sample {
                feeds: Vec::new(),
                targets: vec![of_rows(target.clone())],
                words: vec![None],
                weights: Vec::new(),
            };
            let of_blocks = [Measure::Channels(1.7), Measure::Hidden(1e-9)];
            for measure in [Measure::Square(1.7), Measure::Rows(1e-9), Measure::Divergence].into_iter().chain(of_blocks)
            {
                let error = |got: &[f32]| measure.error(&sample, 0, Some(&of_rows(got.to_vec()))).unwrap().0;
                assert!(error(&target).abs() < 1e-9, "{measure:?}: {}", error(&target));
                assert!(error(&got) >= 0.0, "{measure:?}: {}", error(&got));
            }
            let found = Measure::Divergence.error(&sample, 0, Some(&of_rows(got.clone()))).unwrap().0;
            let want: f64 = target.chunks(8).zip(got.chunks(8)).map(|(target, got)| divergence(target, got)).sum();
            assert!((found - want).abs() < 1e-3 * (1.0 + want), "{found} {want}");
        }
    }
}
