//! Up or down, by a rectified sigmoid that is driven to its ends.

use super::soft::Between;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "brecq",
    doc: "Between the point of every weight and its neighbor, ŵ = point + h(v) · gap with the rectified sigmoid h; v learned by Adam \
          while a regularizer drives h to 0 or 1.",
    source: "Nagel et al. 2020, arXiv:2004.10568, section 3.3; by blocks Li et al. 2021 (BRECQ), arXiv:2102.05426",
};

const RATE: f32 = 0.01;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Brecq;

#[derive(Debug)]
struct Up {
    between: Between,
    v: Vec<f32>,
    adam: Adam,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for Brecq {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The gap, v and two moments.
    fn bytes_per_weight(&self) -> u64 {
        16
    }

    fn leans(&self) -> bool {
        false
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let (between, v) = Between::of(weight);
        Box::new(Up { between, adam: Adam::new(v.len()), v })
    }
}

impl Learned for Up {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.between.units(&self.v, weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let gradient = self.between.gradient(&self.v, gradient, progress);
        self.adam.step(&mut self.v, &gradient, RATE * rate);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.v);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        self.between.ends(&self.v, weight)
    }
}
