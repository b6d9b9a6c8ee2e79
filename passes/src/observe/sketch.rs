//! The one statistic of a tensor's values: a histogram over the top bits of their f32 patterns.
//!
//! A bucket is a sign, an exponent and the six leading mantissa bits, so every value is known to 1/64 of itself. The state
//! has a fixed size; updates are one increment; merging adds counts. The result depends only on the multiset of values,
//! not on their order, batching or threads.

/// Mantissa bits that tell buckets apart.
const MANTISSA: u32 = 6;
const SHIFT: u32 = 23 - MANTISSA;
const BUCKETS: usize = 1 << (32 - SHIFT);
/// Buckets of one sign.
const HALF: usize = BUCKETS / 2;
/// The first bucket of infinities and NaN, within one sign.
const NONFINITE: usize = 0xff << MANTISSA;
/// The 32-bit counters are emptied into the 64-bit ones before they could overflow.
const FLUSH_AFTER: u64 = 1 << 31;

/// The distribution of a tensor's values.
#[derive(Clone)]
pub struct Sketch {
    hot: Vec<u32>,
    in_hot: u64,
    cold: Vec<u64>,
    min: f32,
    max: f32,
}

/// Values that share sign, exponent and leading mantissa bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// The end nearer to negative infinity, cut at the smallest value seen.
    pub low: f64,
    /// The other end, cut at the largest value seen.
    pub high: f64,
    /// How many values.
    pub count: u64,
}

impl Bucket {
    /// The middle.
    pub fn center(&self) -> f64 {
        f64::midpoint(self.low, self.high)
    }

    /// The magnitudes it spans, smaller first.
    pub fn magnitudes(&self) -> (f64, f64) {
        let (a, b) = (self.low.abs(), self.high.abs());
        (a.min(b), a.max(b))
    }
}

impl std::fmt::Debug for Sketch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sketch({} values in [{}, {}], {} not finite)", self.finite(), self.min, self.max, self.nonfinite())
    }
}

impl PartialEq for Sketch {
    fn eq(&self, other: &Self) -> bool {
        self.raw().eq(other.raw()) && self.min() == other.min() && self.max() == other.max()
    }
}

impl Default for Sketch {
    fn default() -> Self {
        Self { hot: vec![0; BUCKETS], in_hot: 0, cold: Vec::new(), min: f32::INFINITY, max: f32::NEG_INFINITY }
    }
}

impl Sketch {
    /// Counts `values`. NaN and infinities are counted but move neither end.
    pub fn see(&mut self, values: &[f32]) {
        for part in values.chunks(1 << 20) {
            if self.in_hot + part.len() as u64 > FLUSH_AFTER {
                self.flush();
            }
            self.in_hot += part.len() as u64;
            for value in part {
                self.hot[(value.to_bits() >> SHIFT) as usize] += 1;
            }
            self.stretch(part);
        }
    }

