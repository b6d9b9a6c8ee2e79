//! Up or down, by a rectified sigmoid learned in units of the gap between two points of the grid.

use super::soft::Between;
use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

static ABOUT: About = About {
    name: "scale-aware",
    doc: "As brecq, with u = σ v learned instead of v, where σ is the gap to the neighbor over the mean gap of the weight: on small floats \
          what lies between near points (near 0) decides in fewer steps than what lies between far ones. On integers it is brecq.",
    source: "Chen et al. 2025 (FP4DiT), arXiv:2503.15465, section 3; gaps over their mean, and their bounds, ours",
};

const RATE: f32 = 0.01;
/// Gaps over their mean count as no less and no more: eight-bit floats have gaps of one over thousands.
const RATIO: (f32, f32) = (1.0 / 16.0, 16.0);

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct ScaleAware;

#[derive(Debug)]
struct Up {
    between: Between,
    /// The mean gap.
    mean: f32,
    u: Vec<f32>,
    adam: Adam,
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for ScaleAware {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// The gap, u and two moments.
    fn bytes_per_weight(&self) -> u64 {
        16
    }

    fn leans(&self) -> bool {
        false
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let (between, v) = Between::of(weight);
        let mean = mean(between.gaps());
        let u: Vec<f32> = v.iter().zip(between.gaps()).map(|(v, gap)| v * sigma(*gap, mean)).collect();
        Box::new(Up { between, adam: Adam::new(u.len()), mean, u })
    }
}

/// The mean magnitude of `gaps`.
#[expect(clippy::cast_possible_truncation, reason = "a mean of f32")]
fn mean(gaps: &[f32]) -> f32 {
    (gaps.iter().map(|gap| f64::from(gap.abs())).sum::<f64>() / gaps.len().max(1) as f64) as f32
}

/// σ of an element.
fn sigma(gap: f32, mean: f32) -> f32 {
    (gap.abs() / mean).clamp(RATIO.0, RATIO.1)
}

impl Up {
    fn v(&self) -> Vec<f32> {
        self.u.iter().zip(self.between.gaps()).map(|(u, gap)| u / sigma(*gap, self.mean)).collect()
    }
}

impl Learned for Up {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.between.units(&self.v(), weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, _: &Weight) {
        let mut gradient = self.between.gradient(&self.v(), gradient, progress);
        gradient.iter_mut().zip(self.between.gaps()).for_each(|(g, gap)| *g /= sigma(*gap, self.mean));
        self.adam.step(&mut self.u, &gradient, RATE * rate);
    }

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.u);
        self.adam.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        self.between.ends(&self.u, weight)
    }
}

#[cfg(test)]
mod tests {
    use super::super::brecq::Brecq;
    use super::super::tests::weight;
    use super::*;

    /// Units after so many steps towards 1.7.
    fn after(method: &dyn Parameterization, weight: &Weight, steps: u8) -> Vec<f32> {
        let mut learned = method.start(weight, 0);
        for step in 0..steps {
            let progress = f32::from(step) / 50.0;
            let gradient: Vec<f32> = learned.soft(progress, weight).iter().map(|unit| unit - 1.7).collect();
            learned.step(&gradient, progress, 5.0, weight);
        }
        learned.soft(1.0, weight)
    }

    #[test]
    fn on_integers_it_is_brecq_to_the_bit() {
        for (grid, zero) in [("int4", 0), ("int2", 0), ("uint4", 7), ("int8", 0)] {
            let weight = weight(grid, zero);
            let bits = |method| after(method, &weight, 30).into_iter().map(f32::to_bits).collect::<Vec<u32>>();
            assert_eq!(bits(&ScaleAware), bits(&Brecq), "{grid}");
        }
    }

    /// The first step of Adam is one rate whatever the gradient: in u for all, so that in v it is one over σ.
    #[test]
    fn what_lies_between_near_points_decides_in_fewer_steps() {
        let weight = weight("float4e2m1", 0);
        let (between, v) = Between::of(&weight);
        let mean = mean(between.gaps());
        let sigma: Vec<f32> = between.gaps().iter().map(|gap| sigma(*gap, mean)).collect();
        assert!(sigma.iter().any(|s| *s < 0.8) && sigma.iter().any(|s| *s > 1.2), "{sigma:?}");
        let mut learned = ScaleAware.start(&weight, 0);
        learned.step(&[1e-3; 24], 0.0, 1.0, &weight);
        let by_v = between.gradient(&v, &[1e-3; 24], 0.0);
        let moved = learned.soft(0.0, &weight);
        for (i, unit) in moved.into_iter().enumerate() {
            let step = -RATE * by_v[i].signum() / sigma[i];
            let want = between.units(&v.iter().map(|v| v + step).collect::<Vec<f32>>(), &weight)[i];
            let start = between.units(&v, &weight)[i];
            // Where the sigmoid is cut there is no gradient.
            let cut = (unit - start).abs() < 1e-9;
            assert!(cut || (unit - want).abs() < 1e-4 * want.abs().max(0.1), "{i}: {unit} {want}");
        }
    }
}
