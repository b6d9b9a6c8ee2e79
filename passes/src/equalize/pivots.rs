//! What an error in a column of a weight costs, under second moments that a rotation turns.

use faer::{Mat, Side};

use super::orthogonal::Orthogonal;
use super::utilization::utilization;
use crate::grad::gemm::{Matrix, multiply};
use crate::observe::Gram;
use crate::pass::{OptionError, Options};

/// Second moments of a tensor that a stream's norm returns.
#[derive(Debug)]
pub(super) struct Moments {
    d: usize,
    /// E\[x xᵀ\], row by row.
    values: Vec<f64>,
    mean: Vec<f64>,
    /// The share that is kept of what was measured off the diagonal: few rows overfit.
    kept: f64,
}

/// What errors in columns cost, and how that depends on the moments.
#[derive(Debug)]
pub(super) struct Costs {
    /// Per column, what a unit of squared error costs at the output.
    pub(super) of_column: Vec<f64>,
    /// Row b is that of L⁻¹ times L\[b, b\], columns in the order of the tensor; empty for errors that nobody makes up for.
    factor: Vec<f64>,
    /// The column that stands at row b.
    order: Vec<usize>,
}

/// Whether columns that are rounded later make up for earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errors {
    /// Every column keeps its own: rounding to nearest.
    Stay,
    /// Columns in the order of their power, as GPTQ goes: what is left of a column is its pivot.
    Compensated,
}

impl Errors {
    /// What the option `errors` says.
    pub(super) fn parse(options: &Options) -> Result<Self, OptionError> {
        match options.text("errors", "compensated") {
            "compensated" => Ok(Self::Compensated),
            "stay" => Ok(Self::Stay),
            other => {
                let problem = format!("`{other}` is neither compensated nor stay");
                Err(OptionError { option: "errors".into(), problem })
            }
        }
    }
}

/// What is added to the diagonal, in mean diagonals, as GPTQ does.
const DAMPING: f64 = 0.01;

impl Moments {
    pub(super) fn of(gram: &Gram) -> Self {
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect();
        let (d, effective) = (gram.columns, gram.effective);
        let kept = effective / (effective + d as f64);
        Self { d, values: wide(gram.group(0)), mean: wide(gram.group_means(0)), kept }
    }

    /// The moments of y in (y γ + β), whose moments these are, for rows γ and β; a channel whose gain is next to nothing tells nothing, and is taken for one
    /// of mean 0 and variance 1, as those of norms are on average.
    pub(super) fn without(mut self, gain: Option<&[f32]>, shift: Option<&[f32]>) -> Self {
        let d = self.d;
        let of = |row: Option<&[f32]>, at: usize, none: f64| row.map_or(none, |row| f64::from(row[at]));
        // Where little is left beside the shift, it is what f32 left of it.
        let raw: Vec<f64> = (0..d).map(|at| self.values[at * d + at]).collect();
        let known = |at: usize| {
            let gain = of(gain, at, 1.0);
            gain.is_normal() && gain * gain > 1e-5 * raw[at]
        };
        for (i, row) in self.values.chunks_exact_mut(d.max(1)).enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                let (a, b) = (of(shift, i, 0.0), of(shift, j, 0.0));
                let plain = *v - self.mean[i] * b - a * self.mean[j] + a * b;
                let scaled = plain / of(gain, i, 1.0) / of(gain, j, 1.0);
                *v = if known(i) && known(j) { scaled } else { f64::from(u8::from(i == j)) };
            }
        }
        for (at, mean) in self.mean.iter_mut().enumerate() {
            *mean = if known(at) { (*mean - of(shift, at, 0.0)) / of(gain, at, 1.0) } else { 0.0 };
        }
        self
    }

    /// The bytes that moments of so many channels take.
    pub(super) fn bytes(d: usize) -> u64 {
        8 * (d as u64) * d as u64
    }

    /// E\[(a · x)²\], summed over the rows a of `rows`.
    #[expect(clippy::cast_possible_truncation, reason = "multiplied in f32")]
    pub(super) fn power(&self, rows: &[f32]) -> f64 {
        let d = self.d;
        let single: Vec<f32> = self.values.iter().map(|v| *v as f32).collect();
        let mut products = vec![0.0_f32; rows.len()];
        multiply(&mut products, Matrix::new(rows, rows.len() / d.max(1), d), Matrix::new(&single, d, d), false);
        rows.iter().zip(&products).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// Rᵀ H R, row by row.
    pub(super) fn turned(&self, r: &Orthogonal) -> Vec<f64> {
        let d = self.d;
        let (mut half, mut whole) = (vec![0.0; d * d], vec![0.0; d * d]);
        multiply(&mut half, Matrix::new(&self.values, d, d), r.matrix(), false);
        multiply(&mut whole, r.matrix().t(), Matrix::new(&half, d, d), false);
        whole
    }

    /// 2 H R M: the gradient with respect to R of what has the symmetric gradient `m` with respect to Rᵀ H R.
    pub(super) fn gradient(&self, r: &Orthogonal, m: &[f64]) -> Vec<f64> {
        let d = self.d;
        let (mut half, mut whole) = (vec![0.0; d * d], vec![0.0; d * d]);
        multiply(&mut half, r.matrix(), Matrix::new(m, d, d), false);
        multiply(&mut whole, Matrix::new(&self.values, d, d), Matrix::new(&half, d, d), false);
        whole.iter_mut().for_each(|v| *v *= 2.0);
        whole
    }

    /// The utilization rate of the tensor in the basis of `r`, or as it is.
    pub(super) fn utilization(&self, r: Option<&Orthogonal>) -> Option<f64> {
        let d = self.d;
        let moment = |at: usize| self.values[at] - self.mean[at / d] * self.mean[at % d];
        let covariance = Self { d, values: (0..d * d).map(moment).collect(), mean: Vec::new(), kept: 1.0 };
        let Some(r) = r else { return utilization(&covariance.values, &self.mean) };
        let mut mean = vec![0.0; d];
        multiply(&mut mean, Matrix::new(&self.mean, 1, d), r.matrix(), false);
        utilization(&covariance.turned(r), &mean)
    }

    /// The symmetric gradient of Σ `errors` · `costs` with respect to Rᵀ H R, row by row.
    pub(super) fn of_errors(&self, costs: &Costs, errors: &[f64]) -> Vec<f64> {
        costs.gradient(errors, self.kept)
    }

    /// What errors cost in a basis in which the moments are `turned`; `None` where those have no factor.
    pub(super) fn costs(&self, turned: &[f64], errors: Errors) -> Option<Costs> {
        Costs::of(turned, (self.d, self.kept), errors)
    }
}

