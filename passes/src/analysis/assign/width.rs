//! Which activations have the few bits of the scheme, and which have more.

use std::collections::{BTreeMap, BTreeSet};

use super::select::Selection;
use crate::id::{NodeId, ValueId};
use crate::ir::{Graph, Node};
use crate::ops;
use crate::simulate::is_float_activation;

/// The reads and tensors whose codes have more bits than the scheme says: what no layer and no matrix product multiplies,
/// and what the model is given. Few bits pay where they are multiplied; what is added to a sum, or is to be seen by all layers, loses
/// most by them.
///
/// Source: the setting of published figures for few bits, Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2.3, and Li et al. 2021
/// (BRECQ), arXiv:2102.05426, section 4: sums of branches keep their precision, and the first layer reads 8 bits.
#[derive(Debug, Default)]
pub(super) struct Wide {
    reads: BTreeSet<(NodeId, u16)>,
    written: BTreeSet<ValueId>,
    /// Tensors that have both kinds of readers: each read is encoded by itself.
    apart: BTreeSet<ValueId>,
}

/// Whether there are narrow readers, and wide ones.
#[derive(Clone, Copy, Debug, Default)]
struct Kinds {
    narrow: bool,
    wide: bool,
}

impl Kinds {
    fn see(&mut self, narrow: bool) {
        self.narrow |= narrow;
        self.wide |= !narrow;
    }
}

impl Wide {
    /// Of what `selection` reads and writes. Tensors that share one encoding because codes are only moved are narrow where one reader of
    /// theirs is.
    pub(super) fn of(graph: &Graph, selection: &Selection) -> Self {
        let given = given(graph);
        let sources: BTreeMap<ValueId, ValueId> =
            selection.written.iter().filter_map(|(value, source)| Some((*value, (*source)?))).collect();
        let root = |mut value: ValueId| {
            while let Some(source) = sources.get(&value) {
                value = *source;
            }
            value
        };
        let reads = || selection.reads.iter().filter_map(|&(id, input)| Some((id, input, graph.node(id)?)));
        let moves = |node: &Node| node.output(0).is_some_and(|output| sources.contains_key(&output));
        // Of every root, what reads it, and what reads the tensors that its codes are moved to.
        let mut direct: BTreeMap<ValueId, Kinds> = BTreeMap::new();
        let mut moved: BTreeMap<ValueId, Kinds> = BTreeMap::new();
        for (id, input, node) in reads().filter(|(.., node)| !moves(node)) {
            let Some(value) = node.input(input.into()) else { continue };
            let kinds = if sources.contains_key(&value) { &mut moved } else { &mut direct };
            kinds.entry(root(value)).or_default().see(multiplies(graph, id, node) && !given.contains(&value));
        }
        let is_narrow = |kinds: Option<&Kinds>| kinds.is_some_and(|kinds| kinds.narrow);
        let mut wide = Self::default();
        for (id, input, node) in reads() {
            let Some(value) = node.input(input.into()) else { continue };
            let narrow = if moves(node) || sources.contains_key(&value) {
                is_narrow(moved.get(&root(value)))
            } else {
                multiplies(graph, id, node) && !given.contains(&value)
            };
            if !narrow {
                wide.reads.insert((id, input));
            }
        }
        for (value, source) in &selection.written {
            let moved = moved.get(&root(*value));
            if source.is_some() {
                wide.written.extend((!is_narrow(moved)).then_some(value));
                continue;
            }
            let direct = direct.get(value).copied().unwrap_or_default();
            let narrow = direct.narrow || is_narrow(moved);
            let any_wide = direct.wide || moved.is_some_and(|moved| !moved.narrow);
            if narrow && any_wide {
                wide.apart.insert(*value);
            } else if !narrow {
                wide.written.insert(*value);
            }
        }
        wide
    }

    /// Whether what is read there has more bits.
    pub(super) fn is_read(&self, read: (NodeId, u16)) -> bool {
        self.reads.contains(&read)
    }

    /// Whether `value` is written with more bits.
    pub(super) fn is_written(&self, value: ValueId) -> bool {
        self.written.contains(&value)
    }

    /// Whether readers of `value` want it in different codes.
    pub(super) fn is_apart(&self, value: ValueId) -> bool {
        self.apart.contains(&value)
    }
}

/// Whether node `id` multiplies what it reads with a weight or another activation, and adds up.
fn multiplies(graph: &Graph, id: NodeId, node: &Node) -> bool {
    ops::linear(graph, id).is_some() || node.op.is("MatMul")
}

