//! Shape rules of reductions.

use super::{Call, positive_axis};
use crate::ir::{Dim, TensorType};
use crate::tensor::DType;

fn reduced(shape: &[Dim], axes: &[usize], keep: bool) -> Vec<Dim> {
    shape
        .iter()
        .enumerate()
        .filter_map(|(axis, dim)| match (axes.contains(&axis), keep) {
            (false, _) => Some(dim.clone()),
            (true, true) => Some(Dim::Known(1)),
            (true, false) => None,
        })
        .collect()
}

/// `ReduceSum` and its family: axes as input 1, all of them where it is left out (unless told to do nothing then).
pub(super) fn reduce(call: &Call<'_>) -> Vec<TensorType> {
    let keep = call.node.int("keepdims", 1) != 0;
    let shape = call.shape(0).and_then(|shape| {
        if call.has(1) && call.constant(1).is_none() {
            return keep.then(|| vec![Dim::Unknown; shape.len()]);
        }
        let axes = call.constant_ints(1).unwrap_or_default();
        if axes.is_empty() && call.node.int("noop_with_empty_axes", 0) != 0 {
            return Some(shape);
        }
        let axes: Vec<usize> = if axes.is_empty() {
            (0..shape.len()).collect()
        } else {
            axes.iter().map(|&axis| positive_axis(axis, shape.len())).collect::<Option<_>>()?
        };
        Some(reduced(&shape, &axes, keep))
    });
    vec![TensorType::new(call.dtype(0), shape)]
}

pub(super) fn arg(call: &Call<'_>) -> Vec<TensorType> {
    let keep = call.node.int("keepdims", 1) != 0;
    let shape = call.shape(0).and_then(|shape| {
        let axis = positive_axis(call.node.int("axis", 0), shape.len())?;
        Some(reduced(&shape, &[axis], keep))
    });
    vec![TensorType::new(Some(DType::I64), shape)]
}

pub(super) fn top_k(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|mut shape| {
        let axis = positive_axis(call.node.int("axis", -1), shape.len())?;
        let count = call.constant_ints(1).and_then(|k| usize::try_from(*k.first()?).ok());
        shape[axis] = count.map_or(Dim::Unknown, Dim::Known);
        Some(shape)
    });
    vec![TensorType::new(call.dtype(0), shape.clone()), TensorType::new(Some(DType::I64), shape)]
}
