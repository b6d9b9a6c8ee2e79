//! Operators of `TensorRT`'s own domain, and scales that are exponents, for those who write and those who read them.
//!
//! Source: the ONNX exporter of NVIDIA's model optimizer, 2026-08.

/// The domain of `TensorRT`'s own operators, in version 1.
pub const DOMAIN: &str = "trt";
/// x, factor → codes, FLOAT8E4M3FN scales.
pub const FP4_QUANTIZE: &str = "TRT_FP4DynamicQuantize";
/// x → codes, E8M0 scales.
pub const MXFP8_QUANTIZE: &str = "TRT_MXFP8DynamicQuantize";
/// codes, E8M0 scales → x.
pub const MXFP8_DEQUANTIZE: &str = "TRT_MXFP8DequantizeLinear";

/// The exponent that E8M0 code 0 stands for.
pub const E8M0_BIAS: i32 = 127;

/// 2⁻¹²⁷, the smallest scale, a subnormal number.
const SMALLEST: u32 = 1 << 22;

/// Powers of two as exponents with a bias; `None` where one is none.
pub fn e8m0(scales: &[f32]) -> Option<Vec<u8>> {
    let code = |scale: &f32| {
        let bits = scale.to_bits();
        let is_power = *scale > 0.0 && scale.is_finite() && (bits == SMALLEST || bits.trailing_zeros() >= 23);
        is_power.then(|| u8::try_from(bits >> 23).ok()).flatten()
    };
    scales.iter().map(code).collect()
}

/// What an E8M0 code stands for; the last one is no number.
#[expect(clippy::cast_possible_truncation, reason = "powers of two within f32, the smallest a subnormal")]
pub fn from_e8m0(code: u8) -> f32 {
    if code == u8::MAX { f32::NAN } else { 2.0_f64.powi(i32::from(code) - E8M0_BIAS) as f32 }
}
