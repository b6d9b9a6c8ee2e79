//! The weight itself, straight through a rounding by chance.

use super::chance::Chance;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "latent-stochastic",
    doc: "As latent, with every weight rounded up or down by chance while it is learned, as often as it is far from the other side: in the \
          mean the block is run with the weight itself. What comes out is rounded to nearest. Draws depend on the seed, the step and the \
          element.",
    source: "Gupta et al. 2015, arXiv:1502.02551, section 3; straight through it Bengio et al. 2013, arXiv:1308.3432",
};

/// The size of the first steps, in grid steps.
const RATE: f32 = 1e-3;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct LatentStochastic;

#[derive(Debug)]
struct Drawn {
    w: Vec<f32>,
    adam: Adam,
    chance: Chance,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for LatentStochastic {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The weight and two moments.
    fn bytes_per_weight(&self) -> u64 {
        12
    }

    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned> {
        let w = weight.within_reach();
        Box::new(Drawn { adam: Adam::new(w.len()), w, chance: Chance::new(seed) })
    }
}

impl Learned for Drawn {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        let drawn = |(i, w): (usize, &f32)| {
            let (below, above) = weight.around(i, *w);
            let share = f64::from(w - below) / f64::from(above - below);
            if self.chance.is_up(i, share) { above } else { below }
        };
        self.w.iter().enumerate().map(drawn).collect()
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let decay = 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.adam.step(&mut self.w, gradient, RATE * rate * decay);
        self.chance.advance();
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.w);
        self.chance.show(ledger);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&self.w)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::weight;
    use super::*;

    /// The mean of many draws is the weight, at whatever distance from its point, and saturates where the grid ends.
    #[test]
    fn the_mean_of_draws_is_the_weight() {
        for (grid, zero) in [("int4", 0), ("int2", 0), ("uint4", 7), ("bipolar", 0), ("float4e2m1", 0)] {
            let weight = weight(grid, zero);
            let w: Vec<f32> = (0..24_u16).map(|i| f32::from(i) * 0.35 - 3.9).collect();
            let (n, mut sums) = (10_000_u16, [0.0_f64; 24]);
            let mut drawn = Drawn { adam: Adam::new(24), w: w.clone(), chance: Chance::new(11) };
            for _ in 0..n {
                drawn.chance.advance();
                let points = drawn.soft(0.0, &weight);
                assert_eq!(points, weight.rounded(&points), "{grid}: off the grid");
                sums.iter_mut().zip(points).for_each(|(sum, point)| *sum += f64::from(point));
            }
            for (i, (sum, w)) in sums.iter().zip(&w).enumerate() {
                let (below, above) = weight.around(i, *w);
                let want = f64::from(w.clamp(below.min(above), above.max(below)));
                // Half a gap is the most that a draw can deviate by; four standard deviations of the mean.
                let bound = 4.0 * 0.5 * f64::from(above - below) / f64::from(n).sqrt();
                let mean = sum / f64::from(n);
                assert!((mean - want).abs() <= bound + 1e-6, "{grid} {i}: {mean} instead of {want}");
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_points() {
        let weight = weight("int4", 0);
        let run = |seed: u64| {
            let mut learned = LatentStochastic.start(&weight, seed);
            let mut drawn = || {
                let points = learned.soft(0.0, &weight);
                assert_eq!(points, learned.soft(0.0, &weight), "the way back sees what the way forward saw");
                learned.step(&[0.0; 24], 0.0, 1.0, &weight);
                points
            };
            (0..5).map(|_| drawn()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1)[0], run(1)[1], "every step draws anew");
    }
}
