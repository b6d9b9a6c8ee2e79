//! Poolings over windows.

use super::real::{dense, filled, flat};
use super::window::{Geometry, Windows};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[
    row("AveragePool", |node| {
        if node.int("ceil_mode", 0) != 0 && node.int("count_include_pad", 0) != 0 {
            return err("AveragePool that rounds up and counts its padding");
        }
        Ok(Box::new(Pool::of(node, Kind::Mean { counts_pads: node.int("count_include_pad", 0) != 0 })))
    }),
    row("MaxPool", |node| match node.outputs.get(1).copied().flatten() {
        Some(_) => err("MaxPool with indices"),
        None => Ok(Box::new(Pool::of(node, Kind::Max))),
    }),
];

#[derive(Clone, Copy, Debug)]
enum Kind {
    Mean { counts_pads: bool },
    Max,
}

#[derive(Debug)]
struct Pool {
    windows: Windows,
    kind: Kind,
}

impl Pool {
    fn of(node: &Node, kind: Kind) -> Self {
        Self { windows: Windows::of(node), kind }
    }

    fn geometry(&self, shape: &[usize]) -> Result<Geometry, GradError> {
        match shape.split_first_chunk::<2>() {
            Some((_, plane)) => self.windows.over(plane, &self.windows.kernel()?),
            None => err("no plane to pool"),
        }
    }
}

/// 1 / the number of elements of every window.
fn shares<T: Real>(g: &Geometry, counts_pads: bool) -> Vec<T> {
    if counts_pads {
        return vec![T::of(1.0 / g.taps() as f64); g.count()];
    }
    let mut counts = vec![0_u32; g.count()];
    g.runs(|_, windows, _, _| counts[windows].iter_mut().for_each(|n| *n += 1));
    counts.into_iter().map(|n| T::of(1.0 / f64::from(n.max(1)))).collect()
}

/// For every window the place of its largest element, the first of several.
fn largest<T: Real>(g: &Geometry, plane: &[T]) -> Vec<usize> {
    let mut places = vec![usize::MAX; g.count()];
    g.runs(|_, windows, first, step| {
        for (i, place) in places[windows].iter_mut().enumerate() {
            let at = first + i * step;
            if *place == usize::MAX || plane[at] > plane[*place] {
                *place = at;
            }
        }
    });
    places
}

impl<T: Real> Rule<T> for Pool {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = dense(inputs.real(0)?);
        let g = self.geometry(x.shape())?;
        let mut out = Vec::with_capacity(x.len() / g.size().max(1) * g.count());
        for plane in flat(&x).chunks_exact(g.size().max(1)) {
            match self.kind {
                Kind::Max => {
                    let value = |&at: &usize| plane.get(at).copied().unwrap_or(T::of(f64::NEG_INFINITY));
                    out.extend(largest(&g, plane).iter().map(value));
                }
                Kind::Mean { counts_pads } => {
                    let mut sums = vec![T::zero(); g.count()];
                    g.runs(|_, windows, first, step| {
                        let read = plane[first..].iter().step_by(step);
                        sums[windows].iter_mut().zip(read).for_each(|(sum, x)| *sum += *x);
                    });
                    out.extend(sums.into_iter().zip(shares::<T>(&g, counts_pads)).map(|(sum, share)| sum * share));
                }
            }
        }
        let shape: Vec<usize> = x.shape()[..2].iter().chain(&g.windows[4 - x.ndim()..]).copied().collect();
        Ok(vec![filled(&shape, out)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, grad) = (dense(call.inputs.real(0)?), dense(call.grad()?));
        let g = self.geometry(x.shape())?;
        let mut out = vec![T::zero(); x.len()];
        let (values, grads) = (flat(&x), flat(&grad));
        let planes = out.chunks_exact_mut(g.size().max(1)).zip(values.chunks_exact(g.size().max(1)));
        for ((out, plane), grads) in planes.zip(grads.chunks_exact(g.count().max(1))) {
            match self.kind {
                Kind::Max => {
                    for (at, grad) in largest(&g, plane).into_iter().zip(grads).filter(|(at, _)| *at < plane.len()) {
                        out[at] += *grad;
                    }
                }
                Kind::Mean { counts_pads } => {
                    let shares = shares::<T>(&g, counts_pads);
                    let scaled: Vec<T> = grads.iter().zip(shares).map(|(g, share)| *g * share).collect();
                    g.runs(|_, windows, first, step| {
                        let to = out[first..].iter_mut().step_by(step);
                        to.zip(&scaled[windows]).for_each(|(to, g)| *to += *g);
                    });
                }
            }
        }
        Ok(vec![Some(filled(x.shape(), out)?)])
    }
}
