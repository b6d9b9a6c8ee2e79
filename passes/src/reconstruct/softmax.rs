//! The softmax of a row of logits.

use crate::grad::Real as _;

/// A row of logits: its largest one, and e to what each is less.
pub(super) struct Softmax {
    pub(super) top: f32,
    pub(super) exp: Vec<f32>,
    /// Of `exp`: each over this is a probability.
    pub(super) sum: f64,
}

impl Softmax {
    /// That of `row`.
    pub(super) fn of(row: &[f32]) -> Self {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut exp: Vec<f32> = row.iter().map(|z| z - top).collect();
        f32::exp_all(&mut exp);
        // In parts, so that long rows lose nothing.
        let sum = exp.chunks(256).map(|part| f64::from(part.iter().sum::<f32>())).sum();
        Self { top, exp, sum }
    }
}
