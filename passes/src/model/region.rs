//! Which edits of a patch hang together, and patches of some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use petgraph::unionfind::UnionFind;

use super::patch::{Edit, Patch};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::reads;
use crate::ir::{Def, Graph, Node, Type};
use crate::tensor::Tensor;

/// What edits share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tie {
    Node(NodeId),
    Value(ValueId),
}

impl Patch {
    /// The places of edits that stand or fall together, region by region in the order of their first edits.
    ///
    /// Edits hang together that touch one node, read or make one value that the patch introduces, or one whose making it changes: some
    /// passes change both sides of a value in place. Every region can be left out by itself. Edits of plan and statistics go with what they
    /// speak of; those that speak of nothing that the graph edits touch are in no region. A patch that changes inputs or outputs is one region.
    pub(crate) fn regions(&self, graph: &Graph) -> Vec<Vec<usize>> {
        let edits = self.edits();
        if edits.iter().any(|edit| matches!(edit, Edit::Interface { .. })) {
            return vec![(0..edits.len()).collect()];
        }
        let made = made(graph, edits);
        let ties: Vec<Vec<Tie>> = edits.iter().map(|edit| self.ties(graph, &made, edit)).collect();
        let mut groups = UnionFind::<usize>::new(edits.len());
        let mut first: BTreeMap<Tie, usize> = BTreeMap::new();
        for (place, ties) in ties.iter().enumerate() {
            for tie in ties {
                groups.union(place, *first.entry(*tie).or_insert(place));
            }
        }
        let changing: BTreeSet<usize> =
            (0..edits.len()).filter(|&place| edits[place].touches_graph()).map(|place| groups.find(place)).collect();
        let mut regions: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for place in (0..edits.len()).filter(|&place| changing.contains(&groups.find(place))) {
            regions.entry(groups.find(place)).or_default().push(place);
        }
        let mut regions: Vec<Vec<usize>> = regions.into_values().collect();
        regions.sort();
        regions
    }

    /// This patch without the edits at `dropped`; the ids of what they introduced stand for nothing.
    pub(crate) fn without(&self, dropped: &BTreeSet<usize>) -> Self {
        let kept = |place: &usize| !dropped.contains(place);
        let edits: Vec<Edit> = (0..self.edits().len()).filter(kept).map(|place| self.edits()[place].clone()).collect();
        let to = |edit: &Edit| if let Edit::Redirect { to, .. } = edit { Some(*to) } else { None };
        let redirected = edits.iter().filter_map(to);
        let read: BTreeSet<ValueId> = edits.iter().filter_map(written).flat_map(reads).chain(redirected).collect();
        let mut values = self.values.clone();
        for (index, value) in values.iter_mut().enumerate() {
            let is_read = read.contains(&self.minted(index));
            if let (Def::Const(_), false) = (&value.def, is_read) {
                // Large weights that nobody reads would stay in memory.
                let nothing = Tensor::of([0], Vec::<f32>::new());
                value.ty = Type::Tensor(crate::ir::TensorType::of(&nothing));
                value.def = Def::Const(Arc::new(nothing));
            }
        }
        self.with(values, edits)
    }

    fn ties(&self, graph: &Graph, made: &BTreeSet<ValueId>, edit: &Edit) -> Vec<Tie> {
        let introduced = |value: &ValueId| self.introduces(*value);
        let at = |site: &Site| match site {
            Site::Value(value) => Tie::Value(*value),
            Site::Use { node, .. } => Tie::Node(*node),
        };
        match edit {
            Edit::Insert { id, node, .. } => {
                let values = node.outputs.iter().flatten().copied().chain(reads(node).filter(introduced));
                values.map(Tie::Value).chain([Tie::Node(*id)]).collect()
            }
            Edit::Replace { id, node } => {
                let before: BTreeSet<ValueId> = graph.node(*id).into_iter().flat_map(reads).collect();
                let read = reads(node).filter(|value| self.introduces(*value) || made.contains(value));
                let left = before.into_iter().filter(|value| made.contains(value));
                let values = read.chain(left).chain(node.outputs.iter().flatten().copied());
                values.map(Tie::Value).chain([Tie::Node(*id)]).collect()
            }
            Edit::Erase(id) => {
                let node = graph.node(*id);
                let outputs = node.into_iter().flat_map(|node| node.outputs.iter().flatten().copied());
                let inputs = node.into_iter().flat_map(reads).filter(|value| made.contains(value));
                outputs.chain(inputs).map(Tie::Value).chain([Tie::Node(*id)]).collect()
            }
            Edit::Redirect { from, to } => vec![Tie::Value(*from), Tie::Value(*to)],
            Edit::Freeze { value, .. } => {
                let producer = graph.producer(*value).map(|(id, _)| Tie::Node(id));
                producer.into_iter().chain([Tie::Value(*value)]).collect()
            }
            Edit::Refine { value, .. } | Edit::Record { value, .. } | Edit::Forget(value) => vec![Tie::Value(*value)],
            Edit::Encode { site, .. }
            | Edit::Round { site, .. }
            | Edit::Compare { site, .. }
            | Edit::Lean { site, .. }
            | Edit::Substitute { site, .. } => vec![at(site)],
            Edit::Decide { node, .. } => vec![Tie::Node(*node)],
            Edit::Interface { .. } => Vec::new(),
        }
    }
}

