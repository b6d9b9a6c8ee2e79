//! Number formats: finite sets of real points, before scaling.

pub mod block;
mod codebook;
mod float;
mod int;
mod sign;

use std::fmt::Debug;

use crate::about::About;
use crate::tensor::DType;

pub use codebook::CodebookGrid;
pub use float::FloatGrid;
pub use int::IntGrid;
pub use sign::SignGrid;

/// A finite set of real points, before scaling. Every method takes and returns unscaled numbers; ties round to even and
/// what lies outside saturates.
pub trait Grid: Debug + Send + Sync {
    /// Name, documentation, storage.
    fn info(&self) -> &GridInfo;
    /// The smallest and the largest point.
    fn range(&self) -> (f64, f64);
    /// The point nearest to `x`; NaN gives the point nearest to 0.
    fn nearest(&self, x: f64) -> f64;
    /// The largest point at or under `x`, or the smallest point where there is none.
    fn below(&self, x: f64) -> f64;
    /// The smallest point at or over `x`, or the largest point where there is none.
    fn above(&self, x: f64) -> f64;
    /// Replaces every `x` by the point of the grid shifted by `-zero` that ONNX's `QuantizeLinear` picks: the value is
    /// rounded first and `zero`, a whole number for integer grids and 0 otherwise, is added after. NaN gives the lowest point of integers of up to 16 bits, as
    /// in ONNX Runtime's kernels for x86.
    fn snap(&self, xs: &mut [f32], zero: f32);
    /// How its numbers are laid out, where they are floating-point numbers.
    fn float_format(&self) -> Option<FloatFormat> {
        None
    }
    /// The code of a point of the grid, in as many low bits as the storage type has.
    fn encode(&self, point: f64) -> u32;
    /// The point of a code; bits above the storage type's are ignored.
    fn decode(&self, code: u32) -> f64;
    /// The codes of `points`, which lie on the grid less `zero`.
    fn encode_run(&self, points: &[f32], zero: i32, codes: &mut [u32]) {
        for (code, point) in codes.iter_mut().zip(points) {
            // Adding 0 would take the sign of −0.
            let point = f64::from(*point);
            *code = self.encode(if zero == 0 { point } else { point + f64::from(zero) });
        }
    }
    /// The points of `codes`, as f32.
    #[expect(clippy::cast_possible_truncation, reason = "points of up to 24 bits are exact in f32, as ONNX has it")]
    fn decode_run(&self, codes: &[u32], points: &mut [f32]) {
        for (point, code) in points.iter_mut().zip(codes) {
            *point = self.decode(*code) as f32;
        }
    }
}

/// The layout of a floating-point format: a sign, and `(1 + m / 2^mantissa) · 2^(e − bias)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloatFormat {
    /// Bits of the exponent.
    pub exponent: u32,
    /// Bits of the mantissa.
    pub mantissa: u32,
    /// What is taken off the exponent.
    pub bias: i32,
    /// Whether some codes are infinities.
    pub infinities: bool,
    /// Whether some codes are NaN.
    pub nan: bool,
}

/// What a grid says about itself.
#[derive(Debug)]
pub struct GridInfo {
    /// Name and documentation.
    pub about: About,
    /// Bits that tell the codes apart.
    pub bits: u32,
    /// The ONNX element type that stores codes.
    pub storage: DType,
    /// Whether a zero point may shift it.
    pub integer: bool,
}

impl GridInfo {
    /// Whether codes are whole numbers that stand for themselves, in the type that stores them: those of integers, and the two signs.
    pub fn holds_integers(&self) -> bool {
        self.integer || self.bits == 1
    }
}