/// What the model is given in float, and what is made of that before the first layer.
fn given(graph: &Graph) -> BTreeSet<ValueId> {
    let mut given: BTreeSet<ValueId> =
        graph.inputs().iter().copied().filter(|value| is_float_activation(graph, *value)).collect();
    let mut later: BTreeSet<ValueId> = BTreeSet::new();
    for (id, node) in graph.nodes() {
        let any = |of: &BTreeSet<ValueId>| node.inputs.iter().flatten().any(|value| of.contains(value));
        if multiplies(graph, id, node) || any(&later) {
            later.extend(node.outputs.iter().flatten());
        } else if any(&given) {
            given.extend(node.outputs.iter().flatten());
        }
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a selection over `text` says, with every activation that is read in codes, written where `written` says, behind its source:
    /// reads that are wide, tensors that are written wide, and those of which readers differ, by name.
    fn told(text: &str, written: &[(&str, Option<&str>)]) -> [Vec<String>; 3] {
        let model = crate::text::parse(text).unwrap();
        let graph = model.graph();
        let named = |name: &str| graph.value_ids().find(|id| &*graph.value(*id).name == name).unwrap();
        let read = |id: NodeId, node: &Node| {
            let inputs = 0..u16::try_from(node.inputs.len()).unwrap();
            let is_activation = |at: &u16| node.input((*at).into()).is_some_and(|v| graph.constant(v).is_none());
            inputs.filter(is_activation).map(|at| (id, at)).collect::<Vec<_>>()
        };
        let selection = Selection {
            written: written.iter().map(|(value, source)| (named(value), source.map(named))).collect(),
            reads: graph.nodes().flat_map(|(id, node)| read(id, node)).collect(),
            ..Selection::default()
        };
        let wide = Wide::of(graph, &selection);
        let name = |value: ValueId| graph.value(value).name.to_string();
        let reader = |&(id, input): &(NodeId, u16)| {
            let node = graph.node(id).unwrap();
            format!("{} of {}", name(node.input(input.into()).unwrap()), name(node.output(0).unwrap()))
        };
        let values = |of: &BTreeSet<ValueId>| of.iter().map(|value| name(*value)).collect();
        [wide.reads.iter().map(reader).collect(), values(&wide.written), values(&wide.apart)]
    }

    #[test]
    fn sums_of_branches_and_inputs_are_wide_and_what_layers_read_is_not() {
        let block = "graph (%x: f32[1,4]) -> (%z: f32[1,4]) {
            %w = const f32[4,4] rand(seed=1)
            %a = MatMul(%x, %w)
            %b = MatMul(%a, %w)
            %s = Add(%a, %b)
            %z = MatMul(%s, %w)
        }";
        let [reads, written, apart] = told(block, &[("a", None), ("b", None), ("s", None)]);
        assert_eq!(reads, ["x of a", "a of s", "b of s"]);
        assert_eq!((written, apart), (vec!["b".to_owned()], vec!["a".to_owned()]));
    }

    /// Codes that are only moved are the same on both sides, whoever reads them.
    #[test]
    fn codes_that_are_moved_stay_what_they_are() {
        let moved = |last: &str| {
            format!(
                "graph (%x: f32[4,4]) -> (%y: f32[4,4]) {{
                %w = const f32[4,4] rand(seed=1)
                %a = MatMul(%x, %w)
                %t = Transpose(%a)
                %u = Transpose(%t)
                %c = Add(%t, %t)
                %y = {last}
            }}"
            )
        };
        let written = [("a", None), ("t", Some("a")), ("u", Some("t")), ("c", None)];
        let [reads, wide, apart] = told(&moved("MatMul(%u, %w)"), &written);
        assert_eq!(reads, ["x of a"], "one that is multiplied makes all narrow");
        assert_eq!((wide, apart), (vec!["c".to_owned()], vec![]));
        let [reads, wide, apart] = told(&moved("Add(%u, %a)"), &written);
        assert_eq!(reads.len(), 7, "{reads:?}");
        assert_eq!((wide.join(" "), apart), ("a t u c".to_owned(), vec![]));
        let [reads, wide, apart] = told(&moved("MatMul(%a, %w)"), &written);
        assert!(!reads.contains(&"a of y".to_owned()) && reads.contains(&"a of t".to_owned()), "{reads:?}");
        assert_eq!((wide.join(" "), apart), ("t u c".to_owned(), vec!["a".to_owned()]));
    }

    #[test]
    fn what_is_made_of_inputs_is_given_up_to_the_first_layer() {
        let text = "graph (%x: f32[4,4], %i: i64[4]) -> (%y: f32[4,4], %z: f32[4,4]) {
            %w = const f32[4,4] rand(seed=1)
            %t = Transpose(%x)
            %y = MatMul(%t, %w)
            %g = Gather(%w, %i)
            %z = MatMul(%g, %w)
        }";
        let [reads, ..] = told(text, &[("g", None)]);
        assert!(reads.contains(&"t of y".to_owned()), "{reads:?}");
        assert!(!reads.contains(&"g of z".to_owned()), "tables are no inputs: {reads:?}");
    }
}
