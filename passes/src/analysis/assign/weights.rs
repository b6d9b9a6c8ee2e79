//! Scales of weights.

use super::Goal;
use crate::encoding::{Encoding, Granularity};
use crate::grid::block::BlockFormat;
use crate::grid::{self, Grid};
use crate::parallel;
use crate::pass::{OptionError, Options};
use crate::target::Scheme;
use crate::tensor::Tensor;

/// How the scale of a weight channel or block is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum WeightScale {
    /// The largest magnitude at the largest code.
    MinMax,
    /// The smallest squared error of rounding to nearest.
    Mse,
    /// The largest magnitude that is no outlier at the largest code, where that lowers the squared error.
    Cfp,
}

impl WeightScale {
    /// What option `weights` says.
    pub(in super::super) fn of(options: &Options) -> Result<Self, OptionError> {
        match options.text("weights", "mse") {
            "min-max" => Ok(Self::MinMax),
            "mse" => Ok(Self::Mse),
            "cfp" => Ok(Self::Cfp),
            other => {
                let problem = format!("`{other}` is none of min-max, mse, cfp");
                Err(OptionError { option: "weights".into(), problem })
            }
        }
    }
}

/// The grid for weights: of the format that `scheme` names, or integers of so many bits, signed, or unsigned where they have zero
/// points.
pub(super) fn weight_grid(scheme: &Scheme) -> Option<&'static dyn Grid> {
    if let Some(block) = scheme.block_format() {
        return Some(block.element);
    }
    if let Some(name) = scheme.weight_format {
        return grid::find(name);
    }
    let sign = if scheme.asymmetric { "uint" } else { "int" };
    let suffix = if scheme.weight_bits == 2 { "-in-4" } else { "" };
    grid::find(&format!("{sign}{}{suffix}", scheme.weight_bits))
}

/// The scale of what is all zero on a grid without 0, where every point is off: next to nothing. 16-bit floats hold it, and half of it, too
/// (`--rest f16`), as they hold nothing below 2⁻²⁴; ranges that are chosen anew may halve it.
const VANISHING: f32 = f32::EPSILON;

/// Whether 0 is a point of `grid`: it is none of the signs.
pub(in super::super) fn holds_zero(grid: &dyn Grid) -> bool {
    grid.nearest(0.0) == 0.0
}

/// Scales and zero points, which are 0 where the scheme has none: those of every output channel, or of all of them in one.
pub(super) fn ranges(weight: &Tensor, axis: usize, by_channel: bool, goals: &Goal) -> Option<Vec<(f64, i32)>> {
    if !goals.scheme.asymmetric {
        let scales = scales(weight, axis, by_channel, goals)?;
        return Some(scales.into_iter().map(|scale| (scale, 0)).collect());
    }
    let channels = if by_channel { channels(weight, axis)? } else { vec![weight.floats()?.into_owned()] };
    let range = |channel: &Vec<f32>| {
        let (scale, zero) = affine_block(channel, goals);
        (f64::from(scale), zero)
    };
    Some(parallel::map(&channels, range))
}

/// Symmetric scales: one per output channel, or one in all.
pub(super) fn scales(weight: &Tensor, axis: usize, by_channel: bool, goals: &Goal) -> Option<Vec<f64>> {
    if by_channel {
        return channel_scales(weight, axis, goals);
    }
    let scale = scale_of(&weight.floats()?, goals);
    Some(vec![if scale > 0.0 { scale } else { 1.0 }])
}

/// Symmetric scales per output channel; a channel of zeros takes the median of the others, where the grid has a 0 for it.
fn channel_scales(weight: &Tensor, axis: usize, goals: &Goal) -> Option<Vec<f64>> {
    let mut scales: Vec<f64> = parallel::map(&channels(weight, axis)?, |channel| scale_of(channel, goals));
    let mut live: Vec<f64> = scales.iter().copied().filter(|&s| s > 0.0).collect();
    live.sort_by(f64::total_cmp);
    let median = live.get(live.len() / 2).copied().unwrap_or(1.0);
    scales.iter_mut().filter(|s| **s <= 0.0).for_each(|s| *s = median);
    Some(scales)
}

