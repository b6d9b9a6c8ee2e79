//! Running a block's tape with what has been learned.

use super::block::Program;
use super::fake_quant::rescaled;
use super::parameterization::Weight;
use crate::encoding::Encoding;
use crate::grad::{Array, GradError, Sizes, Slot, Value, Values};
use crate::model::Plan;
use crate::parallel;

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

/// Gradients of what is learned.
pub(super) struct Gradients {
    /// By the weights themselves; empty where none arrived.
    pub(super) weights: Vec<Vec<f32>>,
    pub(super) biases: Vec<Vec<f32>>,
    pub(super) steps: Vec<f32>,
}

impl Gradients {
    /// Whether all are numbers that can be stepped along.
    pub(super) fn are_finite(&self) -> bool {
        self.weights.iter().chain(&self.biases).chain([&self.steps]).flatten().all(|g| g.is_finite())
    }
}

/// The leaves of a tape that are the same for all samples.
pub(super) type Leaves = Vec<(Slot, Value<f32>)>;

impl Program {
    /// What `plan` says of the weights.
    pub(super) fn weights_of(&self, plan: &Plan) -> Result<Vec<Weight>, GradError> {
        let weight = |(_, site, tensor): &(Slot, _, std::sync::Arc<crate::tensor::Tensor>)| {
            let bug = || GradError("a bug in onnx-quant: a weight without codes".into());
            let (encoding, codes) = plan.encoding(*site).zip(plan.codes(*site)).ok_or_else(bug)?;
            let weight = Weight::new(tensor, encoding, codes).ok_or_else(bug)?;
            Ok(weight.leaning(plan.leanings(*site)))
        };
        parallel::map(&self.weights, weight).into_iter().collect()
    }

    /// Where everything starts; of these `weights`.
    pub(super) fn start(&self, weights: &[Weight]) -> Outcome {
        let biases = self.biases.iter();
        Outcome {
            units: weights.iter().map(|weight| weight.points.clone()).collect(),
            scales: weights.iter().map(|weight| weight.encoding.scale.to_vec()).collect(),
            biases: biases
                .map(|(_, _, tensor)| tensor.floats().map(std::borrow::Cow::into_owned).unwrap_or_default())
                .collect(),
            steps: vec![0.0; self.steps.len()],
        }
    }

    /// The slots of what is learned: weights, biases, scales of activations.
    pub(super) fn learned(&self) -> Vec<Slot> {
        let (weights, biases) = (self.weights.iter().map(|w| w.0), self.biases.iter().map(|b| b.0));
        weights.chain(biases).chain(self.steps.iter().map(|s| s.0)).collect()
    }

    /// Gradients in the order of [`Self::learned`], by what they are of.
    pub(super) fn gradients(&self, mut weights: Vec<Vec<f32>>) -> Gradients {
        let mut biases = weights.split_off(self.weights.len());
        let steps = biases.split_off(self.biases.len());
        // What gets no gradient is not stepped.
        biases.iter_mut().zip(&self.held).filter(|(_, held)| **held).for_each(|(grad, _)| grad.clear());
        let steps = steps.into_iter().map(|step| step.first().copied().unwrap_or(0.0)).collect();
        Gradients { weights, biases, steps }
    }

