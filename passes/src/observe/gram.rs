//! Gram matrices of what linear nodes read: Σ x xᵀ over rows.
//!
//! The squared error that rounding a weight W to Ŵ makes in the output of its node is, per output row,
//! (Ŵ − W) H (Ŵ − W)ᵀ with H = E\[x xᵀ\]; so one matrix per tensor serves every method that rounds by data, for every node
//! that reads the tensor in the same way.
//!
//! Sums do not depend on the order of samples. Every column is rounded to 15-bit whole multiples of a power of two that
//! its peak sets; products are below 2³⁰, so an f64 holds the exact sum of 2²³ rows. Rounding a column costs a relative
//! 2⁻¹⁵ of its peak, far below what any use of H can tell. Where there are many columns, the rows of one strip (at most
//! 1,024 of one sample) are added up in f32, at twice the rate: whole numbers all the same, so that strips add up exactly.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::rows::{ROOT, Rows, Strip};
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
    weights: Weights,
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
            weights: Weights::default(),
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
        self.see_weighed(values, shape, None);
    }

    /// The same with the root of what each row weighs, from 0 to 1, before any are thinned out; left out where there are not as many roots.
    pub fn see_weighed(&mut self, values: &[f32], shape: &[usize], roots: Option<&[f32]>) {
        if self.rows.channels(shape) != Some(self.units.len()) || self.rows.count(shape).0 > self.share {
            return;
        }
        if roots.is_some_and(|roots| roots.len() != self.rows.whole_count(shape)) {
            return;
        }
        let d = self.columns;
        for group in 0..self.rows.groups() {
            let products = &mut self.products[group * d * d..(group + 1) * d * d];
            let sums = &mut self.sums[group * d..(group + 1) * d];
            let weights = &mut self.weights;
            self.rows.strips((values, shape, roots), group, &self.inverse_units, |strip: &Strip<'_>| {
                if group == 0 {
                    weights.see(strip);
                }
                for (sum, column) in sums.iter_mut().zip(strip.values.chunks_exact(strip.rows.max(1))) {
                    *sum += column_sum(column, strip);
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
        self.weights.merge(&other.weights);
    }

    /// The moments; `None` when nothing was seen.
    #[expect(clippy::cast_possible_truncation, reason = "moments are used as f32")]
    pub fn finish(&self) -> Option<Gram> {
        if self.count == 0 {
            return None;
        }
        let (d, n) = (self.columns, self.weights.sum());
        if n <= 0.0 {
            return None;
        }
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
        Some(Gram {
            columns: d,
            moments,
            means,
            count: self.count,
            effective: self.quarters as f64 / 4.0 * self.weights.evenness(self.count),
        })
    }
}

/// What rows weigh in all: exact sums.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weights {
    /// Σ w.
    sum: f64,
    /// Σ w², w rounded to whole multiples of a [`ROOT`].
    squares: f64,
}

impl Weights {
    pub(super) fn see(&mut self, strip: &Strip<'_>) {
        if strip.roots.is_empty() {
            self.sum += strip.rows as f64;
            self.squares += strip.rows as f64;
            return;
        }
        let unit = f64::from(ROOT);
        let roots = || strip.roots.iter().map(|root| f64::from(*root));
        self.sum += roots().map(|root| root * root).sum::<f64>() * unit * unit;
        let weights = roots().map(|root| (root * root * unit).round_ties_even());
        self.squares += weights.map(|w| w * w).sum::<f64>() * unit * unit;
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.squares += other.squares;
    }

    pub(super) fn sum(&self) -> f64 {
        self.sum
    }

    /// (Σ w)² / n Σ w²: 1 where all rows weigh the same, less where few of them count.
    fn evenness(&self, rows: u64) -> f64 {
        (self.sum * self.sum / (self.squares.max(f64::MIN_POSITIVE) * rows.max(1) as f64)).min(1.0)
    }
}

/// The sum of a column of `strip`, in its unit: weighed once more where rows are, since they are multiplied with roots.
pub(super) fn column_sum(column: &[f32], strip: &Strip<'_>) -> f64 {
    let column = column.iter().map(|v| f64::from(*v));
    if strip.roots.is_empty() {
        return column.sum();
    }
    column.zip(strip.roots).map(|(v, root)| v * f64::from(*root)).sum::<f64>() * f64::from(ROOT)
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
    panels(
        strip.values,
        strip.values,
        strip.rows,
        |first| first,
        |column, from, sums| {
            // What lies above the diagonal is not read.
            let into = &mut products[column * d + from..(column + 1) * d];
            into.iter_mut().zip(sums).for_each(|(into, sum)| *into += f64::from(*sum));
        },
    );
}

/// Shows the columns of `AᵀB`, each with its number and the row that it begins at, for a and b of `rows` rows, column after column. Of columns
/// from the `first` of a panel on only the rows from `from(first)` on are computed, and shown.
pub(super) fn panels(
    a: &[f32],
    b: &[f32],
    rows: usize,
    from: impl Fn(usize) -> usize,
    mut show: impl FnMut(usize, usize, &[f32]),
) {
    /// Columns of a panel: few enough that it stays in the cache, many enough for the product to be fast.
    const ACROSS: usize = 128;
    let (m, d) = (a.len() / rows.max(1), b.len() / rows.max(1));
    let mut panel = vec![0.0_f32; m * ACROSS.min(d)];
    for first in (0..d).step_by(ACROSS) {
        let (from, across) = (from(first), ACROSS.min(d - first));
        let height = m - from;
        let left = MatRef::from_column_major_slice(&a[from * rows..], rows, height);
        let right = MatRef::from_column_major_slice(&b[first * rows..(first + across) * rows], rows, across);
        let into = MatMut::from_column_major_slice_mut(&mut panel[..height * across], height, across);
        matmul(into, Accum::Replace, left.transpose(), right, 1.0, Par::Seq);
        for (at, sums) in panel[..height * across].chunks_exact(height).enumerate() {
            show(first + at, from, sums);
        }
    }
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
pub(super) fn product(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0_f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += f64::from(x[lane]) * f64::from(y[lane]);
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
    use crate::seed::mixed;

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

    /// Numbers from -1 to 1.
    fn drawn(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| (mixed(seed << 32 | i) % 20_001) as f32 / 10_000.0 - 1.0).collect()
    }

    /// Roots of weights, whole multiples of 1 / `most`.
    fn drawn_roots(seed: u64, n: usize, most: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (mixed(seed << 48 | i) % (most + 1)) as f32 / most as f32).collect()
    }

    /// Rows and the shape of one sample, with few columns and with many; none are thinned out.
    fn cases() -> [(Rows, Vec<usize>); 5] {
        let w = Window {
            kernel: [3, 2],
            strides: [1, 2],
            dilations: [1, 1],
            pads: [1, 0, 1, 1],
            groups: 2,
            thinned_for: None,
        };
        [
            (Rows::Last, vec![30, 3]),
            (Rows::Last, vec![50, 40]),
            (Rows::Last, vec![30, 300]),
            (Rows::Windows(w), vec![1, 4, 5, 3]),
            (Rows::Windows(Window { groups: 1, ..w }), vec![1, 6, 5, 3]),
        ]
    }

    fn sums(rows: Rows, shape: &[usize]) -> GramSums {
        GramSums::new(rows, &vec![1.0; rows.channels(shape).unwrap()], 10).unwrap()
    }

    /// Σ w x xᵀ / Σ w over the rows of one sample.
    fn by_definition(rows: Rows, (x, shape): (&[f32], &[usize]), roots: &[f32], group: usize) -> Vec<f64> {
        let channels = rows.channels(shape).unwrap();
        let d = rows.columns(channels).unwrap();
        let weights: Vec<f64> = roots.iter().map(|root| f64::from(*root).powi(2)).collect();
        let mut moments = vec![0.0; d * d];
        rows.strips((x, shape, None), group, &vec![16384.0; channels], |strip| {
            assert_eq!(strip.rows, roots.len());
            for (at, moment) in moments.iter_mut().enumerate() {
                let (a, b) = (&strip.values[at / d * strip.rows..], &strip.values[at % d * strip.rows..]);
                *moment =
                    weights.iter().zip(a).zip(b).map(|((w, a), b)| w * f64::from(*a) * f64::from(*b)).sum::<f64>();
            }
        });
        let scale = 16384.0_f64.powi(2) * weights.iter().sum::<f64>();
        moments.iter().map(|moment| moment / scale).collect()
    }

    #[test]
    fn roots_of_one_change_no_bit() {
        for (rows, shape) in cases() {
            let x = drawn(1, shape.iter().product());
            let (mut plain, mut weighed) = (sums(rows, &shape), sums(rows, &shape));
            plain.see(&x, &shape);
            weighed.see_weighed(&x, &shape, Some(&vec![1.0; rows.whole_count(&shape)]));
            assert_eq!(plain.finish(), weighed.finish(), "{rows:?}");
        }
    }

    #[test]
    fn weighed_moments_are_those_by_definition() {
        // What 0 and 1 are multiplied with stays whole; other products round in units of which a peak has 2¹⁴.
        for (most, near) in [(1, 1e-6), (1000, 1.0 / 4096.0)] {
            for (rows, shape) in cases() {
                let x = drawn(2, shape.iter().product());
                let roots = drawn_roots(3, rows.whole_count(&shape), most);
                let mut sums = sums(rows, &shape);
                sums.see_weighed(&x, &shape, Some(&roots));
                let gram = sums.finish().unwrap();
                for group in 0..rows.groups() {
                    let want = by_definition(rows, (&x, &shape), &roots, group);
                    let errors = want.iter().zip(gram.group(group)).map(|(want, got)| (want - f64::from(*got)).abs());
                    let worst = errors.fold(0.0, f64::max);
                    assert!(worst < near, "{rows:?} {shape:?}: {worst}");
                }
            }
        }
    }

    #[test]
    fn rows_of_no_weight_do_not_count() {
        for columns in [3, 40, 300] {
            let shape = [60, columns];
            let (x, roots) = (drawn(4, 60 * columns), drawn_roots(5, 60, 1));
            let kept = x.chunks(columns).zip(&roots).filter(|(_, root)| **root > 0.0);
            let kept: Vec<f32> = kept.flat_map(|(row, _)| row.to_vec()).collect();
            let (mut all, mut alone) = (sums(Rows::Last, &shape), sums(Rows::Last, &shape));
            all.see_weighed(&x, &shape, Some(&roots));
            alone.see(&kept, &[kept.len() / columns, columns]);
            let (all, alone) = (all.finish().unwrap(), alone.finish().unwrap());
            assert_eq!((&all.moments, &all.means), (&alone.moments, &alone.means));
            assert!((all.effective - alone.effective).abs() < 1e-9, "{} {}", all.effective, alone.effective);
        }
    }

    #[test]
    fn samples_of_no_weight_do_not_count() {
        for (rows, shape) in cases() {
            let (mut all, mut alone) = (sums(rows, &shape), sums(rows, &shape));
            for sample in 0..6 {
                let x = drawn(sample, shape.iter().product());
                let root = if sample % 3 == 1 { 1.0 } else { 0.0 };
                all.see_weighed(&x, &shape, Some(&vec![root; rows.whole_count(&shape)]));
                if sample % 3 == 1 {
                    alone.see(&x, &shape);
                }
            }
            let (all, alone) = (all.finish().unwrap(), alone.finish().unwrap());
            assert_eq!((&all.moments, &all.means), (&alone.moments, &alone.means), "{rows:?}");
            assert!((all.effective - alone.effective).abs() < 1e-9, "{} {}", all.effective, alone.effective);
        }
    }

    #[test]
    fn equal_weights_change_little_and_uneven_ones_are_worth_fewer_rows() {
        for (rows, shape) in cases() {
            let (x, n) = (drawn(6, shape.iter().product()), rows.whole_count(&shape));
            let with = |roots: &[f32]| {
                let mut sums = sums(rows, &shape);
                sums.see_weighed(&x, &shape, Some(roots));
                sums.finish().unwrap()
            };
            let (plain, half) = (with(&vec![1.0; n]), with(&vec![0.5; n]));
            for (plain, half) in [(&plain.moments, &half.moments), (&plain.means, &half.means)] {
                let worst = plain.iter().zip(half).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1.0 / 4096.0, "{rows:?}: {worst}");
            }
            assert!((half.effective / plain.effective - 1.0).abs() < 1e-6, "{} {}", half.effective, plain.effective);
            let uneven: Vec<f32> = (0..n).map(|i| if i.is_multiple_of(2) { 1.0 } else { 0.1 }).collect();
            assert!(with(&uneven).effective < 0.6 * plain.effective, "{rows:?}");
        }
    }

    #[test]
    fn weighed_samples_in_any_order_give_the_same_bits() {
        for (rows, shape) in cases() {
            let see = |order: &[u64], size: usize| {
                let mut all = sums(rows, &shape);
                for samples in order.chunks(size) {
                    let mut part = sums(rows, &shape);
                    for &sample in samples {
                        let roots = drawn_roots(sample, rows.whole_count(&shape), 1000);
                        part.see_weighed(&drawn(sample, shape.iter().product()), &shape, Some(&roots));
                    }
                    all.merge(&part);
                }
                all.finish()
            };
            let mut order: Vec<u64> = (0..8).collect();
            let want = see(&order, 8);
            for seed in 0..5_u64 {
                order.sort_by_key(|at| mixed(seed << 8 | *at));
                assert_eq!(see(&order, 1 + order.len() / 3), want, "{rows:?} {order:?}");
            }
        }
    }

    /// No direction has less than no power.
    #[test]
    fn moments_are_positive_semidefinite() {
        for (rows, shape) in cases() {
            let mut sums = sums(rows, &shape);
            let roots = drawn_roots(7, rows.whole_count(&shape), 1000);
            sums.see_weighed(&drawn(7, shape.iter().product()), &shape, Some(&roots));
            let gram = sums.finish().unwrap();
            let d = gram.columns;
            for group in 0..rows.groups() {
                let h = gram.group(group);
                let top = (0..d).map(|i| f64::from(h[i * d + i])).fold(0.0, f64::max);
                for seed in 0..20 {
                    let v: Vec<f64> = drawn(100 + seed, d).into_iter().map(f64::from).collect();
                    let terms = h.iter().enumerate().map(|(at, h)| v[at / d] * f64::from(*h) * v[at % d]);
                    let power: f64 = terms.sum();
                    let length: f64 = v.iter().map(|v| v * v).sum();
                    assert!(power >= -1e-6 * top * length, "{rows:?}: {power}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_counts_as_zero() {
        for (rows, shape) in cases() {
            let x = drawn(8, shape.iter().product());
            let broken = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            let at = |i: usize, v: f32, other: f32| if i % 4 == 1 { other } else { v };
            let clean: Vec<f32> = x.iter().enumerate().map(|(i, &v)| at(i, v, 0.0)).collect();
            let dirty: Vec<f32> = x.iter().enumerate().map(|(i, &v)| at(i, v, broken[i % 3])).collect();
            let (mut a, mut b) = (sums(rows, &shape), sums(rows, &shape));
            a.see(&clean, &shape);
            b.see(&dirty, &shape);
            assert_eq!(a.finish(), b.finish(), "{rows:?}");
        }
    }

    #[test]
    fn nothing_seen_is_nothing_told() {
        for (rows, shape) in cases() {
            let n: usize = shape.iter().product();
            let mut sums = sums(rows, &shape);
            assert_eq!(sums.finish(), None);
            // Of another shape, and with a root too few.
            sums.see(&vec![1.0; n * 7], &[&shape[..], &[7]].concat());
            sums.see_weighed(&vec![1.0; n], &shape, Some(&vec![1.0; rows.whole_count(&shape) - 1]));
            assert_eq!(sums.finish(), None, "{rows:?}");
            sums.see_weighed(&vec![1.0; n], &shape, Some(&vec![0.0; rows.whole_count(&shape)]));
            assert_eq!(sums.finish(), None, "{rows:?}: rows that weigh nothing");
        }
    }
}
