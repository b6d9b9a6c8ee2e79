//! Products of which some inputs are multiplied apart, in float (`keep-columns`).

use super::{linear, positive_axis};
use crate::id::NodeId;
use crate::ir::Graph;
use crate::tensor::Tensor;

/// Inputs of a product that beside it a float product adds: Y = X W + Gather(X, rows) S, W being 0 at `rows`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptRows {
    /// Which inputs, ascending.
    pub rows: Vec<usize>,
    /// The product beside it, whose input 1 is S \[rows, N\].
    pub side: NodeId,
}

/// The inputs of product `id` that a product beside it keeps in float (see `keep-columns`), behind a constant bias where there is one.
pub fn kept_rows(graph: &Graph, id: NodeId) -> Option<KeptRows> {
    let roles = linear(graph, id).filter(|roles| roles.weight == 1)?;
    let node = graph.node(id)?;
    let weight = graph.constant_input(node, 1).filter(|weight| weight.shape().len() == 2)?;
    let zeros = zeros(weight, 1 - roles.out_axis)?;
    let x = node.input(0)?;
    let mut value = node.output(0)?;
    for _ in 0..2 {
        let (_, add) = graph.nodes().find(|(_, n)| n.op.is("Add") && n.inputs.contains(&Some(value)))?;
        let other = add.inputs.iter().flatten().copied().find(|input| *input != value)?;
        if graph.constant(other).is_some() {
            value = add.output(0)?;
            continue;
        }
        let (side, product) = graph.producer(other).filter(|(_, n)| n.op.is("MatMul"))?;
        let (_, gather) = graph.producer(product.input(0)?).filter(|(_, n)| n.op.is("Gather"))?;
        let rank = graph.value(x).ty.rank()?;
        let is_last = positive_axis(gather.int("axis", 0), rank)? + 1 == rank;
        (gather.input(0)? == x && is_last).then_some(())?;
        let rows = graph.constant_input(gather, 1)?.integers()?;
        let rows: Vec<usize> = rows.into_iter().map(|row| usize::try_from(row).ok()).collect::<Option<_>>()?;
        let all_zero = rows.iter().all(|row| zeros.binary_search(row).is_ok()) && rows.is_sorted_by(|a, b| a < b);
        let matches = matches!(*graph.constant_input(product, 1)?.shape(), [n, _] if n == rows.len());
        return (matches && all_zero && !rows.is_empty()).then_some(KeptRows { rows, side });
    }
    None
}

/// The places along `axis` of the matrix `weight` where all of it is 0, ascending; `None` where there is none.
fn zeros(weight: &Tensor, axis: usize) -> Option<Vec<usize>> {
    let [rows, columns] = *weight.shape() else { return None };
    let values = weight.floats()?;
    let at =
        |place: usize, other: usize| values[if axis == 0 { place * columns + other } else { other * columns + place }];
    let (places, others) = if axis == 0 { (rows, columns) } else { (columns, rows) };
    let found: Vec<usize> = (0..places).filter(|place| (0..others).all(|other| at(*place, other) == 0.0)).collect();
    (!found.is_empty()).then_some(found)
}
