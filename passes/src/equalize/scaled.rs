//! A tensor divided by one number per channel, computed without an operator more.

use crate::id::ValueId;
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::Patch;
use crate::ops;
use crate::tensor::{DType, Tensor};

/// Further than this back, nothing is folded.
const MAX_DEPTH: usize = 6;

/// Finds where a division of the last axis can be folded, and folds it.
pub(super) struct Folder<'a> {
    pub(super) graph: &'a Graph,
    pub(super) users: &'a Users,
}

impl Folder<'_> {
    /// Replaces the computation of `value` by one in which channel j of the last axis is divided by `divisor[j]`; `None`,
    /// with an unusable patch, where no constant on the way takes it.
    ///
    /// All readers of `value` must come to read the result. What lies behind it on the way to that constant must have no
    /// other reader.
    pub(super) fn divided(&self, value: ValueId, divisor: &[f64], patch: &mut Patch) -> Option<ValueId> {
        self.fold(value, divisor, MAX_DEPTH, patch)
    }

    fn fold(&self, value: ValueId, divisor: &[f64], depth: usize, patch: &mut Patch) -> Option<ValueId> {
        let depth = depth.checked_sub(1)?;
        let (id, node) = self.graph.producer(value)?;
        let last = self.graph.value(value).ty.tensor()?.shape.as_ref()?.last()?.known();
        if patch.touches(id) || last != Some(divisor.len()) {
            return None;
        }
        if !node.op.domain.is_empty() || node.outputs.iter().flatten().count() != 1 {
            return None;
        }
        let rank = self.graph.value(value).ty.rank()?;
        let mut copy = node.clone();
        let swap = |copy: &mut Node, input: usize, scaled: Tensor, patch: &mut Patch| {
            let name = node.input(input).map_or("", |v| &self.graph.value(v).name);
            copy.inputs[input] = Some(patch.constant(&format!("{name}.smoothed"), scaled));
        };
        match &*node.op.name {
            "LayerNormalization" => {
                let axis = node.int("axis", -1);
                (axis == -1 || usize::try_from(axis).ok() == rank.checked_sub(1)).then_some(())?;
                for input in 1..node.inputs.len().min(3) {
                    if node.input(input).is_some() {
                        swap(&mut copy, input, self.row(node, input, rank, divisor)?, patch);
                    }
                }
            }
            "Mul" | "Div" | "Add" | "Sub" => {
                let constant = (0..2).find(|&input| self.graph.constant_input(node, input).is_some());
                let additive = matches!(&*node.op.name, "Add" | "Sub");
                match constant {
                    // A constant numerator: what is divided by stays as it is.
                    Some(input) if !additive && (node.op.is("Mul") || input == 0) => {
                        swap(&mut copy, input, self.row(node, input, rank, divisor)?, patch);
                    }
                    // A constant denominator takes the factor instead.
                    Some(input) if !additive => {
                        let inverse: Vec<f64> = divisor.iter().map(|d| 1.0 / d).collect();
                        swap(&mut copy, input, self.row(node, input, rank, &inverse)?, patch);
                    }
                    Some(input) => {
                        let scaled = self.row(node, input, rank, divisor)?;
                        copy.inputs[1 - input] = Some(self.fold_own(node, 1 - input, divisor, depth, patch)?);
                        swap(&mut copy, input, scaled, patch);
                    }
                    None if additive => return None,
                    None => {
                        let operands: &[usize] = if node.op.is("Mul") { &[0, 1] } else { &[0] };
                        let (input, folded) = operands.iter().find_map(|&input| {
                            let mark = patch.mark();
                            let same = self.graph.value(node.input(input)?).ty.rank()? == rank;
                            let folded = self.fold_own(node, input, divisor, depth, patch).filter(|_| same);
                            if folded.is_none() {
                                patch.roll_back(&mark);
                            }
                            Some((input, folded?))
                        })?;
                        copy.inputs[input] = Some(folded);
                    }
                }
            }
            "Relu" | "LeakyRelu" | "Identity" => {
                copy.inputs[0] = Some(self.fold_own(node, 0, divisor, depth, patch)?);
            }
            "MatMul" | "Gemm" => {
                let roles = ops::linear(self.graph, id).filter(|roles| roles.weight == 1)?;
                let weight = self.graph.constant_input(node, 1).filter(|w| w.shape().len() == 2)?;
                (weight.shape()[roles.out_axis] == divisor.len() && weight.dtype() == DType::F32).then_some(())?;
                swap(&mut copy, 1, scaled_weight(weight, roles.out_axis, |j| 1.0 / divisor[j])?, patch);
                if roles.bias.is_some() {
                    swap(&mut copy, 2, self.row(node, 2, 2, divisor)?, patch);
                }
            }
            _ => return None,
        }
        let source = self.graph.value(value);
        let name = format!("{}.smoothed", source.name);
        copy.name = format!("{}.smoothed", node.name).into();
        patch.erase(id);
        Some(patch.node(copy, &name, source.ty.clone(), Some(id)))
    }

    /// The same for an input of `node` that nobody else reads.
    fn fold_own(&self, node: &Node, input: usize, divisor: &[f64], depth: usize, patch: &mut Patch) -> Option<ValueId> {
        let value = node.input(input)?;
        self.users.only_input(value)?;
        self.fold(value, divisor, depth, patch)
    }

    /// The constant at `input`, a scalar or a row along the last axis, divided channel by channel.
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
    fn row(&self, node: &Node, input: usize, rank: usize, divisor: &[f64]) -> Option<Tensor> {
        let constant = self.graph.constant_input(node, input).filter(|c| c.dtype() == DType::F32)?;
        let shape = constant.shape();
        let row = shape.iter().rev().skip(1).all(|&dim| dim == 1) && shape.len() <= rank;
        let values = constant.floats()?;
        let spread: Vec<f32> = match values.len() {
            1 => vec![values[0]; divisor.len()],
            n if n == divisor.len() => values.to_vec(),
            _ => return None,
        };
        let scaled = spread.iter().zip(divisor).map(|(v, d)| (f64::from(*v) / d) as f32).collect();
        // The rank stays: leading extents of 1 may be what gives the result its own.
        let mut shape = vec![1; shape.len().max(1)];
        if let Some(last) = shape.last_mut() {
            *last = divisor.len();
        }
        row.then(|| Tensor::of(shape, scaled))
    }
}

/// A matrix whose entries with index j on `axis` are multiplied by `factor(j)`.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
pub(super) fn scaled_weight(weight: &Tensor, axis: usize, factor: impl Fn(usize) -> f64) -> Option<Tensor> {
    let [_, columns] = *weight.shape() else { return None };
    let mut values = weight.floats()?.into_owned();
    for (index, value) in values.iter_mut().enumerate() {
        let place = if axis == 0 { index / columns } else { index % columns };
        *value = (f64::from(*value) * factor(place)) as f32;
    }
    Some(Tensor::of(weight.shape(), values))
}
