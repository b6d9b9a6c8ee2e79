//! How rows of products are cut out of the tensor that a linear node reads.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use crate::simd::vectorized;

/// So many rows at a time are handed on.
const STRIP_ROWS: usize = 1024;

/// The rows that a linear node multiplies with its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rows {
    /// Every run along the last axis is a row: `MatMul`, `Gemm`.
    Last,
    /// The windows of a convolution over one or two axes.
    Windows(Window),
}

/// The geometry of a convolution, as two spatial axes; one axis has kernel 1 on the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Window {
    /// Extents.
    pub kernel: [usize; 2],
    /// Steps.
    pub strides: [usize; 2],
    /// Distances of taps.
    pub dilations: [usize; 2],
    /// Zeros before both axes, then after.
    pub pads: [usize; 4],
    /// Groups of channels.
    pub groups: usize,
    /// Large maps are thinned as for rows of so many columns; `None`: of its own.
    pub thinned_for: Option<usize>,
}

/// A few rows, every value a whole multiple of its column's unit; column after column.
pub(super) struct Strip<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    /// What the rows are multiplied with already, in whole multiples of 2⁻¹⁵; empty where they all count alike.
    pub(super) roots: &'a [f32],
}

/// The unit of a root.
pub(super) const ROOT: f32 = 1.0 / 32768.0;

/// Multiplies the rows in `values`, column after column, with `roots` from 0 to 1, and returns those in whole multiples of [`ROOT`].
fn weigh(values: &mut [f32], roots: impl Iterator<Item = f32>) -> Vec<f32> {
    let roots: Vec<f32> = roots.map(|root| whole(root, 1.0 / f64::from(ROOT))).collect();
    for column in values.chunks_exact_mut(roots.len().max(1)) {
        column.iter_mut().zip(&roots).for_each(|(v, root)| *v = whole(*v, f64::from(root * ROOT)));
    }
    roots
}

/// `v` in units of 1 / `inverse`, to the nearest whole number; what is not finite counts as 0.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "whole numbers up to 2¹⁵")]
fn whole(v: f32, inverse: f64) -> f32 {
    /// Adding and subtracting 1.5 · 2⁵² rounds to a whole number, ties to even.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let v = if v.is_finite() { f64::from(v) * inverse } else { 0.0 };
    ((v.clamp(-32768.0, 32768.0) + ROUND) - ROUND) as f32
}

impl Window {
    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Output extents for an input of `shape` \[N, C, …\]; `None` where the window does not fit.
    fn outputs(&self, shape: &[usize]) -> Option<[usize; 2]> {
        let extent = |axis: usize| -> Option<usize> {
            let n = shape.get(axis + 2).copied().unwrap_or(1);
            let reach = self.dilations[axis].checked_mul(self.kernel[axis].checked_sub(1)?)?.checked_add(1)?;
            let padded = n.checked_add(self.pads[axis])?.checked_add(self.pads[axis + 2])?;
            Some(padded.checked_sub(reach)? / self.strides[axis].max(1) + 1)
        };
        Some([extent(0)?, extent(1)?])
    }

    /// Where, on `axis`, the window at output position `at` reads with its `tap`; `None` before the start.
    #[inline(always)]
    fn reads(&self, axis: usize, at: usize, tap: usize) -> Option<usize> {
        (at * self.strides[axis] + tap * self.dilations[axis]).checked_sub(self.pads[axis])
    }

    /// Of the output positions of `grid` on `axis`, those that read inside a line of `extent` with `tap`.
    fn span(&self, axis: usize, tap: usize, grid: Grid, extent: usize) -> Span {
        let across = grid.count;
        let stride = grid.step * self.strides[axis];
        let offset = tap * self.dilations[axis] + grid.first * self.strides[axis];
        let from = self.pads[axis].saturating_sub(offset).div_ceil(stride.max(1));
        let first = (from * stride + offset).saturating_sub(self.pads[axis]);
        let inside = extent.saturating_sub(first).div_ceil(stride.max(1));
        Span { from: from.min(across), to: (from + inside).min(across), first, stride: stride.max(1) }
    }

