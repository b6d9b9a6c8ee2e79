//! The mean of every channel of a tensor, in sums that do not depend on the order of their terms.

/// Sums are whole multiples of 2⁻⁶⁰.
const UNIT: f64 = (1_u64 << 60) as f64;

/// Per index of one axis, the sum of all values there.
///
/// One tensor's sum is an f64 in a fixed order; across tensors sums are integers, so that merging is exact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Means {
    axis: usize,
    /// In units of 2⁻⁶⁰.
    sums: Vec<i128>,
    /// Values per channel.
    count: u64,
}

impl Means {
    /// No values yet; `axis` counts from the front.
    pub fn along(axis: usize) -> Self {
        Self { axis, sums: Vec::new(), count: 0 }
    }

    /// The same from a file; `None` where sums and count contradict each other.
    pub fn from_parts(axis: usize, sums: Vec<i128>, count: u64) -> Option<Self> {
        (sums.is_empty() == (count == 0)).then_some(Self { axis, sums, count })
    }

    /// Axis, sums in units of 2⁻⁶⁰, and values per channel.
    pub fn to_parts(&self) -> (usize, &[i128], u64) {
        (self.axis, &self.sums, self.count)
    }

    /// Adds a tensor. One whose axis is missing or has another extent than before is left out, and so is one with values
    /// that are not finite.
    pub fn see(&mut self, values: &[f32], shape: &[usize]) {
        let Some(&channels) = shape.get(self.axis) else { return };
        let inner: usize = shape[self.axis + 1..].iter().product();
        if channels == 0 || inner == 0 || !(self.sums.is_empty() || self.sums.len() == channels) {
            return;
        }
        let mut sums = vec![0.0_f64; channels];
        if inner == 1 {
            for row in values.chunks_exact(channels) {
                sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v));
            }
        } else {
            for (index, run) in values.chunks_exact(inner).enumerate() {
                sums[index % channels] += run.iter().map(|&v| f64::from(v)).sum::<f64>();
            }
        }
        if sums.iter().any(|sum| !sum.is_finite()) {
            return;
        }
        self.sums.resize(channels, 0);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "saturates beyond 2^67, where a mean has lost its meaning"
        )]
        self.sums.iter_mut().zip(sums).for_each(|(total, sum)| *total = total.saturating_add((sum * UNIT) as i128));
        self.count = self.count.saturating_add((values.len() / channels) as u64);
    }

    /// Adds what `other` saw; nothing when it is of another shape.
    pub fn merge(&mut self, other: &Self) {
        if self.sums.is_empty() {
            self.clone_from(other);
        } else if self.sums.len() == other.sums.len() && self.axis == other.axis {
            self.sums.iter_mut().zip(&other.sums).for_each(|(mine, theirs)| *mine = mine.saturating_add(*theirs));
            self.count = self.count.saturating_add(other.count);
        }
    }

    /// The mean of every channel; `None` when nothing was seen.
    pub fn means(&self) -> Option<Vec<f64>> {
        let scale = UNIT * self.count as f64;
        (self.count > 0).then(|| self.sums.iter().map(|&sum| sum as f64 / scale).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn channels_are_told_apart_and_order_does_not_matter() {
        let tensors: Vec<Vec<f32>> =
            (0..5_u8).map(|t| (0..12_u8).map(|i| 0.1 * f32::from(i) - f32::from(t) * 1e-3).collect()).collect();
        let mut forward = Means::along(1);
        tensors.iter().for_each(|t| forward.see(t, &[2, 3, 2]));
        let mut backward = Means::along(1);
        for tensor in tensors.iter().rev() {
            let mut one = Means::along(1);
            one.see(tensor, &[2, 3, 2]);
            backward.merge(&one);
        }
        assert_eq!(forward, backward);
        // Channel 0 has elements 0, 1, 6, 7 of each tensor: mean 0.35 less the mean shift of 0.002.
        let means = forward.means().unwrap();
        assert!((means[0] - 0.348).abs() < 1e-6 && (means[2] - 0.748).abs() < 1e-6, "{means:?}");
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut means = Means::along(1);
        means.see(&[1.0, 2.0], &[2]);
        means.see(&[f32::NAN, 2.0], &[1, 2]);
        assert_eq!(means.means(), None);
        means.see(&[1.0, 2.0], &[1, 2]);
        means.see(&[1.0, 2.0, 3.0], &[1, 3]);
        assert_eq!(means.means(), Some(vec![1.0, 2.0]));
    }

    fn merged(a: &Means, b: &Means) -> Means {
        let mut all = a.clone();
        all.merge(b);
        all
    }

    #[test]
    fn merging_is_commutative_and_associative_with_nothing_as_identity() {
        let value = |t: u64, i: u64| (mixed(t << 8 | i) % 20_001) as f32 / 10_000.0 - 1.0;
        let tensors: Vec<Vec<f32>> = (0..10).map(|t| (0..12).map(|i| value(t, i)).collect()).collect();
        let of = |tensors: &[Vec<f32>]| {
            let mut seen = Means::along(1);
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
        let none = Means::along(1);
        assert_eq!((&merged(&whole, &none), &merged(&none, &whole)), (&whole, &whole));
    }
}
