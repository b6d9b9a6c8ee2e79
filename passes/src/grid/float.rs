//! Floating-point numbers of 3 to 8 bits.

use super::{FloatFormat, Grid, GridInfo};
use crate::about::About;
use crate::tensor::DType;

/// Which codes stand for no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    /// None: every code is a finite number.
    None,
    /// The largest exponent holds infinities and NaN, as in IEEE 754.
    Ieee,
    /// Only the code with all exponent and mantissa bits set is NaN; there are no infinities.
    AllOnes,
    /// The code that would be −0 is NaN; there are no infinities.
    NegativeZero,
}

/// Numbers s · 2^(e − bias) · (1 + m / 2^M), with subnormals below the smallest exponent, in `1 + exponent + mantissa` bits.
///
/// Rounding is to the nearest number, ties to the even multiple of the step there; what lies outside saturates.
#[derive(Debug)]
pub struct FloatGrid {
    info: GridInfo,
    exponent: u32,
    mantissa: u32,
    bias: i32,
    special: Special,
}

const OCP: &str = "OCP 8-bit floating point specification (OFP8) 1.0 and ONNX TensorProto";
const MINIFLOAT: &str = "Aggarwal et al. 2023, arXiv:2311.12359, section 2";

const fn float(about: About, storage: DType, format: (u32, u32, i32), special: Special) -> FloatGrid {
    let (exponent, mantissa, bias) = format;
    let info = GridInfo { about, bits: 1 + exponent + mantissa, storage, integer: false };
    FloatGrid { info, exponent, mantissa, bias, special }
}

const fn ocp(name: &'static str, doc: &'static str) -> About {
    About { name, doc, source: OCP }
}

pub(super) static FLOAT8_E4M3FN: FloatGrid = float(
    ocp("float8e4m3fn", "ONNX FLOAT8E4M3FN: 4 exponent and 3 mantissa bits, up to 448, one NaN, no infinities."),
    DType::F8E4M3Fn,
    (4, 3, 7),
    Special::AllOnes,
);
pub(super) static FLOAT8_E4M3FNUZ: FloatGrid = float(
    ocp("float8e4m3fnuz", "ONNX FLOAT8E4M3FNUZ: 4 exponent and 3 mantissa bits, up to 240, no negative zero."),
    DType::F8E4M3FnUz,
    (4, 3, 8),
    Special::NegativeZero,
);
pub(super) static FLOAT8_E5M2: FloatGrid = float(
    ocp("float8e5m2", "ONNX FLOAT8E5M2: 5 exponent and 2 mantissa bits, up to 57344, with infinities."),
    DType::F8E5M2,
    (5, 2, 15),
    Special::Ieee,
);
pub(super) static FLOAT8_E5M2FNUZ: FloatGrid = float(
    ocp("float8e5m2fnuz", "ONNX FLOAT8E5M2FNUZ: 5 exponent and 2 mantissa bits, up to 57344, no negative zero."),
    DType::F8E5M2FnUz,
    (5, 2, 16),
    Special::NegativeZero,
);
pub(super) static FLOAT8_E4M3B11FNUZ: FloatGrid = float(
    ocp("float8e4m3b11fnuz", "4 exponent and 3 mantissa bits with bias 11, up to 30; no ONNX type, stored as 8 bits."),
    DType::U8,
    (4, 3, 11),
    Special::NegativeZero,
);
pub(super) static FLOAT8_E4M3: FloatGrid = float(
    ocp("float8e4m3", "4 exponent and 3 mantissa bits as IEEE would have them, up to 240; no ONNX type."),
    DType::U8,
    (4, 3, 7),
    Special::Ieee,
);
pub(super) static FLOAT8_E3M4: FloatGrid = float(
    ocp("float8e3m4", "3 exponent and 4 mantissa bits as IEEE would have them, up to 15.5; no ONNX type."),
    DType::U8,
    (3, 4, 3),
    Special::Ieee,
);
pub(super) static FLOAT4_E2M1: FloatGrid = float(
    ocp("float4e2m1", "ONNX FLOAT4E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."),
    DType::F4E2M1,
    (2, 1, 1),
    Special::None,
);

