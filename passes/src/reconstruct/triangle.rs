//! Symmetric sums, of which the lower half is stored, in panels of rows.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Rows of a matrix that are stored together.
const PANEL: usize = 128;

/// Σ rows rowsᵀ.
#[derive(Debug)]
pub(crate) struct Triangle {
    size: usize,
    /// Rows of a panel up to the diagonal, row-major.
    panels: Vec<Vec<f32>>,
}

impl Triangle {
    /// Nothing yet, of `size` rows.
    pub(super) fn new(size: usize) -> Self {
        let panel = |start: usize| {
            let end = size.min(start + PANEL);
            vec![0.0; (end - start) * end]
        };
        Self { size, panels: (0..size).step_by(PANEL).map(panel).collect() }
    }

    /// The bytes that one of `size` rows takes.
    pub(super) fn bytes(size: usize) -> u64 {
        4 * (size * (size + PANEL) / 2) as u64
    }

    /// Adds `rows rowsᵀ`.
    pub(super) fn add(&mut self, rows: MatRef<'_, f32>) {
        let mut start = 0;
        for panel in &mut self.panels {
            let end = rows.nrows().min(start + PANEL);
            let into = MatMut::from_row_major_slice_mut(panel, end - start, end);
            let (own, before) = (rows.subrows(start, end - start), rows.subrows(0, end));
            matmul(into, Accum::Add, own, before.transpose(), 1.0, Par::Seq);
            start = end;
        }
    }

    /// The entry in row `a` and column `b`.
    pub(crate) fn at(&self, a: usize, b: usize) -> f32 {
        let (row, column) = (a.max(b), a.min(b));
        let end = self.size.min((row / PANEL + 1) * PANEL);
        self.panels[row / PANEL][row % PANEL * end + column]
    }

    /// Whether all of it are numbers.
    pub(super) fn is_finite(&self) -> bool {
        self.panels.iter().flatten().all(|v| v.is_finite())
    }

    /// Whether there is something, all of it numbers.
    pub(super) fn tells(&self) -> bool {
        self.is_finite() && self.panels.iter().flatten().any(|v| *v != 0.0)
    }
}
