//! Divisors before rounding: ŵ = round(w / S), learned by their logarithms.

use super::low_rank::LowRank;
use super::{Learned, Weight};
use crate::reconstruct::adam::Adam;

const RATE: f32 = 5e-4;
/// Logarithms of divisors stay within ±3.
const REACH: f32 = 3.0;

/// The part of ln S that is no sum of rows and columns.
#[derive(Debug)]
pub(super) enum Core {
    /// One logarithm per element.
    Each(Vec<f32>, Adam),
    /// A matrix of low rank.
    Product(LowRank),
}

/// ln S as a sum of parts: one per row, one per column.
#[derive(Debug)]
struct Lines {
    rows: Vec<f32>,
    columns: Vec<f32>,
    adam: (Adam, Adam),
}

impl Lines {
    fn new(rows: usize, columns: usize) -> Self {
        Self { rows: vec![0.0; rows], columns: vec![0.0; columns], adam: (Adam::new(rows), Adam::new(columns)) }
    }

    fn add_to(&self, values: &mut [f32]) {
        for (row, values) in self.rows.iter().zip(values.chunks_exact_mut(self.columns.len().max(1))) {
            values.iter_mut().zip(&self.columns).for_each(|(v, column)| *v += row + column);
        }
    }

    fn step(&mut self, gradient: &[f32], rate: f32) {
        let lines = || gradient.chunks_exact(self.columns.len().max(1));
        let of_rows: Vec<f32> = lines().map(|line| line.iter().sum()).collect();
        let mut of_columns = vec![0.0; self.columns.len()];
        lines().for_each(|line| of_columns.iter_mut().zip(line).for_each(|(sum, g)| *sum += g));
        self.adam.0.step(&mut self.rows, &of_rows, rate);
        self.adam.1.step(&mut self.columns, &of_columns, rate);
    }
}

/// ln S of every element.
#[derive(Debug)]
pub(super) struct Divisors {
    core: Core,
    lines: Lines,
}

/// What rounds to the points that were chosen while every divisor is 1: (what is divided, what is added after).
fn divided(weight: &Weight, logs: &[f32]) -> Vec<f32> {
    let parts = weight.within_reach().into_iter().zip(&weight.float).zip(logs);
    parts.map(|((start, w), log)| w * ((-log.clamp(-REACH, REACH)).exp() - 1.0) + start).collect()
}

/// The gradient by the logarithms of divisors: −w / S each.
fn by_logs(weight: &Weight, logs: &[f32], gradient: &[f32]) -> Vec<f32> {
    let each = gradient.iter().zip(&weight.float).zip(logs);
    each.map(|((g, w), log)| -g * w * (-log.clamp(-REACH, REACH)).exp()).collect()
}

impl Divisors {
    /// All divisors 1, for a `core` of 0.
    pub(super) fn new(weight: &Weight, core: Core) -> Self {
        Self { core, lines: Lines::new(weight.rows, weight.points.len() / weight.rows) }
    }

    fn logs(&self, n: usize) -> Vec<f32> {
        let mut logs = match &self.core {
            Core::Each(each, _) => each.clone(),
            Core::Product(product) => {
                let mut logs = vec![0.0; n];
                product.add_to(&mut logs);
                logs
            }
        };
        self.lines.add_to(&mut logs);
        logs
    }
}

impl Learned for Divisors {
    fn soft(&mut self, _: f32, weight: &Weight) -> Vec<f32> {
        self.hard(weight)
    }

    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight) {
        let gradient = by_logs(weight, &self.logs(gradient.len()), gradient);
        let rate = RATE * rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        match &mut self.core {
            Core::Each(each, adam) => adam.step(each, &gradient, rate),
            Core::Product(product) => product.step(&gradient, rate),
        }
        self.lines.step(&gradient, rate);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&divided(weight, &self.logs(weight.points.len())))
    }
}
