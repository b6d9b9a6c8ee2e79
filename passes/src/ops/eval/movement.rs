//! Operators that move, repeat or drop elements, on bytes of any element type.

use std::sync::Arc;

use bytes::Bytes;

use super::{EvalError, Inputs, Outcome, allowed, as_i64, optional, required};
use crate::ir::{Attr, Node};
use crate::ops::{positive_axis, shape::shape_range};
use crate::tensor::{DType, Tensor, count};

const BAD_AXIS: EvalError = EvalError::Invalid("an axis is out of range");
const BAD_SHAPE: EvalError = EvalError::Invalid("shapes do not fit together");

fn ints(tensor: &Tensor) -> Result<Vec<i64>, EvalError> {
    tensor.integers().ok_or(EvalError::Invalid("an integer tensor is expected"))
}

fn dims(values: &[i64]) -> Result<Vec<usize>, EvalError> {
    values.iter().map(|&n| usize::try_from(n).map_err(|_| EvalError::Invalid("a negative dimension"))).collect()
}

/// Bytes of one element, for types that fill whole bytes.
fn width(dtype: DType) -> Result<usize, EvalError> {
    match dtype.bits() {
        bits if bits >= 8 => Ok(bits as usize / 8),
        _ => Err(EvalError::NoRule),
    }
}

