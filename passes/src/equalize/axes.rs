//! Constants and weights divided along an axis, and where an axis stands in front of a node that moves it.

use crate::id::ValueId;
use crate::ir::{Dim, Graph, Node};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// A tensor whose entries with index j on `axis` are multiplied by `factor(j)`.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
pub(super) fn scaled_weight(weight: &Tensor, axis: usize, factor: impl Fn(usize) -> f64) -> Option<Tensor> {
    let extent = *weight.shape().get(axis)?;
    let inner: usize = weight.shape()[axis + 1..].iter().product();
    let mut values = weight.floats()?.into_owned();
    for (index, value) in values.iter_mut().enumerate() {
        *value = (f64::from(*value) * factor(index / inner.max(1) % extent.max(1))) as f32;
    }
    Some(Tensor::of(weight.shape(), values))
}

/// `constant`, broadcast from the back to `rank` axes, with index j of `axis` there divided by `divisor[j]`; `None` where it is neither one
/// number nor one per index with nothing beside.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
pub(super) fn divided_row(constant: &Tensor, (rank, axis): (usize, usize), divisor: &[f64]) -> Option<Tensor> {
    let (shape, behind) = (constant.shape(), rank.checked_sub(axis + 1)?);
    (shape.len() <= rank && constant.dtype() == DType::F32).then_some(())?;
    let values = constant.floats()?;
    let at = shape.len().checked_sub(behind + 1).filter(|at| shape[*at] == divisor.len());
    let spread: Vec<f32> = match at {
        Some(_) if values.len() == divisor.len() => values.to_vec(),
        _ if values.len() == 1 => vec![values[0]; divisor.len()],
        _ => return None,
    };
    // The rank stays: leading extents of 1 may be what gives the result its own.
    let mut shape = vec![1; shape.len().max(behind + 1)];
    let at = shape.len() - behind - 1;
    shape[at] = divisor.len();
    Some(Tensor::of(shape, spread.iter().zip(divisor).map(|(v, d)| (f64::from(*v) / d) as f32).collect()))
}

/// The axis of what `node` moves or cuts anew that holds the indices of `axis` of `result`, which it returns.
pub(super) fn moved_from(graph: &Graph, node: &Node, result: ValueId, axis: usize) -> Option<usize> {
    match &*node.op.name {
        "Transpose" => match node.ints("perm") {
            Some(order) => usize::try_from(*order.get(axis)?).ok(),
            None => graph.value(result).ty.rank()?.checked_sub(axis + 1),
        },
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => reshaped_from(graph, node.input(0)?, result, axis),
        _ => None,
    }
}

/// The axis of `from` with the indices of `axis` of `to`, which has the same numbers in the same order.
fn reshaped_from(graph: &Graph, from: ValueId, to: ValueId, axis: usize) -> Option<usize> {
    let [old, new] = [from, to].map(|value| Some(&**graph.value(value).ty.tensor()?.shape.as_ref()?));
    let (old, new): (&[Dim], &[Dim]) = (old?, new?);
    new.get(axis)?.known()?;
    let count = |dims: &[Dim]| dims.iter().try_fold(1_usize, |n, dim| n.checked_mul(dim.known()?));
    let behind = count(&new[axis + 1..]);
    // Equal extents in front, named ones too; or as many numbers behind.
    let in_front = |at: usize| at == axis && old[..at] == new[..at] && !old[..at].contains(&Dim::Unknown);
    let alike =
        |at: &usize| old[*at] == new[axis] && (in_front(*at) || (behind.is_some() && count(&old[at + 1..]) == behind));
    (0..old.len()).find(alike)
}

/// The axis of `to` that holds the indices of `axis` of `from`, which has the same numbers in the same order, and the run of each: index i
/// there holds what index `i / run % extent` does here.
pub(super) fn merged_into(graph: &Graph, from: ValueId, to: ValueId, axis: usize) -> Option<(usize, usize)> {
    let [old, new] = [from, to].map(|value| Some(&**graph.value(value).ty.tensor()?.shape.as_ref()?));
    let (old, new): (&[Dim], &[Dim]) = (old?, new?);
    let count = |dims: &[Dim]| dims.iter().try_fold(1_usize, |n, dim| n.checked_mul(dim.known()?));
    let (extent, inner) = (old.get(axis)?.known().filter(|n| *n > 0)?, count(&old[axis + 1..])?);
    (0..new.len()).find_map(|at| {
        let behind = count(&new[at + 1..])?;
        let run = inner.checked_div(behind).filter(|run| *run > 0 && run * behind == inner)?;
        new[at].known()?.is_multiple_of(extent.checked_mul(run)?).then_some((at, run))
    })
}

