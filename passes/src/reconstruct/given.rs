//! What samples bring to a chain of blocks besides what blocks hand on.

use std::collections::{BTreeMap, BTreeSet};

use super::samples::Sample;
use crate::exec::Dataset;
use crate::grad::{self, Value};
use crate::id::ValueId;
use crate::ir::{Graph, walk};
use crate::lockstep;
use crate::model::Plan;
use crate::padding::Mask;
use crate::pass::{PassContext, PassError};
use crate::simulate::Simulation;
use crate::tensor::Tensor;

/// What one sample brings.
pub(super) struct Given {
    pub(super) values: BTreeMap<ValueId, Value<f32>>,
    /// What the teacher reads.
    pub(super) reads: Vec<Tensor>,
    /// What it says, where that is kept.
    pub(super) targets: Option<Sample>,
    pub(super) mask: Option<Mask>,
    /// What tells it from others: see [`lockstep::key`].
    pub(super) key: u64,
}

/// Computes it, in float. What does not depend on the sample (a table that is turned over, say) is computed once, and held once.
pub(super) struct Giver<'a> {
    graph: &'a Graph,
    dataset: &'a dyn Dataset,
    /// What blocks read, and what the teacher does.
    values: Vec<ValueId>,
    reads: Vec<ValueId>,
    /// Of these, what differs from sample to sample.
    own: Vec<ValueId>,
    float: Simulation,
    same: BTreeMap<ValueId, (Option<Tensor>, Option<Value<f32>>)>,
}

impl<'a> Giver<'a> {
    /// For blocks that read `values`, and a teacher that reads `reads`.
    pub(super) fn new(
        graph: &'a Graph,
        cx: &PassContext<'a>,
        values: BTreeSet<ValueId>,
        reads: &[ValueId],
    ) -> Result<Self, PassError> {
        let dataset = cx.dataset.filter(|data| !data.is_empty()).ok_or(PassError::NoData)?;
        let all: BTreeSet<ValueId> = values.iter().chain(reads).copied().collect();
        let differs = |value: &ValueId| !walk::needed(graph, &BTreeSet::new(), &[*value]).1.is_empty();
        let (own, same): (Vec<ValueId>, Vec<ValueId>) = all.into_iter().partition(differs);
        let constant = |(value, tensor): (ValueId, Tensor)| {
            let number = values.contains(&value).then(|| grad::value_of(&tensor)).flatten();
            (value, (reads.contains(&value).then_some(tensor), number))
        };
        let computed = match &*same {
            [] => Vec::new(),
            same => Simulation::prepare(graph, &Plan::default(), cx.executor, same)?.run(&dataset.sample(0)?)?,
        };
        let same = same.into_iter().zip(computed).map(constant).collect();
        let float = Simulation::prepare(graph, &Plan::default(), cx.executor, &own)?;
        Ok(Self { graph, dataset, values: values.into_iter().collect(), reads: reads.to_vec(), own, float, same })
    }

    /// How many samples there are.
    pub(super) fn samples(&self) -> usize {
        self.dataset.len()
    }

    /// Sample `index`, without what the teacher says of it.
    pub(super) fn sample(&self, index: usize) -> Result<Given, PassError> {
        let feeds = self.dataset.sample(index)?;
        let own: BTreeMap<ValueId, Tensor> = self.own.iter().copied().zip(self.float.run(&feeds)?).collect();
        let value = |value: &ValueId| {
            let number = match self.same.get(value) {
                Some((_, number)) => number.clone(),
                None => own.get(value).and_then(grad::value_of),
            };
            Some((*value, number?))
        };
        let same = |value: &ValueId| self.same.get(value).and_then(|(tensor, _)| tensor.as_ref());
        let read = |value: &ValueId| same(value).or_else(|| own.get(value)).cloned();
        let values: Option<BTreeMap<_, _>> = self.values.iter().map(value).collect();
        let reads: Option<Vec<Tensor>> = self.reads.iter().map(read).collect();
        let missing = || PassError::Model("a bug in onnx-quant: a block reads what is not there".into());
        let (values, reads) = values.zip(reads).ok_or_else(missing)?;
        Ok(Given { values, reads, targets: None, mask: Mask::of(self.graph, &feeds), key: lockstep::key(&feeds) })
    }

    /// The bytes of what all samples share.
    pub(super) fn shared_bytes(&self) -> u64 {
        let of = |(tensor, value): &(Option<Tensor>, Option<Value<f32>>)| {
            let numbers = value.as_ref().map_or(0, |value| value.shape().iter().product::<usize>());
            4 * (tensor.as_ref().map_or(0, Tensor::len) + numbers) as u64
        };
        self.same.values().map(of).sum()
    }

    /// The bytes that `given` takes, what all samples share left out: an upper bound, as whole numbers take eight.
    pub(super) fn bytes(&self, given: &Given) -> u64 {
        let is_own = |value: &ValueId| !self.same.contains_key(value);
        let values = given.values.iter().filter(|(value, _)| is_own(value));
        let values: usize = values.map(|(_, value)| value.shape().iter().product::<usize>()).sum();
        let reads = self.reads.iter().zip(&given.reads).filter(|(value, _)| is_own(value));
        8 * values as u64 + 4 * reads.map(|(_, tensor)| tensor.len() as u64).sum::<u64>()
    }
}
