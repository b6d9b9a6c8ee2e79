//! Observers: how a range is chosen from what calibration saw.
//!
//! Calibration keeps one [`Sketch`] per tensor, whatever the number of samples; every observer is a function of it.

mod cfp;
mod cross;
mod ends;
mod entropy;
mod gram;
mod means;
mod min_max;
mod mse;
mod peaks;
mod percentile;
mod rows;
mod sketch;

pub(crate) use cfp::inliers_end;
pub use cross::{Cross, CrossSums};
pub use ends::Ends;
pub use gram::{Gram, GramSums};
pub use means::Means;
pub use peaks::Peaks;
pub use rows::{Rows, Window};
pub use sketch::{Bucket, Sketch};

use std::fmt::Debug;

use crate::about::About;

/// What the range will be used for.
#[derive(Clone, Copy, Debug)]
pub struct Purpose {
    /// The number of points of the grid.
    pub levels: f64,
    /// Whether the range must be symmetric around 0.
    pub symmetric: bool,
}

/// A way to choose a range. The range always contains 0; `low <= 0 <= high`.
pub trait Observer: Debug + Send + Sync {
    /// Name, documentation, source.
    fn about(&self) -> &'static About;
    /// The range for a tensor of distribution `sketch`; (0, 0) when it saw nothing but zeros.
    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64);
    /// Whether samples that judge have a say in it.
    fn is_judged(&self) -> bool {
        false
    }
    /// The range where samples that judge may have been seen.
    fn judged(&self, seen: &Seen<'_>, purpose: Purpose) -> (f64, f64) {
        self.range(seen.all, purpose)
    }
}

/// What was seen of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// On all samples that were measured.
    pub all: &'a Sketch,
    /// On those that judge.
    pub judges: Option<&'a Judges>,
}

/// The distribution of a tensor on samples that judge what others choose.
#[derive(Clone, Debug)]
pub struct Judges {
    /// What they brought.
    pub sketch: Sketch,
    /// Whether they are others than those that all was measured on, and not some of them.
    pub apart: bool,
}

/// Makes an observer from its one number, where it takes one.
type Build = fn(Option<f64>) -> Box<dyn Observer>;

/// An observer in the catalogue.
pub struct ObserverEntry {
    /// Name, documentation, source.
    pub about: &'static About,
    /// Makes it; the number is its `keep` option.
    pub build: Build,
}

/// Every observer, in the order of the manual.
pub static OBSERVERS: &[ObserverEntry] = &[
    ObserverEntry { about: &min_max::ABOUT, build: |_| Box::new(min_max::MinMax) },
    ObserverEntry { about: &percentile::ABOUT, build: |keep| Box::new(percentile::Percentile::new(keep)) },
    ObserverEntry { about: &mse::ABOUT, build: |_| Box::new(mse::Mse) },
    ObserverEntry { about: &entropy::ABOUT, build: |_| Box::new(entropy::Entropy) },
    ObserverEntry { about: &cfp::ABOUT, build: |_| Box::new(cfp::Cfp) },
];

/// The observer called `name`; `keep` is its option.
pub fn find(name: &str, keep: Option<f64>) -> Option<Box<dyn Observer>> {
    OBSERVERS.iter().find(|entry| entry.about.name == name).map(|entry| (entry.build)(keep))
}

/// Σ x² and the expected Σ (x̂ − x)² of `sketch` in steps of `step` between `low` and `high`; magnitudes beyond `usual` count as that in the
/// first sum.
pub(crate) fn expected_error(sketch: &Sketch, (low, high): (f64, f64), step: f64, usual: f64) -> (f64, f64) {
    let (mut signal, mut error) = (0.0, 0.0);
    for bucket in sketch.buckets() {
        let (x, n) = (bucket.center(), bucket.count as f64);
        signal += n * x.abs().min(usual).powi(2);
        error += n * ((x - x.clamp(low, high)).powi(2) + (step * step / 12.0).min(x * x));
    }
    (signal, error)
}

/// Below this many values a tail says nothing: observers fall back to minimum and maximum.
const FEW: u64 = 100;

/// `(low, high)` widened to contain 0, and mirrored for symmetric purposes.
fn around_zero(low: f64, high: f64, purpose: Purpose) -> (f64, f64) {
    let (low, high) = (low.min(0.0), high.max(0.0));
    if purpose.symmetric { (-high.max(-low), high.max(-low)) } else { (low, high) }
}