/// The axis of input `input` of `node` that is broadcast from the back to `axis` of `rank`.
pub(super) fn aligned(graph: &Graph, node: &Node, input: usize, (rank, axis): (usize, usize)) -> Option<usize> {
    (graph.value(node.input(input)?).ty.rank()? + axis).checked_sub(rank)
}

/// The parts of `divisor` that the inputs of a concatenation along its axis hold.
pub(super) fn parts<'d>(graph: &Graph, node: &Node, axis: usize, divisor: &'d [f64]) -> Option<Vec<&'d [f64]>> {
    let (mut left, mut parts) = (divisor, Vec::new());
    for input in 0..node.inputs.len() {
        let shape = graph.value(node.input(input)?).ty.tensor()?.shape.as_ref()?;
        let (part, rest) = left.split_at_checked(shape.get(axis)?.known()?)?;
        parts.push(part);
        left = rest;
    }
    left.is_empty().then_some(parts)
}

/// Whether `node` joins along `axis` of `rank`.
pub(super) fn joins_along(node: &Node, axis: usize, rank: usize) -> bool {
    ops::positive_axis(node.int("axis", 0), rank) == Some(axis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_channel_are_found_where_axes_are_merged() {
        let at = |from: &str, to: &str, axis: usize| {
            let source = format!("graph (%a: f32[{from}], %b: f32[{to}]) -> (%a) {{\n}}");
            let model = crate::text::parse(&source).unwrap();
            let [a, b] = ["a", "b"].map(|name| model.graph().find(name).unwrap());
            merged_into(model.graph(), a, b, axis)
        };
        assert_eq!(at("2,16,2,2", "2,64", 1), Some((1, 4)));
        assert_eq!(at("N,16,2,2", "N,64", 1), Some((1, 4)));
        assert_eq!(at("4,8,16", "32,16", 2), Some((1, 1)));
        assert_eq!(at("N,2,2,16", "N,64", 3), Some((1, 1)), "channels that repeat");
        assert_eq!(at("2,16,H,W", "2,L", 1), None);
    }

    #[test]
    fn an_axis_is_found_where_numbers_keep_their_order() {
        let at = |from: &str, to: &str, axis: usize| {
            let source = format!("graph (%a: f32[{from}], %b: f32[{to}]) -> (%a) {{\n}}");
            let model = crate::text::parse(&source).unwrap();
            let [a, b] = ["a", "b"].map(|name| model.graph().find(name).unwrap());
            reshaped_from(model.graph(), a, b, axis)
        };
        assert_eq!(at("2,16,8,8", "2,16,64", 1), Some(1));
        assert_eq!(at("N,16,1,1", "N,16", 1), Some(1));
        assert_eq!(at("N,16,H,W", "N,16,L", 1), Some(1), "equal in front");
        assert_eq!(at("16,1,1", "1,16", 1), Some(0));
        assert_eq!(at("4,8,16", "32,16", 1), Some(2), "as many numbers behind");
        assert_eq!(at("2,16,2,2", "2,64", 1), None, "runs of one channel");
        assert_eq!(at("2,16,16,32", "2,512,16", 2), None, "the numbers are others");
        assert_eq!(at("2,4,16", "2,16,4", 1), None);
    }

    #[test]
    fn constants_are_divided_where_they_are_broadcast() {
        let d = [2.0, 4.0];
        let of =
            |shape: &[usize], values: &[f32], at| divided_row(&Tensor::of(shape.to_vec(), values.to_vec()), at, &d);
        let found = of(&[2, 1, 1], &[2.0, 4.0], (4, 1)).unwrap();
        assert_eq!((found.shape(), &*found.floats().unwrap()), (&[2, 1, 1][..], &[1.0, 1.0][..]));
        let found = of(&[1], &[8.0], (4, 1)).unwrap();
        assert_eq!((found.shape(), &*found.floats().unwrap()), (&[2, 1, 1][..], &[4.0, 2.0][..]));
        assert_eq!(of(&[1, 2], &[2.0, 4.0], (2, 1)).unwrap().shape(), [1, 2]);
        assert!(of(&[2, 2], &[1.0; 4], (2, 1)).is_none() && of(&[2], &[1.0; 2], (3, 1)).is_none());
        assert!(of(&[1, 1, 2], &[1.0; 2], (2, 1)).is_none(), "it would give the result another rank");
        let weight = Tensor::of([1, 2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        assert_eq!(&*scaled_weight(&weight, 1, |j| d[j]).unwrap().floats().unwrap(), [2.0, 4.0, 12.0, 16.0]);
    }
}
