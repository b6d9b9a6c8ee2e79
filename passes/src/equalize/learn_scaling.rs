//! Factors of channels, learned.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::annealing::Annealing;
use super::awq;
use super::divided::{self, AT_ONCE, Choice, Group, groups, last_axis};
use super::pivots::{self, Errors, Moments};
use super::rounding_loss::Rounding;
use super::scaled_loss::ScaledLoss;
use super::smooth;
use super::stream_weights::share;
use super::turned_loss::Weight;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Progress;
use crate::id::{NodeId, ValueId};
use crate::model::{Model, Patch};
use crate::observe::{Gram, Rows};
use crate::ops;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::reconstruct::Adam;

crate::declare_pass! {
    /// Divides channels of an activation by s and multiplies the weights that read them by s, as `smooth` and `awq` do, with an s that is
    /// learned, one number per channel.
    ///
    /// What is learned against is the squared error of rounding the weights to nearest in the bits and blocks of the scheme, in shares of
    /// the power of what they compute. An error in channel j costs what is left of it when later channels make up for earlier ones: the
    /// pivot of the second moments of what is read, over s². Where activations are rounded, the noise of the one range of all channels,
    /// carried through the weights, counts too. Gradients go straight through the rounding. It begins at the best s of `smooth` or `awq`,
    /// or at none, and keeps the best that was seen. All matrix products that read a tensor share one s, and the division is folded where
    /// `smooth` folds it. Factors that leave more than 97 % of the loss are dropped; a `Mul` of its own has to take two thirds of it
    /// away. Tensors of fewer than 1024 rows are left alone: factors would be fit to chance.
    INFO {
        name: "learn-scaling",
        source: "Hu et al. 2025 (OSTQuant), arXiv:2501.13987, section 4 (the diagonal half of its pairs); the loss of weights and pivots instead of that of the model: ours",
        cost: "Second moments of what products read. Then, in each of up to three rounds, every weight whose factors are not settled is rounded sweeps + 5 times whole and sweeps times in parts, in six scales. Memory: three times the weights that read one tensor, for four tensors.",
        requires: Facts::CALIBRATED,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[
            OptionInfo { name: "sweeps", doc: "times that every weight is seen, 6 by default" },
            OptionInfo { name: "rate", doc: "times the usual rate, 1 by default" },
            OptionInfo { name: "errors", doc: "compensated (default): later channels make up for them, as when codes are chosen by data; stay: rounding to nearest" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(LearnScaling::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct LearnScaling {
    annealing: Annealing,
    errors: Errors,
}

/// So many steps see every row once.
const STEPS: usize = 8;
/// The most that ln s moves in a step, at first.
const RATE: f64 = 0.05;
/// What remains of the loss must be below this for a division that is folded, or that costs a node.
const FOLDED: f64 = 0.97;
const INSERTED: f64 = 1.0 / 3.0;
/// Wider tensors have no second moments asked for: a channel costs its power there.
const MAX_WIDTH: usize = 4096;

impl LearnScaling {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { annealing: Annealing::of(options, RATE)?, errors: Errors::parse(options)? })
    }
}

impl Pass for LearnScaling {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        let graph = model.graph();
        let found = groups(graph, cx);
        let width = |group: &Group| inputs(model, *group.sinks.first()?);
        let narrow = found.iter().filter(|group| {
            self.errors == Errors::Compensated && width(group).is_some_and(|inputs| inputs <= MAX_WIDTH)
        });
        let grams: Vec<_> = narrow.map(|group| (group.value, Wish::Gram(Rows::Last))).collect();
        divided::wishes(graph, found).into_iter().chain(grams).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let (fitting, large): (Vec<Group>, Vec<Group>) =
            groups(model.graph(), cx).into_iter().partition(|group| needed(model, group) <= cx.state_budget);
        cx.progress.begin(INFO.about.name, fitting.len() as u64);
        let mut patch = divided::divide_all(model, &fitting, INSERTED, |group| {
            let choice = self.choose(model, group, cx);
            cx.progress.step();
            choice
        });
        cx.progress.end();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        for group in large {
            let (takes, left) = (needed(model, &group) / 1_000_000, cx.state_budget / 1_000_000);
            let message =
                format!("learn-scaling: what its factors are learned from takes {takes} MB, and {left} MB are left");
            let place = Place::Value(Arc::clone(&model.graph().value(group.value).name));
            patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, place, message));
        }
        Ok(patch)
    }
}