    /// Every so-manieth output position is taken, along both axes: enough rows to know `columns` columns, no more.
    fn thinning(self, outputs: [usize; 2], columns: usize) -> usize {
        let wanted = self.thinned_for.unwrap_or(columns).clamp(25, 784);
        let mut step = 1;
        while Grid::over(outputs[0], step + 1).count * Grid::over(outputs[1], step + 1).count >= wanted {
            step += 1;
        }
        step
    }
}

/// Every `step`-th position of a line. The first is half a step in, so that the border, where windows read padding, is taken about
/// as often as it is there.
#[derive(Clone, Copy, Debug)]
struct Grid {
    first: usize,
    step: usize,
    count: usize,
}

impl Grid {
    fn over(extent: usize, step: usize) -> Self {
        let first = (step - 1) / 2;
        Self { first, step, count: extent.saturating_sub(first).div_ceil(step) }
    }

    fn positions(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |at| self.first + at * self.step)
    }
}

impl Rows {
    /// The length of a row for a tensor of so many `channels`; `None` where they cannot be cut.
    pub fn columns(self, channels: usize) -> Option<usize> {
        match self {
            Self::Last => Some(channels),
            Self::Windows(w) => {
                (w.groups > 0 && channels.is_multiple_of(w.groups)).then(|| channels / w.groups)?.checked_mul(w.taps())
            }
        }
        .filter(|&n| n > 0)
    }

    /// How rows are cut out of a tensor like the result of the node whose input, of so many `channels`, is cut by `self`, so that
    /// rows belong together; `None` for grouped convolutions.
    pub fn of_outputs(self, channels: usize) -> Option<Self> {
        match self {
            Self::Last => Some(Self::Last),
            Self::Windows(w) if w.groups == 1 => Some(Self::Windows(Window {
                kernel: [1, 1],
                strides: [1, 1],
                dilations: [1, 1],
                pads: [0; 4],
                groups: 1,
                thinned_for: self.columns(channels),
            })),
            Self::Windows(_) => None,
        }
    }

    /// How many kinds of rows there are.
    pub fn groups(self) -> usize {
        match self {
            Self::Last => 1,
            Self::Windows(w) => w.groups,
        }
    }

    /// The axis of the tensor that runs over channels, for a tensor of rank `rank`.
    pub fn channel_axis(self, rank: usize) -> usize {
        match self {
            Self::Last => rank.saturating_sub(1),
            Self::Windows(_) => 1,
        }
    }

    /// The channels of a tensor of `shape`; `None` when no row can be cut from it.
    pub(super) fn channels(self, shape: &[usize]) -> Option<usize> {
        match self {
            Self::Last => shape.last().copied(),
            Self::Windows(w) => ((3..=4).contains(&shape.len()) && w.outputs(shape).is_some()).then(|| shape[1]),
        }
    }

    /// The channel that `column` of `group` reads, of `channels`.
    pub(super) fn channel(self, group: usize, column: usize, channels: usize) -> usize {
        match self {
            Self::Last => column,
            Self::Windows(w) => group * (channels / w.groups) + column / w.taps(),
        }
    }

    /// The rows in a tensor of `shape`, and what they are worth in quarters of an independent one.
    pub(super) fn count(self, shape: &[usize]) -> (u64, u64) {
        match self {
            Self::Last => {
                let rows = shape[..shape.len().saturating_sub(1)].iter().product::<usize>() as u64;
                (rows, if shape.len() > 2 { rows } else { 4 * rows })
            }
            Self::Windows(w) => {
                let outputs = w.outputs(shape).unwrap_or([0, 0]);
                let step = w.thinning(outputs, self.columns(shape[1]).unwrap_or(1));
                let positions = (Grid::over(outputs[0], step).count * Grid::over(outputs[1], step).count) as u64;
                (shape[0] as u64 * positions, 4 * shape[0] as u64 * positions.min(16))
            }
        }
    }

    /// How many rows there are in a tensor of `shape` before any are thinned out.
    pub(crate) fn whole_count(self, shape: &[usize]) -> usize {
        match self {
            Self::Last => shape[..shape.len().saturating_sub(1)].iter().product(),
            Self::Windows(w) => shape[0] * w.outputs(shape).map_or(0, |[height, width]| height * width),
        }
    }

