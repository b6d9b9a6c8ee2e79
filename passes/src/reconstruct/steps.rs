//! Which quantizers of activations may change their scale while a block is learned.

use std::collections::BTreeSet;

use crate::encoding::{Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{User, Users};
use crate::model::Plan;

/// The sites of activations that nobody outside of `nodes` reads, whose integers have one scale, and that no operator ties to another
/// tensor: where a neighbor has the very same encoding, a target may ask for that.
pub(super) fn free(graph: &Graph, plan: &Plan, users: &Users, nodes: &[NodeId]) -> BTreeSet<Site> {
    let inside: BTreeSet<NodeId> = nodes.iter().copied().collect();
    let mut seen: BTreeSet<ValueId> = BTreeSet::new();
    let mut twice: BTreeSet<ValueId> = BTreeSet::new();
    let mut sites = Vec::new();
    for (site, encoding) in plan.encodings() {
        let value = match site {
            Site::Value(value) => Some(value),
            Site::Use { node, input } => graph.node(node).and_then(|node| node.input(input.into())),
        };
        let Some(value) = value.filter(|value| graph.constant(*value).is_none()) else { continue };
        if !seen.insert(value) {
            twice.insert(value);
        }
        sites.push((site, value, encoding));
    }
    let own = |value: ValueId| {
        let readers = users.of_value(value);
        !readers.is_empty()
            && readers.iter().all(|user| matches!(user, User::Input { node, .. } if inside.contains(node)))
    };
    let plain = |encoding: &Encoding| {
        encoding.granularity == Granularity::Tensor && encoding.grid.info().integer && encoding.grid.info().bits <= 16
    };
    sites
        .into_iter()
        .filter(|(_, value, encoding)| {
            own(*value) && plain(encoding) && !twice.contains(value) && !is_tied(graph, plan, users, *value, encoding)
        })
        .map(|(site, ..)| site)
        .collect()
}

/// Whether a tensor beside `value`, across one operator, has the same encoding.
fn is_tied(graph: &Graph, plan: &Plan, users: &Users, value: ValueId, encoding: &Encoding) -> bool {
    // Codes that are only moved may be read in an encoding of their own.
    let moved = graph.producer(value).is_some_and(|(id, node)| {
        let mut inputs = (0..node.inputs.len()).filter_map(|input| u16::try_from(input).ok());
        inputs.any(|input| plan.encoding_of_use(graph, id, input) == Some(encoding))
    });
    let readers = users.of_value(value).iter().filter_map(|user| match user {
        User::Input { node, .. } => graph.node(*node),
        _ => None,
    });
    let mut behind = readers.flat_map(|node| node.outputs.iter().flatten().copied());
    moved || behind.any(|other| other != value && plan.encoding(Site::Value(other)) == Some(encoding))
}
