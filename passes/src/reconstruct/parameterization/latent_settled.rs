//! The weight itself, until it settles.

use super::settled::Settled;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "latent-settled",
    doc: "As latent; from the middle of the way on, weights that have kept near to their point, in a running mean, are let go of and never \
          move again, at the end all of them.",
    source: "Zhong et al. 2022 (lottery ticket scratcher), arXiv:2211.08544, section 3.3; by blocks and from earlier points ours",
};

/// The size of the first steps, in grid steps.
const RATE: f32 = 1e-3;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct LatentSettled;

#[derive(Debug)]
struct Settling {
    w: Vec<f32>,
    adam: Adam,
    settled: Settled,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for LatentSettled {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The weight, its distance and two moments.
    fn bytes_per_weight(&self) -> u64 {
        16
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let w = weight.within_reach();
        Box::new(Settling { adam: Adam::new(w.len()), settled: Settled::new(w.len()), w })
    }
}

impl Learned for Settling {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let before = self.w.clone();
        let decay = 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.adam.step(&mut self.w, gradient, RATE * rate * decay);
        self.settled.hold(&mut self.w, &before);
        let (old, points) = (weight.rounded(&before), weight.rounded(&self.w));
        self.settled.follow(progress, &self.w, (&old, &points), weight);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.w);
        self.settled.show(ledger);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&self.w)
    }
}
