//! Weights of linear layers as rows of codes, and the layouts of compressed-tensors for them.

use passes::encoding::{self, Encoding, Granularity};
use passes::tensor::Tensor;
use serde_json::{Value, json};

/// A format of compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Integers of up to 8 bits in 32-bit words, beside float activations.
    PackQuantized,
    /// Integers of 8 bits, beside activations of the same.
    IntQuantized,
    /// FLOAT8E4M3FN, beside activations of the same.
    FloatQuantized,
    /// The same beside float activations, which their reader takes for no format of its own.
    NaiveQuantized,
    /// FLOAT4E2M1 in blocks of 16.
    Nvfp4,
    /// FLOAT4E2M1 in blocks of 32 with E8M0 scales.
    Mxfp4,
    /// FLOAT8E4M3FN in blocks of 32 with E8M0 scales.
    Mxfp8,
}

impl Layout {
    /// The layout for `matrix`, beside an activation in codes where there is one.
    pub(super) fn of(matrix: &Matrix<'_>, activation: Option<&Encoding>) -> Result<Self, String> {
        let info = matrix.encoding.grid.info();
        let plain = |activation: &Encoding| activation.granularity == Granularity::Tensor && activation.is_symmetric();
        if activation.is_some_and(|activation| !plain(activation)) {
            return Err("its activation has zero points, or the range of each run".into());
        }
        let of_activation = activation.map(|activation| activation.grid.info().about.name);
        match (info.integer, info.about.name, matrix.block(), of_activation) {
            (true, _, _, None) => Ok(Self::PackQuantized),
            (true, "int8" | "int8-narrow", None, Some("int8")) if matrix.encoding.is_symmetric() => {
                Ok(Self::IntQuantized)
            }
            (false, "float8e4m3fn", None, Some("float8e4m3fn")) => Ok(Self::FloatQuantized),
            (false, "float8e4m3fn", None, None) => Ok(Self::NaiveQuantized),
            (false, "float8e4m3fn", Some(32), None) => Ok(Self::Mxfp8),
            (false, "float4e2m1", Some(16), None) => Ok(Self::Nvfp4),
            (false, "float4e2m1", Some(32), None) => Ok(Self::Mxfp4),
            (_, name, ..) => {
                Err(format!("compressed-tensors has no layout for {name} with these scales and activations"))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::PackQuantized => "pack-quantized",
            Self::IntQuantized => "int-quantized",
            Self::FloatQuantized => "float-quantized",
            Self::NaiveQuantized => "naive-quantized",
            Self::Nvfp4 => "nvfp4-pack-quantized",
            Self::Mxfp4 => "mxfp4-pack-quantized",
            Self::Mxfp8 => "mxfp8-quantized",
        }
    }

    /// Its name, and the arguments of weights and activations as JSON.
    pub(super) fn scheme(self, matrix: &Matrix<'_>, activation: Option<&Encoding>) -> [String; 3] {
        let info = matrix.encoding.grid.info();
        let kind = |integer: bool| if integer { "int" } else { "float" };
        let strategy = match (self, matrix.block()) {
            (Self::Nvfp4, _) => "tensor_group",
            (_, Some(_)) => "group",
            (_, None) => "channel",
        };
        let mut weights = json!({
            "num_bits": info.bits, "type": kind(info.integer), "symmetric": matrix.encoding.is_symmetric(),
            "strategy": strategy, "group_size": matrix.block(), "dynamic": false,
        });
        match self {
            Self::Nvfp4 => weights["scale_dtype"] = "torch.float8_e4m3fn".into(),
            Self::Mxfp4 | Self::Mxfp8 => weights["scale_dtype"] = "torch.uint8".into(),
            _ => {}
        }
        let inputs = activation.map_or(Value::Null, |activation| {
            let info = activation.grid.info();
            json!({ "num_bits": info.bits, "type": kind(info.integer), "symmetric": true, "strategy": "tensor", "dynamic": false })
        });
        [self.name().into(), weights.to_string(), inputs.to_string()]
    }
}

/// The codes of a weight as [outputs, inputs].
pub(super) struct Matrix<'a> {
    pub(super) encoding: &'a Encoding,
    stored: Tensor,
    codes: Vec<i64>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    #[expect(clippy::cast_possible_truncation, reason = "codes of up to 8 bits")]
    pub(super) fn of(encoding: &'a Encoding, codes: &Tensor, out_axis: usize) -> Result<Self, String> {
        let [first, second] = *codes.shape() else { return Err("it is no matrix".into()) };
        let info = encoding.grid.info();
        let by_rows = match encoding.granularity {
            Granularity::Axis(axis) => axis == out_axis,
            Granularity::Block { axis, size } => axis != out_axis && codes.shape()[axis].is_multiple_of(size),
            Granularity::Tensor => true,
            Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => false,
        };
        if !by_rows || info.bits > 8 || !(info.integer || matches!(info.about.name, "float8e4m3fn" | "float4e2m1")) {
            return Err(format!("compressed-tensors has no layout for {} with these scales", info.about.name));
        }
        let unpacked = encoding::unpack(codes);
        let number = |code: u32| if info.integer { encoding.grid.decode(code) as i64 } else { i64::from(code) };
        let (rows, columns) = if out_axis == 0 { (first, second) } else { (second, first) };
        Ok(Self {
            encoding,
            stored: codes.clone(),
            codes: unpacked.into_iter().map(number).collect(),
            rows,
            columns,
            transposed: out_axis != 0,
        })
    }

