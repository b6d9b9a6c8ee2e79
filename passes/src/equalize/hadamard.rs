//! Orthogonal matrices of ±1 entries with random signs, applied without being written out.
//!
//! Q = D (A ⊗ B) / √n for n = K · 2^m: D random signs, A of order K after Paley, B of order 2^m after Sylvester. Where no A is known for n,
//! Q is made of blocks of the largest power of two that divides n.

use crate::seed;

/// An orthogonal n × n matrix.
#[derive(Debug)]
pub(super) struct Hadamard {
    n: usize,
    /// The rows of A; of one entry where n is a power of two, or cut into blocks.
    dense: Vec<Vec<f64>>,
    /// 2^m.
    power: usize,
    signs: Vec<f64>,
}

impl Hadamard {
    /// The matrix for vectors of `n` with the signs that `draw` gives.
    pub(super) fn new(n: usize, draw: u64) -> Self {
        let signs =
            (0..n as u64).map(|i| if seed::mixed(draw ^ seed::mixed(i)) & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let two = 1_usize << n.trailing_zeros().min(usize::BITS - 1);
        let halves = std::iter::successors(Some(two), |&two| (two > 1).then_some(two / 2));
        let found = halves.filter(|two| (n / two) <= LARGEST).find_map(|two| Some((paley(n / two)?, two)));
        let (dense, power) = found.unwrap_or_else(|| (vec![vec![1.0]], two));
        Self { n, dense, power, signs }
    }

    /// The same with signs that are a product too, so that all of it is: see [`Self::factors`].
    pub(super) fn separable(n: usize, draw: u64) -> Self {
        let mut made = Self::new(n, draw);
        let (rows, columns) = made.cut();
        let drawn = made.signs.clone();
        let sign = |i: usize| drawn[i % columns] * drawn[(columns + i / columns % rows) % n];
        made.signs = (0..n).map(sign).collect();
        made
    }

    /// Rows and columns, K · 2^a and 2^b, that a vector of K · 2^m is laid out as: as near to each other as they come.
    fn cut(&self) -> (usize, usize) {
        let rows = |columns: usize| self.dense.len() * (self.power / columns);
        let halves = std::iter::successors(Some(self.power), |two| (*two > 1).then_some(two / 2));
        let columns = halves.min_by_key(|columns| rows(*columns).max(*columns)).unwrap_or(1);
        (rows(columns), columns)
    }

    /// L \[K · 2^a, K · 2^a\] and R \[2^b, 2^b\], row by row, such that x Q is L X R for a vector that is laid out as rows
    /// X \[K · 2^a, 2^b\]; for one that is [`Self::separable`]. Where K · 2^m is less than n, every so many entries are a matrix of their own.
    pub(super) fn factors(&self) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let (rows, columns) = self.cut();
        let outer = rows / self.dense.len();
        // The signs of one matrix are those of its first row times those of its first column.
        let (first, scale) = (self.signs[0], (rows as f64).sqrt().recip());
        // Sylvester's matrix has −1 where both places share an odd number of bits.
        let half = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let left = |i: usize, j: usize| {
            self.dense[j / outer][i / outer] * half(j % outer, i % outer) * self.signs[j * columns] * scale
        };
        let left = (0..rows).map(|i| (0..rows).map(|j| left(i, j)).collect()).collect();
        let right = |i: usize| {
            let mut row = vec![0.0; columns];
            row[i] = self.signs[i] * first / (columns as f64).sqrt();
            sylvester(&mut row);
            row
        };
        (left, (0..columns).map(right).collect())
    }

    /// The n of n × n.
    pub(super) fn len(&self) -> usize {
        self.n
    }

    /// Replaces the row vector `x` by x Q.
    pub(super) fn apply(&self, x: &mut [f64]) {
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
        let block = self.dense.len() * self.power;
        let scale = 1.0 / (block as f64).sqrt();
        let mut mixed = vec![0.0; block];
        for block in x.chunks_exact_mut(block) {
            block.chunks_exact_mut(self.power).for_each(sylvester);
            mixed.fill(0.0);
            for (row, from) in self.dense.iter().zip(block.chunks_exact(self.power)) {
                for (entry, to) in row.iter().zip(mixed.chunks_exact_mut(self.power)) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += entry * from);
                }
            }
            block.iter_mut().zip(&mixed).for_each(|(to, from)| *to = from * scale);
        }
    }
}

/// The largest K that is tried: beyond, the work per entry is that of a product.
const LARGEST: usize = 256;

/// x H of a power of two, in place.
fn sylvester(x: &mut [f64]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
}

/// A Hadamard matrix of order `k`: of one entry, or by Paley's first or second construction.
///
/// Source: Paley 1933, "On orthogonal matrices".
fn paley(k: usize) -> Option<Vec<Vec<f64>>> {
    if k == 1 {
        return Some(vec![vec![1.0]]);
    }
    if k.is_multiple_of(4) && is_prime(k - 1) {
        // (k − 1) ≡ 3 mod 4: S + I with S skew.
        let mut h = conference(k - 1, -1.0);
        h.iter_mut().enumerate().for_each(|(i, row)| row[i] += 1.0);
        return Some(h);
    }
    let q = (k / 2).checked_sub(1)?;
    if !k.is_multiple_of(4) || q % 4 != 1 || !is_prime(q) {
        return None;
    }
    // S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with S symmetric.
    let s = conference(q, 1.0);
    let entry = |i: usize, j: usize| {
        let (outer, inner) = (s[i / 2][j / 2], [[1.0, 1.0], [1.0, -1.0]][i % 2][j % 2]);
        let diagonal = if i / 2 == j / 2 { [[1.0, -1.0], [-1.0, -1.0]][i % 2][j % 2] } else { 0.0 };
        outer * inner + diagonal
    };
    Some((0..k).map(|i| (0..k).map(|j| entry(i, j)).collect()).collect())
}

