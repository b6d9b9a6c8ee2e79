//! Encodings whose scales every run computes from the values it sees.

use std::sync::Arc;

use super::{Encoding, EncodingError, Granularity, Groups};
use crate::grid::Grid;
use crate::grid::block::{self, BlockFormat};

impl Encoding {
    /// One scale for the whole tensor, computed from the values of each run: see [`Self::measured`].
    pub fn dynamic(grid: &'static dyn Grid) -> Self {
        Self { grid, granularity: Granularity::Dynamic, scale: Arc::new([]), zero_point: Arc::new([]) }
    }

    /// The encoding of `values` that `DynamicQuantizeLinear` computes, in f32 and in its order: their range, widened to hold zero, onto
    /// the codes; scale 1 for a range without extent.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounds of integer grids of up to 16 bits; a zero point between them"
    )]
    pub fn measured(grid: &'static dyn Grid, values: &[f32]) -> Self {
        // `min` and `max` drop NaN.
        let (from, to) = values.iter().fold((0.0_f32, 0.0_f32), |(from, to), x| (from.min(*x), to.max(*x)));
        let (low, high) = (grid.range().0 as f32, grid.range().1 as f32);
        let scale = if from < to { (to - from) / (high - low) } else { 1.0 };
        let zero_point = (low - from / scale).max(low).min(high).round_ties_even();
        Self::per_tensor(grid, scale, zero_point as i32)
    }

    /// Blocks of `format` along `axis` whose scales are computed from the values of each run: multiples of `factor`.
    pub fn dynamic_blocks(format: &BlockFormat, axis: usize, factor: f32) -> Self {
        let granularity = Granularity::DynamicBlocks { axis, size: format.size };
        Self { grid: format.element, granularity, scale: Arc::new([factor]), zero_point: Arc::new([0]) }
    }

    /// The encoding in blocks that a run gives `values`, for one of [`Self::dynamic_blocks`].
    ///
    /// # Errors
    /// [`EncodingError`] for any other, and where the axis is none of `shape`.
    fn measured_blocks(&self, values: &[f32], shape: &[usize]) -> Result<Self, EncodingError> {
        let Granularity::DynamicBlocks { axis, size } = self.granularity else { return Err(self.misfit(shape)) };
        let (format, factor) = block::of(self.grid, size).zip(self.scale.first()).ok_or_else(|| self.misfit(shape))?;
        let granularity = Granularity::Block { axis, size };
        let n = Self { granularity, ..self.clone() }.scale_shape(shape).iter().product();
        let mut peaks = vec![0.0_f32; n];
        let blocks = Self { granularity, scale: vec![1.0; n].into(), zero_point: vec![0; n].into(), ..self.clone() };
        blocks.for_each_line(shape, |range, groups| match groups {
            Groups::One(group) => peaks[group] = values[range].iter().fold(peaks[group], |most, x| most.max(x.abs())),
            Groups::From(first) => {
                let each = peaks[first..].iter_mut().zip(&values[range]);
                each.for_each(|(peak, x)| *peak = peak.max(x.abs()));
            }
        })?;
        Ok(Self { scale: peaks.into_iter().map(|peak| format.measured(peak, *factor)).collect(), ..blocks })
    }

    /// Groups along `axis`, which has `size` elements, whose scales and zero points are computed from the values of each run: from `reach`
    /// times their range.
    pub fn dynamic_rows(grid: &'static dyn Grid, axis: usize, size: usize, reach: f32) -> Self {
        let granularity = Granularity::DynamicRows { axis, size };
        Self { grid, granularity, scale: Arc::new([reach]), zero_point: Arc::new([0]) }
    }

    /// The encoding that a run gives `values`, one scale for each run along the axis, in f32 and in the order that is written to files.
    /// Of `reach` times the range, widened to hold zero: integers take it onto the codes, as [`Self::measured`], other numbers its larger
    /// end onto their largest number. Scales are no smaller than the smallest normal number.
    ///
    /// Source: Zhao et al. 2025 (`FP4DiT`), arXiv:2503.15465, section 4.3, online quantization of activations per token.
    fn measured_rows(&self, values: &[f32], shape: &[usize]) -> Result<Self, EncodingError> {
        let Granularity::DynamicRows { axis, size } = self.granularity else { return Err(self.misfit(shape)) };
        let reach = self.scale.first().filter(|_| shape.get(axis) == Some(&size) && size > 0);
        let reach = *reach.ok_or_else(|| self.misfit(shape))?;
        let granularity = Granularity::Block { axis, size };
        let groups = values.len() / size;
        let blocks =
            Self { granularity, scale: vec![1.0; groups].into(), zero_point: vec![0; groups].into(), ..self.clone() };
        let mut ranges = vec![(0.0_f32, 0.0_f32); groups];
        // As the operators do: one NaN makes the whole row NaN.
        let widen = |range: &mut (f32, f32), x: f32| {
            *range = if x.is_nan() { (x, x) } else { (least(range.0, x), most(range.1, x)) };
        };
        blocks.for_each_line(shape, |line, groups| match groups {
            Groups::One(group) => values[line].iter().for_each(|x| widen(&mut ranges[group], *x)),
            Groups::From(first) => {
                ranges[first..].iter_mut().zip(&values[line]).for_each(|(range, x)| widen(range, *x));
            }
        })?;
        let one = |(from, to): (f32, f32)| self.of_range(from * reach, to * reach);
        let (scale, zero_point): (Vec<f32>, Vec<i32>) = ranges.into_iter().map(one).unzip();
        Ok(Self { scale: scale.into(), zero_point: zero_point.into(), ..blocks })
    }

    /// Scale and zero point for values between `from` and `to`, which lie around zero.
    #[expect(clippy::cast_possible_truncation, reason = "bounds of grids of up to 16 bits; a zero point between them")]
    fn of_range(&self, from: f32, to: f32) -> (f32, i32) {
        let (low, high) = (self.grid.range().0 as f32, self.grid.range().1 as f32);
        if !self.grid.info().integer {
            return (normal(to.max(-from) / high), 0);
        }
        let scale = normal((to - from) / (high - low));
        // As a quantize node without a zero point gives it, for codes that start at 0.
        let zero_point = low + (-from / scale).round_ties_even().clamp(0.0, high - low);
        (scale, zero_point as i32)
    }

    /// The encoding that a run gives `values`.
    ///
    /// # Errors
    /// [`EncodingError`] for one that is fixed, and one that does not fit `shape`.
    pub(crate) fn of_run(&self, values: &[f32], shape: &[usize]) -> Result<Self, EncodingError> {
        match self.granularity {
            Granularity::Dynamic => Ok(Self::measured(self.grid, values)),
            Granularity::DynamicBlocks { .. } => self.measured_blocks(values, shape),
            Granularity::DynamicRows { .. } => self.measured_rows(values, shape),
            _ => Err(self.misfit(shape)),
        }
    }
}

