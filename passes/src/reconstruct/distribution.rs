//! Inputs of a block moved a little, until what it computes has the means and deviations that batch normalization saw in training.
//!
//! A group of samples has other statistics than all that a model was trained on. Where those are known (batch normalizations that were
//! folded say them), what a block reads is moved by steps against
//!
//! ```text
//! Σ tensors  mean over channels of ((m − μ) / σ)² + ((s − σ) / σ)²   +   mean of (x − x₀)² / (λ mean of x₀²)
//! ```
//!
//! with m and s of the group, μ and σ of training, all of it in the float model. Both versions of what the block reads are moved alike.
//! What errors weigh (`loss=fisher`) was measured on samples that are not moved.
//!
//! Source: Liu et al. 2023 (PD-Quant), arXiv:2212.07048, section 3.4; statistics of groups, in units of σ, and moving the planned version
//! along ours.

use std::sync::Arc;

use super::adam::Adam;
use super::block::{Also, Program};
use super::blocks::Block;
use super::chain::FLOAT;
use super::moments::{self, Moments};
use super::run::Leaves;
use super::samples::Samples;
use crate::grad::{Array, GradError, Slot, Value, Values};
use crate::id::ValueId;
use crate::ir::Graph;
use crate::judges;
use crate::lockstep;
use crate::model::{Plan, Stats, Trained};
use crate::parallel;

/// λ of the authors for residual networks.
const LAMBDA: f64 = 0.02;
/// So many samples have their statistics together.
pub(super) const GROUP: usize = 32;
const STEPS: usize = 50;
/// Bytes of every number that moves: as it is read, how it moves and did before, a gradient, and what Adam remembers of two.
const PER_MOVED: u64 = 24;
/// The size of the first steps, in root mean squares of what is moved.
const RATE: f32 = 0.01;

/// A block in float, with what training saw of its tensors.
pub(super) struct Correction {
    program: Program,
    leaves: Leaves,
    marks: Vec<(Slot, Arc<Trained>)>,
    /// Which of what the program is fed moves.
    moved: Vec<usize>,
    lambda: f64,
    /// Tapes that run side by side, at most.
    at_once: usize,
}

/// How one sample is moved, by what moves.
type Moves = Vec<Vec<f32>>;

/// What a group of samples reads, where it may move, and how it has been moved.
struct Group<'a> {
    feeds: Vec<&'a [Value<f32>]>,
    moves: Vec<Moves>,
    /// λ times the sum of squares of each that moves.
    powers: Vec<f64>,
}

impl Correction {
    /// That of `block`; `None` where training says nothing of its tensors, or it reads nothing that may be moved.
    pub(super) fn of(
        graph: &Graph,
        stats: &Stats,
        (plan, given): (&Plan, &Plan),
        block: &Block,
        strength: f64,
    ) -> Result<Option<Self>, GradError> {
        let also = Also { inputs: true, ..Also::default() };
        let program = Program::of(graph, plan, given, block, also).map_err(GradError)?;
        let seen = |(value, slot): (&ValueId, &Slot)| Some((*slot, Arc::clone(stats.trained(*value)?)));
        let marks: Vec<(Slot, Arc<Trained>)> = program.computed.iter().filter_map(seen).collect();
        let touched = lockstep::touched(graph, plan);
        let moves =
            |(_, (_, value)): &(usize, &(Slot, ValueId))| touched.contains(value) && !program.inner.contains(value);
        let moved: Vec<usize> = program.feeds.iter().enumerate().filter(moves).map(|(at, _)| at).collect();
        if marks.is_empty() || moved.is_empty() {
            return Ok(None);
        }
        let leaves = program.float_leaves();
        Ok(Some(Self { program, leaves, marks, moved, lambda: LAMBDA * strength, at_once: usize::MAX }))
    }

    /// The same with as many tapes side by side as so many `bytes` hold beside a group of samples that are `longest` times as large as
    /// `feeds`; inside, the bytes that one takes where they do not hold it.
    pub(super) fn within(
        self,
        feeds: &[Value<f32>],
        longest: usize,
        bytes: u64,
    ) -> Result<Result<Self, u64>, GradError> {
        let sizes = self.program.sizes(feeds)?.0.times(longest.max(1) as u64);
        let ends: Vec<Slot> = self.marks.iter().map(|(slot, _)| *slot).collect();
        let tape = self.program.tape.bytes(&[], &ends, &sizes).max(1);
        let moved: usize = self.moved.iter().filter_map(|at| real(&feeds[*at])).map(Array::len).sum();
        let group = PER_MOVED * (GROUP * moved * longest.max(1)) as u64;
        let at_once = usize::try_from(bytes.saturating_sub(group) / tape).unwrap_or(usize::MAX);
        tracing::debug!(tape, group, bytes, at_once, "memory of moves");
        Ok(if at_once > 0 { Ok(Self { at_once, ..self }) } else { Err(tape.saturating_add(group)) })
    }