/// The bordered matrix of the quadratic residues of the prime `q`: 0 on the diagonal, ±1 elsewhere; `sign` stands in the first column.
fn conference(q: usize, sign: f64) -> Vec<Vec<f64>> {
    let mut residues = vec![-1.0; q];
    (1..q).for_each(|x| residues[x * x % q] = 1.0);
    residues[0] = 0.0;
    let entry = |i: usize, j: usize| match (i, j) {
        (0, 0) => 0.0,
        (0, _) => 1.0,
        (_, 0) => sign,
        (i, j) => residues[(i + q - j) % q],
    };
    (0..=q).map(|i| (0..=q).map(|j| entry(i, j)).collect()).collect()
}

fn is_prime(n: usize) -> bool {
    n > 1 && (2..=n.isqrt()).all(|d| !n.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_the_matrix() {
        for n in [1, 2, 12, 16, 64, 92, 128, 576] {
            let q = Hadamard::separable(n, 3);
            let (left, right) = q.factors();
            let longer = left.len().max(right.len());
            assert!(longer <= 36 || longer * longer <= 4 * n, "{n}: {} and {}", left.len(), right.len());
            let (rows, inner) = (left.len(), right.len());
            let x: Vec<f64> = (0..n).map(|i| ((i * 37) % 11) as f64 - 4.5).collect();
            let mut want = x.clone();
            q.apply(&mut want);
            for (block, want) in x.chunks_exact(rows * inner).zip(want.chunks_exact(rows * inner)) {
                for (at, want) in want.iter().enumerate() {
                    let (i, j) = (at / inner, at % inner);
                    let terms = (0..rows * inner).map(|k| left[i][k / inner] * block[k] * right[k % inner][j]);
                    assert!((terms.sum::<f64>() - want).abs() < 1e-9, "{n}: entry {at}");
                }
            }
        }
    }

    #[test]
    fn every_order_is_orthogonal_and_spreads_a_spike() {
        // 576 = 36 · 16 and 28 by the second construction, 12 and 20 by the first, 92 only in blocks of 4, 7 not at all.
        for (n, spread) in
            [(1, 1), (2, 2), (64, 64), (12, 12), (20, 20), (28, 28), (576, 576), (960, 960), (92, 4), (7, 1)]
        {
            let q = Hadamard::new(n, 5);
            let rows: Vec<Vec<f64>> = (0..n)
                .map(|i| {
                    let mut row = vec![0.0; n];
                    row[i] = 1.0;
                    q.apply(&mut row);
                    row
                })
                .collect();
            for i in 0..n {
                for j in i..n.min(i + 40) {
                    let dot: f64 = rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12, "{n}: rows {i} and {j} give {dot}");
                }
                let top = rows[i].iter().fold(0.0_f64, |top, v| top.max(v.abs()));
                assert!((top - 1.0 / f64::from(spread).sqrt()).abs() < 1e-12, "{n}: {top}");
            }
        }
    }

    #[test]
    fn matrices_of_every_order_that_there_is_are_signs_and_orthogonal() {
        let mut orders = Vec::new();
        for (k, h) in (1..=LARGEST).filter_map(|k| Some((k, paley(k)?))) {
            orders.push(k);
            let is_sign = |v: &f64| (v.abs() - 1.0).abs() < 1e-12;
            assert!(h.len() == k && h.iter().all(|row| row.len() == k && row.iter().all(is_sign)), "{k}");
            for (i, row) in h.iter().enumerate() {
                for other in &h[..i] {
                    let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                    assert!(dot.abs() < 1e-9, "{k}: row {i} gives {dot}");
                }
            }
        }
        assert!([1, 4, 8, 12, 20, 24, 28, 36, 60, 252].iter().all(|k| orders.contains(k)), "{orders:?}");
    }

    #[test]
    fn norms_and_angles_stay_at_any_length() {
        for draw in 0..100 {
            let n = 1 + usize::try_from(seed::mixed(draw) % 300).unwrap();
            let vector = |at: u64| -> Vec<f64> {
                (0..n as u64).map(|i| 2.0 * seed::uniform(draw << 32 | at << 16 | i) - 1.0).collect()
            };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let (x, y) = (vector(1), vector(2));
            for q in [Hadamard::new(n, draw), Hadamard::separable(n, draw)] {
                let (mut turned, mut other) = (x.clone(), y.clone());
                q.apply(&mut turned);
                q.apply(&mut other);
                assert!((dot(&turned, &turned) - dot(&x, &x)).abs() < 1e-9, "{n}");
                assert!((dot(&turned, &other) - dot(&x, &y)).abs() < 1e-9, "{n}");
            }
        }
    }
}
