//! Divisors before rounding: ŵ = round(w / S), learned by their logarithms. w is moved so near to the point that was chosen that it rounds
//! to that while S is 1, and no sign changes.

use super::low_rank::LowRank;
use super::{Learned, Weight};
use crate::reconstruct::adam::Adam;
use crate::reconstruct::ledger::Ledger;

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

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.rows);
        ledger.floats(&mut self.columns);
        self.adam.0.show(ledger);
        self.adam.1.show(ledger);
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

/// What rounds to the points that were chosen while every divisor is 1.
fn divided(weight: &Weight, logs: &[f32]) -> Vec<f32> {
    let parts = weight.within_reach().into_iter().zip(logs);
    parts.map(|(w, log)| w * (-log.clamp(-REACH, REACH)).exp()).collect()
}

/// The gradient by the logarithms of divisors: −w / S each.
fn by_logs(weight: &Weight, logs: &[f32], gradient: &[f32]) -> Vec<f32> {
    gradient.iter().zip(divided(weight, logs)).map(|(g, w)| -g * w).collect()
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

    fn show(&mut self, ledger: &mut Ledger<'_>) {
        match &mut self.core {
            Core::Each(each, adam) => {
                ledger.floats(each);
                adam.show(ledger);
            }
            Core::Product(product) => product.show(ledger),
        }
        self.lines.show(ledger);
    }

    fn hard(&self, weight: &Weight) -> Vec<f32> {
        weight.rounded(&divided(weight, &self.logs(weight.points.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::weight;
    use super::*;
    use crate::seed::{mixed, uniform};

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn drawn(seed: u64, reach: f64) -> Vec<f32> {
        (0..24_u64).map(|at| (reach * (2.0 * uniform(mixed(seed) ^ at) - 1.0)) as f32).collect()
    }

    #[test]
    fn no_weight_changes_its_sign() {
        for grid in ["int2", "int3", "int4", "int8", "int4-narrow"] {
            let weight = weight(grid, 0);
            for seed in 0..50 {
                let points = weight.rounded(&divided(&weight, &drawn(seed, 3.0)));
                for (point, float) in points.iter().zip(&weight.float) {
                    assert!(point * float >= 0.0, "{grid}: {float} became {point}");
                }
            }
        }
    }

    /// Central differences of the sum of products of a gradient with what is divided.
    #[test]
    fn gradients_are_those_of_what_is_divided() {
        let step = 0.01_f32;
        for grid in ["int2", "int4", "float4e2m1"] {
            let weight = weight(grid, 0);
            for seed in 0..20 {
                let (logs, gradient) = (drawn(seed, 2.9), drawn(seed + 1000, 1.0));
                let at = |by: f32| divided(&weight, &logs.iter().map(|log| log + by).collect::<Vec<f32>>());
                let (above, below) = (at(step), at(-step));
                for (i, got) in by_logs(&weight, &logs, &gradient).into_iter().enumerate() {
                    let want = gradient[i] * (above[i] - below[i]) / (2.0 * step);
                    assert!((got - want).abs() < 2e-3 * (1.0 + want.abs()), "{grid}, {i}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn divisors_of_any_size_stay_finite() {
        let weight = weight("int4", 0);
        for log in [1e6_f32, -1e6, f32::MAX, f32::MIN] {
            let logs = [log; 24];
            let units = divided(&weight, &logs);
            let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
            assert!(finite(&units) && finite(&weight.rounded(&units)), "{log}");
            assert!(finite(&by_logs(&weight, &logs, &[1.0; 24])), "{log}");
        }
    }
}
