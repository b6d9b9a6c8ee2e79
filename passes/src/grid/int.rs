//! Integers of any width.

use super::{Grid, GridInfo};
use crate::about::About;
use crate::tensor::DType;

/// The whole numbers that `bits` bits hold, signed in two's complement or unsigned; a narrow grid leaves out the most
/// negative one, so that it is symmetric.
#[derive(Debug)]
pub struct IntGrid {
    info: GridInfo,
    low: f64,
    high: f64,
}

const SOURCE: &str = "ONNX operator specification, QuantizeLinear-25";

const fn int(name: &'static str, doc: &'static str, bits: u32, storage: DType, low: f64, high: f64) -> IntGrid {
    let about = About { name, doc, source: SOURCE };
    IntGrid { info: GridInfo { about, bits, storage, integer: true }, low, high }
}

const fn byte(name: &'static str, bits: u32, storage: DType, low: f64, high: f64) -> IntGrid {
    int(
        name,
        "Integers of 2 or 3 bits in bytes, for activations: runtimes clamp no codes of fewer bits.",
        bits,
        storage,
        low,
        high,
    )
}

pub(super) static INT8: IntGrid = int("int8", "Signed 8-bit integers, -128 to 127.", 8, DType::I8, -128.0, 127.0);
pub(super) static UINT8: IntGrid = int("uint8", "Unsigned 8-bit integers, 0 to 255.", 8, DType::U8, 0.0, 255.0);
pub(super) static INT8_NARROW: IntGrid =
    int("int8-narrow", "Symmetric signed 8-bit integers, -127 to 127, for weights.", 8, DType::I8, -127.0, 127.0);
pub(super) static INT16: IntGrid =
    int("int16", "Signed 16-bit integers, -32768 to 32767.", 16, DType::I16, -32768.0, 32767.0);
pub(super) static UINT16: IntGrid =
    int("uint16", "Unsigned 16-bit integers, 0 to 65535.", 16, DType::U16, 0.0, 65535.0);
pub(super) static INT4: IntGrid = int("int4", "Signed 4-bit integers, -8 to 7.", 4, DType::I4, -8.0, 7.0);
pub(super) static UINT4: IntGrid = int("uint4", "Unsigned 4-bit integers, 0 to 15.", 4, DType::U4, 0.0, 15.0);
pub(super) static INT7: IntGrid =
    int("int7", "Signed 7-bit integers, -64 to 63, stored in 8 bits.", 7, DType::I8, -64.0, 63.0);
pub(super) static UINT7: IntGrid =
    int("uint7", "Unsigned 7-bit integers, 0 to 127, stored in 8 bits.", 7, DType::U8, 0.0, 127.0);
pub(super) static INT6: IntGrid =
    int("int6", "Signed 6-bit integers, -32 to 31, stored in 8 bits.", 6, DType::I8, -32.0, 31.0);
pub(super) static UINT6: IntGrid =
    int("uint6", "Unsigned 6-bit integers, 0 to 63, stored in 8 bits.", 6, DType::U8, 0.0, 63.0);
pub(super) static INT5: IntGrid =
    int("int5", "Signed 5-bit integers, -16 to 15, stored in 8 bits.", 5, DType::I8, -16.0, 15.0);
pub(super) static UINT5: IntGrid =
    int("uint5", "Unsigned 5-bit integers, 0 to 31, stored in 8 bits.", 5, DType::U8, 0.0, 31.0);
pub(super) static INT3: IntGrid =
    int("int3", "Signed 3-bit integers, -4 to 3, stored in 4 bits.", 3, DType::I4, -4.0, 3.0);
pub(super) static UINT3: IntGrid =
    int("uint3", "Unsigned 3-bit integers, 0 to 7, stored in 4 bits.", 3, DType::U4, 0.0, 7.0);
pub(super) static INT2: IntGrid = int("int2", "Signed 2-bit integers, -2 to 1.", 2, DType::I2, -2.0, 1.0);
pub(super) static UINT2: IntGrid = int("uint2", "Unsigned 2-bit integers, 0 to 3.", 2, DType::U2, 0.0, 3.0);
pub(super) static INT2_IN_4: IntGrid = int(
    "int2-in-4",
    "Signed 2-bit integers, -2 to 1, stored in 4 bits: opset 21 has no 2-bit type.",
    2,
    DType::I4,
    -2.0,
    1.0,
);
pub(super) static UINT2_IN_4: IntGrid =
    int("uint2-in-4", "Unsigned 2-bit integers, 0 to 3, stored in 4 bits.", 2, DType::U4, 0.0, 3.0);
pub(super) static INT2_IN_8: IntGrid = byte("int2-in-8", 2, DType::I8, -2.0, 1.0);
pub(super) static UINT2_IN_8: IntGrid = byte("uint2-in-8", 2, DType::U8, 0.0, 3.0);
pub(super) static INT3_IN_8: IntGrid = byte("int3-in-8", 3, DType::I8, -4.0, 3.0);
pub(super) static UINT3_IN_8: IntGrid = byte("uint3-in-8", 3, DType::U8, 0.0, 7.0);
pub(super) static INT4_IN_8: IntGrid = byte("int4-in-8", 4, DType::I8, -8.0, 7.0);
pub(super) static UINT4_IN_8: IntGrid = byte("uint4-in-8", 4, DType::U8, 0.0, 15.0);
pub(super) static INT32: IntGrid =
    int("int32", "Signed 32-bit integers, for biases.", 32, DType::I32, -2_147_483_648.0, 2_147_483_647.0);

