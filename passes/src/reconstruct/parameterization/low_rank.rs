//! Matrices of low rank.

use crate::grad::gemm::{Matrix, multiply};
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;
use crate::seed;

/// A = L U, L of `rows` × `rank`, U of `rank` × `columns`.
#[derive(Debug)]
pub(super) struct LowRank {
    left: Vec<f32>,
    right: Vec<f32>,
    rows: usize,
    columns: usize,
    rank: usize,
    adam: (Adam, Adam),
}

impl LowRank {
    /// L is 0; U is drawn evenly between ±1/√columns.
    pub(super) fn new(rows: usize, columns: usize, rank: usize, seed: u64) -> Self {
        let reach = 1.0 / (columns.max(1) as f64).sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        let draw = |i: usize| ((2.0 * seed::uniform(seed::mixed(seed) ^ i as u64) - 1.0) * reach) as f32;
        Self {
            left: vec![0.0; rows * rank],
            right: (0..rank * columns).map(draw).collect(),
            rows,
            columns,
            rank,
            adam: (Adam::new(rows * rank), Adam::new(rank * columns)),
        }
    }

    fn factors(&self) -> (Matrix<'_, f32>, Matrix<'_, f32>) {
        (Matrix::new(&self.left, self.rows, self.rank), Matrix::new(&self.right, self.rank, self.columns))
    }

    /// Adds the matrix to `values`.
    pub(super) fn add_to(&self, values: &mut [f32]) {
        let (left, right) = self.factors();
        multiply(values, left, right, true);
    }

    /// Shows both factors, and all that steps change with them.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.left);
        ledger.floats(&mut self.right);
        self.adam.0.show(ledger);
        self.adam.1.show(ledger);
    }

    /// Moves both factors against `gradient`, that by the matrix.
    pub(super) fn step(&mut self, gradient: &[f32], rate: f32) {
        let gradient = Matrix::new(gradient, self.rows, self.columns);
        let (mut of_left, mut of_right) = (vec![0.0; self.left.len()], vec![0.0; self.right.len()]);
        let (left, right) = self.factors();
        multiply(&mut of_left, gradient, right.t(), false);
        multiply(&mut of_right, left.t(), gradient, false);
        self.adam.0.step(&mut self.left, &of_left, rate);
        self.adam.1.step(&mut self.right, &of_right, rate);
    }
}