/// What `weight` holds, by its channels along `axis`.
fn channels(weight: &Tensor, axis: usize) -> Option<Vec<Vec<f32>>> {
    let channels = *weight.shape().get(axis)?;
    let inner: usize = weight.shape()[axis + 1..].iter().product();
    let values = weight.floats()?;
    let mut by_channel: Vec<Vec<f32>> = vec![Vec::with_capacity(values.len() / channels.max(1)); channels];
    for (index, run) in values.chunks(inner.max(1)).enumerate() {
        by_channel[index % channels].extend_from_slice(run);
    }
    Some(by_channel)
}

/// The scale for one channel, never below what f32 holds with full precision; 0 when it is all zero on a grid that holds that, as any scale
/// will do then.
fn scale_of(channel: &[f32], goals: &Goal) -> f64 {
    let grid = goals.weight_grid;
    let top = channel.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    if top == 0.0 {
        return if holds_zero(grid) { 0.0 } else { VANISHING.into() };
    }
    if grid.info().bits == 1 {
        return allowed(mean_magnitude(channel), goals, |scale| squared_error(channel, grid, scale, 0.0));
    }
    let widest = f64::from(top) / grid.range().1;
    let best = match goals.weights {
        WeightScale::MinMax => widest,
        WeightScale::Mse => least_squares_scale(channel, grid, widest),
        WeightScale::Cfp => truncated_scale(channel, grid, widest),
    };
    allowed(best, goals, |scale| squared_error(channel, grid, scale, 0.0)).max(f64::from(f32::MIN_POSITIVE))
}

/// Of all factors of the signs of `values` that with the smallest squared error (XNOR-Net, arXiv:1603.05279, equation 6).
fn mean_magnitude(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|v| f64::from(v.abs())).sum();
    (sum / values.len().max(1) as f64).max(f64::from(f32::MIN_POSITIVE))
}

/// `scale`, or where scales are powers of two the one beside it with the smaller `error`.
fn allowed(scale: f64, goals: &Goal, error: impl Fn(f64) -> f64) -> f64 {
    if !goals.scheme.power_of_two {
        return scale;
    }
    let [below, above] = powers_of_two(scale);
    if error(below) < error(above) { below } else { above }
}

/// The powers of two on either side of `scale`, with its sign: both `scale` where it is one; none beyond what f32 holds.
#[expect(clippy::cast_possible_truncation, reason = "exponents of finite numbers")]
pub(super) fn powers_of_two(scale: f64) -> [f64; 2] {
    let exponent = scale.abs().log2();
    [exponent.floor(), exponent.ceil()].map(|e| 2.0_f64.powi((e as i32).min(127)).copysign(scale))
}

/// Rows shorter than this have no tail to speak of.
const FEWEST_WITH_OUTLIERS: usize = 256;

/// The scale that leaves outliers out, where its squared rounding error is smaller than that of `widest`.
fn truncated_scale(channel: &[f32], grid: &dyn Grid, widest: f64) -> f64 {
    if channel.len() < FEWEST_WITH_OUTLIERS {
        return widest;
    }
    let mut magnitudes: Vec<(f64, u64)> = channel.iter().map(|v| (f64::from(v.abs()), 1)).collect();
    let error = |scale: f64| squared_error(channel, grid, scale, 0.0);
    let cut = crate::observe::inliers_end(&mut magnitudes).map(|end| end / grid.range().1);
    cut.filter(|&cut| error(cut) < error(widest)).unwrap_or(widest)
}

/// Of scales from the widest down to a share of it that falls with the bits, the one with the smallest squared rounding error.
fn least_squares_scale(channel: &[f32], grid: &dyn Grid, widest: f64) -> f64 {
    let steps = if grid.info().bits >= 8 { 30 } else { 60 };
    let candidates = (0..=steps).map(|step| widest * (1.0 - 0.01 * f64::from(step)));
    let error = |scale: f64| squared_error(channel, grid, scale, 0.0);
    candidates.map(|scale| (error(scale), scale)).min_by(|a, b| a.0.total_cmp(&b.0)).map_or(widest, |(_, scale)| scale)
}

