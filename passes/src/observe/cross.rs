//! Mixed second moments of two tensors whose rows belong together: Σ a bᵀ, exactly.
//!
//! The rows are those of [`super::Gram`], in the same whole multiples of a unit per channel, so that sums are exact and do not
//! depend on the order of samples.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::gram::{FEW_COLUMNS, product, share_of, unit};
use super::rows::{Rows, Strip};

/// One side: how its rows are cut, and in which units.
#[derive(Debug)]
struct Side {
    rows: Rows,
    units: Vec<f64>,
    inverse_units: Vec<f64>,
    columns: usize,
}

impl Side {
    fn new(rows: Rows, peaks: &[f32]) -> Option<Self> {
        let units: Vec<f64> = peaks.iter().map(|&peak| unit(peak)).collect();
        let inverse_units = units.iter().map(|u| 1.0 / u).collect();
        Some(Self { rows, columns: rows.columns(peaks.len())?, units, inverse_units })
    }

    fn fits(&self, shape: &[usize]) -> bool {
        self.rows.channels(shape) == Some(self.units.len())
    }

    fn unit(&self, group: usize, column: usize) -> f64 {
        self.units[self.rows.channel(group, column, self.units.len())]
    }
}

/// Mixed moments in the making: one matrix per group of columns.
#[derive(Debug)]
pub struct CrossSums {
    left: Side,
    right: Side,
    /// Per group a left × right matrix, column-major.
    products: Vec<f64>,
    /// Sums of the left columns, group after group.
    sums: Vec<f64>,
    count: u64,
    share: u64,
}

/// E\[a bᵀ\] and E\[a\].
#[derive(Clone, Debug)]
pub struct Cross {
    /// Columns of a per group.
    pub left: usize,
    /// Columns of b per group.
    pub right: usize,
    /// Group after group, left × right matrices, row-major.
    pub moments: Vec<f64>,
    /// Group after group, the means of the left columns.
    pub means: Vec<f64>,
}

impl CrossSums {
    /// No rows yet, for tensors cut by `left` and `right` whose channels reach the given peaks, over so many `samples`; `None`
    /// where rows cannot be cut, or in another number of groups.
    pub fn new(left: (Rows, &[f32]), right: (Rows, &[f32]), samples: usize) -> Option<Self> {
        let groups = right.0.groups();
        if left.0.groups() != groups {
            return None;
        }
        let (left, right) = (Side::new(left.0, left.1)?, Side::new(right.0, right.1)?);
        let products = vec![0.0; groups.checked_mul(left.columns.checked_mul(right.columns)?)?];
        let sums = vec![0.0; groups * left.columns];
        Some(Self { left, right, products, sums, count: 0, share: share_of(samples) })
    }

    /// The bytes that sums for so many channels on both sides take.
    pub fn bytes(left: (Rows, usize), right: (Rows, usize)) -> Option<u64> {
        Some(8 * left.0.columns(left.1)? as u64 * right.0.columns(right.1)? as u64 * right.0.groups() as u64)
    }

    /// Adds the rows of one sample; tensors of other shapes, or whose rows do not match, are left out.
    pub fn see(&mut self, left: (&[f32], &[usize]), right: (&[f32], &[usize])) {
        let counts = (self.left.rows.count(left.1).0, self.right.rows.count(right.1).0);
        if !self.left.fits(left.1) || !self.right.fits(right.1) || counts.0 != counts.1 || counts.1 > self.share {
            return;
        }
        let (m, d) = (self.left.columns, self.right.columns);
        for group in 0..self.right.rows.groups() {
            let mut strips: Vec<(usize, Vec<f64>)> = Vec::new();
            let keep = |strip: &Strip<'_>| strips.push((strip.rows, strip.values.to_vec()));
            self.left.rows.strips(left.0, left.1, group, &self.left.inverse_units, keep);
            let products = &mut self.products[group * m * d..(group + 1) * m * d];
            let sums = &mut self.sums[group * m..(group + 1) * m];
            let mut strips = strips.iter();
            self.right.rows.strips(right.0, right.1, group, &self.right.inverse_units, |b| {
                if let Some((rows, a)) = strips.next().filter(|(rows, _)| *rows == b.rows) {
                    sums.iter_mut().zip(a.chunks_exact((*rows).max(1))).for_each(|(s, c)| *s += c.iter().sum::<f64>());
                    add(products, a, b, m, d);
                }
            });
        }
        self.count += counts.1;
    }

