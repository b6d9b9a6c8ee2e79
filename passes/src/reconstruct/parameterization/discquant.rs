//! Between two points, pulled to the nearer one by a constant force that what the model loses holds against.

use super::soft::Between;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "discquant",
    doc: "ŵ = point + x · gap to the neighbor, x in [0, 1] moved by Adam against κ-clamped gradients and a force of one towards the \
          end that is nearer to the float weight; no annealing. Meant for `distill`.",
    source: "Chee et al. 2025 (DiscQuant), arXiv:2501.06417, section 4; gradients in units of their own mean, and earlier points as \
             start, ours",
};

/// The size of a step, in gaps: usual rates are ten times this where few steps are made.
const RATE: f32 = 5e-3;
/// A gradient counts for no more than the force itself.
const KAPPA: f32 = 1.0;
/// What a gradient of mean magnitude weighs before it is cut to that: most are cut, as at the authors' ρ.
const RHO: f32 = 10.0;
/// The share of the way to the float weight that is made at the start.
const START: f32 = 0.5;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct DiscQuant;

#[derive(Debug)]
struct Relaxed {
    between: Between,
    x: Vec<f32>,
    adam: Adam,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for DiscQuant {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The gap, x and two moments.
    fn bytes_per_weight(&self) -> u64 {
        16
    }

    fn leans(&self) -> bool {
        false
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let between = Between::ends_of(weight);
        let x: Vec<f32> = between.shares(weight).into_iter().map(|y| (START * y).min(0.49)).collect();
        Box::new(Relaxed { between, adam: Adam::new(x.len()), x })
    }
}

impl Learned for Relaxed {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.between.at(&self.x, weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let mut by_x = self.between.by_shares(gradient);
        let mean = by_x.iter().map(|g| g.abs()).sum::<f32>() / by_x.len().max(1) as f32;
        let unit = if mean > 0.0 { RHO / mean } else { 0.0 };
        // The force is −(2y − 1), where y is the share of the way at which the float weight lies.
        let pulled = |(g, y): (&mut f32, f32)| *g = 1.0 - 2.0 * y + (*g * unit).clamp(-KAPPA, KAPPA);
        by_x.iter_mut().zip(self.between.shares(weight)).for_each(pulled);
        let decay = 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.adam.step(&mut self.x, &by_x, RATE * rate * decay);
        self.x.iter_mut().for_each(|x| *x = x.clamp(0.0, 1.0));
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.x);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        let ends: Vec<f32> = self.x.iter().map(|x| if *x > 0.5 { 1.0 } else { 0.0 }).collect();
        self.between.at(&ends, weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::tensor::Tensor;

    /// Where the model says nothing, the force brings every weight to its nearest point (invariant of the method at ρ = 0).
    #[test]
    fn without_gradients_weights_are_rounded_to_nearest() {
        let float: Vec<f32> = (0..40_u16).map(|i| (f32::from(i) - 19.7) * 0.17).collect();
        let encoding = Encoding::per_tensor(crate::grid::find("int4").unwrap(), 0.5, 0);
        let nearest = encoding.encode(&float, &[40]).unwrap();
        // A start that is one step off at every third weight, on the side where the float weight lies.
        let want = Weight::new(&Tensor::of([40], float.clone()), &encoding, &nearest).unwrap();
        let off: Vec<f32> =
            want.points.iter().enumerate().map(|(i, p)| if i % 3 == 0 { want.neighbor(i) } else { *p }).collect();
        let codes = encoding.pack_points(&off, &[40]);
        let weight = Weight::new(&Tensor::of([40], float), &encoding, &codes).unwrap();
        let mut learned = DiscQuant.start(&weight, 0);
        for _ in 0..2000_u16 {
            learned.step(&[0.0; 40], 0.0, 1.0, &weight);
        }
        assert_eq!(learned.hard(&weight), want.points);
    }
}
