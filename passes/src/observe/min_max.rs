//! The smallest and the largest value.

use super::{Observer, Purpose, Sketch, extremes};
use crate::about::About;

pub(super) static ABOUT: About = About {
    name: "min-max",
    doc: "The smallest and the largest finite value seen. Exact; nothing is clipped, so one outlier sets the step of all.",
    source: "Jacob et al. 2018, arXiv:1712.05877, section 3.1",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct MinMax;

impl Observer for MinMax {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
        extremes(sketch, purpose)
    }
}
