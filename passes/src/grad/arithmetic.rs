//! Arithmetic with broadcasting.

use ndarray::{Axis, IxDyn, Zip};

use super::matmul::broadcast_shape;
use super::real::{dense, map, map_two};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, row};

pub(super) static ROWS: &[Row] = &[
    row("Add", |_| Ok(Box::new(Binary::Add))),
    row("Sub", |_| Ok(Box::new(Binary::Sub))),
    row("Mul", |_| Ok(Box::new(Binary::Mul))),
    row("Div", |_| Ok(Box::new(Binary::Div))),
    row("Pow", |_| Ok(Box::new(Binary::Pow))),
    row("PRelu", |_| Ok(Box::new(Binary::PRelu))),
    row("Where", |_| Ok(Box::new(Where))),
    row("Max", |_| Ok(Box::new(Many::Max))),
    row("Min", |_| Ok(Box::new(Many::Min))),
    row("Sum", |_| Ok(Box::new(Many::Sum))),
    row("Mean", |_| Ok(Box::new(Many::Mean))),
];

/// `array` summed over the axes along which a tensor of `shape` was repeated to its shape.
pub(super) fn reduced_to<T: Real>(array: &Array<T>, shape: &[usize]) -> Result<Array<T>, GradError> {
    if array.shape() == shape {
        return Ok(array.clone());
    }
    let mut sum = dense(array);
    while sum.ndim() > shape.len() {
        sum = leading_sum(&sum);
    }
    for (axis, &size) in shape.iter().enumerate() {
        if size == 1 && sum.shape()[axis] != 1 {
            sum = sum.sum_axis(Axis(axis)).insert_axis(Axis(axis)).into_shared();
        }
    }
    if sum.shape() == shape { Ok(sum) } else { err(format!("a gradient of {:?} for {shape:?}", array.shape())) }
}

/// The sum over the first axis, row after row.
fn leading_sum<T: Real>(array: &Array<T>) -> Array<T> {
    array.sum_axis(Axis(0)).into_shared()
}

/// f of both operands, broadcast.
fn zipped<T: Real>(a: &Array<T>, b: &Array<T>, f: impl Fn(T, T) -> T) -> Result<Array<T>, GradError> {
    let shape = broadcast_shape(a.shape(), b.shape())?;
    let scalar = |array: &Array<T>| (array.len() == 1).then(|| array.iter().next().copied()).flatten();
    if a.shape() == shape
        && let Some(b) = scalar(b)
    {
        return map(a, |a| f(a, b));
    }
    if a.shape() == b.shape() {
        return map_two(a, b, f);
    }
    let fits = "a bug in onnx-quant: operands do not broadcast";
    let a = a.broadcast(IxDyn(&shape)).ok_or_else(|| GradError(fits.into()))?;
    let b = b.broadcast(IxDyn(&shape)).ok_or_else(|| GradError(fits.into()))?;
    let rows = shape.split_last().map_or(1, |(last, rest)| if *last == 0 { 0 } else { rest.iter().product() });
    let mut out = ndarray::ArrayD::<T>::zeros(IxDyn(&shape));
    if rows > 0 {
        Zip::from(&mut out).and(&a).and(&b).for_each(|out, &a, &b| *out = f(a, b));
    }
    Ok(out.into_shared())
}

/// Two operands.
#[derive(Clone, Copy, Debug)]
enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    PRelu,
}

fn power<T: Real>(a: T, b: T) -> T {
    T::of(a.wide().powf(b.wide()))
}

