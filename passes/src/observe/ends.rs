//! Where the values of every channel begin and end.

use super::Means;

/// Per index of one axis, the least and the largest finite value and the mean, whatever the order of what was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Ends {
    axis: usize,
    lows: Vec<f32>,
    highs: Vec<f32>,
    means: Means,
}

impl Ends {
    /// Nothing seen yet; `axis` counts from the front.
    pub fn along(axis: usize) -> Self {
        Self { axis, lows: Vec::new(), highs: Vec::new(), means: Means::along(axis) }
    }

    /// Adds a tensor; one whose axis is missing or has another extent than before is left out.
    pub fn see(&mut self, values: &[f32], shape: &[usize]) {
        let Some(&channels) = shape.get(self.axis) else { return };
        let inner: usize = shape[self.axis + 1..].iter().product();
        if channels == 0 || inner == 0 || !(self.lows.is_empty() || self.lows.len() == channels) {
            return;
        }
        self.lows.resize(channels, f32::INFINITY);
        self.highs.resize(channels, f32::NEG_INFINITY);
        for (index, run) in values.chunks_exact(inner).enumerate() {
            let (low, high) = (&mut self.lows[index % channels], &mut self.highs[index % channels]);
            for v in run.iter().filter(|v| v.is_finite()) {
                (*low, *high) = (low.min(*v), high.max(*v));
            }
        }
        self.means.see(values, shape);
    }

    /// Adds what `other` saw; nothing when it is of another shape.
    pub fn merge(&mut self, other: &Self) {
        if self.lows.is_empty() {
            self.clone_from(other);
        } else if self.lows.len() == other.lows.len() && self.axis == other.axis {
            self.lows.iter_mut().zip(&other.lows).for_each(|(mine, theirs)| *mine = mine.min(*theirs));
            self.highs.iter_mut().zip(&other.highs).for_each(|(mine, theirs)| *mine = mine.max(*theirs));
            self.means.merge(&other.means);
        }
    }

    /// The least and the largest value of every channel; `None` when nothing was seen, or no finite value of some channel.
    pub fn ranges(&self) -> Option<Vec<(f64, f64)>> {
        let ranges = || self.lows.iter().zip(&self.highs);
        let seen = !self.lows.is_empty() && ranges().all(|(low, high)| low <= high);
        seen.then(|| ranges().map(|(low, high)| (f64::from(*low), f64::from(*high))).collect())
    }

    /// The mean of every channel, over tensors in which everything is finite; `None` when there was none.
    pub fn means(&self) -> Option<Vec<f64>> {
        self.means.means()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn channels_are_told_apart_and_nothing_infinite_counts() {
        let mut ends = Ends::along(1);
        assert_eq!((ends.ranges(), ends.means()), (None, None));
        ends.see(&[1.0, -2.0, 3.0, 4.0], &[1, 2, 2]);
        assert_eq!(ends.ranges(), Some(vec![(-2.0, 1.0), (3.0, 4.0)]));
        assert_eq!(ends.means(), Some(vec![-0.5, 3.5]));
        ends.see(&[f32::INFINITY, f32::NAN, f32::NEG_INFINITY, 5.0], &[1, 2, 2]);
        ends.see(&[9.0, 9.0, 9.0], &[1, 3]);
        ends.see(&[], &[1, 2, 0]);
        assert_eq!(ends.ranges(), Some(vec![(-2.0, 1.0), (3.0, 5.0)]));
        let mut nothing_finite = Ends::along(0);
        nothing_finite.see(&[1.0, f32::NAN], &[2]);
        assert_eq!(nothing_finite.ranges(), None);
    }

    #[test]
    fn merging_is_commutative_and_associative_with_nothing_as_identity() {
        let value = |t: u64, i: u64| (mixed(t << 8 | i) % 20_001) as f32 / 10_000.0 - 1.0;
        let tensors: Vec<Vec<f32>> = (0..10).map(|t| (0..12).map(|i| value(t, i)).collect()).collect();
        let of = |tensors: &[Vec<f32>]| {
            let mut seen = Ends::along(1);
            tensors.iter().for_each(|tensor| seen.see(tensor, &[2, 3, 2]));
            seen
        };
        let merged = |a: &Ends, b: &Ends| {
            let mut all = a.clone();
            all.merge(b);
            all
        };
        let whole = of(&tensors);
        for cut in 0..=10 {
            let (a, b) = (of(&tensors[..cut]), of(&tensors[cut..]));
            assert_eq!((merged(&a, &b), merged(&b, &a)), (whole.clone(), whole.clone()), "{cut}");
        }
    }
}
