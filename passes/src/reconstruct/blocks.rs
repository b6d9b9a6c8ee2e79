//! Blocks: parts of the graph that one tensor enters and one tensor leaves.

use std::collections::{BTreeMap, BTreeSet};

use super::block::{Also, Program};
use crate::encoding::Encoding;
use crate::grad;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{self, Users};
use crate::ir::{Graph, Node};
use crate::lockstep;
use crate::model::Plan;
use crate::ops;
use crate::simulate::is_float_activation;

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

/// The blocks of `graph`, in order, of as many of the smallest ones as have at most `layers` encoded weights together; or, where `ends` says
/// a pattern, up to each that holds a node whose name [`matches()`] it.
///
/// A smallest block ends where a single tensor that the plan changes is still to be read, so that a residual sum and all that it
/// spans are never cut, and before and behind a node that no gradients pass: that one is a block of its own, and what surrounds it can be
/// learned all the same, unless shapes of what the plan changes are still to be read there. What the plan does not change (masks, positions, shapes) may reach into any block.
pub fn blocks(graph: &Graph, plan: &Plan, layers: usize, ends: Option<&str>) -> Vec<Block> {
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
    let mut smallest: Vec<Smallest> = Vec::new();
    let mut nodes: Vec<NodeId> = Vec::new();
    let mut alive: BTreeSet<ValueId> = BTreeSet::new();
    let shapes = shapes(graph, &touched);
    for (at, &id) in order.iter().enumerate() {
        let outputs: Vec<ValueId> =
            graph.node(id).map(|node| node.outputs.iter().flatten().copied().collect()).unwrap_or_default();
        alive.retain(|value| last_reader[value] > at);
        if !outputs.iter().any(|value| touched.contains(value)) {
            continue;
        }
        // Shapes and indices are no numbers that gradients would pass.
        let is_number =
            |value: &ValueId| touched.contains(value) && !shapes.contains(value) && is_float_activation(graph, *value);
        let is_boundary = |node: &Node| {
            grad::rule(node).is_err()
                && !alive.iter().copied().chain(walk::reads(node)).any(|value| shapes.contains(&value))
        };
        let blocks_gradients = outputs.iter().any(is_number) && graph.node(id).is_some_and(is_boundary);
        if blocks_gradients && !nodes.is_empty() {
            // What it reads is alive until here.
            let before = living(graph, &nodes, |value| last_reader.get(&value).is_some_and(|&last| last >= at));
            smallest.push(Smallest { block: closed(graph, plan, std::mem::take(&mut nodes), &before), alone: true });
        }
        nodes.push(id);
        alive.extend(outputs.iter().filter(|value| last_reader.get(value).is_some_and(|&last| last > at)));
        if alive.len() == 1 || blocks_gradients {
            let block = closed(graph, plan, std::mem::take(&mut nodes), &alive);
            smallest.push(Smallest { block, alone: blocks_gradients });
        }
    }
    if !nodes.is_empty() {
        smallest.push(Smallest { block: closed(graph, plan, nodes, &alive), alone: false });
    }
    merged(graph, smallest, layers, ends)
}

/// Of the `touched` values those that say how large tensors are, and what is computed of such alone.
fn shapes(graph: &Graph, touched: &BTreeSet<ValueId>) -> BTreeSet<ValueId> {
    let mut shapes: BTreeSet<ValueId> = BTreeSet::new();
    for (_, node) in graph.nodes() {
        let mut reads = walk::reads(node).filter(|value| touched.contains(value)).peekable();
        let of_shapes = reads.peek().is_some() && reads.all(|value| shapes.contains(&value));
        if node.op.is("Shape") || node.op.is("Size") || of_shapes {
            shapes.extend(node.outputs.iter().flatten());
        }
    }
    shapes
}

/// Whether `name` is what `pattern` says, in which `*` stands for anything.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// A block that holds no smaller one.
struct Smallest {
    block: Block,
    /// Whether it is to stay one of its own: more than one tensor may leave it, or no gradients pass it.
    alone: bool,
}