/// Symmetric integers of fewer than 8 bits.
macro_rules! narrow {
    ($($static:ident $name:literal $bits:literal $storage:ident;)*) => {
        $(pub(super) static $static: IntGrid = int(
            $name,
            concat!("Symmetric signed ", $bits, "-bit integers: the most negative code is left out."),
            $bits,
            DType::$storage,
            1.0 - (1 << ($bits - 1)) as f64,
            ((1 << ($bits - 1)) - 1) as f64,
        );)*
    };
}

narrow! {
    INT7_NARROW "int7-narrow" 7 I8; INT6_NARROW "int6-narrow" 6 I8; INT5_NARROW "int5-narrow" 5 I8;
    INT4_NARROW "int4-narrow" 4 I4; INT3_NARROW "int3-narrow" 3 I4; INT2_NARROW "int2-narrow" 2 I4;
}

/// Integers of more than 8 bits that have no type of their own.
macro_rules! wide {
    ($($signed:ident $unsigned:ident $name:literal $unsigned_name:literal $bits:literal;)*) => {
        $(
            pub(super) static $signed: IntGrid = int(
                $name,
                concat!("Signed ", $bits, "-bit integers, stored in 16 bits."),
                $bits,
                DType::I16,
                -((1 << ($bits - 1)) as f64),
                ((1 << ($bits - 1)) - 1) as f64,
            );
            pub(super) static $unsigned: IntGrid = int(
                $unsigned_name,
                concat!("Unsigned ", $bits, "-bit integers, stored in 16 bits."),
                $bits,
                DType::U16,
                0.0,
                ((1 << $bits) - 1) as f64,
            );
        )*
    };
}

wide! {
    INT9 UINT9 "int9" "uint9" 9; INT10 UINT10 "int10" "uint10" 10; INT11 UINT11 "int11" "uint11" 11;
    INT12 UINT12 "int12" "uint12" 12; INT13 UINT13 "int13" "uint13" 13; INT14 UINT14 "int14" "uint14" 14;
    INT15 UINT15 "int15" "uint15" 15;
}

/// Adding and subtracting 1.5·2²³ rounds an f32 below 2²² to a whole number, ties to even, without a call.
const ROUND: f32 = 12_582_912.0;

impl Grid for IntGrid {
    fn info(&self) -> &GridInfo {
        &self.info
    }

    fn range(&self) -> (f64, f64) {
        (self.low, self.high)
    }

    fn nearest(&self, x: f64) -> f64 {
        if x.is_nan() { 0.0_f64.clamp(self.low, self.high) } else { x.round_ties_even().clamp(self.low, self.high) }
    }

    fn below(&self, x: f64) -> f64 {
        x.floor().clamp(self.low, self.high)
    }

    fn above(&self, x: f64) -> f64 {
        x.ceil().clamp(self.low, self.high)
    }

    #[expect(clippy::cast_possible_truncation, reason = "bounds of up to 16 bits are exact in f32; 32 bits go by f64")]
    fn snap(&self, xs: &mut [f32], zero: f32) {
        if self.info.bits > 16 {
            for x in xs {
                *x = (self.nearest(f64::from(x.round_ties_even()) + f64::from(zero)) - f64::from(zero)) as f32;
            }
            return;
        }
        let (low, high) = (self.low as f32 - zero, self.high as f32 - zero);
        for x in xs {
            // `max` and `min` drop NaN; both bounds are whole numbers, so clamping first changes no rounding.
            *x = (x.max(low).min(high) + ROUND) - ROUND;
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "two's complement is what is wanted")]
    fn encode(&self, point: f64) -> u32 {
        let code = self.nearest(point) as i64 as u32;
        let stored = self.info.storage.bits();
        if stored == 32 { code } else { code & ((1 << stored) - 1) }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "two's complement is what is wanted")]
    fn encode_run(&self, points: &[f32], zero: i32, codes: &mut [u32]) {
        let stored = self.info.storage.bits();
        if self.info.bits > 16 {
            for (code, point) in codes.iter_mut().zip(points) {
                *code = self.encode(f64::from(*point) + f64::from(zero));
            }
            return;
        }
        let mask = (1_u32 << stored) - 1;
        let (low, high) = (self.low as f32 - zero as f32, self.high as f32 - zero as f32);
        for (code, point) in codes.iter_mut().zip(points) {
            *code = (point.max(low).min(high) as i32 + zero) as u32 & mask;
        }
    }

    fn decode_run(&self, codes: &[u32], points: &mut [f32]) {
        let unused = 32 - self.info.storage.bits();
        if self.low < 0.0 {
            for (point, code) in points.iter_mut().zip(codes) {
                *point = ((code << unused).cast_signed() >> unused) as f32;
            }
        } else {
            for (point, code) in points.iter_mut().zip(codes) {
                *point = ((code << unused) >> unused) as f32;
            }
        }
    }

    fn decode(&self, code: u32) -> f64 {
        let unused = 32 - self.info.storage.bits();
        let shifted = code << unused;
        if self.low < 0.0 { f64::from(shifted.cast_signed() >> unused) } else { f64::from(shifted >> unused) }
    }
}
