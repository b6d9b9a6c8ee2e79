//! Blocks: parts of the graph that one tensor enters and one tensor leaves.

use std::collections::{BTreeMap, BTreeSet};

use super::block::{Also, Program};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{self, Users};
use crate::lockstep;
use crate::model::Plan;
use crate::ops;

/// Some nodes of the graph, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Those whose results the plan changes.
    pub nodes: Vec<NodeId>,
    /// What is read behind the block.
    pub outputs: Vec<ValueId>,
    /// How many of the nodes are linear with an encoded weight.
    pub layers: usize,
}

impl Block {
    /// The same, followed by everything that depends on it, to what the graph returns.
    pub(super) fn with_rest(&self, graph: &Graph) -> Self {
        let mut reached: BTreeSet<ValueId> = self.outputs.iter().copied().collect();
        let mut nodes = self.nodes.clone();
        let own: BTreeSet<NodeId> = nodes.iter().copied().collect();
        for (id, node) in graph.nodes().filter(|(id, _)| !own.contains(id)) {
            if walk::reads(node).any(|value| reached.contains(&value)) {
                nodes.push(id);
                reached.extend(node.outputs.iter().flatten());
            }
        }
        let returned = graph.outputs().iter().copied().filter(|value| reached.contains(value));
        let outputs: BTreeSet<ValueId> = self.outputs.iter().copied().chain(returned).collect();
        Self { nodes, outputs: outputs.into_iter().collect(), layers: self.layers }
    }

    /// What `plan` says about what the block reads.
    pub(super) fn own(&self, graph: &Graph, plan: &Plan) -> Plan {
        let own: BTreeSet<NodeId> = self.nodes.iter().copied().collect();
        let reads: BTreeSet<ValueId> =
            self.nodes.iter().filter_map(|id| graph.node(*id)).flat_map(walk::reads).collect();
        plan.only(|site| match site {
            Site::Use { node, .. } => own.contains(node),
            Site::Value(value) => reads.contains(value),
        })
    }
}

/// The blocks of `graph`, in order, of as many of the smallest ones as have at most `layers` encoded weights together.
///
/// A smallest block ends where a single tensor that the plan changes is still to be read, so that a residual sum and all that it
/// spans are never cut. What the plan does not change (masks, positions, shapes) may reach into any block.
pub fn blocks(graph: &Graph, plan: &Plan, layers: usize) -> Vec<Block> {
    let touched = lockstep::touched(graph, plan);
    let users = Users::of(graph);
    let mut last_reader: BTreeMap<ValueId, usize> = BTreeMap::new();
    let order: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    let position: BTreeMap<NodeId, usize> = order.iter().enumerate().map(|(at, id)| (*id, at)).collect();
    for &value in &touched {
        let reader = |user: &walk::User| match user {
            walk::User::Input { node, .. } | walk::User::Capture { node } => position[node],
            walk::User::Output => usize::MAX,
        };
        last_reader.insert(value, users.of_value(value).iter().map(reader).max().unwrap_or(0));
    }
    let mut smallest: Vec<Block> = Vec::new();
    let mut nodes: Vec<NodeId> = Vec::new();
    let mut alive: BTreeSet<ValueId> = BTreeSet::new();
    for (at, &id) in order.iter().enumerate() {
        let outputs: Vec<ValueId> =
            graph.node(id).map(|node| node.outputs.iter().flatten().copied().collect()).unwrap_or_default();
        alive.retain(|value| last_reader[value] > at);
        if !outputs.iter().any(|value| touched.contains(value)) {
            continue;
        }
        nodes.push(id);
        alive.extend(outputs.iter().filter(|value| last_reader.get(value).is_some_and(|&last| last > at)));
        if alive.len() == 1 {
            smallest.push(closed(graph, plan, std::mem::take(&mut nodes), &alive));
        }
    }
    if !nodes.is_empty() {
        smallest.push(closed(graph, plan, nodes, &alive));
    }
    merged(graph, smallest, layers)
}

fn closed(graph: &Graph, plan: &Plan, nodes: Vec<NodeId>, alive: &BTreeSet<ValueId>) -> Block {
    let layers = nodes.iter().filter(|id| is_layer(graph, plan, **id)).count();
    let produced: BTreeSet<ValueId> =
        nodes.iter().filter_map(|id| graph.node(*id)).flat_map(|node| node.outputs.iter().flatten().copied()).collect();
    // The last block also holds what the graph returns from its middle.
    let returned = graph.outputs().iter().filter(|value| produced.contains(value));
    let outputs: BTreeSet<ValueId> =
        alive.iter().filter(|value| produced.contains(value)).chain(returned).copied().collect();
    Block { nodes, outputs: outputs.into_iter().collect(), layers }
}

/// A plan in which the weight of every linear node is encoded: for asking about blocks before anything is decided.
pub fn all_weights(graph: &Graph) -> Plan {
    let site = |id: NodeId| Some(Site::Use { node: id, input: ops::linear(graph, id)?.weight });
    let Some(grid) = crate::grid::find("int8") else { return Plan::default() };
    let encoding = Encoding::per_tensor(grid, 1.0, 0);
    let encodings = graph.nodes().filter_map(|(id, _)| Some((site(id)?, encoding.clone())));
    Plan { encodings: encodings.collect(), ..Plan::default() }
}

/// Why gradients do not pass `block`, where they do not.
pub fn boundary(graph: &Graph, plan: &Plan, block: &Block) -> Option<String> {
    Program::of(graph, plan, plan, block, Also::default()).err()
}

/// Whether node `id` is linear with an encoded weight.
pub(super) fn is_layer(graph: &Graph, plan: &Plan, id: NodeId) -> bool {
    ops::linear(graph, id).is_some_and(|roles| plan.encoding_of_use(graph, id, roles.weight).is_some())
}

/// Neighbors put together as long as they have at most `layers` weights; what has none joins the block before it.
fn merged(graph: &Graph, smallest: Vec<Block>, layers: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for block in smallest {
        let fits = |last: &&mut Block| last.layers == 0 || block.layers == 0 || last.layers + block.layers <= layers;
        match blocks.last_mut().filter(fits) {
            Some(last) => {
                last.nodes.extend(block.nodes);
                // What the graph returns from the middle stays a result.
                last.outputs.retain(|value| graph.outputs().contains(value));
                last.outputs.extend(block.outputs);
                last.layers += block.layers;
            }
            None => blocks.push(block),
        }
    }
    blocks
}
