//! Elements that move, are repeated or are dropped.

use ndarray::{Axis, IxDyn, SliceInfoElem};

use super::arithmetic::reduced_to;
use super::matmul::broadcast_shape;
use super::real::dense;
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, attribute_or_input, axis, err, ints, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[
    row("Reshape", |node| Ok(Box::new(Reshape::To { keeps_zero: node.int("allowzero", 0) != 0 }))),
    row("Flatten", |node| Ok(Box::new(Reshape::Flatten(node.int("axis", 1))))),
    row("Squeeze", |node| Ok(Box::new(Reshape::Squeeze(ints(node, "axes"))))),
    row("Unsqueeze", |node| Ok(Box::new(Reshape::Unsqueeze(ints(node, "axes"))))),
    row("Transpose", |node| Ok(Box::new(Transpose(ints(node, "perm"))))),
    row("Expand", |_| Ok(Box::new(Expand))),
    row("Tile", |_| Ok(Box::new(Tile))),
    row("Slice", |node| {
        Ok(Box::new(Slice { starts: ints(node, "starts"), ends: ints(node, "ends"), axes: ints(node, "axes") }))
    }),
    row("Gather", |node| Ok(Box::new(Gather(node.int("axis", 0))))),
    row("Pad", Pad::of),
    row("DepthToSpace", |node| blocks(node, node.text("mode", "DCR") == "CRD", true)),
    row("SpaceToDepth", |node| blocks(node, false, false)),
];

fn shaped<T: Real>(array: &Array<T>, shape: &[usize]) -> Result<Array<T>, GradError> {
    let shaped = dense(array).into_shape_with_order(IxDyn(shape));
    shaped.map_err(|_| GradError(format!("{:?} does not become {shape:?}", array.shape())))
}

fn sizes(list: &[i64]) -> Result<Vec<usize>, GradError> {
    list.iter().map(|&d| usize::try_from(d).map_err(|_| GradError(format!("dimension {d}")))).collect()
}

/// The same elements in the same order.
#[derive(Debug)]
enum Reshape {
    To { keeps_zero: bool },
    Flatten(i64),
    Squeeze(Option<Vec<i64>>),
    Unsqueeze(Option<Vec<i64>>),
}

impl Reshape {
    fn shape<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<Vec<usize>, GradError> {
        let shape = inputs.real(0)?.shape();
        match self {
            Self::To { keeps_zero } => {
                let wanted = inputs.list(1)?.ok_or_else(|| GradError("a Reshape without a shape".into()))?;
                let copied = wanted.iter().enumerate().map(|(i, &d)| match shape.get(i) {
                    Some(&own) if d == 0 && !keeps_zero => own.try_into().unwrap_or(i64::MAX),
                    _ => d,
                });
                let copied: Vec<i64> = copied.collect();
                let known: usize =
                    copied.iter().filter(|d| **d >= 0).map(|&d| usize::try_from(d).unwrap_or(0)).product();
                let total: usize = shape.iter().product();
                let rest = i64::try_from(total.checked_div(known).unwrap_or(0)).unwrap_or(0);
                sizes(&copied.iter().map(|&d| if d == -1 { rest } else { d }).collect::<Vec<_>>())
            }
            Self::Flatten(at) => {
                let end = usize::try_from(*at).ok().filter(|at| *at == shape.len());
                let at = end.map_or_else(|| axis(*at, shape.len()), Ok)?;
                Ok(vec![shape[..at].iter().product(), shape[at..].iter().product()])
            }
            Self::Squeeze(axes) => {
                let axes = match attribute_or_input(axes.as_ref(), inputs, 1)? {
                    Some(axes) => axes.iter().map(|&a| axis(a, shape.len())).collect::<Result<Vec<_>, _>>()?,
                    None => (0..shape.len()).filter(|&i| shape[i] == 1).collect(),
                };
                Ok(shape.iter().enumerate().filter(|(i, _)| !axes.contains(i)).map(|(_, &d)| d).collect())
            }
            Self::Unsqueeze(axes) => {
                let axes = attribute_or_input(axes.as_ref(), inputs, 1)?.unwrap_or_default();
                let rank = shape.len() + axes.len();
                let axes = axes.iter().map(|&a| axis(a, rank)).collect::<Result<Vec<_>, _>>()?;
                let mut rest = shape.iter();
                Ok((0..rank).map(|i| if axes.contains(&i) { 1 } else { rest.next().copied().unwrap_or(1) }).collect())
            }
        }
    }
}

