//! Encodings: a grid, scales and zero points; quantizing and dequantizing tensors exactly as ONNX says.
//!
//! `code = saturate(round_half_even(x / scale) + zero_point)` and `x̂ = (code − zero_point) · scale`, both in f32, as
//! `QuantizeLinear` and `DequantizeLinear` compute them. [`Encoding::simulate`] is the composition of the two.

use std::sync::Arc;

use bytes::Bytes;

use crate::grid::Grid;
use crate::tensor::{DType, Tensor};

/// Which elements of a tensor share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Granularity {
    /// All of them.
    Tensor,
    /// Those with the same index on this axis.
    Axis(usize),
    /// Runs of `size` along `axis`, the last one possibly shorter.
    Block {
        /// The axis that is cut.
        axis: usize,
        /// Elements per block.
        size: usize,
    },
}

/// How a tensor is written in few bits.
#[derive(Clone, Debug)]
pub struct Encoding {
    /// The points.
    pub grid: &'static dyn Grid,
    /// Who shares a scale.
    pub granularity: Granularity,
    /// One per group, row-major over groups; finite and not 0. Those of weights may be negative: the grid has one code more
    /// on one side, and the sign says which.
    pub scale: Arc<[f32]>,
    /// One per group; 0 for symmetric encodings.
    pub zero_point: Arc<[i32]>,
}

impl PartialEq for Encoding {
    fn eq(&self, other: &Self) -> bool {
        let bits = |scale: &[f32]| scale.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
        self.grid.info().about.name == other.grid.info().about.name
            && self.granularity == other.granularity
            && bits(&self.scale) == bits(&other.scale)
            && self.zero_point == other.zero_point
    }
}

/// Why an encoding does not fit a tensor.
#[derive(Debug, thiserror::Error)]
#[error("a {granularity:?} encoding with {scales} scales does not fit a tensor of shape {shape:?}")]
pub struct EncodingError {
    granularity: Granularity,
    scales: usize,
    shape: Vec<usize>,
}

impl Encoding {
    /// One scale for the whole tensor.
    pub fn per_tensor(grid: &'static dyn Grid, scale: f32, zero_point: i32) -> Self {
        Self { grid, granularity: Granularity::Tensor, scale: Arc::new([scale]), zero_point: Arc::new([zero_point]) }
    }

    /// One scale per index of `axis`, no zero points.
    pub fn per_axis(grid: &'static dyn Grid, axis: usize, scale: Vec<f32>) -> Self {
        let zero_point = vec![0; scale.len()].into();
        Self { grid, granularity: Granularity::Axis(axis), scale: scale.into(), zero_point }
    }

    /// Whether both read codes as the same values: a file does not tell grids of one storage type apart.
    pub fn reads_like(&self, other: &Self) -> bool {
        self.grid.info().storage == other.grid.info().storage && Self { grid: other.grid, ..self.clone() } == *other
    }

    /// Whether every zero point is 0.
    pub fn is_symmetric(&self) -> bool {
        self.zero_point.iter().all(|&z| z == 0)
    }

    /// Replaces `values`, laid out as `shape`, by what survives quantization.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match `shape`.
    pub fn simulate(&self, values: &mut [f32], shape: &[usize]) -> Result<(), EncodingError> {
        self.for_each_run(values, shape, |run, scale, zero| {
            run.iter_mut().for_each(|x| *x /= scale);
            self.grid.snap(run, zero);
            run.iter_mut().for_each(|x| *x *= scale);
        })
    }

    /// The codes of `values`, packed in the grid's storage type.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match `shape`.
    pub fn encode(&self, values: &[f32], shape: &[usize]) -> Result<Tensor, EncodingError> {
        let mut points = values.to_vec();
        self.for_each_run(&mut points, shape, |run, scale, zero| {
            run.iter_mut().for_each(|x| *x /= scale);
            self.grid.snap(run, zero);
        })?;
        // `snap` leaves code − zero: packing puts the zero points back.
        Ok(self.pack_points(&points, shape))
    }

