//! A tensor divided by one number per channel, computed without an operator more.

use std::sync::Arc;

use super::axes::{aligned, divided_row, joins_along, moved_from, parts, scaled_weight};
use super::region::clamp_end;
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Edit, Patch, Statistic, Stats};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// Further than this back, nothing is folded.
const MAX_DEPTH: usize = 8;

/// Finds where a division of channels can be folded, and folds it.
pub(super) struct Folder<'a> {
    pub(super) graph: &'a Graph,
    pub(super) stats: &'a Stats,
    pub(super) users: &'a Users,
}

/// A node that is written anew, with the divisor of its result.
struct Anew<'n> {
    id: NodeId,
    node: &'n Node,
    copy: Node,
    /// The axes of the result, and which of them is divided.
    place: (usize, usize),
    divisor: &'n [f64],
    /// How much further back may be looked.
    depth: usize,
}

impl Anew<'_> {
    /// Lets the copy read `scaled` at `input`.
    fn swap(&mut self, graph: &Graph, input: usize, scaled: Tensor, patch: &mut Patch) {
        let name = self.node.input(input).map_or("", |value| &graph.value(value).name);
        self.copy.inputs[input] = Some(patch.constant(&format!("{name}.smoothed"), scaled));
    }

    fn along_last(&self) -> bool {
        self.place.1 + 1 == self.place.0
    }
}

