//! The loop that learns the weights of one block.

use rayon::prelude::*;

use super::adam::Adam;
use super::objective::{Objective, Outcome};
use super::parameterization::{Learned, Parameterization};
use crate::grad::GradError;
use crate::seed;

/// What the user can set.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) method: &'static dyn Parameterization,
    pub(super) iterations: usize,
    pub(super) batch: usize,
    /// Times the usual rate.
    pub(super) rate: f32,
    /// The share of activations that stay in float while learning, in thousandths.
    pub(super) drop: i64,
    /// Whether biases are learned too.
    pub(super) biases: bool,
    /// Whether scales of weights are learned too.
    pub(super) scales: bool,
    /// Whether scales of activations are learned too.
    pub(super) steps: bool,
    /// How errors are measured.
    pub(super) loss: super::measure::Wish,
}

/// The rate of biases, in units of their root mean square.
const BIAS_RATE: f32 = 1e-3;
/// The rate of the logarithms of scales.
const SCALE_RATE: f32 = 5e-4;
/// The same of activations.
const STEP_RATE: f32 = 1e-3;

/// Rates are meant for so many steps; they rise where there are fewer.
const USUAL_STEPS: f32 = 1000.0;
/// So often what has been learned is judged on the way.
const CHECKS: usize = 10;

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

/// Learns for as long as `settings` say, or until `tick` says no; returns what was best on the samples that were held out.
pub(super) fn learn(
    objective: &Objective<'_>,
    settings: &Settings,
    start: &Outcome,
    seed: u64,
    mut tick: impl FnMut() -> bool,
) -> Result<Outcome, GradError> {
    let mut learned: Vec<Box<dyn Learned>> =
        objective.weights.iter().enumerate().map(|(i, w)| settings.method.start(w, seed ^ i as u64)).collect();
    let mut at = start.clone();
    let mut biases = Beside::new(&at.biases, |bias| BIAS_RATE * root_mean_square(bias).max(1e-6));
    let mut scales = Beside::new(&at.scales, |_| SCALE_RATE);
    let mut steps = Adam::new(at.steps.len());
    // So that as few steps get as far.
    let rate = settings.rate * (USUAL_STEPS / settings.iterations.max(1) as f32).clamp(1.0, 10.0);
    let mut order = Order::new(&objective.fitted, seed);
    let hardened = |at: &Outcome, learned: &[Box<dyn Learned>]| Outcome {
        units: learned.iter().zip(&objective.weights).map(|(learned, weight)| learned.hard(weight)).collect(),
        ..at.clone()
    };
    let mut best = (objective.held_out_loss(start)?, start.clone());
    for iteration in 0..settings.iterations {
        if !tick() {
            break;
        }
        if iteration % (settings.iterations / CHECKS).max(1) == 0 && iteration > 0 {
            best = better(objective, best, hardened(&at, &learned))?;
        }
        let progress = iteration as f32 / settings.iterations as f32;
        let each = at.units.par_iter_mut().zip(&mut learned).zip(&objective.weights);
        each.for_each(|((units, learned), weight)| *units = learned.soft(progress, weight));
        let batch = order.next(settings.batch);
        let grads = objective.gradients(&at, &batch, settings.drop, seed ^ iteration as u64)?;
        if grads.weights.iter().chain(&grads.biases).chain([&grads.steps]).flatten().any(|g| !g.is_finite()) {
            break; // what has been learned so far is judged as it is
        }
        let decay = rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
        let parts = (&grads.weights, &objective.weights, &at.units, &mut at.scales, &mut learned, &mut scales.adam);
        parts.into_par_iter().filter(|(grad, ..)| !grad.is_empty()).for_each(
            |(grad, weight, units, scale, learned, adam)| {
                let by_unit: Vec<f32> =
                    grad.iter().zip(&weight.groups).map(|(g, group)| g * scale[*group as usize]).collect();
                if settings.scales {
                    step_scales(scale, &by_unit, units, &weight.groups, |moved, by| {
                        adam.step(moved, by, SCALE_RATE * decay);
                    });
                }
                learned.step(&by_unit, progress, rate, weight);
            },
        );
        steps.step(&mut at.steps, &grads.steps, STEP_RATE * decay);
        for (i, grad) in grads.biases.iter().enumerate().filter(|(_, grad)| settings.biases && !grad.is_empty()) {
            biases.step(i, &mut at.biases[i], grad, decay);
        }
    }
    Ok(better(objective, best, hardened(&at, &learned))?.1)
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
struct Order {
    all: Vec<usize>,
    left: Vec<usize>,
    seed: u64,
}

impl Order {
    fn new(all: &[usize], seed: u64) -> Self {
        Self { all: all.to_vec(), left: Vec::new(), seed }
    }

    fn next(&mut self, count: usize) -> Vec<usize> {
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
