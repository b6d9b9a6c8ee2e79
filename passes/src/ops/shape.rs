//! Shape rules of operators that read or make shapes.

use super::{Call, positive_axis};
use crate::ir::{Attr, Dim, TensorType};
use crate::tensor::DType;

/// Nothing follows.
pub(super) fn nothing(_: &Call<'_>) -> Vec<TensorType> {
    Vec::new()
}

pub(super) fn shape(call: &Call<'_>) -> Vec<TensorType> {
    let length = call.shape(0).map(|shape| shape_range(call.node, shape.len()).len());
    vec![TensorType::new(Some(DType::I64), Some(vec![length.map_or(Dim::Unknown, Dim::Known)]))]
}

/// The dimensions that a `Shape` node reports of a tensor of rank `rank`.
pub(crate) fn shape_range(node: &crate::ir::Node, rank: usize) -> std::ops::Range<usize> {
    let clamp = |at: i64| {
        let rank = i64::try_from(rank).unwrap_or(i64::MAX);
        let at = if at < 0 { at.saturating_add(rank) } else { at };
        usize::try_from(at.clamp(0, rank)).unwrap_or(0)
    };
    let start = clamp(node.int("start", 0));
    let end = if node.attrs.contains_key("end") { clamp(node.int("end", 0)) } else { rank };
    start..end.max(start)
}

pub(super) fn size(_: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::known(DType::I64, &[])]
}

pub(super) fn constant_of_shape(call: &Call<'_>) -> Vec<TensorType> {
    let dtype = match call.node.attrs.get("value") {
        Some(Attr::Tensor(value)) => value.dtype(),
        _ => DType::F32,
    };
    let shape = match call.constant_ints(0) {
        Some(dims) => Some(dims.iter().map(|&n| usize::try_from(n).map_or(Dim::Unknown, Dim::Known)).collect()),
        None => match call.shape(0).as_deref() {
            Some([Dim::Known(rank)]) if *rank <= super::MAX_RANK => Some(vec![Dim::Unknown; *rank]),
            _ => None,
        },
    };
    vec![TensorType::new(Some(dtype), shape)]
}

pub(super) fn range(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(0).or(call.dtype(1)), Some(vec![Dim::Unknown]))]
}

pub(super) fn one_hot(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|mut shape| {
        let axis = positive_axis(call.node.int("axis", -1), shape.len() + 1)?;
        let depth = call
            .constant(1)
            .and_then(super::super::tensor::Tensor::single_integer)
            .and_then(|n| usize::try_from(n).ok());
        shape.insert(axis, depth.map_or(Dim::Unknown, Dim::Known));
        Some(shape)
    });
    vec![TensorType::new(call.dtype(2), shape)]
}

pub(super) fn non_zero(call: &Call<'_>) -> Vec<TensorType> {
    let rank = call.shape(0).map_or(Dim::Unknown, |shape| Dim::Known(shape.len()));
    vec![TensorType::new(Some(DType::I64), Some(vec![rank, Dim::Unknown]))]
}
