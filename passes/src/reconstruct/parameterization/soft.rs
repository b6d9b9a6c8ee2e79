//! Between two points: the rectified sigmoid, and how it is driven to its ends.

use super::Weight;
use crate::grad::Real as _;
use crate::simd::vectorized;

/// The exponent of the regularizer falls from the first to the second.
const BETA: (f32, f32) = (20.0, 2.0);
/// The push of the regularizer, against a gradient of mean magnitude 1, rises from the first to the second.
const LAMBDA: (f32, f32) = (0.1, 100.0);
/// The share of the way from a point to the float weight that is made at the start.
const START: f32 = 0.1;
/// How far the rectified sigmoid reaches beyond 0 and 1.
const STRETCH: f32 = 0.1;

/// Every element on its way from the point of a weight to another.
#[derive(Debug)]
pub(super) struct Between {
    gap: Vec<f32>,
}

/// v with h(v) = `h`, for h in \[0, 1\].
fn inverse(h: f32) -> f32 {
    let y = (h.clamp(0.01, 0.99) + STRETCH) / (1.0 + 2.0 * STRETCH);
    (y / (1.0 - y)).ln()
}

/// h and its slope at v, where s = sigmoid(v).
#[inline]
fn rectified(s: f32) -> (f32, f32) {
    let h = s * (1.0 + 2.0 * STRETCH) - STRETCH;
    let slope = if h > 0.0 && h < 1.0 { s * (1.0 - s) * (1.0 + 2.0 * STRETCH) } else { 0.0 };
    (h.clamp(0.0, 1.0), slope)
}

fn sigmoids(v: &[f32]) -> Vec<f32> {
    let mut s = v.to_vec();
    f32::sigmoid_all(&mut s);
    s
}

impl Between {
    /// From the points that were chosen to their neighbors.
    pub(super) fn ends_of(weight: &Weight) -> Self {
        let gap = |(i, from): (usize, &f32)| weight.neighbor(i) - from;
        Self { gap: weight.points.iter().enumerate().map(gap).collect() }
    }

    /// How far the neighbors lie above, or below where negative.
    pub(super) fn gaps(&self) -> &[f32] {
        &self.gap
    }

    /// The share of the way, 0 to 1, at which the float weights lie.
    pub(super) fn shares(&self, weight: &Weight) -> Vec<f32> {
        let share = |((float, from), gap): ((&f32, &f32), &f32)| ((float - from) / gap).clamp(0.0, 1.0);
        weight.float.iter().zip(&weight.points).zip(&self.gap).map(share).collect()
    }

    /// from + share · gap.
    pub(super) fn at(&self, shares: &[f32], weight: &Weight) -> Vec<f32> {
        shares.iter().zip(&weight.points).zip(&self.gap).map(|((share, from), gap)| from + share * gap).collect()
    }

    /// Gradients by the shares, of those by units.
    pub(super) fn by_shares(&self, by_units: &[f32]) -> Vec<f32> {
        by_units.iter().zip(&self.gap).map(|(g, gap)| g * gap).collect()
    }

    /// From the points that were chosen to their neighbors, with the v at which [`START`] of the way from the point to the float
    /// weight is made.
    pub(super) fn of(weight: &Weight) -> (Self, Vec<f32>) {
        let between = Self::ends_of(weight);
        let v = between.shares(weight).into_iter().map(|share| inverse(START * share)).collect();
        (between, v)
    }

    /// from + h(v) · gap.
    pub(super) fn units(&self, v: &[f32], weight: &Weight) -> Vec<f32> {
        let mut s = sigmoids(v);
        vectorized(|| {
            s.iter_mut()
                .zip(&weight.points)
                .zip(&self.gap)
                .for_each(|((s, from), gap)| *s = from + rectified(*s).0 * gap);
        });
        s
    }

    /// The gradient by v of the loss and of the regularizer Σ 1 − |2h − 1|^β.
    pub(super) fn gradient(&self, v: &[f32], by_units: &[f32], progress: f32) -> Vec<f32> {
        let mut grad = self.by_shares(by_units);
        let mean = grad.iter().map(|g| g.abs()).sum::<f32>() / grad.len().max(1) as f32;
        let push = LAMBDA.0 * (LAMBDA.1 / LAMBDA.0).powf(progress) * mean;
        let beta = BETA.1 + (BETA.0 - BETA.1) * (1.0 - progress);
        let s = sigmoids(v);
        for (g, s) in grad.iter_mut().zip(&s) {
            let (h, slope) = rectified(*s);
            let t = 2.0 * h - 1.0;
            // d/dh (1 − |2h − 1|^β) = −2 β |2h − 1|^(β − 1) sign(2h − 1)
            let pull = if push > 0.0 { -2.0 * beta * t.abs().powf(beta - 1.0) * t.signum() } else { 0.0 };
            *g = (*g + push * pull) * slope;
        }
        grad
    }

    /// The nearer end for every v.
    pub(super) fn ends(&self, v: &[f32], weight: &Weight) -> Vec<f32> {
        let end = |((v, from), gap): ((&f32, &f32), &f32)| if *v >= 0.0 { from + gap } else { *from };
        v.iter().zip(&weight.points).zip(&self.gap).map(end).collect()
    }
}