    /// The codes of points of the grid from which zero points were taken, packed in the grid's storage type.
    ///
    /// # Panics
    /// Never for as many points as `shape` holds and scales that fit it.
    pub fn pack_points(&self, points: &[f32], shape: &[usize]) -> Tensor {
        let mut codes = vec![0_u32; points.len()];
        let fits = self.for_each_index(shape, |index, group| {
            codes[index] = self.grid.encode(f64::from(points[index]) + f64::from(self.zero_point[group]));
        });
        debug_assert!(fits.is_ok(), "{fits:?}");
        self.pack(&codes, shape)
    }

    /// The values that `codes` stand for.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match the shape of `codes`.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "code − zero point is exact in f32 up to 24 bits, as ONNX has it"
    )]
    pub fn decode(&self, codes: &Tensor) -> Result<Vec<f32>, EncodingError> {
        let unpacked = unpack(codes);
        let mut values = vec![0.0; unpacked.len()];
        self.for_each_index(codes.shape(), |index, group| {
            let point = self.grid.decode(unpacked[index]) - f64::from(self.zero_point[group]);
            values[index] = point as f32 * self.scale[group];
        })?;
        Ok(values)
    }

    /// The shape of the scale tensor for values of shape `shape`: rank 0, `[D]`, or `shape` with the blocked axis cut.
    pub fn scale_shape(&self, shape: &[usize]) -> Vec<usize> {
        match self.granularity {
            Granularity::Tensor => Vec::new(),
            Granularity::Axis(_) => vec![self.scale.len()],
            Granularity::Block { axis, size } => {
                let cut = |(i, &d): (usize, &usize)| if i == axis { d.div_ceil(size.max(1)) } else { d };
                shape.iter().enumerate().map(cut).collect()
            }
        }
    }

    fn misfit(&self, shape: &[usize]) -> EncodingError {
        EncodingError { granularity: self.granularity, scales: self.scale.len(), shape: shape.to_vec() }
    }

    /// The number of groups of `shape`, and the extents (outer, axis, inner) around the axis; `None` if it has none.
    fn layout(&self, shape: &[usize]) -> Result<(usize, usize, usize), EncodingError> {
        let (groups, layout) = match self.granularity {
            Granularity::Tensor => (1, (1, 1, shape.iter().product())),
            Granularity::Axis(axis) | Granularity::Block { axis, .. } => {
                let &dim = shape.get(axis).ok_or_else(|| self.misfit(shape))?;
                let outer: usize = shape[..axis].iter().product();
                let inner: usize = shape[axis + 1..].iter().product();
                let groups = match self.granularity {
                    Granularity::Block { size, .. } if size > 0 => outer * dim.div_ceil(size) * inner,
                    Granularity::Block { .. } => return Err(self.misfit(shape)),
                    _ => dim,
                };
                (groups, (outer, dim, inner))
            }
        };
        if groups != self.scale.len() || groups != self.zero_point.len() {
            return Err(self.misfit(shape));
        }
        Ok(layout)
    }

    /// Calls `f` with every longest run of neighbors that share a group.
    fn for_each_run(
        &self,
        values: &mut [f32],
        shape: &[usize],
        f: impl Fn(&mut [f32], f32, f32),
    ) -> Result<(), EncodingError> {
        let (_, dim, inner) = self.layout(shape)?;
        match self.granularity {
            Granularity::Tensor => f(values, self.scale[0], self.zero_point[0] as f32),
            Granularity::Axis(_) if inner > 0 && dim > 0 => {
                for (index, run) in values.chunks_mut(inner).enumerate() {
                    let group = index % dim;
                    f(run, self.scale[group], self.zero_point[group] as f32);
                }
            }
            Granularity::Axis(_) => {}
            Granularity::Block { .. } => self.for_each_index(shape, |index, group| {
                f(&mut values[index..=index], self.scale[group], self.zero_point[group] as f32);
            })?,
        }
        Ok(())
    }

    /// Calls `f(element index, group index)` for every element, in order.
    fn for_each_index(&self, shape: &[usize], mut f: impl FnMut(usize, usize)) -> Result<(), EncodingError> {
        let (outer, dim, inner) = self.layout(shape)?;
        let mut index = 0;
        for o in 0..outer {
            for d in 0..dim {
                for i in 0..inner {
                    let group = match self.granularity {
                        Granularity::Tensor => 0,
                        Granularity::Axis(_) => d,
                        Granularity::Block { size, .. } => (o * dim.div_ceil(size) + d / size) * inner + i,
                    };
                    f(index, group);
                    index += 1;
                }
            }
        }
        Ok(())
    }

    fn pack(&self, codes: &[u32], shape: &[usize]) -> Tensor {
        let storage = self.grid.info().storage;
        let bits = storage.bits() as usize;
        let mut bytes = vec![0_u8; (codes.len() * bits).div_ceil(8)];
        if bits >= 8 {
            let width = bits / 8;
            for (code, slot) in codes.iter().zip(bytes.chunks_exact_mut(width)) {
                slot.copy_from_slice(&code.to_le_bytes()[..width]);
            }
        } else {
            for (index, code) in codes.iter().enumerate() {
                let at = index * bits;
                bytes[at / 8] |= code.to_le_bytes()[0] << (at % 8);
            }
        }
        packed(storage, shape, bytes)
    }
}

