//! Shared by the affine folds: a linear node's weight and bias under a per-channel scale and shift of its output.

use crate::id::NodeId;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::ops::{self, Linear};
use crate::tensor::{DType, Tensor};

/// A linear node whose output is about to be scaled and shifted: y' = scale\[c\] · y + shift\[c\].
pub(super) struct Scaled<'a> {
    graph: &'a Graph,
    node: &'a Node,
    roles: Linear,
    /// Output channels, those of all groups.
    pub(super) channels: usize,
}

impl<'a> Scaled<'a> {
    /// The node `id`, when it is linear with an f32 weight (and bias) on the right, one channel axis and no factors of its own; and not in
    /// codes already, which would become others.
    pub(super) fn of(model: &'a Model, id: NodeId) -> Option<Self> {
        let graph = model.graph();
        let node = graph.node(id)?;
        let roles = ops::linear(graph, id)?;
        if model.plan().encodes_any_of(graph, id) {
            return None;
        }
        let weight = graph.constant_input(node, roles.weight.into())?;
        let f32_weight = weight.dtype() == DType::F32;
        let plain_bias = match roles.bias {
            Some(bias) => graph.constant_input(node, bias.into()).is_some_and(|b| b.dtype() == DType::F32),
            None => true,
        };
        let channels = *weight.shape().get(roles.out_axis)?;
        let groups = usize::try_from(node.int("group", 1)).ok()?;
        let channels = match &*node.op.name {
            // The weight holds the output channels of one group; each group has its own rows.
            "ConvTranspose" if groups > 1 => return None,
            _ => channels,
        };
        let one = |name: &str| (node.float(name, 1.0) - 1.0).abs() < f32::EPSILON;
        let plain = roles.weight == 1 && (!node.op.is("Gemm") || (one("alpha") && one("beta")));
        (f32_weight && plain_bias && plain).then_some(Self { graph, node, roles, channels })
    }

    /// The axis of the output that runs over channels, for an output of rank `rank`.
    pub(super) fn channel_axis(&self, rank: usize) -> usize {
        match &*self.node.op.name {
            "Conv" | "ConvTranspose" => 1,
            _ => rank.saturating_sub(1),
        }
    }

    /// The rank of the output, where the operator fixes it.
    pub(super) fn fixed_rank(&self) -> Option<usize> {
        match &*self.node.op.name {
            "Conv" | "ConvTranspose" => {
                self.graph.constant_input(self.node, self.roles.weight.into()).map(|w| w.shape().len())
            }
            "Gemm" => Some(2),
            _ => self.graph.value(self.node.output(0)?).ty.rank(),
        }
    }

    /// Whether a shift can be folded: `MatMul` has no bias.
    pub(super) fn takes_bias(&self) -> bool {
        !self.node.op.is("MatMul")
    }

    /// The node with weight and bias changed; constants are added to `patch`. `None` when the bias has a shape that cannot
    /// be scaled per channel, or when a factor is extreme enough to ruin the weights (|scale| > 1e6).
    ///
    /// Computed in f64 and rounded once.
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once, as promised")]
    pub(super) fn fold(&self, scale: &[f64], shift: &[f64], suffix: &str, patch: &mut Patch) -> Option<Node> {
        if scale.iter().any(|s| !s.is_finite() || s.abs() > 1e6) {
            return None;
        }
        let (graph, node) = (self.graph, self.node);
        let weight_id = node.input(self.roles.weight.into())?;
        let weight = graph.constant(weight_id)?;
        let inner: usize = weight.shape()[self.roles.out_axis + 1..].iter().product();
        let mut values = weight.floats()?.into_owned();
        for (index, run) in values.chunks_mut(inner.max(1)).enumerate() {
            let factor = scale[index % self.channels];
            run.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
        }
        let name = format!("{}.{suffix}", graph.value(weight_id).name);
        let mut folded = node.clone();
        folded.inputs[usize::from(self.roles.weight)] = Some(patch.constant(&name, Tensor::of(weight.shape(), values)));
        let moves = shift.iter().any(|&s| s != 0.0);
        if self.roles.bias.is_some() || moves {
            if !self.takes_bias() {
                return None;
            }
            let bias = self.bias()?;
            let bias: Vec<f32> =
                bias.iter().zip(scale).zip(shift).map(|((b, s), t)| (f64::from(*b) * s + t) as f32).collect();
            let name =
                node.input(2).map_or_else(|| format!("{name}.bias"), |b| format!("{}.{suffix}", graph.value(b).name));
            folded.inputs.resize(3, None);
            folded.inputs[2] = Some(patch.constant(&name, Tensor::of([self.channels], bias)));
        }
        Some(folded)
    }

    /// The bias per channel, zeros where there is none; `None` for a Gemm bias that is not one row.
    fn bias(&self) -> Option<Vec<f32>> {
        let Some(index) = self.roles.bias else { return Some(vec![0.0; self.channels]) };
        let bias = self.graph.constant_input(self.node, index.into())?;
        let values = bias.floats()?;
        match values.len() {
            n if n == self.channels && bias.shape().last() == Some(&n) => Some(values.into_owned()),
            1 => Some(vec![values[0]; self.channels]),
            _ => None,
        }
    }
}