/// Σ (ŵ − w)².
#[expect(clippy::cast_possible_truncation, reason = "scales are used as f32")]
fn squared_error(values: &[f32], grid: &dyn Grid, scale: f64, zero: f32) -> f64 {
    let scale = scale as f32;
    let mut points: Vec<f32> = values.iter().map(|w| w / scale).collect();
    grid.snap(&mut points, zero);
    points.iter().zip(values).map(|(p, w)| f64::from(p * scale - w).powi(2)).sum()
}

/// Scales, and zero points where the scheme has them, for blocks of `size` along `axis` of a matrix.
pub(super) fn blocked(weight: &Tensor, axis: usize, size: usize, goals: &Goal) -> Option<Encoding> {
    let [rows, columns] = *weight.shape() else { return None };
    let values = weight.floats()?;
    let top = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let (blocks, lines) = if axis == 0 { (rows.div_ceil(size), columns) } else { (columns.div_ceil(size), rows) };
    // Row-major over the shape with `axis` cut.
    let places: Vec<(usize, usize)> = if axis == 0 {
        (0..blocks).flat_map(|block| (0..lines).map(move |line| (block, line))).collect()
    } else {
        (0..lines).flat_map(|line| (0..blocks).map(move |block| (block, line))).collect()
    };
    let chosen = parallel::map(&places, |&(block, line)| {
        let run = block * size..((block + 1) * size).min(if axis == 0 { rows } else { columns });
        let at = |i: usize| values[if axis == 0 { i * columns + line } else { line * columns + i }];
        let block: Vec<f32> = run.map(at).collect();
        match goals.scheme.block_format() {
            Some(format) => (least_of(&block, format, top), 0),
            None if goals.scheme.asymmetric => affine_block(&block, goals),
            None => signed_block(&block, goals),
        }
    });
    let (scale, zero_point): (Vec<f32>, Vec<i32>) = chosen.into_iter().unzip();
    let granularity = Granularity::Block { axis, size };
    Some(Encoding { grid: goals.weight_grid, granularity, scale: scale.into(), zero_point: zero_point.into() })
}

/// Of the scales that `format` has for `block`, that with the smallest squared rounding error.
fn least_of(block: &[f32], format: &BlockFormat, top: f32) -> f32 {
    let peak = block.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let [first, second] = format.candidates(peak, top);
    let error = |scale: f32| squared_error(block, format.element, f64::from(scale), 0.0);
    if error(second) < error(first) { second } else { first }
}

/// A symmetric scale whose sign gives the longer tail the extra code that two's complement has on the negative side.
#[expect(clippy::cast_possible_truncation, reason = "scales are used as f32")]
fn signed_block(block: &[f32], goals: &Goal) -> (f32, i32) {
    let longest = block.iter().copied().fold(0.0_f32, |m, v| if v.abs() > m.abs() { v } else { m });
    let grid = goals.weight_grid;
    if longest == 0.0 {
        return (if holds_zero(grid) { 1.0 } else { VANISHING }, 0);
    }
    if grid.info().bits == 1 {
        let scale = allowed(mean_magnitude(block), goals, |scale| squared_error(block, grid, scale, 0.0));
        return (scale as f32, 0);
    }
    // Formats that are as long on both sides have no use for the sign.
    let widest = match grid.range() {
        (low, high) if low + high < 0.0 && goals.accepts.negative_scales => f64::from(longest) / low,
        (_, high) => f64::from(longest.abs()) / high,
    };
    let scale = match goals.weights {
        // A block is too short for outliers.
        WeightScale::MinMax | WeightScale::Cfp => widest,
        WeightScale::Mse => {
            let others = (0..=25).map(|step| widest * (1.05 - 0.02 * f64::from(step)));
            let error = |scale: &f64| squared_error(block, grid, *scale, 0.0);
            std::iter::once(widest).chain(others).min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(widest)
        }
    };
    let scale = allowed(scale, goals, |scale| squared_error(block, grid, scale, 0.0));
    (if (scale as f32).is_normal() { scale as f32 } else { 1.0 }, 0)
}