    fn stretch(&mut self, part: &[f32]) {
        // Sixteen independent lanes: the compiler makes vectors of them. `min` and `max` drop NaN.
        let mut low = [f32::INFINITY; 16];
        let mut high = [f32::NEG_INFINITY; 16];
        let chunks = part.chunks_exact(16);
        for &value in chunks.remainder() {
            low[0] = low[0].min(value);
            high[0] = high[0].max(value);
        }
        for chunk in chunks {
            for lane in 0..16 {
                low[lane] = if chunk[lane] < low[lane] { chunk[lane] } else { low[lane] };
                high[lane] = if chunk[lane] > high[lane] { chunk[lane] } else { high[lane] };
            }
        }
        let (low, high) =
            (low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max));
        if low.is_infinite() || high.is_infinite() {
            let finite = part.iter().copied().filter(|v| v.is_finite());
            for value in finite {
                self.min = self.min.min(value);
                self.max = self.max.max(value);
            }
        } else {
            self.min = self.min.min(low);
            self.max = self.max.max(high);
        }
    }

    fn flush(&mut self) {
        self.cold.resize(BUCKETS, 0);
        for (cold, hot) in self.cold.iter_mut().zip(&mut self.hot) {
            *cold += u64::from(std::mem::take(hot));
        }
        self.in_hot = 0;
    }

    /// Adds what `other` counted.
    pub fn merge(&mut self, other: &Self) {
        if other.cold.is_empty() && self.in_hot + other.in_hot <= FLUSH_AFTER {
            self.hot.iter_mut().zip(&other.hot).for_each(|(mine, theirs)| *mine += theirs);
            self.in_hot += other.in_hot;
        } else {
            self.flush();
            self.cold.iter_mut().zip(other.raw()).for_each(|(cold, count)| *cold += count);
        }
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Whether all that `part` counted is among what this one did.
    pub(crate) fn holds(&self, part: &Self) -> bool {
        self.raw().zip(part.raw()).all(|(all, part)| part <= all)
    }

    /// Without what `other`, a part of it, counted; its ends are then known to 1/64 of themselves.
    pub(crate) fn less(&self, other: &Self) -> Self {
        let counts = self.raw().zip(other.raw()).map(|(all, part)| all.saturating_sub(part));
        let mut rest = Self { cold: counts.collect(), min: self.min, max: self.max, ..Self::default() };
        let ends = rest.buckets().fold(None, |ends, bucket| {
            let (low, _) = ends.unwrap_or((bucket.low, bucket.high));
            Some((low, bucket.high))
        });
        #[expect(clippy::cast_possible_truncation, reason = "ends of buckets are f32")]
        let (min, max) = ends.map_or((f32::INFINITY, f32::NEG_INFINITY), |(low, high)| (low as f32, high as f32));
        (rest.min, rest.max) = (min, max);
        rest
    }

    fn count_at(&self, index: usize) -> u64 {
        u64::from(self.hot[index]) + self.cold.get(index).copied().unwrap_or(0)
    }

    fn raw(&self) -> impl Iterator<Item = u64> + '_ {
        (0..BUCKETS).map(|index| self.count_at(index))
    }

    /// The filled buckets as (bucket number, count), and the ends: what a file needs.
    pub fn to_parts(&self) -> (Vec<(u32, u64)>, f32, f32) {
        let filled = self.raw().enumerate().filter(|(_, count)| *count > 0);
        #[expect(clippy::cast_possible_truncation, reason = "bucket numbers are below 2^15")]
        let filled = filled.map(|(index, count)| (index as u32, count)).collect();
        (filled, self.min, self.max)
    }

    /// The inverse of [`Self::to_parts`]; `None` for bucket numbers out of range, ends that are no numbers, or counts that
    /// overflow.
    pub fn from_parts(filled: &[(u32, u64)], min: f32, max: f32) -> Option<Self> {
        let mut sketch = Self { cold: vec![0; BUCKETS], min, max, ..Self::default() };
        for &(index, count) in filled {
            let slot = sketch.cold.get_mut(index as usize)?;
            *slot = slot.checked_add(count)?;
        }
        let total = sketch.cold.iter().try_fold(0_u64, |sum, &n| sum.checked_add(n))?;
        let ordered = !min.is_nan() && !max.is_nan() && (min <= max || total == 0 || sketch.finite() == 0);
        ordered.then_some(sketch)
    }

    /// The number of finite values.
    pub fn finite(&self) -> u64 {
        (0..HALF).filter(|&i| i < NONFINITE).map(|i| self.count_at(i) + self.count_at(i + HALF)).sum()
    }

    /// The number of NaN and infinities.
    pub fn nonfinite(&self) -> u64 {
        (NONFINITE..HALF).map(|i| self.count_at(i) + self.count_at(i + HALF)).sum()
    }

    /// The smallest finite value; 0 when there was none.
    pub fn min(&self) -> f64 {
        if self.min > self.max { 0.0 } else { f64::from(self.min) }
    }

    /// The largest finite value; 0 when there was none.
    pub fn max(&self) -> f64 {
        if self.min > self.max { 0.0 } else { f64::from(self.max) }
    }

    /// The filled buckets of finite values, from the most negative up.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> + '_ {
        let negative = (HALF..HALF + NONFINITE).rev();
        let positive = 0..NONFINITE;
        negative.chain(positive).filter_map(|index| {
            let count = self.count_at(index);
            (count > 0).then(|| self.bucket(index, count))
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "bucket numbers are below 2^15")]
    fn bucket(&self, index: usize, count: u64) -> Bucket {
        // Zero and everything below the first mantissa step share a bucket; it stands for zero.
        let at = |pattern: u32| f64::from(f32::from_bits(pattern << SHIFT));
        let (near, far) = match index % HALF {
            0 => (0.0, 0.0),
            magnitude => (at(magnitude as u32), at(magnitude as u32 + 1).min(f64::from(f32::MAX))),
        };
        let (low, high) = if index >= HALF { (-far, -near) } else { (near, far) };
        Bucket { low: low.max(self.min()).min(self.max()), high: high.min(self.max()).max(self.min()), count }
    }

    /// The value below which the share `p` of all finite values lies: inclusive nearest rank ceil(p · n), linear within
    /// its bucket. `p <= 0` gives the minimum, `p >= 1` the maximum.
    pub fn quantile(&self, p: f64) -> f64 {
        rank(self.buckets(), self.finite(), p)
            .map_or(0.0, |(bucket, inside)| bucket.low + (bucket.high - bucket.low) * inside)
    }

    /// As [`Self::quantile`], of |x|.
    pub fn quantile_of_magnitude(&self, p: f64) -> f64 {
        let mut buckets: Vec<Bucket> = self
            .buckets()
            .map(|bucket| {
                let (low, high) = bucket.magnitudes();
                Bucket { low, high, count: bucket.count }
            })
            .collect();
        buckets.sort_by(|a, b| a.low.total_cmp(&b.low).then(a.high.total_cmp(&b.high)));
        rank(buckets.into_iter(), self.finite(), p)
            .map_or(0.0, |(bucket, inside)| bucket.low + (bucket.high - bucket.low) * inside)
    }
}

