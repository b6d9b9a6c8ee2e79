//! Block formats: elements of a small format that share a scale of another small format.

use super::Grid;
use crate::about::About;

/// How the scale of a block is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockScale {
    /// A power of two (E8M0): 2^(⌊log2 peak⌋ − the exponent of the largest element), as the OCP specification has it.
    PowerOfTwo {
        /// The exponent of the largest element.
        largest: i32,
    },
    /// FLOAT8E4M3FN times one f32 for the whole tensor.
    Float8,
}

/// A block format.
#[derive(Debug)]
pub struct BlockFormat {
    /// Name, documentation, source.
    pub about: About,
    /// What elements are.
    pub element: &'static dyn Grid,
    /// Elements per block, along the axis of products.
    pub size: usize,
    /// What they share.
    pub scale: BlockScale,
}

const OCP_MX: &str = "OCP Microscaling Formats (MX) specification 1.0, section 5";

const fn mx(name: &'static str, doc: &'static str, element: &'static dyn Grid, largest: i32) -> BlockFormat {
    let about = About { name, doc, source: OCP_MX };
    BlockFormat { about, element, size: 32, scale: BlockScale::PowerOfTwo { largest } }
}

/// Every block format, in the order of the manual.
pub static BLOCKS: &[BlockFormat] = &[
    mx("mxfp8", "Blocks of 32 FLOAT8E4M3FN that share a power of two.", &super::float::FLOAT8_E4M3FN, 8),
    mx("mxfp8e5m2", "Blocks of 32 FLOAT8E5M2 that share a power of two.", &super::float::FLOAT8_E5M2, 15),
    mx("mxfp6", "Blocks of 32 minifloats E2M3 that share a power of two.", &super::float::E2M3, 2),
    mx("mxfp6e3m2", "Blocks of 32 minifloats E3M2 that share a power of two.", &super::float::E3M2, 4),
    mx("mxfp4", "Blocks of 32 FLOAT4E2M1 that share a power of two.", &super::float::FLOAT4_E2M1, 2),
    // An element is a whole multiple of 2⁻⁶ below 2: in units of 1 its largest exponent is 6.
    mx("mxint8", "Blocks of 32 integers of 8 bits that share a power of two.", &super::int::INT8_NARROW, 6),
    BlockFormat {
        about: About {
            name: "nvfp4",
            doc: "Blocks of 16 FLOAT4E2M1 that share a FLOAT8E4M3FN, times one f32 for the tensor.",
            source: "NVIDIA TensorRT documentation, NVFP4; four-bit floating point in ONNX opset 23",
        },
        element: &super::float::FLOAT4_E2M1,
        size: 16,
        scale: BlockScale::Float8,
    },
];

/// The block format called `name`.
pub fn find(name: &str) -> Option<&'static BlockFormat> {
    BLOCKS.iter().find(|format| format.about.name == name)
}

/// The block format whose blocks are `size` elements of `grid`.
pub fn of(grid: &dyn Grid, size: usize) -> Option<&'static BlockFormat> {
    BLOCKS.iter().find(|format| format.element.info().about.name == grid.info().about.name && format.size == size)
}

impl BlockFormat {
    /// The scale of a block whose largest magnitude is `peak`, in a tensor whose largest is `top`; 1 for a block of zeros (times the
    /// tensor's factor). What is returned
    /// has a code in the scale's own format (times the tensor's factor).
    #[expect(clippy::cast_possible_truncation, reason = "powers of two and products of few bits are exact in f32")]
    pub fn scale_of(&self, peak: f32, top: f32) -> f32 {
        let factor = Self::tensor_factor(top);
        match self.scale {
            BlockScale::PowerOfTwo { .. } if peak <= 0.0 || !peak.is_finite() => 1.0,
            BlockScale::PowerOfTwo { largest } => {
                let exponent = i32::try_from(f64::from(peak).to_bits() >> 52 & 0x7ff).unwrap_or(0) - 1023;
                2.0_f64.powi((exponent - largest).clamp(-126, 127)) as f32
            }
            BlockScale::Float8 => self.multiple(peak, factor),
        }
    }