    pub(super) fn code(&self, row: usize, column: usize) -> i64 {
        self.codes[if self.transposed { column * self.rows + row } else { row * self.columns + column }]
    }

    pub(super) fn block(&self) -> Option<usize> {
        match self.encoding.granularity {
            Granularity::Block { size, .. } if size < self.columns || !self.encoding.grid.info().integer => Some(size),
            _ => None,
        }
    }

    pub(super) fn groups(&self) -> usize {
        self.block().map_or(1, |size| self.columns.div_ceil(size))
    }

    /// Where the scale of a row's group lies.
    fn group(&self, row: usize, group: usize) -> usize {
        match self.encoding.granularity {
            Granularity::Tensor
            | Granularity::Dynamic
            | Granularity::DynamicBlocks { .. }
            | Granularity::DynamicRows { .. } => 0,
            Granularity::Axis(_) => row,
            Granularity::Block { .. } if self.transposed => group * self.rows + row,
            Granularity::Block { .. } => row * self.groups() + group,
        }
    }

    /// One code in every byte, row after row.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let places = (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        places.map(|(row, column)| self.code(row, column).to_le_bytes()[0]).collect()
    }

    /// The largest magnitude that the codes stand for.
    pub(super) fn top(&self) -> f32 {
        self.encoding.decode(&self.stored).map_or(0.0, |values| values.iter().fold(0.0, |most, v| most.max(v.abs())))
    }

    pub(super) fn scales(&self) -> Vec<f32> {
        let places = (0..self.rows).flat_map(|row| (0..self.groups()).map(move |group| (row, group)));
        places.map(|(row, group)| self.encoding.scale[self.group(row, group)]).collect()
    }

    pub(super) fn zero(&self, row: usize, group: usize) -> i64 {
        i64::from(self.encoding.zero_point[self.group(row, group)])
    }

    /// What makes signed codes unsigned.
    pub(super) fn offset(&self) -> i64 {
        if self.encoding.grid.range().0 < 0.0 { 1 << (self.encoding.grid.info().bits - 1) } else { 0 }
    }
}

/// `codes` of `bits` each as 32-bit words, the first in the lowest bits.
pub(super) fn words(codes: impl Iterator<Item = i64>, bits: u32) -> Vec<u32> {
    let (mut words, mut held, mut filled) = (Vec::new(), 0_u64, 0);
    for code in codes {
        held |= (code.cast_unsigned() & ((1 << bits) - 1)) << filled;
        filled += bits;
        if filled >= 32 {
            words.push(u32::try_from(held & u64::from(u32::MAX)).unwrap_or(0));
            held >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words.push(u32::try_from(held).unwrap_or(0));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_filled_from_the_low_end_and_across_their_borders() {
        assert_eq!(words([1, 2, 3, 4, 5, 6, 7, 8, 9].into_iter(), 4), [0x8765_4321, 9]);
        // Eleven codes of 3 bits: the eleventh straddles.
        assert_eq!(words(std::iter::repeat_n(7, 11), 3), [u32::MAX, 1]);
    }
}
