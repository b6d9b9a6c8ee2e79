//! A topological order that moves as little as possible when the graph changes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Graph, walk};
use crate::id::{Name, NodeId};

impl Graph {
    /// Re-sorts the nodes so that producers come first; among those that are ready, the one that came earliest before
    /// comes first again.
    ///
    /// # Errors
    /// The names of nodes on a cycle, when there is one.
    pub(crate) fn sort(&mut self) -> Result<(), Vec<Name>> {
        let position: Vec<usize> = {
            let mut position = vec![usize::MAX; self.nodes.len()];
            for (place, id) in self.order.iter().enumerate() {
                position[id.index()] = place;
            }
            position
        };
        let (mut waiting, readers) = self.dependencies();
        let mut ready: BinaryHeap<Reverse<(usize, NodeId)>> = self
            .order
            .iter()
            .filter(|id| waiting[id.index()] == 0)
            .map(|&id| Reverse((position[id.index()], id)))
            .collect();
        let mut sorted = Vec::with_capacity(self.order.len());
        while let Some(Reverse((_, id))) = ready.pop() {
            sorted.push(id);
            for &reader in &readers[id.index()] {
                waiting[reader.index()] -= 1;
                if waiting[reader.index()] == 0 {
                    ready.push(Reverse((position[reader.index()], reader)));
                }
            }
        }
        if sorted.len() != self.order.len() {
            return Err(self.cycle());
        }
        self.order = sorted;
        Ok(())
    }

    /// Per node, how many reads of other nodes' results it makes, and who reads it.
    fn dependencies(&self) -> (Vec<usize>, Vec<Vec<NodeId>>) {
        let mut waiting = vec![0; self.nodes.len()];
        let mut readers = vec![Vec::new(); self.nodes.len()];
        for (id, node) in self.nodes() {
            for value in walk::reads(node) {
                if let Some((producer, _)) = self.producer(value) {
                    waiting[id.index()] += 1;
                    readers[producer.index()].push(id);
                }
            }
        }
        (waiting, readers)
    }

    /// The nodes of one cycle, for the message.
    fn cycle(&self) -> Vec<Name> {
        let mut view = petgraph::graph::DiGraph::<NodeId, ()>::new();
        let index: Vec<_> =
            (0..self.nodes.len()).map(|i| view.add_node(NodeId(u32::try_from(i).unwrap_or(u32::MAX)))).collect();
        for (id, node) in self.nodes() {
            for value in walk::reads(node) {
                if let Some((producer, _)) = self.producer(value) {
                    view.add_edge(index[producer.index()], index[id.index()], ());
                }
            }
        }
        let knots = petgraph::algo::tarjan_scc(&view);
        let on_cycle = |knot: &&Vec<_>| knot.len() > 1 || view.find_edge(knot[0], knot[0]).is_some();
        let first = knots.iter().find(on_cycle).map_or(&[][..], Vec::as_slice);
        first.iter().filter_map(|&at| Some(self.node(view[at])?.name.clone())).collect()
    }
}