/// The codes of an integer tensor of up to 32 bits, one per element; bits above the type's are zero.
pub fn unpack(codes: &Tensor) -> Vec<u32> {
    let bits = codes.dtype().bits() as usize;
    let bytes = codes.bytes();
    if bits >= 8 {
        let widen = |slot: &[u8]| slot.iter().rev().fold(0_u32, |code, &byte| (code << 8) | u32::from(byte));
        return bytes.chunks_exact(bits / 8).map(widen).collect();
    }
    let mask = (1_u32 << bits) - 1;
    (0..codes.len()).map(|index| (u32::from(bytes[index * bits / 8]) >> (index * bits % 8)) & mask).collect()
}

fn packed(storage: DType, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    match Tensor::new(storage, shape.to_vec(), Bytes::from(bytes)) {
        Ok(tensor) => tensor,
        Err(error) => unreachable!("a bug in onnx-quant: packing made a wrong size: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid;

    #[test]
    fn encode_then_decode_is_simulate() {
        let values: Vec<f32> = (0..24).map(|i| (i as f32 - 11.3) * 0.37).collect();
        let shape = [2, 3, 4];
        for grid in grid::all().filter(|g| g.info().bits <= 16) {
            for (granularity, groups) in [
                (Granularity::Tensor, 1),
                (Granularity::Axis(1), 3),
                (Granularity::Axis(2), 4),
                (Granularity::Block { axis: 2, size: 3 }, 12),
                (Granularity::Block { axis: 1, size: 2 }, 16),
            ] {
                let scale: Vec<f32> = (0..groups).map(|g| 0.05 + 0.01 * g as f32).collect();
                let zero = i32::from(grid.range().0 >= 0.0);
                let encoding =
                    Encoding { grid, granularity, scale: scale.into(), zero_point: vec![zero; groups].into() };
                let mut simulated = values.clone();
                encoding.simulate(&mut simulated, &shape).unwrap();
                let codes = encoding.encode(&values, &shape).unwrap();
                assert_eq!(encoding.decode(&codes).unwrap(), simulated, "{grid:?} {granularity:?}");
            }
        }
    }

    #[test]
    fn misfits_are_refused() {
        let encoding = Encoding::per_axis(grid::find("int8").unwrap(), 1, vec![1.0; 3]);
        assert!(encoding.encode(&[0.0; 8], &[2, 4]).is_err());
        assert!(encoding.encode(&[0.0; 8], &[8]).is_err());
        assert!(encoding.encode(&[], &[0, 3]).is_ok());
    }
}
