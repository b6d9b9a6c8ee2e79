//! What a block reads behind rounded blocks, and what it should give: the float model's results.

use std::collections::{BTreeMap, BTreeSet};

use super::block::Program;
use super::block_stakes::BlockStakes;
use crate::exec::Session;
use crate::grad::{self, Array, Value};
use crate::id::ValueId;
use crate::ir::{Graph, walk};
use crate::judges;
use crate::lockstep::{Lockstep, Pair};
use crate::pass::{PassContext, PassError};

/// One sample of a block.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// One per feed of the program.
    pub(super) feeds: Vec<Value<f32>>,
    /// One per output of the program.
    pub(super) targets: Vec<Array<f32>>,
    /// For every output, which of its rows are words, where some are padding.
    pub(super) words: Vec<Option<Vec<bool>>>,
    /// For every output, what a squared error of each element weighs, up to a factor that all samples share; none where all weigh the same.
    pub(super) weights: Vec<Vec<f32>>,
}

/// What computes the targets, and those feeds that the block makes itself, from the float model's tensors.
struct Source<'a> {
    session: Box<dyn Session>,
    reads: Vec<ValueId>,
    wanted: Vec<ValueId>,
    /// What errors weigh, where they do not weigh the same.
    stakes: Option<&'a BlockStakes>,
}

impl<'a> Source<'a> {
    fn new(
        graph: &Graph,
        cx: &PassContext<'_>,
        program: &Program,
        before: &[ValueId],
        stakes: Option<&'a BlockStakes>,
    ) -> Result<Self, PassError> {
        let outputs = program.outputs.iter().map(|(_, value)| *value);
        let wanted: Vec<ValueId> = outputs.chain(program.inner.iter().copied()).collect();
        let part = walk::extract(graph, before, &wanted);
        let session = cx.executor.prepare(&part).map_err(crate::simulate::SimulateError::from)?;
        Ok(Self { session, reads: part.inputs().to_vec(), wanted, stakes })
    }

    /// Whether everything is there.
    fn is_fed(&self, program: &Program, pair: &Pair) -> bool {
        let feeds = program.feeds.iter().map(|(_, value)| value).filter(|value| !program.inner.contains(value));
        self.reads
            .iter()
            .chain(feeds)
            .all(|value| pair.whole(*value, false).is_some() && pair.whole(*value, true).is_some())
    }

    /// The sample of a pair: what the block reads as planned, or in float.
    fn sample(&self, program: &Program, pair: &Pair, planned: bool) -> Result<Sample, PassError> {
        let missing = || PassError::Model("a bug in onnx-quant: a block reads what is not there".into());
        let float = |value: &ValueId| pair.whole(*value, false).cloned().ok_or_else(missing);
        let feeds = self.reads.iter().map(float).collect::<Result<Vec<_>, _>>()?;
        let computed = self.session.run(&feeds).map_err(crate::simulate::SimulateError::from)?;
        let computed: BTreeMap<ValueId, _> = self.wanted.iter().copied().zip(computed).collect();
        let value = |(_, value): &(_, ValueId)| {
            let tensor = match computed.get(value).filter(|_| program.inner.contains(value)) {
                Some(tensor) => tensor,
                None => pair.whole(*value, planned).ok_or_else(missing)?,
            };
            grad::value_of(tensor).ok_or_else(missing)
        };
        let target = |(_, value): &(_, ValueId)| match computed.get(value).and_then(grad::value_of) {
            Some(Value::Real(array)) => Ok(array),
            _ => Err(missing()),
        };
        let targets = program.outputs.iter().map(target).collect::<Result<Vec<_>, PassError>>()?;
        let words = targets.iter().map(|target| pair.words(target.shape()).map(<[bool]>::to_vec)).collect();
        let feeds = program.feeds.iter().map(value).collect::<Result<_, PassError>>()?;
        let weights = self.stakes.map_or(Ok(Vec::new()), |stakes| {
            let weights = |(_, value): &(_, ValueId)| stakes.of_sample(*value, pair.index).map(<[f32]>::to_vec);
            program.outputs.iter().map(weights).collect::<Option<_>>().ok_or_else(missing)
        })?;
        Ok(Sample { feeds, targets, words, weights })
    }
}

