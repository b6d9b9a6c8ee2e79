//! Products of row-major matrices, read as stored or transposed.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::Real;

/// A row-major matrix, read transposed where `turned`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a, T> {
    values: &'a [T],
    /// As read.
    rows: usize,
    columns: usize,
    turned: bool,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// `values` as stored.
    pub(crate) fn new(values: &'a [T], rows: usize, columns: usize) -> Self {
        Self { values, rows, columns, turned: false }
    }

    /// Its transpose.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.columns, columns: self.rows, turned: !self.turned, ..self }
    }

    fn view(self) -> MatRef<'a, T> {
        if self.turned {
            MatRef::from_row_major_slice(self.values, self.columns, self.rows).transpose()
        } else {
            MatRef::from_row_major_slice(self.values, self.rows, self.columns)
        }
    }
}

/// `into = a b`, row-major, or `into += a b`.
pub(crate) fn multiply<T: Real>(into: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>, accumulate: bool) {
    let (m, n) = (a.rows, b.columns);
    let beta = if accumulate { Accum::Add } else { Accum::Replace };
    if m == 0 || n == 0 || a.columns == 0 {
        if !accumulate {
            into.fill(T::zero());
        }
        return;
    }
    let into = MatMut::from_row_major_slice_mut(into, m, n);
    matmul(into, beta, a.view(), b.view(), <T as num_traits::One>::one(), Par::Seq);
}
