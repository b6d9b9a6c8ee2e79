//! Shape rules of matrix products.

use super::{Call, elementwise::broadcast_shapes};
use crate::ir::{Dim, TensorType};
use crate::tensor::DType;

/// `NumPy`'s `matmul`, rank-1 operands included.
pub(super) fn matmul(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(0).or(call.dtype(1)), product_shape(call))]
}

pub(super) fn matmul_integer(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(Some(DType::I32), product_shape(call))]
}

fn product_shape(call: &Call<'_>) -> Option<Vec<Dim>> {
    let (a, b) = (call.shape(0)?, call.shape(1)?);
    let (batch_a, rows) = match a.len() {
        0 => return None,
        1 => (&a[..0], None),
        n => (&a[..n - 2], Some(a[n - 2].clone())),
    };
    let (batch_b, columns) = match b.len() {
        0 => return None,
        1 => (&b[..0], None),
        n => (&b[..n - 2], Some(b[n - 1].clone())),
    };
    let mut shape = broadcast_shapes(batch_a, batch_b)?;
    shape.extend(rows);
    shape.extend(columns);
    Some(shape)
}

pub(super) fn gemm(call: &Call<'_>) -> Vec<TensorType> {
    let pick = |input: usize, transposed: bool, axis: usize| {
        let shape = call.shape(input).filter(|shape| shape.len() == 2)?;
        Some(shape[if transposed { 1 - axis } else { axis }].clone())
    };
    let rows = pick(0, call.node.int("transA", 0) != 0, 0).unwrap_or(Dim::Unknown);
    let columns = pick(1, call.node.int("transB", 0) != 0, 1).unwrap_or(Dim::Unknown);
    vec![TensorType::new(call.dtype(0).or(call.dtype(1)), Some(vec![rows, columns]))]
}
