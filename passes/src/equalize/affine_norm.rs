//! A norm whose scale and shift are constants, computed with others.

use super::axes::scaled_weight;
use super::divided::Group;
use super::reparameterize_norms::Affine;
use super::shifted;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::Patch;
use crate::ops;
use crate::tensor::{DType, Tensor};

/// The nodes that give a norm its scale and shift, one number per index of the last axis.
pub(super) struct Norm {
    /// A norm that is one operator, or a multiplication by the scale.
    scale: NodeId,
    /// Whether it is a `LayerNormalization`, which takes a shift itself.
    is_whole: bool,
    /// The input of `scale` with the scale.
    input: usize,
    /// The addition of the shift, and its input with it; `None` where `LayerNormalization` adds it or nothing does.
    shift: Option<(NodeId, usize)>,
    value: ValueId,
}

impl Norm {
    /// The norm that computes `value`.
    pub(super) fn of(graph: &Graph, value: ValueId) -> Option<Self> {
        let channels = graph.value(value).ty.tensor()?.shape.as_ref()?.last()?.known().filter(|n| *n > 0)?;
        let (id, node) = graph.producer(value)?;
        let of_mean_square = node.op.is("RMSNormalization") || node.op.is("SimplifiedLayerNormalization");
        if node.op.is("LayerNormalization") || of_mean_square {
            let rank = graph.value(value).ty.rank()?;
            let axis = node.int("axis", -1);
            let last = axis == -1 || usize::try_from(axis).ok() == rank.checked_sub(1);
            let rows = row(graph, node, 1, channels).is_some()
                && (node.input(2).is_none() || row(graph, node, 2, channels).is_some());
            let alone = node.outputs.iter().flatten().count() == 1;
            let is_whole = !of_mean_square;
            return (last && rows && alone).then_some(Self { scale: id, is_whole, input: 1, shift: None, value });
        }
        let constant = |node: &Node| (0..2).find(|input| row(graph, node, *input, channels).is_some());
        if node.op.is("Mul") {
            return Some(Self { scale: id, is_whole: false, input: constant(node)?, shift: None, value });
        }
        let input = constant(node).filter(|_| node.op.is("Add"))?;
        let (scale, factor) = graph.producer(node.input(1 - input)?).filter(|(_, node)| node.op.is("Mul"))?;
        Some(Self { scale, is_whole: false, input: constant(factor)?, shift: Some((id, input)), value })
    }

    /// Whether it adds a shift, or can.
    pub(super) fn takes_shift(&self) -> bool {
        self.shift.is_some() || self.is_whole
    }

    /// What takes its scale and shift away: channels without a scale stay as they are.
    pub(super) fn bare(&self, graph: &Graph) -> Option<Affine> {
        let channels = graph.value(self.value).ty.tensor()?.shape.as_ref()?.last()?.known()?;
        let node = graph.node(self.scale)?;
        let scale = row(graph, node, self.input, channels)?;
        let shift = match self.shift {
            Some((add, input)) => row(graph, graph.node(add)?, input, channels)?,
            None if self.is_whole && node.input(2).is_some() => row(graph, node, 2, channels)?,
            None => vec![0.0; channels],
        };
        let of = |(scale, shift): (&f64, &f64)| if scale.is_normal() { (*scale, -shift / scale) } else { (1.0, 0.0) };
        let (divisor, shift) = scale.iter().zip(&shift).map(of).unzip();
        Some(Affine { divisor, shift })
    }

    /// Lets the products of `group` read the norm divided and shifted as `affine` says, with weights and biases that make up for it;
    /// `None`, with an unusable patch, where one does not take it.
    pub(super) fn reparameterize(
        &self,
        graph: &Graph,
        users: &Users,
        group: &Group,
        affine: &Affine,
        patch: &mut Patch,
    ) -> Option<()> {
        let moved = self.renewed(graph, users, group, affine, patch)?;
        group.sinks.iter().try_for_each(|&id| rewire(graph, users, id, moved, affine, patch))
    }

