//! Up or down, with offsets of low rank.

use super::low_rank::LowRank;
use super::soft::Between;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "lora-rounding",
    doc: "As brecq, with v = v₀ + A₁ A₂ of low rank around a fixed start: far fewer parameters, for few samples and large weights. A \
          temperature that falls at the end drives what is undecided to its ends.",
    source: "Ding et al. 2025 (CBQ), arXiv:2312.07950, section 3.3; around a start, and the temperature, ours",
};

const RATE: f32 = 3e-3;
const RANK: usize = 5;
/// From here on the temperature falls to its last value.
const COOLING: (f32, f32) = (0.8, 0.05);

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct LoraRounding;

#[derive(Debug)]
struct Offsets {
    between: Between,
    start: Vec<f32>,
    offset: LowRank,
    temperature: f32,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for LoraRounding {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The gap and v at the start; matrices of low rank are small.
    fn bytes_per_weight(&self) -> u64 {
        8
    }

    fn leans(&self) -> bool {
        false
    }

    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned> {
        let (between, start) = Between::of(weight);
        let columns = start.len() / weight.rows;
        let offset = LowRank::new(weight.rows, columns, RANK.min(weight.rows).min(columns), seed);
        Box::new(Offsets { between, start, offset, temperature: 1.0 })
    }
}

impl Offsets {
    fn v(&self) -> Vec<f32> {
        let mut v = self.start.clone();
        self.offset.add_to(&mut v);
        v.iter_mut().for_each(|v| *v /= self.temperature);
        v
    }
}

impl Learned for Offsets {
    fn soft(&mut self, progress: f32, weight: &Weight) -> Vec<f32> {
        let along = ((progress - COOLING.0) / (1.0 - COOLING.0)).clamp(0.0, 1.0);
        self.temperature = COOLING.1.powf(along);
        self.between.units(&self.v(), weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let mut gradient = self.between.gradient(&self.v(), gradient, progress);
        gradient.iter_mut().for_each(|g| *g /= self.temperature);
        self.offset.step(&gradient, RATE * rate);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        self.offset.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        self.between.ends(&self.v(), weight)
    }
}