impl Costs {
    /// For d × d moments H of which `kept` is kept off the diagonal. With H = U D Uᵀ, U upper triangular of unit diagonal, columns in
    /// descending order of their power, what column j costs is D\[j\].
    fn of(h: &[f64], (d, kept): (usize, f64), errors: Errors) -> Option<Self> {
        let diagonal = |j: usize| h[j * d + j].max(0.0);
        let mean = (0..d).map(diagonal).sum::<f64>() / d as f64;
        (mean > 0.0 && mean.is_finite()).then_some(())?;
        if errors == Errors::Stay {
            return Some(Self { of_column: (0..d).map(diagonal).collect(), factor: Vec::new(), order: Vec::new() });
        }
        let mut order: Vec<usize> = (0..d).collect();
        // Read backwards, U is lower triangular: the column that is rounded last stands first.
        order.sort_by(|&a, &b| diagonal(a).total_cmp(&diagonal(b)).then(b.cmp(&a)));
        let entry = |i: usize, j: usize| {
            if i == j { diagonal(order[i]) + DAMPING * mean } else { kept * h[order[i] * d + order[j]] }
        };
        let llt = Mat::from_fn(d, d, entry).llt(Side::Lower).ok()?;
        let lower = llt.L();
        let mut inverse = Mat::<f64>::identity(d, d);
        lower.solve_lower_triangular_in_place(&mut inverse);
        let (mut of_column, mut factor) = (vec![0.0; d], vec![0.0; d * d]);
        for (b, &column) in order.iter().enumerate() {
            let root = lower[(b, b)];
            of_column[column] = root * root;
            for (j, &earlier) in order[..=b].iter().enumerate() {
                factor[b * d + earlier] = root * inverse[(b, j)];
            }
        }
        Some(Self { of_column, factor, order })
    }

    /// See [`Moments::of_errors`].
    fn gradient(&self, errors: &[f64], kept: f64) -> Vec<f64> {
        let d = errors.len();
        let mut m = vec![0.0; d * d];
        if self.factor.is_empty() {
            errors.iter().enumerate().for_each(|(j, c)| m[j * d + j] = *c);
            return m;
        }
        // dD[b] = the b-th diagonal of U⁻¹ dH U⁻ᵀ.
        let mut weighed = self.factor.clone();
        for (row, column) in weighed.chunks_exact_mut(d.max(1)).zip(&self.order) {
            row.iter_mut().for_each(|v| *v *= errors[*column]);
        }
        multiply(&mut m, Matrix::new(&self.factor, d, d).t(), Matrix::new(&weighed, d, d), false);
        // The trace, and with it what damps, is the same in every basis.
        m.iter_mut().enumerate().filter(|(at, _)| at / d != at % d).for_each(|(_, v)| *v *= kept);
        m
    }
}

