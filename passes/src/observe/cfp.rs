//! The range up to where outliers begin.

use std::borrow::Cow;

use super::{FEW, Observer, Purpose, Seen, Sketch, around_zero, extremes, mse};
use crate::about::About;

pub(super) static ABOUT: About = About {
    name: "cfp",
    doc: "The range without outliers, which are found coarse to fine: magnitudes beyond Q3 + 1.5 (Q3 - Q1), and of those the ones \
          above the split with the widest gap and the least variance below it. Where more than a twentieth would be cut, at most a \
          hundredth is. The range stays whole where clipping costs more than the finer step saves, on the samples it was found on or on those \
          that judge (held out, or every eighth), and below 100 values.",
    source: "Ding et al. 2023 (CBQ), arXiv:2312.07950, section 3.3, as a range; the guards ours",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Cfp;

impl Observer for Cfp {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
        let whole = extremes(sketch, purpose);
        if sketch.finite() < FEW {
            return whole;
        }
        let mut magnitudes: Vec<(f64, u64)> = sketch.buckets().map(|b| (b.magnitudes().1, b.count)).collect();
        let Some(end) = inliers_end(&mut magnitudes) else { return whole };
        let cut = around_zero(sketch.min().max(-end), sketch.max().min(end), purpose);
        let points = mse::points(sketch);
        let error = |(low, high)| mse::expected_error(&points, low, high, purpose.levels);
        if error(cut) < error(whole) { cut } else { whole }
    }

    fn is_judged(&self) -> bool {
        true
    }

    fn judged(&self, seen: &Seen<'_>, purpose: Purpose) -> (f64, f64) {
        let Some(judges) = seen.judges.filter(|judges| judges.sketch.finite() > 0) else {
            return self.range(seen.all, purpose);
        };
        // Of a file of statistics they are no part.
        let is_part = !judges.apart && seen.all.holds(&judges.sketch);
        let fitted = if is_part { Cow::Owned(seen.all.less(&judges.sketch)) } else { Cow::Borrowed(seen.all) };
        let (whole, cut) = (extremes(seen.all, purpose), self.range(&fitted, purpose));
        if cut == extremes(&fitted, purpose) {
            return whole;
        }
        let points = mse::points(&judges.sketch);
        let error = |(low, high)| mse::expected_error(&points, low, high, purpose.levels);
        if error(cut) < error(whole) { cut } else { whole }
    }
}

/// Beyond Q3 so many spreads between the quartiles a magnitude may be an outlier.
const SPREADS: f64 = 1.5;

/// More possible outliers than one in so many are no outliers; then at most one in [`FEWEST`] is.
const MOST: u64 = 20;
const FEWEST: u64 = 100;

/// The largest magnitude that is no outlier, among `magnitudes` with their counts, in any order; `None` when none is one. Zeros do not
/// count: pruned weights have no quartiles otherwise.
pub(crate) fn inliers_end(magnitudes: &mut Vec<(f64, u64)>) -> Option<f64> {
    magnitudes.retain(|&(magnitude, count)| magnitude > 0.0 && count > 0);
    magnitudes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n: u64 = magnitudes.iter().map(|(_, count)| count).sum();
    let rank = |rank: u64| {
        let mut below = 0;
        magnitudes.iter().find(|(_, count)| {
            below += count;
            below > rank
        })
    };
    let (first, third) = (rank(n / 4)?.0, rank(3 * n / 4)?.0);
    let threshold = third + SPREADS * (third - first);
    let mut start = magnitudes.partition_point(|&(magnitude, _)| magnitude <= threshold);
    let mut beyond: u64 = magnitudes[start..].iter().map(|(_, count)| count).sum();
    if beyond > n / MOST {
        while beyond > n / FEWEST {
            beyond -= magnitudes[start].1;
            start += 1;
        }
    }
    let inlier = magnitudes[..start].last()?.0;
    split(inlier, &magnitudes[start..])
}

