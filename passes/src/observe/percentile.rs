//! The range that keeps a given share of the values.

use super::{FEW, Observer, Purpose, Sketch, around_zero, extremes};
use crate::about::About;

pub(super) static ABOUT: About = About {
    name: "percentile",
    doc: "The range that keeps the share `keep` of the values (0.9999 by default), half of the rest cut at either end. \
          The rank is inclusive and nearest, ceil(keep * n), interpolated inside a bucket of the sketch; below 100 values \
          it is min-max.",
    source: "Wu et al. 2020, arXiv:2004.09602, section 3; rank definition ours",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Percentile {
    keep: f64,
}

impl Percentile {
    pub(super) fn new(keep: Option<f64>) -> Self {
        Self { keep: keep.unwrap_or(0.9999).clamp(0.5, 1.0) }
    }
}

impl Observer for Percentile {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
        if sketch.finite() < FEW {
            return extremes(sketch, purpose);
        }
        if purpose.symmetric {
            let high = sketch.quantile_of_magnitude(self.keep);
            return (-high, high);
        }
        let cut = (1.0 - self.keep) / 2.0;
        around_zero(sketch.quantile(cut), sketch.quantile(1.0 - cut), purpose)
    }
}
