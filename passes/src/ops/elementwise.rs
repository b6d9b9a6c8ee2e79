//! Shape rules of operators that work element by element.

use super::Call;
use crate::ir::{Attr, Dim, TensorType};
use crate::tensor::DType;

/// Output 0 has the type of input 0.
pub(super) fn same(call: &Call<'_>) -> Vec<TensorType> {
    vec![call.input(0)]
}

/// Output 0 has the shape of input 0 and the element type of the `dtype` attribute, or that of input 0.
pub(super) fn same_shape(call: &Call<'_>) -> Vec<TensorType> {
    let dtype = DType::from_code(call.node.int("dtype", -1)).or(call.dtype(0));
    vec![TensorType::new(dtype, call.shape(0))]
}

pub(super) fn dropout(call: &Call<'_>) -> Vec<TensorType> {
    vec![call.input(0), TensorType::new(Some(DType::Bool), call.shape(0))]
}

pub(super) fn cast(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(DType::from_code(call.node.int("to", -1)), call.shape(0))]
}

pub(super) fn cast_like(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(1), call.shape(0))]
}

pub(super) fn predicate(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(Some(DType::Bool), call.shape(0))]
}

/// All inputs broadcast together.
pub(super) fn broadcast(call: &Call<'_>) -> Vec<TensorType> {
    let dtype = call.inputs.iter().flatten().find_map(|input| input.dtype);
    vec![TensorType::new(dtype, broadcast_all(call, 0))]
}

/// As [`broadcast`], the element type always that of the first input.
pub(super) fn broadcast_first(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(0), broadcast_all(call, 0))]
}

pub(super) fn compare(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(Some(DType::Bool), broadcast_all(call, 0))]
}

/// `Where`: three shapes broadcast, the element type of the branches.
pub(super) fn select(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(1).or(call.dtype(2)), broadcast_all(call, 0))]
}

pub(super) fn quantize(call: &Call<'_>) -> Vec<TensorType> {
    let by_zero_point = if call.has(2) { call.dtype(2) } else { None };
    let by_attribute = DType::from_code(call.node.int("output_dtype", -1));
    let dtype = if call.has(2) { by_zero_point } else { by_attribute.or(Some(DType::U8)) };
    vec![TensorType::new(dtype, call.shape(0))]
}

pub(super) fn dequantize(call: &Call<'_>) -> Vec<TensorType> {
    let dtype = match call.node.attrs.get("output_dtype") {
        Some(Attr::Int(code)) if *code != 0 => DType::from_code(*code),
        _ => call.dtype(1),
    };
    vec![TensorType::new(dtype, call.shape(0))]
}

pub(super) fn dynamic_quantize(call: &Call<'_>) -> Vec<TensorType> {
    vec![
        TensorType::new(Some(DType::U8), call.shape(0)),
        TensorType::known(DType::F32, &[]),
        TensorType::known(DType::U8, &[]),
    ]
}

fn broadcast_all(call: &Call<'_>, from: usize) -> Option<Vec<Dim>> {
    let mut inputs = call.inputs[from..].iter().flatten();
    let first = inputs.next()?.shape.clone()?;
    inputs.try_fold(first, |shape, input| broadcast_shapes(&shape, input.shape.as_ref()?))
}

/// The common shape of two, by `NumPy`'s rule; `None` where they contradict each other.
pub(super) fn broadcast_shapes(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |shape: &[Dim], axis: usize| {
        (axis + shape.len()).checked_sub(rank).map_or(Dim::Known(1), |axis| shape[axis].clone())
    };
    (0..rank).map(|axis| broadcast_dims(&at(a, axis), &at(b, axis))).collect()
}

fn broadcast_dims(a: &Dim, b: &Dim) -> Option<Dim> {
    match (a, b) {
        (Dim::Known(1), other) | (other, Dim::Known(1)) => Some(other.clone()),
        (Dim::Known(x), Dim::Known(y)) => (x == y).then(|| a.clone()),
        // Either it equals the known one or it is 1: both give the known one.
        (Dim::Known(_), _) => Some(a.clone()),
        (_, Dim::Known(_)) => Some(b.clone()),
        (x, y) if x == y => Some(x.clone()),
        _ => Some(Dim::Unknown),
    }
}
