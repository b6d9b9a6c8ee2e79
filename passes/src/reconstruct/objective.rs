//! What a block should give, and how far it is from that: losses, and gradients of all that is learned.

use super::block::Program;
use super::fake_quant::rescaled;
use super::measure::{Measure, Wish};
use super::parameterization::Weight;
use super::samples::Sample;
use crate::encoding::Encoding;
use crate::grad::{Array, GradError, Slot, Value, Values};
use crate::model::Plan;
use crate::parallel;
use crate::seed;

/// Of so many samples one is held out, to judge by.
const HELD_OUT: usize = 8;
/// The error over signal from which on a tape does not compute what the model does; constants other than weights and biases are
/// rounded in it.
const DISAGREEMENT: f64 = 1e-2;
/// Samples of a batch are added up in so many sums, whatever the number of threads.
const LANES: usize = 4;

/// What a block has come to.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// Of every weight, in units of its scales, in the order of storage.
    pub(super) units: Vec<Vec<f32>>,
    /// Of every weight, one per group.
    pub(super) scales: Vec<Vec<f32>>,
    pub(super) biases: Vec<Vec<f32>>,
    /// The logarithms of what scales of activations are multiplied with.
    pub(super) steps: Vec<f32>,
}

impl Outcome {
    /// Weight `i`.
    fn weight(&self, i: usize, groups: &[u32]) -> Vec<f32> {
        self.units[i].iter().zip(groups).map(|(unit, group)| unit * self.scales[i][*group as usize]).collect()
    }
}

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

/// Gradients of what is learned.
pub(super) struct Gradients {
    /// By the weights themselves; empty where none arrived.
    pub(super) weights: Vec<Vec<f32>>,
    pub(super) biases: Vec<Vec<f32>>,
    pub(super) steps: Vec<f32>,
}

/// A block with its samples.
pub(super) struct Objective<'a> {
    program: &'a Program,
    samples: &'a [Sample],
    pub(super) weights: Vec<Weight>,
    /// Of every output, how errors are measured.
    measures: Vec<Measure>,
    /// The samples to learn from.
    pub(super) fitted: Vec<usize>,
    held_out: Vec<usize>,
}

fn misfit(error: &impl std::fmt::Display) -> GradError {
    GradError(error.to_string())
}

impl<'a> Objective<'a> {
    /// With errors of outputs measured as `wish` says; `of_graph` tells those that the graph itself returns.
    pub(super) fn new(
        program: &'a Program,
        samples: &'a [Sample],
        plan: &Plan,
        wish: Wish,
        of_graph: impl Fn(crate::id::ValueId) -> bool,
    ) -> Result<Self, GradError> {
        let weight = |(_, site, tensor): &(Slot, _, std::sync::Arc<crate::tensor::Tensor>)| {
            let bug = || GradError("a bug in onnx-quant: a weight without codes".into());
            let (encoding, codes) = plan.encoding(*site).zip(plan.codes(*site)).ok_or_else(bug)?;
            Weight::new(tensor, encoding, codes).ok_or_else(bug)
        };
        let weights = program.weights.iter().map(weight).collect::<Result<Vec<_>, GradError>>()?;
        let (held_out, fitted) = (0..samples.len()).partition(|i| i % HELD_OUT == HELD_OUT / 2);
        let outputs = program.outputs.iter().enumerate();
        let measures = outputs.map(|(at, (_, value))| Measure::of(wish, samples, at, of_graph(*value))).collect();
        Ok(Self { program, samples, weights, measures, fitted, held_out })
    }

    /// Whether the tape gives what the float model gives, on float inputs, with float weights and nothing rounded.
    ///
    /// # Errors
    /// [`GradError`] where it does not: a rule is wrong then, and nothing may be learned by it.
    pub(super) fn agrees(program: &'a Program, float: &'a Sample) -> Result<(), GradError> {
        let samples = std::slice::from_ref(float);
        let outputs = 0..program.outputs.len();
        let measures = outputs.map(|output| Measure::of(Wish::Square, samples, output, false)).collect();
        let (weights, held_out) = (Vec::new(), Vec::new());
        let alone = Self { program, samples, weights, measures, fitted: vec![0], held_out };
        let mut leaves = program.constants.clone();
        let learned = program.weights.iter().chain(&program.float_biases);
        leaves.extend(program.steps.iter().map(|(slot, _)| (*slot, one(0.0))));
        leaves.extend(learned.filter_map(|(slot, _, tensor)| Some((*slot, crate::grad::value_of(tensor)?))));
        let loss = alone.loss_with(&leaves, &[0], (1000, 0))?;
        if loss < DISAGREEMENT { Ok(()) } else { Err(GradError(format!("its tape is {loss:.1e} off the float model"))) }
    }

    /// Where everything starts.
    pub(super) fn start(&self) -> Outcome {
        let biases = self.program.biases.iter();
        Outcome {
            units: self.weights.iter().map(|weight| weight.points.clone()).collect(),
            scales: self.weights.iter().map(|weight| weight.encoding.scale.to_vec()).collect(),
            biases: biases
                .map(|(_, _, tensor)| tensor.floats().map(std::borrow::Cow::into_owned).unwrap_or_default())
                .collect(),
            steps: vec![0.0; self.program.steps.len()],
        }
    }