    /// Where `program`, which begins with the block, is fed what this one is.
    fn places(&self, program: &Program) -> Result<Vec<usize>, GradError> {
        let place = |(_, value): &(Slot, ValueId)| program.feeds.iter().position(|(_, other)| other == value);
        let places = self.program.feeds.iter().map(place).collect::<Option<Vec<usize>>>();
        places.ok_or_else(|| GradError("what it reads cannot be moved: its first nodes are not learned".into()))
    }

    /// What it is fed of what `program` is.
    pub(super) fn feeds(&self, program: &Program, feeds: &[Value<f32>]) -> Result<Vec<Value<f32>>, GradError> {
        Ok(self.places(program)?.into_iter().map(|at| feeds[at].clone()).collect())
    }

    /// Moves the samples that `program`, which begins with the block, is learned from; their targets become what the float model makes
    /// of them. Those held out stay as they are. Returns how far statistics were from those of training, and how far they are now.
    pub(super) fn apply(&self, program: &Program, samples: &mut Samples) -> Result<(f64, f64), GradError> {
        let missing = || GradError("a bug in onnx-quant: a block reads what is not there".into());
        let places = self.places(program)?;
        let (_, learned) = judges::split(&samples.origins);
        let leaves = program.float_leaves();
        let mut distances = (0.0, 0.0);
        for group in learned.chunks(GROUP) {
            let own =
                |i: &usize| -> Vec<Value<f32>> { places.iter().map(|at| samples.floats[*i][*at].clone()).collect() };
            let feeds: Vec<Vec<Value<f32>>> = group.iter().map(own).collect();
            let (moves, first, last) = self.moves(&feeds)?;
            let share = group.len() as f64 / learned.len() as f64;
            distances = (distances.0 + share * first, distances.1 + share * last);
            for (i, moves) in group.iter().zip(moves) {
                for (at, by) in self.moved.iter().zip(&moves) {
                    shift(&mut samples.floats[*i][places[*at]], by);
                    shift(&mut samples.all[*i].feeds[places[*at]], by);
                }
            }
            let floats = &samples.floats;
            let at_once = self.at_once.min(program.room.at_once);
            let targets = parallel::few_of(at_once, group.iter(), |i| {
                let values = program.run(&leaves, &floats[*i], FLOAT)?;
                let target = |(slot, _): &(Slot, ValueId)| values.real(*slot).cloned().ok_or_else(missing);
                program.outputs.iter().map(target).collect::<Result<Vec<_>, _>>()
            });
            for (i, targets) in group.iter().zip(targets) {
                samples.all[*i].targets = targets?;
            }
        }
        Ok(distances)
    }

    /// How every sample of a group moves, and how far its statistics were from those of training and are then.
    fn moves(&self, feeds: &[Vec<Value<f32>>]) -> Result<(Vec<Moves>, f64, f64), GradError> {
        let mut group = self.group(feeds);
        let (first, still) = (self.loss(&group)?, group.moves.clone());
        let rates: Vec<f32> = (0..self.moved.len()).map(|at| RATE * self.size(&group, at)).collect();
        let fresh = |moves: &Moves| moves.iter().map(|by| Adam::new(by.len())).collect::<Vec<Adam>>();
        let mut adam: Vec<Vec<Adam>> = group.moves.iter().map(fresh).collect();
        for step in 0..STEPS {
            let gradients = self.gradients(&group)?;
            let decay = 0.5 * (1.0 + (std::f32::consts::PI * step as f32 / STEPS as f32).cos());
            for ((moves, adam), gradients) in group.moves.iter_mut().zip(&mut adam).zip(gradients) {
                for (at, gradient) in gradients.iter().enumerate() {
                    adam[at].step(&mut moves[at], gradient, rates[at] * decay);
                }
            }
        }
        let last = self.loss(&group)?;
        // What has become worse, or no number, has not been moved.
        if last.0 < first.0 { Ok((group.moves, first.1, last.1)) } else { Ok((still, first.1, first.1)) }
    }

