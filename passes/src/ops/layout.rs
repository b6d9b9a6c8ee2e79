//! Shape rules of operators that move data.

use super::elementwise::broadcast_shapes;
use super::numbers::numbers;
use super::{Call, positive_axis};
use crate::ir::{Dim, TensorType};

fn typed(call: &Call<'_>, shape: Option<Vec<Dim>>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(0), shape)]
}

/// The number of elements of input `index`, where its type is a vector of known length.
fn vector_length(call: &Call<'_>, index: usize) -> Option<usize> {
    match call.shape(index)?.as_slice() {
        [dim] => dim.known().filter(|&n| n <= super::MAX_RANK),
        _ => None,
    }
}

fn product(shape: &[Dim]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(dim.known()?))
}

pub(super) fn reshape(call: &Call<'_>) -> Vec<TensorType> {
    let shape = match wanted(call, 1) {
        Some(wanted) => Some(reshaped(call, &wanted)),
        None => vector_length(call, 1).map(|rank| vec![Dim::Unknown; rank]),
    };
    typed(call, shape)
}

/// The extents that input `index` asks for, as far as they are the same in every run.
fn wanted(call: &Call<'_>, index: usize) -> Option<Vec<Option<i64>>> {
    // Any constant counts; what is computed has no more numbers than a shape.
    let constant = call.constant_ints(index).map(|all| all.into_iter().map(Some).collect());
    constant.or_else(|| numbers(call.graph, call.node.input(index)?, call.types))
}

fn reshaped(call: &Call<'_>, wanted: &[Option<i64>]) -> Vec<Dim> {
    let input = call.shape(0);
    let zero_copies = call.node.int("allowzero", 0) == 0;
    let mut shape: Vec<Dim> = wanted
        .iter()
        .enumerate()
        .map(|(axis, &dim)| match dim {
            None | Some(-1) => Dim::Unknown,
            Some(0) if zero_copies => input.as_ref().and_then(|s| s.get(axis).cloned()).unwrap_or(Dim::Unknown),
            Some(n) => usize::try_from(n).map_or(Dim::Unknown, Dim::Known),
        })
        .collect();
    if let Some(hole) = wanted.iter().position(|&dim| dim == Some(-1))
        && let Some(total) = input.as_deref().and_then(product)
    {
        let rest: Vec<Dim> =
            shape.iter().enumerate().filter(|(axis, _)| *axis != hole).map(|(_, d)| d.clone()).collect();
        if let Some(rest) = product(&rest).filter(|&n| n > 0) {
            shape[hole] = Dim::Known(total / rest);
        }
    }
    shape
}

pub(super) fn flatten(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|shape| {
        let axis = call.node.int("axis", 1);
        // `axis` may equal the rank.
        let axis =
            positive_axis(axis, shape.len() + 1).filter(|_| axis >= 0).or_else(|| positive_axis(axis, shape.len()))?;
        let part = |dims: &[Dim]| match dims {
            [one] => one.clone(),
            many => product(many).map_or(Dim::Unknown, Dim::Known),
        };
        Some(vec![part(&shape[..axis]), part(&shape[axis..])])
    });
    typed(call, shape)
}

pub(super) fn squeeze(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|shape| {
        if !call.has(1) {
            // Which dimensions go depends on their values.
            let known = shape.iter().all(|dim| dim.known().is_some());
            return known.then(|| shape.into_iter().filter(|dim| *dim != Dim::Known(1)).collect());
        }
        let axes = axes_of(call, 1, shape.len())?;
        Some(shape.into_iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, dim)| dim).collect())
    });
    typed(call, shape)
}

pub(super) fn unsqueeze(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|shape| {
        let n_axes = call.constant_ints(1)?.len();
        let axes = axes_of(call, 1, shape.len() + n_axes)?;
        let mut old = shape.into_iter();
        (0..old.len() + n_axes)
            .map(|axis| if axes.contains(&axis) { Some(Dim::Known(1)) } else { old.next() })
            .collect()
    });
    typed(call, shape)
}

fn axes_of(call: &Call<'_>, input: usize, rank: usize) -> Option<Vec<usize>> {
    call.constant_ints(input)?.iter().map(|&axis| positive_axis(axis, rank)).collect()
}

pub(super) fn transpose(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|shape| match call.node.ints("perm") {
        Some(perm) => perm.iter().map(|&axis| shape.get(usize::try_from(axis).ok()?).cloned()).collect(),
        None => Some(shape.into_iter().rev().collect()),
    });
    typed(call, shape)
}

