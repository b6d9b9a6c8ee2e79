//! Rounding by chance: up as often as it is far from the lower end, so that the mean is what was rounded.

use crate::reconstruct::ledger::Ledger;
use crate::seed;

/// What chance says of every element in every step. It depends on a seed and on the numbers of both, on nothing else.
///
/// Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
#[derive(Debug)]
pub(super) struct Chance {
    seed: u64,
    steps: u64,
}

impl Chance {
    /// Before the first step.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed: seed::mixed(seed), steps: 0 }
    }

    /// Shows what steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.whole(&mut self.steps);
    }

    /// Goes on to the next step.
    pub(super) fn advance(&mut self) {
        // A state that was put back may say anything.
        self.steps = self.steps.wrapping_add(1);
    }

    /// Whether element `i` goes up, where that is to happen with probability `share`: never for 0 and for what is no number.
    pub(super) fn is_up(&self, i: usize, share: f64) -> bool {
        seed::uniform(seed::mixed(self.seed ^ self.steps) ^ i as u64) < share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_steps_goes_on() {
        let mut chance = Chance::new(3);
        chance.show(&mut Ledger::Read(Some(&[0xff; 8])));
        chance.advance();
        assert!(chance.is_up(5, 1.0) && !chance.is_up(5, 0.0));
    }

    #[test]
    fn shares_are_kept_and_the_ends_are_sure() {
        let mut chance = Chance::new(3);
        let (n, share) = (10_000_u32, 0.3);
        let mut ups = [0_u32; 3];
        for _ in 0..n {
            chance.advance();
            for (up, share) in ups.iter_mut().zip([0.0, share, f64::NAN]) {
                *up += u32::from(chance.is_up(5, share));
            }
            assert!(chance.is_up(5, 1.0));
        }
        // Within four standard deviations of √(n · 0.3 · 0.7).
        let away = (f64::from(ups[1]) - share * f64::from(n)).abs();
        assert!(ups[0] == 0 && ups[2] == 0 && away < 4.0 * (f64::from(n) * 0.21).sqrt(), "{ups:?}");
    }
}
