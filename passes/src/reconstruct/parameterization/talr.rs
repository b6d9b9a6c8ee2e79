//! The weight itself, at a rate that follows how many codes change.

use super::settled::Settled;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "talr",
    doc: "As latent, with a rate that is raised and lowered until the share of codes that change in a step is that of a schedule, which \
          falls to 0; weights that keep near to their point are let go of on the way. Scales stay.",
    source: "Lee et al. 2025 (transition rates), arXiv:2404.19248, section 3; freezing Zhong et al. 2022, arXiv:2211.08544, section 3.3",
};

/// Of the running mean of the share of codes that change.
const MEMORY: f32 = 0.9;
/// The share at the start, per square root of the bits of a weight.
const TRANSITIONS: f32 = 5e-3;
/// The rate at the start, in grid steps; it never rises beyond [`MOST`] times that.
const RATE: f32 = 1e-3;
const MOST: f32 = 10.0;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Talr;

#[derive(Debug)]
struct Scheduled {
    w: Vec<f32>,
    adam: Adam,
    controller: Controller,
    settled: Settled,
}

/// What the rate follows.
#[derive(Clone, Copy, Debug)]
struct Controller {
    /// The running mean of the share of codes that change, of those that may.
    transitions: f32,
    /// In units of the usual rate.
    rate: f32,
    /// The share at the start.
    target: f32,
}

impl Controller {
    fn new(target: f32) -> Self {
        Self { transitions: target, rate: 1.0, target }
    }

    /// Takes in the `share` of codes that changed in a step, where `wanted` should have.
    fn follow(&mut self, share: f32, wanted: f32) {
        self.transitions = MEMORY * self.transitions + (1.0 - MEMORY) * share;
        // One more of the rate for as much too few changes as there are at the start.
        self.rate = (self.rate + (wanted - self.transitions) / self.target).clamp(0.0, MOST);
    }
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for Talr {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The weight, its distance and two moments.
    fn bytes_per_weight(&self) -> u64 {
        16
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        Box::new(Scheduled::new(weight))
    }

    fn keeps_scales(&self) -> bool {
        true
    }
}

impl Scheduled {
    fn new(weight: &Weight) -> Self {
        let w = weight.within_reach();
        #[expect(clippy::cast_precision_loss, reason = "few bits")]
        let target = TRANSITIONS * (weight.encoding.grid.info().bits as f32).sqrt();
        Self { adam: Adam::new(w.len()), controller: Controller::new(target), settled: Settled::new(w.len()), w }
    }
}

impl Learned for Scheduled {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let before = self.w.clone();
        self.adam.step(&mut self.w, gradient, RATE * rate * self.controller.rate);
        self.settled.hold(&mut self.w, &before);
        let (old, points) = (weight.rounded(&before), weight.rounded(&self.w));
        let changed = points.iter().zip(&old).filter(|(new, old)| (*new - *old).abs() > 0.0).count();
        // What has been let go of cannot change.
        let share = changed as f32 / self.settled.free().max(1) as f32;
        self.controller.follow(share, self.controller.target * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos()));
        self.settled.follow(progress, &self.w, (&old, &points), weight);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.w);
        self.settled.show(ledger);
        ledger.floats(std::slice::from_mut(&mut self.controller.transitions));
        ledger.floats(std::slice::from_mut(&mut self.controller.rate));
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&self.w)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::tensor::Tensor;

    /// Where changes are in proportion to the rate, the share comes to the one that is wanted, and stays there.
    #[test]
    fn the_share_that_changes_comes_to_the_one_that_is_wanted() {
        for per_rate in [0.3, 1.0, 3.0_f32] {
            let mut controller = Controller::new(0.01);
            for step in 0..200 {
                controller.follow(0.01 * per_rate * controller.rate, 0.01);
                let off = (controller.transitions / 0.01 - 1.0).abs();
                assert!(step < 150 || off < 0.1, "{per_rate}, step {step}: {controller:?}");
            }
        }
    }

    #[test]
    fn the_rate_falls_to_nothing_where_nothing_is_to_change_and_is_bounded_where_nothing_does() {
        let mut stopped = Controller::new(0.01);
        (0..100).for_each(|_| stopped.follow(0.01 * stopped.rate, 0.0));
        assert!(stopped.rate < 1e-6, "{stopped:?}");
        let mut dead = Controller::new(0.01);
        (0..1000).for_each(|_| dead.follow(0.0, 0.01));
        assert!((dead.rate - MOST).abs() < 1e-6, "{dead:?}");
        // From there it comes back as soon as there are changes.
        (0..100).for_each(|_| dead.follow(0.01 * dead.rate, 0.01));
        assert!((dead.transitions / 0.01 - 1.0).abs() < 0.1, "{dead:?}");
    }

    /// The schedule ends at no changes.
    #[test]
    fn codes_settle_at_the_end() {
        let n = 2000_u16;
        let float: Vec<f32> = (0..n).map(|i| (f32::from(i) * 0.7).sin()).collect();
        let encoding = Encoding::per_tensor(crate::grid::find("int3").unwrap(), 0.3, 0);
        let codes = encoding.encode(&float, &[float.len()]).unwrap();
        let weight = Weight::new(&Tensor::of([float.len()], float), &encoding, &codes).unwrap();
        let mut learned = Talr.start(&weight, 0);
        let (steps, mut changes) = (300_u16, Vec::new());
        for step in 0..steps {
            let before = learned.hard(&weight);
            let sign =
                |i: u16| if crate::seed::uniform(u64::from(step) << 16 | u64::from(i)) < 0.5 { 1.0 } else { -1.0 };
            let gradient: Vec<f32> = (0..n).map(sign).collect();
            learned.step(&gradient, f32::from(step) / f32::from(steps), 10.0, &weight);
            changes.push(before.iter().zip(learned.hard(&weight)).filter(|(a, b)| (*a - b).abs() > 0.0).count());
        }
        let sum = |part: &[usize]| part.iter().sum::<usize>();
        assert!(sum(&changes[20..30]) > 100 && sum(&changes[290..]) <= 2, "{changes:?}");
    }

    /// What has been let go of stays to the bit, whatever its gradient and the momentum that it had.
    #[test]
    fn what_has_settled_never_moves_again() {
        let n = 500_u16;
        let float: Vec<f32> = (0..n).map(|i| (f32::from(i) * 0.7).sin()).collect();
        let encoding = Encoding::per_tensor(crate::grid::find("int3").unwrap(), 0.3, 0);
        let codes = encoding.encode(&float, &[float.len()]).unwrap();
        let weight = Weight::new(&Tensor::of([float.len()], float), &encoding, &codes).unwrap();
        let mut learned = Scheduled::new(&weight);
        let (steps, mut held) = (300_u16, Vec::new());
        for step in 0..steps {
            let gradient: Vec<f32> = (0..n).map(|i| f32::from((step * 7 + i * 13) % 11) - 5.0).collect();
            let before: Vec<u32> = learned.w.iter().map(|w| w.to_bits()).collect();
            let free = learned.settled.free();
            learned.step(&gradient, f32::from(step) / f32::from(steps), 10.0, &weight);
            let stays = learned.w.iter().zip(&before).filter(|(w, before)| w.to_bits() == **before).count();
            assert!(stays >= usize::from(n) - free, "{step}: {stays} stay where {free} are free");
            held.push(usize::from(n) - free);
        }
        assert!(held.is_sorted() && held[140] == 0 && held[290] > 250, "{held:?}");
    }
}
