//! What a plan, or the part of it that is about one node, costs at the outputs of the model.

use std::collections::{BTreeMap, BTreeSet};

use crate::about::About;
use crate::encoding::Encoding;
use crate::exec::Executor;
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::model::{Model, Plan};
use crate::parallel;
use crate::pass::{PassContext, PassError, Wish};
use crate::reconstruct::SALIENCIES;
use crate::returned::{Returned, returned};
use crate::rounding;
use crate::simulate::Simulation;
use crate::tensor::{DType, Tensor};

/// So many of the likeliest classes are told apart by [`Metric::KlTop`]; the others count as one.
const TOP: usize = 32;

/// Models with more bytes of constants are made ready once at a time.
const LARGE: usize = 256 << 20;

/// How the outputs of two models are compared. Both are 0 for equal outputs and never negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The squared error over the square, each summed over all samples; mean over the outputs.
    Error,
    /// Per row of logits or probabilities the Kullback-Leibler divergence, in nats, over the likeliest classes and all others as one; mean
    /// over rows.
    KlTop,
}

/// The metrics by name.
pub static METRICS: &[(Metric, About)] = &[
    (
        Metric::Error,
        About {
            name: "error",
            doc: "Squared error of the outputs over their square, with one weight rounded after the other: a run of the model for each.",
            source: "output probes as in Dong et al. 2019 (HAWQ), arXiv:1905.03696",
        },
    ),
    (
        Metric::KlTop,
        About {
            name: "kl-top",
            doc: "Divergence of the likeliest 32 classes of the softmax of the outputs, or of the outputs where a softmax computes them, all \
                  others taken as one, with one weight rounded after the other: a run of the model for each.",
            source: "output probes as in Dong et al. 2019 (HAWQ), arXiv:1905.03696",
        },
    ),
];

/// What tells how much rounding a weight costs without gradients, and without a run of the model for every weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The weight alone.
    Weights,
    /// What GPTQ leaves of what the layer returns.
    Moments,
    /// The same, expected before anything is rounded.
    Pivots,
}

/// The forms by name.
pub static FORMS: &[(Form, About)] = &[
    (
        Form::Weights,
        About {
            name: "weights",
            doc: "Squared rounding errors of a weight over its square: of the weight alone, no data.",
            source: "signal to noise of weights; as the cheapest of several sensitivities, ours",
        },
    ),
    (
        Form::Moments,
        About {
            name: "moments",
            doc: "Squared error of what a layer returns over its square, its weight rounded by GPTQ: tr(Δ H Δᵀ) over tr(W H Wᵀ), with H the \
                  second moments of what it reads. What follows a layer plays no part, so that it ranks layers of one kind.",
            source: "the objective of Frantar et al. 2022 (GPTQ), arXiv:2210.17323; forward runs alone in place of the gradients of Xiao et \
                     al. 2025 (TaCQ), arXiv:2504.07389",
        },
    ),
    (
        Form::Pivots,
        About {
            name: "pivots",
            doc: "The same as expected before anything is rounded: Σ D s² / 12 over tr(W H Wᵀ), with s the steps and D the pivots of H = M D Mᵀ \
                  in the order of GPTQ.",
            source: "Chee et al. 2023 (QuIP), arXiv:2307.13304, section 3; as a sensitivity ours",
        },
    ),
];

impl Form {
    /// What has to be measured for it.
    pub(crate) fn wishes(self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if self == Self::Weights { BTreeSet::new() } else { rounding::wished(model, cx) }
    }

    /// What the weight of `node` loses in each of `encodings`; `None` where only the weight tells.
    pub(crate) fn losses(self, model: &Model, node: NodeId, encodings: &[Encoding]) -> Option<Vec<f64>> {
        if self == Self::Weights { None } else { rounding::losses(model, node, encodings, self) }
    }
}

/// What tells which weights need bits: the metrics, forms without gradients, and what gradients say of all weights at once.
pub fn all() -> impl Iterator<Item = &'static About> {
    let forms = FORMS.iter().map(|(_, about)| about);
    METRICS.iter().map(|(_, about)| about).chain(forms).chain(SALIENCIES.iter().map(|saliency| &saliency.about))
}

