//! Mixed second moments of two tensors whose rows belong together: Σ a bᵀ.
//!
//! The rows are those of [`super::Gram`], in the same whole multiples of a unit per channel and added up in the same way, so that
//! sums do not depend on the order of samples.

use super::gram::{FEW_COLUMNS, Weights, column_sum, panels, product, share_of, unit};
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
    weights: Weights,
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
        Some(Self { left, right, products, sums, count: 0, weights: Weights::default(), share: share_of(samples) })
    }

    /// The bytes that sums for so many channels on both sides take.
    pub fn bytes(left: (Rows, usize), right: (Rows, usize)) -> Option<u64> {
        Some(8 * left.0.columns(left.1)? as u64 * right.0.columns(right.1)? as u64 * right.0.groups() as u64)
    }

    /// Adds the rows of one sample; tensors of other shapes, or whose rows do not match, are left out.
    pub fn see(&mut self, left: (&[f32], &[usize]), right: (&[f32], &[usize])) {
        self.see_weighed(left, right, None);
    }

    /// The same with the root of what each row weighs, from 0 to 1, before any are thinned out; left out where there are not as many roots.
    pub fn see_weighed(&mut self, left: (&[f32], &[usize]), right: (&[f32], &[usize]), roots: Option<&[f32]>) {
        let whole = |roots: &[f32]| {
            roots.len() == self.left.rows.whole_count(left.1) && roots.len() == self.right.rows.whole_count(right.1)
        };
        let counts = (self.left.rows.count(left.1).0, self.right.rows.count(right.1).0);
        if !self.left.fits(left.1) || !self.right.fits(right.1) || counts.0 != counts.1 || counts.1 > self.share {
            return;
        }
        if roots.is_some_and(|roots| !whole(roots)) {
            return;
        }
        let (m, d) = (self.left.columns, self.right.columns);
        for group in 0..self.right.rows.groups() {
            let mut strips: Vec<(usize, Vec<f32>)> = Vec::new();
            let keep = |strip: &Strip<'_>| strips.push((strip.rows, strip.values.to_vec()));
            self.left.rows.strips((left.0, left.1, roots), group, &self.left.inverse_units, keep);
            let products = &mut self.products[group * m * d..(group + 1) * m * d];
            let sums = &mut self.sums[group * m..(group + 1) * m];
            let mut strips = strips.iter();
            let weights = &mut self.weights;
            self.right.rows.strips((right.0, right.1, roots), group, &self.right.inverse_units, |b| {
                if group == 0 {
                    weights.see(b);
                }
                if let Some((rows, a)) = strips.next().filter(|(rows, _)| *rows == b.rows) {
                    sums.iter_mut().zip(a.chunks_exact((*rows).max(1))).for_each(|(s, c)| *s += column_sum(c, b));
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
        self.weights.merge(&other.weights);
    }

    /// The moments; `None` when nothing was seen.
    pub fn finish(&self) -> Option<Cross> {
        if self.count == 0 || self.weights.sum() <= 0.0 {
            return None;
        }
        let (m, d, n) = (self.left.columns, self.right.columns, self.weights.sum());
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
fn add(products: &mut [f64], a: &[f32], b: &Strip<'_>, m: usize, d: usize) {
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
    panels(
        a,
        b.values,
        n,
        |_| 0,
        |column, _, sums| {
            let into = &mut products[column * m..(column + 1) * m];
            into.iter_mut().zip(sums).for_each(|(into, sum)| *into += f64::from(*sum));
        },
    );
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
    use crate::observe::gram::GramSums;
    use crate::observe::rows::Window;
    use crate::seed::mixed;

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

    /// Numbers from -1 to 1.
    fn drawn(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| (mixed(seed << 32 | i) % 20_001) as f32 / 10_000.0 - 1.0).collect()
    }

    /// Roots of weights, whole multiples of 1 / `most`.
    fn drawn_roots(seed: u64, n: usize, most: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (mixed(seed << 48 | i) % (most + 1)) as f32 / most as f32).collect()
    }

    /// Rows and shapes of two tensors that belong together.
    type Case = [(Rows, Vec<usize>); 2];

    fn cases() -> [Case; 4] {
        let right = Rows::Windows(Window {
            kernel: [3, 2],
            strides: [1, 2],
            dilations: [1, 1],
            pads: [1, 0, 1, 1],
            groups: 1,
            thinned_for: None,
        });
        let left = right.of_outputs(4).unwrap();
        [
            [(Rows::Last, vec![30, 2]), (Rows::Last, vec![30, 3])],
            [(Rows::Last, vec![50, 35]), (Rows::Last, vec![50, 40])],
            [(Rows::Last, vec![30, 20]), (Rows::Last, vec![30, 300])],
            [(left, vec![1, 2, 5, 2]), (right, vec![1, 4, 5, 3])],
        ]
    }

    fn sums(case: &Case) -> CrossSums {
        let [(left, a), (right, b)] = case;
        let peaks = |rows: &Rows, shape: &[usize]| vec![1.0_f32; rows.channels(shape).unwrap()];
        CrossSums::new((*left, &peaks(left, a)), (*right, &peaks(right, b)), 10).unwrap()
    }

    /// Shows `sums` the sample `seed`.
    fn see(sums: &mut CrossSums, case: &Case, seed: u64, roots: Option<&[f32]>) {
        let [(_, left), (_, right)] = case;
        let a = drawn(2 * seed, left.iter().product());
        let b = drawn(2 * seed + 1, right.iter().product());
        sums.see_weighed((&a, left), (&b, right), roots);
    }

    fn told(sums: &CrossSums) -> Option<(Vec<f64>, Vec<f64>)> {
        sums.finish().map(|cross| (cross.moments, cross.means))
    }

    fn rows_of(case: &Case) -> usize {
        case[0].0.whole_count(&case[0].1)
    }

    #[test]
    fn roots_of_one_change_no_bit() {
        for case in cases() {
            let (mut plain, mut weighed) = (sums(&case), sums(&case));
            see(&mut plain, &case, 1, None);
            see(&mut weighed, &case, 1, Some(&vec![1.0; rows_of(&case)]));
            assert!(told(&plain).is_some());
            assert_eq!(told(&plain), told(&weighed), "{case:?}");
        }
    }

    #[test]
    fn rows_of_no_weight_do_not_count() {
        for (m, d) in [(2, 3), (35, 40), (20, 300)] {
            let (a, b, roots) = (drawn(2, 60 * m), drawn(3, 60 * d), drawn_roots(4, 60, 1));
            let kept = |x: &[f32], columns: usize| -> Vec<f32> {
                let kept = x.chunks(columns).zip(&roots).filter(|(_, root)| **root > 0.0);
                kept.flat_map(|(row, _)| row.to_vec()).collect()
            };
            let case = [(Rows::Last, vec![60, m]), (Rows::Last, vec![60, d])];
            let (mut all, mut alone) = (sums(&case), sums(&case));
            all.see_weighed((&a, &[60, m]), (&b, &[60, d]), Some(&roots));
            let n = kept(&a, m).len() / m;
            alone.see((&kept(&a, m), &[n, m]), (&kept(&b, d), &[n, d]));
            assert!(told(&all).is_some());
            assert_eq!(told(&all), told(&alone));
        }
    }

    #[test]
    fn samples_of_no_weight_do_not_count() {
        for case in cases() {
            let (mut all, mut alone) = (sums(&case), sums(&case));
            for sample in 0..6 {
                let root = if sample % 3 == 1 { 1.0 } else { 0.0 };
                see(&mut all, &case, sample, Some(&vec![root; rows_of(&case)]));
                if sample % 3 == 1 {
                    see(&mut alone, &case, sample, None);
                }
            }
            assert!(told(&all).is_some());
            assert_eq!(told(&all), told(&alone), "{case:?}");
        }
    }

    #[test]
    fn equal_weights_change_little() {
        for case in cases() {
            let (mut plain, mut half) = (sums(&case), sums(&case));
            see(&mut plain, &case, 5, None);
            see(&mut half, &case, 5, Some(&vec![0.5; rows_of(&case)]));
            let (plain, half) = (told(&plain).unwrap(), told(&half).unwrap());
            for (plain, half) in [(plain.0, half.0), (plain.1, half.1)] {
                let worst = plain.iter().zip(&half).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1.0 / 4096.0, "{case:?}: {worst}");
            }
        }
    }

    #[test]
    fn weighed_samples_in_any_order_give_the_same_bits() {
        for case in cases() {
            let of = |order: &[u64], size: usize| {
                let mut all = sums(&case);
                for samples in order.chunks(size) {
                    let mut part = sums(&case);
                    for &sample in samples {
                        see(&mut part, &case, sample, Some(&drawn_roots(sample, rows_of(&case), 1000)));
                    }
                    all.merge(&part);
                }
                told(&all)
            };
            let mut order: Vec<u64> = (0..8).collect();
            let want = of(&order, 8);
            for seed in 0..5_u64 {
                order.sort_by_key(|at| mixed(seed << 8 | *at));
                assert_eq!(of(&order, 3), want, "{case:?} {order:?}");
            }
        }
    }

    #[test]
    fn mixed_moments_of_a_tensor_with_itself_are_its_own() {
        for case in cases() {
            let (rows, shape) = &case[1];
            let x = drawn(6, shape.iter().product());
            let peaks = vec![1.0; rows.channels(shape).unwrap()];
            let mut cross = CrossSums::new((*rows, &peaks), (*rows, &peaks), 1).unwrap();
            let mut gram = GramSums::new(*rows, &peaks, 1).unwrap();
            let roots = drawn_roots(7, rows.whole_count(shape), 1000);
            cross.see_weighed((&x, shape), (&x, shape), Some(&roots));
            gram.see_weighed(&x, shape, Some(&roots));
            let (cross, gram) = (cross.finish().unwrap(), gram.finish().unwrap());
            for (cross, gram) in [(cross.moments, gram.moments), (cross.means, gram.means)] {
                assert_eq!(cross.len(), gram.len());
                let near = |(cross, gram): (&f64, &f32)| (cross - f64::from(*gram)).abs() < 1e-6;
                assert!(cross.iter().zip(&gram).all(near), "{case:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_counts_as_zero_and_no_rows_are_nothing() {
        let case = &cases()[0];
        let with = |odd: f32| {
            let mut sums = sums(case);
            let (mut a, mut b) = (drawn(8, 60), drawn(9, 90));
            (a[7], b[50]) = (odd, odd);
            sums.see((&a, &[30, 2]), (&b, &[30, 3]));
            told(&sums)
        };
        assert!(with(0.0).is_some());
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(with(odd), with(0.0), "{odd}");
        }
        let mut none = sums(case);
        see(&mut none, case, 1, Some(&[0.0; 30]));
        see(&mut none, case, 1, Some(&[1.0; 29]));
        assert!(none.finish().is_none());
    }
}