pub(super) fn concat(call: &Call<'_>) -> Vec<TensorType> {
    let shapes: Option<Vec<Vec<Dim>>> = (0..call.inputs.len()).map(|index| call.shape(index)).collect();
    let dtype = call.inputs.iter().flatten().find_map(|input| input.dtype);
    let joined = shapes.and_then(|shapes| {
        let mut joined = shapes.first()?.clone();
        let axis = positive_axis(call.node.int("axis", 0), joined.len())?;
        for shape in &shapes[1..] {
            if shape.len() != joined.len() {
                return None;
            }
            joined[axis] = match (joined[axis].known(), shape[axis].known()) {
                (Some(a), Some(b)) => a.checked_add(b).map_or(Dim::Unknown, Dim::Known),
                _ => Dim::Unknown,
            };
            for other in (0..joined.len()).filter(|&other| other != axis) {
                if joined[other].known().is_none() {
                    joined[other] = shape[other].clone();
                }
            }
        }
        Some(joined)
    });
    vec![TensorType::new(dtype, joined)]
}

pub(super) fn split(call: &Call<'_>) -> Vec<TensorType> {
    let n_outputs = call.node.outputs.len();
    let part = |index: usize| {
        let mut shape = call.shape(0)?;
        let axis = positive_axis(call.node.int("axis", 0), shape.len())?;
        let sizes = call.constant_ints(1);
        let size = match (&sizes, shape[axis].known()) {
            (Some(sizes), _) => usize::try_from(*sizes.get(index)?).ok(),
            (None, Some(total)) if !call.has(1) => {
                let chunk = total.div_ceil(n_outputs.max(1));
                Some(chunk.min(total.saturating_sub(chunk * index)))
            }
            _ => None,
        };
        shape[axis] = size.map_or(Dim::Unknown, Dim::Known);
        Some(shape)
    };
    (0..n_outputs).map(|index| TensorType::new(call.dtype(0), part(index))).collect()
}

pub(super) fn slice(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).map(|shape| sliced(call, &shape).unwrap_or_else(|| vec![Dim::Unknown; shape.len()]));
    typed(call, shape)
}

fn sliced(call: &Call<'_>, shape: &[Dim]) -> Option<Vec<Dim>> {
    let axes = if call.has(3) { axes_of(call, 3, shape.len())? } else { (0..vector_length(call, 1)?).collect() };
    let (starts, ends) = (call.constant_ints(1), call.constant_ints(2));
    let steps = if call.has(4) { call.constant_ints(4) } else { Some(vec![1; axes.len()]) };
    let mut shape = shape.to_vec();
    for (index, &axis) in axes.iter().enumerate() {
        let extent = (|| {
            let at = |list: &Option<Vec<i64>>| list.as_ref()?.get(index).copied();
            super::eval::slice_bounds(shape.get(axis)?.known()?, at(&starts)?, at(&ends)?, at(&steps)?).map(|b| b.count)
        })();
        *shape.get_mut(axis)? = extent.map_or(Dim::Unknown, Dim::Known);
    }
    Some(shape)
}

pub(super) fn gather(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).zip(call.shape(1)).and_then(|(data, indices)| {
        let axis = positive_axis(call.node.int("axis", 0), data.len())?;
        Some(data[..axis].iter().chain(&indices).chain(&data[axis + 1..]).cloned().collect())
    });
    typed(call, shape)
}

pub(super) fn gather_elements(call: &Call<'_>) -> Vec<TensorType> {
    typed(call, call.shape(1))
}

pub(super) fn gather_nd(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).zip(call.shape(1)).and_then(|(data, indices)| {
        let batch = usize::try_from(call.node.int("batch_dims", 0)).ok()?;
        let depth = indices.last()?.known()?;
        let rest = data.get(batch.checked_add(depth)?..)?;
        Some(indices[..indices.len() - 1].iter().chain(rest).cloned().collect())
    });
    typed(call, shape)
}

pub(super) fn expand(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).and_then(|input| {
        let wanted: Vec<Dim> = if let Some(wanted) = wanted(call, 1) {
            let dim = |n: &Option<i64>| n.and_then(|n| usize::try_from(n).ok()).map_or(Dim::Unknown, Dim::Known);
            wanted.iter().map(dim).collect()
        } else {
            let rank = vector_length(call, 1)?.max(input.len());
            return Some(vec![Dim::Unknown; rank]);
        };
        broadcast_shapes(&input, &wanted)
    });
    typed(call, shape)
}