/// What `nodes` compute of which `lives` says that it is still to be read.
fn living(graph: &Graph, nodes: &[NodeId], lives: impl Fn(ValueId) -> bool) -> BTreeSet<ValueId> {
    let outputs = nodes.iter().filter_map(|id| graph.node(*id)).flat_map(|node| node.outputs.iter().flatten());
    outputs.copied().filter(|value| lives(*value)).collect()
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

/// Neighbors put together as long as they have at most `layers` weights, where what has none joins the block before it; or, where `ends` says
/// a pattern, up to each that holds a node of such a name.
fn merged(graph: &Graph, smallest: Vec<Smallest>, layers: usize, ends: Option<&str>) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    // Nothing joins the last block any more.
    let mut last_is_closed = false;
    for Smallest { block, alone } in smallest {
        let few = |last: &Block| last.layers == 0 || block.layers == 0 || last.layers + block.layers <= layers;
        let fits = |last: &&mut Block| !alone && !last_is_closed && (ends.is_some() || few(last));
        let last = blocks.last_mut().filter(fits);
        let mut names = block.nodes.iter().filter_map(|id| graph.node(*id)).map(|node| &node.name);
        last_is_closed = alone || ends.is_some_and(|pattern| names.any(|name| matches(pattern, name)));
        match last {
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

#[cfg(test)]
mod tests {
    use super::super::testing::{NoTarget, Tapes};
    use super::*;
    use crate::pass::{PassContext, PassManager, Pipeline};

    /// The names of what blocks of up to so many weights compute, and whether gradients pass them.
    fn blocks_of(body: &str, layers: usize) -> Vec<(Vec<String>, bool)> {
        let weights = "%a = const f32[4,4] rand(seed=1, std=1) %b = const f32[4,4] rand(seed=2, std=1) \
                       %c = const f32[4,4] rand(seed=3, std=1)";
        let model =
            crate::text::parse(&format!("graph (%x: f32[2,4]) -> (%y: f32[2,4]) {{ {weights} {body} }}")).unwrap();
        let pipeline = Pipeline::parse("infer-shapes", &crate::catalogue::passes()).unwrap();
        let model = PassManager::default().run(&pipeline, model, &mut PassContext::new(&NoTarget, &Tapes)).unwrap().0;
        let (graph, plan) = (model.graph(), all_weights(model.graph()));
        let name = |value: &ValueId| graph.value(*value).name.to_string();
        let of = |block: &Block| {
            let outputs = block.nodes.iter().filter_map(|id| graph.node(*id)?.output(0));
            (outputs.map(|value| name(&value)).collect(), boundary(graph, &plan, block).is_none())
        };
        blocks(graph, &plan, layers, None).iter().map(of).collect()
    }

    #[test]
    fn patterns_say_where_blocks_end() {
        for (pattern, name, is) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("*b*", "abc", true),
            ("a*c*e", "abcde", true),
            ("a*c*d", "abcde", false),
            ("*aa", "a", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
        let text = "graph (%x: f32[2,4]) -> (%y: f32[2,4]) { %a = const f32[4,4] rand(seed=1, std=1) %b = const f32[4,4] rand(seed=2, std=1) \
                    %c = const f32[4,4] rand(seed=3, std=1) %p = MatMul(%x, %a) %q = MatMul(%p, %b) %y = MatMul(%q, %c) }";
        let model = crate::text::parse(text).unwrap();
        let (graph, plan) = (model.graph(), all_weights(model.graph()));
        let second = graph.nodes().filter(|(_, node)| node.op.is("MatMul")).nth(1).unwrap().1.name.to_string();
        let weights =
            |ends: &str| blocks(graph, &plan, 1, Some(ends)).iter().map(|block| block.layers).collect::<Vec<_>>();
        assert_eq!(weights(&second), [2, 1]);
        assert_eq!(weights("*"), [1, 1, 1]);
        assert_eq!(weights("nothing"), [3]);
    }

    fn named(blocks: &[(Vec<String>, bool)]) -> Vec<(String, bool)> {
        blocks.iter().map(|(names, passes)| (names.join(" "), *passes)).collect()
    }

    #[test]
    fn what_surrounds_a_node_without_gradients_is_learned_all_the_same() {
        let chain = "%p = MatMul(%x, %a) %q = Relu(%p) %r = Round(%q) %s = MatMul(%r, %b) %y = MatMul(%s, %c)";
        let cut = [("p q".to_owned(), true), ("r".to_owned(), false), ("s y".to_owned(), true)];
        assert_eq!(named(&blocks_of(chain, 9)), cut);
        // Inside of a residual sum more than one tensor is alive there.
        let sum = "%p = MatMul(%x, %a) %q = MatMul(%p, %b) %r = Round(%q) %s = MatMul(%r, %c) %y = Add(%s, %p)";
        let cut =
            [("p", true), ("q", true), ("r", false), ("s y", true)].map(|(names, passes)| (names.to_owned(), passes));
        assert_eq!(named(&blocks_of(sum, 9)), cut);
        // A shape is none of the numbers that gradients pass.
        let shapes = "%p = MatMul(%x, %a) %n = Shape(%p) %q = MatMul(%p, %b) %r = Reshape(%q, %n) %y = MatMul(%r, %c)";
        assert_eq!(named(&blocks_of(shapes, 9)).len(), 1);
        // Arithmetic on them is none either, though it be in float.
        let floats = "%p = MatMul(%x, %a) %n = Shape(%p) %f = Cast(%n) {to=1} %g = Floor(%f) %i = Cast(%g) {to=7} \
                      %q = MatMul(%p, %b) %r = Reshape(%q, %i) %y = MatMul(%r, %c)";
        assert_eq!(named(&blocks_of(floats, 9)).len(), 1);
        let whole = "%p = MatMul(%x, %a) %q = MatMul(%p, %b) %r = Tanh(%q) %s = MatMul(%r, %c) %y = Add(%s, %p)";
        assert_eq!(named(&blocks_of(whole, 9)), [("p q r s y".to_owned(), true)]);
    }
}