    /// The scale that a run gives a block of an activation, as NVIDIA's operators do: a power of two under which `peak` is not clipped,
    /// or a FLOAT8E4M3FN times `factor`.
    #[expect(clippy::cast_possible_truncation, reason = "powers of two are exact in f32")]
    pub fn measured(&self, peak: f32, factor: f32) -> f32 {
        match self.scale {
            BlockScale::PowerOfTwo { .. } if peak <= 0.0 || !peak.is_finite() => 1.0,
            BlockScale::PowerOfTwo { .. } => {
                let wanted = (f64::from(peak) / self.element.range().1).to_bits();
                let exponent = i32::try_from(wanted >> 52 & 0x7ff).unwrap_or(0) - 1023;
                let above = i32::from(wanted & ((1 << 52) - 1) != 0);
                2.0_f64.powi((exponent + above).clamp(-126, 127)) as f32
            }
            BlockScale::Float8 => self.multiple(peak, factor),
        }
    }

    /// The FLOAT8E4M3FN times `factor` under which `peak` is about the largest element.
    #[expect(clippy::cast_possible_truncation, reason = "products of few bits, rounded to f32 once")]
    fn multiple(&self, peak: f32, factor: f32) -> f32 {
        if peak <= 0.0 || !peak.is_finite() {
            return factor;
        }
        let wanted = f64::from(peak) / (self.element.range().1 * f64::from(factor));
        // Below half the smallest code the scale would be 0.
        let code = super::float::FLOAT8_E4M3FN.nearest(wanted).max(super::float::FLOAT8_E4M3FN.decode(1));
        code as f32 * factor
    }

    /// The f32 of which every one of `scales` is a FLOAT8E4M3FN multiple, exactly, and the codes of
    /// those; `top` is the largest magnitude
    /// in the tensor, as far as it is known.
    #[expect(clippy::cast_possible_truncation, reason = "codes of few bits are exact in f32")]
    pub fn factored(scales: &[f32], top: f32) -> Option<(f32, Vec<u8>)> {
        let float8 = &super::float::FLOAT8_E4M3FN;
        let multiples = |factor: f32| -> Option<Vec<u8>> {
            let multiple = |scale: &f32| {
                let code = float8.nearest(f64::from(*scale) / f64::from(factor));
                (code > 0.0 && (code as f32 * factor).to_bits() == scale.to_bits())
                    .then(|| float8.encode(code).to_le_bytes()[0])
            };
            scales.iter().map(multiple).collect()
        };
        let largest = scales.iter().fold(0.0_f32, |most, scale| most.max(*scale));
        let codes = (1..=0x7e).rev().map(|code| float8.decode(code) as f32);
        let guesses = codes.map(|code| largest / code).flat_map(|near| [near, near.next_down(), near.next_up()]);
        let mut factors = std::iter::once(Self::tensor_factor(top)).chain(guesses);
        factors.find_map(|factor| Some((factor, multiples(factor)?)).filter(|_| factor.is_normal() && factor > 0.0))
    }

    /// The scales worth trying for such a block: that of [`Self::scale_of`], and the next coarser one, under which the largest
    /// magnitude is not clipped (powers of two), or the largest code is 4 instead of 6 (`FLOAT8E4M3FN`).
    pub fn candidates(&self, peak: f32, top: f32) -> [f32; 2] {
        let scale = self.scale_of(peak, top);
        let coarser = match self.scale {
            BlockScale::PowerOfTwo { .. } => scale * 2.0,
            BlockScale::Float8 => self.scale_of(peak * 1.5, top),
        };
        [scale, if coarser.is_finite() { coarser } else { scale }]
    }