    /// The norm with another scale and shift, beside the old one where somebody else reads that.
    fn renewed(
        &self,
        graph: &Graph,
        users: &Users,
        group: &Group,
        affine: &Affine,
        patch: &mut Patch,
    ) -> Option<ValueId> {
        let node = graph.node(self.scale)?;
        let divided = |v: f64, j: usize| v / affine.divisor[j];
        let moved = |v: f64, j: usize| v / affine.divisor[j] + affine.shift[j];
        let mut copy = node.clone();
        copy.inputs[self.input] = Some(renewed_row(graph, node, self.input, affine, divided, patch)?);
        let shifts = affine.shift.iter().any(|t| *t != 0.0);
        if self.is_whole && (shifts || node.input(2).is_some()) {
            copy.inputs.resize(3, None);
            copy.inputs[2] = Some(renewed_row(graph, node, 2, affine, moved, patch)?);
        }
        let before = Some(self.scale);
        let Some((add, input)) = self.shift else {
            (self.is_whole || !shifts).then_some(())?;
            if group.alone {
                patch.erase(self.scale);
            }
            return Some(insert(graph, copy, self.value, before, patch));
        };
        let node = graph.node(add)?;
        let scaled = node.input(1 - input)?;
        if group.alone {
            patch.erase(add);
            if users.only_input(scaled).is_some() {
                patch.erase(self.scale);
            }
        }
        let scaled = insert(graph, copy, scaled, before, patch);
        let mut copy = node.clone();
        copy.inputs[1 - input] = Some(scaled);
        copy.inputs[input] = Some(renewed_row(graph, node, input, affine, moved, patch)?);
        Some(insert(graph, copy, self.value, Some(add), patch))
    }
}

/// The constant of f32 at `input` per index of the last axis of extent `channels`, if it has no other extent.
fn row(graph: &Graph, node: &Node, input: usize, channels: usize) -> Option<Vec<f64>> {
    let constant = graph.constant_input(node, input).filter(|constant| constant.dtype() == DType::F32)?;
    let flat = constant.shape().iter().rev().skip(1).all(|dim| *dim == 1);
    let values = constant.floats().filter(|values| values.len() == channels && flat && !constant.shape().is_empty())?;
    Some(values.iter().map(|v| f64::from(*v)).collect())
}

/// The constant row at `input`, zeros where there is none, with every number changed as `of` says.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn renewed_row(
    graph: &Graph,
    node: &Node,
    input: usize,
    affine: &Affine,
    of: impl Fn(f64, usize) -> f64,
    patch: &mut Patch,
) -> Option<ValueId> {
    let channels = affine.divisor.len();
    let (values, shape, name) = match node.input(input) {
        Some(value) => (
            row(graph, node, input, channels)?,
            graph.constant(value)?.shape().to_vec(),
            graph.value(value).name.to_string(),
        ),
        None => (vec![0.0; channels], vec![channels], format!("{}.shift", node.name)),
    };
    let values: Vec<f32> = values.into_iter().enumerate().map(|(j, v)| of(v, j) as f32).collect();
    values.iter().all(|v| v.is_finite()).then(|| patch.constant(&format!("{name}.moved"), Tensor::of(shape, values)))
}

/// `node` as a new one, whose result is called after `like`.
fn insert(graph: &Graph, mut node: Node, like: ValueId, before: Option<NodeId>, patch: &mut Patch) -> ValueId {
    let value = graph.value(like);
    node.name = format!("{}.moved", node.name).into();
    patch.node(node, &format!("{}.moved", value.name), value.ty.clone(), before)
}

