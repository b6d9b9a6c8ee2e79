//! What attention heads hand on: from the product that computes values to the one that reads what attention made of them.

use std::sync::Arc;

use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::Patch;
use crate::tensor::{DType, Tensor};

/// A node that is computed anew, with the constant that columns of values are in, in some.
type Step = (NodeId, Option<usize>);

/// A path along which channels of a head stay what they are: shares of attention mix tokens, not channels, P (v T) = (P v) T.
///
/// Between a product with a constant weight and the next one stand a product of two activations, reshapes, transpositions and the copies
/// of grouped heads, and nobody else reads what is handed on. A cache between them is one such reader.
#[derive(Clone, Debug)]
pub(super) struct ValuePath {
    /// The size of a head.
    pub(super) size: usize,
    /// The weight that computes values: columns are their channels.
    pub(super) weight: ValueId,
    /// The product that reads what attention made of values.
    pub(super) reader: NodeId,
    /// Whether channel j of what is read is made of channel j of values alone: heads are not grouped, and keep their order.
    pub(super) straight: bool,
    /// In graph order.
    steps: Vec<Step>,
}

impl ValuePath {
    /// The path through the product `id` of shares and values.
    pub(super) fn through(graph: &Graph, users: &Users, id: NodeId) -> Option<Self> {
        let node = graph.node(id).filter(|node| node.op.is("MatMul"))?;
        let (shares, values) = (node.input(0)?, node.input(1)?);
        (graph.constant(shares).is_none() && graph.constant(values).is_none() && shares != values).then_some(())?;
        // A row alone would be summed over itself.
        graph.value(values).ty.rank().filter(|rank| *rank > 1)?;
        let size = last(graph, values).filter(|size| *size > 1)?;
        let (mut steps, weight) = makers(graph, users, values, size)?;
        steps.push((id, None));
        let (readers, reader) = readers(graph, users, node.output(0)?, size)?;
        let width = |value: Option<ValueId>, axis: usize| graph.constant(value?)?.shape().get(axis).copied();
        let read = width(graph.node(reader)?.input(1), 0)?;
        let straight = width(Some(weight), 1) == Some(read) && in_order(graph, values, &steps, &readers, read);
        steps.extend(readers.into_iter().map(|id| (id, None)));
        Some(Self { size, weight, reader, straight, steps })
    }

    /// Whether `patch` rewrote a step already.
    pub(super) fn is_touched(&self, patch: &Patch) -> bool {
        self.steps.iter().any(|(id, _)| patch.touches(*id))
    }

    /// Computes the path anew with `columns` of the constants of values in the place of those, named with `suffix`: what the reader
    /// then reads. `None`, with an unusable patch, where that has no result, or a step was rewritten already.
    pub(super) fn rebuilt(
        &self,
        graph: &Graph,
        suffix: &str,
        patch: &mut Patch,
        columns: impl Fn(&Tensor) -> Option<Tensor>,
    ) -> Option<ValueId> {
        let mut moved: Option<(ValueId, ValueId)> = None;
        for (id, constant) in &self.steps {
            let node = graph.node(*id).filter(|_| !patch.touches(*id))?;
            let mut copy = node.clone();
            if let Some((old, new)) = moved {
                copy.inputs.iter_mut().filter(|input| **input == Some(old)).for_each(|input| *input = Some(new));
            }
            if let Some(input) = constant {
                let value = node.input(*input)?;
                let made = columns(graph.constant(value)?)?;
                copy.inputs[*input] = Some(patch.constant(&format!("{}{suffix}", graph.value(value).name), made));
            }
            let output = node.output(0)?;
            let source = graph.value(output);
            patch.erase(*id);
            let new = patch.node(copy, &format!("{}{suffix}", source.name), source.ty.clone(), Some(*id));
            moved = Some((output, new));
        }
        Some(moved?.1)
    }
}

/// The nodes from the product with a weight on that make `values`, with their constants; and that weight.
fn makers(graph: &Graph, users: &Users, values: ValueId, size: usize) -> Option<(Vec<Step>, ValueId)> {
    let mut steps = Vec::new();
    let mut value = values;
    loop {
        let (_, reads) = users.only_input(value)?;
        let (producer, made) = graph.producer(value)?;
        let in_place = reads == 0 || takes_right_operand(graph, users, value);
        in_place.then_some(())?;
        match &*made.op.name {
            "MatMul" if made.op.domain.is_empty() => {
                let weight = made.input(1)?;
                let tensor = graph.constant(weight)?;
                turns(tensor, *tensor.shape().get(1)?, size).then_some(())?;
                steps.insert(0, (producer, Some(1)));
                return Some((steps, weight));
            }
            "Add" if made.op.domain.is_empty() => {
                let constant = (0..2).find(|input| graph.constant_input(made, *input).is_some())?;
                let bias = graph.constant_input(made, constant)?;
                (bias.len() == *bias.shape().last()? && turns(bias, bias.len(), size)).then_some(())?;
                steps.insert(0, (producer, Some(constant)));
                value = made.input(1 - constant)?;
            }
            _ => {
                keeps_runs(graph, made, size).then_some(())?;
                steps.insert(0, (producer, None));
                value = made.input(0)?;
            }
        }
    }
}

