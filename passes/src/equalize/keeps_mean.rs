//! Orthogonal matrices that leave the mean of a row as it is.

use super::orthogonal::Rotation;

/// Q P for an orthogonal n × n matrix Q, with P the reflection that takes u Q back to u = (1, …, 1) / √n.
///
/// Then u Q P = u, and as Q P is orthogonal its rows sum to 1 as well: means and variances of rows are those of the rows that it turns.
///
/// Source: Householder 1958, "Unitary triangularization of a nonsymmetric matrix"; a rotation that fixes the ones, for norms that subtract a
/// mean: ours, in place of the centered weights of Ashkboos et al. 2024 (`SliceGPT`), arXiv:2401.15024, section 3.1.
#[derive(Debug)]
pub(super) struct KeepsMean<R> {
    inner: R,
    /// What P reflects along, of length 1; zeros where Q needs no reflection.
    normal: Vec<f64>,
}

/// A shorter difference than this is rounding.
const NOTHING: f64 = 1e-12;

impl<R: Rotation> KeepsMean<R> {
    pub(super) fn of(inner: R) -> Self {
        let even = 1.0 / (inner.width() as f64).sqrt();
        let mut normal = vec![even; inner.width()];
        inner.apply(&mut normal);
        normal.iter_mut().for_each(|v| *v -= even);
        let length = normal.iter().map(|v| v * v).sum::<f64>().sqrt();
        let factor = if length > NOTHING { 1.0 / length } else { 0.0 };
        normal.iter_mut().for_each(|v| *v *= factor);
        Self { inner, normal }
    }
}

impl<R: Rotation> Rotation for KeepsMean<R> {
    fn width(&self) -> usize {
        self.inner.width()
    }

    fn apply(&self, x: &mut [f64]) {
        self.inner.apply(x);
        let along: f64 = x.iter().zip(&self.normal).map(|(x, w)| x * w).sum();
        x.iter_mut().zip(&self.normal).for_each(|(x, w)| *x -= 2.0 * along * w);
    }

    fn keeps_mean(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::hadamard::Hadamard;
    use super::super::orthogonal::Orthogonal;
    use super::super::orthogonal::tests::drawn;
    use super::*;

    #[test]
    fn the_ones_stay_and_right_angles_too() {
        // Powers of two, orders of Paley, blocks, odd numbers (where Q is signs alone), and 768 as in GPT-2.
        for n in [1, 2, 3, 7, 12, 36, 64, 768] {
            for seed in 0..3 {
                let q = KeepsMean::of(Hadamard::new(n, seed));
                let mut ones = vec![1.0; n];
                q.apply(&mut ones);
                assert!(ones.iter().all(|v| (v - 1.0).abs() < 1e-12), "{n}, {seed}: {ones:?}");
                let written = Orthogonal::of(&q);
                assert!(written.error() < 1e-12, "{n}, {seed}: {}", written.error());
            }
        }
    }

    #[test]
    fn rows_keep_their_mean_and_length_and_are_mixed() {
        let n = 12;
        let q = KeepsMean::of(Hadamard::new(n, 1));
        let (x, mut y) = (drawn(4, n), drawn(4, n));
        q.apply(&mut y);
        let sums = |x: &[f64]| (x.iter().sum::<f64>(), x.iter().map(|v| v * v).sum::<f64>());
        let ((a, b), (c, d)) = (sums(&x), sums(&y));
        assert!((a - c).abs() < 1e-12 && (b - d).abs() < 1e-12);
        let mut spike = vec![0.0; n];
        spike[3] = 1.0;
        q.apply(&mut spike);
        assert!(spike.iter().all(|v| v.abs() < 0.8), "no channel stands out: {spike:?}");
    }

    #[test]
    fn what_fixes_the_ones_already_is_left_alone() {
        let once = KeepsMean::of(Hadamard::new(12, 5));
        let (mut a, mut b) = (drawn(2, 12), drawn(2, 12));
        once.apply(&mut a);
        KeepsMean::of(once).apply(&mut b);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-12));
    }
}