    /// Bias `i` as its codes have it at the scales of `at`; gradients pass this straight through.
    fn bias(&self, i: usize, at: &Outcome, shape: &[usize]) -> Vec<f32> {
        let mut values = at.biases[i].clone();
        let Some(product) = self.products.get(i).and_then(Option::as_ref) else { return values };
        let (site, activation) = &product.activation;
        let step = self.steps.iter().position(|(_, other)| other == site).map_or(0.0, |step| at.steps[step]);
        let input = rescaled(activation, step).scale[0];
        let weight = self.weights.iter().position(|(_, site, _)| *site == product.weight);
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

    /// The leaves for `weights` at what has been learned.
    pub(super) fn leaves(&self, weights: &[Weight], at: &Outcome) -> Result<Leaves, GradError> {
        let mut leaves = self.constants.clone();
        let shaped =
            |shape: &[usize], values| Array::from_shape_vec(shape, values).map(Value::Real).map_err(|e| misfit(&e));
        let numbers: Vec<usize> = (0..weights.len()).collect();
        let values = parallel::map(&numbers, |i| at.weight(*i, &weights[*i].groups));
        for ((slot, _, tensor), weight) in self.weights.iter().zip(values) {
            leaves.push((*slot, shaped(tensor.shape(), weight)?));
        }
        leaves.extend(self.steps.iter().zip(&at.steps).map(|((slot, _), step)| (*slot, one(*step))));
        for (i, (slot, _, tensor)) in self.biases.iter().enumerate() {
            leaves.push((*slot, shaped(tensor.shape(), self.bias(i, at, tensor.shape()))?));
        }
        Ok(leaves)
    }

    /// The leaves of the float model.
    pub(super) fn float_leaves(&self) -> Leaves {
        // Of two values for one slot the later one counts.
        let mut leaves = self.constants.clone();
        leaves.extend(self.float_constants.iter().cloned());
        let learned = self.weights.iter().chain(&self.float_biases);
        leaves.extend(self.steps.iter().map(|(slot, _)| (*slot, one(0.0))));
        leaves.extend(learned.filter_map(|(slot, _, tensor)| Some((*slot, crate::grad::value_of(tensor)?))));
        leaves
    }

    /// Runs one sample, with a share of the activations left in float, in thousandths, drawn by a seed.
    pub(super) fn run(
        &self,
        leaves: &[(Slot, Value<f32>)],
        feeds: &[Value<f32>],
        drop: (i64, u64),
    ) -> Result<Values<f32>, GradError> {
        let ends: Vec<Slot> = self.outputs.iter().map(|(slot, _)| *slot).collect();
        self.tape.forward_in(self.filled(leaves, feeds, drop)?, &self.room.cuts, &ends)
    }

    /// Takes `seeds` back through what [`Self::run`] has kept.
    pub(super) fn back(
        &self,
        values: &Values<f32>,
        seeds: Vec<(Slot, Array<f32>)>,
        wanted: &[Slot],
    ) -> Result<Vec<Option<Array<f32>>>, GradError> {
        self.tape.backward_in(values, seeds, wanted, &self.room.cuts)
    }

    /// The bytes that a run on a sample with these `feeds` takes, and what the float block returns of it.
    pub(super) fn sizes(&self, feeds: &[Value<f32>]) -> Result<(Sizes, Values<f32>), GradError> {
        let ends: Vec<Slot> = self.outputs.iter().map(|(slot, _)| *slot).collect();
        self.tape.sizes(self.filled(&self.float_leaves(), feeds, (0, 0))?, &ends)
    }

    fn filled(
        &self,
        leaves: &[(Slot, Value<f32>)],
        feeds: &[Value<f32>],
        drop: (i64, u64),
    ) -> Result<Vec<(Slot, Value<f32>)>, GradError> {
        let feeds = self.feeds.iter().zip(feeds).map(|((slot, _), value)| (*slot, value.clone()));
        let drop = Array::from_shape_vec(vec![2], vec![drop.0, drop.1.cast_signed()]).map_err(|e| misfit(&e))?;
        Ok(leaves.iter().cloned().chain(feeds).chain([(self.drop, Value::Whole(drop))]).collect())
    }
}

fn misfit(error: &impl std::fmt::Display) -> GradError {
    GradError(error.to_string())
}

/// One number as a leaf.
fn one(number: f32) -> Value<f32> {
    Value::Real(Array::from_elem(vec![1], number))
}

/// Adds `with` to `sum`, which is empty before the first.
pub(super) fn add(sum: &mut Vec<f32>, with: impl Iterator<Item = f32>) {
    if sum.is_empty() {
        sum.extend(with);
    } else {
        sum.iter_mut().zip(with).for_each(|(sum, g)| *sum += g);
    }
}
