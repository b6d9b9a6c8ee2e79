//! What a number added to every channel of a tensor does to the linear nodes that read it.

use crate::id::NodeId;
use crate::ir::Graph;
use crate::ops;
use crate::tensor::DType;

/// The bias of the `Conv` or `Gemm` `id` per output channel, zeros where it has none; `None` where it is not f32, or not one number per
/// channel, or has a factor of its own.
pub(super) fn bias(graph: &Graph, id: NodeId) -> Option<Vec<f64>> {
    let node = graph.node(id).filter(|node| node.op.is("Conv") || node.op.is("Gemm"))?;
    let roles = ops::linear(graph, id).filter(|roles| roles.weight == 1)?;
    let one = |name: &str| (node.float(name, 1.0) - 1.0).abs() < f32::EPSILON;
    (one("alpha") && one("beta") && node.int("transA", 0) == 0).then_some(())?;
    let weight = graph.constant_input(node, 1).filter(|weight| weight.dtype() == DType::F32)?;
    let channels = *weight.shape().get(roles.out_axis)?;
    let Some(input) = roles.bias else { return Some(vec![0.0; channels]) };
    let bias = graph.constant_input(node, input.into()).filter(|bias| bias.dtype() == DType::F32)?;
    let values = bias.floats()?;
    let row = bias.shape().len() <= 1 || bias.shape().iter().rev().skip(1).all(|dim| *dim == 1);
    match values.len() {
        n if n == channels && row => Some(values.iter().map(|v| f64::from(*v)).collect()),
        1 if node.op.is("Gemm") => Some(vec![f64::from(values[0]); channels]),
        _ => None,
    }
}

/// What every output channel of the `Conv`, `Gemm` or `MatMul` `id` gets of `constant`, one number per input channel, where every tap of
/// the kernel reads the tensor: Σ W\[o, j, k\] c\[j\]. `None` where the channels are others.
pub(super) fn through(graph: &Graph, id: NodeId, constant: &[f64]) -> Option<Vec<f64>> {
    let node = graph.node(id)?;
    let roles = ops::linear(graph, id).filter(|roles| roles.weight == 1)?;
    let weight = graph.constant_input(node, 1).filter(|weight| weight.dtype() == DType::F32)?;
    let values = weight.floats()?;
    if node.op.is("Conv") {
        let [outputs, inputs, ..] = *weight.shape() else { return None };
        let taps: usize = weight.shape()[2..].iter().product();
        let groups = usize::try_from(node.int("group", 1)).ok().filter(|groups| *groups > 0)?;
        let fits = inputs.checked_mul(groups) == Some(constant.len()) && outputs.is_multiple_of(groups);
        (fits && taps > 0 && !constant.is_empty()).then_some(())?;
        let of_row = |(o, row): (usize, &[f32])| {
            let first = o / (outputs / groups) * inputs;
            let kernels = row.chunks(taps).zip(&constant[first..]);
            kernels.map(|(kernel, c)| c * kernel.iter().map(|w| f64::from(*w)).sum::<f64>()).sum()
        };
        return Some(values.chunks(inputs * taps).enumerate().map(of_row).collect());
    }
    let [rows, columns] = *weight.shape() else { return None };
    let (outputs, inputs) = if roles.out_axis == 0 { (rows, columns) } else { (columns, rows) };
    let at =
        |o: usize, j: usize| f64::from(values[if roles.out_axis == 0 { o * columns + j } else { j * columns + o }]);
    let of_output = |o: usize| (0..inputs).map(|j| at(o, j) * constant[j]).sum();
    let known = node.op.is("MatMul") || node.op.is("Gemm");
    (known && inputs == constant.len()).then(|| (0..outputs).map(of_output).collect())
}

/// Whether the convolution `id` reads nothing but its input: no border of zeros around it.
pub(super) fn is_unpadded(graph: &Graph, id: NodeId) -> bool {
    let Some(node) = graph.node(id) else { return false };
    match node.text("auto_pad", "NOTSET") {
        "NOTSET" => node.ints("pads").is_none_or(|pads| pads.iter().all(|pad| *pad == 0)),
        "VALID" => true,
        _ => false,
    }
}
