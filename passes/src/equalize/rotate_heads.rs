//! Rotation of the values that attention heads hand on.

use std::sync::Arc;

use super::hadamard::Hadamard;
use super::rotate::{self, rows};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns what attention heads hand on into another basis: v' = v R for every head, R a Hadamard matrix of the size of a head with
    /// random signs.
    ///
    /// Shares of attention mix tokens, not channels: P (v R) = (P v) R. So the weight that computes v is multiplied by R, head by head, and
    /// the one that reads P v by Rᵀ, and no node is added. Done between a product with a constant weight and the next one, where only a
    /// product of two activations, reshapes, transpositions and the copies of grouped heads stand between them, and nobody else reads
    /// what is turned. A cache between them is one such reader.
    INFO {
        name: "rotate-heads",
        source: "Liu et al. 2024 (SpinQuant), arXiv:2405.16406, section 3 (R2); Ashkboos et al. 2024, arXiv:2404.00456, section 4, stage 1b",
        cost: "m d log d multiply-adds for both weights of m × d; no data.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "seed", doc: "which random signs, 0 by default" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(RotateHeads::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct RotateHeads {
    seed: u64,
}

impl RotateHeads {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { seed: rotate::seed(options)? })
    }
}

impl Pass for RotateHeads {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let users = Users::of(graph);
        let mut patch = Patch::on(model);
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("MatMul")) {
            let Some(path) = Path::through(graph, &users, id, node) else { continue };
            let rotation = Hadamard::new(path.size, self.seed);
            let mark = patch.mark();
            match path.turn(graph, &rotation, &mut patch) {
                Some(()) => patch.count("heads", 1),
                None => patch.roll_back(&mark),
            }
        }
        Ok(patch)
    }
}

/// Behind the names of what is turned: once is enough.
const TURNED: &str = ".turned";

/// From the product that computes values to the one that reads what attention made of them.
struct Path {
    /// The size of a head.
    size: usize,
    /// What is computed anew, in graph order, with the constant that is turned in some.
    steps: Vec<(NodeId, Option<usize>)>,
    reader: NodeId,
}

impl Path {
    /// The path through the product `id` of shares and values, if all of it can be turned.
    fn through(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let (shares, values) = (node.input(0)?, node.input(1)?);
        (graph.constant(shares).is_none() && graph.constant(values).is_none() && shares != values).then_some(())?;
        // A row alone would be summed over itself.
        graph.value(values).ty.rank().filter(|rank| *rank > 1)?;
        let size = last(graph, values).filter(|size| *size > 1)?;
        let mut steps = vec![(id, None)];
        let mut value = values;
        loop {
            let (_, reads) = users.only_input(value)?;
            let (producer, made) = graph.producer(value)?;
            let in_place = reads == 0 || takes_right_operand(graph, users, value);
            in_place.then_some(())?;
            match &*made.op.name {
                "MatMul" if made.op.domain.is_empty() => {
                    let weight = graph.constant_input(made, 1)?;
                    let is_new = !graph.value(made.input(1)?).name.ends_with(TURNED);
                    (is_new && turns(weight, *weight.shape().get(1)?, size)).then_some(())?;
                    steps.insert(0, (producer, Some(1)));
                    break;
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
        let mut value = node.output(0)?;
        loop {
            let (next, input) = users.only_input(value)?;
            let reads = graph.node(next)?;
            (input == 0).then_some(())?;
            if let Some(weight) = graph.constant_input(reads, 1).filter(|_| reads.op.is("MatMul")) {
                let [n, _] = *weight.shape() else { return None };
                turns(weight, n, size).then_some(())?;
                return Some(Self { size, steps, reader: next });
            }
            // What the last reshape leaves is as long as the rows of the weight that reads it.
            let read = users.only_input(reads.output(0)?).and_then(|(id, _)| graph.node(id));
            let is_last = read.is_some_and(|read| read.op.is("MatMul") && graph.constant_input(read, 1).is_some());
            (keeps_runs(graph, reads, size) || (is_last && reads.op.is("Reshape"))).then_some(())?;
            steps.push((next, None));
            value = reads.output(0)?;
        }
    }

    /// Computes the path in the basis of `rotation` beside the old one, and lets its reader read that.
    fn turn(&self, graph: &Graph, rotation: &Hadamard, patch: &mut Patch) -> Option<()> {
        let mut turned: Option<(ValueId, ValueId)> = None;
        for (id, constant) in &self.steps {
            let node = graph.node(*id)?;
            let mut copy = node.clone();
            if let Some((old, new)) = turned {
                copy.inputs.iter_mut().filter(|input| **input == Some(old)).for_each(|input| *input = Some(new));
            }
            if let Some(input) = constant {
                let value = node.input(*input)?;
                let made = rows(graph.constant(value)?, None, rotation)?;
                copy.inputs[*input] = Some(patch.constant(&format!("{}{TURNED}", graph.value(value).name), made));
            }
            let output = node.output(0)?;
            let source = graph.value(output);
            let new = patch.node(copy, &format!("{}{TURNED}", source.name), source.ty.clone(), Some(*id));
            turned = Some((output, new));
        }
        let reader = graph.node(self.reader)?;
        let weight = reader.input(1)?;
        let made = rows(&graph.constant(weight)?.transposed()?, None, rotation)?.transposed()?;
        let made = patch.constant(&format!("{}{TURNED}", graph.value(weight).name), made);
        let inputs = vec![Some(turned?.1), Some(made)];
        patch.replace(self.reader, Node { inputs, ..reader.clone() });
        Some(())
    }
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