    /// Adds what `other`, made alike, saw.
    pub fn merge(&mut self, other: &Self) {
        self.products.iter_mut().zip(&other.products).for_each(|(mine, theirs)| *mine += theirs);
        self.sums.iter_mut().zip(&other.sums).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
    }

    /// The moments; `None` when nothing was seen.
    pub fn finish(&self) -> Option<Cross> {
        if self.count == 0 {
            return None;
        }
        let (m, d, n) = (self.left.columns, self.right.columns, self.count as f64);
        let mut moments = Vec::with_capacity(self.products.len());
        let mut means = Vec::with_capacity(self.sums.len());
        for group in 0..self.right.rows.groups() {
            let base = group * m * d;
            for i in 0..m {
                let unit = self.left.unit(group, i);
                moments.extend((0..d).map(|j| self.products[base + j * m + i] * unit * self.right.unit(group, j) / n));
                means.push(self.sums[group * m + i] * unit / n);
            }
        }
        Some(Cross { left: m, right: d, moments, means })
    }
}

/// Adds `aᵀ b` for strips of as many rows.
fn add(products: &mut [f64], a: &[f64], b: &Strip<'_>, m: usize, d: usize) {
    let n = b.rows;
    if m <= FEW_COLUMNS && d <= FEW_COLUMNS {
        for j in 0..d {
            let right = &b.values[j * n..(j + 1) * n];
            for i in 0..m {
                products[j * m + i] += product(&a[i * n..(i + 1) * n], right);
            }
        }
        return;
    }
    let left = MatRef::from_column_major_slice(a, n, m);
    let right = MatRef::from_column_major_slice(b.values, n, d);
    let into = MatMut::from_column_major_slice_mut(products, m, d);
    matmul(into, Accum::Add, left.transpose(), right, 1.0, Par::Seq);
}

impl Cross {
    /// The left × right matrix of one group.
    pub fn group(&self, group: usize) -> &[f64] {
        let size = self.left * self.right;
        &self.moments[group * size..(group + 1) * size]
    }

    /// The means of the left columns of one group.
    pub fn group_means(&self, group: usize) -> &[f64] {
        &self.means[group * self.left..(group + 1) * self.left]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_pairs() {
        let a: Vec<f32> = (0..8).map(|i| i as f32 / 8.0 - 0.4).collect();
        let b: Vec<f32> = (0..12).map(|i| ((i * 5) % 7) as f32 / 7.0).collect();
        let mut sums = CrossSums::new((Rows::Last, &[1.0; 2]), (Rows::Last, &[1.0; 3]), 1).unwrap();
        sums.see((&a, &[2, 2, 2]), (&b, &[2, 2, 3]));
        let cross = sums.finish().unwrap();
        for i in 0..2 {
            for j in 0..3 {
                let want = (0..4).map(|r| a[r * 2 + i] * b[r * 3 + j]).sum::<f32>() / 4.0;
                assert!((cross.moments[i * 3 + j] - f64::from(want)).abs() < 1e-3);
            }
        }
        // (-0.4 - 0.15 + 0.1 + 0.35) / 4 = -0.025
        assert!((cross.means[0] + 0.025).abs() < 1e-3);
    }

    #[test]
    fn rows_that_do_not_match_are_left_out() {
        let mut sums = CrossSums::new((Rows::Last, &[1.0; 2]), (Rows::Last, &[1.0; 3]), 1).unwrap();
        sums.see((&[0.5; 4], &[2, 2]), (&[0.5; 9], &[3, 3]));
        assert!(sums.finish().is_none());
    }
}