/// Scale and zero point that map the range of `block`, with 0 in it, onto all codes; for least squares both ends come in together, then
/// each alone, as long as that lowers the error.
fn affine_block(block: &[f32], goals: &Goal) -> (f32, i32) {
    let grid = goals.weight_grid;
    let (from, to) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), &v| (low.min(v), high.max(v)));
    let (from, to) = (f64::from(from), f64::from(to));
    let encoding =
        |(low, high): (f64, f64)| super::encode::affine((from * low, to * high), grid.range().0, grid.range().1);
    if goals.scheme.power_of_two {
        return power_of_two_block(block, (from, to), goals);
    }
    if goals.weights != WeightScale::Mse {
        return encoding((1.0, 1.0));
    }
    #[expect(clippy::cast_precision_loss, reason = "zero points of up to 8 bits")]
    let error = |ends: (f64, f64)| {
        let (scale, zero) = encoding(ends);
        squared_error(block, grid, f64::from(scale), zero as f32)
    };
    let mut best = ((1.0, 1.0), error((1.0, 1.0)));
    let mut consider = |ends| {
        let found = error(ends);
        if found < best.1 {
            best = (ends, found);
        }
        best.0
    };
    let steps = |most: i32| (1..=most).map(|step| 0.04 * f64::from(step));
    let mut ends = (1.0, 1.0);
    steps(10).for_each(|s| ends = consider((1.0 - s, 1.0 - s)));
    let both = ends;
    steps(3).for_each(|s| ends = consider((both.0 - s, both.1)));
    steps(3).for_each(|s| ends = consider((both.0 + s, both.1)));
    let low = ends.0;
    steps(3).for_each(|s| ends = consider((low, both.1 - s)));
    steps(3).for_each(|s| ends = consider((low, both.1 + s)));
    encoding(ends)
}

