//! Arithmetic on constants: f32 by IEEE rules, integers with wrap-around, comparisons and booleans.

use std::sync::Arc;

use bytes::Bytes;

use super::movement::{broadcast_source, common_shape, strides};
use super::{EvalError, allowed};
use crate::ir::Node;
use crate::ops::positive_axis;
use crate::tensor::{DType, Tensor};

/// The values of a tensor as one of the two number systems that shape computations use.
enum Numbers {
    Float(Vec<f32>),
    Int(Vec<i64>),
}

fn numbers(tensor: &Tensor) -> Result<Numbers, EvalError> {
    match tensor.dtype() {
        DType::F32 => Ok(Numbers::Float(tensor.floats().ok_or(EvalError::NoRule)?.into_owned())),
        // f16, bf16 and f64 would need their own rounding.
        _ => tensor.integers().map(Numbers::Int).ok_or(EvalError::NoRule),
    }
}

/// Packs `values` as `dtype`, dropping bits that do not fit, as integer casts do.
pub(super) fn from_ints(dtype: DType, shape: Vec<usize>, values: Vec<i64>) -> Result<Tensor, EvalError> {
    if dtype == DType::I64 {
        return Ok(Tensor::of(shape, values));
    }
    let width = match dtype {
        DType::Bool => return made(dtype, shape, values.iter().map(|&v| u8::from(v != 0)).collect()),
        dtype if dtype.is_integer() => dtype.bits() as usize / 8,
        _ => return Err(EvalError::NoRule),
    };
    made(dtype, shape, values.iter().flat_map(|v| v.to_le_bytes().into_iter().take(width)).collect())
}