fn made(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Tensor, EvalError> {
    Tensor::new(dtype, shape, Bytes::from(bytes)).map_err(|_| BAD_SHAPE)
}

/// A tensor of `shape` whose element `i` is element `source(i)` of `tensor`.
fn pick(tensor: &Tensor, shape: Vec<usize>, source: impl Fn(&[usize]) -> usize) -> Result<Tensor, EvalError> {
    let width = width(tensor.dtype())?;
    let total = allowed(tensor.dtype(), &shape, tensor.bytes().len())?;
    let mut bytes = Vec::with_capacity(total * width);
    let mut index = vec![0; shape.len()];
    for _ in 0..total {
        let at = source(&index) * width;
        bytes.extend_from_slice(tensor.bytes().get(at..at + width).ok_or(BAD_SHAPE)?);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    made(tensor.dtype(), shape, bytes)
}

/// Row-major distances between neighbors on each axis.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

pub(super) fn shape(node: &Node, tensor: &Tensor) -> Result<Tensor, EvalError> {
    let range = shape_range(node, tensor.shape().len());
    let dims = tensor.shape()[range].iter().map(|&d| as_i64(d)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::of([dims.len()], dims))
}

pub(super) fn reshape(node: &Node, tensor: &Tensor, wanted: &Tensor) -> Result<Tensor, EvalError> {
    let zero_copies = node.int("allowzero", 0) == 0;
    let wanted = ints(wanted)?;
    let mut shape = Vec::with_capacity(wanted.len());
    let mut hole = None;
    for (axis, &dim) in wanted.iter().enumerate() {
        shape.push(match dim {
            0 if zero_copies => *tensor.shape().get(axis).ok_or(BAD_SHAPE)?,
            -1 if hole.replace(axis).is_none() => 1,
            n => usize::try_from(n).map_err(|_| BAD_SHAPE)?,
        });
    }
    if let Some(hole) = hole {
        let rest = count(&shape).filter(|&n| n > 0).ok_or(BAD_SHAPE)?;
        shape[hole] = tensor.len() / rest;
    }
    tensor.reshaped(shape).map_err(|_| BAD_SHAPE)
}

pub(super) fn flatten(node: &Node, tensor: &Tensor) -> Result<Tensor, EvalError> {
    let axis = node.int("axis", 1);
    let rank = tensor.shape().len();
    let axis = if axis == as_i64(rank)? { rank } else { positive_axis(axis, rank).ok_or(BAD_AXIS)? };
    let (outer, inner) = tensor.shape().split_at(axis);
    tensor.reshaped(vec![outer.iter().product(), inner.iter().product()]).map_err(|_| BAD_SHAPE)
}

pub(super) fn squeeze(tensor: &Tensor, axes: Option<&Arc<Tensor>>) -> Result<Tensor, EvalError> {
    let rank = tensor.shape().len();
    let gone: Vec<usize> = match axes {
        Some(axes) => {
            ints(axes)?.iter().map(|&axis| positive_axis(axis, rank).ok_or(BAD_AXIS)).collect::<Result<_, _>>()?
        }
        None => (0..rank).filter(|&axis| tensor.shape()[axis] == 1).collect(),
    };
    let kept = tensor.shape().iter().enumerate().filter(|(axis, _)| !gone.contains(axis)).map(|(_, &dim)| dim);
    tensor.reshaped(kept.collect()).map_err(|_| BAD_SHAPE)
}

pub(super) fn unsqueeze(tensor: &Tensor, axes: &Tensor) -> Result<Tensor, EvalError> {
    let axes = ints(axes)?;
    let rank = tensor.shape().len() + axes.len();
    let new: Vec<usize> =
        axes.iter().map(|&axis| positive_axis(axis, rank).ok_or(BAD_AXIS)).collect::<Result<_, _>>()?;
    let mut old = tensor.shape().iter();
    let shape: Option<Vec<usize>> =
        (0..rank).map(|axis| if new.contains(&axis) { Some(1) } else { old.next().copied() }).collect();
    tensor.reshaped(shape.ok_or(BAD_SHAPE)?).map_err(|_| BAD_SHAPE)
}

pub(super) fn transpose(node: &Node, tensor: &Tensor) -> Result<Tensor, EvalError> {
    let rank = tensor.shape().len();
    let perm: Vec<usize> = match node.ints("perm") {
        Some(perm) => perm.iter().map(|&axis| positive_axis(axis, rank).ok_or(BAD_AXIS)).collect::<Result<_, _>>()?,
        None => (0..rank).rev().collect(),
    };
    let mut seen = perm.clone();
    seen.sort_unstable();
    if !seen.into_iter().eq(0..rank) {
        return Err(BAD_AXIS);
    }
    let strides = strides(tensor.shape());
    let shape = perm.iter().map(|&axis| tensor.shape()[axis]).collect();
    pick(tensor, shape, |index| index.iter().zip(&perm).map(|(i, &axis)| i * strides[axis]).sum())
}

pub(super) fn concat(node: &Node, inputs: &Inputs<'_>) -> Result<Tensor, EvalError> {
    let parts: Vec<&Arc<Tensor>> = (0..inputs.len()).map(|i| required(inputs, i)).collect::<Result<_, _>>()?;
    let first = parts.first().ok_or(BAD_SHAPE)?;
    let width = width(first.dtype())?;
    let axis = positive_axis(node.int("axis", 0), first.shape().len()).ok_or(BAD_AXIS)?;
    let mut shape = first.shape().to_vec();
    shape[axis] = 0;
    for part in &parts {
        let agrees = part.dtype() == first.dtype()
            && part.shape().len() == shape.len()
            && (0..shape.len()).all(|a| a == axis || part.shape()[a] == shape[a]);
        if !agrees {
            return Err(BAD_SHAPE);
        }
        shape[axis] = shape[axis].checked_add(part.shape()[axis]).ok_or(BAD_SHAPE)?;
    }
    let source = parts.iter().map(|part| part.bytes().len()).sum();
    let total = allowed(first.dtype(), &shape, source)?;
    if total == 0 {
        return made(first.dtype(), shape, Vec::new());
    }
    let outer: usize = shape[..axis].iter().product();
    let inner: usize = shape[axis + 1..].iter().product::<usize>() * width;
    let mut bytes = Vec::with_capacity(total * width);
    for o in 0..outer {
        for part in &parts {
            let run = part.shape()[axis] * inner;
            bytes.extend_from_slice(&part.bytes()[o * run..(o + 1) * run]);
        }
    }
    made(first.dtype(), shape, bytes)
}

/// What a slice along one axis takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) start: i64,
    pub(crate) step: i64,
    pub(crate) count: usize,
}

/// ONNX's clamping of `start` and `end` on an axis of `extent`; `None` for step 0.
pub(crate) fn slice_bounds(extent: usize, start: i64, end: i64, step: i64) -> Option<Bounds> {
    let extent = i64::try_from(extent).ok()?;
    let wrap = |at: i64| if at < 0 { at.saturating_add(extent) } else { at };
    let (start, end) = (wrap(start), wrap(end));
    let (start, end) = match step {
        0 => return None,
        s if s > 0 => (start.clamp(0, extent), end.clamp(0, extent)),
        _ => (start.clamp(0, (extent - 1).max(0)), end.clamp(-1, (extent - 1).max(0))),
    };
    let distance = if step > 0 { end - start } else { start - end };
    let count = if distance <= 0 || extent == 0 { 0 } else { (distance - 1) / step.checked_abs()? + 1 };
    Some(Bounds { start, step, count: usize::try_from(count).ok()? })
}

pub(super) fn slice(inputs: &Inputs<'_>) -> Result<Tensor, EvalError> {
    let tensor = required(inputs, 0)?;
    let (starts, ends) = (ints(required(inputs, 1)?)?, ints(required(inputs, 2)?)?);
    let rank = tensor.shape().len();
    let axes: Vec<usize> = match optional(inputs, 3) {
        Some(axes) => {
            ints(axes)?.iter().map(|&axis| positive_axis(axis, rank).ok_or(BAD_AXIS)).collect::<Result<_, _>>()?
        }
        None => (0..starts.len()).collect(),
    };
    let steps = optional(inputs, 4).map_or_else(|| Ok(vec![1; starts.len()]), |steps| ints(steps))?;
    let mut bounds: Vec<Bounds> = tensor.shape().iter().map(|&dim| Bounds { start: 0, step: 1, count: dim }).collect();
    for (i, &axis) in axes.iter().enumerate() {
        let at = |list: &[i64]| list.get(i).copied().ok_or(BAD_SHAPE);
        let extent = *tensor.shape().get(axis).ok_or(BAD_AXIS)?;
        bounds[axis] = slice_bounds(extent, at(&starts)?, at(&ends)?, at(&steps)?).ok_or(BAD_SHAPE)?;
    }
    let strides = strides(tensor.shape());
    pick(tensor, bounds.iter().map(|b| b.count).collect(), |index| {
        let place = |axis: usize| {
            let b = bounds[axis];
            usize::try_from(b.start + b.step * i64::try_from(index[axis]).unwrap_or(0)).unwrap_or(usize::MAX >> 16)
        };
        (0..index.len()).map(|axis| place(axis) * strides[axis]).sum()
    })
}

pub(super) fn gather(node: &Node, tensor: &Tensor, indices: &Tensor) -> Result<Tensor, EvalError> {
    let axis = positive_axis(node.int("axis", 0), tensor.shape().len()).ok_or(BAD_AXIS)?;
    let extent = tensor.shape()[axis];
    let at: Vec<usize> = ints(indices)?
        .iter()
        .map(|&i| positive_axis(i, extent).ok_or(EvalError::Invalid("a gather index is out of range")))
        .collect::<Result<_, _>>()?;
    let n_index_axes = indices.shape().len();
    let index_strides = strides(indices.shape());
    let strides = strides(tensor.shape());
    let shape: Vec<usize> = [&tensor.shape()[..axis], indices.shape(), &tensor.shape()[axis + 1..]].concat();
    pick(tensor, shape, |index| {
        let which: usize = (0..n_index_axes).map(|a| index[axis + a] * index_strides[a]).sum();
        let before: usize = (0..axis).map(|a| index[a] * strides[a]).sum();
        let after: usize = (axis + 1..strides.len()).map(|a| index[a - 1 + n_index_axes] * strides[a]).sum();
        before + at[which] * strides[axis] + after
    })
}

/// The common shape of two, by `NumPy`'s rule.
pub(super) fn common_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, EvalError> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| match (at(a, axis), at(b, axis)) {
            (x, y) if x == y => Ok(x),
            (1, other) | (other, 1) => Ok(other),
            _ => Err(BAD_SHAPE),
        })
        .collect()
}