/// Of the powers of two around the scale that maps `range` onto all codes, that with the smaller error, and its zero point.
#[expect(clippy::cast_possible_truncation, reason = "zero points between the ends of the grid, scales as f32")]
fn power_of_two_block(block: &[f32], range: (f64, f64), goals: &Goal) -> (f32, i32) {
    let grid = goals.weight_grid;
    let (low, high) = grid.range();
    let zero = |scale: f64| (low - range.0 / scale).round_ties_even().clamp(low, high);
    let (scale, _) = super::encode::affine(range, low, high);
    let scale = allowed(f64::from(scale), goals, |scale| squared_error(block, grid, scale, zero(scale) as f32));
    (scale as f32, zero(scale) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};
    use crate::target::Accepts;

    fn goals(bits: u32, weights: WeightScale) -> Goal {
        let scheme = Scheme { block: Some(4), ..Scheme::integers(bits, None) };
        Goal::new(scheme, weights, &Accepts::USUAL).unwrap()
    }

    #[test]
    fn a_dead_channel_takes_the_median_scale() {
        let weight = Tensor::of([3, 2], vec![127.0_f32, -1.0, 0.0, 0.0, 12.7, 1.0]);
        let scales = channel_scales(&weight, 0, &goals(8, WeightScale::MinMax)).unwrap();
        assert!((scales[0] - 1.0).abs() < 1e-6 && (scales[2] - 0.1).abs() < 1e-6);
        assert!(scales[1] > 0.05, "{scales:?}");
        let dead = Tensor::of([2, 1], vec![0.0_f32; 2]);
        assert_eq!(channel_scales(&dead, 0, &goals(8, WeightScale::Mse)).unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn a_channel_of_one_sign_spends_all_codes_on_it() {
        let scheme = Scheme { asymmetric: true, ..Scheme::integers(4, Some(8)) };
        let goal = Goal::new(scheme, WeightScale::MinMax, &Accepts::USUAL).unwrap();
        let weight = Tensor::of([3, 2], vec![1.5_f32, 0.1, -0.3, -3.0, 0.0, 0.0]);
        let close = |(scale, zero): (f64, i32), want: (f64, i32)| (scale - want.0).abs() < 1e-6 && zero == want.1;
        let found = ranges(&weight, 0, true, &goal).unwrap();
        assert!(close(found[0], (0.1, 0)) && close(found[1], (0.2, 15)) && found[2] == (1.0, 0), "{found:?}");
        let whole = ranges(&weight, 0, false, &goal).unwrap();
        assert!(whole.len() == 1 && close(whole[0], (0.3, 10)), "{whole:?}");
        let plain = goals(4, WeightScale::MinMax);
        let zeros: Vec<i32> = ranges(&weight, 0, true, &plain).unwrap().into_iter().map(|(_, zero)| zero).collect();
        assert_eq!(zeros, [0; 3], "none where the scheme has none");
    }

    #[test]
    fn outliers_are_cut_where_codes_are_few() {
        let mut channel: Vec<f32> = (0..512).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        channel[7] = 2.5;
        let scale = |bits: u32, how: WeightScale| scale_of(&channel, &goals(bits, how));
        assert!(scale(4, WeightScale::Cfp) < 0.3 * scale(4, WeightScale::MinMax));
        let differ = scale(8, WeightScale::Cfp) - scale(8, WeightScale::MinMax);
        assert!(differ.abs() < 1e-12, "with 8 bits cutting costs more");
        channel.truncate(255);
        let short = truncated_scale(&channel, goals(4, WeightScale::Cfp).weight_grid, 8.0);
        assert!((short - 8.0).abs() < 1e-12, "a short row keeps its range");
    }

    #[test]
    fn the_longer_tail_gets_the_extra_code() {
        let goals = goals(4, WeightScale::MinMax);
        // 0.8 at code -8 with scale -0.1; the ragged tail has a scale of its own.
        let weight = Tensor::of([5, 1], vec![0.8_f32, -0.3, 0.1, 0.0, -0.4]);
        let encoding = blocked(&weight, 0, 4, &goals).unwrap();
        assert!((encoding.scale[0] + 0.1).abs() < 1e-6 && (encoding.scale[1] - 0.05).abs() < 1e-6, "{encoding:?}");
        let mut values = vec![0.8_f32, -0.3, 0.1, 0.0, -0.4];
        encoding.simulate(&mut values, &[5, 1]).unwrap();
        assert!((values[0] - 0.8).abs() < 1e-6 && (values[4] + 0.4).abs() < 1e-6, "{values:?}");
    }

    #[test]
    fn both_ends_of_a_range_come_in_where_that_lowers_the_error() {
        let scheme = Scheme { asymmetric: true, ..goals(4, WeightScale::Mse).scheme };
        let of = |weights| Goal::new(scheme, weights, &Accepts::USUAL).unwrap();
        let error = |block: &[f32], goals: &Goal| {
            let (scale, zero) = affine_block(block, goals);
            squared_error(block, goals.weight_grid, f64::from(scale), zero as f32)
        };
        let mut block: Vec<f32> = (0..32).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.2).collect();
        block[5] = -0.9;
        let (whole, least) = (error(&block, &of(WeightScale::MinMax)), error(&block, &of(WeightScale::Mse)));
        assert!(least < 0.97 * whole, "{least} {whole}");
        let exact: Vec<f32> = (0..16).map(|i| 0.25 * (i as f32 - 3.0)).collect();
        assert_eq!(affine_block(&exact, &of(WeightScale::Mse)), (0.25, 3), "what lies on a grid stays on it");
        assert_eq!(affine_block(&[0.0; 4], &of(WeightScale::Mse)), (1.0, 0));
    }

    /// One bit: of a fine list of scales none has a smaller error than the mean magnitude, and there it is Σ w² − n s².
    #[test]
    fn no_scale_of_signs_beats_the_mean_magnitude() {
        for how in [WeightScale::MinMax, WeightScale::Mse, WeightScale::Cfp] {
            let goals = Goal::new(Scheme::parse("w1a16g64").unwrap(), how, &Accepts::USUAL).unwrap();
            for seed in 0..8_u64 {
                #[expect(clippy::cast_possible_truncation, reason = "any numbers will do")]
                let values: Vec<f32> = (0..64).map(|i| (uniform(mixed(seed) ^ i) - 0.3) as f32).collect();
                let scale = scale_of(&values, &goals);
                let error = |scale: f64| squared_error(&values, goals.weight_grid, scale, 0.0);
                let least = (1..2000).map(|step| error(f64::from(step) * 1e-3)).fold(f64::INFINITY, f64::min);
                assert!(error(scale) <= least + 1e-6, "{how:?} {seed}: {scale}, {} {least}", error(scale));
                let squares: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
                assert!((error(scale) - (squares - 64.0 * scale * scale)).abs() < 1e-4, "{how:?} {seed}");
                let (block, zero) = signed_block(&values, &goals);
                assert!((f64::from(block) - scale).abs() < 1e-6 && zero == 0, "{how:?} {seed}: {block} {scale}");
            }
        }
    }

    /// 0 becomes 1, whose scale decides what is left of it. 16-bit floats hold that, also once its range was halved.
    #[test]
    fn zeros_among_signs_stay_next_to_nothing() {
        let weight = Tensor::of([2, 4], vec![0.0_f32, 0.0, 3.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
        for scheme in ["w1a16", "w1a8pow2"] {
            let goals = Goal::new(Scheme::parse(scheme).unwrap(), WeightScale::Mse, &Accepts::USUAL).unwrap();
            let blocks = blocked(&weight, 1, 2, &goals).unwrap();
            assert_eq!(blocks.scale.to_vec(), [VANISHING, 2.0, VANISHING, VANISHING], "{scheme}");
            let mut values = weight.floats().unwrap().into_owned();
            blocks.simulate(&mut values, weight.shape()).unwrap();
            assert!(values[..2].iter().chain(&values[4..]).all(|value| value.abs() < 1e-6), "{scheme}: {values:?}");
            let channels = channel_scales(&weight, 0, &goals).unwrap();
            assert_eq!(channels, [1.0, f64::from(VANISHING)], "{scheme}");
            let dead = Tensor::of([1, 2], vec![0.0_f32; 2]);
            assert_eq!(scales(&dead, 0, false, &goals).unwrap(), [f64::from(VANISHING)], "{scheme}");
        }
        for scale in [VANISHING, 0.5 * VANISHING] {
            assert_eq!(half::f16::from_f32(scale).to_f32().to_bits(), scale.to_bits());
        }
    }

    #[test]
    fn powers_of_two_enclose_a_scale() {
        for (scale, want) in [(0.3, [0.25, 0.5]), (0.25, [0.25, 0.25]), (-3.0, [-2.0, -4.0])] {
            let found = powers_of_two(scale);
            assert!(found.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{scale}: {found:?}");
        }
        let scheme = Scheme { asymmetric: true, power_of_two: true, ..goals(4, WeightScale::Mse).scheme };
        let goal = Goal::new(scheme, WeightScale::Mse, &Accepts::USUAL).unwrap();
        let exact: Vec<f32> = (0..16).map(|i| 0.25 * (i as f32 - 3.0)).collect();
        assert_eq!(affine_block(&exact, &goal), (0.25, 3));
    }

    #[test]
    fn blocks_lie_along_either_axis() {
        let values: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        let goals = goals(4, WeightScale::MinMax);
        let tall = blocked(&Tensor::of([4, 3], values.clone()), 0, 2, &goals).unwrap();
        let wide = blocked(&Tensor::of([4, 3], values), 1, 2, &goals).unwrap();
        assert_eq!((tall.scale.len(), wide.scale.len()), (6, 8));
        assert_eq!(tall.scale_shape(&[4, 3]), [2, 3]);
        assert_eq!(wide.scale_shape(&[4, 3]), [4, 2]);
    }

    /// A row of random numbers, every other one with a long tail.
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    fn drawn(seed: u64) -> Vec<f32> {
        let size = 2.0_f64.powi(i32::try_from(mixed(seed << 32) % 41).unwrap() - 20);
        let weight = |i: u64| {
            let x = 2.0 * uniform(seed << 32 | (i + 1)) - 1.0;
            (size * if seed.is_multiple_of(2) { x } else { x.powi(5) }) as f32
        };
        (0..=mixed(seed) % 400).map(weight).collect()
    }

    #[test]
    fn a_searched_scale_errs_no_more_than_that_of_the_extremes() {
        for seed in 0..20 {
            let row = drawn(seed);
            for bits in 2..=8 {
                let signed = |how: WeightScale| {
                    let goal = goals(bits, how);
                    squared_error(&row, goal.weight_grid, scale_of(&row, &goal), 0.0)
                };
                let affine = |how: WeightScale| {
                    let scheme = Scheme { asymmetric: true, ..goals(bits, how).scheme };
                    let goal = Goal::new(scheme, how, &Accepts::USUAL).unwrap();
                    let (scale, zero) = affine_block(&row, &goal);
                    squared_error(&row, goal.weight_grid, f64::from(scale), zero as f32)
                };
                for how in [WeightScale::Mse, WeightScale::Cfp] {
                    assert!(signed(how) <= signed(WeightScale::MinMax), "{seed}: {bits} bits, {how:?}");
                    assert!(affine(how) <= affine(WeightScale::MinMax), "{seed}: {bits} bits, {how:?}");
                }
            }
        }
    }

    #[test]
    fn scales_are_normal_whatever_the_row() {
        #[expect(clippy::cast_possible_truncation, reason = "scales are used as f32")]
        let is_normal = |scale: &f64| (*scale as f32).is_normal() && *scale > 0.0;
        let rows = [[1e-30_f32, -2e-30, 0.0, 1e-30], [0.0; 4], [1e-44, -1e-44, 0.0, 0.0], [1e30, 3.0, -1.0, 0.5]];
        let weight = Tensor::of([4, 4], rows.concat());
        for bits in 2..=8 {
            for how in [WeightScale::MinMax, WeightScale::Mse, WeightScale::Cfp] {
                for (asymmetric, power_of_two) in [(false, false), (false, true), (true, false), (true, true)] {
                    let scheme = Scheme { asymmetric, power_of_two, ..goals(bits, how).scheme };
                    let goal = Goal::new(scheme, how, &Accepts::USUAL).unwrap();
                    let rows = channel_scales(&weight, 0, &goal).unwrap();
                    assert!(rows.iter().all(is_normal), "{scheme}, {how:?}: {rows:?}");
                    for axis in [0, 1] {
                        let blocks = blocked(&weight, axis, 3, &goal).unwrap().scale;
                        assert!(blocks.iter().all(|scale| scale.is_normal()), "{scheme}, {how:?}: {blocks:?}");
                    }
                }
            }
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "scales are used as f32")]
    fn scales_that_must_be_powers_of_two_are() {
        let is_power = |scale: f32| scale.is_normal() && scale.to_bits().trailing_zeros() >= 23;
        for seed in 0..20 {
            let row = drawn(seed);
            for bits in 2..=8 {
                for (how, asymmetric) in
                    [(WeightScale::MinMax, true), (WeightScale::Mse, true), (WeightScale::Mse, false)]
                {
                    let scheme = Scheme { asymmetric, power_of_two: true, ..goals(bits, how).scheme };
                    let goal = Goal::new(scheme, how, &Accepts::USUAL).unwrap();
                    let block = if asymmetric { affine_block(&row, &goal).0 } else { signed_block(&row, &goal).0 };
                    assert!(is_power(block), "{seed} {scheme} {how:?}: {block}");
                    let channel = scale_of(&row, &goal) as f32;
                    assert!(is_power(channel), "{seed} {scheme} {how:?}: {channel}");
                }
            }
        }
    }
}
