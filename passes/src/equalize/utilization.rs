//! How much of the space that codes span is used: the quantization space utilization rate.

use faer::{Mat, Side};

/// So many standard deviations from the mean are within the range.
const REACH: f64 = 3.0;

/// The share of the covariance that is taken from its mean diagonal, for samples that are few.
const SHRINKAGE: f64 = 1e-3;

/// The logarithm of the utilization rate per channel, ½ mean ln λ − ln h: λ the eigenvalues of the d × d `covariance`, row by row, and h
/// = max (|μ| / 3 + σ) over channels, what one range for all of them has to span. 0 where all channels are alike, independent and of
/// mean 0, less elsewhere. `None` where nothing varies.
///
/// Source: Hu et al. 2025 (`OSTQuant`), arXiv:2501.13987, definition 1, per channel and without the factors that are the same for all.
pub(super) fn utilization(covariance: &[f64], mean: &[f64]) -> Option<f64> {
    let d = mean.len();
    let average = (0..d).map(|i| covariance[i * d + i]).sum::<f64>() / d as f64;
    if !average.is_normal() || average < 0.0 {
        return None;
    }
    let entry = |i: usize, j: usize| {
        let own = if i == j { SHRINKAGE * average } else { 0.0 };
        (1.0 - SHRINKAGE) * covariance[i * d + j] + own
    };
    let factor = Mat::from_fn(d, d, entry).llt(Side::Lower).ok()?;
    let half_volume = (0..d).map(|i| factor.L()[(i, i)].ln()).sum::<f64>();
    let reach = |i: usize| mean[i].abs() / REACH + entry(i, i).max(0.0).sqrt();
    let widest = (0..d).map(reach).fold(0.0, f64::max);
    let rate = half_volume / d as f64 - widest.ln();
    rate.is_finite().then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::super::hadamard::Hadamard;
    use super::super::orthogonal::{Orthogonal, tests::drawn};
    use super::*;
    use crate::grad::gemm::{Matrix, multiply};

    /// diag(variances).
    fn independent(variances: &[f64]) -> Vec<f64> {
        let d = variances.len();
        (0..d * d).map(|at| if at / d == at % d { variances[at / d] } else { 0.0 }).collect()
    }

    /// Qᵀ C Q.
    fn turned(covariance: &[f64], r: &Orthogonal, d: usize) -> Vec<f64> {
        let (mut half, mut whole) = (vec![0.0; d * d], vec![0.0; d * d]);
        multiply(&mut half, Matrix::new(covariance, d, d), r.matrix(), false);
        multiply(&mut whole, r.matrix().t(), Matrix::new(&half, d, d), false);
        whole
    }

    #[test]
    fn equal_channels_fill_the_space_whatever_their_size() {
        for variance in [1e-8, 1.0, 400.0] {
            let rate = utilization(&independent(&[variance; 8]), &[0.0; 8]).unwrap();
            assert!(rate.abs() < 1e-12, "{rate}");
        }
        // A mean of three deviations doubles what is spanned.
        let rate = utilization(&independent(&[1.0; 8]), &[3.0; 8]).unwrap();
        assert!((rate + 2.0_f64.ln()).abs() < 1e-12, "{rate}");
    }

    #[test]
    fn an_outlier_leaves_space_that_a_hadamard_matrix_fills() {
        let mut variances = vec![1.0; 16];
        variances[3] = 400.0;
        let covariance = independent(&variances);
        let loud = utilization(&covariance, &[0.0; 16]).unwrap();
        // σ = 20 beside 15 of 1: ½ ln 400 / 16 − ½ ln 400, nearly.
        let expected = 0.5 * 400.0_f64.ln() * (1.0 / 16.0 - 1.0);
        assert!((loud - expected).abs() < 0.03, "{loud} for {expected}");
        let r = Orthogonal::of(&Hadamard::new(16, 1));
        let even = utilization(&turned(&covariance, &r, 16), &[0.0; 16]).unwrap();
        assert!(even > loud + 1.0 && even < 0.0, "{even} after {loud}");
    }

    #[test]
    fn no_rate_is_above_zero_and_none_is_told_of_nothing() {
        for draw in 0..50 {
            let (d, n) = (6, 20);
            let x = drawn(draw, n * d);
            let moment = |at: usize| (0..n).map(|k| x[k * d + at / d] * x[k * d + at % d]).sum::<f64>() / n as f64;
            let covariance: Vec<f64> = (0..d * d).map(moment).collect();
            let rate = utilization(&covariance, &drawn(100 + draw, d)).unwrap();
            assert!(rate <= 1e-12, "{rate}");
            let scaled: Vec<f64> = covariance.iter().map(|v| 49.0 * v).collect();
            let mean: Vec<f64> = drawn(100 + draw, d).iter().map(|v| 7.0 * v).collect();
            assert!((utilization(&scaled, &mean).unwrap() - rate).abs() < 1e-9);
        }
        assert_eq!(utilization(&[0.0; 9], &[0.0; 3]), None);
        assert_eq!(utilization(&[f64::NAN; 9], &[0.0; 3]), None);
        assert_eq!(utilization(&[], &[]), None);
    }
}