    /// Hands the rows of `group` to `take`, a strip at a time, each value as a whole multiple of its channel's unit; times what `roots`
    /// says of each of [`Self::whole_count`] rows, from 0 to 1.
    pub(super) fn strips(
        self,
        (values, shape, roots): (&[f32], &[usize], Option<&[f32]>),
        group: usize,
        inverse_units: &[f64],
        mut take: impl FnMut(&Strip<'_>),
    ) {
        match self {
            Self::Last => {
                let d = inverse_units.len();
                let mut strip = vec![0.0; STRIP_ROWS.min(values.len() / d.max(1)) * d];
                for (at, block) in values.chunks(STRIP_ROWS * d).enumerate() {
                    let rows = block.len() / d;
                    strip.truncate(rows * d);
                    by_column(block, inverse_units, &mut strip);
                    let roots = roots.map(|roots| roots.iter().skip(at * STRIP_ROWS).take(rows).copied());
                    let roots = roots.map(|roots| weigh(&mut strip, roots)).unwrap_or_default();
                    take(&Strip { values: &strip, rows, roots: &roots });
                }
            }
            Self::Windows(w) => windows(w, (values, shape, roots), group, inverse_units, take),
        }
    }
}

/// The rows of `block` column after column, in whole multiples of units.
fn by_column(block: &[f32], inverse_units: &[f64], strip: &mut [f32]) {
    /// So many columns are read along a row at a time: a line of the cache.
    const ACROSS: usize = 16;
    let d = inverse_units.len();
    let rows = block.len() / d.max(1);
    vectorized(
        #[inline(always)]
        || {
            let bands = strip.chunks_mut((ACROSS * rows).max(1)).zip(inverse_units.chunks(ACROSS));
            for (number, (band, units)) in bands.enumerate() {
                let mut inverse = [0.0; ACROSS];
                inverse[..units.len()].copy_from_slice(units);
                for (row, values) in block.chunks_exact(d).enumerate() {
                    let values = &values[number * ACROSS..];
                    let mut wholes = [0.0; ACROSS];
                    wholes.iter_mut().zip(values).for_each(|(whole, v)| *whole = *v);
                    wholes.iter_mut().zip(&inverse).for_each(|(v, unit)| *v = whole(*v, *unit));
                    let into = band.iter_mut().skip(row).step_by(rows);
                    into.zip(wholes).for_each(|(into, whole)| *into = whole);
                }
            }
        },
    );
}

/// The windows of `group`, strip by strip.
fn windows(
    w: Window,
    (values, shape, roots): (&[f32], &[usize], Option<&[f32]>),
    group: usize,
    inverse_units: &[f64],
    mut take: impl FnMut(&Strip<'_>),
) {
    let Some(outputs) = w.outputs(shape) else { return };
    let (height, width) = (shape[2], shape.get(3).copied().unwrap_or(1));
    let per_group = shape[1] / w.groups;
    let step = w.thinning(outputs, per_group * w.taps());
    let grid = Grid::over(outputs[1], step);
    let across = grid.count;
    let lines: Vec<usize> = Grid::over(outputs[0], step).positions().collect();
    let mut strip: Vec<f32> = Vec::new();
    for (number, image) in values.chunks_exact((shape[1] * height * width).max(1)).enumerate() {
        let row_of = |line: usize, column: usize| (number * outputs[0] + line) * outputs[1] + column;
        for lines in lines.chunks((STRIP_ROWS / across.max(1)).max(1)) {
            strip.clear();
            for channel in group * per_group..(group + 1) * per_group {
                let plane = &image[channel * height * width..(channel + 1) * height * width];
                let unit = inverse_units[channel];
                for tap in 0..w.taps() {
                    let span = w.span(1, tap % w.kernel[1], grid, width);
                    for &line in lines {
                        let y = w.reads(0, line, tap / w.kernel[1]).filter(|&y| y < height);
                        let row = y.map_or(&[][..], |y| &plane[y * width..(y + 1) * width]);
                        push_line(&mut strip, row, across, &span, unit);
                    }
                }
            }
            let rows = || lines.iter().flat_map(|line| grid.positions().map(|column| row_of(*line, column)));
            let roots = roots.map(|roots| weigh(&mut strip, rows().map(|row| roots[row]))).unwrap_or_default();
            take(&Strip { values: &strip, rows: lines.len() * across, roots: &roots });
        }
    }
}

/// Which of the output positions of a line read inside of it, where the first of them reads, and how far the next ones.
struct Span {
    from: usize,
    to: usize,
    first: usize,
    stride: usize,
}

/// What `across` windows read of `row`: zeros outside of it, or for an empty row.
#[inline(always)]
fn push_line(strip: &mut Vec<f32>, row: &[f32], across: usize, span: &Span, unit: f64) {
    let end = strip.len() + across;
    if !row.is_empty() && span.from < span.to {
        strip.extend(std::iter::repeat_n(0.0, span.from));
        let read = row[span.first..].iter().step_by(span.stride).take(span.to - span.from);
        strip.extend(read.map(|&v| whole(v, unit)));
    }
    strip.resize(end, 0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn windows_read_zeros_outside() {
        let w = Window {
            kernel: [3, 1],
            strides: [1, 1],
            dilations: [1, 1],
            pads: [1, 0, 1, 0],
            groups: 1,
            thinned_for: None,
        };
        let mut rows = Vec::new();
        Rows::Windows(w).strips((&[1.0, 2.0, 3.0], &[1, 1, 3], None), 0, &[1.0], |strip| {
            rows.extend_from_slice(strip.values);
        });
        // Column after column: what the first, the second and the third tap read.
        assert_eq!(rows, [0.0, 1.0, 2.0, 1.0, 2.0, 3.0, 2.0, 3.0, 0.0]);
    }

    #[test]
    fn large_maps_are_thinned_and_small_ones_are_not() {
        let w =
            Window { kernel: [1, 1], strides: [1, 1], dilations: [1, 1], pads: [0; 4], groups: 1, thinned_for: None };
        assert_eq!(w.thinning([7, 7], 1152), 1);
        assert!(w.thinning([112, 112], 27) > 10);
        let step = w.thinning([112, 112], 27);
        assert!(Grid::over(112, step).count.pow(2) >= 27);
        let positions: Vec<usize> = Grid::over(10, 3).positions().collect();
        assert_eq!(positions, [1, 4, 7]);
    }

    /// A root of a weight.
    fn root(at: u64) -> f32 {
        (mixed(at) % 100_001) as f32 / 100_000.0
    }

    /// A convolution, the shape of a tensor, and small whole numbers for it.
    fn drawn(seed: u64) -> (Window, Vec<usize>, Vec<f32>) {
        let below = |at: u64, n: u64| usize::try_from(mixed(seed << 32 | at) % n).unwrap();
        let two = |at: u64, n: u64| [1 + below(at, n), 1 + below(at + 1, n)];
        // Some maps are so large that they are cut into several strips.
        let large = seed.is_multiple_of(20);
        let groups = 1 + below(0, 3);
        let w = Window {
            kernel: two(1, 3),
            strides: if large { [1, 1] } else { two(3, 2) },
            dilations: two(5, 2),
            pads: [7, 8, 9, 10].map(|at| below(at, 3)),
            groups,
            thinned_for: if large { Some(5000) } else { [None, Some(1), Some(5000)][below(11, 3)] },
        };
        let extent = |at: u64| if large { 40 } else { 1 + below(at, 9) };
        let mut shape = vec![1 + below(12, 2), groups * (1 + below(13, 2)), extent(14), extent(15)];
        if shape[3] == 1 {
            shape.pop();
        }
        let n: usize = shape.iter().product();
        let values = (0..n as u64).map(|i| below(100 + i, 41) as f32 - 20.0).collect();
        (w, shape, values)
    }

    /// The rows of `group`, with their numbers before any are thinned out.
    fn by_definition(w: Window, shape: &[usize], values: &[f32], group: usize) -> Vec<(usize, Vec<f32>)> {
        let (height, width) = (shape[2], shape.get(3).copied().unwrap_or(1));
        let per_group = shape[1] / w.groups;
        let outputs = w.outputs(shape).unwrap();
        let step = w.thinning(outputs, per_group * w.taps());
        let positions = |axis: usize| ((step - 1) / 2..outputs[axis]).step_by(step);
        let inside = |axis: usize, at: usize, tap: usize, extent: usize| {
            (at * w.strides[axis] + tap * w.dilations[axis]).checked_sub(w.pads[axis]).filter(|&i| i < extent)
        };
        let mut rows = Vec::new();
        for image in 0..shape[0] {
            for line in positions(0) {
                for column in positions(1) {
                    let mut row = Vec::new();
                    for channel in group * per_group..(group + 1) * per_group {
                        for tap in 0..w.taps() {
                            let y = inside(0, line, tap / w.kernel[1], height);
                            let x = inside(1, column, tap % w.kernel[1], width);
                            let plane = (image * shape[1] + channel) * height;
                            row.push(y.zip(x).map_or(0.0, |(y, x)| values[(plane + y) * width + x]));
                        }
                    }
                    rows.push(((image * outputs[0] + line) * outputs[1] + column, row));
                }
            }
        }
        rows
    }

    /// The rows that are handed on, in units of 1, and the roots that they were multiplied with.
    fn handed(
        rows: Rows,
        (values, shape, roots): (&[f32], &[usize], Option<&[f32]>),
        group: usize,
    ) -> Vec<(Vec<f32>, Option<f32>)> {
        let mut all = Vec::new();
        let units = vec![1.0; rows.channels(shape).unwrap()];
        rows.strips((values, shape, roots), group, &units, |strip| {
            for row in 0..strip.rows {
                let values = strip.values.iter().skip(row).step_by(strip.rows).copied().collect();
                all.push((values, strip.roots.get(row).copied()));
            }
        });
        all
    }

    #[test]
    fn windows_are_cut_as_by_definition() {
        let mut cut = 0;
        for seed in 0..200 {
            let (w, shape, values) = drawn(seed);
            let rows = Rows::Windows(w);
            if rows.channels(&shape).is_none() {
                continue;
            }
            cut += 1;
            let roots: Vec<f32> = (0..rows.whole_count(&shape) as u64).map(|at| root(seed << 32 | at)).collect();
            for group in 0..w.groups {
                let want = by_definition(w, &shape, &values, group);
                assert_eq!(want.len() as u64, rows.count(&shape).0, "{seed}: {w:?} {shape:?}");
                let plain = handed(rows, (&values, &shape, None), group);
                assert!(
                    plain.iter().map(|(row, _)| row).eq(want.iter().map(|(_, row)| row)),
                    "{seed}: {w:?} {shape:?}"
                );
                let of_root = |(number, row): &(usize, Vec<f32>)| {
                    let root = (roots[*number] * 32768.0).round_ties_even();
                    let row: Vec<f32> = row.iter().map(|v| (v * root / 32768.0).round_ties_even()).collect();
                    (row, Some(root))
                };
                let want: Vec<(Vec<f32>, Option<f32>)> = want.iter().map(of_root).collect();
                assert_eq!(handed(rows, (&values, &shape, Some(&roots)), group), want, "{seed}: {w:?} {shape:?}");
            }
        }
        assert!(cut > 100, "{cut}");
    }

    #[test]
    fn rows_along_the_last_axis_keep_their_order_over_strips() {
        let shape = [45, 50, 3];
        let values: Vec<f32> = (0..6750).map(|i| (mixed(i) % 41) as f32 - 20.0).collect();
        let roots: Vec<f32> = (0..2250).map(root).collect();
        let all = handed(Rows::Last, (&values, &shape, Some(&roots)), 0);
        assert_eq!((all.len() as u64, all.len()), (Rows::Last.count(&shape).0, Rows::Last.whole_count(&shape)));
        for ((row, got), root) in values.chunks(3).zip(&all).zip(&roots) {
            let root = (*root * 32768.0).round_ties_even();
            let want: Vec<f32> = row.iter().map(|v| (v * root / 32768.0).round_ties_even()).collect();
            assert_eq!(*got, (want, Some(root)));
        }
    }
}
