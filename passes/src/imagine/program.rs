//! A whole model as one tape, from its input to its batch norms and logits.

use std::collections::{BTreeMap, BTreeSet};

use super::moments::{Moments, Remembered};
use super::picture::{Looks, Picture};
use crate::exec::Executor;
use crate::grad::{self, Array, GradError, Slot, Tape, Value, Values};
use crate::id::ValueId;
use crate::ir::walk;
use crate::ir::{Graph, Node};
use crate::simulate::is_float_activation;
use crate::tensor::{DType, Tensor};

/// See the module.
#[derive(Debug)]
pub(super) struct Program {
    tape: Tape,
    input: Slot,
    /// Constants, and what depends on shapes alone.
    leaves: Vec<(Slot, Value<f32>)>,
    norms: Vec<Remembered>,
    /// What each of them returns.
    results: Vec<Slot>,
    /// Of one row.
    logits: Option<Slot>,
}

/// A program while it is made.
#[derive(Default)]
struct Maker {
    tape: Tape,
    /// What the tape computes or is given.
    slots: BTreeMap<ValueId, Slot>,
    /// Numbers that depend on the input.
    moving: BTreeSet<ValueId>,
    /// What depends on the input in a way that gradients do not pass.
    blocked: BTreeSet<ValueId>,
    constants: Vec<(Slot, Value<f32>)>,
    /// What depends on the shape of the input alone, and is read.
    fixed: Vec<(Slot, ValueId)>,
    /// Why the first node that blocks does.
    reason: Option<String>,
}

impl Program {
    /// The program of `graph` for inputs of `shape`, with those of the norms in `remembered` that gradients reach.
    pub(super) fn of(
        graph: &Graph,
        remembered: &[Remembered],
        shape: &[usize],
        executor: &dyn Executor,
    ) -> Result<Self, GradError> {
        let &[given] = graph.inputs() else {
            return Err(GradError(format!("it takes {} inputs, not one", graph.inputs().len())));
        };
        if graph.value(given).ty.dtype() != Some(DType::F32) {
            return Err(GradError(format!("its input `{}` is no 32-bit float tensor", graph.value(given).name)));
        }
        let mut maker = Maker::default();
        let input = maker.tape.leaf(true);
        maker.slots.insert(given, input);
        maker.moving.insert(given);
        for (_, node) in graph.nodes() {
            maker.node(graph, node);
        }
        let reached = |norm: &&Remembered| maker.moving.contains(&norm.value) && norm.spread.iter().any(|s| *s > 0.0);
        let norms: Vec<Remembered> = remembered.iter().filter(reached).cloned().collect();
        if norms.is_empty() || 2 * norms.len() < remembered.len() {
            let reason = maker.reason.map_or(String::new(), |reason| format!(": {reason}"));
            let (reached, all) = (norms.len(), remembered.len());
            return Err(GradError(format!("gradients reach {reached} of its {all} batch norms{reason}")));
        }
        let results = norms.iter().map(|norm| maker.slots[&norm.value]).collect();
        let logits = graph.outputs().iter().find_map(|value| maker.logits(graph, *value));
        let mut leaves = maker.constants;
        leaves.extend(fixed(graph, &maker.fixed, shape, executor)?);
        Ok(Self { tape: maker.tape, input, leaves, norms, results, logits })
    }

    /// How far `moments` are from those of training.
    pub(super) fn loss(&self, moments: &Moments) -> f64 {
        moments.loss(&self.norms)
    }

    pub(super) fn no_moments(&self) -> Moments {
        Moments::none(&self.norms)
    }

    fn run(&self, input: Array<f32>) -> Result<Values<f32>, GradError> {
        self.tape.forward(self.leaves.iter().cloned().chain([(self.input, Value::Real(input))]))
    }

    /// The moments of one input.
    pub(super) fn moments(&self, picture: &Picture) -> Result<Moments, GradError> {
        self.moments_in(&self.run(picture.array()?)?)
    }

    fn moments_in(&self, values: &Values<f32>) -> Result<Moments, GradError> {
        let mut moments = self.no_moments();
        for (at, norm) in self.norms.iter().enumerate() {
            moments.see(at, norm, self.result(values, at)?)?;
        }
        Ok(moments)
    }

    fn result<'a>(&self, values: &'a Values<f32>, at: usize) -> Result<&'a Array<f32>, GradError> {
        values.real(self.results[at]).ok_or_else(|| GradError("a bug in onnx-quant: a norm that did not run".into()))
    }

    /// How many classes it tells apart; 0 where what it returns are no logits.
    pub(super) fn classes(&self, looks: &Looks) -> Result<usize, GradError> {
        let values = self.run(Array::zeros(looks.shape()))?;
        self.moments_in(&values)?;
        Ok(self.logits.and_then(|slot| values.real(slot)).map_or(0, row_length))
    }

    /// The moments of `picture` as it is shifted in `step`, and the gradient of the loss by its elements: that of the moments `seen`, and of its
    /// class.
    pub(super) fn gradient(
        &self,
        picture: &Picture,
        step: usize,
        seen: &Moments,
    ) -> Result<(Moments, Vec<f32>), GradError> {
        let shift = picture.shift(step);
        let values = self.run(picture.shifted(shift)?)?;
        let mut seeds = Vec::with_capacity(self.norms.len() + 1);
        for (at, norm) in self.norms.iter().enumerate() {
            seeds.push((self.results[at], seen.gradient(at, norm, self.result(&values, at)?)?));
        }
        let logits = self.logits.and_then(|slot| Some((slot, values.real(slot)?)));
        seeds.extend(
            logits
                .filter(|(_, z)| row_length(z) > 1)
                .map(|(slot, z)| (slot, of_class(z, picture.class(row_length(z))))),
        );
        let gradient = self.tape.backward(&values, seeds, &[self.input])?.into_iter().flatten().next();
        let gradient = gradient.ok_or_else(|| GradError("no gradient arrives at its input".into()))?;
        if !gradient.iter().all(|g| g.is_finite()) {
            return Err(GradError("its gradients are no finite numbers".into()));
        }
        Ok((self.moments_in(&values)?, picture.unshifted(&gradient, shift)))
    }
}