/// The values whose making `edits` change or take away.
fn made(graph: &Graph, edits: &[Edit]) -> BTreeSet<ValueId> {
    let of = |edit: &Edit| match edit {
        Edit::Erase(id) | Edit::Replace { id, .. } => {
            graph.node(*id).map_or(Vec::new(), |node| node.outputs.iter().flatten().copied().collect())
        }
        Edit::Redirect { from: value, .. } | Edit::Freeze { value, .. } => vec![*value],
        _ => Vec::new(),
    };
    edits.iter().flat_map(of).collect()
}

/// The node that an edit writes.
fn written(edit: &Edit) -> Option<&Node> {
    match edit {
        Edit::Insert { node, .. } | Edit::Replace { node, .. } => Some(node),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;

    const CHAIN: &str = "graph (%x: f32[1,2]) -> (%y: f32[1,2]) {
        %a = const f32[2,2] rand(seed=1)
        %b = const f32[2,2] rand(seed=2)
        %c = const f32[2,2] rand(seed=3)
        %p = MatMul(%x, %a)
        %q = Relu(%p)
        %r = MatMul(%q, %b)
        %s = Relu(%r)
        %y = MatMul(%s, %c)
    }";

    fn product(model: &Model, of: &str) -> (NodeId, Node) {
        let (id, node) = model.graph().producer(model.graph().find(of).unwrap()).unwrap();
        (id, node.clone())
    }

    fn scaled(model: &Model, node: &Node, by: f32) -> Tensor {
        let weight = model.graph().constant_input(node, 1).unwrap();
        Tensor::of(weight.shape(), weight.floats().unwrap().iter().map(|w| w * by).collect())
    }

    /// The first two products scaled against each other: the value between them and its Relu are new. The last one is only written anew.
    fn patch(model: &Model) -> Patch {
        let mut patch = Patch::on(model);
        let names = ["p", "q", "r", "y"];
        let [(p, mut first), (q, mut relu), (r, mut second), (y, mut last)] = names.map(|name| product(model, name));
        for (node, by) in [(&mut first, 2.0), (&mut second, 0.5), (&mut last, 1.0)] {
            let tensor = scaled(model, node, by);
            node.inputs[1] = Some(patch.constant("w", tensor));
        }
        let ty = |id: ValueId| model.graph().value(id).ty.clone();
        let old = [first.output(0).unwrap(), relu.output(0).unwrap()];
        patch.erase(p);
        let between = patch.node(first, "p2", ty(old[0]), Some(p));
        relu.inputs[0] = Some(between);
        patch.erase(q);
        let clamped = patch.node(relu, "q2", ty(old[1]), Some(q));
        second.inputs[0] = Some(clamped);
        patch.replace(r, second);
        patch.replace(y, last);
        patch.edit(Edit::Forget(old[0]));
        patch.edit(Edit::Forget(model.graph().inputs()[0]));
        patch
    }

    #[test]
    fn what_hangs_together_is_a_region_and_can_be_left_out() {
        let model = crate::text::parse(CHAIN).unwrap();
        let patch = patch(&model);
        let regions = patch.regions(model.graph());
        // Forgetting `p`, which goes, belongs to the first; forgetting the input to none.
        let sizes: Vec<usize> = regions.iter().map(Vec::len).collect();
        assert_eq!((sizes, regions[0][0]), (vec![6, 1], 0), "{regions:?}");
        for (dropped, nodes) in [(0, ["p", "q"]), (1, ["p2", "q2"])] {
            let mut model = model.clone();
            let left = patch.without(&regions[dropped].iter().copied().collect());
            model.apply(left).unwrap();
            assert!(
                nodes.iter().all(|name| model.graph().find(name).is_some_and(|v| model.graph().producer(v).is_some()))
            );
            assert_eq!(model.graph().n_nodes(), 5);
            // What was introduced for nothing takes no memory.
            let bytes = |id: ValueId| model.graph().constant(id).map_or(0, |t| t.bytes().len());
            let new = (0..3).map(|at| bytes(patch.minted(at))).collect::<Vec<_>>();
            assert_eq!(new, if dropped == 0 { [0, 0, 16] } else { [16, 16, 0] });
        }
    }

    /// A product is turned, and the one behind it back, both in place; beside them another product of the same input.
    #[test]
    fn what_is_changed_in_place_on_both_sides_of_a_value_hangs_together() {
        let model = crate::text::parse(
            "graph (%x: f32[1,2]) -> (%q: f32[1,2], %r: f32[1,2]) {
            %a = const f32[2,2] rand(seed=1)
            %b = const f32[2,2] rand(seed=2)
            %c = const f32[2,2] rand(seed=3)
            %p = MatMul(%x, %a)
            %q = MatMul(%p, %b)
            %s = Neg(%x)
            %r = MatMul(%s, %c)
        }",
        )
        .unwrap();
        let mut patch = Patch::on(&model);
        for name in ["p", "q", "r"] {
            let (id, mut node) = product(&model, name);
            let tensor = scaled(&model, &node, -1.0);
            node.inputs[1] = Some(patch.constant("w", tensor));
            patch.replace(id, node);
        }
        assert_eq!(patch.regions(model.graph()), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn a_patch_of_nothing_but_plans_has_no_regions() {
        let model = crate::text::parse(CHAIN).unwrap();
        let mut patch = Patch::on(&model);
        patch.edit(Edit::Forget(model.graph().inputs()[0]));
        assert!(patch.regions(model.graph()).is_empty());
        assert_eq!(patch.without(&BTreeSet::new()).edits().len(), 1);
    }
}