/// Every minifloat of 3 to 8 bits in which all codes are numbers; the bias is 2^(E−1) − 1.
macro_rules! minifloats {
    ($($static:ident $name:literal $exponent:literal $mantissa:literal $storage:ident;)*) => {
        $(pub(super) static $static: FloatGrid = float(
            About {
                name: $name,
                doc: concat!(
                    "Minifloat with ", $exponent, " exponent and ", $mantissa,
                    " mantissa bits, all codes finite numbers; no ONNX type, stored as unsigned integers."
                ),
                source: MINIFLOAT,
            },
            DType::$storage,
            ($exponent, $mantissa, (1 << ($exponent - 1)) - 1),
            Special::None,
        );)*
        pub(super) static MINIFLOATS: &[&dyn Grid] = &[$(&$static),*];
    };
}

minifloats! {
    E1M1 "e1m1" 1 1 U4; E2M0 "e2m0" 2 0 U4;
    E1M2 "e1m2" 1 2 U4; E2M1 "e2m1" 2 1 U4; E3M0 "e3m0" 3 0 U4;
    E1M3 "e1m3" 1 3 U8; E2M2 "e2m2" 2 2 U8; E3M1 "e3m1" 3 1 U8; E4M0 "e4m0" 4 0 U8;
    E1M4 "e1m4" 1 4 U8; E2M3 "e2m3" 2 3 U8; E3M2 "e3m2" 3 2 U8; E4M1 "e4m1" 4 1 U8; E5M0 "e5m0" 5 0 U8;
    E1M5 "e1m5" 1 5 U8; E2M4 "e2m4" 2 4 U8; E3M3 "e3m3" 3 3 U8; E4M2 "e4m2" 4 2 U8; E5M1 "e5m1" 5 1 U8;
    E6M0 "e6m0" 6 0 U8;
    E1M6 "e1m6" 1 6 U8; E2M5 "e2m5" 2 5 U8; E3M4 "e3m4" 3 4 U8; E4M3 "e4m3" 4 3 U8; E5M2 "e5m2" 5 2 U8;
    E6M1 "e6m1" 6 1 U8; E7M0 "e7m0" 7 0 U8;
}

/// 2^k, exactly.
fn power(k: i32) -> f64 {
    2.0_f64.powi(k)
}

/// The largest k with 2^k ≤ |x|, from the bits, for finite x that is not 0; subnormal f64 count as the smallest.
fn log2_floor(x: f64) -> i32 {
    i32::try_from(x.to_bits() >> 52 & 0x7ff).unwrap_or(0) - 1023
}

impl FloatGrid {
    /// The exponent of the step between neighbors at `x`.
    fn step_exponent(&self, x: f64) -> i32 {
        let smallest = 1 - self.bias;
        let at = if x == 0.0 { smallest } else { log2_floor(x).max(smallest) };
        at - self.mantissa.cast_signed()
    }

    fn largest(&self) -> f64 {
        let top = (1_i32 << self.exponent) - 1;
        let (exponent, missing) = match self.special {
            Special::None | Special::NegativeZero => (top, 1.0),
            Special::Ieee => (top - 1, 1.0),
            // The largest mantissa of the largest exponent is NaN.
            Special::AllOnes => (top, 2.0),
        };
        power(exponent - self.bias) * (2.0 - missing * power(-self.mantissa.cast_signed()))
    }

    fn to_step(&self, x: f64, round: impl Fn(f64) -> f64) -> f64 {
        if x.is_nan() {
            return 0.0;
        }
        let largest = self.largest();
        let step = power(self.step_exponent(x.clamp(-largest, largest)));
        (round(x.clamp(-largest, largest) / step) * step).clamp(-largest, largest)
    }
}

impl Grid for FloatGrid {
    fn info(&self) -> &GridInfo {
        &self.info
    }

    fn range(&self) -> (f64, f64) {
        (-self.largest(), self.largest())
    }

    fn float_format(&self) -> Option<FloatFormat> {
        let (exponent, mantissa, bias) = (self.exponent, self.mantissa, self.bias);
        let (infinities, nan) = (self.special == Special::Ieee, self.special != Special::None);
        Some(FloatFormat { exponent, mantissa, bias, infinities, nan })
    }