/// The values that the nodes of the block read and do not make themselves, constants left out.
pub(super) fn before(graph: &Graph, nodes: &[crate::id::NodeId]) -> Vec<ValueId> {
    let inside: BTreeSet<_> = nodes.iter().copied().collect();
    let reads = nodes.iter().filter_map(|id| graph.node(*id)).flat_map(walk::reads);
    let outer = reads.filter(|value| {
        graph.constant(*value).is_none() && graph.producer(*value).is_none_or(|(id, _)| !inside.contains(&id))
    });
    outer.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Samples of a block.
#[derive(Debug)]
pub(super) struct Samples {
    /// In order: all, or as many of them, spread over all, as memory holds.
    pub(super) all: Vec<Sample>,
    /// Which sample each of them is, or is a variant of.
    pub(super) origins: Vec<usize>,
    /// What each of them reads in the float model, where that was asked for.
    pub(super) floats: Vec<Vec<Value<f32>>>,
    /// The first one as the float model has it.
    pub(super) float: Sample,
}

/// The numbers of a sample and of that which it is a variant of, the sample, and what it reads in the float model.
type Taken = ((usize, usize), Sample, Vec<Value<f32>>);

/// The samples of a block, `both` as planned and in float, with errors that weigh what `stakes` say; `None` where something that it reads
/// is not there yet.
pub(super) fn gather(
    walk: &Lockstep<'_>,
    graph: &Graph,
    cx: &PassContext<'_>,
    program: &Program,
    (before, stakes): (&[ValueId], Option<&BlockStakes>),
    both: bool,
) -> Result<Option<Samples>, PassError> {
    let source = Source::new(graph, cx, program, before, stakes)?;
    let origins: Vec<usize> = cx.dataset.map_or(Vec::new(), |data| (0..data.len()).map(|i| data.origin(i)).collect());
    let first = walk.each_on(
        1,
        || None,
        |kept: &mut Option<Sample>, pair| {
            if pair.index == 0 && source.is_fed(program, pair) {
                *kept = Some(source.sample(program, pair, false)?);
            }
            Ok(())
        },
    )?;
    let Some(float) = first.into_iter().flatten().next() else { return Ok(None) };
    // As much again waits between the stages of the walk.
    let room = cx.pair_budget / 2 / (bytes(&float).max(1) * if both { 2 } else { 1 });
    let room = usize::try_from(room).unwrap_or(usize::MAX).max(1);
    let chosen: BTreeSet<usize> = judges::chosen(&origins, room).into_iter().collect();
    let gathered = walk.each(Vec::new, |kept: &mut Vec<Taken>, pair| {
        if chosen.contains(&pair.index) {
            let feeds = if both { source.sample(program, pair, false)?.feeds } else { Vec::new() };
            kept.push(((pair.index, pair.origin), source.sample(program, pair, true)?, feeds));
        }
        Ok(())
    })?;
    let mut samples: Vec<Taken> = gathered.into_iter().flatten().collect();
    samples.sort_by_key(|(numbers, ..)| *numbers);
    let origins = samples.iter().map(|((_, origin), ..)| *origin).collect();
    let (all, floats) = samples.into_iter().map(|(_, sample, feeds)| (sample, feeds)).unzip();
    Ok(Some(Samples { all, origins, floats, float }))
}

impl Samples {
    /// The bytes of all.
    pub(super) fn bytes(&self) -> u64 {
        let floats = self.floats.iter().flatten().map(|value| 4 * count(value) as u64).sum::<u64>();
        self.all.iter().map(bytes).sum::<u64>() + floats
    }
}

/// How many numbers `value` holds.
fn count(value: &Value<f32>) -> usize {
    match value {
        Value::Real(array) => array.len(),
        Value::Whole(array) => array.len(),
    }
}

impl Sample {
    /// How many numbers it brings.
    pub(super) fn numbers(&self) -> usize {
        self.feeds.iter().map(count).sum()
    }

    /// What squared errors of an output weigh; nothing where all weigh the same.
    pub(super) fn weights(&self, output: usize) -> &[f32] {
        self.weights.get(output).map_or(&[], Vec::as_slice)
    }

    /// Shows the rows of `values`, which are laid out as an output, that are no padding.
    pub(super) fn rows(&self, output: usize, values: &[f32], mut see: impl FnMut(&[f32])) {
        match &self.words[output] {
            None => see(values),
            Some(words) => {
                let width = (values.len() / words.len().max(1)).max(1);
                values.chunks_exact(width).zip(words).filter(|(_, word)| **word).for_each(|(row, _)| see(row));
            }
        }
    }
}

/// An upper bound: whole numbers take eight bytes.
fn bytes(sample: &Sample) -> u64 {
    let feeds: usize = sample.feeds.iter().map(|value| value.shape().iter().product::<usize>()).sum();
    let targets: usize = sample.targets.iter().map(Array::len).sum();
    let weights: usize = sample.weights.iter().map(Vec::len).sum();
    8 * (feeds + targets + weights) as u64
}
