//! Reductions, and the poolings that span the whole plane.

use ndarray::{Axis, IxDyn};

use super::real::dense;
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, attribute_or_input, axis, ints, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[
    row("ReduceSum", |node| Ok(Box::new(Reduce::of(node, Kind::Sum)))),
    row("ReduceMean", |node| Ok(Box::new(Reduce::of(node, Kind::Mean)))),
    row("ReduceMax", |node| Ok(Box::new(Reduce::of(node, Kind::Max)))),
    row("ReduceMin", |node| Ok(Box::new(Reduce::of(node, Kind::Min)))),
    row("ReduceL2", |node| Ok(Box::new(Reduce::of(node, Kind::Norm)))),
    row("ReduceSumSquare", |node| Ok(Box::new(Reduce::of(node, Kind::SumSquare)))),
    row("GlobalAveragePool", |_| Ok(Box::new(Reduce::plane(Kind::Mean)))),
    row("GlobalMaxPool", |_| Ok(Box::new(Reduce::plane(Kind::Max)))),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sum,
    Mean,
    Max,
    Min,
    Norm,
    SumSquare,
}

#[derive(Debug)]
struct Reduce {
    kind: Kind,
    axes: Option<Vec<i64>>,
    keep: bool,
    nothing_if_empty: bool,
    /// All axes from the third on.
    plane: bool,
}

impl Reduce {
    fn of(node: &Node, kind: Kind) -> Self {
        Self {
            kind,
            axes: ints(node, "axes"),
            keep: node.int("keepdims", 1) != 0,
            nothing_if_empty: node.int("noop_with_empty_axes", 0) != 0,
            plane: false,
        }
    }

    fn plane(kind: Kind) -> Self {
        Self { kind, axes: None, keep: true, nothing_if_empty: false, plane: true }
    }

    /// The reduced axes, ascending.
    fn axes<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<Vec<usize>, GradError> {
        let rank = inputs.real(0)?.ndim();
        if self.plane {
            return Ok((2..rank).collect());
        }
        let given = attribute_or_input(self.axes.as_ref(), inputs, 1)?.filter(|axes| !axes.is_empty());
        let mut axes = match given {
            Some(axes) => axes.into_iter().map(|a| axis(a, rank)).collect::<Result<Vec<_>, _>>()?,
            None if self.nothing_if_empty => Vec::new(),
            None => (0..rank).collect(),
        };
        axes.sort_unstable();
        axes.dedup();
        Ok(axes)
    }
}

/// `x` folded over `axes`, which stay with one element each.
fn folded<T: Real>(x: &Array<T>, axes: &[usize], f: impl Fn(T, T) -> T) -> Array<T> {
    let mut out = dense(x);
    for &axis in axes {
        let fold = |lane: ndarray::ArrayView1<'_, T>| lane.iter().copied().reduce(&f).unwrap_or_else(T::zero);
        out = out.map_axis(Axis(axis), fold).insert_axis(Axis(axis)).into_shared();
    }
    out
}

fn summed<T: Real>(x: &Array<T>, axes: &[usize]) -> Array<T> {
    let mut out = dense(x);
    for &axis in axes {
        out = out.sum_axis(Axis(axis)).insert_axis(Axis(axis)).into_shared();
    }
    out
}

impl<T: Real> Rule<T> for Reduce {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (x, axes) = (inputs.real(0)?, self.axes(inputs)?);
        let count: usize = axes.iter().map(|&a| x.shape()[a]).product();
        let squares = || x.map(|x| *x * *x).into_shared();
        let out = match self.kind {
            Kind::Sum => summed(x, &axes),
            Kind::Mean => summed(x, &axes) * T::of(1.0 / count.max(1) as f64),
            Kind::Max => folded(x, &axes, |a, b| if b > a { b } else { a }),
            Kind::Min => folded(x, &axes, |a, b| if b < a { b } else { a }),
            Kind::Norm => summed(&squares(), &axes).map(|x| T::of(x.wide().sqrt())).into_shared(),
            Kind::SumSquare => summed(&squares(), &axes),
        };
        let kept: Vec<usize> =
            out.shape().iter().enumerate().filter(|(i, _)| self.keep || !axes.contains(i)).map(|(_, &d)| d).collect();
        let out = dense(&out).into_shape_with_order(IxDyn(&kept));
        Ok(vec![out.map_err(|error| GradError(error.to_string()))?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, axes) = (call.inputs.real(0)?, self.axes(&call.inputs)?);
        let count: usize = axes.iter().map(|&a| x.shape()[a]).product();
        let with_ones: Vec<usize> =
            x.shape().iter().enumerate().map(|(i, &d)| if axes.contains(&i) { 1 } else { d }).collect();
        let spread = |array: &Array<T>| -> Result<ndarray::ArrayD<T>, GradError> {
            let shaped = dense(array).into_shape_with_order(IxDyn(&with_ones));
            let shaped = shaped.map_err(|error| GradError(error.to_string()))?;
            let wide = shaped.broadcast(x.raw_dim()).ok_or_else(|| GradError("a gradient does not fit".into()))?;
            Ok(wide.to_owned())
        };
        let mut grad = spread(call.grad()?)?;
        let y = || spread(call.outputs[0]);
        match self.kind {
            Kind::Sum => {}
            Kind::Mean => grad *= T::of(1.0 / count.max(1) as f64),
            Kind::Norm => {
                let y = y()?;
                ndarray::Zip::from(&mut grad).and(x).and(&y).for_each(|g, &x, &y| {
                    *g *= if y > T::zero() { x / y } else { T::zero() };
                });
            }
            Kind::SumSquare => grad.zip_mut_with(x, |g, x| *g *= *x + *x),
            Kind::Max | Kind::Min => {
                let hit =
                    ndarray::Zip::from(x).and(&y()?).map_collect(|x, y| if x == y { T::one() } else { T::zero() });
                // Equal extremes share the gradient.
                let shared = summed(&hit.clone().into_shared(), &axes);
                let shared = spread(&shared)?;
                ndarray::Zip::from(&mut grad).and(&hit).and(&shared).for_each(|g, &hit, &n| *g *= hit / n);
            }
        }
        Ok(vec![Some(grad.into_shared())])
    }
}
