//! A divisor of low rank before rounding.

use super::flexround::{Lines, by_logs, divided};
use super::low_rank::LowRank;
use super::{Learned, Parameterization, Weight};
use crate::about::About;

static ABOUT: About = About {
    name: "lrq",
    doc: "As flexround, with ln S = L U + r + c of low rank: far fewer parameters, for few samples and large weights.",
    source: "Lee et al. 2025 (LRQ), arXiv:2407.11534, section 2; around a start ours",
};

const RATE: f32 = 5e-4;
/// The rank, as a share of the smaller side.
const SHARE: usize = 4;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Lrq;

#[derive(Debug)]
struct Divisors {
    product: LowRank,
    lines: Lines,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for Lrq {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned> {
        let columns = weight.points.len() / weight.rows;
        let rank = (weight.rows.min(columns) / SHARE).max(1);
        let product = LowRank::new(weight.rows, columns, rank, seed);
        Box::new(Divisors { product, lines: Lines::new(weight.rows, columns) })
    }
}

impl Divisors {
    fn logs(&self, n: usize) -> Vec<f32> {
        let mut logs = vec![0.0; n];
        self.product.add_to(&mut logs);
        self.lines.add_to(&mut logs);
        logs
    }
}

impl Learned for Divisors {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let gradient = by_logs(weight, &self.logs(gradient.len()), gradient);
        let rate = RATE * rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.product.step(&gradient, rate);
        self.lines.step(&gradient, rate);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&divided(weight, &self.logs(weight.points.len())))
    }
}
