//! A divisor before rounding.

use super::{Learned, Parameterization, Weight};
use crate::about::About;
use crate::reconstruct::adam::Adam;

static ABOUT: About = About {
    name: "flexround",
    doc: "ŵ = round(w / S) with S = exp θ of one element each, one row and one column together; learned by Adam straight through \
          the rounding, so that large weights may move by several points. Starts at the points that were chosen before.",
    source: "Lee et al. 2023 (FlexRound), arXiv:2306.00317, section 3; around a start ours",
};

const RATE: f32 = 5e-4;
/// Logarithms of divisors stay within ±3.
pub(super) const REACH: f32 = 3.0;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct FlexRound;

/// ln S as a sum of parts: one per row, one per column.
#[derive(Debug)]
pub(super) struct Lines {
    rows: Vec<f32>,
    columns: Vec<f32>,
    adam: (Adam, Adam),
}

impl Lines {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        Self { rows: vec![0.0; rows], columns: vec![0.0; columns], adam: (Adam::new(rows), Adam::new(columns)) }
    }

    pub(super) fn add_to(&self, values: &mut [f32]) {
        for (row, values) in self.rows.iter().zip(values.chunks_exact_mut(self.columns.len().max(1))) {
            values.iter_mut().zip(&self.columns).for_each(|(v, column)| *v += row + column);
        }
    }

    pub(super) fn step(&mut self, gradient: &[f32], rate: f32) {
        let lines = || gradient.chunks_exact(self.columns.len().max(1));
        let of_rows: Vec<f32> = lines().map(|line| line.iter().sum()).collect();
        let mut of_columns = vec![0.0; self.columns.len()];
        lines().for_each(|line| of_columns.iter_mut().zip(line).for_each(|(sum, g)| *sum += g));
        self.adam.0.step(&mut self.rows, &of_rows, rate);
        self.adam.1.step(&mut self.columns, &of_columns, rate);
    }
}

#[derive(Debug)]
struct Divisors {
    each: Vec<f32>,
    adam: Adam,
    lines: Lines,
}

/// What rounds to the points that were chosen while every divisor is 1: (what is divided, what is added after).
pub(super) fn divided(weight: &Weight, logs: &[f32]) -> Vec<f32> {
    let parts = weight.within_reach().into_iter().zip(&weight.float).zip(logs);
    parts.map(|((start, w), log)| w * ((-log.clamp(-REACH, REACH)).exp() - 1.0) + start).collect()
}

/// The gradient by the logarithms of divisors: −w / S each.
pub(super) fn by_logs(weight: &Weight, logs: &[f32], gradient: &[f32]) -> Vec<f32> {
    let each = gradient.iter().zip(&weight.float).zip(logs);
    each.map(|((g, w), log)| -g * w * (-log.clamp(-REACH, REACH)).exp()).collect()
}

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for FlexRound {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn start(&self, weight: &Weight, _: u64) -> Box<dyn Learned> {
        let n = weight.points.len();
        Box::new(Divisors { each: vec![0.0; n], adam: Adam::new(n), lines: Lines::new(weight.rows, n / weight.rows) })
    }
}

impl Divisors {
    fn logs(&self) -> Vec<f32> {
        let mut logs = self.each.clone();
        self.lines.add_to(&mut logs);
        logs
    }
}

impl Learned for Divisors {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let gradient = by_logs(weight, &self.logs(), gradient);
        let rate = RATE * rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        self.adam.step(&mut self.each, &gradient, rate);
        self.lines.step(&gradient, rate);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&divided(weight, &self.logs()))
    }
}
