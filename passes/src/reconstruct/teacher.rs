//! What the float model says of a sample.

use std::collections::BTreeSet;

use super::samples::{self, Sample};
use crate::exec::Session;
use crate::grad::{self, Value};
use crate::id::{NodeId, ValueId};
use crate::ir::{Graph, walk};
use crate::padding::Mask;
use crate::pass::{PassContext, PassError};
use crate::simulate::SimulateError;
use crate::tensor::Tensor;

/// The part of the float model that computes what is returned.
pub(super) struct Teacher {
    /// None once it is not asked any more.
    session: Option<Box<dyn Session>>,
    /// What it reads.
    pub(super) reads: Vec<ValueId>,
    /// What it computes, of what the graph returns.
    pub(super) returned: Vec<ValueId>,
}

impl Teacher {
    /// From what the `last` nodes read where they compute all of `returned`; from the graph's inputs else.
    pub(super) fn of(
        graph: &Graph,
        cx: &PassContext<'_>,
        last: &[NodeId],
        returned: Vec<ValueId>,
    ) -> Result<Self, PassError> {
        let inside: BTreeSet<NodeId> = last.iter().copied().collect();
        let all = returned.iter().all(|value| graph.producer(*value).is_some_and(|(id, _)| inside.contains(&id)));
        let before = if all { samples::before(graph, last) } else { graph.inputs().to_vec() };
        let part = walk::extract(graph, &before, &returned);
        let session = cx.executor.prepare(&part).map_err(SimulateError::from)?;
        Ok(Self { session: Some(session), reads: part.inputs().to_vec(), returned })
    }

    /// Lets go of the model: nothing is asked any more.
    pub(super) fn dismiss(&mut self) {
        self.session = None;
    }

    /// What it says of a sample of which these are the `reads`.
    pub(super) fn says(&self, reads: &[Tensor], mask: Option<&Mask>) -> Result<Sample, PassError> {
        let gone = || PassError::Model("a bug in onnx-quant: the float model is asked after it was dropped".into());
        let computed = self.session.as_ref().ok_or_else(gone)?.run(reads).map_err(SimulateError::from)?;
        let target = |tensor: &Tensor| match grad::value_of(tensor) {
            Some(Value::Real(array)) => Ok(array),
            _ => Err(PassError::Model("a bug in onnx-quant: what is returned is no float tensor".into())),
        };
        let targets = computed.iter().map(target).collect::<Result<Vec<_>, PassError>>()?;
        let words = targets.iter().map(|target| mask?.words(target.shape()).map(<[bool]>::to_vec)).collect();
        Ok(Sample { feeds: Vec::new(), targets, words, weights: Vec::new() })
    }
}