/// The bucket that holds the value of rank ceil(p · n), and how far into it that value lies, from 0 to 1.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank between 1 and the count")]
fn rank(mut buckets: impl Iterator<Item = Bucket>, total: u64, p: f64) -> Option<(Bucket, f64)> {
    let target = ((p * total as f64).ceil() as u64).clamp(1, total.max(1));
    let mut below = 0;
    buckets.find_map(|bucket| {
        if below + bucket.count >= target {
            let inside = match (p <= 0.0, bucket.count) {
                (true, _) => 0.0,
                (_, count) => (target - below) as f64 / count as f64,
            };
            return Some((bucket, inside));
        }
        below += bucket.count;
        None
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;
    use crate::seed::mixed;

    fn of(values: &[f32]) -> Sketch {
        let mut sketch = Sketch::default();
        sketch.see(values);
        sketch
    }

    #[test]
    fn order_cuts_and_merging_do_not_matter() {
        let mut values = normal(10_000);
        values.extend([f32::NAN, f32::INFINITY, -0.0, 0.0, 1e-40, f32::MAX, f32::MIN]);
        let whole = of(&values);
        let mut reversed: Vec<f32> = values.clone();
        reversed.reverse();
        assert_eq!(whole, of(&reversed));
        let mut merged = Sketch::default();
        for part in values.chunks(137) {
            merged.merge(&of(part));
        }
        assert_eq!(whole, merged);
        let (filled, min, max) = whole.to_parts();
        assert_eq!(Sketch::from_parts(&filled, min, max), Some(whole));
    }

    #[test]
    fn nothing_is_lost() {
        let sketch = of(&[f32::NAN, f32::NEG_INFINITY, 1.0, -2.5, 0.0]);
        assert_eq!((sketch.finite(), sketch.nonfinite()), (3, 2));
        assert_eq!((sketch.min(), sketch.max()), (-2.5, 1.0));
        assert_eq!(sketch.buckets().map(|b| b.count).sum::<u64>(), 3);
    }

    #[test]
    fn quantiles_hit_the_ends_and_are_close_between() {
        let values: Vec<f32> = (1..=1000).map(|i| i as f32).collect();
        let sketch = of(&values);
        assert!((sketch.quantile(1.0) - 1000.0).abs() < 1e-9);
        assert!((sketch.quantile(0.0) - 1.0).abs() < 1e-9);
        assert!((sketch.quantile(0.5) - 500.0).abs() < 500.0 / 64.0);
        let mirrored = of(&values.iter().flat_map(|&v| [v, -v]).collect::<Vec<_>>());
        assert!((mirrored.quantile_of_magnitude(1.0) - 1000.0).abs() < 1e-9);
        assert!((mirrored.quantile_of_magnitude(0.9) - 900.0).abs() < 900.0 / 64.0);
    }

    #[test]
    fn files_that_lie_are_refused() {
        assert!(Sketch::from_parts(&[(1 << 20, 1)], 0.0, 0.0).is_none());
        assert!(Sketch::from_parts(&[(5, u64::MAX), (6, 1)], 0.0, 0.0).is_none());
        assert!(Sketch::from_parts(&[(5, 1)], f32::NAN, 0.0).is_none());
    }

    /// Bit patterns of all kinds.
    fn drawn(seed: u64) -> Vec<f32> {
        let n = mixed(seed) % 300;
        (0..n).map(|i| f32::from_bits(u32::try_from(mixed(seed << 32 | i) >> 32).unwrap())).collect()
    }

    fn merged(a: &Sketch, b: &Sketch) -> Sketch {
        let mut all = a.clone();
        all.merge(b);
        all
    }

    #[test]
    fn merging_is_commutative_and_associative_with_nothing_as_identity() {
        for seed in 0..30 {
            let [a, b, c] = [1, 2, 3].map(|part| of(&drawn(3 * seed + part)));
            // What comes from a file counts in the wide counters.
            let (filled, min, max) = b.to_parts();
            let b = Sketch::from_parts(&filled, min, max).unwrap();
            assert_eq!(merged(&a, &b), merged(&b, &a), "{seed}");
            assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)), "{seed}");
            let all = [drawn(3 * seed + 1), drawn(3 * seed + 2), drawn(3 * seed + 3)].concat();
            assert_eq!(merged(&merged(&c, &a), &b), of(&all), "{seed}");
            let none = Sketch::default();
            for sketch in [&a, &b] {
                assert_eq!((&merged(sketch, &none), &merged(&none, sketch)), (sketch, sketch), "{seed}");
            }
        }
    }

    #[test]
    fn quantiles_never_fall() {
        let shares: Vec<f64> = (0..=40).map(|i| f64::from(i) / 40.0).collect();
        for seed in 0..8 {
            let sketch = of(&drawn(seed));
            let found: Vec<f64> = shares.iter().map(|&p| sketch.quantile(p)).collect();
            assert!(found.is_sorted(), "{seed}: {found:?}");
            assert!(found.iter().all(|q| (sketch.min()..=sketch.max()).contains(q)), "{seed}: {found:?}");
        }
        // Magnitudes of both signs share a bucket, which is a 64th of them wide.
        let sketch = of(&normal(1000));
        let found: Vec<f64> = shares.iter().map(|&p| sketch.quantile_of_magnitude(p)).collect();
        assert!(found.windows(2).all(|pair| pair[1] >= pair[0] * (1.0 - 1.0 / 32.0)), "{found:?}");
    }
}