pub(super) fn tile(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).map(|shape| match call.constant_ints(1) {
        Some(repeats) if repeats.len() == shape.len() => shape
            .iter()
            .zip(repeats)
            .map(|(dim, n)| {
                let n = usize::try_from(n).ok();
                dim.known().zip(n).and_then(|(dim, n)| dim.checked_mul(n)).map_or(Dim::Unknown, Dim::Known)
            })
            .collect(),
        _ => vec![Dim::Unknown; shape.len()],
    });
    typed(call, shape)
}

pub(super) fn pad(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).map(|shape| padded(call, &shape).unwrap_or_else(|| vec![Dim::Unknown; shape.len()]));
    typed(call, shape)
}

fn padded(call: &Call<'_>, shape: &[Dim]) -> Option<Vec<Dim>> {
    let pads = call.constant_ints(1)?;
    let axes = if call.has(3) { axes_of(call, 3, shape.len())? } else { (0..shape.len()).collect() };
    if pads.len() != 2 * axes.len() {
        return None;
    }
    let mut shape = shape.to_vec();
    for (index, &axis) in axes.iter().enumerate() {
        if pads[index] == 0 && pads[index + axes.len()] == 0 {
            continue;
        }
        let extent = shape[axis]
            .known()
            .and_then(|dim| i64::try_from(dim).ok()?.checked_add(pads[index])?.checked_add(pads[index + axes.len()]));
        shape[axis] = extent.and_then(|n| usize::try_from(n).ok()).map_or(Dim::Unknown, Dim::Known);
    }
    Some(shape)
}

pub(super) fn resize(call: &Call<'_>) -> Vec<TensorType> {
    let shape = call.shape(0).map(|shape| {
        let sizes =
            call.constant_ints(3).filter(|sizes| sizes.len() == shape.len() && call.node.ints("axes").is_none());
        let kept = call.node.text("keep_aspect_ratio_policy", "stretch") == "stretch";
        match sizes.filter(|_| kept) {
            Some(sizes) => sizes.iter().map(|&n| usize::try_from(n).map_or(Dim::Unknown, Dim::Known)).collect(),
            None => scaled(call, &shape).unwrap_or_else(|| vec![Dim::Unknown; shape.len()]),
        }
    });
    typed(call, shape)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "floor of a non-negative extent")]
fn scaled(call: &Call<'_>, shape: &[Dim]) -> Option<Vec<Dim>> {
    let scales = call.constant(2)?.floats()?.into_owned();
    if scales.len() != shape.len() || call.node.ints("axes").is_some() {
        return None;
    }
    let scale = |(dim, scale): (&Dim, f32)| match dim.known() {
        Some(n) if scale > 0.0 => Dim::Known((n as f32 * scale).floor() as usize),
        None if (scale - 1.0).abs() < f32::EPSILON => dim.clone(),
        _ => Dim::Unknown,
    };
    Some(shape.iter().zip(scales).map(scale).collect())
}

pub(super) fn depth_to_space(call: &Call<'_>) -> Vec<TensorType> {
    typed(call, block_move(call, usize::checked_div, usize::checked_mul))
}

pub(super) fn space_to_depth(call: &Call<'_>) -> Vec<TensorType> {
    typed(call, block_move(call, usize::checked_mul, usize::checked_div))
}

fn block_move(
    call: &Call<'_>,
    channels: fn(usize, usize) -> Option<usize>,
    spatial: fn(usize, usize) -> Option<usize>,
) -> Option<Vec<Dim>> {
    let shape = call.shape(0).filter(|shape| shape.len() == 4)?;
    let block = usize::try_from(call.node.int("blocksize", 0)).ok()?;
    let apply = |dim: &Dim, f: fn(usize, usize) -> Option<usize>, by: Option<usize>| {
        dim.known().zip(by).and_then(|(dim, by)| f(dim, by)).map_or(Dim::Unknown, Dim::Known)
    };
    Some(vec![
        shape[0].clone(),
        apply(&shape[1], channels, block.checked_mul(block)),
        apply(&shape[2], spatial, Some(block)),
        apply(&shape[3], spatial, Some(block)),
    ])
}
