//! Adam.

use super::ledger::Ledger;

/// Moments of gradients, and the step that they make.
///
/// Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
#[derive(Clone, Debug)]
pub(crate) struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

const DECAY: (f32, f32) = (0.9, 0.999);
const EPSILON: f32 = 1e-12;

impl Adam {
    pub(crate) fn new(n: usize) -> Self {
        Self { first: vec![0.0; n], second: vec![0.0; n], steps: 0 }
    }

    /// Shows what steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.first);
        ledger.floats(&mut self.second);
        let mut steps = u64::from(self.steps.unsigned_abs());
        ledger.whole(&mut steps);
        self.steps = i32::try_from(steps).unwrap_or(i32::MAX);
    }

    /// Moves `parameters` against `gradient`, each by `rate` where its gradient always had the same sign.
    pub(crate) fn step(&mut self, parameters: &mut [f32], gradient: &[f32], rate: f32) {
        self.steps = self.steps.saturating_add(1);
        let unbiased = (1.0 - DECAY.0.powi(self.steps), 1.0 - DECAY.1.powi(self.steps));
        let (first, second) = (&mut self.first, &mut self.second);
        crate::simd::vectorized(|| {
            for (((p, g), m), v) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
                *m = DECAY.0 * *m + (1.0 - DECAY.0) * g;
                *v = DECAY.1 * *v + (1.0 - DECAY.1) * g * g;
                *p -= rate * (*m / unbiased.0) / ((*v / unbiased.1).sqrt() + EPSILON);
            }
        });
    }

    /// What the moments take.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        4 * (self.first.len() + self.second.len())
    }
}
