//! What a block should give, and how far it is from that: losses, and gradients of all that is learned.

use super::block::Program;
use super::inputs::Inputs;
use super::measure::{Kind, Measure, Wish};
use super::parameterization::Weight;
use super::run::{Gradients, Outcome, add};
use super::samples::Sample;
use crate::grad::{Array, GradError, Slot, Value, Values};
use crate::judges;
use crate::model::Plan;
use crate::parallel;
use crate::seed;

/// The error over signal from which on a tape does not compute what the model does; constants other than weights and biases are
/// rounded in it.
pub(super) const DISAGREEMENT: f64 = 1e-2;
/// Samples of a batch are added up in so many sums, whatever the number of threads.
pub(super) const LANES: usize = 4;

/// How a block does, as error over signal: on the samples that were held out, and on those learned from.
#[derive(Clone, Copy)]
pub(super) struct Loss {
    pub(super) held_out: f64,
    pub(super) fitted: f64,
}

impl std::fmt::Debug for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.6} held out, {:.6} fitted", self.held_out, self.fitted)
    }
}

/// A block with its samples.
pub(super) struct Objective<'a> {
    program: &'a Program,
    samples: &'a [Sample],
    /// What is read in a step of learning, and what the float model gives for that.
    inputs: Inputs,
    floats: &'a [Vec<Value<f32>>],
    pub(super) weights: Vec<Weight>,
    /// Of every output, how errors are measured.
    measures: Vec<Measure>,
    /// Of every output, one over how many errors a sample has.
    shares: Vec<f32>,
    /// The samples to learn from.
    pub(super) fitted: Vec<usize>,
    held_out: Vec<usize>,
}