impl Folder<'_> {
    /// Replaces the computation of `value` by one in which channel j of the last axis is divided by `divisor[j]`; `None`,
    /// with an unusable patch, where no constant on the way takes it.
    ///
    /// All readers of `value` must come to read the result. What lies behind it on the way to that constant must have no
    /// other reader.
    pub(super) fn divided(&self, value: ValueId, divisor: &[f64], patch: &mut Patch) -> Option<ValueId> {
        let axis = self.graph.value(value).ty.rank()?.checked_sub(1)?;
        self.fold((value, axis), divisor, MAX_DEPTH, patch)
    }

    fn fold(
        &self,
        (value, axis): (ValueId, usize),
        divisor: &[f64],
        depth: usize,
        patch: &mut Patch,
    ) -> Option<ValueId> {
        let depth = depth.checked_sub(1)?;
        let (id, node) = self.graph.producer(value)?;
        let shape = self.graph.value(value).ty.tensor()?.shape.as_ref()?;
        if patch.touches(id) || shape.get(axis)?.known() != Some(divisor.len()) {
            return None;
        }
        if !node.op.domain.is_empty() || node.outputs.iter().flatten().count() != 1 {
            return None;
        }
        let mut anew = Anew { id, node, copy: node.clone(), place: (shape.len(), axis), divisor, depth };
        self.write(&mut anew, patch)?;
        let source = self.graph.value(value);
        patch.erase(id);
        let new = patch.node(anew.copy, &format!("{}.smoothed", source.name), source.ty.clone(), Some(id));
        if let Some(trained) = self.stats.trained(value).filter(|_| axis == 1) {
            let statistic = Statistic::Trained(Arc::new(trained.divided(divisor)?));
            patch.edit(Edit::Record { value: new, statistic });
        }
        Some(new)
    }

    /// Makes the copy of a node compute the divided result.
    fn write(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        let (graph, node, (_, axis)) = (self.graph, anew.node, anew.place);
        match &*node.op.name {
            "LayerNormalization" | "RMSNormalization" => self.norm(anew, patch),
            "Mul" | "Div" => self.factor(anew, patch),
            "Add" | "Sub" => self.sum(anew, patch),
            // A slope and an end at 0 or nowhere are the same for all sizes.
            "Relu" | "LeakyRelu" | "PRelu" | "Identity" => self.read(anew, 0, axis, patch),
            "Clip" if clamp_end(graph, node) == Some(f64::INFINITY) => self.read(anew, 0, axis, patch),
            "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" if axis == 1 => {
                self.read(anew, 0, axis, patch)
            }
            "Transpose" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
                self.read(anew, 0, moved_from(graph, node, node.output(0)?, axis)?, patch)
            }
            "Concat" => self.joined(anew, patch),
            "Conv" if axis == 1 => self.linear(anew, patch),
            "ConvTranspose" if axis == 1 && node.int("group", 1) == 1 => self.linear(anew, patch),
            "MatMul" | "Gemm" if anew.along_last() => self.linear(anew, patch),
            _ => None,
        }
    }

    fn norm(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        let rank = anew.place.0;
        let last = ops::positive_axis(anew.node.int("axis", -1), rank) == rank.checked_sub(1);
        (last && anew.along_last()).then_some(())?;
        anew.node.input(1)?;
        for input in 1..anew.node.inputs.len().min(3) {
            if anew.node.input(input).is_some() {
                let row = self.row(anew, input, anew.place, anew.divisor)?;
                anew.swap(self.graph, input, row, patch);
            }
        }
        Some(())
    }

    fn factor(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        let product = anew.node.op.is("Mul");
        match (0..2).find(|&input| self.graph.constant_input(anew.node, input).is_some()) {
            // A constant numerator: what is divided by stays as it is.
            Some(input) if product || input == 0 => {
                let row = self.row(anew, input, anew.place, anew.divisor)?;
                anew.swap(self.graph, input, row, patch);
                Some(())
            }
            // A constant denominator takes the factor instead.
            Some(input) => {
                let inverse: Vec<f64> = anew.divisor.iter().map(|d| 1.0 / d).collect();
                let row = self.row(anew, input, anew.place, &inverse)?;
                anew.swap(self.graph, input, row, patch);
                Some(())
            }
            None => {
                let operands: &[usize] = if product { &[0, 1] } else { &[0] };
                operands.iter().find_map(|&input| {
                    let mark = patch.mark();
                    let axis = aligned(self.graph, anew.node, input, anew.place)?;
                    let read = self.read(anew, input, axis, patch);
                    if read.is_none() {
                        patch.roll_back(&mark);
                    }
                    read
                })
            }
        }
    }

    /// Both sides of a sum.
    fn sum(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        for input in 0..2 {
            if self.graph.constant_input(anew.node, input).is_some() {
                let row = self.row(anew, input, anew.place, anew.divisor)?;
                anew.swap(self.graph, input, row, patch);
            } else {
                self.read(anew, input, aligned(self.graph, anew.node, input, anew.place)?, patch)?;
            }
        }
        Some(())
    }

    fn joined(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        let ((rank, axis), all) = (anew.place, anew.divisor);
        let parts = if joins_along(anew.node, axis, rank) {
            parts(self.graph, anew.node, axis, all)?
        } else {
            vec![all; anew.node.inputs.len()]
        };
        for (input, part) in parts.into_iter().enumerate() {
            let value = self.alone(anew.node, input)?;
            anew.copy.inputs[input] = Some(self.fold((value, axis), part, anew.depth, patch)?);
        }
        Some(())
    }

    /// What the weight has for every output, and the bias.
    fn linear(&self, anew: &mut Anew<'_>, patch: &mut Patch) -> Option<()> {
        let roles = ops::linear(self.graph, anew.id).filter(|roles| roles.weight == 1)?;
        let weight = self.graph.constant_input(anew.node, 1).filter(|weight| weight.dtype() == DType::F32)?;
        let fits = weight.shape()[roles.out_axis] == anew.divisor.len();
        (fits && (weight.shape().len() == 2 || !anew.node.op.is("MatMul"))).then_some(())?;
        let scaled = scaled_weight(weight, roles.out_axis, |j| 1.0 / anew.divisor[j])?;
        anew.swap(self.graph, 1, scaled, patch);
        if roles.bias.is_some() {
            // That of a convolution has one axis; that of a matrix is broadcast to two.
            let place = if anew.node.op.is("Gemm") { (2, 1) } else { (1, 0) };
            let row = self.row(anew, 2, place, anew.divisor)?;
            anew.swap(self.graph, 2, row, patch);
        }
        Some(())
    }

    /// Lets the copy read the divided tensor at `input`, which nobody else may read, divided along `axis` there.
    fn read(&self, anew: &mut Anew<'_>, input: usize, axis: usize, patch: &mut Patch) -> Option<()> {
        let value = self.alone(anew.node, input)?;
        anew.copy.inputs[input] = Some(self.fold((value, axis), anew.divisor, anew.depth, patch)?);
        Some(())
    }

    /// What is read at `input`, and nowhere else.
    fn alone(&self, node: &Node, input: usize) -> Option<ValueId> {
        let value = node.input(input)?;
        self.users.only_input(value).map(|_| value)
    }

    /// The constant at `input`, broadcast to the `place` of channels, divided channel by channel.
    fn row(&self, anew: &Anew<'_>, input: usize, place: (usize, usize), divisor: &[f64]) -> Option<Tensor> {
        divided_row(self.graph.constant_input(anew.node, input)?, place, divisor)
    }
}