impl Maker {
    fn node(&mut self, graph: &Graph, node: &Node) {
        let reads: Vec<ValueId> = walk::reads(node).filter(|value| graph.constant(*value).is_none()).collect();
        if reads.iter().any(|value| self.blocked.contains(value)) {
            self.blocked.extend(node.outputs.iter().flatten());
            return;
        }
        let moves = reads.iter().any(|value| self.moving.contains(value));
        if !moves || node.op.is("Shape") || node.op.is("Size") {
            return;
        }
        if let Err(reason) = self.push(graph, node) {
            self.reason.get_or_insert(format!("node `{}`: {reason}", node.name));
            self.blocked.extend(node.outputs.iter().flatten());
        }
    }

    fn push(&mut self, graph: &Graph, node: &Node) -> Result<(), String> {
        if !node.outputs.iter().flatten().all(|value| is_float_activation(graph, *value)) {
            return Err(format!("{} returns no float tensor", node.op.display()));
        }
        let rule = grad::rule(node).map_err(|error| error.to_string())?;
        let inputs = node.inputs.iter().map(|value| value.map(|value| self.read(graph, value)).transpose());
        let inputs = inputs.collect::<Result<Vec<_>, String>>()?;
        let outputs = self.tape.push(&node.name, rule, inputs, node.outputs.len());
        for (value, slot) in node.outputs.iter().zip(outputs) {
            if let Some(value) = value {
                self.slots.insert(*value, slot);
                self.moving.insert(*value);
            }
        }
        Ok(())
    }

    /// The slot of `value`, with a new leaf where it does not depend on the input.
    fn read(&mut self, graph: &Graph, value: ValueId) -> Result<Slot, String> {
        if let Some(slot) = self.slots.get(&value) {
            return Ok(*slot);
        }
        let slot = self.tape.leaf(false);
        match graph.constant(value) {
            Some(tensor) => {
                let read = grad::value_of(tensor);
                let refuse = || format!("constant `{}` is {}", graph.value(value).name, tensor.dtype().name());
                self.constants.push((slot, read.ok_or_else(refuse)?));
            }
            None => self.fixed.push((slot, value)),
        }
        self.slots.insert(value, slot);
        Ok(slot)
    }

    /// The slot of the logits behind `output`, where there is one row of them.
    fn logits(&self, graph: &Graph, output: ValueId) -> Option<Slot> {
        let (_, node) = graph.producer(output)?;
        let value = if node.op.is("Softmax") { node.input(0)? } else { output };
        let (_, node) = graph.producer(value)?;
        let bounded = ["Sigmoid", "LogSoftmax"].iter().any(|op| node.op.is(op));
        let is_row = graph.value(value).ty.rank() == Some(2);
        if bounded || !is_row || !self.moving.contains(&value) { None } else { self.slots.get(&value).copied() }
    }
}

/// What `wanted` is for an input of `shape`.
fn fixed(
    graph: &Graph,
    wanted: &[(Slot, ValueId)],
    shape: &[usize],
    executor: &dyn Executor,
) -> Result<Vec<(Slot, Value<f32>)>, GradError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let values: Vec<ValueId> = wanted.iter().map(|(_, value)| *value).collect();
    let part = graph
        .inputs()
        .iter()
        .fold(walk::extract(graph, graph.inputs(), &values), |part, input| walk::with_input_of(part, *input, shape));
    let zeros = Tensor::of(shape, vec![0.0_f32; shape.iter().product()]);
    let ran = executor.prepare(&part).and_then(|session| session.run(&[zeros]));
    let ran = ran.map_err(|error| GradError(error.to_string()))?;
    let value = |((slot, value), tensor): (&(Slot, ValueId), &Tensor)| {
        let refuse = || GradError(format!("tensor `{}` is {}", graph.value(*value).name, tensor.dtype().name()));
        Ok((*slot, grad::value_of(tensor).ok_or_else(refuse)?))
    };
    wanted.iter().zip(&ran).map(value).collect()
}

/// The length of the only row of `z`; 0 where there are more.
fn row_length(z: &Array<f32>) -> usize {
    match z.shape() {
        &[1, classes] => classes,
        _ => 0,
    }
}

/// The gradient of −ln softmax(z) at `class`.
fn of_class(z: &Array<f32>, class: usize) -> Array<f32> {
    let top = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut gradient = z.mapv(|z| (z - top).exp());
    let total: f32 = gradient.iter().sum();
    gradient.mapv_inplace(|w| w / total);
    gradient[&[0, class][..]] -= 1.0;
    gradient.into_shared()
}
