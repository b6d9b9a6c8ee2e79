//! Gram matrices of what linear nodes read: Σ x xᵀ over rows, exactly.
//!
//! The squared error that rounding a weight W to Ŵ makes in the output of its node is, per output row,
//! (Ŵ − W) H (Ŵ − W)ᵀ with H = E\[x xᵀ\]; so one matrix per tensor serves every method that rounds by data, for every node
//! that reads the tensor in the same way.
//!
//! Sums do not depend on the order of their terms. Every column is rounded to 15-bit whole multiples of a power of two that
//! its peak sets; products are below 2³⁰, so an f64 holds the exact sum of 2²³ rows. Rounding a column costs a relative
//! 2⁻¹⁵ of its peak, far below what any use of H can tell.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};

use super::rows::{Rows, Strip};
use crate::simd::vectorized;

/// Whole multiples of a column's unit reach up to 2¹⁵.
const MANTISSA: i32 = 15;

/// So many rows are summed exactly. Every sample has the same share of them, so that what is left out of a large set does not
/// depend on who comes first.
const MAX_ROWS: u64 = 1 << 23;

/// Gram matrices in the making: one per group of columns.
#[derive(Debug)]
pub struct GramSums {
    rows: Rows,
    /// Per channel, 1 / unit.
    inverse_units: Vec<f64>,
    units: Vec<f64>,
    columns: usize,
    /// Lower triangles, one d × d matrix after the other, column-major.
    products: Vec<f64>,
    /// Column sums, group after group.
    sums: Vec<f64>,
    count: u64,
    quarters: u64,
    /// The most rows of one sample.
    share: u64,
}

/// Second moments of what a linear node reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    /// Columns per group: the length of one row of the weight matrix.
    pub columns: usize,
    /// Group after group, E\[x xᵀ\] as full d × d matrices.
    pub moments: Vec<f32>,
    /// Group after group, E\[x\].
    pub means: Vec<f32>,
    /// Rows that were seen.
    pub count: u64,
    /// So many independent rows they are worth: neighbors on a line of text or in a picture tell less than strangers.
    pub effective: f64,
}

impl GramSums {
    /// No rows yet, for a tensor whose channels reach `peaks` over so many `samples`; `None` when `rows` cannot be cut from so many channels.
    pub fn new(rows: Rows, peaks: &[f32], samples: usize) -> Option<Self> {
        let columns = rows.columns(peaks.len())?;
        let groups = rows.groups();
        let units: Vec<f64> = peaks.iter().map(|&peak| unit(peak)).collect();
        Some(Self {
            rows,
            inverse_units: units.iter().map(|u| 1.0 / u).collect(),
            units,
            columns,
            products: vec![0.0; groups.checked_mul(columns.checked_mul(columns)?)?],
            sums: vec![0.0; groups * columns],
            count: 0,
            quarters: 0,
            share: share_of(samples),
        })
    }

    /// The bytes that sums for `rows` of so many `channels` take.
    pub fn bytes(rows: Rows, channels: usize) -> Option<u64> {
        let columns = rows.columns(channels)? as u64;
        Some(8 * columns * columns * rows.groups() as u64)
    }

    /// Adds the rows of one sample's tensor; one of another shape is left out, and so is one with more rows than its share.
    pub fn see(&mut self, values: &[f32], shape: &[usize]) {
        if self.rows.channels(shape) != Some(self.units.len()) || self.rows.count(shape).0 > self.share {
            return;
        }
        let d = self.columns;
        for group in 0..self.rows.groups() {
            let products = &mut self.products[group * d * d..(group + 1) * d * d];
            let sums = &mut self.sums[group * d..(group + 1) * d];
            self.rows.strips(values, shape, group, &self.inverse_units, |strip: &Strip<'_>| {
                for (sum, column) in sums.iter_mut().zip(strip.values.chunks_exact(strip.rows.max(1))) {
                    *sum += column.iter().sum::<f64>();
                }
                if d <= FEW_COLUMNS { add_few(products, strip, d) } else { add_many(products, strip, d) }
            });
        }
        let (rows, quarters) = self.rows.count(shape);
        self.count += rows;
        self.quarters += quarters;
    }

    /// Adds what `other`, made alike, saw.
    pub fn merge(&mut self, other: &Self) {
        self.products.iter_mut().zip(&other.products).for_each(|(mine, theirs)| *mine += theirs);
        self.sums.iter_mut().zip(&other.sums).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.quarters += other.quarters;
    }

    /// The moments; `None` when nothing was seen.
    #[expect(clippy::cast_possible_truncation, reason = "moments are used as f32")]
    pub fn finish(&self) -> Option<Gram> {
        if self.count == 0 {
            return None;
        }
        let (d, n) = (self.columns, self.count as f64);
        let unit = |group: usize, column: usize| self.units[self.rows.channel(group, column, self.units.len())];
        let mut moments = vec![0.0_f32; self.products.len()];
        let mut means = Vec::with_capacity(self.sums.len());
        for group in 0..self.rows.groups() {
            let units: Vec<f64> = (0..d).map(|column| unit(group, column)).collect();
            let base = group * d * d;
            for j in 0..d {
                for i in j..d {
                    let moment = (self.products[base + j * d + i] * units[i] * units[j] / n) as f32;
                    moments[base + i * d + j] = moment;
                    moments[base + j * d + i] = moment;
                }
            }
            means.extend((0..d).map(|column| (self.sums[group * d + column] * units[column] / n) as f32));
        }
        Some(Gram { columns: d, moments, means, count: self.count, effective: self.quarters as f64 / 4.0 })
    }
}