/// The nodes between `value` and the product with a weight that reads it, and that product.
fn readers(graph: &Graph, users: &Users, value: ValueId, size: usize) -> Option<(Vec<NodeId>, NodeId)> {
    let mut steps = Vec::new();
    let mut value = value;
    loop {
        let (next, input) = users.only_input(value)?;
        let reads = graph.node(next)?;
        (input == 0).then_some(())?;
        if let Some(weight) = graph.constant_input(reads, 1).filter(|_| reads.op.is("MatMul")) {
            let [n, _] = *weight.shape() else { return None };
            turns(weight, n, size).then_some(())?;
            return Some((steps, next));
        }
        // What the last reshape leaves is as long as the rows of the weight that reads it.
        let read = users.only_input(reads.output(0)?).and_then(|(id, _)| graph.node(id));
        let is_last = read.is_some_and(|read| read.op.is("MatMul") && graph.constant_input(read, 1).is_some());
        (keeps_runs(graph, reads, size) || (is_last && reads.op.is("Reshape"))).then_some(())?;
        steps.push(next);
        value = reads.output(0)?;
    }
}

/// Whether heads are split off by one reshape, moved in front of tokens, and brought back and joined the same way: so `width` channels
/// stay in their order.
fn in_order(graph: &Graph, values: ValueId, makers: &[Step], readers: &[NodeId], width: usize) -> bool {
    /// Tokens and heads change places.
    const SWAP: [i64; 4] = [0, 2, 1, 3];
    let node = |id: NodeId| graph.node(id);
    let moving: Vec<&Node> =
        makers.iter().filter(|(_, constant)| constant.is_none()).filter_map(|(id, _)| node(*id)).collect();
    let back: Vec<&Node> = readers.iter().filter_map(|id| node(*id)).collect();
    let wide = |(id, constant): &Step| {
        let constant = constant.and_then(|input| graph.constant_input(node(*id)?, input));
        constant.is_none_or(|tensor| tensor.shape().last() == Some(&width))
    };
    let swaps = |node: &Node| node.op.is("Transpose") && node.ints("perm").is_some_and(|perm| *perm == SWAP);
    // The product itself stands last among the makers.
    let [split, away, _] = moving[..] else { return false };
    let [home, join] = back[..] else { return false };
    let shape = graph.value(values).ty.tensor().and_then(|ty| ty.shape.as_ref());
    let extent = |axis: usize| shape.filter(|shape| shape.len() == SWAP.len())?.get(axis)?.known();
    let whole = extent(1).zip(extent(3)).and_then(|(heads, size)| heads.checked_mul(size)) == Some(width);
    let ends = split.op.is("Reshape") && join.op.is("Reshape");
    ends && swaps(away) && swaps(home) && whole && makers.iter().all(wide)
}

/// Whether a product alone reads `value`, as its right operand, or a sum.
fn takes_right_operand(graph: &Graph, users: &Users, value: ValueId) -> bool {
    let reader = users.only_input(value).and_then(|(id, input)| Some((graph.node(id)?, input)));
    reader.is_some_and(|(node, input)| node.op.is("MatMul") && input == 1 || node.op.is("Add"))
}

/// Whether `tensor` is made of numbers in whole runs of `size` along an axis of extent `n`.
fn turns(tensor: &Arc<Tensor>, n: usize, size: usize) -> bool {
    tensor.dtype() == DType::F32 && tensor.shape().len() <= 2 && n > 0 && n.is_multiple_of(size)
}

/// The extent of the last axis of `value`: as its type has it, or as the nodes that make it say.
fn last(graph: &Graph, value: ValueId) -> Option<usize> {
    /// So many nodes are asked.
    const FURTHEST: usize = 8;
    let mut value = value;
    for _ in 0..FURTHEST {
        let known = graph.value(value).ty.tensor().and_then(|ty| ty.shape.as_ref()?.last()?.known());
        if known.is_some() {
            return known;
        }
        let (_, node) = graph.producer(value)?;
        value = match &*node.op.name {
            "Reshape" => return reshaped(graph, node),
            "Expand" | "Identity" => node.input(0)?,
            "Transpose" if keeps_last(node) => node.input(0)?,
            "MatMul" => node.input(1)?,
            _ => return None,
        };
    }
    None
}

/// The last extent that `reshape` is asked for, where that alone is constant.
fn reshaped(graph: &Graph, reshape: &Node) -> Option<usize> {
    let (_, joined) = graph.producer(reshape.input(1)?).filter(|(_, node)| node.op.is("Concat"))?;
    let tail = graph.constant(joined.inputs.last().copied().flatten()?)?.integers()?;
    tail.last().and_then(|n| usize::try_from(*n).ok()).filter(|n| *n > 0)
}

/// Whether `transpose` leaves the last axis where it is.
fn keeps_last(transpose: &Node) -> bool {
    let perm = transpose.ints("perm").unwrap_or_default();
    perm.last().is_some_and(|last| usize::try_from(*last).is_ok_and(|last| last + 1 == perm.len()))
}

/// Whether `node` hands runs of `size` numbers along the last axis on as they are.
fn keeps_runs(graph: &Graph, node: &Node, size: usize) -> bool {
    if !node.op.domain.is_empty() {
        return false;
    }
    let whole = |value: Option<ValueId>| value.and_then(|v| last(graph, v)).is_some_and(|n| n.is_multiple_of(size));
    match &*node.op.name {
        // The order of numbers stays, so whole runs do.
        "Reshape" | "Unsqueeze" | "Squeeze" => whole(node.input(0)) && whole(node.output(0)),
        "Transpose" => keeps_last(node),
        // Only extents of 1 grow.
        "Expand" => whole(node.input(0)),
        "Identity" => true,
        _ => false,
    }
}