    fn nearest(&self, x: f64) -> f64 {
        self.to_step(x, f64::round_ties_even)
    }

    fn below(&self, x: f64) -> f64 {
        self.to_step(x, f64::floor)
    }

    fn above(&self, x: f64) -> f64 {
        self.to_step(x, f64::ceil)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the largest number of a format of up to 8 bits is exact in f32"
    )]
    fn snap(&self, xs: &mut [f32], _: f32) {
        if self.exponent > 5 {
            // Steps of these reach beyond what f32 can add exactly.
            xs.iter_mut().for_each(|x| *x = self.nearest(f64::from(*x)) as f32);
            return;
        }
        let largest = self.largest() as f32;
        let (smallest, mantissa) = (1 - self.bias, self.mantissa.cast_signed());
        for x in xs {
            let clamped = if x.is_nan() { 0.0 } else { x.clamp(-largest, largest) };
            let exponent = ((clamped.to_bits() >> 23 & 0xff).cast_signed() - 127).max(smallest);
            // Adding and subtracting 1.5 · 2²³ steps rounds to a whole number of steps, ties to even.
            let round = f32::from_bits(((exponent - mantissa + 127).cast_unsigned()) << 23) * 12_582_912.0;
            let rounded = ((clamped + round) - round).clamp(-largest, largest);
            *x = rounded.copysign(clamped);
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers below 2⁸")]
    fn encode(&self, point: f64) -> u32 {
        let point = if point.is_nan() { 0.0 } else { self.nearest(point) };
        let magnitude = point.abs();
        let normal = magnitude >= power(1 - self.bias);
        let exponent = if normal { log2_floor(magnitude) } else { 1 - self.bias };
        let significand = (magnitude / power(exponent - self.mantissa.cast_signed())) as u32;
        let field = if normal { (exponent + self.bias).cast_unsigned() } else { 0 };
        let fraction = if normal { significand - (1 << self.mantissa) } else { significand };
        let signless = self.special == Special::NegativeZero && magnitude == 0.0;
        let sign = u32::from(point.is_sign_negative() && !signless) << (self.exponent + self.mantissa);
        sign | field << self.mantissa | fraction
    }

    fn decode(&self, code: u32) -> f64 {
        let width = self.exponent + self.mantissa;
        let sign = if code >> width & 1 == 1 { -1.0 } else { 1.0 };
        let field = code >> self.mantissa & ((1 << self.exponent) - 1);
        let fraction = code & ((1 << self.mantissa) - 1);
        let ones = field == (1 << self.exponent) - 1;
        let all = fraction == (1 << self.mantissa) - 1;
        match self.special {
            Special::AllOnes if ones && all => return f64::NAN,
            Special::Ieee if ones => return if fraction == 0 { sign * f64::INFINITY } else { f64::NAN },
            Special::NegativeZero if code & ((1 << (width + 1)) - 1) == 1 << width => return f64::NAN,
            _ => {}
        }
        let scale = power(field.max(1).cast_signed() - self.bias - self.mantissa.cast_signed());
        let hidden = if field == 0 { 0 } else { 1 << self.mantissa };
        sign * f64::from(hidden + fraction) * scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest number and the smallest positive one of some formats, from the OCP specification and the minifloat paper.
    #[test]
    fn ends_are_those_of_the_specifications() {
        for (grid, largest, smallest) in [
            (&FLOAT8_E4M3FN, 448.0, power(-9)),
            (&FLOAT8_E4M3FNUZ, 240.0, power(-10)),
            (&FLOAT8_E5M2, 57344.0, power(-16)),
            (&FLOAT8_E5M2FNUZ, 57344.0, power(-17)),
            (&FLOAT8_E4M3B11FNUZ, 30.0, power(-13)),
            (&FLOAT8_E3M4, 15.5, power(-6)),
            (&FLOAT4_E2M1, 6.0, 0.5),
            (&E3M2, 28.0, 0.0625),
            (&E2M3, 7.5, 0.125),
            (&E4M3, 480.0, power(-9)),
            (&E1M6, 3.968_75, power(-5)),
            (&E3M0, 16.0, 0.25),
        ] {
            assert!((grid.range().1 - largest).abs() < 1e-12, "{}", grid.info.about.name);
            assert!((grid.decode(1) - smallest).abs() < 1e-12, "{}", grid.info.about.name);
        }
    }

    /// Ties of FLOAT4E2M1 go to the even code; without mantissa bits, to the even multiple of the step.
    #[test]
    fn ties_go_to_even() {
        for (x, want) in [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)] {
            assert!((FLOAT4_E2M1.nearest(x) - want).abs() < 1e-12, "{x}");
            assert!((FLOAT4_E2M1.nearest(-x) + want).abs() < 1e-12, "-{x}");
        }
        assert!((E3M0.nearest(3.0) - 4.0).abs() < 1e-12);
    }

    /// So many distinct finite numbers as the tables of the OCP specifications and of ONNX have, and so many codes that are none.
    #[test]
    fn numbers_are_as_many_as_the_specifications_count() {
        for (grid, finite, none) in [
            (&FLOAT8_E4M3FN, 253, 2),
            (&FLOAT8_E4M3FNUZ, 255, 1),
            (&FLOAT8_E5M2, 247, 8),
            (&FLOAT8_E5M2FNUZ, 255, 1),
            (&FLOAT8_E4M3, 239, 16),
            (&FLOAT8_E3M4, 223, 32),
            (&FLOAT8_E4M3B11FNUZ, 255, 1),
            (&E3M2, 63, 0),
            (&E2M3, 63, 0),
            (&FLOAT4_E2M1, 15, 0),
        ] {
            let all: Vec<f64> = (0..1 << grid.info.bits).map(|code| grid.decode(code)).collect();
            // Both zeros are one number.
            let mut numbers: Vec<u64> =
                all.iter().filter(|x| x.is_finite()).map(|x| if *x == 0.0 { 0 } else { x.to_bits() }).collect();
            numbers.sort_unstable();
            numbers.dedup();
            let others = all.iter().filter(|x| !x.is_finite()).count();
            assert_eq!((numbers.len(), others), (finite, none), "{}", grid.info.about.name);
        }
    }

    /// Every minifloat, by the rule: up to 2^(2^E − 1 − B) (2 − 2^−M) in steps from 2^(1 − B − M), no code without a number, magnitudes in
    /// the order of codes, and twice a normal number one exponent on.
    #[test]
    fn minifloats_follow_their_rule() {
        let all = [
            &E1M1,
            &E2M0,
            &E1M2,
            &E2M1,
            &E3M0,
            &E1M3,
            &E2M2,
            &E3M1,
            &E4M0,
            &E1M4,
            &E2M3,
            &E3M2,
            &E4M1,
            &E5M0,
            &E1M5,
            &E2M4,
            &E3M3,
            &E4M2,
            &E5M1,
            &E6M0,
            &E1M6,
            &E2M5,
            &E3M4,
            &E4M3,
            &E5M2,
            &E6M1,
            &E7M0,
            &FLOAT4_E2M1,
        ];
        assert_eq!(all.len(), MINIFLOATS.len() + 1);
        for grid in all {
            let (e, m) = (grid.exponent, grid.mantissa.cast_signed());
            let bias = (1 << (e - 1)) - 1;
            let name = grid.info.about.name;
            let largest = power((1 << e) - 1 - bias) * (2.0 - power(-m));
            assert!((grid.range().1 - largest).abs() <= 1e-12 * largest, "{name}");
            assert!(m == 0 || (grid.decode(1) / power(1 - bias - m) - 1.0).abs() < 1e-12, "{name}");
            let half = 1_u32 << (e + grid.mantissa);
            for code in 0..half {
                let (x, mirrored) = (grid.decode(code), grid.decode(code | half));
                assert!(x.is_finite() && x + mirrored == 0.0, "{name} {code:#x}");
                assert!(code == 0 || x > grid.decode(code - 1), "{name} {code:#x}");
                let next = code + (1 << grid.mantissa);
                let is_normal = code >= 1 << grid.mantissa;
                assert!(!is_normal || next >= half || grid.decode(next) - 2.0 * x == 0.0, "{name} {code:#x}");
            }
        }
    }
}
