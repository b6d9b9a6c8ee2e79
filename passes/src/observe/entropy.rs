//! The threshold whose quantized histogram is closest to the histogram, in relative entropy.

use super::{FEW, Observer, Purpose, Sketch, extremes};
use crate::about::About;

pub(super) static ABOUT: About = About {
    name: "entropy",
    doc: "The clipping threshold of |x| at which the distribution rounded to 128 levels loses the least information \
          (Kullback-Leibler divergence, with the smoothing that makes it finite). 2048 bins; where the best threshold is \
          near the floor of the search, the histogram is drawn again over a smaller range, up to three times. Meant for 8 \
          bits; both ends of an asymmetric range are shrunk alike.",
    source: "Migacz 2017, 8-bit inference with TensorRT; smoothing as in Apache MXNet",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Entropy;

const BINS: usize = 2048;
const LEVELS: usize = 128;
const SMOOTHING: f64 = 1e-4;
/// The largest share of the values that a threshold may clip.
const MOST_CLIPPED: f64 = 0.01;

impl Observer for Entropy {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn range(&self, sketch: &Sketch, purpose: Purpose) -> (f64, f64) {
        let (low, high) = extremes(sketch, purpose);
        let top = high.max(-low);
        if sketch.finite() < FEW || top <= 0.0 {
            return (low, high);
        }
        let mut limit = reach(sketch, top);
        let mut threshold = top;
        for _ in 0..4 {
            let histogram = histogram(sketch, limit);
            let bins = best_bins(&histogram);
            threshold = limit * bins as f64 / BINS as f64;
            if bins >= 2 * LEVELS {
                break;
            }
            limit = (4.0 * threshold).min(limit);
        }
        let factor = (threshold / top).min(1.0);
        // The end that is already inside the threshold is kept.
        let shrink = |end: f64| if end.abs() <= threshold { end } else { end * factor * top / end.abs() };
        (shrink(low), shrink(high))
    }
}

/// The largest magnitude to look at: `top`, unless an outlier is so far out that all others would fall into the first bin; then sixteen
/// times what all but a share of [`MOST_CLIPPED`] of those stay below. Zeros do not count.
fn reach(sketch: &Sketch, top: f64) -> f64 {
    let mut others: Vec<(f64, u64)> =
        sketch.buckets().map(|bucket| (bucket.magnitudes().1, bucket.count)).filter(|(end, _)| *end > 0.0).collect();
    others.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all: u64 = others.iter().map(|(_, count)| count).sum();
    let mut below = 0;
    let usual = others.into_iter().find(|(_, count)| {
        below += count;
        below as f64 >= (1.0 - MOST_CLIPPED) * all as f64
    });
    match usual {
        Some((end, _)) if end < top / BINS as f64 => 16.0 * end,
        _ => top,
    }
}

/// |x| over `BINS` bins of [0, limit]; what lies beyond counts into the last. A bucket is spread over the bins it covers.
fn histogram(sketch: &Sketch, limit: f64) -> Vec<f64> {
    let mut bins = vec![0.0; BINS];
    let width = limit / BINS as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bin number, clamped below")]
    let bin = |x: f64| ((x / width) as usize).min(BINS - 1);
    for bucket in sketch.buckets() {
        let (a, b) = bucket.magnitudes();
        let (first, last) = (bin(a), bin(b));
        let share = bucket.count as f64 / (last - first + 1) as f64;
        bins[first..=last].iter_mut().for_each(|n| *n += share);
    }
    // The spike at zero is exact on any grid and would outweigh everything else.
    bins[0] = bins[1];
    bins
}

/// How many bins to keep: the last of the best.
fn best_bins(histogram: &[f64]) -> usize {
    let mut best = (BINS, f64::INFINITY);
    let mut beyond: f64 = histogram[LEVELS..].iter().sum();
    let total: f64 = histogram.iter().sum();
    for keep in LEVELS..=BINS {
        if keep > LEVELS {
            beyond -= histogram[keep - 1];
        }
        // A single bin that holds everything as outliers would look perfect.
        if beyond > MOST_CLIPPED * total {
            continue;
        }
        if let Some(loss) = divergence(&histogram[..keep], beyond.max(0.0))
            && loss <= best.1
        {
            best = (keep, loss);
        }
    }
    best.0
}

/// The divergence of the kept bins, the outliers folded into the last, from their quantized form.
fn divergence(kept: &[f64], beyond: f64) -> Option<f64> {
    let n = kept.len();
    let mut p = kept.to_vec();
    p[n - 1] += beyond;
    let mut q = vec![0.0; n];
    for level in 0..LEVELS {
        let part = level * n / LEVELS..(level + 1) * n / LEVELS;
        let filled = kept[part.clone()].iter().filter(|&&v| v > 0.0).count();
        if filled == 0 {
            continue;
        }
        let mean = kept[part.clone()].iter().sum::<f64>() / filled as f64;
        for i in part {
            q[i] = if kept[i] > 0.0 { mean } else { 0.0 };
        }
    }
    let (p, q) = (smoothed(p)?, smoothed(q)?);
    Some(p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum())
}

/// A distribution with no zero: `SMOOTHING` on the empty bins, taken evenly from the others.
fn smoothed(mut bins: Vec<f64>) -> Option<Vec<f64>> {
    let total: f64 = bins.iter().sum();
    if total <= 0.0 {
        return None;
    }
    let empty = bins.iter().filter(|&&v| v <= 0.0).count();
    let take = SMOOTHING * empty as f64 / (bins.len() - empty) as f64;
    for v in &mut bins {
        *v = if *v > 0.0 { *v / total - take } else { SMOOTHING };
    }
    // A tiny bin may be driven below zero by its share: it then counts as nearly empty.
    bins.iter_mut().for_each(|v| *v = v.max(SMOOTHING * 1e-3));
    Some(bins)
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;

    fn near(got: Option<f64>, want: f64) -> bool {
        got.is_some_and(|got| (got - want).abs() < 1e-9)
    }

    /// Histograms whose divergence is worked by hand.
    #[test]
    fn divergences_are_those_by_hand() {
        // Two bins to a level: a quarter and three quarters of its mass become halves.
        let uneven = [1.0, 3.0].repeat(LEVELS);
        assert!(near(divergence(&uneven, 0.0), 0.25 * 0.5_f64.ln() + 0.75 * 1.5_f64.ln()));
        // What is empty stays so, and the level is the one bin that is not.
        assert!(near(divergence(&[4.0, 0.0].repeat(LEVELS), 0.0), 0.0));
        // One bin to a level loses nothing but the outliers: 127 bins of 1/256 and one of 129/256 against 1/128 each.
        let outliers = 127.0 / 256.0 * 0.5_f64.ln() + 129.0 / 256.0 * 64.5_f64.ln();
        assert!(near(divergence(&[1.0; LEVELS], 128.0), outliers));
        assert!(near(divergence(&[1.0; LEVELS], 0.0), 0.0));
        assert_eq!(divergence(&[0.0; LEVELS], 0.0), None);
    }

    /// An empty last bin that the outliers fall into would be infinitely far: smoothing makes it finite, and dearer than one that is not.
    #[test]
    fn outliers_in_an_empty_bin_cost_much_but_not_everything() {
        let mut kept = vec![1.0; 2 * LEVELS];
        let full = divergence(&kept, 8.0).unwrap();
        kept[2 * LEVELS - 2..].fill(0.0);
        let empty = divergence(&kept, 8.0).unwrap();
        assert!(full > 0.0 && empty > full && empty.is_finite(), "{full} {empty}");
        let smoothed = smoothed(vec![3.0, 0.0, 1.0]).unwrap();
        let want = [0.75 - SMOOTHING / 2.0, SMOOTHING, 0.25 - SMOOTHING / 2.0];
        assert!(smoothed.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12), "{smoothed:?}");
    }

    fn threshold(values: &[f32]) -> f64 {
        let mut sketch = Sketch::default();
        sketch.see(values);
        Entropy.range(&sketch, Purpose { levels: 256.0, symmetric: true }).1
    }

    /// Even data keeps its whole range; what one outlier of any size leaves of a normal distribution is a few deviations.
    #[test]
    fn thresholds_stay_with_the_bulk() {
        let even: Vec<f32> = (0..=20_000).map(|i| i as f32 / 20_000.0).collect();
        assert!((threshold(&even) - 1.0).abs() < 1e-3, "{}", threshold(&even));
        assert_eq!(best_bins(&[1.0; BINS]), BINS);
        for outlier in [10.0, 20.0, 100.0, 1000.0, 1e6] {
            let mut values = normal(200_000);
            values.push(outlier);
            let kept = threshold(&values);
            assert!((2.5..5.0).contains(&kept), "{outlier}: {kept}");
        }
    }
}