/// The most rows of one of `samples` samples.
pub(super) fn share_of(samples: usize) -> u64 {
    MAX_ROWS / (samples.max(1) as u64)
}

/// The smallest power of two that carries `peak` to at most 2¹⁵; 1 for a channel of zeros.
pub(super) fn unit(peak: f32) -> f64 {
    if peak <= 0.0 {
        return 1.0;
    }
    let bits = f64::from(peak).to_bits();
    let exponent = i32::try_from(bits >> 52 & 0x7ff).unwrap_or(0) - 1023;
    2.0_f64.powi(exponent + 1 - MANTISSA)
}

/// Up to this many columns, calling a matrix product costs more than the product.
pub(super) const FEW_COLUMNS: usize = 32;

/// Adds `XᵀX` to the lower triangle of `products`.
fn add_many(products: &mut [f64], strip: &Strip<'_>, d: usize) {
    let x = MatRef::from_column_major_slice(strip.values, strip.rows, d);
    triangular::matmul(
        MatMut::from_column_major_slice_mut(products, d, d),
        BlockStructure::TriangularLower,
        Accum::Add,
        x.transpose(),
        BlockStructure::Rectangular,
        x,
        BlockStructure::Rectangular,
        1.0,
        Par::Seq,
    );
}

/// The same column pair by column pair.
fn add_few(products: &mut [f64], strip: &Strip<'_>, d: usize) {
    let n = strip.rows;
    vectorized(
        #[inline(always)]
        || {
            for j in 0..d {
                let a = &strip.values[j * n..(j + 1) * n];
                for i in j..d {
                    products[j * d + i] += product(a, &strip.values[i * n..(i + 1) * n]);
                }
            }
        },
    );
}

/// Σ a · b of whole numbers: exact, so in any order.
#[inline(always)]
pub(super) fn product(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0_f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    rest + sums.iter().sum::<f64>()
}

impl Gram {
    /// The d × d matrix of one group.
    pub fn group(&self, group: usize) -> &[f32] {
        let size = self.columns * self.columns;
        &self.moments[group * size..(group + 1) * size]
    }

    /// The column means of one group.
    pub fn group_means(&self, group: usize) -> &[f32] {
        &self.means[group * self.columns..(group + 1) * self.columns]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::rows::Window;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1009) as f32 / 504.0 - 1.0) * (1.0 + (i % 3) as f32)).collect()
    }

    #[test]
    fn moments_are_those_of_the_rows() {
        let x = values(12);
        let peaks: Vec<f32> = (0..3).map(|c| (0..4).map(|r| x[r * 3 + c].abs()).fold(0.0, f32::max)).collect();
        let mut sums = GramSums::new(Rows::Last, &peaks, 1).unwrap();
        sums.see(&x, &[2, 2, 3]);
        let gram = sums.finish().unwrap();
        for i in 0..3 {
            for j in 0..3 {
                let want: f32 = (0..4).map(|r| x[r * 3 + i] * x[r * 3 + j]).sum::<f32>() / 4.0;
                assert!((gram.moments[i * 3 + j] - want).abs() < 1e-3, "{i} {j}");
            }
        }
        assert_eq!((gram.count, gram.columns), (4, 3));
    }

    /// Splitting and shuffling change no bit.
    #[test]
    fn order_and_batching_do_not_matter() {
        let x = values(600);
        let rows = Rows::Windows(Window {
            kernel: [3, 1],
            strides: [1, 1],
            dilations: [1, 1],
            pads: [1, 0, 1, 0],
            groups: 2,
            thinned_for: None,
        });
        let peaks = [3.0_f32; 4];
        let mut whole = GramSums::new(rows, &peaks, 10).unwrap();
        whole.see(&x, &[10, 4, 5, 3]);
        let mut parts = GramSums::new(rows, &peaks, 10).unwrap();
        for index in (0..10).rev() {
            parts.see(&x[index * 60..(index + 1) * 60], &[1, 4, 5, 3]);
        }
        assert!(whole.finish() == parts.finish());
    }

    #[test]
    fn units_reach_the_peak_and_no_further() {
        for peak in [1.0_f32, 0.999, 1.5, 3e-20, 1e30] {
            let steps = f64::from(peak) / unit(peak);
            assert!((16384.0..=32768.0).contains(&steps), "{peak} {steps}");
        }
    }
}