impl<T: Real> Rule<T> for Reshape {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        Ok(vec![shaped(inputs.real(0)?, &self.shape(inputs)?)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        Ok(vec![Some(shaped(call.grad()?, call.inputs.real(0)?.shape())?)])
    }
}

#[derive(Debug)]
struct Transpose(Option<Vec<i64>>);

impl Transpose {
    fn order(&self, rank: usize) -> Result<Vec<usize>, GradError> {
        let Some(perm) = &self.0 else { return Ok((0..rank).rev().collect()) };
        let order = perm.iter().map(|&a| axis(a, rank)).collect::<Result<Vec<_>, _>>()?;
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if sorted.into_iter().eq(0..rank) { Ok(order) } else { err(format!("perm {perm:?} of {rank} axes")) }
    }
}

impl<T: Real> Rule<T> for Transpose {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = inputs.real(0)?;
        Ok(vec![dense(&x.clone().permuted_axes(IxDyn(&self.order(x.ndim())?)))])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let g = call.grad()?;
        let order = self.order(g.ndim())?;
        let mut back = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &a)| back[a] = i);
        Ok(vec![Some(dense(&g.clone().permuted_axes(IxDyn(&back))))])
    }
}

#[derive(Debug)]
struct Expand;

/// The most elements that a tensor may be repeated to.
const MAX_ELEMENTS: usize = 1 << 30;

impl<T: Real> Rule<T> for Expand {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = inputs.real(0)?;
        let shape = broadcast_shape(x.shape(), &sizes(&inputs.list(1)?.unwrap_or_default())?)?;
        if crate::tensor::count(&shape).is_none_or(|n| n > MAX_ELEMENTS) {
            return err(format!("Expand to {shape:?}"));
        }
        let wide = x.broadcast(IxDyn(&shape)).ok_or_else(|| GradError("Expand does not broadcast".into()))?;
        Ok(vec![wide.to_owned().into_shared()])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        Ok(vec![Some(reduced_to(call.grad()?, call.inputs.real(0)?.shape())?)])
    }
}

#[derive(Debug)]
struct Tile;

impl Tile {
    /// The shape with every axis cut in (repeats, size).
    fn cut(shape: &[usize], repeats: &[i64]) -> Result<(Vec<usize>, Vec<usize>), GradError> {
        let repeats = sizes(repeats)?;
        if repeats.len() != shape.len() {
            return err("Tile: as many repeats as axes are needed");
        }
        let all: Vec<usize> = repeats.iter().zip(shape).flat_map(|(&r, &d)| [r, d]).collect();
        if crate::tensor::count(&all).is_none_or(|n| n > MAX_ELEMENTS) {
            return err(format!("Tile to {all:?}"));
        }
        Ok((shape.iter().flat_map(|&d| [1, d]).collect(), all))
    }
}

impl<T: Real> Rule<T> for Tile {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = inputs.real(0)?;
        let (ones, cut) = Self::cut(x.shape(), &inputs.list(1)?.unwrap_or_default())?;
        let x = shaped(x, &ones)?;
        let wide = x.broadcast(IxDyn(&cut)).ok_or_else(|| GradError("Tile does not broadcast".into()))?;
        let shape: Vec<usize> = cut.chunks_exact(2).map(|pair| pair[0] * pair[1]).collect();
        Ok(vec![shaped(&wide.to_owned().into_shared(), &shape)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let x = call.inputs.real(0)?;
        let (ones, cut) = Self::cut(x.shape(), &call.inputs.list(1)?.unwrap_or_default())?;
        Ok(vec![Some(shaped(&reduced_to(&shaped(call.grad()?, &cut)?, &ones)?, x.shape())?)])
    }
}

#[derive(Debug)]
struct Slice {
    starts: Option<Vec<i64>>,
    ends: Option<Vec<i64>>,
    axes: Option<Vec<i64>>,
}

impl Slice {
    fn places<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<Vec<SliceInfoElem>, GradError> {
        let shape = inputs.real(0)?.shape();
        let starts = attribute_or_input(self.starts.as_ref(), inputs, 1)?.unwrap_or_default();
        let ends = attribute_or_input(self.ends.as_ref(), inputs, 2)?.unwrap_or_default();
        let axes = attribute_or_input(self.axes.as_ref(), inputs, 3)?;
        let axes = axes.unwrap_or_else(|| (0_i64..).take(starts.len()).collect());
        let steps = inputs.list(4)?.unwrap_or_else(|| vec![1; starts.len()]);
        if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
            return err("Slice: lists of different lengths");
        }
        let mut places = vec![SliceInfoElem::Slice { start: 0, end: None, step: 1 }; shape.len()];
        for (((&start, &end), &at), &step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
            let at = axis(at, shape.len())?;
            places[at] = place(shape[at], start, end, step)?;
        }
        Ok(places)
    }
}

