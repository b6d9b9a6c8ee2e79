//! Sums of products: which input is the weight, which of its axes is which, and where the bias is.

use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::tensor::Tensor;

/// The roles of the inputs of a linear node with a constant weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// The input that carries the activation.
    pub activation: u16,
    /// The input that carries the weight, a constant.
    pub weight: u16,
    /// The axis of the weight that runs over output channels; for a grouped `ConvTranspose`, within one group.
    pub out_axis: usize,
    /// The input that carries the bias, where the operator has one and it is there.
    pub bias: Option<u16>,
}

/// The roles of the inputs of `node`, when it is Conv, `ConvTranspose`, `MatMul` or Gemm and one operand is constant.
pub fn linear(graph: &Graph, node: NodeId) -> Option<Linear> {
    let node = graph.node(node)?;
    if !node.op.domain.is_empty() {
        return None;
    }
    let constant = |input: u16| graph.constant_input(node, input.into());
    let bias = node.input(2).is_some().then_some(2);
    let right = |out_axis, bias| Some(Linear { activation: 0, weight: 1, out_axis, bias });
    match &*node.op.name {
        "Conv" if constant(1)?.shape().len() >= 3 => right(0, bias),
        "ConvTranspose" if constant(1)?.shape().len() >= 3 => right(1, bias),
        "Gemm" if constant(1).is_some_and(|w| w.shape().len() == 2) => {
            right(usize::from(!transposed(node, "transB")), bias)
        }
        "Gemm" if constant(0).is_some_and(|w| w.shape().len() == 2) => {
            Some(Linear { activation: 1, weight: 0, out_axis: usize::from(transposed(node, "transA")), bias })
        }
        "MatMul" => match (constant(0).map(|w| w.shape().len()), constant(1).map(|w| w.shape().len())) {
            (None, Some(rank)) if rank >= 2 => right(rank - 1, None),
            (Some(rank), None) if rank >= 2 => {
                Some(Linear { activation: 1, weight: 0, out_axis: rank - 2, bias: None })
            }
            _ => None,
        },
        _ => None,
    }
}

/// The one addition that reads `value`, and its other input.
pub fn only_addition(graph: &Graph, users: &Users, value: ValueId) -> Option<(NodeId, u16)> {
    match users.of_value(value) {
        [User::Input { node, input }] if graph.node(*node)?.op.is("Add") => Some((*node, 1 - input.min(&1))),
        _ => None,
    }
}

/// Where the bias of the linear node `id` is read: in the node itself, or in an addition of a constant row that alone reads its
/// result.
pub fn bias_site(graph: &Graph, users: &Users, id: NodeId) -> Option<Site> {
    let roles = linear(graph, id)?;
    let node = graph.node(id)?;
    let channels = graph.constant_input(node, roles.weight.into())?.shape()[roles.out_axis];
    let is_row = |tensor: &Tensor| tensor.len() == channels && tensor.shape().last() == Some(&channels);
    if let Some(input) = roles.bias {
        return is_row(graph.constant_input(node, input.into())?).then_some(Site::Use { node: id, input });
    }
    if !node.op.is("MatMul") {
        return None;
    }
    let (add, input) = only_addition(graph, users, node.output(0)?)?;
    is_row(graph.constant_input(graph.node(add)?, input.into())?).then_some(Site::Use { node: add, input })
}

fn transposed(node: &Node, attribute: &str) -> bool {
    node.int(attribute, 0) != 0
}