/// `scale`, and no less than the smallest normal number; NaN where it is.
fn normal(scale: f32) -> f32 {
    if scale < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { scale }
}

/// The smaller one; NaN where `range` is.
fn least(range: f32, x: f32) -> f32 {
    if range.is_nan() { range } else { range.min(x) }
}

/// The larger one; NaN where `range` is.
fn most(range: f32, x: f32) -> f32 {
    if range.is_nan() { range } else { range.max(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid;

    #[test]
    fn dynamic_ranges_are_those_of_the_operator() {
        // The example of the ONNX operator's documentation.
        let uint8 = grid::find("uint8").unwrap();
        let of = |values: &[f32]| {
            let encoding = Encoding::measured(uint8, values);
            (encoding.scale[0], encoding.zero_point[0])
        };
        let (scale, zero) = of(&[0.0, 2.0, -3.0, -2.5, 1.34, 0.5]);
        assert!((scale - 0.019_607_844).abs() < 1e-8 && zero == 153, "{scale} {zero}");
        assert_eq!(of(&[1.0, 2.1, 1.3, 2.5, 3.34, 4.0]), (4.0 / 255.0, 0));
        assert_eq!(of(&[-1.0, -4.0]).1, 255);
        for nothing in [&[][..], &[0.0, 0.0], &[f32::NAN]] {
            assert_eq!(of(nothing), (1.0, 0));
        }
        let mut values = [0.1_f32, -0.7, 3.0];
        Encoding::dynamic(uint8).simulate(&mut values, &[3]).unwrap();
        assert!((values[2] - 3.0).abs() < 0.008 && (values[1] + 0.7).abs() < 0.008, "{values:?}");
        assert!(Encoding::dynamic(uint8).encode(&values, &[3]).is_err(), "codes without a scale");
        let mut endless = [f32::INFINITY, 1.0];
        Encoding::dynamic(uint8).simulate(&mut endless, &[2]).unwrap();
    }

    #[test]
    fn dynamic_blocks_take_their_scales_from_each_run() {
        // Blocks of 16: the peak 12 of the first is 6 codes of 2 = 448 · factor / …, the second is all zero.
        let nvfp4 = block::find("nvfp4").unwrap();
        let factor = 2.0 / 448.0;
        let mut values: Vec<f32> = (0..32).map(|i| if i < 16 { i as f32 * 0.8 } else { 0.0 }).collect();
        Encoding::dynamic_blocks(nvfp4, 1, factor).simulate(&mut values, &[1, 32]).unwrap();
        assert_eq!(&values[..4], &[0.0, 1.0, 2.0, 2.0], "{values:?}");
        assert_eq!(values[15..16], [12.0]);
        assert!(values[16..].iter().all(|x| *x == 0.0));
        // A power of two under which the peak is not clipped: 500 needs 2, with steps of 32 from 256 on.
        let mxfp8 = block::find("mxfp8").unwrap();
        let mut values = vec![500.0_f32; 32];
        values[1] = 0.01;
        Encoding::dynamic_blocks(mxfp8, 0, 1.0).simulate(&mut values, &[32]).unwrap();
        assert_eq!(values[..1], [512.0]);
        assert!((values[1] - 0.01).abs() < 0.002, "{}", values[1]);
        assert!(Encoding::dynamic_blocks(mxfp8, 1, 1.0).simulate(&mut values, &[32]).is_err(), "no such axis");
    }

    #[test]
    fn rows_take_their_scales_from_each_run() {
        let uint4 = grid::find("uint4").unwrap();
        let rows = Encoding::dynamic_rows(uint4, 1, 3, 1.0);
        let mut values = vec![-1.0, 0.2, 2.0, 0.0, 0.0, 0.0, 30.0, 1.1, 10.0];
        let of_run = rows.of_run(&values, &[3, 3]).unwrap();
        assert_eq!(of_run.scale[..], [3.0 / 15.0, f32::MIN_POSITIVE, 2.0]);
        assert_eq!(of_run.zero_point[..], [5, 0, 0]);
        rows.simulate(&mut values, &[3, 3]).unwrap();
        assert!((values[0] + 1.0).abs() < 1e-6 && (values[1] - 0.2).abs() < 1e-6, "{values:?}");
        assert_eq!(values[3..], [0.0, 0.0, 0.0, 30.0, 2.0, 10.0]);
        // Along another axis it is the same of the transposed tensor.
        let mut turned = vec![-1.0, 0.0, 30.0, 0.2, 0.0, 1.1, 2.0, 0.0, 10.0];
        Encoding::dynamic_rows(uint4, 0, 3, 1.0).simulate(&mut turned, &[3, 3]).unwrap();
        assert_eq!(
            [turned[0], turned[3], turned[6]].map(f32::to_bits)[..],
            [values[0], values[1], values[2]].map(f32::to_bits)
        );
        // Floats have no zero point: the largest magnitude is the largest number.
        let mut values = vec![-12.0, 0.9, 5.0];
        Encoding::dynamic_rows(grid::find("float4e2m1").unwrap(), 1, 3, 1.0).simulate(&mut values, &[1, 3]).unwrap();
        assert_eq!(values, [-12.0, 1.0, 4.0]);
        // A reach of a half cuts what lies beyond.
        let mut values = vec![-2.0, 1.0, 4.0];
        Encoding::dynamic_rows(uint4, 1, 3, 0.5).simulate(&mut values, &[1, 3]).unwrap();
        assert!((values[0] + 1.0).abs() < 1e-6 && (values[2] - 2.0).abs() < 1e-6, "{values:?}");
        let mut values = vec![1.0, f32::NAN, 2.0, 1.0, 2.0, 3.0];
        rows.simulate(&mut values, &[2, 3]).unwrap();
        assert!(values[..3].iter().all(|x| x.is_nan()) && values[3..].iter().all(|x| x.is_finite()), "{values:?}");
        assert!(rows.simulate(&mut [0.0; 4], &[2, 2]).is_err(), "rows of another extent");
        assert!(Encoding::dynamic_rows(uint4, 1, 0, 1.0).simulate(&mut [], &[2, 0]).is_err(), "no extent");
    }

    /// What every row of a run keeps does not depend on its scale: of k x it is k times as much, for powers of two.
    #[test]
    fn rows_scale_with_their_values() {
        for grid in grid::all().filter(|g| g.info().bits <= 8) {
            let row: Vec<f32> = (0_i16..16).map(|i| (f32::from(i) - 6.3) * 0.41).collect();
            let rows = Encoding::dynamic_rows(grid, 0, 16, 0.9);
            let (mut once, mut more) = (row.clone(), row.iter().map(|x| x * 64.0).collect::<Vec<f32>>());
            rows.simulate(&mut once, &[16]).unwrap();
            rows.simulate(&mut more, &[16]).unwrap();
            assert_eq!(once.iter().map(|x| x * 64.0).collect::<Vec<_>>(), more, "{grid:?}");
        }
    }

    /// A row is rounded by itself: others beside it, and their order, change no bit of it.
    #[test]
    fn rows_are_rounded_one_by_one() {
        for grid in grid::all().filter(|g| g.info().bits <= 8) {
            let of = |row: i16| (0..8_i16).map(move |i| f32::from(row * row) * (f32::from(i * (row + 3) % 7) - 2.3));
            let rows: Vec<Vec<f32>> = (0..6).map(|row| of(row).collect()).collect();
            let encoding = Encoding::dynamic_rows(grid, 1, 8, 1.0);
            let mut together = rows.concat();
            encoding.simulate(&mut together, &[6, 8]).unwrap();
            let mut turned: Vec<f32> = rows.iter().rev().flatten().copied().collect();
            encoding.simulate(&mut turned, &[6, 8]).unwrap();
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            for (at, row) in rows.iter().enumerate() {
                let mut alone = row.clone();
                encoding.simulate(&mut alone, &[1, 8]).unwrap();
                assert_eq!(bits(&alone), bits(&together[8 * at..8 * at + 8]), "{grid:?} {at}");
                assert_eq!(bits(&alone), bits(&turned[8 * (5 - at)..8 * (5 - at) + 8]), "{grid:?} {at}");
            }
        }
    }
}