    fn group<'a>(&self, feeds: &'a [Vec<Value<f32>>]) -> Group<'a> {
        let len = |feeds: &[Value<f32>], at: usize| real(&feeds[at]).map_or(0, Array::len);
        let still = |feeds: &Vec<Value<f32>>| self.moved.iter().map(|at| vec![0.0; len(feeds, *at)]).collect();
        let power = |at: &usize| {
            let all = feeds.iter().filter_map(|feeds| real(&feeds[*at])).flatten();
            self.lambda * all.map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().max(1e-30)
        };
        Group {
            feeds: feeds.iter().map(Vec::as_slice).collect(),
            moves: feeds.iter().map(still).collect(),
            powers: self.moved.iter().map(power).collect(),
        }
    }

    /// The root mean square of what moves in place `at`.
    #[expect(clippy::cast_possible_truncation, reason = "a rate")]
    fn size(&self, group: &Group<'_>, at: usize) -> f32 {
        let count: usize = group.moves.iter().map(|moves| moves[at].len()).sum();
        (group.powers[at] / self.lambda / count.max(1) as f64).sqrt() as f32
    }

    /// Runs sample `i` of a group as it has been moved.
    fn run(&self, group: &Group<'_>, i: usize) -> Result<Values<f32>, GradError> {
        let mut feeds = group.feeds[i].to_vec();
        self.moved.iter().zip(&group.moves[i]).for_each(|(at, by)| shift(&mut feeds[*at], by));
        self.program.run(&self.leaves, &feeds, FLOAT)
    }

    fn marked(values: &Values<f32>, slot: Slot) -> Result<&Array<f32>, GradError> {
        values.real(slot).ok_or_else(|| GradError("a bug in onnx-quant: a layer without a result".into()))
    }

    /// The moments of every marked tensor over the group.
    fn moments(&self, group: &Group<'_>) -> Result<Vec<Moments>, GradError> {
        let each = parallel::few_of(self.at_once, 0..group.feeds.len(), |i| {
            let values = self.run(group, i)?;
            let moments =
                |(slot, trained): &(Slot, Arc<Trained>)| Moments::of(Self::marked(&values, *slot)?, trained.mean.len());
            self.marks.iter().map(moments).collect::<Result<Vec<Moments>, GradError>>()
        });
        let mut all = vec![Moments::default(); self.marks.len()];
        for moments in each {
            all.iter_mut().zip(&moments?).for_each(|(all, one)| all.add(one));
        }
        Ok(all)
    }

    /// What is minimized, and the part of it that is about statistics.
    fn loss(&self, group: &Group<'_>) -> Result<(f64, f64), GradError> {
        let moments = self.moments(group)?;
        let apart: f64 = self.marks.iter().zip(&moments).map(|((_, trained), m)| moments::distance(trained, m)).sum();
        let moved = |(at, power): (usize, &f64)| {
            let squares = group.moves.iter().flat_map(|moves| &moves[at]).map(|by| f64::from(*by) * f64::from(*by));
            squares.sum::<f64>() / power
        };
        Ok((apart + group.powers.iter().enumerate().map(moved).sum::<f64>(), apart))
    }

    /// The gradients of [`Self::loss`] by all moves.
    #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
    fn gradients(&self, group: &Group<'_>) -> Result<Vec<Moves>, GradError> {
        let moments = self.moments(group)?;
        let wanted: Vec<Slot> = self.moved.iter().map(|at| self.program.feeds[*at].0).collect();
        let each = parallel::few_of(self.at_once, 0..group.feeds.len(), |i| {
            // Tapes of a whole group would take much memory.
            let values = self.run(group, i)?;
            let seed = |((slot, trained), moments): (&(Slot, Arc<Trained>), &Moments)| {
                Ok((*slot, moments::gradient(trained, moments, Self::marked(&values, *slot)?)?))
            };
            let seeds = self.marks.iter().zip(&moments).map(seed).collect::<Result<Vec<_>, GradError>>()?;
            let grads = self.program.tape.backward(&values, seeds, &wanted)?;
            let mut all = Vec::new();
            for ((grad, by), power) in grads.iter().zip(&group.moves[i]).zip(&group.powers) {
                let mut sum: Vec<f32> = by.iter().map(|by| (2.0 * f64::from(*by) / power) as f32).collect();
                sum.iter_mut().zip(grad.iter().flatten()).for_each(|(sum, g)| *sum += g);
                all.push(sum);
            }
            Ok::<Moves, GradError>(all)
        });
        each.collect()
    }
}

/// The numbers of `value`.
fn real(value: &Value<f32>) -> Option<&Array<f32>> {
    match value {
        Value::Real(array) => Some(array),
        Value::Whole(_) => None,
    }
}

