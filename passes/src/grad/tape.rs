//! The tape: steps in the order in which they run.

use std::ops::Range;

use super::{AnyRule, Array, Call, GradError, Inputs, Real, Value};

/// A place for one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(usize);

/// The bytes that a run takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Of every slot that a step makes; 0 of leaves.
    pub(crate) slots: Vec<u64>,
    /// The most that a step takes for itself while it runs.
    pub(crate) aside: u64,
}

impl Sizes {
    /// Those of `slot`.
    pub fn of(&self, slot: Slot) -> u64 {
        self.slots[slot.0]
    }

    /// The same of a sample that is so many times as large.
    #[must_use]
    pub fn times(mut self, n: u64) -> Self {
        self.slots.iter_mut().chain([&mut self.aside]).for_each(|bytes| *bytes = bytes.saturating_mul(n));
        self
    }
}

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
        real(&self.0, slot)
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
        self.forward_in(leaves, &[], &[])
    }

    /// As [`Self::forward`]; of what is made before each of the steps `cuts`, only what is read behind it and `ends` are kept.
    ///
    /// # Errors
    /// [`GradError`] with the name of the step that does not run.
    pub fn forward_in<T: Real>(
        &self,
        leaves: impl IntoIterator<Item = (Slot, Value<T>)>,
        cuts: &[usize],
        ends: &[Slot],
    ) -> Result<Values<T>, GradError> {
        let mut values = self.filled(leaves);
        let last = self.last_readers(ends);
        for part in self.parts(cuts) {
            self.run_steps(part.clone(), &mut values)?;
            if part.end < self.steps.len() {
                let made = self.steps[part.clone()].iter().flat_map(|step| &step.outputs);
                made.filter(|slot| last[slot.0] < part.end).for_each(|slot| values[slot.0] = None);
            }
        }
        Ok(Values(values))
    }

    /// The bytes that a run takes with the leaves at what `leaves` says, and what it gives at `ends`. Nothing else is kept longer than it is
    /// read.
    ///
    /// # Errors
    /// [`GradError`] with the name of the step that does not run.
    pub fn sizes<T: Real>(
        &self,
        leaves: impl IntoIterator<Item = (Slot, Value<T>)>,
        ends: &[Slot],
    ) -> Result<(Sizes, Values<T>), GradError> {
        let (mut values, mut sizes) = (self.filled(leaves), Sizes { slots: vec![0; self.slots], aside: 0 });
        let last = self.last_readers(ends);
        for (at, step) in self.steps.iter().enumerate() {
            sizes.aside = sizes.aside.max(T::rule(&*step.rule).aside(&inputs(step, &values)));
            self.run_steps(at..at + 1, &mut values)?;
            for slot in &step.outputs {
                if let Some(Value::Real(array)) = &values[slot.0] {
                    sizes.slots[slot.0] = (array.len() * size_of::<T>()) as u64;
                }
            }
            let read = step.inputs.iter().flatten().chain(&step.outputs);
            read.filter(|slot| last[slot.0] <= at).for_each(|slot| values[slot.0] = None);
        }
        Ok((sizes, Values(values)))
    }

    /// The most bytes that a run forward and back takes with these `cuts`, by the `sizes` of slots: of every part what later ones read, of one
    /// part all, and as much again for gradients; and what one step takes for itself.
    pub fn bytes(&self, cuts: &[usize], ends: &[Slot], sizes: &Sizes) -> u64 {
        let last = self.last_readers(ends);
        let (mut across, mut largest, mut last_part) = (0_u64, 0, 0);
        for part in self.parts(cuts) {
            let made = || self.steps[part.clone()].iter().flat_map(|step| &step.outputs);
            let kept = made().filter(|slot| part.end < self.steps.len() && last[slot.0] >= part.end);
            across += kept.map(|slot| sizes.of(*slot)).sum::<u64>();
            last_part = made().map(|slot| sizes.of(*slot)).sum::<u64>();
            largest = last_part.max(largest);
        }
        // The last part stays while the others run again.
        2 * (across + largest) + if cuts.is_empty() { 0 } else { last_part } + sizes.aside
    }

    /// Where to cut for so many `parts` of about as many bytes each.
    pub fn cut_in(&self, parts: usize, sizes: &Sizes) -> Vec<usize> {
        let of = |step: &Step| step.outputs.iter().map(|slot| sizes.of(*slot)).sum::<u64>();
        let all: u64 = self.steps.iter().map(of).sum();
        let (mut cuts, mut so_far) = (Vec::new(), 0_u64);
        for (at, step) in self.steps.iter().enumerate() {
            // The next part begins where its share of the bytes does.
            let begun = so_far.saturating_mul(parts as u64) / all.max(1);
            if at > 0 && begun > cuts.len() as u64 {
                cuts.push(at);
            }
            so_far += of(step);
        }
        cuts
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
        self.backward_in(values, seeds, wanted, &[])
    }

    /// As [`Self::backward`] from what [`Self::forward_in`] has kept with the same `cuts`: every part but the last runs once more. The same
    /// bits, as steps come in the same order.
    ///
    /// # Errors
    /// [`GradError`] with the name of the step that does not run.
    pub fn backward_in<T: Real>(
        &self,
        values: &Values<T>,
        seeds: impl IntoIterator<Item = (Slot, Array<T>)>,
        wanted: &[Slot],
        cuts: &[usize],
    ) -> Result<Vec<Option<Array<T>>>, GradError> {
        let mut grads: Vec<Option<Array<T>>> = vec![None; self.slots];
        for (slot, grad) in seeds {
            add(&mut grads[slot.0], grad);
        }
        for part in self.parts(cuts).into_iter().rev() {
            if part.end == self.steps.len() {
                self.back_steps(part, &values.0, &mut grads, wanted)?;
            } else {
                let mut again = values.0.clone();
                self.run_steps(part.clone(), &mut again)?;
                self.back_steps(part, &again, &mut grads, wanted)?;
            }
        }
        Ok(wanted.iter().map(|slot| grads[slot.0].take()).collect())
    }

    fn filled<T: Real>(&self, leaves: impl IntoIterator<Item = (Slot, Value<T>)>) -> Vec<Option<Value<T>>> {
        let mut values: Vec<Option<Value<T>>> = vec![None; self.slots];
        for (slot, value) in leaves {
            values[slot.0] = Some(value);
        }
        values
    }

    /// The steps between `cuts`.
    fn parts(&self, cuts: &[usize]) -> Vec<Range<usize>> {
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([self.steps.len()]);
        starts.zip(ends).map(|(start, end)| start..end).collect()
    }

    /// The last step that reads each slot; beyond all of them for `ends`.
    fn last_readers(&self, ends: &[Slot]) -> Vec<usize> {
        let mut last = vec![0; self.slots];
        for (at, step) in self.steps.iter().enumerate() {
            step.inputs.iter().flatten().for_each(|slot| last[slot.0] = at);
        }
        ends.iter().for_each(|slot| last[slot.0] = usize::MAX);
        last
    }

    fn run_steps<T: Real>(&self, steps: Range<usize>, values: &mut [Option<Value<T>>]) -> Result<(), GradError> {
        for step in &self.steps[steps] {
            let outputs = T::rule(&*step.rule).forward(&inputs(step, values)).map_err(|e| at(step, &e))?;
            for (slot, output) in step.outputs.iter().zip(outputs) {
                values[slot.0] = Some(Value::Real(output));
            }
        }
        Ok(())
    }

    fn back_steps<T: Real>(
        &self,
        steps: Range<usize>,
        values: &[Option<Value<T>>],
        grads: &mut [Option<Array<T>>],
        wanted: &[Slot],
    ) -> Result<(), GradError> {
        for step in self.steps[steps].iter().rev() {
            if step.outputs.iter().all(|slot| grads[slot.0].is_none()) {
                continue;
            }
            let wants: Vec<bool> = step.inputs.iter().map(|slot| slot.is_some_and(|s| self.carries[s.0])).collect();
            let outputs = step.outputs.iter().map(|slot| real(values, *slot)).collect::<Option<Vec<_>>>();
            let call = Call {
                inputs: inputs(step, values),
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
        Ok(())
    }
}

/// The numbers in `slot`, where there are any.
fn real<T>(values: &[Option<Value<T>>], slot: Slot) -> Option<&Array<T>> {
    match &values[slot.0] {
        Some(Value::Real(array)) => Some(array),
        _ => None,
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ir::{Attrs, Node, OpKey};

    fn rule(op: &str) -> Box<dyn AnyRule> {
        let node = Node {
            name: op.into(),
            op: OpKey { domain: "".into(), name: op.into(), opset: 21 },
            inputs: Vec::new(),
            outputs: Vec::new(),
            attrs: Attrs::new(),
            bodies: Vec::new(),
            notes: None,
        };
        super::super::rule(&node).unwrap()
    }

    /// A leaf, another one, and so many sums of the second and what is there, one behind the other; with the last one.
    pub(crate) fn tape_of_sums(n: usize) -> (Tape, Slot) {
        let mut tape = Tape::default();
        let (mut at, other) = (tape.leaf(true), tape.leaf(true));
        for step in 0..n {
            at = tape.push(&format!("sum {step}"), rule("Add"), vec![Some(at), Some(other)], 1)[0];
        }
        (tape, at)
    }

    fn leaf(slot: usize, seed: u16) -> (Slot, Value<f32>) {
        let values = (0..6_u16).map(|i| f32::from((i * 7 + seed) % 11) / 7.0 - 0.6).collect();
        (Slot(slot), Value::Real(Array::from_shape_vec(vec![2, 3], values).unwrap()))
    }

    /// With skips over cuts, and ends in the middle.
    #[test]
    fn a_tape_in_parts_gives_the_same_bits() {
        let mut tape = Tape::default();
        let (a, b) = (tape.leaf(true), tape.leaf(true));
        let mut made = vec![a, b];
        for (step, op) in ["Tanh", "Mul", "Sigmoid", "Add", "Mul", "Tanh", "Add", "Mul"].iter().enumerate() {
            let back = |n: usize| Some(made[made.len() - n]);
            let inputs = if matches!(*op, "Add" | "Mul") { vec![back(1), back(3)] } else { vec![back(1)] };
            let slot = tape.push(&format!("step {step}"), rule(op), inputs, 1)[0];
            made.push(slot);
        }
        let ends = [made[5], made[9]];
        let leaves = || [leaf(0, 1), leaf(1, 5)];
        let seeds = || {
            ends.map(|end| {
                (
                    end,
                    match leaf(0, 3).1 {
                        Value::Real(array) => array,
                        Value::Whole(_) => unreachable!("numbers"),
                    },
                )
            })
        };
        let whole = tape.forward(leaves()).unwrap();
        let want = tape.backward(&whole, seeds(), &[a, b]).unwrap();
        let (sizes, at_ends) = tape.sizes(leaves(), &ends).unwrap();
        assert_eq!(sizes, Sizes { slots: [vec![0, 0], vec![24; 8]].concat(), aside: 0 });
        assert!(ends.iter().all(|end| at_ends.real(*end) == whole.real(*end)));
        for cuts in [vec![], vec![1], vec![4], vec![2, 5], vec![1, 2, 3, 4, 5, 6, 7]] {
            let values = tape.forward_in(leaves(), &cuts, &ends).unwrap();
            assert!(ends.iter().all(|end| values.real(*end) == whole.real(*end)), "{cuts:?}");
            assert_eq!(tape.backward_in(&values, seeds(), &[a, b], &cuts).unwrap(), want, "{cuts:?}");
        }
        // What nobody reads any more is not kept.
        assert!(tape.forward_in(leaves(), &[4], &ends).unwrap().real(made[2]).is_none());
    }

    /// Windows that are gathered are counted, one convolution at a time; a kernel of one element gathers none.
    #[test]
    fn what_a_convolution_gathers_is_counted() {
        let aside = |kernel: usize| {
            let mut tape = Tape::default();
            let (x, w) = (tape.leaf(true), tape.leaf(true));
            let y = tape.push("conv", rule("Conv"), vec![Some(x), Some(w)], 1)[0];
            let real = |shape: Vec<usize>| Value::Real(Array::<f32>::zeros(shape));
            let leaves = [(x, real(vec![1, 2, 5, 5])), (w, real(vec![4, 2, kernel, kernel]))];
            tape.sizes(leaves, &[y]).unwrap().0.aside
        };
        // Nine windows of two channels of nine elements.
        assert_eq!((aside(3), aside(1)), (4 * 2 * 9 * 9, 0));
    }

    #[test]
    fn parts_take_less_and_have_about_as_many_bytes_each() {
        let (tape, end) = tape_of_sums(8);
        let sizes = Sizes { slots: [vec![0, 0], vec![100; 8]].concat(), aside: 0 };
        assert_eq!([2, 4, 8, 20].map(|parts| tape.cut_in(parts, &sizes).len()), [1, 3, 7, 7]);
        assert_eq!(tape.cut_in(2, &sizes), [4]);
        // By hand: all eight and their gradients; four, the one that is read across, as much again, and the last four.
        assert_eq!(tape.bytes(&[], &[end], &sizes), 1600);
        assert_eq!(tape.bytes(&[4], &[end], &sizes), 1400);
        // One step runs at a time.
        let aside = Sizes { aside: 70, ..sizes.clone() };
        assert_eq!(tape.bytes(&[4], &[end], &aside), 1470);
        assert_eq!(aside.times(3), Sizes { slots: [vec![0, 0], vec![300; 8]].concat(), aside: 210 });
    }
}