/// Lets the product `id` read `moved`, with a weight and a bias that make up for `affine`.
fn rewire(graph: &Graph, users: &Users, id: NodeId, moved: ValueId, affine: &Affine, patch: &mut Patch) -> Option<()> {
    let node = graph.node(id)?;
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(node, 1)?;
    let scaled = scaled_weight(weight, 1 - roles.out_axis, |j| affine.divisor[j])?;
    let mut copy = node.clone();
    copy.inputs[0] = Some(moved);
    copy.inputs[1] = Some(patch.constant(&format!("{}.moved", graph.value(node.input(1)?).name), scaled));
    // W (y / r + t) r = W y + W (r t): the bias gives W (r t) back.
    let extra: Vec<f64> = affine.divisor.iter().zip(&affine.shift).map(|(r, t)| r * t).collect();
    if extra.iter().all(|v| *v == 0.0) {
        patch.replace(id, copy);
        return Some(());
    }
    let extra = shifted::through(graph, id, &extra)?;
    with_bias(graph, users, id, copy, &extra, patch)
}

/// Lets `copy` stand for the product `id`, with a bias that is less by `extra`, one number per output channel.
pub(super) fn with_bias(
    graph: &Graph,
    users: &Users,
    id: NodeId,
    mut copy: Node,
    extra: &[f64],
    patch: &mut Patch,
) -> Option<()> {
    let node = graph.node(id)?;
    if node.op.is("Gemm") {
        let bias = shifted::bias(graph, id)?;
        let name = node.input(2).map_or_else(|| format!("{}.bias", node.name), |b| graph.value(b).name.to_string());
        copy.inputs.resize(3, None);
        copy.inputs[2] = Some(less(&bias, extra, vec![bias.len()], &name, patch)?);
        patch.replace(id, copy);
        return Some(());
    }
    let output = node.output(0)?;
    if let Some(Site::Use { node: add, input }) = ops::bias_site(graph, users, id) {
        let old = graph.node(add)?;
        let bias = graph.constant_input(old, input.into()).filter(|bias| bias.dtype() == DType::F32)?;
        let values: Vec<f64> = bias.floats()?.iter().map(|v| f64::from(*v)).collect();
        let name = graph.value(old.input(input.into())?).name.to_string();
        let mut sum = old.clone();
        sum.inputs[usize::from(input)] = Some(less(&values, extra, bias.shape().to_vec(), &name, patch)?);
        patch.erase(id);
        sum.inputs[usize::from(1 - input)] = Some(product(graph, copy, output, id, patch));
        patch.replace(add, sum);
        return Some(());
    }
    let name = format!("{}.bias", node.name);
    let bias = less(&vec![0.0; extra.len()], extra, vec![extra.len()], &name, patch)?;
    let product = product(graph, copy, output, id, patch);
    let sum = Node {
        name: name.into(),
        op: OpKey { name: "Add".into(), ..node.op.clone() },
        inputs: vec![Some(product), Some(bias)],
        attrs: Attrs::new(),
        bodies: Vec::new(),
        ..node.clone()
    };
    patch.replace(id, sum);
    Some(())
}

/// `copy` as a new node in place of `id`, with its name, which the user may have given in an option; its result is called after `output`.
fn product(graph: &Graph, copy: Node, output: ValueId, id: NodeId, patch: &mut Patch) -> ValueId {
    let value = graph.value(output);
    patch.node(copy, &format!("{}.moved", value.name), value.ty.clone(), Some(id))
}

/// The constant `values` less `extra`; `None` where they do not fit each other.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn less(values: &[f64], extra: &[f64], shape: Vec<usize>, name: &str, patch: &mut Patch) -> Option<ValueId> {
    let difference: Vec<f32> = values.iter().zip(extra).map(|(v, e)| (v - e) as f32).collect();
    // What was infinite stays that: entries of a head that are never to be chosen.
    let is_kept = |(v, d): (&f64, &f32)| d.is_finite() || !v.is_finite();
    let finite = extra.iter().all(|e| e.is_finite()) && values.iter().zip(&difference).all(is_kept);
    let fits = values.len() == extra.len() && finite;
    fits.then(|| patch.constant(&format!("{name}.moved"), Tensor::of(shape, difference)))
}
