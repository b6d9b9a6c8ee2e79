//! The largest magnitude and the power of every channel.

/// Sums of squares are whole multiples of 2⁻⁶⁰.
const UNIT: f64 = (1_u64 << 60) as f64;

/// Per index of one axis, the largest finite magnitude and the mean square of what was seen there, whatever its order: one
/// tensor's sum is an f64 in a fixed order, and across tensors sums are integers.
#[derive(Clone, Debug, PartialEq)]
pub struct Peaks {
    axis: usize,
    magnitudes: Vec<f32>,
    /// In units of 2⁻⁶⁰.
    squares: Vec<i128>,
    /// Values per channel.
    count: u64,
    /// Values that were NaN or infinite.
    nonfinite: u64,
}

impl Peaks {
    /// Nothing seen yet; `axis` counts from the front.
    pub fn along(axis: usize) -> Self {
        Self { axis, magnitudes: Vec::new(), squares: Vec::new(), count: 0, nonfinite: 0 }
    }

    /// Adds a tensor; one whose axis is missing or has another extent than before is left out.
    pub fn see(&mut self, values: &[f32], shape: &[usize]) {
        let Some(&channels) = shape.get(self.axis) else { return };
        let inner: usize = shape[self.axis + 1..].iter().product();
        if channels == 0 || inner == 0 || !(self.magnitudes.is_empty() || self.magnitudes.len() == channels) {
            return;
        }
        self.magnitudes.resize(channels, 0.0);
        self.squares.resize(channels, 0);
        let magnitude = |v: f32| if v.is_finite() { v.abs() } else { 0.0 };
        let mut squares = vec![0.0_f64; channels];
        if inner == 1 {
            for row in values.chunks_exact(channels) {
                for ((peak, square), &v) in self.magnitudes.iter_mut().zip(&mut squares).zip(row) {
                    let v = magnitude(v);
                    *peak = peak.max(v);
                    *square += f64::from(v) * f64::from(v);
                }
            }
        } else {
            for (index, run) in values.chunks_exact(inner).enumerate() {
                let peak = &mut self.magnitudes[index % channels];
                *peak = run.iter().fold(*peak, |peak, &v| peak.max(magnitude(v)));
                squares[index % channels] += run.iter().map(|&v| f64::from(magnitude(v)).powi(2)).sum::<f64>();
            }
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "saturates beyond 2^67, where a power has lost its meaning"
        )]
        self.squares.iter_mut().zip(squares).for_each(|(all, s)| *all = all.saturating_add((s * UNIT) as i128));
        self.count = self.count.saturating_add((values.len() / channels) as u64);
        self.nonfinite = self.nonfinite.saturating_add(values.iter().filter(|v| !v.is_finite()).count() as u64);
    }

    /// Adds what `other` saw; nothing when it is of another shape.
    pub fn merge(&mut self, other: &Self) {
        if self.magnitudes.is_empty() {
            self.clone_from(other);
        } else if self.magnitudes.len() == other.magnitudes.len() && self.axis == other.axis {
            self.magnitudes.iter_mut().zip(&other.magnitudes).for_each(|(mine, theirs)| *mine = mine.max(*theirs));
            self.squares.iter_mut().zip(&other.squares).for_each(|(mine, theirs)| *mine = mine.saturating_add(*theirs));
            self.count = self.count.saturating_add(other.count);
            self.nonfinite = self.nonfinite.saturating_add(other.nonfinite);
        }
    }

    /// The largest magnitude of every channel; empty when nothing was seen.
    pub fn values(&self) -> &[f32] {
        &self.magnitudes
    }

    /// How many values every channel had.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many values were NaN or infinite.
    pub fn nonfinite(&self) -> u64 {
        self.nonfinite
    }

    /// The mean square of every channel; empty when nothing was seen.
    pub fn powers(&self) -> Vec<f64> {
        let scale = UNIT * self.count.max(1) as f64;
        self.squares.iter().map(|&square| square as f64 / scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn channels_are_told_apart_and_nothing_infinite_counts() {
        let mut inner = Peaks::along(1);
        inner.see(&[1.0, -2.0, 3.0, f32::INFINITY], &[1, 2, 2]);
        assert_eq!(inner.values(), [2.0, 3.0]);
        let mut last = Peaks::along(1);
        last.see(&[1.0, -5.0, 2.0, f32::NAN], &[2, 2]);
        assert_eq!(last.values(), [2.0, 5.0]);
        inner.merge(&last);
        assert_eq!(inner.values(), [2.0, 5.0]);
        // (1 + 4 + 1 + 4) / 4 and (9 + 25) / 4.
        assert!((inner.powers()[0] - 2.5).abs() < 1e-9 && (inner.powers()[1] - 8.5).abs() < 1e-9);
    }

    fn merged(a: &Peaks, b: &Peaks) -> Peaks {
        let mut all = a.clone();
        all.merge(b);
        all
    }

    #[test]
    fn merging_is_commutative_and_associative_with_nothing_as_identity() {
        let value = |t: u64, i: u64| (mixed(t << 8 | i) % 20_001) as f32 / 10_000.0 - 1.0;
        let tensors: Vec<Vec<f32>> = (0..10).map(|t| (0..12).map(|i| value(t, i)).collect()).collect();
        let of = |tensors: &[Vec<f32>]| {
            let mut seen = Peaks::along(1);
            tensors.iter().for_each(|tensor| seen.see(tensor, &[2, 3, 2]));
            seen
        };
        let whole = of(&tensors);
        for seed in 0..30_u64 {
            let cut = |at: u64| usize::try_from(mixed(seed << 8 | at) % 11).unwrap();
            let (first, second) = (cut(0).min(cut(1)), cut(0).max(cut(1)));
            let (a, b, c) = (of(&tensors[..first]), of(&tensors[first..second]), of(&tensors[second..]));
            assert_eq!(merged(&merged(&a, &b), &c), whole, "{first} {second}");
            assert_eq!(merged(&a, &merged(&b, &c)), whole, "{first} {second}");
            assert_eq!(merged(&c, &merged(&b, &a)), whole, "{first} {second}");
        }
        let none = Peaks::along(1);
        assert_eq!((&merged(&whole, &none), &merged(&none, &whole)), (&whole, &whole));
    }
}
