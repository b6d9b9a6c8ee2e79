//! The loop that learns the weights of one block.

use rayon::prelude::*;

use super::adam::Adam;
use super::ledger::Ledger;
use super::objective::Objective;
use super::parameterization::{Learned, Weight};
use super::run::{Gradients, Outcome};
use super::settings::{Part, Settings};
use crate::grad::GradError;
use crate::parallel;
use crate::seed;

/// The rate of biases, in units of their root mean square.
const BIAS_RATE: f32 = 1e-3;
/// The rate of the logarithms of scales.
const SCALE_RATE: f32 = 5e-4;
/// The same of activations.
const STEP_RATE: f32 = 1e-3;

/// Rates are meant for so many steps; they rise where there are fewer.
const USUAL_STEPS: f32 = 1000.0;

/// Numbers that are learned beside the points.
struct Beside {
    adam: Vec<Adam>,
    rates: Vec<f32>,
}

impl Beside {
    fn new(numbers: &[Vec<f32>], rate: impl Fn(&[f32]) -> f32) -> Self {
        Self {
            adam: numbers.iter().map(|numbers| Adam::new(numbers.len())).collect(),
            rates: numbers.iter().map(|numbers| rate(numbers)).collect(),
        }
    }

    fn step(&mut self, i: usize, numbers: &mut [f32], gradient: &[f32], rate: f32) {
        self.adam[i].step(numbers, gradient, self.rates[i] * rate);
    }
}

fn root_mean_square(values: &[f32]) -> f32 {
    (values.iter().map(|v| v * v).sum::<f32>() / values.len().max(1) as f32).sqrt()
}

/// What is learned of a block, on its way.
pub(super) struct Course<'a> {
    settings: &'a Settings,
    /// Times what rates usually are, so that fewer steps get as far.
    rate: f32,
    /// `None` where codes stay as they are.
    learned: Vec<Option<Box<dyn Learned>>>,
    /// Where it is now; the units are those of the last [`Self::soften`].
    pub(super) at: Outcome,
    biases: Beside,
    scales: Beside,
    steps: Adam,
}

impl<'a> Course<'a> {
    /// Begins at `start`; what is drawn is drawn from `seed`.
    pub(super) fn new(settings: &'a Settings, weights: &[Weight], start: Outcome, seed: u64) -> Self {
        let numbers: Vec<usize> = (0..weights.len()).collect();
        let learned =
            |&i: &usize| settings.learns(Part::Codes).then(|| settings.method.start(&weights[i], seed ^ i as u64));
        let learned = parallel::map(&numbers, learned);
        Self {
            settings,
            rate: settings.rate * (USUAL_STEPS / settings.iterations.max(1) as f32).clamp(1.0, 10.0),
            learned,
            biases: Beside::new(&start.biases, |bias| BIAS_RATE * root_mean_square(bias).max(1e-6)),
            scales: Beside::new(&start.scales, |_| SCALE_RATE),
            steps: Adam::new(start.steps.len()),
            at: start,
        }
    }

    /// The weights as they are at `progress` of the way.
    pub(super) fn soften(&mut self, weights: &[Weight], progress: f32) {
        self.at.units.resize_with(weights.len(), Vec::new);
        let each = self.at.units.par_iter_mut().zip(&mut self.learned).zip(weights);
        each.for_each(|((units, learned), weight)| {
            *units = learned.as_mut().map_or_else(|| weight.points.clone(), |learned| learned.soft(progress, weight));
        });
    }

    /// Moves everything against `grads`, which are by what [`Self::soften`] gave at `progress`.
    pub(super) fn step(&mut self, weights: &[Weight], grads: &Gradients, progress: f32) {
        let settings = self.settings;
        let rate = self.rate * settings.warmth(progress);
        let decay = rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        let parts =
            (&grads.weights, weights, &self.at.units, &mut self.at.scales, &mut self.learned, &mut self.scales.adam);
        parts.into_par_iter().filter(|(grad, ..)| !grad.is_empty()).for_each(
            |(grad, weight, units, scale, learned, adam)| {
                let by_unit: Vec<f32> =
                    grad.iter().zip(&weight.groups).map(|(g, group)| g * scale[*group as usize]).collect();
                if settings.learns(Part::Scales) {
                    step_scales(scale, &by_unit, units, &weight.groups, |moved, by| {
                        adam.step(moved, by, SCALE_RATE * decay);
                    });
                }
                if let Some(learned) = learned {
                    learned.step(&by_unit, progress, rate, weight);
                }
            },
        );
        self.steps.step(&mut self.at.steps, &grads.steps, STEP_RATE * decay);
        // Of biases and norms those that are not learned have no gradients.
        let learns_rows = settings.learns(Part::Biases) || settings.learns(Part::Norms);
        for (i, grad) in grads.biases.iter().enumerate().filter(|(_, grad)| learns_rows && !grad.is_empty()) {
            self.biases.step(i, &mut self.at.biases[i], grad, decay);
        }
    }