/// Every grid, in the order of the manual. Of those that share a storage type the first has all its codes.
pub static GRIDS: &[&dyn Grid] = &[
    &int::INT8,
    &int::UINT8,
    &int::INT8_NARROW,
    &int::INT16,
    &int::UINT16,
    &int::INT7,
    &int::UINT7,
    &int::INT6,
    &int::UINT6,
    &int::INT5,
    &int::UINT5,
    &int::INT4,
    &int::UINT4,
    &int::INT3,
    &int::UINT3,
    &int::INT2,
    &int::UINT2,
    &int::INT2_IN_4,
    &int::UINT2_IN_4,
    &int::INT2_IN_8,
    &int::UINT2_IN_8,
    &int::INT3_IN_8,
    &int::UINT3_IN_8,
    &int::INT4_IN_8,
    &int::UINT4_IN_8,
    &int::INT32,
    &int::INT7_NARROW,
    &int::INT6_NARROW,
    &int::INT5_NARROW,
    &int::INT4_NARROW,
    &int::INT3_NARROW,
    &int::INT2_NARROW,
    &int::INT9,
    &int::UINT9,
    &int::INT10,
    &int::UINT10,
    &int::INT11,
    &int::UINT11,
    &int::INT12,
    &int::UINT12,
    &int::INT13,
    &int::UINT13,
    &int::INT14,
    &int::UINT14,
    &int::INT15,
    &int::UINT15,
    &float::FLOAT8_E4M3FN,
    &float::FLOAT8_E4M3FNUZ,
    &float::FLOAT8_E5M2,
    &float::FLOAT8_E5M2FNUZ,
    &float::FLOAT8_E4M3B11FNUZ,
    &float::FLOAT8_E4M3,
    &float::FLOAT8_E3M4,
    &float::FLOAT4_E2M1,
    &codebook::NF4,
    &sign::BIPOLAR,
];

/// The point of `grid` after the point `at`, above it where `up`, else below; on the other side where the grid ends there.
pub(crate) fn neighbor(grid: &dyn Grid, at: f64, up: bool) -> f64 {
    // Points of floats with many exponent bits lie as near to 0 as 2^-62.
    let nudge = 1e-6 * at.abs().max(1e-30);
    let (above, below) = (grid.above(at + nudge), grid.below(at - nudge));
    let (wanted, other) = if up { (above, below) } else { (below, above) };
    let beyond = if up { wanted <= at } else { wanted >= at };
    if beyond { other } else { wanted }
}

/// The 8-bit float of ONNX whose lowest codes are those of `grid`, and what points of `grid` are multiplied by to become its own: it
/// has as many bits of mantissa and more of exponent, so that steps near zero are as fine as elsewhere. `None` where there is none.
pub fn carrier(grid: &dyn Grid) -> Option<(&'static dyn Grid, f32)> {
    let format = grid.float_format().filter(|format| !format.nan && !format.infinities)?;
    let wide: [&'static dyn Grid; 2] = [&float::FLOAT8_E4M3FN, &float::FLOAT8_E5M2];
    wide.into_iter().find_map(|wide| {
        let of = wide.float_format()?;
        // With more exponents, the one that holds NaN and infinities is out of reach.
        let fits = of.mantissa == format.mantissa && of.exponent > format.exponent;
        fits.then(|| (wide, 2.0_f32.powi(format.bias - of.bias)))
    })
}

/// The grids whose codes `stored` may hold, itself first, each with the factor of [`carrier`].
pub(crate) fn carried(stored: &'static dyn Grid) -> impl Iterator<Item = (&'static dyn Grid, f32)> {
    let name = stored.info().about.name;
    let others = all().filter_map(move |grid| {
        carrier(grid).filter(|(wide, _)| wide.info().about.name == name).map(|(_, factor)| (grid, factor))
    });
    std::iter::once((stored, 1.0)).chain(others)
}

/// Every grid, the minifloats of all widths included.
pub fn all() -> impl Iterator<Item = &'static dyn Grid> {
    GRIDS.iter().chain(float::MINIFLOATS).copied()
}