fn weight_of(model: &Model, sink: NodeId) -> Option<ValueId> {
    model.graph().node(sink)?.input(1)
}

/// How many channels the product `sink` reads, by its weight.
fn inputs(model: &Model, sink: NodeId) -> Option<usize> {
    let roles = ops::linear(model.graph(), sink)?;
    model.graph().constant(weight_of(model, sink)?)?.shape().get(1 - roles.out_axis).copied()
}

/// The bytes that learning the factors of `group` takes, with as much for others in work.
fn needed(model: &Model, group: &Group) -> u64 {
    let numbers = |sink: &NodeId| Some(model.graph().constant(weight_of(model, *sink)?)?.len() as u64);
    let weights = group.sinks.iter().filter_map(numbers).fold(0, u64::saturating_add);
    let width = group.sinks.first().and_then(|sink| inputs(model, *sink)).map_or(0, |n| n.min(MAX_WIDTH) as u64);
    // Weights, multiplied, and their slopes; moments, their factor, its inverse, and what comes of that.
    let one = weights.saturating_mul(12).saturating_add(4 * 8 * width * width);
    one.saturating_mul(AT_ONCE as u64)
}

impl LearnScaling {
    /// The best division for `group`, when it is worth it.
    fn choose(&self, model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<Choice> {
        let loss = self.loss(model, group, cx)?;
        let none = vec![1.0; loss.width()];
        let nothing = loss.at(&none);
        if !nothing.is_normal() {
            return None;
        }
        let starts = starts(model, group, cx)?;
        let tried = starts.into_iter().map(|s| group.tied(s)).map(|s| (loss.at(&s), s));
        let start = tried.chain([(nothing, none)]).min_by(|a, b| a.0.total_cmp(&b.0))?;
        let (best, divisor) = self.learn(&loss, group.shared(), start, cx.progress)?;
        tracing::debug!(tensor = %model.graph().value(group.value).name, nothing, best, "learned factors");
        (best < FOLDED * nothing).then(|| Choice { divisor, left: best / nothing })
    }

    /// What factors of the tensor of `group` lose; `None` where no product that reads it is rounded, or nothing was seen.
    fn loss(&self, model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<ScaledLoss> {
        let graph = model.graph();
        let peaks = model.stats().peaks(group.value, last_axis(graph, group.value)?)?;
        let powers = peaks.powers();
        let width = powers.len();
        // Factors fit to few rows would be fit to chance; and a product that does not fit what it reads was never run.
        let fits = group.sinks.iter().all(|sink| inputs(model, *sink) == Some(width));
        if peaks.count() < smooth::LEAST_ROWS || !fits || width == 0 {
            return None;
        }
        let measured = model.stats().gram(group.value, Rows::Last);
        let gram = measured.filter(|gram| gram.columns == width && width <= MAX_WIDTH);
        let costs = floored(gram.and_then(|gram| pivots::fixed(gram, self.errors)).unwrap_or_else(|| powers.clone()));
        let moments = gram.map(|gram: &Arc<Gram>| Moments::of(gram));
        let weights: Vec<Weight> =
            group.sinks.iter().filter_map(|id| weight(model, *id, cx, &powers, moments.as_ref())).collect();
        let levels = cx.scheme.activation_bits.map(|bits| f64::from(bits.min(24)).exp2());
        let rounded = levels.map(|levels| (peaks.values(), levels));
        (!weights.is_empty()).then(|| ScaledLoss::new(weights, costs, rounded))
    }

    /// The best of the factors on the way from `start`, which has its loss beside it; they repeat after `shared` channels, if any.
    fn learn(
        &self,
        loss: &ScaledLoss,
        shared: Option<usize>,
        start: (f64, Vec<f64>),
        progress: &dyn Progress,
    ) -> Option<(f64, Vec<f64>)> {
        let width = loss.width();
        let period = shared.unwrap_or(width).max(1);
        let first = (start.0, logarithms(&start.1[..period]));
        let spread = |logs: &[f32]| -> Vec<f64> { (0..width).map(|j| f64::from(logs[j % period]).exp()).collect() };
        #[expect(clippy::cast_possible_truncation, reason = "learned in f32")]
        let step = |logs: &mut Vec<f32>, adam: &mut Adam, step: usize, rate: f64| {
            let gradient = loss.gradient(&spread(logs), step, STEPS);
            adam.step(logs, &folded(&gradient, period), rate as f32);
            logs.iter_mut().for_each(|log| *log = log.clamp(-REACH, REACH));
        };
        let at = |logs: &Vec<f32>| Some(loss.at(&spread(logs)));
        let best = self.annealing.best(STEPS, first, || Adam::new(period), step, at, progress)?;
        let same = best.0 >= start.0;
        Some((best.0, if same { start.1 } else { spread(&best.1) }))
    }
}

/// Costs of which none is below [`SILENT`] of their mean: what samples leave silent may speak elsewhere.
fn floored(mut costs: Vec<f64>) -> Vec<f64> {
    let floor = SILENT * costs.iter().sum::<f64>() / costs.len().max(1) as f64;
    costs.iter_mut().for_each(|cost| *cost = cost.max(floor));
    costs
}

/// The least that an error in a channel costs, in means of all channels.
const SILENT: f64 = 0.01;

/// No factor is further from 1 than e to this.
const REACH: f32 = 7.0;

#[expect(clippy::cast_possible_truncation, reason = "learned in f32")]
fn logarithms(s: &[f64]) -> Vec<f32> {
    s.iter().map(|s| s.ln() as f32).collect()
}

/// Derivatives of channels that share a factor, summed; of mean size 1, since a step goes by their signs.
#[expect(clippy::cast_possible_truncation, reason = "learned in f32")]
fn folded(gradient: &[f64], period: usize) -> Vec<f32> {
    let mut sums = vec![0.0; period];
    gradient.iter().enumerate().for_each(|(j, g)| sums[j % period] += g);
    let mean = sums.iter().map(|g| g.abs()).sum::<f64>() / period as f64;
    let unit = if mean.is_normal() { 1.0 / mean } else { 0.0 };
    sums.iter().map(|g| if g.is_finite() { (g * unit) as f32 } else { 0.0 }).collect()
}

/// Divisors that need no learning.
fn starts(model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<Vec<Vec<f64>>> {
    let peaks = model.stats().peaks(group.value, last_axis(model.graph(), group.value)?)?;
    let quarters = |of: &dyn Fn(f64) -> Vec<f64>| [0.25, 0.5, 0.75, 1.0].map(of).to_vec();
    if cx.scheme.activation_bits.is_none() {
        let powers = peaks.powers();
        return Some(quarters(&|alpha| awq::divisors(&powers, alpha)));
    }
    let sinks: Vec<smooth::Sink> =
        group.sinks.iter().map(|id| smooth::sink(model.graph(), *id)).collect::<Option<_>>()?;
    let largest = smooth::largest(&sinks, peaks.values().len());
    Some(quarters(&|alpha| smooth::divisors(peaks.values(), &largest, alpha, 1e3)))
}

/// The weight of the product `id`, one row per output; `None` where it stays in float, or computes nothing.
fn weight(
    model: &Model,
    id: NodeId,
    cx: &PassContext<'_>,
    powers: &[f64],
    moments: Option<&Moments>,
) -> Option<Weight> {
    let graph = model.graph();
    let rounding = Rounding::of(graph, cx, (id, weight_of(model, id)?), powers.len())?;
    let tensor = graph.constant(weight_of(model, id)?)?;
    let by_output = if ops::linear(graph, id)?.out_axis == 0 { None } else { Some(tensor.transposed()?) };
    let rows = by_output.as_ref().unwrap_or(tensor).values::<f32>()?.into_owned();
    let of_row = |row: &[f32]| -> f64 { row.iter().zip(powers).map(|(w, power)| f64::from(*w).powi(2) * power).sum() };
    let power = match moments {
        Some(moments) => moments.power(&rows),
        None => rows.chunks_exact(powers.len().max(1)).map(of_row).sum(),
    };
    Some(Weight { rows, share: share(power)?, rounding })
}

#[cfg(test)]
mod tests {
    use super::super::scaled_loss::tests::{WIDTH, loss};
    use super::*;
    use crate::exec::Silent;

    fn pass(sweeps: usize, rate: f64) -> LearnScaling {
        LearnScaling { annealing: Annealing { sweeps, rate: RATE * rate }, errors: Errors::Compensated }
    }

    fn none(loss: &ScaledLoss) -> (f64, Vec<f64>) {
        let s = vec![1.0; loss.width()];
        (loss.at(&s), s)
    }

    #[test]
    fn what_is_learned_loses_less() {
        for levels in [None, Some(16.0)] {
            let loss = loss(levels);
            let start = none(&loss);
            let (best, s) = pass(8, 1.0).learn(&loss, None, start.clone(), &Silent).unwrap();
            let most = if levels.is_some() { 0.9 } else { 0.98 };
            assert!(best < most * start.0, "{levels:?}: {best} of {}", start.0);
            assert!((loss.at(&s) - best).abs() < 1e-9 * best, "the best is what is returned");
            if levels.is_some() {
                assert!(s[3] > 2.0 * s[4], "the loud channel is divided most: {s:?}");
            }
        }
    }

    /// However far steps go, what is kept never loses more than the start, and no factor is 0 or infinite.
    #[test]
    fn steps_of_any_size_never_end_above_the_start() {
        let loss = loss(Some(256.0));
        let start = none(&loss);
        for rate in [1e-3, 10.0, 100.0] {
            let (best, s) = pass(4, rate).learn(&loss, None, start.clone(), &Silent).unwrap();
            assert!(best <= start.0 && s.iter().all(|s| s.is_normal()), "{rate}: {best}, {s:?}");
        }
        let (best, s) = pass(0, 1.0).learn(&loss, None, start.clone(), &Silent).unwrap();
        assert!((best - start.0).abs() < 1e-15 && s == start.1);
    }

    #[test]
    fn channels_that_share_a_factor_keep_sharing_it() {
        let loss = loss(Some(16.0));
        let start = none(&loss);
        let (best, s) = pass(8, 1.0).learn(&loss, Some(4), start.clone(), &Silent).unwrap();
        assert!(best < start.0);
        assert!((0..WIDTH).all(|j| (s[j] / s[j % 4] - 1.0).abs() < 1e-12), "{s:?}");
        assert!(s.iter().any(|s| (s - 1.0).abs() > 1e-3));
    }

    #[test]
    fn silent_channels_cost_something() {
        assert_eq!(floored(vec![0.0, 3.0, 1.0]), [4.0 / 300.0, 3.0, 1.0]);
        assert_eq!(floored(vec![0.0; 2]), [0.0; 2]);
        assert!(floored(Vec::new()).is_empty());
    }

    #[test]
    fn derivatives_of_nothing_move_nothing() {
        assert_eq!(folded(&[0.0; 4], 2), [0.0; 2]);
        assert_eq!(folded(&[f64::NAN; 4], 2), [0.0; 2]);
        assert_eq!(folded(&[1.0, -2.0, 1.0, -2.0], 2), [2.0 / 3.0, -4.0 / 3.0]);
    }
}
