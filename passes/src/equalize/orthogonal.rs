//! Orthogonal matrices that are written out, and steps that keep them orthogonal.

use faer::Mat;
use faer::linalg::solvers::Solve as _;

use super::hadamard::Hadamard;
use crate::grad::gemm::{Matrix, multiply};

/// An orthogonal matrix Q, as rows are turned by it.
pub(super) trait Rotation: Sync {
    /// The n of n × n.
    fn width(&self) -> usize;
    /// Replaces the row vector `x` by x Q.
    fn apply(&self, x: &mut [f64]);
    /// Whether it leaves the vector of ones as it is, and has to.
    fn keeps_mean(&self) -> bool {
        false
    }
}

impl Rotation for Hadamard {
    fn width(&self) -> usize {
        self.len()
    }

    fn apply(&self, x: &mut [f64]) {
        Hadamard::apply(self, x);
    }
}

/// An orthogonal n × n matrix, row by row.
#[derive(Clone, Debug)]
pub(super) struct Orthogonal {
    n: usize,
    entries: Vec<f64>,
    /// Whether it leaves the vector of ones as it is, and goes on doing so where it moves.
    keeps_mean: bool,
}

impl Rotation for Orthogonal {
    fn width(&self) -> usize {
        self.n
    }

    fn apply(&self, x: &mut [f64]) {
        let mut turned = vec![0.0; self.n];
        for (v, row) in x.iter().zip(self.entries.chunks_exact(self.n)) {
            turned.iter_mut().zip(row).for_each(|(to, entry)| *to += v * entry);
        }
        x.copy_from_slice(&turned);
    }

    fn keeps_mean(&self) -> bool {
        self.keeps_mean
    }
}

impl Orthogonal {
    /// `rotation`, written out.
    pub(super) fn of(rotation: &dyn Rotation) -> Self {
        let n = rotation.width();
        let mut entries = vec![0.0; n * n];
        for (i, row) in entries.chunks_exact_mut(n.max(1)).enumerate() {
            row[i] = 1.0;
            rotation.apply(row);
        }
        Self { n, entries, keeps_mean: rotation.keeps_mean() }
    }