/// ONNX's clamping of a slice of `size` elements, in ndarray's terms: a negative step walks the same elements backwards.
fn place(size: usize, start: i64, end: i64, step: i64) -> Result<SliceInfoElem, GradError> {
    let size = i64::try_from(size).map_err(|_| GradError("a huge axis".into()))?;
    let absolute = |i: i64| if i < 0 { i.saturating_add(size) } else { i };
    let (first, last) = match step.signum() {
        1 => (absolute(start).clamp(0, size), absolute(end).clamp(0, size)),
        // The elements end + 1 ..= start.
        -1 => (absolute(end).clamp(-1, size - 1) + 1, absolute(start).clamp(-1, size - 1) + 1),
        _ => return err("Slice: step 0"),
    };
    let narrow = |i: i64| isize::try_from(i).map_err(|_| GradError("a huge axis".into()));
    Ok(SliceInfoElem::Slice { start: narrow(first)?, end: Some(narrow(last.max(first))?), step: narrow(step)? })
}

impl<T: Real> Rule<T> for Slice {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let places = self.places(inputs)?;
        let view = inputs.real(0)?.slice(places.as_slice());
        Ok(vec![view.to_owned().into_shared()])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let places = self.places(&call.inputs)?;
        let mut grad = ndarray::ArrayD::zeros(call.inputs.real(0)?.raw_dim());
        let mut view = grad.slice_mut(places.as_slice());
        view.assign(call.grad()?);
        Ok(vec![Some(grad.into_shared())])
    }
}

#[derive(Debug)]
struct Gather(i64);

impl Gather {
    fn indices<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<(usize, Vec<usize>), GradError> {
        let shape = inputs.real(0)?.shape();
        let at = axis(self.0, shape.len())?;
        let indices = inputs.whole(1)?.iter().map(|&i| axis(i, shape[at])).collect::<Result<Vec<_>, _>>()?;
        Ok((at, indices))
    }
}

impl<T: Real> Rule<T> for Gather {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (at, indices) = self.indices(inputs)?;
        let x = inputs.real(0)?;
        let shape: Vec<usize> =
            x.shape()[..at].iter().chain(inputs.whole(1)?.shape()).chain(&x.shape()[at + 1..]).copied().collect();
        Ok(vec![shaped(&x.select(Axis(at), &indices).into_shared(), &shape)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (at, indices) = self.indices(&call.inputs)?;
        let x = call.inputs.real(0)?;
        let mut flat = x.shape().to_vec();
        flat[at] = indices.len();
        let g = shaped(call.grad()?, &flat)?;
        let mut grad = ndarray::ArrayD::<T>::zeros(x.raw_dim());
        for (from, &to) in indices.iter().enumerate() {
            let mut row = grad.index_axis_mut(Axis(at), to);
            row += &g.index_axis(Axis(at), from);
        }
        Ok(vec![Some(grad.into_shared()), None])
    }
}

/// Padding with a constant.
#[derive(Debug)]
struct Pad {
    pads: Option<Vec<i64>>,
    value: f64,
}

impl Pad {
    fn of(node: &Node) -> Result<Box<dyn super::AnyRule>, GradError> {
        match node.text("mode", "constant") {
            "constant" => Ok(Box::new(Self { pads: ints(node, "pads"), value: f64::from(node.float("value", 0.0)) })),
            mode => err(format!("Pad by {mode}")),
        }
    }

