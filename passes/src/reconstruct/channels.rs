//! How far means and variances of channels are from those of the float model:
//!
//! ```text
//! Σ_c |μ_c − μ'_c| / √power + |σ²_c − σ'²_c| / power
//! ```
//!
//! Source: Li et al. 2023 (Norm Tweaking), arXiv:2309.02784; in units of the output's power, ours.

/// The shape of an output, and which of its rows are words.
pub(super) type Place<'a> = (&'a [usize], Option<&'a [bool]>);

/// The axis of channels: words have them last, maps before their extents.
fn axis(shape: &[usize]) -> usize {
    if shape.len() >= 4 { 1 } else { shape.len().saturating_sub(1) }
}

/// How many channels there are.
pub(super) fn count(shape: &[usize]) -> usize {
    shape.get(axis(shape)).copied().unwrap_or(1).max(1)
}

/// The channel of every number; `None` for padding.
fn channels((shape, words): Place<'_>) -> impl Iterator<Item = Option<usize>> + '_ {
    let all: usize = shape.iter().product();
    let inner = shape.iter().skip(axis(shape) + 1).product::<usize>().max(1);
    let count = count(shape);
    let width = words.map_or(1, |words| (all / words.len().max(1)).max(1));
    let counts = move |at: usize| words.is_none_or(|words| words.get(at / width).copied().unwrap_or(true));
    (0..all).map(move |at| counts(at).then_some(at / inner % count))
}

/// Mean and variance of every channel, and of how many numbers each is.
fn moments(values: &[f32], place: Place<'_>) -> (Vec<[f64; 2]>, f64) {
    let mut sums = vec![[0.0_f64; 2]; count(place.0)];
    let mut seen = 0_usize;
    for (value, channel) in values.iter().zip(channels(place)) {
        let Some(channel) = channel else { continue };
        let value = f64::from(*value);
        sums[channel] = [sums[channel][0] + value, sums[channel][1] + value * value];
        seen += 1;
    }
    let n = (seen as f64 / sums.len() as f64).max(1.0);
    for [mean, square] in &mut sums {
        *mean /= n;
        *square = (*square / n - *mean * *mean).max(0.0);
    }
    (sums, n)
}

/// The distance of `got` from `target`, summed over channels.
pub(super) fn error(target: &[f32], got: &[f32], place: Place<'_>, power: f64) -> f64 {
    let ((wanted, _), (found, _)) = (moments(target, place), moments(got, place));
    let apart = |(wanted, found): (&[f64; 2], &[f64; 2])| {
        (found[0] - wanted[0]).abs() / power.sqrt() + (found[1] - wanted[1]).abs() / power
    };
    wanted.iter().zip(&found).map(apart).sum()
}

/// Half the gradient of the distance by `got`.
#[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
pub(super) fn gradient(target: &[f32], got: &[f32], place: Place<'_>, power: f64, grad: &mut [f32]) {
    let ((wanted, _), (found, n)) = (moments(target, place), moments(got, place));
    // What hits its target has no direction.
    let sign = |apart: f64| if apart == 0.0 { 0.0 } else { apart.signum() };
    let of = |(wanted, found): (&[f64; 2], &[f64; 2])| {
        let (by_mean, by_spread) = (sign(found[0] - wanted[0]), sign(found[1] - wanted[1]));
        (found[0], 0.5 * by_mean / (n * power.sqrt()), by_spread / (n * power))
    };
    let factors: Vec<(f64, f64, f64)> = wanted.iter().zip(&found).map(of).collect();
    for ((grad, z), channel) in grad.iter_mut().zip(got).zip(channels(place)) {
        let Some((mean, by_mean, by_spread)) = channel.map(|channel| factors[channel]) else { continue };
        *grad = (by_mean + by_spread * (f64::from(*z) - mean)) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POWER: f64 = 4.0;

    #[test]
    fn means_and_variances_count_and_nothing_else_does() {
        let target = [0.0, 0.0, 2.0, 4.0];
        let place: Place<'_> = (&[1, 2, 2], None);
        // The first channel is 1 higher, with the same variance.
        assert!((error(&target, &[1.0, 0.0, 3.0, 4.0], place, POWER) - 0.5).abs() < 1e-12);
        // Words that trade places have the same means and variances.
        assert!(error(&target, &[2.0, 4.0, 0.0, 0.0], place, POWER) < 1e-12);
        // In other units it is the same.
        let (large, other) = (target.map(|t| 4.0 * t), [1.5, -1.0, 2.0, 7.0]);
        let same = error(&target, &other, place, POWER);
        assert!((error(&large, &other.map(|v| 4.0 * v), place, 16.0 * POWER) - same).abs() < 1e-12 && same > 0.1);
        let mut grad = [1.0; 4];
        gradient(&target, &target, place, POWER, &mut grad);
        assert!(grad.iter().all(|g| *g == 0.0), "{grad:?}");
    }

    #[test]
    fn padding_is_in_no_mean() {
        let place: Place<'_> = (&[1, 3, 2], Some(&[true, true, false]));
        let (target, got) = ([0.0, 0.0, 2.0, 4.0, 9.0, 9.0], [1.0, 0.0, 3.0, 4.0, -9.0, 1.0]);
        assert!((error(&target, &got, place, POWER) - 0.5).abs() < 1e-12);
        let mut grad = [0.0; 6];
        gradient(&target, &got, place, POWER, &mut grad);
        assert_eq!(grad[4..], [0.0, 0.0]);
    }

    /// Channels of maps lie before their extents.
    #[test]
    fn maps_and_words_of_the_same_channels_are_alike() {
        let (target, got) = ([0.0, 1.0, 2.0, 3.0, 5.0, 7.0], [0.5, 1.0, 2.5, 2.0, 5.0, 8.0]);
        let turned = |v: [f32; 6]| [v[0], v[3], v[1], v[4], v[2], v[5]];
        let maps = error(&target, &got, (&[1, 2, 1, 3], None), POWER);
        let words = error(&turned(target), &turned(got), (&[1, 3, 2], None), POWER);
        assert!((maps - words).abs() < 1e-12 && maps > 0.1);
    }
}