/// A float model with its outputs for some samples.
pub struct Probe<'a> {
    graph: &'a Graph,
    executor: &'a dyn Executor,
    metric: Metric,
    /// Which outputs are probabilities.
    shares: Vec<bool>,
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
        let float = Simulation::prepare(graph, &Plan::default(), cx.executor, graph.outputs())?;
        let n = samples.clamp(1, dataset.len());
        let sample = |i: usize| -> Result<Sample, PassError> {
            let feeds = dataset.sample(i * dataset.len() / n)?;
            let outputs = float.run(&feeds)?;
            Ok(Sample { feeds, outputs })
        };
        let samples = (0..n).map(sample).collect::<Result<Vec<_>, _>>()?;
        if !samples.iter().flat_map(|sample| &sample.outputs).any(|output| output.dtype() == DType::F32) {
            return Err(PassError::Model("none of its outputs is a float tensor: losses cannot be measured".into()));
        }
        let shares = graph.outputs().iter().map(|output| returned(graph, *output) == Returned::Probabilities).collect();
        Ok(Self { graph, executor: cx.executor, metric, shares, samples })
    }

    /// What `plan` costs: finite, and 0 only where all outputs are equal.
    ///
    /// # Errors
    /// [`PassError`] when it does not run.
    pub fn loss(&self, plan: &Plan) -> Result<f64, PassError> {
        let planned = Simulation::prepare(self.graph, plan, self.executor, self.graph.outputs())?;
        let mut outputs: BTreeMap<usize, Difference> = BTreeMap::new();
        for sample in &self.samples {
            for (at, (float, planned)) in sample.outputs.iter().zip(planned.run(&sample.feeds)?).enumerate() {
                if let (Some(a), Some(b)) = (float.values::<f32>(), planned.values::<f32>()) {
                    let classes = float.shape().last().copied().unwrap_or(1);
                    outputs.entry(at).or_default().add(self.metric, &a, &b, (classes, self.shares[at]));
                }
            }
        }
        Ok(outputs.values().map(Difference::loss).sum::<f64>() / outputs.len().max(1) as f64)
    }

    /// What each of `plans` costs, on the threads of `cx`; reported to its progress as `stage`.
    ///
    /// # Errors
    /// [`PassError`] when one does not run, or the user interrupts.
    pub fn losses(&self, plans: &[Plan], cx: &PassContext<'_>, stage: &str) -> Result<Vec<f64>, PassError> {
        cx.progress.begin(stage, plans.len() as u64);
        // Every worker makes a model ready for itself.
        let weights: usize = self.graph.constant_bytes();
        let workers = if weights > LARGE { 1 } else { cx.threads };
        let measured = parallel::workers(workers, plans.len(), Vec::new, |losses, at| {
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
}

/// The most that an output can lose: it is worthless then.
const WORTHLESS: f64 = 1e6;

/// What became of one output, over all samples: an error and what it is measured by.
#[derive(Debug, Default)]
struct Difference {
    error: f64,
    signal: f64,
}

impl Difference {
    fn add(&mut self, metric: Metric, a: &[f32], b: &[f32], (classes, shares): (usize, bool)) {
        if a.iter().zip(b).any(|(a, b)| a.is_finite() != b.is_finite()) {
            self.error = f64::INFINITY;
            return;
        }
        match metric {
            Metric::Error => {
                for (a, b) in a.iter().zip(b).filter(|(a, _)| a.is_finite()) {
                    self.error += (f64::from(*a) - f64::from(*b)).powi(2);
                    self.signal += f64::from(*a).powi(2);
                }
            }
            Metric::KlTop => {
                let (error, rows) = kl_top(a, b, classes, shares);
                self.error += error;
                self.signal += rows as f64;
            }
        }
    }

    fn loss(&self) -> f64 {
        let loss = if self.error > 0.0 { self.error / self.signal } else { 0.0 };
        if loss.is_finite() { loss.min(WORTHLESS) } else { WORTHLESS }
    }
}

/// The summed divergence, in nats, of rows `b` from rows `a` of `classes` logits, or of probabilities where they are `shares`, over the
/// likeliest classes and all others as one; and how many rows there are.
///
/// Rows `a` that do not sum to 1 are no probabilities, and count for nothing.
pub fn kl_top(a: &[f32], b: &[f32], classes: usize, shares: bool) -> (f64, usize) {
    let rows: Vec<f64> = a
        .chunks_exact(classes.max(1))
        .zip(b.chunks_exact(classes.max(1)))
        .filter(|(a, _)| !shares || (a.iter().sum::<f32>() - 1.0).abs() < 1e-3)
        .map(|(a, b)| {
            let mut order: Vec<usize> = (0..a.len()).collect();
            if order.len() > TOP {
                order.select_nth_unstable_by(TOP, |&i, &j| a[j].total_cmp(&a[i]).then(i.cmp(&j)));
                order.truncate(TOP);
            }
            let of = if shares { among } else { probabilities };
            let (p, q) = (of(a, &order), of(b, &order));
            let term = |(p, q): (&f64, &f64)| if *p > 0.0 { p * (p / q.max(1e-30)).ln() } else { 0.0 };
            p.iter().zip(&q).map(term).sum::<f64>().max(0.0)
        })
        .collect();
    (rows.iter().sum(), rows.len())
}

/// Probabilities at `chosen`, and what is left for all others; in codes they need not sum to 1.
fn among(row: &[f32], chosen: &[usize]) -> Vec<f64> {
    let share = |v: f32| if v.is_finite() { f64::from(v.max(0.0)) } else { 0.0 };
    let total = row.iter().map(|&v| share(v)).sum::<f64>().max(f64::MIN_POSITIVE);
    with_the_rest(chosen.iter().map(|&i| share(row[i]) / total).collect())
}

/// `p`, and what it leaves of 1.
fn with_the_rest(mut p: Vec<f64>) -> Vec<f64> {
    p.push((1.0 - p.iter().sum::<f64>()).max(0.0));
    p
}

/// Softmax at `chosen`, and what is left for all others.
fn probabilities(logits: &[f32], chosen: &[usize]) -> Vec<f64> {
    let top = logits.iter().copied().filter(|v| v.is_finite()).fold(f32::MIN, f32::max);
    let weight = |v: f32| if v.is_finite() { f64::from(v - top).exp() } else { 0.0 };
    let total: f64 = logits.iter().map(|&v| weight(v)).sum::<f64>().max(f64::MIN_POSITIVE);
    with_the_rest(chosen.iter().map(|&i| weight(logits[i]) / total).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::mixed;

    #[test]
    fn equal_outputs_lose_nothing_and_others_do() {
        let a: Vec<f32> = (0..80).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = a.iter().map(|v| v + 0.1).collect();
        let loss = |metric: Metric, a: &[f32], b: &[f32]| {
            let mut difference = Difference::default();
            difference.add(metric, a, b, (40, false));
            difference.loss()
        };
        let relative_error = |a: &[f32], b: &[f32]| loss(Metric::Error, a, b);
        let kl_top = |a: &[f32], b: &[f32]| loss(Metric::KlTop, a, b);
        assert!(relative_error(&a, &a) == 0.0 && kl_top(&a, &a) == 0.0);
        let want = 80.0 * 0.01 / a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        assert!((relative_error(&a, &b) / want - 1.0).abs() < 1e-4);
        // Softmax does not see a shift of all logits.
        assert!(kl_top(&a, &b) < 1e-9);
        let c: Vec<f32> = a.iter().map(|v| v * 2.0).collect();
        assert!(kl_top(&a, &c) > 0.01);
        // Whatever happens, a loss is a number.
        for (a, b) in [([1.0], [f32::NAN]), ([0.0], [1.0]), ([f32::INFINITY], [0.0])] {
            assert!((relative_error(&a, &b) - WORTHLESS).abs() < 1e-9, "{a:?} {b:?}");
        }
        assert!(relative_error(&[f32::INFINITY, 1.0], &[f32::INFINITY, 1.0]) == 0.0);
    }

    /// Rows of logits in whole multiples of 1/64, of which some are so unlikely that they are not finite.
    fn drawn(seed: u64, n: usize) -> Vec<f32> {
        let at = |i: u64| match mixed(seed << 32 | i) % 1025 {
            0 => f32::NEG_INFINITY,
            number => number as f32 / 64.0 - 8.0,
        };
        (0..n as u64).map(at).collect()
    }

    #[test]
    fn divergences_of_logits_are_never_negative_and_blind_to_shifts_and_order() {
        for seed in 0..40 {
            for classes in [1, 5, 40, 100] {
                let (a, b) = (drawn(2 * seed, 3 * classes), drawn(2 * seed + 1, 3 * classes));
                let (loss, rows) = kl_top(&a, &b, classes, false);
                assert!(loss >= 0.0 && loss.is_finite() && rows == 3, "{seed} {classes}: {loss}");
                let shifted: Vec<f32> = a.iter().map(|v| v + 3.0).collect();
                let (zero, _) = kl_top(&a, &shifted, classes, false);
                assert!((0.0..1e-12).contains(&zero), "{seed} {classes}: {zero}");
                assert!(classes == 1 || loss > 1e-6, "{seed} {classes}: {loss}");
                // Classes in another order, where all of them are told apart.
                if classes <= TOP {
                    let turned =
                        |x: &[f32]| x.chunks(classes).flat_map(|row| row.iter().rev().copied()).collect::<Vec<_>>();
                    let (again, _) = kl_top(&turned(&a), &turned(&b), classes, false);
                    assert!((again - loss).abs() < 1e-9 * (1.0 + loss), "{seed} {classes}: {again} {loss}");
                }
            }
        }
    }

    /// Behind a softmax outputs are compared as they are.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "probabilities as a model returns them")]
    fn probabilities_diverge_as_their_logits_do() {
        for classes in [5, 40, 100] {
            let (a, b) = (drawn(2, 3 * classes), drawn(3, 3 * classes));
            let softmax = |logits: &[f32]| -> Vec<f32> {
                let all: Vec<usize> = (0..classes).collect();
                logits
                    .chunks(classes)
                    .flat_map(|row| probabilities(row, &all)[..classes].to_vec())
                    .map(|p| p as f32)
                    .collect()
            };
            let ((of_logits, _), (loss, rows)) =
                (kl_top(&a, &b, classes, false), kl_top(&softmax(&a), &softmax(&b), classes, true));
            assert!((loss / of_logits - 1.0).abs() < 1e-3 && rows == 3, "{classes}: {loss} {of_logits}");
        }
    }
}
