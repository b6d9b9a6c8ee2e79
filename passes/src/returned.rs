//! What a model returns: numbers of some kind, logits, or probabilities.

use crate::id::ValueId;
use crate::ir::{Graph, Node};

/// What the values of a graph are to those who run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returned {
    /// It stays inside.
    No,
    /// What a matrix product computes: logits, most of the time.
    Logits,
    /// What a softmax over the last axis computes, as one operator or as its parts.
    Probabilities,
    /// Anything else.
    Other,
}

/// Moves numbers, and computes none.
const MOVES: [&str; 6] = ["Expand", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast"];

/// What `value` is among the outputs of `graph`.
pub fn returned(graph: &Graph, value: ValueId) -> Returned {
    let node = |value: ValueId| graph.producer(value).map(|(_, node)| node);
    if !graph.outputs().contains(&value) {
        return Returned::No;
    }
    let Some(last) = node(value) else { return Returned::Other };
    if is_softmax(graph, last) {
        return Returned::Probabilities;
    }
    let computed = || last.inputs.iter().flatten().copied().find(|value| graph.constant(*value).is_none());
    let linear = if last.op.is("Add") { computed().and_then(node) } else { Some(last) };
    // Classes of a convolution do not lie along its last axis.
    let is_linear = |node: &Node| ["MatMul", "Gemm"].iter().any(|op| node.op.is(op));
    if linear.is_some_and(is_linear) { Returned::Logits } else { Returned::Other }
}

/// Whether `node` divides by a sum so that what it returns are shares of 1: `Softmax`, or the quotient of an `Exp` and its own sum.
fn is_softmax(graph: &Graph, node: &Node) -> bool {
    let producer = |value: Option<ValueId>| Some(graph.producer(value?)?.1);
    let of_parts = || -> Option<bool> {
        let above = node.input(0)?;
        let mut below = producer(node.input(1))?;
        while MOVES.iter().any(|op| below.op.is(op)) {
            below = producer(below.input(0))?;
        }
        let is_sum = below.op.is("ReduceSum") && below.input(0) == Some(above);
        Some(is_sum && producer(Some(above))?.op.is("Exp"))
    };
    let along_last = || {
        let (axis, rank) = (node.int("axis", -1), node.output(0).and_then(|value| graph.value(value).ty.rank()));
        axis == -1 || rank.is_some_and(|rank| usize::try_from(axis) == Ok(rank.wrapping_sub(1)))
    };
    (node.op.is("Softmax") && along_last()) || (node.op.is("Div") && of_parts() == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &str) -> Vec<Returned> {
        let text = format!("graph (%x: f32[2,4]) -> {body}");
        let model = crate::text::parse(&text).unwrap();
        let graph = model.graph();
        graph.outputs().iter().map(|value| returned(graph, *value)).collect()
    }

    #[test]
    fn a_softmax_is_known_by_its_name_and_by_its_parts() {
        assert_eq!(of("(%y: f32[2,4]) { %y = Softmax(%x) }"), [Returned::Probabilities]);
        assert_eq!(of("(%y: f32[2,4]) { %y = Softmax(%x) {axis=1} }"), [Returned::Probabilities]);
        assert_eq!(of("(%y: f32[2,4]) { %y = Softmax(%x) {axis=0} }"), [Returned::Other]);
        let parts = |below: &str| {
            format!(
                "(%y: f32[2,4]) {{ %e = Exp(%x) %f = Exp(%x) %s = ReduceSum({below}) {{keepdims=0}} %k = const i64[2] [2, 1] %r = Reshape(%s, %k) %y = Div(%e, %r) }}"
            )
        };
        assert_eq!(of(&parts("%e")), [Returned::Probabilities]);
        assert_eq!(of(&parts("%f")), [Returned::Other], "the sum of something else");
        assert_eq!(of("(%y: f32[2,4]) { %y = Div(%x, %x) }"), [Returned::Other]);
    }

    #[test]
    fn what_a_product_returns_is_logits_with_a_bias_or_without() {
        let product = |rest: &str, y: &str| {
            format!(
                "(%{y}: f32[2,3]) {{ %w = const f32[4,3] rand(seed=1, std=1) %b = const f32[3] [1, 2, 3] %p = MatMul(%x, %w) {rest} }}"
            )
        };
        assert_eq!(of(&product("", "p")), [Returned::Logits]);
        assert_eq!(of(&product("%y = Add(%b, %p)", "y")), [Returned::Logits]);
        assert_eq!(of(&product("%y = Tanh(%p)", "y")), [Returned::Other]);
    }

    #[test]
    fn an_input_that_is_returned_is_anything() {
        assert_eq!(of("(%x) { }"), [Returned::Other]);
    }
}