impl<'a> Objective<'a> {
    /// With errors of outputs measured as `wish` says; `origins` tells which samples are variants of one, and `kind` of what kind the numbers
    /// of an output are.
    pub(super) fn new(
        program: &'a Program,
        (samples, origins): (&'a [Sample], &[usize]),
        plan: &Plan,
        wish: Wish,
        kind: impl Fn(crate::id::ValueId) -> Kind,
    ) -> Result<Self, GradError> {
        let weights = program.weights_of(plan)?;
        let (held_out, fitted) = judges::split(origins);
        let outputs = program.outputs.iter().enumerate();
        let measures: Vec<Measure> =
            outputs.map(|(at, (_, value))| Measure::of(wish, samples, at, kind(*value))).collect();
        let shares = shares(&measures, samples);
        let inputs = Inputs::Quantized;
        Ok(Self { program, samples, inputs, floats: &[], weights, measures, shares, fitted, held_out })
    }

    /// The same, learned from `inputs`, which the float model gives for every sample as `floats`.
    pub(super) fn reading(self, inputs: Inputs, floats: &'a [Vec<Value<f32>>]) -> Self {
        Self { inputs, floats, ..self }
    }

    /// Whether the tape gives what the float model gives, on float inputs, with float weights and nothing rounded.
    ///
    /// # Errors
    /// [`GradError`] where it does not: a rule is wrong then, and nothing may be learned by it.
    pub(super) fn agrees(program: &'a Program, float: &'a Sample) -> Result<(), GradError> {
        let samples = std::slice::from_ref(float);
        let outputs = 0..program.outputs.len();
        let measures: Vec<Measure> =
            outputs.map(|output| Measure::of(Wish::Square, samples, output, Kind::Numbers)).collect();
        let shares = shares(&measures, samples);
        let (weights, held_out) = (Vec::new(), Vec::new());
        let (inputs, floats, fitted) = (Inputs::Quantized, &[][..], vec![0]);
        let alone = Self { program, samples, inputs, floats, weights, measures, shares, fitted, held_out };
        let leaves = program.float_leaves();
        let loss = alone.loss_with(&leaves, &[0], (1000, 0))?;
        if loss < DISAGREEMENT { Ok(()) } else { Err(GradError(format!("its tape is {loss:.1e} off the float model"))) }
    }

    /// Error over signal of `at`, on all samples.
    pub(super) fn loss(&self, at: &Outcome) -> Result<Loss, GradError> {
        Ok(Loss { held_out: self.held_out_loss(at)?, fitted: self.loss_on(at, &self.fitted)? })
    }

    /// Error over signal of `at` on the samples that were held out; on all where there are too few to hold one out.
    pub(super) fn held_out_loss(&self, at: &Outcome) -> Result<f64, GradError> {
        self.loss_on(at, if self.held_out.is_empty() { &self.fitted } else { &self.held_out })
    }

    fn loss_on(&self, at: &Outcome, samples: &[usize]) -> Result<f64, GradError> {
        self.loss_with(&self.program.leaves(&self.weights, at)?, samples, (0, 0))
    }

    fn loss_with(&self, leaves: &[(Slot, Value<f32>)], samples: &[usize], drop: (i64, u64)) -> Result<f64, GradError> {
        // Forward alone takes half as much.
        let losses = self.at_once(2, samples, |i| {
            let sample = &self.samples[*i];
            let values = self.program.run(leaves, &sample.feeds, drop)?;
            let outputs = self.program.outputs.iter().enumerate();
            let error = |(output, (slot, _)): (usize, &(Slot, _))| {
                self.measures[output].error(sample, output, values.real(*slot))
            };
            outputs.map(error).collect::<Result<Vec<(f64, usize)>, GradError>>()
        });
        let losses = losses.into_iter().collect::<Result<Vec<_>, GradError>>()?;
        // Every output counts as much as any other.
        let of_output = |output: usize| {
            let (sum, count) = losses.iter().fold((0.0, 0), |all, one| (all.0 + one[output].0, all.1 + one[output].1));
            sum / count.max(1) as f64
        };
        Ok((0..self.measures.len()).map(of_output).sum())
    }

    /// The gradients of all that is learned, over the samples of `batch`.
    pub(super) fn gradients(
        &self,
        at: &Outcome,
        batch: &[usize],
        drop: i64,
        seed: u64,
    ) -> Result<Gradients, GradError> {
        let p = self.program;
        let leaves = p.leaves(&self.weights, at)?;
        let wanted = p.learned();
        let lanes: Vec<&[usize]> = batch.chunks(batch.len().div_ceil(LANES).max(1)).collect();
        let sums = self.at_once(1, &lanes, |lane| {
            let mut sums: Vec<Vec<f32>> = vec![Vec::new(); wanted.len()];
            for &i in *lane {
                let draw = seed::mixed(seed) ^ i as u64;
                let feeds = self.inputs.read(&self.samples[i], self.floats.get(i), draw);
                let values = p.run(&leaves, &feeds, (drop, draw))?;
                let seeds = self.seeds(&self.samples[i], &values)?;
                for (sum, grad) in sums.iter_mut().zip(p.back(&values, seeds, &wanted)?) {
                    if let Some(grad) = grad {
                        add(sum, grad.iter().copied());
                    }
                }
            }
            Ok::<_, GradError>(sums)
        });
        let mut weights: Vec<Vec<f32>> = vec![Vec::new(); wanted.len()];
        for sums in sums {
            let sums = weights.iter_mut().zip(sums?).filter(|(_, sum)| !sum.is_empty());
            sums.for_each(|(total, sum)| add(total, sum.into_iter()));
        }
        Ok(p.gradients(weights))
    }

    /// `f` of every item, in their order, of so many `times` as many at once as memory holds of tapes forward and back.
    fn at_once<I: Sync, U: Send>(&self, times: usize, items: &[I], f: impl Fn(&I) -> U + Sync + Send) -> Vec<U> {
        let most = self.program.room.at_once.saturating_mul(times);
        if most >= items.len().min(parallel::AT_ONCE) {
            return parallel::map(items, f);
        }
        parallel::few_of(most, items.iter(), f).collect()
    }

    /// The gradient of the loss by every output.
    fn seeds(&self, sample: &Sample, values: &Values<f32>) -> Result<Vec<(Slot, Array<f32>)>, GradError> {
        let seed = |(output, (slot, _)): (usize, &(Slot, _))| {
            let mut grad = self.measures[output].gradient(sample, output, values.real(*slot))?;
            if self.shares.len() > 1 {
                grad *= self.shares[output];
            }
            Ok((*slot, grad))
        };
        self.program.outputs.iter().enumerate().map(seed).collect()
    }
}

/// Of every output one over how many errors the first sample has there.
pub(super) fn shares(measures: &[Measure], samples: &[Sample]) -> Vec<f32> {
    let count = |(measure, target): (&Measure, &Array<f32>)| 1.0 / measure.count(target.shape()).max(1) as f32;
    samples.first().map(|sample| measures.iter().zip(&sample.targets).map(count).collect()).unwrap_or_default()
}
