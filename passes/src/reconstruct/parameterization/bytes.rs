//! Numbers in 8-bit codes into which small changes are rounded by chance, so that many of them add up.

use super::chance::Chance;
use crate::reconstruct::ledger::Ledger;

/// Numbers that share an exponent.
const GROUP: usize = 256;
/// The first exponent: codes reach from −1/2 to 1/2.
const FIRST: i8 = -8;
/// The largest code.
const MOST: f32 = 127.0;

/// code · 2^exponent each. An exponent only rises, when its largest number needs it: what does not change keeps its code.
#[derive(Debug)]
pub(super) struct Bytes {
    codes: Vec<i8>,
    exponents: Vec<i8>,
}

/// `x`, saturated.
#[expect(clippy::cast_possible_truncation, reason = "whole numbers between −127 and 127")]
fn code(x: f32) -> i8 {
    x.clamp(-MOST, MOST) as i8
}

fn power(exponent: i8) -> f32 {
    2.0_f32.powi(exponent.into())
}

impl Bytes {
    /// The codes nearest to `values`, which lie within ±0.49.
    pub(super) fn of(values: impl Iterator<Item = f32>) -> Self {
        let codes: Vec<i8> = values.map(|value| code((value / power(FIRST)).round_ties_even())).collect();
        Self { exponents: vec![FIRST; codes.len().div_ceil(GROUP)], codes }
    }

    /// Shows what steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        for codes in [&mut self.codes, &mut self.exponents] {
            ledger.codes(codes);
        }
    }

    /// All of them.
    pub(super) fn values(&self) -> impl Iterator<Item = f32> {
        let groups = self.codes.chunks(GROUP).zip(&self.exponents);
        groups.flat_map(|(codes, exponent)| codes.iter().map(|code| f32::from(*code) * power(*exponent)))
    }

    /// Adds `changes`, one each, and rounds by `chance`. What would be no number any more stays.
    pub(super) fn add(&mut self, changes: &[f32], chance: &Chance) {
        let groups = self.codes.chunks_mut(GROUP).zip(&mut self.exponents).zip(changes.chunks(GROUP));
        for (at, ((codes, exponent), changes)) in groups.enumerate() {
            let step = power(*exponent);
            let mut values = [0.0_f32; GROUP];
            for ((value, code), change) in values.iter_mut().zip(codes.iter()).zip(changes) {
                let old = f32::from(*code) * step;
                *value = if (old + change).is_finite() { old + change } else { old };
            }
            let largest = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            while largest > MOST * power(*exponent) && *exponent < i8::MAX {
                *exponent += 1;
            }
            let step = power(*exponent);
            for (i, (new, value)) in codes.iter_mut().zip(values).enumerate() {
                let (below, above) = ((value / step).floor(), (value / step).ceil());
                let share = f64::from(value / step - below);
                *new = code(if chance.is_up(at * GROUP + i, share) { above } else { below });
            }
        }
    }

    /// What it takes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.codes.len() + self.exponents.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hundredth of a step, a thousand times: nearest rounding would never move.
    #[test]
    fn small_changes_add_up() {
        let n = 1000_u16;
        let mut bytes = Bytes::of((0..n).map(|_| 0.1));
        let mut chance = Chance::new(5);
        let start: f64 = bytes.values().map(f64::from).sum();
        let change = 0.01 * power(FIRST);
        for _ in 0..1000 {
            chance.advance();
            bytes.add(&vec![change; n.into()], &chance);
        }
        let moved = (bytes.values().map(f64::from).sum::<f64>() - start) / f64::from(n);
        let want = f64::from(change) * 1000.0;
        // A number's variance is that of 1000 draws of 1 step at 1 %: 3.1 steps, of the mean of n numbers 0.1.
        assert!((moved - want).abs() < 0.4 * f64::from(power(FIRST)), "{moved} instead of {want}");
    }

    #[test]
    fn codes_stay_where_nothing_changes_and_ranges_grow() {
        let values: Vec<f32> = (0..600_u16).map(|i| (f32::from(i) - 300.0) / 1024.0).collect();
        let mut bytes = Bytes::of(values.iter().copied());
        let before: Vec<f32> = bytes.values().collect();
        let mut chance = Chance::new(5);
        for _ in 0..100 {
            chance.advance();
            bytes.add(&[0.0; 600], &chance);
        }
        assert_eq!(bytes.values().collect::<Vec<_>>(), before);
        let mut far = vec![0.0; 600];
        (far[0], far[1], far[2]) = (1000.0, f32::INFINITY, f32::NAN);
        bytes.add(&far, &chance);
        let after: Vec<f32> = bytes.values().collect();
        assert!((after[0] - 1000.0).abs() < 8.0 && after[1..3].iter().all(|v| v.abs() <= 8.0), "{:?}", &after[..3]);
        assert_eq!(after[256..], before[256..], "other groups stay");
    }
}