    /// Bias `i` as its codes have it at the scales of `at`; gradients pass this straight through.
    fn bias(&self, i: usize, at: &Outcome, shape: &[usize]) -> Vec<f32> {
        let mut values = at.biases[i].clone();
        let Some(product) = self.program.products.get(i).and_then(Option::as_ref) else { return values };
        let (site, activation) = &product.activation;
        let step = self.program.steps.iter().position(|(_, other)| other == site).map_or(0.0, |step| at.steps[step]);
        let input = rescaled(activation, step).scale[0];
        let weight = self.program.weights.iter().position(|(_, site, _)| *site == product.weight);
        if let Some(scales) = weight.map(|weight| &at.scales[weight]).filter(|scales| !scales.is_empty()) {
            let of = |channel: usize| input * scales[channel.min(scales.len() - 1)];
            let scale = (0..product.encoding.scale.len()).map(of).collect();
            let encoding = Encoding { scale, ..product.encoding.clone() };
            if encoding.simulate(&mut values, shape).is_err() {
                values.clone_from(&at.biases[i]);
            }
        }
        values
    }

    /// The leaves that are the same for all samples.
    fn leaves(&self, at: &Outcome) -> Result<Vec<(Slot, Value<f32>)>, GradError> {
        let mut leaves = self.program.constants.clone();
        let shaped =
            |shape: &[usize], values| Array::from_shape_vec(shape, values).map(Value::Real).map_err(|e| misfit(&e));
        let numbers: Vec<usize> = (0..self.weights.len()).collect();
        let weights = parallel::map(&numbers, |i| at.weight(*i, &self.weights[*i].groups));
        for ((slot, _, tensor), weight) in self.program.weights.iter().zip(weights) {
            leaves.push((*slot, shaped(tensor.shape(), weight)?));
        }
        leaves.extend(self.program.steps.iter().zip(&at.steps).map(|((slot, _), step)| (*slot, one(*step))));
        for (i, (slot, _, tensor)) in self.program.biases.iter().enumerate() {
            leaves.push((*slot, shaped(tensor.shape(), self.bias(i, at, tensor.shape()))?));
        }
        Ok(leaves)
    }

    /// Runs `sample`, with a share of the activations left in float, in thousandths, drawn by a seed.
    fn run(&self, leaves: &[(Slot, Value<f32>)], sample: &Sample, drop: (i64, u64)) -> Result<Values<f32>, GradError> {
        let feeds = self.program.feeds.iter().zip(&sample.feeds).map(|((slot, _), value)| (*slot, value.clone()));
        let drop = Array::from_shape_vec(vec![2], vec![drop.0, drop.1.cast_signed()]).map_err(|e| misfit(&e))?;
        self.program.tape.forward(leaves.iter().cloned().chain(feeds).chain([(self.program.drop, Value::Whole(drop))]))
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
        self.loss_with(&self.leaves(at)?, samples, (0, 0))
    }

    fn loss_with(&self, leaves: &[(Slot, Value<f32>)], samples: &[usize], drop: (i64, u64)) -> Result<f64, GradError> {
        let losses = parallel::map(samples, |i| {
            let sample = &self.samples[*i];
            let values = self.run(leaves, sample, drop)?;
            let mut sum = (0.0, 0);
            for (output, (slot, _)) in self.program.outputs.iter().enumerate() {
                let (error, count) = self.measures[output].error(sample, output, values.real(*slot))?;
                sum = (sum.0 + error, sum.1 + count);
            }
            Ok(sum)
        });
        let losses = losses.into_iter().collect::<Result<Vec<(f64, usize)>, GradError>>()?;
        let (sum, count) = losses.into_iter().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        Ok(sum / count.max(1) as f64)
    }

    /// The gradients of all that is learned, over the samples of `batch`.
    pub(super) fn gradients(
        &self,
        at: &Outcome,
        batch: &[usize],
        drop: i64,
        seed: u64,
    ) -> Result<Gradients, GradError> {
        let leaves = self.leaves(at)?;
        let p = self.program;
        let wanted: Vec<Slot> = p
            .weights
            .iter()
            .map(|w| w.0)
            .chain(p.biases.iter().map(|b| b.0))
            .chain(p.steps.iter().map(|s| s.0))
            .collect();
        let lanes: Vec<&[usize]> = batch.chunks(batch.len().div_ceil(LANES).max(1)).collect();
        let sums = parallel::map(&lanes, |lane| {
            let mut sums: Vec<Vec<f32>> = vec![Vec::new(); wanted.len()];
            for &i in *lane {
                let values = self.run(&leaves, &self.samples[i], (drop, seed::mixed(seed) ^ i as u64))?;
                let seeds = self.seeds(&self.samples[i], &values)?;
                for (sum, grad) in sums.iter_mut().zip(p.tape.backward(&values, seeds, &wanted)?) {
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
        let mut biases = weights.split_off(p.weights.len());
        let steps = biases.split_off(p.biases.len());
        let steps = steps.into_iter().map(|step| step.first().copied().unwrap_or(0.0)).collect();
        Ok(Gradients { weights, biases, steps })
    }

    /// The gradient of the loss by every output.
    fn seeds(&self, sample: &Sample, values: &Values<f32>) -> Result<Vec<(Slot, Array<f32>)>, GradError> {
        let seed = |(output, (slot, _)): (usize, &(Slot, _))| {
            Ok((*slot, self.measures[output].gradient(sample, output, values.real(*slot))?))
        };
        self.program.outputs.iter().enumerate().map(seed).collect()
    }
}

/// One number as a leaf.
fn one(number: f32) -> Value<f32> {
    Value::Real(Array::from_elem(vec![1], number))
}

fn add(sum: &mut Vec<f32>, with: impl Iterator<Item = f32>) {
    if sum.is_empty() {
        sum.extend(with);
    } else {
        sum.iter_mut().zip(with).for_each(|(sum, g)| *sum += g);
    }
}
