//! The number types of the tape, and the functions that are worth a vector kernel.

use std::fmt::{Debug, Display};
use std::iter::Sum;

use ndarray::{ArcArray, IxDyn, LinalgScalar, ScalarOperand};
use rten_simd::SimdUnaryOp as _;

use super::{AnyRule, Rule};
use crate::simd::vectorized;

/// A tensor of the tape: shared, copied when written to.
pub type Array<T> = ArcArray<T, IxDyn>;

/// A number type: f32 to work, f64 to check.
pub trait Real:
    LinalgScalar
    + ScalarOperand
    + faer::traits::RealField
    + PartialOrd
    + Default
    + Debug
    + Display
    + Sum
    + Send
    + Sync
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// The nearest number of this type.
    fn of(x: f64) -> Self;
    /// The same number as f64.
    fn wide(self) -> f64;
    /// The elements as f32, in row-major order.
    fn narrowed(array: &Array<Self>) -> Vec<f32>;
    /// The same numbers as this type.
    fn widened(values: Vec<f32>) -> Vec<Self>;
    /// The rule for this type.
    fn rule(rule: &dyn AnyRule) -> &dyn Rule<Self>;
    /// eˣ of every element.
    fn exp_all(xs: &mut [Self]);
    /// 1 / (1 + e⁻ˣ) of every element.
    fn sigmoid_all(xs: &mut [Self]);
    /// tanh x of every element.
    fn tanh_all(xs: &mut [Self]);
    /// The error function of every element.
    fn erf_all(xs: &mut [Self]);
}

impl Real for f32 {
    #[expect(clippy::cast_possible_truncation, reason = "this is the narrowing")]
    fn of(x: f64) -> Self {
        x as Self
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }

    fn narrowed(array: &Array<Self>) -> Vec<f32> {
        flat(array).into_owned()
    }

    fn widened(values: Vec<f32>) -> Vec<Self> {
        values
    }

    fn rule(rule: &dyn AnyRule) -> &dyn Rule<Self> {
        rule
    }

    fn exp_all(xs: &mut [Self]) {
        rten_vecmath::Exp {}.map_mut(xs);
    }

    fn sigmoid_all(xs: &mut [Self]) {
        rten_vecmath::Sigmoid {}.map_mut(xs);
    }

    fn tanh_all(xs: &mut [Self]) {
        rten_vecmath::Tanh {}.map_mut(xs);
    }

    fn erf_all(xs: &mut [Self]) {
        rten_vecmath::Erf {}.map_mut(xs);
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }

    fn wide(self) -> f64 {
        self
    }

    #[expect(clippy::cast_possible_truncation, reason = "this is the narrowing")]
    fn narrowed(array: &Array<Self>) -> Vec<f32> {
        array.iter().map(|x| *x as f32).collect()
    }

    fn widened(values: Vec<f32>) -> Vec<Self> {
        values.into_iter().map(f64::from).collect()
    }

    fn rule(rule: &dyn AnyRule) -> &dyn Rule<Self> {
        rule
    }

    fn exp_all(xs: &mut [Self]) {
        xs.iter_mut().for_each(|x| *x = x.exp());
    }

    fn sigmoid_all(xs: &mut [Self]) {
        xs.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
    }

    fn tanh_all(xs: &mut [Self]) {
        xs.iter_mut().for_each(|x| *x = x.tanh());
    }

    fn erf_all(xs: &mut [Self]) {
        xs.iter_mut().for_each(|x| *x = libm::erf(*x));
    }
}

/// `array` in row-major order, shared where it is already.
pub(super) fn dense<T: Real>(array: &Array<T>) -> Array<T> {
    if array.is_standard_layout() { array.clone() } else { array.as_standard_layout().into_owned().into_shared() }
}

/// The elements of an array in row-major order.
pub(super) fn flat<T: Real>(array: &Array<T>) -> std::borrow::Cow<'_, [T]> {
    match array.as_slice() {
        Some(slice) => std::borrow::Cow::Borrowed(slice),
        None => std::borrow::Cow::Owned(array.iter().copied().collect()),
    }
}

/// An array over `values`, which fill `shape`.
pub(super) fn filled<T: Real>(shape: &[usize], values: Vec<T>) -> Result<Array<T>, super::GradError> {
    Array::from_shape_vec(shape, values).map_err(|error| super::GradError(format!("shape {shape:?}: {error}")))
}

/// f of every element.
pub(super) fn map<T: Real>(array: &Array<T>, f: impl Fn(T) -> T) -> Result<Array<T>, super::GradError> {
    let values = flat(array);
    let mut out = vec![T::zero(); values.len()];
    vectorized(|| out.iter_mut().zip(&*values).for_each(|(out, x)| *out = f(*x)));
    filled(array.shape(), out)
}

/// f of every element of two arrays of one shape.
pub(crate) fn map_two<T: Real>(
    a: &Array<T>,
    b: &Array<T>,
    f: impl Fn(T, T) -> T,
) -> Result<Array<T>, super::GradError> {
    let (x, y) = (flat(a), flat(b));
    let mut out = vec![T::zero(); x.len()];
    vectorized(|| out.iter_mut().zip(&*x).zip(&*y).for_each(|((out, a), b)| *out = f(*a, *b)));
    filled(a.shape(), out)
}

/// `array` with each element replaced by a kernel that works on slices.
pub(super) fn mapped<T: Real>(array: &Array<T>, f: impl Fn(&mut [T])) -> Result<Array<T>, super::GradError> {
    let mut values = flat(array).into_owned();
    f(&mut values);
    filled(array.shape(), values)
}