fn extremes(sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
    around_zero(sketch.min(), sketch.max(), purpose)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    /// The `i`-th of `n` quantiles of N(0, 1), by Acklam-free bisection of the error function's series.
    pub(super) fn normal(n: usize) -> Vec<f32> {
        // Sum of 12 uniforms minus 6, from a fixed linear congruence: near enough to normal for ranges.
        let mut state = 1_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u32 << 24) as f32
        };
        (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
    }

    fn sketch(values: &[f32]) -> Sketch {
        let mut sketch = Sketch::default();
        sketch.see(values);
        sketch
    }

    #[test]
    fn every_observer_stays_near_the_data_and_contains_zero() {
        let bell = sketch(&normal(20_000));
        let positive = sketch(&normal(20_000).iter().map(|v| v.abs() + 1.0).collect::<Vec<_>>());
        for entry in OBSERVERS {
            let observer = (entry.build)(None);
            for symmetric in [false, true] {
                let purpose = Purpose { levels: 256.0, symmetric };
                for data in [&bell, &positive] {
                    let (low, high) = observer.range(data, purpose);
                    let (min, max) = extremes(data, purpose);
                    assert!(low <= 0.0 && high >= 0.0, "{observer:?}");
                    assert!(high <= max * 1.2 && low >= min * 1.2, "{observer:?} {low} {high} {min} {max}");
                    assert!(high > 1.5, "{observer:?} {high}");
                }
                assert_eq!(observer.range(&Sketch::default(), purpose), (0.0, 0.0), "{observer:?}");
                assert_eq!(observer.range(&sketch(&[0.0; 200]), purpose), (0.0, 0.0), "{observer:?}");
            }
        }
    }

    /// A power of two is an exact change of units, so the range must follow it exactly.
    #[test]
    fn ranges_follow_the_units() {
        let values = normal(5_000);
        let doubled: Vec<f32> = values.iter().map(|v| v * 1024.0).collect();
        for entry in OBSERVERS {
            let observer = (entry.build)(None);
            let purpose = Purpose { levels: 256.0, symmetric: false };
            let (a, b) = (observer.range(&sketch(&values), purpose), observer.range(&sketch(&doubled), purpose));
            assert!((a.0 * 1024.0 - b.0).abs() < 1e-6 * b.0.abs(), "{observer:?}");
            assert!((a.1 * 1024.0 - b.1).abs() < 1e-6 * b.1.abs(), "{observer:?}");
        }
    }

    #[test]
    fn one_outlier_does_not_set_the_range_of_mse_and_entropy() {
        let mut values = normal(200_000);
        values.push(100.0);
        let data = sketch(&values);
        let purpose = Purpose { levels: 256.0, symmetric: true };
        for name in ["mse", "entropy", "percentile", "cfp"] {
            let (_, high) = find(name, None).unwrap().range(&data, purpose);
            assert!(high < 60.0, "{name} {high}");
        }
        assert!((find("min-max", None).unwrap().range(&data, purpose).1 - 100.0).abs() < 1e-9);
    }

    /// Numbers of a normal distribution. Source: Box and Muller 1958.
    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    fn bell(n: u64) -> Vec<f32> {
        let at = |i: u64| {
            let (u, v) = (uniform(2 * i), uniform(2 * i + 1));
            ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        (0..n).map(at).collect()
    }

    /// Data of many shapes: even, with tails, on one side, with an outlier, in few values.
    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    fn drawn(seed: u64) -> Vec<f32> {
        let of = |i: u64| {
            let x = 2.0 * uniform(seed << 32 | i) - 1.0;
            let y = match seed % 6 {
                4 if i == 0 => 40.0,
                0 | 4 => x,
                1 => x.powi(3),
                2 => x.abs() + 0.5,
                3 => -x.abs().powi(5),
                _ => (3.0 * x).round(),
            };
            y as f32
        };
        (0..=mixed(seed) % 600).map(of).collect()
    }

    /// A purpose of few codes or many.
    fn purpose(seed: u64) -> Purpose {
        let levels = [4.0, 16.0, 256.0][usize::try_from(mixed(seed ^ 0x4d) % 3).unwrap()];
        Purpose { levels, symmetric: mixed(seed ^ 0x4e) & 1 == 0 }
    }

    /// Seeds for an observer: fewer for the one that takes its time.
    fn seeds(entry: &ObserverEntry) -> std::ops::Range<u64> {
        0..if entry.about.name == "entropy" { 6 } else { 60 }
    }

    #[test]
    fn keeping_everything_is_min_max() {
        let (everything, min_max) = (find("percentile", Some(1.0)).unwrap(), find("min-max", None).unwrap());
        for seed in 0..60 {
            let (data, purpose) = (sketch(&drawn(seed)), purpose(seed));
            assert_eq!(everything.range(&data, purpose), min_max.range(&data, purpose), "{seed} {purpose:?}");
        }
    }

    #[test]
    fn no_range_reaches_beyond_the_data() {
        for entry in OBSERVERS {
            let observer = (entry.build)(None);
            for seed in seeds(entry) {
                let (data, purpose) = (sketch(&drawn(seed)), purpose(seed));
                let ((low, high), (min, max)) = (observer.range(&data, purpose), extremes(&data, purpose));
                let near = 1e-9 * (max - min);
                assert!(low <= 0.0 && high >= 0.0, "{observer:?} {seed}: {low} {high}");
                assert!(low >= min - near && high <= max + near, "{observer:?} {seed}: {low} {high} {min} {max}");
            }
        }
    }

    #[test]
    fn ranges_by_error_err_no_more_than_the_extremes() {
        for name in ["mse", "cfp"] {
            let observer = find(name, None).unwrap();
            for seed in 0..60 {
                let (data, purpose) = (sketch(&drawn(seed)), purpose(seed));
                let points = mse::points(&data);
                let error = |(low, high): (f64, f64)| mse::expected_error(&points, low, high, purpose.levels);
                let (found, whole) = (error(observer.range(&data, purpose)), error(extremes(&data, purpose)));
                assert!(found <= whole * (1.0 + 1e-6), "{name} {seed} {purpose:?}: {found} {whole}");
            }
        }
    }

    #[test]
    fn the_range_of_a_constant_ends_there() {
        for entry in OBSERVERS {
            let observer = (entry.build)(None);
            for value in [3.0_f32, -0.7, 1e-20, -1e20] {
                let purpose = Purpose { levels: 256.0, symmetric: false };
                let (low, high) = observer.range(&sketch(&[value; 200]), purpose);
                let (value, size) = (f64::from(value), f64::from(value).abs());
                let (end, other) = if value > 0.0 { (high, low) } else { (low, high) };
                assert!((end - value).abs() < 0.01 * size && other.abs() < 1e-9 * size, "{observer:?} {low} {high}");
            }
        }
    }

    #[test]
    fn ranges_follow_powers_of_two_of_any_size() {
        for entry in OBSERVERS {
            let observer = (entry.build)(None);
            for seed in seeds(entry) {
                let (values, purpose) = (drawn(seed), purpose(seed));
                let factor = 2.0_f32.powi(i32::try_from(mixed(seed ^ 0x4f) % 61).unwrap() - 30);
                let scaled: Vec<f32> = values.iter().map(|v| v * factor).collect();
                let (a, b) = (observer.range(&sketch(&values), purpose), observer.range(&sketch(&scaled), purpose));
                for (a, b) in [(a.0, b.0), (a.1, b.1)] {
                    let differ = (a * f64::from(factor) - b).abs();
                    assert!(differ <= 1e-9 * b.abs(), "{observer:?} {seed}: {a} times {factor} is not {b}");
                }
            }
        }
    }

    /// Where uniform steps for N(0, 1) are best cut off. Source: Max 1960, table II; Banner et al. 2019.
    #[test]
    fn a_normal_distribution_is_cut_where_the_error_is_least() {
        let data = sketch(&bell(20_000));
        let observer = find("mse", None).unwrap();
        for (bits, want) in [(3, 1.95), (4, 2.475), (5, 2.90), (6, 3.27), (7, 3.605), (8, 3.92)] {
            let (_, high) = observer.range(&data, Purpose { levels: f64::from(1 << bits), symmetric: true });
            assert!((high - want).abs() < 0.25, "{bits} bits: {high}");
        }
    }
}
