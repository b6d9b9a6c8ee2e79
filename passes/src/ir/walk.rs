//! Questions about the graph: who reads a value, what lies between two cuts.

use std::collections::BTreeSet;

use super::{Def, Graph, Node, TensorType};
use crate::id::{NodeId, ValueId};

/// One reader of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// Input `input` of `node`.
    Input {
        /// The reader.
        node: NodeId,
        /// Which input.
        input: u16,
    },
    /// A body of `node` captures it.
    Capture {
        /// The node with the body.
        node: NodeId,
    },
    /// The graph returns it.
    Output,
}

/// Every reader of every value, bodies and graph outputs included.
#[derive(Debug)]
pub struct Users {
    by_value: Vec<Vec<User>>,
}

impl Users {
    /// Walks `graph` once.
    #[expect(clippy::cast_possible_truncation, reason = "import refuses nodes with more than u16::MAX inputs")]
    pub fn of(graph: &Graph) -> Self {
        let mut by_value = vec![Vec::new(); graph.n_values()];
        for (id, node) in graph.nodes() {
            for (input, value) in node.inputs.iter().enumerate() {
                if let Some(value) = value {
                    by_value[value.index()].push(User::Input { node: id, input: input as u16 });
                }
            }
            for value in captures(node) {
                by_value[value.index()].push(User::Capture { node: id });
            }
        }
        for output in graph.outputs() {
            by_value[output.index()].push(User::Output);
        }
        Self { by_value }
    }

    /// The readers of `value`, in graph order.
    pub fn of_value(&self, value: ValueId) -> &[User] {
        self.by_value.get(value.index()).map_or(&[], Vec::as_slice)
    }

    /// The one node input that reads `value`, when nobody else does.
    pub fn only_input(&self, value: ValueId) -> Option<(NodeId, u16)> {
        match self.of_value(value) {
            [User::Input { node, input }] => Some((*node, *input)),
            _ => None,
        }
    }
}

/// The values of the enclosing graph that the bodies of `node` read, deeper bodies included, each once.
pub fn captures(node: &Node) -> BTreeSet<ValueId> {
    let captured = |graph: &Graph| -> Vec<ValueId> {
        graph
            .values
            .iter()
            .filter_map(|value| match value.def {
                Def::Capture(outer) => Some(outer),
                _ => None,
            })
            .collect()
    };
    node.bodies.iter().flat_map(|body| captured(&body.graph)).collect()
}

/// Every value that `node` reads: inputs, then captures.
pub fn reads(node: &Node) -> impl Iterator<Item = ValueId> + '_ {
    node.inputs.iter().flatten().copied().chain(captures(node))
}

/// The nodes needed to compute `wanted` when `given` values are fed, in graph order.
///
/// Graph inputs that are needed and not given are reported in the second place, in the order of the graph.
pub fn needed(graph: &Graph, given: &BTreeSet<ValueId>, wanted: &[ValueId]) -> (Vec<NodeId>, Vec<ValueId>) {
    let mut seen_values = BTreeSet::new();
    let mut nodes = BTreeSet::new();
    let mut pending: Vec<ValueId> = wanted.to_vec();
    while let Some(value) = pending.pop() {
        if given.contains(&value) || !seen_values.insert(value) {
            continue;
        }
        if let Some((id, node)) = graph.producer(value)
            && nodes.insert(id)
        {
            pending.extend(reads(node));
        }
    }
    let in_order = graph.order.iter().copied().filter(|id| nodes.contains(id)).collect();
    let missing = graph.inputs().iter().copied().filter(|input| seen_values.contains(input)).collect();
    (in_order, missing)
}

/// The part of `graph` that computes `outputs` from `inputs` (and from the graph inputs that are still needed, which
/// are appended to `inputs`). Ids, names and constants are those of `graph`.
pub fn extract(graph: &Graph, inputs: &[ValueId], outputs: &[ValueId]) -> Graph {
    let given: BTreeSet<ValueId> = inputs.iter().copied().collect();
    let (order, missing) = needed(graph, &given, outputs);
    let keep: BTreeSet<NodeId> = order.iter().copied().collect();
    let mut part = graph.clone();
    for (index, node) in part.nodes.iter_mut().enumerate() {
        if node.is_some() && !keep.contains(&NodeId(u32::try_from(index).unwrap_or(u32::MAX))) {
            *node = None;
        }
    }
    for &value in inputs {
        part.values[value.index()].def = Def::Input;
    }
    part.order = order;
    part.inputs = inputs.iter().copied().chain(missing).collect();
    part.outputs = outputs.to_vec();
    part
}

/// `graph` with its input `value` declared as of `shape`.
pub(crate) fn with_input_of(mut graph: Graph, value: ValueId, shape: &[usize]) -> Graph {
    if let Some(dtype) = graph.value(value).ty.dtype() {
        graph.values[value.index()].ty = super::Type::Tensor(TensorType::known(dtype, shape));
    }
    graph
}