/// Where `tail`, ascending beyond `inlier`, is cut: the largest magnitude that stays.
fn split(inlier: f64, tail: &[(f64, u64)]) -> Option<f64> {
    let (mut count, mut sum, mut squares) = (0.0_f64, 0.0_f64, 0.0_f64);
    let (mut last, mut best) = (inlier, (f64::INFINITY, None));
    for &(magnitude, n) in tail {
        let variance = if count < 2.0 { 0.0 } else { (squares / count - (sum / count).powi(2)).max(0.0) };
        let measure = variance - (magnitude - last).powi(2);
        if measure < best.0 {
            best = (measure, Some(last));
        }
        let n = n as f64;
        (count, sum, squares) = (count + n, sum + n * magnitude, squares + n * magnitude * magnitude);
        last = magnitude;
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;

    fn ones(values: &[f32]) -> Vec<(f64, u64)> {
        values.iter().map(|v| (f64::from(v.abs()), 1)).collect()
    }

    #[test]
    fn planted_outliers_are_found_and_nothing_else() {
        let mut values = normal(10_000);
        let top = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        values.extend([20.0, -20.5, 21.0, 20.2, -22.0]);
        let end = inliers_end(&mut ones(&values)).unwrap();
        assert!((end - f64::from(top)).abs() < 1e-6, "{end} {top}");
        // In other units the same ones; in any order.
        values.reverse();
        let mut doubled: Vec<(f64, u64)> = ones(&values).iter().map(|(v, n)| (8.0 * v, *n)).collect();
        assert!((inliers_end(&mut doubled).unwrap() - 8.0 * end).abs() < 1e-9);
    }

    #[test]
    fn a_cut_stands_where_other_samples_bear_it_out() {
        use super::super::Judges;
        let sketch = |values: &[f32]| {
            let mut sketch = Sketch::default();
            sketch.see(values);
            sketch
        };
        let purpose = Purpose { levels: 16.0, symmetric: true };
        let with = |n: usize, outliers: usize| [normal(n), vec![20.0; outliers]].concat();
        let all = sketch(&with(10_000, 4));
        let range = |judges: &[f32], apart: bool, all: &Sketch| {
            let judges = Judges { sketch: sketch(judges), apart };
            Cfp.judged(&Seen { all, judges: Some(&judges) }, purpose)
        };
        assert!(Cfp.range(&all, purpose).1 < 10.0 && Cfp.judged(&Seen { all: &all, judges: None }, purpose).1 < 10.0);
        assert!(range(&with(2_000, 1), true, &all).1 < 10.0, "so few that all gain");
        assert!((range(&with(2_000, 200), true, &all).1 - 20.0).abs() < 1e-9, "so many that it is not worth it");
        // Where judges are some of all, the cut is found on the others.
        let mut both = all.clone();
        let judges = with(2_000, 200);
        both.see(&judges);
        assert!((range(&judges, false, &both).1 - 20.0).abs() < 1e-9);
        let rest = both.less(&sketch(&judges));
        assert!(rest.finite() == all.finite() && (rest.max() - all.max()).abs() < all.max() / 32.0);
    }

    #[test]
    fn without_a_tail_nothing_is_cut() {
        let even: Vec<(f64, u64)> = (1..=1000).map(|i| (f64::from(i), 1)).collect();
        assert_eq!(inliers_end(&mut even.clone()), None);
        assert_eq!(inliers_end(&mut vec![(3.0, 500)]), None, "a constant");
        assert_eq!(inliers_end(&mut vec![(0.0, 500)]), None);
        assert_eq!(inliers_end(&mut Vec::new()), None);
        // Mostly zeros: the rest is judged by itself.
        let mut pruned = even;
        pruned.push((0.0, 100_000));
        assert_eq!(inliers_end(&mut pruned), None);
    }

    #[test]
    fn a_long_tail_loses_a_hundredth_at_most() {
        // A tenth lies far out: that is no outlier but the shape, and only its end may go.
        let mut values: Vec<(f64, u64)> = (1..=900).map(|i| (1.0 + f64::from(i) * 1e-4, 1)).collect();
        values.extend((0..100).map(|i| (10.0 + f64::from(i), 1)));
        let end = inliers_end(&mut values.clone()).unwrap();
        let cut = values.iter().filter(|(magnitude, _)| *magnitude > end).count();
        assert!((1..=10).contains(&cut), "{cut} beyond {end}");
    }

    /// The split by running sums is that of trying all of them.
    #[test]
    fn the_split_is_the_best_of_all() {
        let tail: Vec<(f64, u64)> = [4.1, 4.2, 4.4, 6.0, 6.1, 9.0, 9.2].map(|v| (v, 1)).to_vec();
        let measure = |at: usize| {
            let below: Vec<f64> = tail[..at].iter().map(|(v, _)| *v).collect();
            let mean = below.iter().sum::<f64>() / below.len().max(1) as f64;
            let variance = below.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / below.len().max(1) as f64;
            let last = below.last().copied().unwrap_or(4.0);
            (if below.len() < 2 { 0.0 } else { variance }) - (tail[at].0 - last).powi(2)
        };
        let best = (0..tail.len()).min_by(|&a, &b| measure(a).total_cmp(&measure(b))).unwrap();
        assert_eq!(split(4.0, &tail), Some(tail[best - 1].0));
    }

    #[test]
    fn a_whole_range_stays_where_clipping_costs_more() {
        let mut values = normal(2_000);
        values.extend([12.0; 10]);
        let mut sketch = Sketch::default();
        sketch.see(&values);
        let high = |levels: f64| Cfp.range(&sketch, Purpose { levels, symmetric: true }).1;
        assert!(high(65536.0) > 11.9 && high(8.0) < 6.0, "{} {}", high(65536.0), high(8.0));
    }
}
