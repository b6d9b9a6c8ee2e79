//! What bodies see of their surroundings. ONNX lets a body refer to an enclosing value by its name alone, so a capture
//! must bear the outer name, and a body can hold at most one capture of a value.

use std::collections::{BTreeMap, BTreeSet};

use super::{Def, Graph, fresh_name};
use crate::id::{Name, ValueId};

impl Graph {
    /// Gives every captured value in every body the name that it has outside.
    ///
    /// Two captures of one value become one (a redirect can bring them together), and a value of the body's own that
    /// stands in the way of a name gives way: it is known by that name in the body alone.
    pub(crate) fn sync_captures(&mut self) {
        for body in self.nodes.iter_mut().flatten().flat_map(|node| &mut node.bodies) {
            let inner = &mut body.graph;
            let twins = name_captures(inner, &self.values);
            if !twins.is_empty() {
                inner.read_instead(|value| twins.get(&value).copied().unwrap_or(value));
            }
            inner.sync_captures();
        }
    }

    /// Makes every reader of a value (nodes, bodies and the graph's outputs) read `instead` of it.
    fn read_instead(&mut self, instead: impl Fn(ValueId) -> ValueId) {
        for node in self.nodes.iter_mut().flatten() {
            node.inputs.iter_mut().flatten().for_each(|input| *input = instead(*input));
            for body in &mut node.bodies {
                body.graph.recapture(&instead);
            }
        }
        self.outputs.iter_mut().for_each(|output| *output = instead(*output));
    }

    /// In a body: captures `instead` of each captured value. [`Graph::sync_captures`] of the outer graph must follow.
    pub(crate) fn recapture(&mut self, instead: impl Fn(ValueId) -> ValueId) {
        for value in &mut self.values {
            if let Def::Capture(outer) = &mut value.def {
                *outer = instead(*outer);
            }
        }
    }
}

/// Names the captures of `inner` as `outer` does; returns, for each capture of a value that an earlier one captures,
/// that earlier one.
fn name_captures(inner: &mut Graph, outer: &[super::Value]) -> BTreeMap<ValueId, ValueId> {
    let mut first = BTreeMap::new();
    let mut twins = BTreeMap::new();
    let mut moved = false;
    for id in inner.value_ids().collect::<Vec<_>>() {
        let value = &mut inner.values[id.index()];
        let Def::Capture(captured) = value.def else { continue };
        let Some(seen) = outer.get(captured.index()) else { continue };
        if let Some(&twin) = first.get(&captured) {
            twins.insert(id, twin);
            continue;
        }
        first.insert(captured, id);
        moved |= value.name != seen.name;
        value.name = Name::clone(&seen.name);
    }
    if moved || !twins.is_empty() {
        let keep: BTreeSet<ValueId> = first.into_values().collect();
        give_way(inner, &keep);
    }
    twins
}

/// Renames the values that bear the name of one in `keep`.
fn give_way(graph: &mut Graph, keep: &BTreeSet<ValueId>) {
    let fixed: BTreeSet<Name> = keep.iter().map(|id| Name::clone(&graph.value(*id).name)).collect();
    let mut taken: BTreeSet<Name> = graph.values.iter().map(|value| Name::clone(&value.name)).collect();
    for id in graph.value_ids().filter(|id| !keep.contains(id)).collect::<Vec<_>>() {
        let value = &mut graph.values[id.index()];
        if fixed.contains(&value.name) {
            value.name = fresh_name(&value.name, |name| taken.contains(name)).into();
            taken.insert(Name::clone(&value.name));
        }
    }
}