/// Moves `value` by numbers in the order of its elements.
fn shift(value: &mut Value<f32>, by: &[f32]) {
    if let Value::Real(array) = value {
        array.iter_mut().zip(by).for_each(|(v, by)| *v += by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::TensorType;
    use crate::model::{Edit, Patch, Statistic};
    use crate::reconstruct::blocks::{all_weights, blocks};
    use crate::reconstruct::moments::tests::{drawn, trained};
    use crate::tensor::DType;

    const TWO_LAYERS: &str = "graph (%x: f32[1,2,5,4]) -> (%z: f32[1,3,3,4]) {
        %v = const f32[2,2,1,1] rand(seed=3, std=0.7)
        %w = const f32[3,2,3,1] rand(seed=5, std=0.5)
        %y = Conv(%x, %v)
        %r = Sigmoid(%y)
        %z = Conv(%r, %w)
    }";

    /// The second layer is learned, and reads what the first one gives; training says something of its result.
    fn correction(strength: f64) -> Correction {
        let mut model = crate::text::parse(TWO_LAYERS).unwrap();
        let mut patch = Patch::on(&model);
        for value in model.graph().nodes().filter_map(|(_, node)| node.output(0)).take(2) {
            patch.edit(Edit::Refine { value, ty: TensorType::known(DType::F32, &[1, 2, 5, 4]) });
        }
        model.apply(patch).unwrap();
        let plan = all_weights(model.graph());
        let blocks = blocks(model.graph(), &plan, 1, None);
        let mut stats = Stats::default();
        let result = blocks[1].outputs[0];
        stats.record(result, Statistic::Trained(Arc::new(trained())));
        let of = Correction::of(model.graph(), &stats, (&plan, &plan), &blocks[1], strength).unwrap();
        let none = Correction::of(model.graph(), &stats, (&plan, &plan), &blocks[0], strength).unwrap();
        assert!(none.is_none(), "training says nothing of the first block");
        of.unwrap()
    }

    fn samples(correction: &Correction) -> Vec<Vec<Value<f32>>> {
        assert_eq!((correction.program.feeds.len(), correction.moved.len()), (1, 1));
        (0..4).map(|seed| vec![Value::Real(drawn(seed, &[1, 2, 5, 4]))]).collect()
    }

    #[test]
    fn memory_decides_how_many_run_at_once_and_not_how_they_move() {
        let feeds = samples(&correction(5.0));
        let moved = |bytes: u64| {
            let found = correction(5.0).within(&feeds[0], 1, bytes).unwrap();
            found.map(|found| (found.at_once, found.moves(&feeds).unwrap().0))
        };
        let (_, plenty) = moved(1 << 30).unwrap();
        let least = moved(0).unwrap_err();
        let (at_once, tight) = moved(least).unwrap();
        assert!(at_once == 1 && tight == plenty && moved(least - 1) == Err(least));
    }

    /// Central differences of all that is minimized, through the block.
    #[test]
    fn gradients_of_moves_pass_the_block() {
        let correction = correction(5.0);
        let feeds = samples(&correction);
        let mut group = correction.group(&feeds);
        group.moves.iter_mut().flatten().flatten().enumerate().for_each(|(i, by)| *by = 0.01 * (i % 7) as f32);
        let got = correction.gradients(&group).unwrap();
        for (sample, i) in [(0, 0), (1, 7), (2, 19), (3, 30), (3, 39)] {
            let mut at = |by: f32| {
                group.moves[sample][0][i] += by;
                correction.loss(&group).unwrap().0
            };
            let (above, below) = (at(0.02), at(-0.04));
            at(0.02);
            let (g, want) = (f64::from(got[sample][0][i]), (above - below) / 0.04);
            assert!((g - want).abs() < 1e-2 * (1e-2 + want.abs()), "{sample}, {i}: {g} {want}");
        }
    }

    /// Invariants of the method: the freer the moves the nearer the statistics; none where a move costs everything.
    #[test]
    fn moves_bring_statistics_near_to_those_of_training() {
        let mut before = f64::INFINITY;
        for strength in [1e-6, 1.0, 100.0] {
            let correction = correction(strength);
            let feeds = samples(&correction);
            let (moves, first, last) = correction.moves(&feeds).unwrap();
            assert!(last <= first && last <= before + 1e-9, "{strength}: {first} to {last}, {before} before");
            before = last;
            let largest = moves.iter().flatten().flatten().fold(0.0_f32, |top, by| top.max(by.abs()));
            if strength < 1e-3 {
                assert!(largest < 1e-2, "{largest}");
            } else {
                assert!(last < 0.98 * first && largest > 1e-3, "{strength}: {first} to {last}, {largest}");
            }
        }
    }
}