/// Where the element of a broadcast result at `index` lies in a tensor of `shape`.
pub(super) fn broadcast_source(shape: &[usize], strides: &[usize], index: &[usize]) -> usize {
    let skip = index.len() - shape.len();
    (0..shape.len()).map(|axis| if shape[axis] == 1 { 0 } else { index[axis + skip] * strides[axis] }).sum()
}

pub(super) fn expand(tensor: &Tensor, wanted: &Tensor) -> Result<Tensor, EvalError> {
    let shape = common_shape(tensor.shape(), &dims(&ints(wanted)?)?)?;
    let strides = strides(tensor.shape());
    pick(tensor, shape, |index| broadcast_source(tensor.shape(), &strides, index))
}

pub(super) fn tile(tensor: &Tensor, repeats: &Tensor) -> Result<Tensor, EvalError> {
    let repeats = dims(&ints(repeats)?)?;
    if repeats.len() != tensor.shape().len() {
        return Err(BAD_SHAPE);
    }
    let shape: Option<Vec<usize>> = tensor.shape().iter().zip(&repeats).map(|(d, r)| d.checked_mul(*r)).collect();
    let strides = strides(tensor.shape());
    pick(tensor, shape.ok_or(BAD_SHAPE)?, |index| {
        index.iter().zip(tensor.shape()).zip(&strides).map(|((i, d), s)| i % d * s).sum()
    })
}

