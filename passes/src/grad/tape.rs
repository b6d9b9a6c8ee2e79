//! The tape: steps in the order in which they run.

use super::{AnyRule, Array, Call, GradError, Inputs, Real, Value};

/// A place for one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(usize);

#[derive(Debug)]
struct Step {
    /// For messages.
    name: String,
    rule: Box<dyn AnyRule>,
    inputs: Vec<Option<Slot>>,
    outputs: Vec<Slot>,
}

/// A program with gradients: see [`super`].
#[derive(Debug, Default)]
pub struct Tape {
    steps: Vec<Step>,
    slots: usize,
    /// For every slot, whether a gradient that somebody wants passes it.
    carries: Vec<bool>,
}

/// The value of every slot for one sample.
#[derive(Debug)]
pub struct Values<T>(Vec<Option<Value<T>>>);

impl<T: Real> Values<T> {
    /// The numbers in `slot`, where there are any.
    pub fn real(&self, slot: Slot) -> Option<&Array<T>> {
        match &self.0[slot.0] {
            Some(Value::Real(array)) => Some(array),
            _ => None,
        }
    }
}

impl Tape {
    /// A slot that the caller fills before every run; `wanted` where its gradient is asked for.
    pub fn leaf(&mut self, wanted: bool) -> Slot {
        let slot = Slot(self.slots);
        self.slots += 1;
        self.carries.push(wanted);
        slot
    }

    /// Appends a step called `name`; returns the slots of its outputs.
    pub fn push(&mut self, name: &str, rule: Box<dyn AnyRule>, inputs: Vec<Option<Slot>>, outputs: usize) -> Vec<Slot> {
        let carries = inputs.iter().flatten().any(|slot| self.carries[slot.0]);
        let outputs: Vec<Slot> = (0..outputs).map(|_| self.leaf(carries)).collect();
        self.steps.push(Step { name: name.to_owned(), rule, inputs, outputs: outputs.clone() });
        outputs
    }

    /// Runs all steps with the leaves at what `leaves` says.
    ///
    /// # Errors
    /// [`GradError`] with the name of the step that does not run.
    pub fn forward<T: Real>(&self, leaves: impl IntoIterator<Item = (Slot, Value<T>)>) -> Result<Values<T>, GradError> {
        let mut values: Vec<Option<Value<T>>> = vec![None; self.slots];
        for (slot, value) in leaves {
            values[slot.0] = Some(value);
        }
        for step in &self.steps {
            let outputs = T::rule(&*step.rule).forward(&inputs(step, &values)).map_err(|e| at(step, &e))?;
            for (slot, output) in step.outputs.iter().zip(outputs) {
                values[slot.0] = Some(Value::Real(output));
            }
        }
        Ok(Values(values))
    }

    /// Takes the gradients in `seeds` back to the slots of `wanted`, in their order; `None` where none arrives.
    ///
    /// # Errors
    /// [`GradError`] with the name of the step that does not run.
    pub fn backward<T: Real>(
        &self,
        values: &Values<T>,
        seeds: impl IntoIterator<Item = (Slot, Array<T>)>,
        wanted: &[Slot],
    ) -> Result<Vec<Option<Array<T>>>, GradError> {
        let mut grads: Vec<Option<Array<T>>> = vec![None; self.slots];
        for (slot, grad) in seeds {
            add(&mut grads[slot.0], grad);
        }
        for step in self.steps.iter().rev() {
            if step.outputs.iter().all(|slot| grads[slot.0].is_none()) {
                continue;
            }
            let wants: Vec<bool> = step.inputs.iter().map(|slot| slot.is_some_and(|s| self.carries[s.0])).collect();
            let outputs = step.outputs.iter().map(|slot| values.real(*slot)).collect::<Option<Vec<_>>>();
            let call = Call {
                inputs: inputs(step, &values.0),
                outputs: outputs.ok_or_else(|| at(step, &GradError("it did not run forward".into())))?,
                grads: step.outputs.iter().map(|slot| grads[slot.0].as_ref()).collect(),
                wanted: &wants,
            };
            let back = T::rule(&*step.rule).backward(&call).map_err(|e| at(step, &e))?;
            for (slot, grad) in step.inputs.iter().zip(back) {
                if let (Some(slot), Some(grad)) = (slot, grad)
                    && self.carries[slot.0]
                {
                    add(&mut grads[slot.0], grad);
                }
            }
            for slot in step.outputs.iter().filter(|slot| !wanted.contains(slot)) {
                grads[slot.0] = None;
            }
        }
        Ok(wanted.iter().map(|slot| grads[slot.0].take()).collect())
    }
}

fn inputs<'a, T>(step: &Step, values: &'a [Option<Value<T>>]) -> Inputs<'a, T> {
    Inputs(step.inputs.iter().map(|slot| values[(*slot)?.0].as_ref()).collect())
}

fn at(step: &Step, error: &GradError) -> GradError {
    GradError(format!("node `{}`: {error}", step.name))
}

fn add<T: Real>(sum: &mut Option<Array<T>>, grad: Array<T>) {
    match sum {
        Some(sum) => *sum += &grad,
        None => *sum = Some(grad),
    }
}
