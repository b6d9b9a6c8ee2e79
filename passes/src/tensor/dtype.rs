//! Element types.

/// The element type of a tensor: ONNX's, under their usual short names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the variants are the field's own names, listed with their codes in TABLE")]
pub enum DType {
    F32,
    U8,
    I8,
    U16,
    I16,
    I32,
    I64,
    String,
    Bool,
    F16,
    F64,
    U32,
    U64,
    Complex64,
    Complex128,
    Bf16,
    F8E4M3Fn,
    F8E4M3FnUz,
    F8E5M2,
    F8E5M2FnUz,
    U4,
    I4,
    F4E2M1,
    F8E8M0,
    U2,
    I2,
    F6E2M3,
    F6E3M2,
}

/// Type, ONNX code, bits (0: no fixed size), name in the text form.
const TABLE: &[(DType, i32, u32, &str)] = &[
    (DType::F32, 1, 32, "f32"),
    (DType::U8, 2, 8, "u8"),
    (DType::I8, 3, 8, "i8"),
    (DType::U16, 4, 16, "u16"),
    (DType::I16, 5, 16, "i16"),
    (DType::I32, 6, 32, "i32"),
    (DType::I64, 7, 64, "i64"),
    (DType::String, 8, 0, "string"),
    (DType::Bool, 9, 8, "bool"),
    (DType::F16, 10, 16, "f16"),
    (DType::F64, 11, 64, "f64"),
    (DType::U32, 12, 32, "u32"),
    (DType::U64, 13, 64, "u64"),
    (DType::Complex64, 14, 64, "c64"),
    (DType::Complex128, 15, 128, "c128"),
    (DType::Bf16, 16, 16, "bf16"),
    (DType::F8E4M3Fn, 17, 8, "f8e4m3fn"),
    (DType::F8E4M3FnUz, 18, 8, "f8e4m3fnuz"),
    (DType::F8E5M2, 19, 8, "f8e5m2"),
    (DType::F8E5M2FnUz, 20, 8, "f8e5m2fnuz"),
    (DType::U4, 21, 4, "u4"),
    (DType::I4, 22, 4, "i4"),
    (DType::F4E2M1, 23, 4, "f4e2m1"),
    (DType::F8E8M0, 24, 8, "f8e8m0"),
    (DType::U2, 25, 2, "u2"),
    (DType::I2, 26, 2, "i2"),
    (DType::F6E2M3, 27, 6, "f6e2m3"),
    (DType::F6E3M2, 28, 6, "f6e3m2"),
];

impl DType {
    fn row(self) -> &'static (DType, i32, u32, &'static str) {
        &TABLE[self as usize]
    }

    /// The type with ONNX's number `code` (as in `TensorProto.data_type` and the `to` of `Cast`).
    pub fn from_code(code: i64) -> Option<Self> {
        TABLE.iter().find(|row| i64::from(row.1) == code).map(|row| row.0)
    }

    /// ONNX's number for this type.
    pub fn code(self) -> i32 {
        self.row().1
    }

    /// Bits of one element, packed; 0 for strings.
    pub fn bits(self) -> u32 {
        self.row().2
    }

    /// The short name, as in the text form: `f32`, `i4`, …
    pub fn name(self) -> &'static str {
        self.row().3
    }

    /// The type called `name` in the text form.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.3 == name).map(|row| row.0)
    }

    /// Bytes of `elements` densely packed values, if that many fit the address space.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        elements.checked_mul(self.bits() as usize).map(|bits| bits.div_ceil(8))
    }

    /// A real-valued type that arithmetic runs in: f16, bf16, f32 or f64.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F64)
    }

    /// An integer type of whole bytes.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::I32 | Self::I64 | Self::U32 | Self::U64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, index, "{}", row.3);
            assert_eq!(DType::from_code(i64::from(row.1)), Some(row.0));
            assert_eq!(DType::from_name(row.3), Some(row.0));
        }
    }
}