pub(super) fn split(node: &Node, tensor: &Tensor, sizes: Option<&Arc<Tensor>>) -> Outcome {
    let axis = positive_axis(node.int("axis", 0), tensor.shape().len()).ok_or(BAD_AXIS)?;
    let extent = tensor.shape()[axis];
    let n_outputs = node.outputs.len();
    let sizes = if let Some(sizes) = sizes {
        dims(&ints(sizes)?)?
    } else {
        let chunk = extent.div_ceil(n_outputs.max(1));
        (0..n_outputs).map(|i| chunk.min(extent.saturating_sub(chunk * i))).collect()
    };
    if sizes.len() != n_outputs || sizes.iter().try_fold(0_usize, |n, &s| n.checked_add(s)) != Some(extent) {
        return Err(BAD_SHAPE);
    }
    let strides = strides(tensor.shape());
    let mut start = 0;
    sizes
        .iter()
        .map(|&size| {
            let mut shape = tensor.shape().to_vec();
            shape[axis] = size;
            let offset = start * strides[axis];
            start += size;
            pick(tensor, shape, |index| offset + index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>())
        })
        .collect()
}

pub(super) fn constant_of_shape(node: &Node, shape: &Tensor) -> Result<Tensor, EvalError> {
    let zero = Tensor::of([1], vec![0.0_f32]);
    let value = match node.attrs.get("value") {
        Some(Attr::Tensor(value)) if value.len() == 1 => value,
        Some(_) => return Err(EvalError::Invalid("`value` must have one element")),
        None => &zero,
    };
    let shape = dims(&ints(shape)?)?;
    let total = allowed(value.dtype(), &shape, 0)?;
    width(value.dtype())?;
    made(value.dtype(), shape, value.bytes().repeat(total))
}

pub(super) fn range(start: &Tensor, limit: &Tensor, delta: &Tensor) -> Result<Tensor, EvalError> {
    let one = |tensor: &Tensor| tensor.single_integer().ok_or(EvalError::NoRule);
    let (start, limit, delta) = (one(start)?, one(limit)?, (one(delta)?, delta.dtype()));
    let (delta, dtype) = delta;
    let distance = if delta > 0 { limit.checked_sub(start) } else { start.checked_sub(limit) };
    let step = delta.checked_abs().filter(|&d| d > 0).ok_or(EvalError::Invalid("a step of 0"))?;
    let distance = distance.ok_or(EvalError::TooLarge(usize::MAX))?.max(0);
    let n = usize::try_from((distance + (step - 1).min(i64::MAX - distance)) / step).map_err(|_| BAD_SHAPE)?;
    allowed(dtype, &[n], 0)?;
    let values = (0..n).scan(start, |next, _| {
        let value = *next;
        *next = next.wrapping_add(delta);
        Some(value)
    });
    super::arithmetic::from_ints(dtype, vec![n], values.collect())
}
