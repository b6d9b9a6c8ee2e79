//! Softmax and its logarithm.

use ndarray::Axis;

use super::real::{dense, filled, flat};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, axis, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[
    row("Softmax", |node| Ok(Box::new(Softmax::of(node, false)))),
    row("LogSoftmax", |node| Ok(Box::new(Softmax::of(node, true)))),
];

#[derive(Debug)]
struct Softmax {
    axis: i64,
    log: bool,
    /// Before opset 13 all axes from this one on are one.
    flattens: bool,
}

impl Softmax {
    fn of(node: &Node, log: bool) -> Self {
        let flattens = node.op.opset < 13;
        Self { axis: node.int("axis", if flattens { 1 } else { -1 }), log, flattens }
    }

    /// Runs `f` on rows over the axis of `arrays`, the first of which is replaced.
    fn rows<T: Real>(&self, arrays: &[&Array<T>], f: impl Fn(&mut [T], &[&[T]])) -> Result<Array<T>, GradError> {
        let shape = arrays[0].shape().to_vec();
        let at = axis(self.axis, shape.len())?;
        let last = shape.len() - 1;
        let moves = !self.flattens && at != last;
        let turned = |array: &Array<T>| {
            let mut array = array.clone();
            if moves {
                array.swap_axes(at, last);
            }
            dense(&array)
        };
        let width = if self.flattens { shape[at..].iter().product() } else { shape[at] };
        let arrays: Vec<Array<T>> = arrays.iter().map(|array| turned(array)).collect();
        let mut out = flat(&arrays[0]).into_owned();
        let others: Vec<_> = arrays[1..].iter().map(flat).collect();
        for (i, row) in out.chunks_exact_mut(width.max(1)).enumerate() {
            let rest: Vec<&[T]> = others.iter().map(|other| &other[i * width..][..width]).collect();
            f(row, &rest);
        }
        let mut out = filled(arrays[0].shape(), out)?;
        if moves {
            out.swap_axes(at, last);
            out = dense(&out);
        }
        debug_assert_eq!(out.len_of(Axis(last)), shape[last]);
        Ok(out)
    }
}

impl<T: Real> Rule<T> for Softmax {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let out = self.rows(&[inputs.real(0)?], |row, _| {
            let top = row.iter().copied().fold(T::of(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
            let top = if top.wide().is_finite() { top } else { T::zero() };
            row.iter_mut().for_each(|x| *x -= top);
            let shifted = self.log.then(|| row.to_vec());
            T::exp_all(row);
            let sum = row.iter().copied().sum::<T>();
            if let Some(shifted) = shifted {
                let log = T::of(sum.wide().ln());
                row.iter_mut().zip(shifted).for_each(|(x, s)| *x = s - log);
            } else {
                let scale = T::one() / sum;
                row.iter_mut().for_each(|x| *x *= scale);
            }
        })?;
        Ok(vec![out])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let grad = self.rows(&[call.grad()?, call.outputs[0]], |g, rest| {
            let y = rest[0];
            if self.log {
                let sum = g.iter().copied().sum::<T>();
                let mut p = y.to_vec();
                T::exp_all(&mut p);
                g.iter_mut().zip(p).for_each(|(g, p)| *g -= p * sum);
            } else {
                let dot = g.iter().zip(y).map(|(g, y)| *g * *y).sum::<T>();
                g.iter_mut().zip(y).for_each(|(g, y)| *g = (*g - dot) * *y);
            }
        })?;
        Ok(vec![Some(grad)])
    }
}
