//! What a plan, or the part of it that is about one node, costs at the outputs of the model.

use crate::exec::Executor;
use crate::ir::Graph;
use crate::model::Plan;
use crate::parallel;
use crate::pass::{PassContext, PassError};
use crate::simulate::{Simulation, is_float};
use crate::tensor::Tensor;

/// So many of the likeliest classes are told apart by [`Metric::KlTop`]; the others count as one.
const TOP: usize = 32;

/// How the outputs of two models are compared. Both are 0 for equal outputs and never negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The squared error over the square, mean over the outputs.
    Error,
    /// Per row of logits the Kullback-Leibler divergence, in nats, over the likeliest classes and all others as one; mean over rows.
    KlTop,
}

/// The metrics by name.
pub static METRICS: &[(&str, Metric)] = &[("error", Metric::Error), ("kl-top", Metric::KlTop)];

/// A float model with its outputs for some samples.
pub struct Probe<'a> {
    graph: &'a Graph,
    executor: &'a dyn Executor,
    metric: Metric,
    samples: Vec<Sample>,
}

struct Sample {
    feeds: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

impl std::fmt::Debug for Probe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Probe({:?} on {} samples)", self.metric, self.samples.len())
    }
}

impl<'a> Probe<'a> {
    /// Runs at most so many samples of `cx`, evenly spread, through `graph`.
    ///
    /// # Errors
    /// [`PassError::NoData`] without samples; [`PassError::Model`] where no output is a float tensor.
    pub fn new(graph: &'a Graph, cx: &PassContext<'a>, samples: usize, metric: Metric) -> Result<Self, PassError> {
        let dataset = cx.dataset.filter(|data| !data.is_empty()).ok_or(PassError::NoData)?;
        if !graph.outputs().iter().any(|output| is_float(graph, *output)) {
            return Err(PassError::Model("none of its outputs is a float tensor: losses cannot be measured".into()));
        }
        let float = Simulation::prepare(graph, &Plan::default(), cx.executor, graph.outputs())?;
        let n = samples.clamp(1, dataset.len());
        let sample = |i: usize| -> Result<Sample, PassError> {
            let feeds = dataset.sample(i * dataset.len() / n)?;
            let outputs = float.run(&feeds)?;
            Ok(Sample { feeds, outputs })
        };
        let samples = (0..n).map(sample).collect::<Result<_, _>>()?;
        Ok(Self { graph, executor: cx.executor, metric, samples })
    }

    /// What `plan` costs.
    ///
    /// # Errors
    /// [`PassError`] when it does not run.
    pub fn loss(&self, plan: &Plan) -> Result<f64, PassError> {
        let planned = Simulation::prepare(self.graph, plan, self.executor, self.graph.outputs())?;
        let mut sum = 0.0;
        for sample in &self.samples {
            sum += self.difference(&sample.outputs, &planned.run(&sample.feeds)?);
        }
        Ok(sum / self.samples.len() as f64)
    }

    /// What each of `plans` costs, on the threads of `cx`; reported to its progress as `stage`.
    ///
    /// # Errors
    /// [`PassError`] when one does not run, or the user interrupts.
    pub fn losses(&self, plans: &[Plan], cx: &PassContext<'_>, stage: &str) -> Result<Vec<f64>, PassError> {
        cx.progress.begin(stage, plans.len() as u64);
        let measured = parallel::workers(cx.threads, plans.len(), Vec::new, |losses, at| {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            losses.push((at, self.loss(&plans[at])?));
            cx.progress.step();
            Ok(())
        });
        cx.progress.end();
        let mut losses: Vec<(usize, f64)> = measured?.into_iter().flatten().collect();
        losses.sort_by_key(|(at, _)| *at);
        Ok(losses.into_iter().map(|(_, loss)| loss).collect())
    }

    fn difference(&self, float: &[Tensor], planned: &[Tensor]) -> f64 {
        let pairs = float.iter().zip(planned).filter_map(|(a, b)| Some((a, a.values::<f32>()?, b.values::<f32>()?)));
        let losses: Vec<f64> = pairs
            .map(|(tensor, a, b)| match self.metric {
                Metric::Error => relative_error(&a, &b),
                Metric::KlTop => kl_top(&a, &b, tensor.shape().last().copied().unwrap_or(1)),
            })
            .collect();
        losses.iter().sum::<f64>() / losses.len().max(1) as f64
    }
}

/// Σ (a − b)² / Σ a²; what is not finite in both is left out, and infinite where it is finite in one.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let (mut error, mut signal) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        match (a.is_finite(), b.is_finite()) {
            (true, true) => {
                error += (f64::from(*a) - f64::from(*b)).powi(2);
                signal += f64::from(*a).powi(2);
            }
            (false, false) => {}
            _ => return f64::INFINITY,
        }
    }
    if error > 0.0 { error / signal.max(f64::MIN_POSITIVE) } else { 0.0 }
}

/// The mean divergence of rows of `classes` logits.
fn kl_top(a: &[f32], b: &[f32], classes: usize) -> f64 {
    let rows: Vec<f64> = a
        .chunks_exact(classes.max(1))
        .zip(b.chunks_exact(classes.max(1)))
        .map(|(a, b)| {
            let mut order: Vec<usize> = (0..a.len()).collect();
            if order.len() > TOP {
                order.select_nth_unstable_by(TOP, |&i, &j| a[j].total_cmp(&a[i]).then(i.cmp(&j)));
                order.truncate(TOP);
            }
            let (p, q) = (probabilities(a, &order), probabilities(b, &order));
            let term = |(p, q): (&f64, &f64)| if *p > 0.0 { p * (p / q.max(1e-30)).ln() } else { 0.0 };
            p.iter().zip(&q).map(term).sum::<f64>().max(0.0)
        })
        .collect();
    rows.iter().sum::<f64>() / rows.len().max(1) as f64
}

/// Softmax at `chosen`, and what is left for all others.
fn probabilities(logits: &[f32], chosen: &[usize]) -> Vec<f64> {
    let top = logits.iter().copied().filter(|v| v.is_finite()).fold(f32::MIN, f32::max);
    let weight = |v: f32| if v.is_finite() { f64::from(v - top).exp() } else { 0.0 };
    let total: f64 = logits.iter().map(|&v| weight(v)).sum::<f64>().max(f64::MIN_POSITIVE);
    let mut p: Vec<f64> = chosen.iter().map(|&i| weight(logits[i]) / total).collect();
    p.push((1.0 - p.iter().sum::<f64>()).max(0.0));
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_outputs_lose_nothing_and_others_do() {
        let a: Vec<f32> = (0..80).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = a.iter().map(|v| v + 0.1).collect();
        assert!(relative_error(&a, &a) == 0.0 && kl_top(&a, &a, 40) == 0.0);
        let want = 80.0 * 0.01 / a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        assert!((relative_error(&a, &b) / want - 1.0).abs() < 1e-4);
        // Softmax does not see a shift of all logits.
        assert!(kl_top(&a, &b, 40) < 1e-9);
        let c: Vec<f32> = a.iter().map(|v| v * 2.0).collect();
        assert!(kl_top(&a, &c, 40) > 0.01);
        assert!(relative_error(&[1.0], &[f32::NAN]).is_infinite());
    }
}
