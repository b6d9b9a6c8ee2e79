//! Number formats: finite sets of real points, before scaling.

pub mod block;
mod codebook;
mod float;
mod int;

use std::fmt::Debug;

use crate::about::About;
use crate::tensor::DType;

pub use codebook::CodebookGrid;
pub use float::FloatGrid;
pub use int::IntGrid;

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
    /// rounded first and `zero`, a whole number for integer grids and 0 otherwise, is added after.
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
    &codebook::BIPOLAR,
];

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
    use super::*;

    /// Exhaustive up to 16 bits: codes and points map onto each other, `nearest` is idempotent and truly nearest.
    #[test]
    fn codes_and_points_are_one_to_one() {
        for grid in all().filter(|grid| grid.info().bits <= 16) {
            let (low, high) = grid.range();
            // Integers of few bits fill their storage with the sign; floats leave the upper codes unused.
            let codes = if grid.info().integer { grid.info().storage.bits() } else { grid.info().bits };
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
}
