//! A divisor of its own before rounding for every element.

use super::divisors::{Core, Divisors};
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;

static ABOUT: About = About {
    name: "flexround",
    doc: "ŵ = round(w / S) with S = exp θ of one element each, one row and one column together; learned by Adam straight through \
          the rounding, so that large weights may move by several points. Starts at the points that were chosen before.",
    source: "Lee et al. 2023 (FlexRound), arXiv:2306.00317, section 3; around a start ours",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct FlexRound;

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for FlexRound {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// A logarithm and two moments.
    fn bytes_per_weight(&self) -> u64 {
        12
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let n = weight.points.len();
        Box::new(Divisors::new(weight, Core::Each(vec![0.0; n], Adam::new(n))))
    }
}