/// The grid called `name`.
pub fn find(name: &str) -> Option<&'static dyn Grid> {
    all().find(|grid| grid.info().about.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::seed::uniform;

    /// Exhaustive up to 16 bits: codes and points map onto each other, `nearest` is idempotent and truly nearest.
    #[test]
    fn codes_and_points_are_one_to_one() {
        for grid in all().filter(|grid| grid.info().bits <= 16) {
            let (low, high) = grid.range();
            // Integers of few bits fill their storage with the sign; floats leave the upper codes unused.
            let codes = if grid.info().holds_integers() { grid.info().storage.bits() } else { grid.info().bits };
            let points: Vec<f64> = (0..1_u32 << codes)
                .map(|code| grid.decode(code))
                .filter(|point| (low..=high).contains(point))
                .collect();
            for &point in &points {
                assert!((grid.decode(grid.encode(point)) - point).abs() < 1e-12, "{grid:?} {point}");
                assert!((grid.nearest(point) - point).abs() < 1e-12, "{grid:?} {point}");
            }
            for &x in &[low - 1.0, low, -0.6, 0.0, 0.5, 1.5, 2.2, high, high + 3.0, 1e30] {
                let best = points.iter().map(|p| (p - x).abs()).fold(f64::INFINITY, f64::min);
                assert!(((grid.nearest(x) - x).abs() - best).abs() < 1e-9 * (1.0 + best), "{grid:?} {x}");
                assert!(grid.below(x) <= x || grid.below(x) <= low, "{grid:?} {x}");
                assert!(grid.above(x) >= x || grid.above(x) >= high, "{grid:?} {x}");
            }
        }
    }

    /// `QuantizeLinear` rounds before the zero point is added: 0.5, 1.5, 2.5 with zero point 1 give codes 1, 3, 3.
    #[test]
    fn the_zero_point_is_added_after_rounding() {
        let mut xs = [0.5, 1.5, 2.5, -3.0, 300.0, f32::NAN];
        int::UINT8.snap(&mut xs, 1.0);
        assert_eq!(xs[..5], [0.0, 2.0, 2.0, -1.0, 254.0]);
    }

    #[test]
    fn snap_agrees_with_nearest() {
        for grid in all() {
            let mut xs: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.037).collect();
            let want: Vec<f64> = xs.iter().map(|&x| grid.nearest(f64::from(x))).collect();
            grid.snap(&mut xs, 0.0);
            assert!(xs.iter().zip(&want).all(|(x, w)| (f64::from(*x) - w).abs() < 1e-9), "{grid:?}");
        }
    }

    /// The points of a grid of up to 16 bits, ascending.
    fn points(grid: &dyn Grid) -> Vec<f64> {
        let (low, high) = grid.range();
        let bits = if grid.info().holds_integers() { grid.info().storage.bits() } else { grid.info().bits };
        let decoded = (0..1_u32 << bits).map(|code| grid.decode(code));
        let mut points: Vec<f64> = decoded.filter(|point| (low..=high).contains(point)).collect();
        points.sort_by(f64::total_cmp);
        points.dedup();
        points
    }

    /// Shows `check` neighbors on every grid of up to 16 bits: all of them up to 8 bits, some of the others.
    fn each_pair(mut check: impl FnMut(&dyn Grid, f64, f64)) {
        for grid in all().filter(|grid| grid.info().bits <= 16) {
            let step = if grid.info().bits <= 8 { 1 } else { 97 };
            points(grid).windows(2).step_by(step).for_each(|pair| check(grid, pair[0], pair[1]));
        }
    }

    #[test]
    fn of_two_neighbors_the_nearer_one_is_taken() {
        let same = |a: f64, b: f64| (a - b).abs() < 1e-30;
        each_pair(|grid, a, b| {
            let (middle, near) = (f64::midpoint(a, b), (b - a) * 1e-9);
            for (x, want) in [(a, a), (a + near, a), (middle - near, a), (middle + near, b), (b - near, b), (b, b)] {
                let (below, above) = if same(x, want) { (want, want) } else { (a, b) };
                assert!(same(grid.nearest(x), want), "{grid:?}: {x} goes to {}", grid.nearest(x));
                assert!(same(grid.below(x), below), "{grid:?}: below {x} is {}", grid.below(x));
                assert!(same(grid.above(x), above), "{grid:?}: above {x} is {}", grid.above(x));
            }
            let tie = grid.nearest(middle);
            assert!(same(tie, a) || same(tie, b), "{grid:?}: {middle} goes to {tie}");
        });
    }

    /// Times a power of two, what the wider float makes of a number is what the narrower one does.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "any f32 will do")]
    fn codes_of_a_carrier_stand_for_the_same_numbers() {
        let mut carried_ones = BTreeSet::new();
        each_pair(|grid, a, b| {
            let Some((wide, factor)) = carrier(grid) else { return };
            carried_ones.insert(grid.info().about.name);
            let beside = |x: f64| [(x as f32).next_down(), x as f32, (x as f32).next_up()];
            let within = |x: &f32| f64::from(x.abs()) <= grid.range().1;
            let mut narrow = [a, f64::midpoint(a, b), b].map(beside).concat();
            narrow.retain(within);
            let mut wider: Vec<f32> = narrow.iter().map(|x| x * factor).collect();
            grid.snap(&mut narrow, 0.0);
            wide.snap(&mut wider, 0.0);
            let same = |(narrow, wider): (&f32, &f32)| (narrow * factor).to_bits() == wider.to_bits();
            assert!(narrow.iter().zip(&wider).all(same), "{grid:?} in {wide:?}: {narrow:?}, {wider:?}");
        });
        assert!(carried_ones.contains("e2m3") && carried_ones.contains("e3m2"), "{carried_ones:?}");
        for stored in all() {
            let found: Vec<&str> = carried(stored).map(|(grid, _)| grid.info().about.name).collect();
            assert_eq!(found[0], stored.info().about.name);
        }
    }

    /// At points and at the middles between them, and one step of f32 beside; around 0 those steps are subnormal.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "any f32 will do")]
    fn snap_agrees_with_nearest_where_it_is_close() {
        each_pair(|grid, a, b| {
            let beside = |x: f64| [(x as f32).next_down(), x as f32, (x as f32).next_up()];
            let xs = [a, f64::midpoint(a, b), b].map(beside).concat();
            let mut snapped = xs.clone();
            grid.snap(&mut snapped, 0.0);
            for (x, snapped) in xs.iter().zip(&snapped) {
                let want = grid.nearest(f64::from(*x));
                assert!((f64::from(*snapped) - want).abs() < 1e-30, "{grid:?}: {x} goes to {snapped}, not {want}");
            }
        });
        for grid in all() {
            let xs = [f32::from_bits(1), 1e-40, f32::MIN_POSITIVE, -f32::from_bits(1), -1e-40, -f32::MIN_POSITIVE];
            let mut snapped = xs;
            grid.snap(&mut snapped, 0.0);
            let same = |(x, snapped): (&f32, &f32)| f64::from(*snapped) - grid.nearest(f64::from(*x)) == 0.0;
            assert!(xs.iter().zip(&snapped).all(same), "{grid:?}: {snapped:?}");
        }
    }

    #[test]
    fn what_lies_outside_saturates() {
        for grid in all() {
            let (low, high) = grid.range();
            let same = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs();
            for (x, want) in [(low - 1.0, low), (-1e30, low), (f64::NEG_INFINITY, low)] {
                let got = [grid.nearest(x), grid.below(x), grid.above(x)];
                assert!(got.iter().all(|&got| same(got, want)), "{grid:?}: {x} goes to {got:?}");
            }
            for (x, want) in [(high + 1.0, high), (1e30, high), (f64::INFINITY, high)] {
                let got = [grid.nearest(x), grid.below(x), grid.above(x)];
                assert!(got.iter().all(|&got| same(got, want)), "{grid:?}: {x} goes to {got:?}");
            }
            let mut xs = [f32::NEG_INFINITY, f32::MIN, f32::MAX, f32::INFINITY];
            grid.snap(&mut xs, 0.0);
            let ends = [low, low, high, high];
            assert!(xs.iter().zip(ends).all(|(x, end)| same(f64::from(*x), end)), "{grid:?}: {xs:?}");
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "any f32 will do; zero points of up to 16 bits are exact")]
    fn integers_saturate_at_their_ends_less_the_zero_point() {
        for grid in all().filter(|grid| grid.info().integer && grid.info().bits <= 16) {
            let (low, high) = grid.range();
            for seed in 0..20 {
                let zero = (low + (high - low) * uniform(seed)).round();
                let x = |i: u64| (3.0 * (high - low) * (uniform(seed << 32 | i) - 0.5)) as f32;
                let xs: Vec<f32> = (0..50).map(x).collect();
                let mut snapped = xs.clone();
                grid.snap(&mut snapped, zero as f32);
                for (x, snapped) in xs.iter().zip(&snapped) {
                    let want = (f64::from(*x).round_ties_even() + zero).clamp(low, high) - zero;
                    assert!((f64::from(*snapped) - want).abs() < 1e-9, "{grid:?} {zero}: {x} goes to {snapped}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_goes_where_it_is_said_to_go() {
        for grid in all().filter(|grid| grid.info().bits <= 16) {
            let nearest = grid.nearest(f64::NAN) - grid.nearest(0.0);
            assert!(nearest == 0.0, "{grid:?}: {nearest}");
            let zero = if grid.info().integer { 1.0 } else { 0.0 };
            let want = if grid.info().integer { grid.range().0 - 1.0 } else { grid.nearest(0.0) };
            let mut snapped = [f32::NAN];
            grid.snap(&mut snapped, zero);
            assert!((f64::from(snapped[0]) - want).abs() < 1e-9, "{grid:?}: {snapped:?}");
        }
    }
}