    /// Shows all that steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        self.learned.iter_mut().flatten().for_each(|learned| learned.show(ledger));
        let Outcome { scales, biases, steps, .. } = &mut self.at;
        scales.iter_mut().chain(biases).chain([steps]).for_each(|numbers| ledger.floats(numbers));
        let beside = self.biases.adam.iter_mut().chain(&mut self.scales.adam);
        beside.chain([&mut self.steps]).for_each(|adam| adam.show(ledger));
    }

    /// What it has come to, on the grid.
    pub(super) fn hardened(&self, weights: &[Weight]) -> Outcome {
        let numbers: Vec<usize> = (0..weights.len()).collect();
        let hard = |&i: &usize| {
            let learned = self.learned[i].as_ref();
            learned.map_or_else(|| weights[i].points.clone(), |learned| learned.hard(&weights[i]))
        };
        let units = parallel::map(&numbers, hard);
        Outcome { units, scales: self.at.scales.clone(), biases: self.at.biases.clone(), steps: self.at.steps.clone() }
    }
}

/// Learns for as long as `settings` say, or until `tick`, which hears the least loss so far, says no; returns what was best on the samples
/// that were held out.
///
/// # Errors
/// [`GradError`] where the model does not run, or gradients are no numbers before anything was gained.
pub(super) fn learn(
    objective: &Objective<'_>,
    settings: &Settings,
    start: &Outcome,
    seed: u64,
    mut tick: impl FnMut(f64) -> bool,
) -> Result<Outcome, GradError> {
    let mut course = Course::new(settings, &objective.weights, start.clone(), seed);
    let mut order = Order::new(&objective.fitted, seed);
    let mut best = (objective.held_out_loss(start)?, start.clone());
    let mut in_vain = 0;
    for iteration in 0..settings.iterations {
        if !tick(best.0) {
            break;
        }
        if settings.is_check(iteration) {
            let before = best.0;
            best = better(objective, best, course.hardened(&objective.weights))?;
            in_vain = if best.0 < before { 0 } else { in_vain + 1 };
            if !settings.goes_on(in_vain) {
                return Ok(best.1);
            }
        }
        let progress = iteration as f32 / settings.iterations as f32;
        course.soften(&objective.weights, progress);
        let batch = order.next(settings.batch);
        let grads = objective.gradients(&course.at, &batch, settings.drop, seed ^ iteration as u64)?;
        if !grads.are_finite() {
            // What has been learned so far is judged as it is.
            let first = objective.held_out_loss(start)?;
            let (loss, learned) = better(objective, best, course.hardened(&objective.weights))?;
            let problem = || GradError(format!("its gradients are no numbers in step {}", iteration + 1));
            return if loss < first { Ok(learned) } else { Err(problem()) };
        }
        course.step(&objective.weights, &grads, progress);
    }
    Ok(better(objective, best, course.hardened(&objective.weights))?.1)
}

/// Moves `scales`, by the gradient of what they are multiplied with, as `step` does with their logarithms.
fn step_scales(
    scales: &mut [f32],
    by_unit: &[f32],
    units: &[f32],
    groups: &[u32],
    step: impl FnOnce(&mut [f32], &[f32]),
) {
    // d/d ln s of s · u is s · u.
    let mut by_log = vec![0.0; scales.len()];
    for ((g, unit), group) in by_unit.iter().zip(units).zip(groups) {
        by_log[*group as usize] += g * unit;
    }
    let mut moved = vec![0.0; by_log.len()];
    step(&mut moved, &by_log);
    scales.iter_mut().zip(moved).for_each(|(scale, log)| *scale *= log.exp());
}

/// The better one on the samples that were held out.
fn better(objective: &Objective<'_>, best: (f64, Outcome), new: Outcome) -> Result<(f64, Outcome), GradError> {
    let loss = objective.held_out_loss(&new)?;
    Ok(if loss < best.0 { (loss, new) } else { best })
}

/// Samples in an order drawn anew for every round.
pub(super) struct Order {
    all: Vec<usize>,
    left: Vec<usize>,
    seed: u64,
}

impl Order {
    pub(super) fn new(all: &[usize], seed: u64) -> Self {
        Self { all: all.to_vec(), left: Vec::new(), seed }
    }

    pub(super) fn next(&mut self, count: usize) -> Vec<usize> {
        let mut batch = Vec::new();
        while batch.len() < count.min(self.all.len()) {
            if self.left.is_empty() {
                self.seed = seed::mixed(self.seed);
                self.left.clone_from(&self.all);
                self.left.sort_by_key(|i| seed::mixed(self.seed ^ (*i as u64)));
            }
            batch.extend(self.left.pop());
        }
        batch
    }
}
