//! An offset before rounding, moved by the sign of its gradient.

use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::ledger::Ledger;
use crate::simd::vectorized;

static ABOUT: About = About {
    name: "signround",
    doc: "ŵ = round(w + v), v moved by steps of one size against the sign of its gradient, straight through the rounding; the \
          size falls to 0. Starts at the points that were chosen before.",
    source: "Cheng et al. 2024 (SignRound), arXiv:2309.05516, section 3; from earlier points ours",
};

/// The size of the first step, in grid steps.
const RATE: f32 = 1e-3;
/// How far an offset may move a weight, in grid steps.
const REACH: f32 = 1.0;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct SignRound;

/// Where rounding gives the first points, and v.
#[derive(Debug)]
struct Offset {
    start: Vec<f32>,
    v: Vec<f32>,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for SignRound {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// Where it starts, and v.
    fn bytes_per_weight(&self) -> u64 {
        8
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        Box::new(Offset { start: weight.within_reach(), v: vec![0.0; weight.points.len()] })
    }
}

impl Learned for Offset {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let size = RATE * rate * (1.0 - progress);
        let v = &mut self.v;
        vectorized(|| {
            for (v, g) in v.iter_mut().zip(gradient) {
                let step = if *g == 0.0 { 0.0 } else { size.copysign(*g) };
                *v = (*v - step).clamp(-REACH, REACH);
            }
        });
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.v);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&self.start.iter().zip(&self.v).map(|(start, v)| start + v).collect::<Vec<_>>())
    }
}