fn made(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Tensor, EvalError> {
    Tensor::new(dtype, shape, Bytes::from(bytes)).map_err(|_| EvalError::Invalid("shapes do not fit together"))
}

#[expect(clippy::cast_possible_truncation, reason = "ONNX casts floats to integers by truncation")]
pub(super) fn cast(node: &Node, tensor: &Tensor) -> Result<Tensor, EvalError> {
    let to = DType::from_code(node.int("to", -1)).ok_or(EvalError::Invalid("an unknown element type"))?;
    if to == tensor.dtype() {
        return Ok(tensor.clone());
    }
    let shape = tensor.shape().to_vec();
    allowed(to, &shape, tensor.bytes().len())?;
    match (numbers(tensor)?, to) {
        (Numbers::Int(values), DType::F32) => Ok(Tensor::of(shape, values.iter().map(|&v| v as f32).collect())),
        (Numbers::Int(values), to) => from_ints(to, shape, values),
        (Numbers::Float(values), DType::Bool) => made(to, shape, values.iter().map(|&v| u8::from(v != 0.0)).collect()),
        // Out of range, runtimes differ: only what every one agrees on is folded.
        (Numbers::Float(values), DType::I64 | DType::I32) if values.iter().all(|v| v.abs() < 2_147_483_000.0) => {
            from_ints(to, shape, values.iter().map(|&v| v as i64).collect())
        }
        _ => Err(EvalError::NoRule),
    }
}

pub(super) fn unary(name: &str, tensor: &Tensor) -> Result<Tensor, EvalError> {
    let shape = tensor.shape().to_vec();
    match numbers(tensor)? {
        Numbers::Float(mut values) => {
            let f: fn(f32) -> f32 = match name {
                "Neg" => |v| -v,
                "Abs" => f32::abs,
                "Sqrt" => f32::sqrt,
                "Reciprocal" => |v| 1.0 / v,
                "Floor" => f32::floor,
                "Ceil" => f32::ceil,
                _ => return Err(EvalError::NoRule),
            };
            values.iter_mut().for_each(|v| *v = f(*v));
            Ok(Tensor::of(shape, values))
        }
        Numbers::Int(values) => {
            let f: fn(i64) -> i64 = match (name, tensor.dtype()) {
                ("Not", DType::Bool) => |v| 1 - v,
                ("Neg", _) => i64::wrapping_neg,
                ("Abs", _) => i64::wrapping_abs,
                _ => return Err(EvalError::NoRule),
            };
            from_ints(tensor.dtype(), shape, values.into_iter().map(f).collect())
        }
    }
}

/// Calls `f(index in a, index in b)` for every element of the broadcast result.
fn broadcast<T>(
    a: &Tensor,
    b: &Tensor,
    dtype: DType,
    mut f: impl FnMut(usize, usize) -> T,
) -> Result<(Vec<usize>, Vec<T>), EvalError> {
    let shape = common_shape(a.shape(), b.shape())?;
    let total = allowed(dtype, &shape, a.bytes().len() + b.bytes().len())?;
    let (sa, sb) = (strides(a.shape()), strides(b.shape()));
    let mut index = vec![0; shape.len()];
    let mut values = Vec::with_capacity(total);
    for _ in 0..total {
        values.push(f(broadcast_source(a.shape(), &sa, &index), broadcast_source(b.shape(), &sb, &index)));
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Ok((shape, values))
}

pub(super) fn binary(name: &str, a: &Tensor, b: &Tensor) -> Result<Tensor, EvalError> {
    if a.dtype() != b.dtype() {
        return Err(EvalError::Invalid("operands of two element types"));
    }
    match (numbers(a)?, numbers(b)?) {
        (Numbers::Float(x), Numbers::Float(y)) => {
            if let Some(f) = comparison::<f32>(name) {
                let (shape, bytes) = broadcast(a, b, DType::Bool, |i, j| u8::from(f(&x[i], &y[j])))?;
                return made(DType::Bool, shape, bytes);
            }
            let f: fn(f32, f32) -> f32 = match name {
                "Add" => |x, y| x + y,
                "Sub" => |x, y| x - y,
                "Mul" => |x, y| x * y,
                "Div" => |x, y| x / y,
                _ => return Err(EvalError::NoRule),
            };
            let (shape, values) = broadcast(a, b, DType::F32, |i, j| f(x[i], y[j]))?;
            Ok(Tensor::of(shape, values))
        }
        (Numbers::Int(x), Numbers::Int(y)) => {
            if let Some(f) = comparison::<i64>(name) {
                let (shape, bytes) = broadcast(a, b, DType::Bool, |i, j| u8::from(f(&x[i], &y[j])))?;
                return made(DType::Bool, shape, bytes);
            }
            let f: fn(i64, i64) -> i64 = match name {
                "Add" => i64::wrapping_add,
                "Sub" => i64::wrapping_sub,
                "Mul" => i64::wrapping_mul,
                "Div" if y.contains(&0) => return Err(EvalError::Invalid("a division by 0")),
                "Div" => i64::wrapping_div,
                "Min" => i64::min,
                "Max" => i64::max,
                "And" => |x, y| x & y,
                "Or" => |x, y| x | y,
                _ => return Err(EvalError::NoRule),
            };
            let (shape, values) = broadcast(a, b, DType::I64, |i, j| f(x[i], y[j]))?;
            from_ints(a.dtype(), shape, values)
        }
        _ => Err(EvalError::NoRule),
    }
}

fn comparison<T: PartialOrd>(name: &str) -> Option<fn(&T, &T) -> bool> {
    Some(match name {
        "Equal" => T::eq,
        "Less" => T::lt,
        "LessOrEqual" => T::le,
        "Greater" => T::gt,
        "GreaterOrEqual" => T::ge,
        _ => return None,
    })
}

/// Elements of the largest `Where` that is folded.
const MAX_SELECTED: usize = 1 << 16;

pub(super) fn select(condition: &Tensor, yes: &Tensor, no: &Tensor) -> Result<Tensor, EvalError> {
    if yes.dtype() != no.dtype() || yes.dtype().bits() < 8 {
        return Err(EvalError::NoRule);
    }
    // It works through lists of places: fine for shapes, too dear for weights.
    if yes.len().max(no.len()).max(condition.len()) > MAX_SELECTED {
        return Err(EvalError::NoRule);
    }
    let chosen = condition.integers().ok_or(EvalError::NoRule)?;
    let width = yes.dtype().bits() as usize / 8;
    let (branches, pairs) = broadcast(yes, no, yes.dtype(), |i, j| (i, j))?;
    let branches_len = pairs.len();
    let all = Tensor::of(branches, vec![0_u8; pairs.len()]);
    if branches_len > MAX_SELECTED {
        return Err(EvalError::NoRule);
    }
    let (shape, bytes) = broadcast(condition, &all, yes.dtype(), |c, at| {
        let (i, j) = pairs[at];
        let (source, at) = if chosen[c] != 0 { (yes, i) } else { (no, j) };
        source.bytes().slice(at * width..(at + 1) * width)
    })?;
    made(yes.dtype(), shape, bytes.concat())
}

/// `ReduceProd` of integers over all axes or the ones given, as shape computations use it.
pub(super) fn reduce_prod(node: &Node, tensor: &Tensor, axes: Option<&Arc<Tensor>>) -> Result<Tensor, EvalError> {
    let Numbers::Int(values) = numbers(tensor)? else { return Err(EvalError::NoRule) };
    let rank = tensor.shape().len();
    let covers_all = match axes {
        None => node.int("noop_with_empty_axes", 0) == 0,
        Some(axes) => {
            let axes = axes.integers().ok_or(EvalError::NoRule)?;
            (0..rank).all(|axis| axes.iter().any(|&a| positive_axis(a, rank) == Some(axis)))
        }
    };
    if !covers_all {
        return Err(EvalError::NoRule);
    }
    let product = values.into_iter().fold(1, i64::wrapping_mul);
    let shape = if node.int("keepdims", 1) != 0 { vec![1; rank] } else { Vec::new() };
    from_ints(tensor.dtype(), shape, vec![product])
}