    /// The padded shape, and where the input lies in it.
    fn place<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<(Vec<usize>, Vec<SliceInfoElem>), GradError> {
        let shape = inputs.real(0)?.shape();
        let pads = attribute_or_input(self.pads.as_ref(), inputs, 1)?.unwrap_or_default();
        let axes = match inputs.list(3)? {
            Some(axes) => axes.iter().map(|&a| axis(a, shape.len())).collect::<Result<Vec<_>, _>>()?,
            None => (0..shape.len()).collect(),
        };
        let pads = sizes(&pads)?;
        if pads.len() != 2 * axes.len() {
            return err("Pad: two pads per axis are needed");
        }
        let mut padded = shape.to_vec();
        let mut places = vec![SliceInfoElem::Slice { start: 0, end: None, step: 1 }; shape.len()];
        for (i, &at) in axes.iter().enumerate() {
            let (before, after) = (pads[i], pads[axes.len() + i]);
            padded[at] = shape[at].saturating_add(before).saturating_add(after);
            let narrow = |i: usize| isize::try_from(i).map_err(|_| GradError("a huge pad".into()));
            let end = narrow(before.saturating_add(shape[at]))?;
            places[at] = SliceInfoElem::Slice { start: narrow(before)?, end: Some(end), step: 1 };
        }
        match crate::tensor::count(&padded) {
            Some(n) if n <= MAX_ELEMENTS => Ok((padded, places)),
            _ => err(format!("Pad to {padded:?}")),
        }
    }
}

impl<T: Real> Rule<T> for Pad {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (shape, places) = self.place(inputs)?;
        let given = inputs.optional(2)?.and_then(|value| value.iter().next().copied());
        let mut out = ndarray::ArrayD::from_elem(IxDyn(&shape), given.unwrap_or_else(|| T::of(self.value)));
        let mut view = out.slice_mut(places.as_slice());
        view.assign(inputs.real(0)?);
        Ok(vec![out.into_shared()])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (_, places) = self.place(&call.inputs)?;
        Ok(vec![Some(call.grad()?.slice(places.as_slice()).to_owned().into_shared())])
    }
}

/// Blocks of channels to blocks of the plane, or back.
#[derive(Debug)]
struct Blocks {
    size: usize,
    /// Whether the block is the inner part of the channels.
    inner: bool,
    to_space: bool,
}

fn blocks(node: &Node, inner: bool, to_space: bool) -> Result<Box<dyn super::AnyRule>, GradError> {
    match usize::try_from(node.int("blocksize", 0)) {
        Ok(size) if (1..1 << 16).contains(&size) => Ok(Box::new(Blocks { size, inner, to_space })),
        _ => err("blocksize is not positive"),
    }
}

impl Blocks {
    /// `x`, channels to plane or plane to channels.
    fn moved<T: Real>(&self, x: &Array<T>, to_space: bool) -> Result<Array<T>, GradError> {
        let &[n, c, h, w] = x.shape() else { return err("four axes are needed") };
        let b = self.size;
        let divides = if to_space { c.is_multiple_of(b * b) } else { h.is_multiple_of(b) && w.is_multiple_of(b) };
        if !divides {
            return err(format!("blocks of {b} do not divide {:?}", x.shape()));
        }
        if to_space {
            let (cut, order) = if self.inner {
                (vec![n, c / (b * b), b, b, h, w], [0, 1, 4, 2, 5, 3])
            } else {
                (vec![n, b, b, c / (b * b), h, w], [0, 3, 4, 1, 5, 2])
            };
            let moved = shaped(x, &cut)?.permuted_axes(IxDyn(&order));
            return shaped(&moved, &[n, c / (b * b), h * b, w * b]);
        }
        let order = if self.inner { [0, 1, 3, 5, 2, 4] } else { [0, 3, 5, 1, 2, 4] };
        let moved = shaped(x, &[n, c, h / b, b, w / b, b])?.permuted_axes(IxDyn(&order));
        shaped(&moved, &[n, c * b * b, h / b, w / b])
    }
}

impl<T: Real> Rule<T> for Blocks {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        Ok(vec![self.moved(inputs.real(0)?, self.to_space)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        Ok(vec![Some(self.moved(call.grad()?, !self.to_space)?)])
    }
}
