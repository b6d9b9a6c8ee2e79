//! Encodings: a grid, scales and zero points; quantizing and dequantizing tensors exactly as ONNX says.
//!
//! `code = saturate(round_half_even(x / scale) + zero_point)` and `x̂ = (code − zero_point) · scale`, both in f32, as
//! `QuantizeLinear` and `DequantizeLinear` compute them. [`Encoding::simulate`] is the composition of the two.

mod of_run;

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
    /// All of them, by a scale and a zero point that every run computes from its own values.
    Dynamic,
    /// Runs of `size` along `axis`, by scales that every run computes from its own values as the block format of that grid and size has
    /// it; the one scale of the encoding is the factor that they are multiples of.
    DynamicBlocks {
        /// The axis that is cut.
        axis: usize,
        /// Elements per block.
        size: usize,
    },
    /// Those that differ on `axis` alone, of which there are `size`, by a scale and a zero point that every run computes from them: the
    /// channels of a token, where `axis` is the last.
    DynamicRows {
        /// The axis that a group lies along.
        axis: usize,
        /// Its extent.
        size: usize,
    },
}

impl Granularity {
    /// Whether every run computes the scales anew.
    pub const fn is_dynamic(self) -> bool {
        matches!(self, Self::Dynamic | Self::DynamicBlocks { .. } | Self::DynamicRows { .. })
    }
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

    /// Whether both read codes as the same values: a file does not tell grids of one storage type apart, and may hold the same integers
    /// in a wider type.
    pub fn reads_like(&self, other: &Self) -> bool {
        let (mine, theirs) = (self.grid.info(), other.grid.info());
        let same_integers = mine.integer && theirs.integer && self.grid.range() == other.grid.range();
        (mine.storage == theirs.storage || same_integers) && Self { grid: other.grid, ..self.clone() } == *other
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
        if self.granularity.is_dynamic() {
            return self.of_run(values, shape)?.simulate(values, shape);
        }
        self.for_each_line(shape, |range, groups| {
            let line = &mut values[range];
            self.to_points(line, groups);
            self.scaled(line, groups);
        })
    }

    /// The codes of `values`, packed in the grid's storage type.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match `shape`.
    pub fn encode(&self, values: &[f32], shape: &[usize]) -> Result<Tensor, EncodingError> {
        let mut points = values.to_vec();
        self.for_each_line(shape, |range, groups| self.to_points(&mut points[range], groups))?;
        // Points are codes less zero points: packing puts those back.
        Ok(self.pack_points(&points, shape))
    }

    /// The codes of points of the grid from which zero points were taken, packed in the grid's storage type.
    ///
    /// # Panics
    /// Never for as many points as `shape` holds and scales that fit it.
    pub fn pack_points(&self, points: &[f32], shape: &[usize]) -> Tensor {
        let storage = self.grid.info().storage;
        let bits = storage.bits() as usize;
        let mut bytes = vec![0_u8; (points.len() * bits).div_ceil(8)];
        let mut codes = Vec::new();
        let fits = self.for_each_line(shape, |range, groups| {
            codes.clear();
            codes.resize(range.len(), 0);
            match groups {
                Groups::One(group) => {
                    self.grid.encode_run(&points[range.clone()], self.zero_point[group], &mut codes);
                }
                Groups::From(first) if self.uniform_zero(first, range.len()) => {
                    self.grid.encode_run(&points[range.clone()], self.zero_point[first], &mut codes);
                }
                Groups::From(first) => {
                    for (i, code) in codes.iter_mut().enumerate() {
                        let at = range.start + i..=range.start + i;
                        self.grid.encode_run(&points[at], self.zero_point[first + i], std::slice::from_mut(code));
                    }
                }
            }
            write_codes(&mut bytes, bits, range.start, &codes);
        });
        debug_assert!(fits.is_ok(), "{fits:?}");
        packed(storage, shape, bytes)
    }

    /// The values that `codes` stand for.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match the shape of `codes`.
    pub fn decode(&self, codes: &Tensor) -> Result<Vec<f32>, EncodingError> {
        let mut values = vec![0.0; codes.len()];
        let bits = codes.dtype().bits() as usize;
        let mut unpacked = Vec::new();
        self.for_each_line(codes.shape(), |range, groups| {
            read_codes(codes.bytes(), bits, range.clone(), &mut unpacked);
            let line = &mut values[range];
            self.grid.decode_run(&unpacked, line);
            match groups {
                Groups::One(group) => {
                    // Exact in f32 up to 24 bits, as ONNX has it.
                    let zero = self.zero_point[group] as f32;
                    line.iter_mut().for_each(|v| *v -= zero);
                }
                Groups::From(first) => {
                    let zeros = &self.zero_point[first..first + line.len()];
                    line.iter_mut().zip(zeros).for_each(|(v, zero)| *v -= *zero as f32);
                }
            }
            self.scaled(line, groups);
        })?;
        Ok(values)
    }