impl<T: Real> Rule<T> for Binary {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (a, b) = (inputs.real(0)?, inputs.real(1)?);
        let out = match self {
            Self::Add => zipped(a, b, |a, b| a + b),
            Self::Sub => zipped(a, b, |a, b| a - b),
            Self::Mul => zipped(a, b, |a, b| a * b),
            Self::Div => zipped(a, b, |a, b| a / b),
            Self::Pow if b.len() == 1 && b.iter().all(|b| *b == T::of(2.0)) => zipped(a, b, |a, _| a * a),
            Self::Pow => zipped(a, b, power),
            Self::PRelu => zipped(a, b, |a, b| if a < T::zero() { a * b } else { a }),
        };
        Ok(vec![out?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (a, b, g) = (call.inputs.real(0)?, call.inputs.real(1)?, call.grad()?);
        let y = call.outputs[0];
        let negative = |x: T| x < T::zero();
        let of_a = || match self {
            Self::Add | Self::Sub => Ok(g.clone()),
            Self::Mul => zipped(g, b, |g, b| g * b),
            Self::Div => zipped(g, b, |g, b| g / b),
            Self::Pow => zipped(g, &zipped(a, b, |a, b| b * power(a, b - T::one()))?, |g, d| g * d),
            Self::PRelu => zipped(g, &zipped(a, b, |a, b| if negative(a) { b } else { T::one() })?, |g, d| g * d),
        };
        let of_b = || match self {
            Self::Add => Ok(g.clone()),
            Self::Sub => Ok(g.map(|g| -*g).into_shared()),
            Self::Mul => zipped(g, a, |g, a| g * a),
            Self::Div => zipped(g, &zipped(y, b, |y, b| -(y / b))?, |g, d| g * d),
            Self::Pow => {
                let log = a.map(|a| if negative(*a) || *a == T::zero() { T::zero() } else { T::of(a.wide().ln()) });
                zipped(g, &zipped(y, &log.into_shared(), |y, l| y * l)?, |g, d| g * d)
            }
            Self::PRelu => zipped(g, a, |g, a| if negative(a) { g * a } else { T::zero() }),
        };
        let left = call.wants(0).then(|| reduced_to(&of_a()?, a.shape())).transpose()?;
        let right = call.wants(1).then(|| reduced_to(&of_b()?, b.shape())).transpose()?;
        Ok(vec![left, right])
    }
}

/// `condition ? a : b`.
#[derive(Debug)]
struct Where;

impl<T: Real> Rule<T> for Where {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (condition, a, b) = (inputs.whole(0)?, inputs.real(1)?, inputs.real(2)?);
        let shape = broadcast_shape(&broadcast_shape(a.shape(), b.shape())?, condition.shape())?;
        let fits = || GradError("operands do not broadcast".into());
        let condition = condition.broadcast(IxDyn(&shape)).ok_or_else(fits)?;
        let (a, b) = (a.broadcast(IxDyn(&shape)).ok_or_else(fits)?, b.broadcast(IxDyn(&shape)).ok_or_else(fits)?);
        let mut out = b.to_owned();
        Zip::from(&mut out).and(&condition).and(&a).for_each(|out, &c, &a| {
            if c != 0 {
                *out = a;
            }
        });
        Ok(vec![out.into_shared()])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (condition, g) = (call.inputs.whole(0)?, call.grad()?);
        let condition =
            condition.broadcast(g.raw_dim()).ok_or_else(|| GradError("a condition does not broadcast".into()))?;
        let kept = |when: bool| {
            let mut kept = g.to_owned();
            Zip::from(&mut kept).and(&condition).for_each(|g, &c| {
                if (c != 0) != when {
                    *g = T::zero();
                }
            });
            kept.into_shared()
        };
        let side = |at: usize, when: bool| -> Result<Option<Array<T>>, GradError> {
            let shape = call.inputs.real(at)?.shape();
            call.wants(at).then(|| reduced_to(&kept(when), shape)).transpose()
        };
        Ok(vec![None, side(1, true)?, side(2, false)?])
    }
}

/// Any number of operands.
#[derive(Clone, Copy, Debug)]
enum Many {
    Max,
    Min,
    Sum,
    Mean,
}

impl<T: Real> Rule<T> for Many {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let mut out = inputs.real(0)?.clone();
        for at in 1..inputs.len() {
            let next = inputs.real(at)?;
            out = match self {
                Self::Max => zipped(&out, next, |a, b| if b > a { b } else { a })?,
                Self::Min => zipped(&out, next, |a, b| if b < a { b } else { a })?,
                Self::Sum | Self::Mean => zipped(&out, next, |a, b| a + b)?,
            };
        }
        if matches!(self, Self::Mean) {
            out *= T::of(1.0 / inputs.len() as f64);
        }
        Ok(vec![out])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (g, y) = (call.grad()?, call.outputs[0]);
        // Of several equal operands the first one is the result.
        let mut open = match self {
            Self::Max | Self::Min | Self::Sum => g.clone(),
            Self::Mean => (g * T::of(1.0 / call.inputs.len() as f64)).into_shared(),
        };
        let mut grads = Vec::new();
        for at in 0..call.inputs.len() {
            let x = call.inputs.real(at)?;
            let mine = match self {
                Self::Sum | Self::Mean => open.clone(),
                Self::Max | Self::Min => {
                    let hit = zipped(x, y, |x, y| if x == y { T::one() } else { T::zero() })?;
                    let mine = zipped(&open, &hit, |g, hit| g * hit)?;
                    open = zipped(&open, &hit, |g, hit| if hit == T::one() { T::zero() } else { g })?;
                    mine
                }
            };
            grads.push(call.wants(at).then(|| reduced_to(&mine, x.shape())).transpose()?);
        }
        Ok(grads)
    }
}