/// What errors in the rows of a weight that writes to a stream cost, by the moments of what it reads: those no rotation of the stream
/// changes.
pub(super) fn fixed(gram: &Gram, errors: Errors) -> Option<Vec<f64>> {
    let moments = Moments::of(gram);
    Some(moments.costs(&moments.values, errors)?.of_column)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::hadamard::Hadamard;
    use super::super::orthogonal::tests::drawn;
    use super::*;

    /// Moments of `n` rows whose channels differ in power and depend on one another.
    pub(in super::super) fn moments(draw: u64, d: usize, n: usize) -> Moments {
        let noise = drawn(draw, n * d);
        let x = |k: usize, j: usize| noise[k * d + j] * (1.0 + j as f64) + noise[k * d];
        let moment = |at: usize| (0..n).map(|k| x(k, at / d) * x(k, at % d)).sum::<f64>() / n as f64;
        let mean = (0..d).map(|j| (0..n).map(|k| x(k, j)).sum::<f64>() / n as f64).collect();
        Moments { d, values: (0..d * d).map(moment).collect(), mean, kept: 0.8 }
    }

    #[test]
    fn the_last_of_two_columns_costs_its_power_and_the_first_what_the_last_cannot_take() {
        // H = [[4, 1], [1, 2]], damped by 0.03: the louder column is rounded first, and 1 / 2.03 of its error is made up for.
        let costs = Costs::of(&[4.0, 1.0, 1.0, 2.0], (2, 1.0), Errors::Compensated).unwrap();
        assert!((costs.of_column[0] - (4.03 - 1.0 / 2.03)).abs() < 1e-12, "{costs:?}");
        assert!((costs.of_column[1] - 2.03).abs() < 1e-12, "{costs:?}");
        let stay = Costs::of(&[4.0, 1.0, 1.0, 2.0], (2, 1.0), Errors::Stay).unwrap();
        assert_eq!(stay.of_column, [4.0, 2.0]);
        assert!(Costs::of(&[0.0; 4], (2, 1.0), Errors::Compensated).is_none());
        assert!(Costs::of(&[f64::NAN; 4], (2, 1.0), Errors::Compensated).is_none());
    }

    /// The gradient of Σ c D(Rᵀ H R) against central differences, entry by entry of R.
    #[test]
    fn gradients_of_costs_are_those_of_central_differences() {
        let d = 6;
        let moments = moments(4, d, 40);
        let r = Orthogonal::of(&Hadamard::new(d, 2)).moved(&skew(8, d));
        let errors: Vec<f64> = drawn(9, d).iter().map(|v| 1.5 + v).collect();
        for kind in [Errors::Stay, Errors::Compensated] {
            let value = |r: &Orthogonal| {
                let costs = moments.costs(&moments.turned(r), kind).unwrap();
                costs.of_column.iter().zip(&errors).map(|(d, c)| d * c).sum::<f64>()
            };
            let costs = moments.costs(&moments.turned(&r), kind).unwrap();
            let gradient = moments.gradient(&r, &moments.of_errors(&costs, &errors));
            // Along the manifold alone: the damping is that of a fixed trace.
            let tangent = r.tangent(&gradient);
            for draw in 0..10 {
                let direction = skew(20 + draw, d);
                let t = 1e-5;
                let along = |sign: f64| {
                    let step: Vec<f64> = direction.iter().map(|v| sign * t * v).collect();
                    value(&r.moved(&step))
                };
                let measured = (along(-1.0) - along(1.0)) / (2.0 * t);
                let said: f64 = tangent.iter().zip(&direction).map(|(a, b)| a * b).sum();
                assert!((measured - said).abs() < 1e-6 * (1.0 + said.abs()), "{kind:?}: {measured} for {said}");
            }
        }
    }

    /// A skew-symmetric d × d matrix.
    fn skew(draw: u64, d: usize) -> Vec<f64> {
        let v = drawn(draw, d * d);
        (0..d * d).map(|at| v[at] - v[at % d * d + at / d]).collect()
    }
}