    /// The f32 that scales of a tensor with largest magnitude `top` are multiplied with.
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
    pub fn tensor_factor(top: f32) -> f32 {
        let factor = (f64::from(top) / (6.0 * 448.0)) as f32;
        if factor.is_normal() { factor } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn scales_of_mx_are_powers_of_two_that_the_specification_asks_for() {
        // 5.0 has exponent 2: over 6.0, E2M1's largest, of exponent 2, the scale is 2⁰.
        assert!((find("mxfp4").unwrap().scale_of(5.0, 5.0) - 1.0).abs() < 1e-9);
        // 448 has exponent 8.
        assert!((find("mxfp8").unwrap().scale_of(900.0, 900.0) - 2.0).abs() < 1e-9);
        // 127 · 2⁻⁶ is just below 2: exponent 0 over 6.
        assert!((find("mxint8").unwrap().scale_of(1.9, 1.9) - 1.0 / 64.0).abs() < 1e-9);
        assert!((find("mxfp6").unwrap().scale_of(0.0, 1.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn scales_of_nvfp4_are_float8_codes_times_the_tensor_factor() {
        let format = find("nvfp4").unwrap();
        let factor = BlockFormat::tensor_factor(10.0);
        for peak in [10.0_f32, 3.7, 0.2, 1e-6] {
            let scale = f64::from(format.scale_of(peak, 10.0));
            let code = scale / f64::from(factor);
            assert!((super::super::float::FLOAT8_E4M3FN.nearest(code) - code).abs() < 1e-6 * code, "{peak}");
        }
        // They are found again from the scales alone.
        let scales: Vec<f32> = [10.0, 3.7, 0.2, 0.0].map(|peak| format.scale_of(peak, 10.0)).to_vec();
        let (found, multiples) = BlockFormat::factored(&scales, 0.0).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "codes of 8 bits are exact in f32")]
        let decode = |code: &u8| super::super::float::FLOAT8_E4M3FN.decode(u32::from(*code)) as f32;
        let again: Vec<f32> = multiples.iter().map(|code| decode(code) * found).collect();
        assert_eq!(again, scales);
        assert!(BlockFormat::factored(&[1.0, 1.03], 0.0).is_none());
        // The largest block reaches the largest code: 10 / 6 = 448 · factor.
        assert!((format.scale_of(10.0, 10.0) - 10.0 / 6.0).abs() < 1e-5);
    }

    /// Magnitudes of all sizes, from 0 to the largest.
    fn magnitudes() -> Vec<f32> {
        let ends = [0.0, f32::from_bits(1), 1e-40, f32::MIN_POSITIVE, 1.0, 6.0, 448.0, f32::MAX];
        let drawn = (0..60).map(|i| f32::from_bits(u32::try_from(mixed(i) % 0x7f80_0000).unwrap()));
        ends.into_iter().chain(drawn).collect()
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "codes of 8 bits are exact in f32")]
    fn scales_are_positive_and_of_their_format_whatever_the_block() {
        let codes: Vec<f32> = (1..=0x7e).map(|code| super::super::float::FLOAT8_E4M3FN.decode(code) as f32).collect();
        for format in BLOCKS {
            for top in magnitudes() {
                let factor = BlockFormat::tensor_factor(top);
                for peak in magnitudes().into_iter().filter(|peak| *peak <= top) {
                    let [first, second] = format.candidates(peak, top);
                    for scale in [format.scale_of(peak, top), first, second, format.measured(peak, factor)] {
                        let name = format.about.name;
                        assert!(scale.is_finite() && scale > 0.0, "{name} {peak} {top}: {scale}");
                        let fits = match format.scale {
                            BlockScale::PowerOfTwo { .. } => {
                                scale.is_normal() && scale.to_bits().trailing_zeros() >= 23
                            }
                            BlockScale::Float8 => codes.iter().any(|c| (c * factor).to_bits() == scale.to_bits()),
                        };
                        assert!(fits, "{name} {peak} {top}: {scale}");
                    }
                }
            }
        }
    }

    #[test]
    fn measured_powers_of_two_clip_nothing_and_the_next_finer_ones_do() {
        for format in BLOCKS {
            let BlockScale::PowerOfTwo { largest } = format.scale else { continue };
            let end = format.element.range().1;
            assert!((end.log2().floor() - f64::from(largest)).abs() < 1e-9, "{}", format.about.name);
            for peak in magnitudes().into_iter().filter(|peak| *peak > 0.0) {
                let scale = format.measured(peak, 1.0);
                let codes = f64::from(peak) / f64::from(scale);
                assert!(codes <= end, "{} {peak}: {scale}", format.about.name);
                assert!(2.0 * codes > end || scale <= f32::MIN_POSITIVE, "{} {peak}: {scale}", format.about.name);
            }
        }
    }
}
