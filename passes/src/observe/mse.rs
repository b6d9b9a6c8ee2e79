//! The range with the smallest expected squared error.

use super::{FEW, Observer, Purpose, Sketch, around_zero, extremes};
use crate::about::About;

pub(super) static ABOUT: About = About {
    name: "mse",
    doc: "The range whose quantizer has the smallest expected squared error on the distribution seen: clipping what lies \
          outside against the step of what lies inside. Low and high end are searched in turn, first on a grid of \
          factors, then by golden section.",
    source: "Banner et al. 2019, arXiv:1810.05723, section 3; search ours",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Mse;

/// Shrink factors tried for either end, before the fine search.
const STEPS: usize = 32;
/// The smallest factor tried.
const LEAST: f64 = 0.02;

impl Observer for Mse {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
        let (low, high) = extremes(sketch, purpose);
        if sketch.finite() < FEW || high <= low {
            return (low, high);
        }
        let points = points(sketch);
        let error = |low: f64, high: f64| expected_error(&points, low, high, purpose.levels);
        if purpose.symmetric {
            let factor = best_factor(|f| error(low * f, high * f));
            return (low * factor, high * factor);
        }
        let (mut a, mut b) = (1.0, 1.0);
        for _ in 0..2 {
            b = best_factor(|f| error(low * a, high * f));
            a = best_factor(|f| error(low * f, high * b));
        }
        around_zero(low * a, high * b, purpose)
    }
}

/// Values and their counts, zeros left out: 0 is a point of every grid.
pub(super) fn points(sketch: &Sketch) -> Vec<(f64, f64)> {
    sketch.buckets().filter(|b| b.center() != 0.0).map(|b| (b.center(), b.count as f64)).collect()
}

/// The expected squared error, summed over all values: what is clipped exactly, what is rounded by its expectation of a
/// twelfth of the squared step, and no more than rounding to 0 costs.
pub(super) fn expected_error(points: &[(f64, f64)], low: f64, high: f64, levels: f64) -> f64 {
    let step = (high - low) / (levels - 1.0);
    let rounding = step * step / 12.0;
    let of_value = |x: f64| {
        let clipped = x.clamp(low, high) - x;
        let rounded = if x.abs() < step / 2.0 { x * x } else { rounding };
        clipped * clipped + rounded
    };
    points.iter().map(|&(x, n)| n * of_value(x)).sum()
}

/// The factor in [`LEAST`, 1] with the smallest error; the larger one, which clips less, where two are equal.
fn best_factor(error: impl Fn(f64) -> f64) -> f64 {
    let factor = |i: usize| LEAST.powf(i as f64 / STEPS as f64);
    let mut best = (0, error(1.0));
    for i in 1..=STEPS {
        let e = error(factor(i));
        if e < best.1 {
            best = (i, e);
        }
    }
    // Golden section between the neighbors of the best.
    let golden = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut a, mut b) = (factor((best.0 + 1).min(STEPS)), factor(best.0.saturating_sub(1)));
    for _ in 0..20 {
        let (c, d) = (b - golden * (b - a), a + golden * (b - a));
        if error(c) < error(d) { b = d } else { a = c }
    }
    let fine = f64::midpoint(a, b);
    if error(fine) < best.1 { fine } else { factor(best.0) }
}
