//! Tensors from files, brought into the form that the graph's inputs take.

use passes::ir::{Dim, TensorType};
use passes::tensor::{DType, Tensor};

use super::Slot;

/// The tensors of `named` in the order of `slots`, checked against them.
pub(super) fn feed(named: &[(String, Tensor)], slots: &[Slot], split: bool) -> Result<Vec<Tensor>, String> {
    slots
        .iter()
        .map(|slot| {
            let found = named.iter().find(|(name, _)| *name == slot.name);
            let (_, tensor) = found.ok_or_else(|| {
                let has: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
                let wants: Vec<&str> = slots.iter().map(|slot| slot.name.as_str()).collect();
                format!("it has no tensor `{}`: it holds {}, the model takes {}", slot.name, list(&has), list(&wants))
            })?;
            let tensor = converted(tensor, slot)?;
            check_shape(&tensor, slot, split)?;
            check_finite(&tensor, &slot.name)?;
            Ok(tensor)
        })
        .collect()
}

fn list(names: &[&str]) -> String {
    if names.is_empty() {
        "nothing".into()
    } else {
        names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
    }
}

/// `tensor` in the slot's element type: integers where every value fits, floats rounded; anything else is refused.
fn converted(tensor: &Tensor, slot: &Slot) -> Result<Tensor, String> {
    let Some(wanted) = slot.ty.dtype else { return Ok(tensor.clone()) };
    let found = tensor.dtype();
    if found == wanted {
        return Ok(tensor.clone());
    }
    let refuse = || format!("tensor `{}` is {}, the model takes {}", slot.name, found.name(), wanted.name());
    let shape = tensor.shape().to_vec();
    match (found, wanted) {
        (DType::F64 | DType::F16 | DType::Bf16, DType::F32) => {
            Ok(Tensor::of(shape, tensor.floats().ok_or_else(refuse)?.into_owned()))
        }
        (DType::F32 | DType::F64, DType::F16) => {
            let halves = tensor.floats().ok_or_else(refuse)?;
            let bytes: Vec<u8> = halves.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
            Tensor::new(DType::F16, shape, bytes.into()).map_err(|e| e.to_string())
        }
        (from, to) if (from.is_integer() || from == DType::Bool) && to.is_integer() => {
            let values = tensor.integers().ok_or_else(refuse)?;
            let (low, high) = bounds(to);
            if let Some(value) = values.iter().find(|v| !(low..=high).contains(&i128::from(**v))) {
                return Err(format!("tensor `{}` has {value}, which {} does not hold", slot.name, to.name()));
            }
            let width = to.bits() as usize / 8;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes().into_iter().take(width)).collect();
            Tensor::new(to, shape, bytes.into()).map_err(|e| e.to_string())
        }
        (DType::U8, DType::F32) => Err(format!("{}; scale pixels to the model's range first", refuse())),
        _ => Err(refuse()),
    }
}

fn bounds(dtype: DType) -> (i128, i128) {
    let bits = dtype.bits();
    match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        _ => (0, (1 << bits) - 1),
    }
}

fn check_shape(tensor: &Tensor, slot: &Slot, split: bool) -> Result<(), String> {
    let Some(wanted) = &slot.ty.shape else { return Ok(()) };
    let fits = wanted.len() == tensor.shape().len()
        && wanted.iter().zip(tensor.shape()).all(|(dim, &n)| dim.known().is_none_or(|d| d == n));
    if fits {
        return Ok(());
    }
    let wanted = TensorType::new(slot.ty.dtype, Some(wanted.clone()));
    let hint = match (split, tensor.shape().len() + 1 == slot.ty.rank().unwrap_or(0)) {
        (true, true) => "; add a leading dimension that counts samples",
        _ => "",
    };
    Err(format!("tensor `{}` has shape {:?}, the model takes {wanted}{hint}", slot.name, tensor.shape()))
}

fn check_finite(tensor: &Tensor, name: &str) -> Result<(), String> {
    if !tensor.dtype().is_float() {
        return Ok(());
    }
    let values = tensor.floats().unwrap_or_default();
    let Some(at) = values.iter().position(|v| !v.is_finite()) else { return Ok(()) };
    let per_row: usize = tensor.shape().get(1..).map_or(1, |rest| rest.iter().product());
    Err(format!("tensor `{name}` has the value {} in sample {}", values[at], at / per_row.max(1)))
}

/// The number of samples of a feed whose tensors all count them in front.
pub(super) fn rows(feed: &[Tensor]) -> Result<usize, String> {
    let counts: Vec<usize> = feed.iter().map(|tensor| tensor.shape().first().copied().unwrap_or(0)).collect();
    if counts.iter().all(|&n| n == counts[0]) {
        Ok(counts[0])
    } else {
        Err(format!("its tensors count {counts:?} samples: the leading dimensions must be equal"))
    }
}

/// Sample `row` of `tensor`, with a leading dimension of 1; a slice, not a copy.
pub(super) fn row(tensor: &Tensor, row: usize) -> Result<Tensor, String> {
    let mut shape = tensor.shape().to_vec();
    let rows = shape.first().copied().filter(|&n| row < n).ok_or("a sample is out of range")?;
    shape[0] = 1;
    let bytes = tensor.bytes().len() / rows;
    Tensor::new(tensor.dtype(), shape, tensor.bytes().slice(row * bytes..(row + 1) * bytes)).map_err(|e| e.to_string())
}

/// Whether a dimension may hold anything.
pub(super) fn is_open(dim: Option<&Dim>) -> bool {
    dim.is_none_or(|dim| dim.known().is_none())
}