    pub(super) fn matrix(&self) -> Matrix<'_, f64> {
        Matrix::new(&self.entries, self.n, self.n)
    }

    /// The entries as f32, row by row.
    #[expect(clippy::cast_possible_truncation, reason = "for products in f32")]
    pub(super) fn single(&self) -> Vec<f32> {
        self.entries.iter().map(|v| *v as f32).collect()
    }

    /// The skew-symmetric Ω = (Rᵀ G − Gᵀ R) / 2 by which a function with the gradient G, row by row, grows along R exp(t Ω); where R is to
    /// fix the ones 1, what of that has Ω 1 = 0.
    pub(super) fn tangent(&self, gradient: &[f64]) -> Vec<f64> {
        let n = self.n;
        let mut inner = vec![0.0; n * n];
        multiply(&mut inner, self.matrix().t(), Matrix::new(gradient, n, n), false);
        let skew = |at: usize| 0.5 * (inner[at] - inner[at % n * n + at / n]);
        let mut tangent: Vec<f64> = (0..n * n).map(skew).collect();
        if self.keeps_mean {
            let means: Vec<f64> =
                tangent.chunks_exact(n.max(1)).map(|row| row.iter().sum::<f64>() / n as f64).collect();
            // The means of its columns are those of its rows, negated, and the mean of all is 0.
            tangent.iter_mut().enumerate().for_each(|(at, v)| *v += means[at % n] - means[at / n]);
        }
        tangent
    }

    /// R (I + S)⁻¹ (I − S) with S half of the skew-symmetric `step`: a step against it along the manifold, made orthogonal once more.
    ///
    /// Source: Wen and Yin 2013, "A feasible method for optimization with orthogonality constraints", equation 7, from the right.
    pub(super) fn moved(&self, step: &[f64]) -> Self {
        let n = self.n;
        let identity = |i: usize, j: usize| f64::from(u8::from(i == j));
        let plus = Mat::from_fn(n, n, |i, j| identity(i, j) + 0.5 * step[i * n + j]);
        let minus = Mat::from_fn(n, n, |i, j| identity(i, j) - 0.5 * step[i * n + j]);
        let turn = plus.partial_piv_lu().solve(&minus);
        let turn: Vec<f64> = (0..n * n).map(|at| turn[(at / n, at % n)]).collect();
        let mut entries = vec![0.0; n * n];
        multiply(&mut entries, self.matrix(), Matrix::new(&turn, n, n), false);
        Self { n, entries, keeps_mean: self.keeps_mean }.polished()
    }

    /// R (3 I − Rᵀ R) / 2: squares the distance from the nearest orthogonal matrix.
    ///
    /// Source: Higham 2008, "Functions of matrices", section 8.3 (Newton–Schulz).
    fn polished(&self) -> Self {
        let n = self.n;
        let mut inner = vec![0.0; n * n];
        multiply(&mut inner, self.matrix().t(), self.matrix(), false);
        for (at, v) in inner.iter_mut().enumerate() {
            *v = 0.5 * (if at % n == at / n { 3.0 } else { 0.0 } - *v);
        }
        let mut entries = vec![0.0; n * n];
        multiply(&mut entries, self.matrix(), Matrix::new(&inner, n, n), false);
        Self { n, entries, keeps_mean: self.keeps_mean }
    }

    /// The largest entry of Rᵀ R − I, or of R 1 − 1 where that is to be nothing.
    pub(super) fn error(&self) -> f64 {
        let n = self.n;
        let mut inner = vec![0.0; n * n];
        multiply(&mut inner, self.matrix().t(), self.matrix(), false);
        let off = |(at, v): (usize, &f64)| (v - f64::from(u8::from(at % n == at / n))).abs();
        let sum = |row: &[f64]| (row.iter().sum::<f64>() - 1.0).abs();
        let sums = self.entries.chunks_exact(n.max(1)).filter(|_| self.keeps_mean).map(sum);
        // `max` would drop what is no number.
        inner.iter().enumerate().map(off).chain(sums).fold(0.0, |top, v| if v > top || v.is_nan() { v } else { top })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::keeps_mean::KeepsMean;
    use super::*;
    use crate::seed::uniform;

    /// `count` numbers between −1 and 1.
    pub(in super::super) fn drawn(draw: u64, count: usize) -> Vec<f64> {
        (0..count as u64).map(|i| 2.0 * uniform(draw << 32 | i) - 1.0).collect()
    }

    #[test]
    fn hundreds_of_steps_of_any_length_leave_a_matrix_orthogonal() {
        for n in [1, 2, 7, 12, 36] {
            let mut r = Orthogonal::of(&Hadamard::new(n, 3));
            for step in 0..300 {
                let size = [1e-3, 0.1, 3.0][step % 3];
                let gradient: Vec<f64> = drawn(step as u64, n * n).iter().map(|v| size * v).collect();
                let tangent = r.tangent(&gradient);
                for i in 0..n {
                    for j in 0..n {
                        assert!((tangent[i * n + j] + tangent[j * n + i]).abs() < 1e-12);
                    }
                }
                r = r.moved(&tangent);
            }
            assert!(r.error() < 1e-12, "{n}: {}", r.error());
        }
    }

    #[test]
    fn a_matrix_that_is_written_out_turns_like_the_original() {
        let q = Hadamard::new(36, 9);
        let (mut a, mut b) = (drawn(1, 36), drawn(1, 36));
        Rotation::apply(&q, &mut a);
        Orthogonal::of(&q).apply(&mut b);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn a_short_step_goes_down_as_fast_as_the_tangent_says() {
        let n = 12;
        for r in [Orthogonal::of(&Hadamard::new(n, 1)), Orthogonal::of(&KeepsMean::of(Hadamard::new(n, 1)))] {
            goes_down(n, &r);
        }
    }

    fn goes_down(n: usize, r: &Orthogonal) {
        // f(R) = Σ A ∘ R, whose gradient is A.
        let a = drawn(5, n * n);
        let f = |r: &Orthogonal| r.entries.iter().zip(&a).map(|(r, a)| r * a).sum::<f64>();
        let tangent = r.tangent(&a);
        let slope: f64 = tangent.iter().map(|v| v * v).sum();
        let t = 1e-6;
        let step: Vec<f64> = tangent.iter().map(|v| t * v).collect();
        let fell = (f(r) - f(&r.moved(&step))) / t;
        assert!((fell / slope - 1.0).abs() < 1e-4, "{fell} for {slope}");
    }

    #[test]
    fn what_is_no_number_is_no_orthogonal_matrix() {
        let broken = Orthogonal { n: 2, entries: vec![1.0, f64::NAN, 0.0, 1.0], keeps_mean: false };
        assert!(broken.error().is_nan());
    }
}
