//! Between which channels the elements of a weight stand.

use std::borrow::Cow;

use super::axes::divided_row;
use crate::id::NodeId;
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// The layout of the weight of a linear node: kernels, each between an output and an input channel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taps {
    /// The first two extents.
    outer: usize,
    inner: usize,
    /// Elements of a kernel.
    kernel: usize,
    groups: usize,
    /// Whether output channels lie along the first axis.
    outputs_first: bool,
    /// Whether channels lie along the second axis of tensors, or the last.
    pub(super) spatial: bool,
}

impl Taps {
    /// Those of the linear node `id`, with a finite f32 weight that it alone reads, and a constant bias per output, if any.
    pub(super) fn of(graph: &Graph, users: &Users, id: NodeId) -> Option<Self> {
        let node = graph.node(id)?;
        let roles = ops::linear(graph, id).filter(|roles| roles.weight == 1)?;
        let weight = graph.constant_input(node, 1).filter(|weight| weight.dtype() == DType::F32)?;
        users.only_input(node.input(1)?)?;
        let [outer, inner, rest @ ..] = weight.shape() else { return None };
        let spatial = node.op.is("Conv") || node.op.is("ConvTranspose");
        let groups = if spatial { usize::try_from(node.int("group", 1)).ok()? } else { 1 };
        let plain = spatial || (rest.is_empty() && node.int("transA", 0) == 0);
        let sound = groups > 0 && !weight.is_empty() && outer.is_multiple_of(groups);
        (plain && sound && weight.floats()?.iter().all(|w| w.is_finite())).then_some(())?;
        let (outer, inner, kernel) = (*outer, *inner, rest.iter().product());
        let taps = Self { outer, inner, kernel, groups, outputs_first: roles.out_axis == 0, spatial };
        let bias = || divided_bias(graph, node, &vec![1.0; taps.outputs()]);
        let sound = node.input(2).is_none() || bias().is_some_and(|bias| is_finite(&bias));
        sound.then_some(taps)
    }

    /// Output channels.
    pub(super) fn outputs(&self) -> usize {
        if self.outputs_first { self.outer } else { self.inner * self.groups }
    }

    /// Input channels.
    pub(super) fn inputs(&self) -> usize {
        if self.outputs_first { self.inner * self.groups } else { self.outer }
    }

    /// The output and the input channel of the element at `index`.
    pub(super) fn at(&self, index: usize) -> (usize, usize) {
        let (outer, inner) = (index / (self.inner * self.kernel), index / self.kernel % self.inner);
        let other = outer / (self.outer / self.groups) * self.inner + inner;
        if self.outputs_first { (outer, other) } else { (other, outer) }
    }

    /// The kernels of one channel, an output or an input, each with its channel on the other side.
    pub(super) fn line(&self, of_outputs: bool, channel: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (inner, per_group, outer) = (self.inner, self.outer / self.groups, of_outputs == self.outputs_first);
        let group = channel / inner * per_group;
        let run = if outer { 0..inner } else { group..group + per_group };
        run.map(move |k| {
            if outer {
                (channel * inner + k, channel / per_group * inner + k)
            } else {
                (k * inner + channel % inner, k)
            }
        })
    }

    /// The weight of every kernel that is largest, its sign left out where a kernel has several.
    pub(super) fn tops<'a>(&self, weight: &'a Tensor) -> Option<Cow<'a, [f32]>> {
        let values = weight.floats()?;
        if self.kernel <= 1 {
            return Some(values);
        }
        let top = |kernel: &[f32]| kernel.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
        Some(values.chunks(self.kernel).map(top).collect())
    }
}

/// Whether all that `tensor` holds are numbers.
pub(super) fn is_finite(tensor: &Tensor) -> bool {
    tensor.floats().is_some_and(|values| values.iter().all(|v| v.is_finite()))
}

/// The bias of `node`, with that of output o divided by `divisor[o]`.
pub(super) fn divided_bias(graph: &Graph, node: &Node, divisor: &[f64]) -> Option<Tensor> {
    let place = if node.op.is("Gemm") { (2, 1) } else { (1, 0) };
    divided_row(graph.constant_input(node, 2)?, place, divisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever groups and orders there are, lines of outputs hold every kernel once, as lines of inputs do, and say of it what `at` says.
    #[test]
    fn every_kernel_is_in_one_line_of_either_side() {
        for (outer, inner) in [(8, 3), (4, 4), (4, 1)] {
            for groups in [1, 2, 4] {
                for outputs_first in [true, false] {
                    let taps = Taps { outer, inner, kernel: 5, groups, outputs_first, spatial: true };
                    for of_outputs in [true, false] {
                        let channels = if of_outputs { taps.outputs() } else { taps.inputs() };
                        let mut seen = vec![0; outer * inner];
                        for channel in 0..channels {
                            for (kernel, other) in taps.line(of_outputs, channel) {
                                seen[kernel] += 1;
                                let (o, j) = taps.at(kernel * 5 + 2);
                                assert_eq!(if of_outputs { (o, j) } else { (j, o) }, (channel, other), "{taps:?}");
                            }
                        }
                        assert!(seen.iter().all(|n| *n == 1), "{taps:?} {of_outputs}: {seen:?}");
                    }
                }
            }
        }
    }
}
