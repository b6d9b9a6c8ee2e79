//! The weight itself, straight through the rounding.

use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "latent",
    doc: "ŵ = round(w), w itself moved by Adam, straight through the rounding. Starts at the points that were chosen before.",
    source: "Bengio et al. 2013, arXiv:1308.3432; by blocks Chen et al. 2024 (EfficientQAT), arXiv:2407.11062, section 3.2; from \
             earlier points ours",
};

/// The size of the first steps, in grid steps.
const RATE: f32 = 1e-3;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Latent;

#[derive(Debug)]
struct Moved {
    w: Vec<f32>,
    adam: Adam,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for Latent {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The weight and two moments.
    fn bytes_per_weight(&self) -> u64 {
        12
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let w = weight.within_reach();
        Box::new(Moved { adam: Adam::new(w.len()), w })
    }
}

impl Learned for Moved {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let decay = 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.adam.step(&mut self.w, gradient, RATE * rate * decay);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.w);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&self.w)
    }
}