    /// The scale of every element of a tensor of `shape`, and its zero point.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match `shape`.
    pub fn per_element(&self, shape: &[usize]) -> Result<(Vec<f32>, Vec<f32>), EncodingError> {
        let groups = self.groups(shape)?;
        let of = |group: &u32| (self.scale[*group as usize], self.zero_point[*group as usize] as f32);
        Ok(groups.iter().map(of).unzip())
    }

    /// The group of every element of a tensor of `shape`: which scale is its own.
    ///
    /// # Errors
    /// [`EncodingError`] when the scales do not match `shape`.
    pub fn groups(&self, shape: &[usize]) -> Result<Vec<u32>, EncodingError> {
        let mut all = Vec::new();
        let narrow = |group: usize| u32::try_from(group).unwrap_or(u32::MAX);
        self.for_each_line(shape, |range, groups| match groups {
            Groups::One(group) => all.extend(range.map(|_| narrow(group))),
            Groups::From(first) => all.extend((0..range.len()).map(|i| narrow(first + i))),
        })?;
        Ok(all)
    }

    /// The shape of the scale tensor for values of shape `shape`: rank 0, `[D]`, or `shape` with the blocked axis cut.
    pub fn scale_shape(&self, shape: &[usize]) -> Vec<usize> {
        match self.granularity {
            Granularity::Tensor
            | Granularity::Dynamic
            | Granularity::DynamicBlocks { .. }
            | Granularity::DynamicRows { .. } => Vec::new(),
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
            // Its codes say nothing without the scale of their run.
            Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => {
                return Err(self.misfit(shape));
            }
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

    /// Calls `f` with every longest run of neighbors whose groups are one, or ascend by one.
    fn for_each_line(
        &self,
        shape: &[usize],
        mut f: impl FnMut(std::ops::Range<usize>, Groups),
    ) -> Result<(), EncodingError> {
        let (outer, dim, inner) = self.layout(shape)?;
        let mut start = 0;
        let mut line = |length: usize, groups: Groups| {
            if length > 0 {
                f(start..start + length, groups);
            }
            start += length;
        };
        match self.granularity {
            Granularity::Tensor
            | Granularity::Dynamic
            | Granularity::DynamicBlocks { .. }
            | Granularity::DynamicRows { .. } => line(inner, Groups::One(0)),
            Granularity::Axis(_) if inner == 1 => (0..outer).for_each(|_| line(dim, Groups::From(0))),
            Granularity::Axis(_) => {
                (0..outer).for_each(|_| (0..dim).for_each(|group| line(inner, Groups::One(group))));
            }
            Granularity::Block { size, .. } if inner == 1 => {
                let blocks = dim.div_ceil(size);
                for group in 0..outer * blocks {
                    line(size.min(dim - group % blocks * size), Groups::One(group));
                }
            }
            Granularity::Block { size, .. } => {
                let blocks = dim.div_ceil(size);
                for o in 0..outer {
                    (0..dim).for_each(|d| line(inner, Groups::From((o * blocks + d / size) * inner)));
                }
            }
        }
        Ok(())
    }

    /// Whether the `n` groups from `first` on have the same zero point.
    fn uniform_zero(&self, first: usize, n: usize) -> bool {
        self.zero_point[first..first + n].iter().all(|zero| *zero == self.zero_point[first])
    }

    /// Replaces the values of a line by the points (codes less zero points) that they round to.
    fn to_points(&self, line: &mut [f32], groups: Groups) {
        match groups {
            Groups::One(group) => {
                let scale = self.scale[group];
                line.iter_mut().for_each(|x| *x /= scale);
                self.grid.snap(line, self.zero_point[group] as f32);
            }
            Groups::From(first) => {
                line.iter_mut().zip(&self.scale[first..]).for_each(|(x, scale)| *x /= scale);
                if self.uniform_zero(first, line.len()) {
                    self.grid.snap(line, self.zero_point[first] as f32);
                } else {
                    let zeros = &self.zero_point[first..];
                    let each = line.iter_mut().zip(zeros);
                    each.for_each(|(x, zero)| self.grid.snap(std::slice::from_mut(x), *zero as f32));
                }
            }
        }
    }

    /// Multiplies a line of points with their scales.
    fn scaled(&self, line: &mut [f32], groups: Groups) {
        match groups {
            Groups::One(group) => {
                let scale = self.scale[group];
                line.iter_mut().for_each(|x| *x *= scale);
            }
            Groups::From(first) => {
                line.iter_mut().zip(&self.scale[first..]).for_each(|(x, scale)| *x *= scale);
            }
        }
    }
}

/// The groups of a run of neighbors.
#[derive(Clone, Copy, Debug)]
enum Groups {
    /// All are in this one.
    One(usize),
    /// The first is in this one, each further one in the next.
    From(usize),
}

/// Writes `codes`, of so many bits each, as elements `first` and following; their bits must be 0 so far.
fn write_codes(bytes: &mut [u8], bits: usize, first: usize, codes: &[u32]) {
    if bits >= 8 {
        let width = bits / 8;
        for (code, slot) in codes.iter().zip(bytes[first * width..].chunks_exact_mut(width)) {
            slot.copy_from_slice(&code.to_le_bytes()[..width]);
        }
    } else {
        for (i, code) in codes.iter().enumerate() {
            let at = (first + i) * bits;
            bytes[at / 8] |= code.to_le_bytes()[0] << (at % 8);
        }
    }
}

/// The elements `range` of packed codes of so many bits.
fn read_codes(bytes: &[u8], bits: usize, range: std::ops::Range<usize>, codes: &mut Vec<u32>) {
    codes.clear();
    if bits >= 8 {
        let width = bits / 8;
        let widen = |slot: &[u8]| slot.iter().rev().fold(0_u32, |code, &byte| (code << 8) | u32::from(byte));
        codes.extend(bytes[range.start * width..range.end * width].chunks_exact(width).map(widen));
    } else {
        let mask = (1_u32 << bits) - 1;
        codes.extend(range.map(|index| (u32::from(bytes[index * bits / 8]) >> (index * bits % 8)) & mask));
    }
}

/// The codes of an integer tensor of up to 32 bits, one per element; bits above the type's are zero.
pub fn unpack(codes: &Tensor) -> Vec<u32> {
    let mut unpacked = Vec::new();
    read_codes(codes.bytes(), codes.dtype().bits() as usize, 0..codes.len(), &mut unpacked);
    unpacked
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
    use crate::seed::{mixed, uniform};

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

    /// An encoding with `grid`, a shape, and values: ragged blocks, scales of both signs, mixed zero points.
    #[expect(clippy::cast_possible_truncation, reason = "zero points are whole numbers; any f32 will do")]
    fn drawn(seed: u64, grid: &'static dyn Grid) -> (Encoding, Vec<usize>, Vec<f32>) {
        let random = |at: u64| uniform(seed << 32 | at);
        let below = |at: u64, n: u64| usize::try_from(mixed(seed << 32 | at) % n).unwrap();
        let rank = 1 + mixed(seed << 32) % 4;
        let shape: Vec<usize> = (0..rank).map(|axis| 1 + below(10 + axis, 7)).collect();
        let (axis, size) = (below(1, rank), 1 + below(2, 5));
        let blocks = |(i, d): (usize, &usize)| if i == axis { d.div_ceil(size) } else { *d };
        let (granularity, groups) = match below(3, 3) {
            0 => (Granularity::Tensor, 1),
            1 => (Granularity::Axis(axis), shape[axis]),
            _ => (Granularity::Block { axis, size }, shape.iter().enumerate().map(blocks).product::<usize>()),
        };
        let (low, high) = grid.range();
        let sign = |at: u64| if random(at) < 0.2 { -1.0 } else { 1.0 };
        let scale = |at: u64| (sign(at) * (0.01 + random(at + 1))) as f32;
        let zero = |at: u64| if grid.info().integer { (low + (high - low) * random(at)).round() as i32 } else { 0 };
        let value = |at: u64| (1.5 * (high - low) * (2.0 * random(at) - 1.0) * random(at + 1).powi(3)) as f32;
        let groups = groups as u64;
        let encoding = Encoding {
            grid,
            granularity,
            scale: (0..groups).map(|group| scale(100 + 3 * group)).collect(),
            zero_point: (0..groups).map(|group| zero(102 + 3 * group)).collect(),
        };
        let n: usize = shape.iter().product();
        (encoding, shape, (0..n as u64).map(|i| value(100_000 + 2 * i)).collect())
    }

    #[test]
    fn encode_then_decode_is_simulate_for_any_shape() {
        for grid in grid::all().filter(|grid| grid.info().bits <= 16) {
            for seed in 0..24 {
                let (encoding, shape, values) = drawn(seed, grid);
                let mut simulated = values.clone();
                encoding.simulate(&mut simulated, &shape).unwrap();
                let codes = encoding.encode(&values, &shape).unwrap();
                assert_eq!(encoding.decode(&codes).unwrap(), simulated, "{encoding:?} {shape:?}");
            }
        }
    }

    /// A power of two is an exact change of units.
    #[test]
    fn twice_the_values_at_twice_the_scale_are_twice_as_much() {
        for grid in grid::all() {
            for seed in 0..12 {
                let (encoding, shape, mut values) = drawn(seed, grid);
                let scale = encoding.scale.iter().map(|scale| 2.0 * scale).collect();
                let double = Encoding { scale, ..encoding.clone() };
                let mut doubled: Vec<f32> = values.iter().map(|v| 2.0 * v).collect();
                encoding.simulate(&mut values, &shape).unwrap();
                double.simulate(&mut doubled, &shape).unwrap();
                let same = |(v, twice): (&f32, &f32)| (2.0 * v).to_bits() == twice.to_bits();
                assert!(values.iter().zip(&doubled).all(same), "{encoding:?} {shape:?}");
            }
        }
    }
}
