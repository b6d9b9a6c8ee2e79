//! Functions of one number.

use super::real::{filled, flat, mapped};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, microsoft, row};
use crate::ir::Node;
use crate::simd::vectorized;

pub(super) static ROWS: &[Row] = &[
    row("Relu", |_| Ok(Box::new(Unary::Relu))),
    row("Sigmoid", |_| Ok(Box::new(Unary::Sigmoid))),
    row("Tanh", |_| Ok(Box::new(Unary::Tanh))),
    row("Erf", |_| Ok(Box::new(Unary::Erf))),
    row("Exp", |_| Ok(Box::new(Unary::Exp))),
    row("Log", |_| Ok(Box::new(Unary::Log))),
    row("Sqrt", |_| Ok(Box::new(Unary::Sqrt))),
    row("Reciprocal", |_| Ok(Box::new(Unary::Reciprocal))),
    row("Neg", |_| Ok(Box::new(Unary::Neg))),
    row("Abs", |_| Ok(Box::new(Unary::Abs))),
    row("Softplus", |_| Ok(Box::new(Unary::Softplus))),
    row("Softsign", |_| Ok(Box::new(Unary::Softsign))),
    row("HardSwish", |_| Ok(Box::new(Unary::HardSwish))),
    row("Mish", |_| Ok(Box::new(Unary::Mish))),
    row("Sin", |_| Ok(Box::new(Unary::Sin))),
    row("Cos", |_| Ok(Box::new(Unary::Cos))),
    row("Identity", |_| Ok(Box::new(Unary::Same))),
    row("Dropout", |_| Ok(Box::new(Unary::Same))),
    row("Gelu", |node| Ok(Box::new(gelu(node)))),
    row("Swish", |node| Ok(Box::new(Unary::Swish(alpha(node, 1.0))))),
    row("LeakyRelu", |node| Ok(Box::new(Unary::LeakyRelu(alpha(node, 0.01))))),
    row("Elu", |node| Ok(Box::new(Unary::Elu(alpha(node, 1.0))))),
    row("Celu", |node| Ok(Box::new(Unary::Celu(alpha(node, 1.0))))),
    row("ThresholdedRelu", |node| Ok(Box::new(Unary::ThresholdedRelu(alpha(node, 1.0))))),
    row("HardSigmoid", |node| Ok(Box::new(Unary::HardSigmoid(alpha(node, 0.2), f64::from(node.float("beta", 0.5)))))),
    row("Cast", |node| match node.int("to", 1) {
        1 | 10 | 11 | 16 => Ok(Box::new(Unary::Same)),
        to => err(format!("Cast to element type {to}")),
    }),
    microsoft("Gelu", |_| Ok(Box::new(Unary::Gelu))),
    microsoft("FastGelu", |node| match node.input(1) {
        Some(_) => err("FastGelu with a bias"),
        None => Ok(Box::new(Unary::GeluTanh)),
    }),
    microsoft("QuickGelu", |node| Ok(Box::new(Unary::Swish(f64::from(node.float("alpha", 1.702)))))),
];

fn alpha(node: &Node, default: f32) -> f64 {
    f64::from(node.float("alpha", default))
}

fn gelu(node: &Node) -> Unary {
    if node.text("approximate", "none") == "tanh" { Unary::GeluTanh } else { Unary::Gelu }
}

#[derive(Clone, Copy, Debug)]
enum Unary {
    Same,
    Relu,
    LeakyRelu(f64),
    Elu(f64),
    Celu(f64),
    ThresholdedRelu(f64),
    Sigmoid,
    HardSigmoid(f64, f64),
    HardSwish,
    /// x · sigmoid(αx).
    Swish(f64),
    Mish,
    Tanh,
    Erf,
    Gelu,
    GeluTanh,
    Exp,
    Log,
    Sqrt,
    Reciprocal,
    Neg,
    Abs,
    Softplus,
    Softsign,
    Sin,
    Cos,
}

/// √(2/π), of the tanh form of GELU.
const TANH_GELU: f64 = 0.797_884_560_802_865_4;
/// 1/√(2π).
const NORMAL: f64 = 0.398_942_280_401_432_7;

fn apply<T: Real>(xs: &[T], f: impl Fn(T) -> T) -> Vec<T> {
    let mut out = vec![T::zero(); xs.len()];
    vectorized(|| out.iter_mut().zip(xs).for_each(|(out, x)| *out = f(*x)));
    out
}

/// f of every element where f is cheap in f64 only.
fn wide<T: Real>(xs: &[T], f: impl Fn(f64) -> f64) -> Vec<T> {
    xs.iter().map(|x| T::of(f(x.wide()))).collect()
}

fn kernel<T: Real>(mut xs: Vec<T>, f: fn(&mut [T])) -> Vec<T> {
    f(&mut xs);
    xs
}

/// tanh(√(2/π) (x + 0.044715 x³)) of every element.
fn inner_tanh<T: Real>(xs: &[T]) -> Vec<T> {
    let (a, b) = (T::of(TANH_GELU), T::of(0.044_715));
    kernel(apply(xs, |x| a * (x + b * x * x * x)), T::tanh_all)
}

/// erf(x / √2) of every element.
fn normal_erf<T: Real>(xs: &[T]) -> Vec<T> {
    kernel(apply(xs, |x| x * T::of(std::f64::consts::FRAC_1_SQRT_2)), T::erf_all)
}

fn sigmoid_of<T: Real>(xs: &[T], alpha: f64) -> Vec<T> {
    kernel(apply(xs, |x| x * T::of(alpha)), T::sigmoid_all)
}

fn tanh_softplus(x: f64) -> f64 {
    x.exp().ln_1p().tanh()
}

impl Unary {
    fn value<T: Real>(self, xs: &[T]) -> Vec<T> {
        let (zero, one) = (T::zero(), T::one());
        let half = T::of(0.5);
        let both = |a: Vec<T>, f: &dyn Fn(T, T) -> T| a.into_iter().zip(xs).map(|(a, x)| f(a, *x)).collect();
        match self {
            Self::Same => xs.to_vec(),
            Self::Relu => apply(xs, |x| if x > zero { x } else { zero }),
            Self::LeakyRelu(a) => apply(xs, |x| if x < zero { T::of(a) * x } else { x }),
            Self::Elu(a) => wide(xs, |x| if x < 0.0 { a * x.exp_m1() } else { x }),
            Self::Celu(a) => wide(xs, |x| if x < 0.0 { a * (x / a).exp_m1() } else { x }),
            Self::ThresholdedRelu(a) => apply(xs, |x| if x > T::of(a) { x } else { zero }),
            Self::Sigmoid => sigmoid_of(xs, 1.0),
            Self::HardSigmoid(a, b) => wide(xs, |x| (a * x + b).clamp(0.0, 1.0)),
            Self::HardSwish => wide(xs, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
            Self::Swish(a) => both(sigmoid_of(xs, a), &|s, x| s * x),
            Self::Mish => wide(xs, |x| x * tanh_softplus(x)),
            Self::Tanh => kernel(xs.to_vec(), T::tanh_all),
            Self::Erf => kernel(xs.to_vec(), T::erf_all),
            Self::Gelu => both(normal_erf(xs), &|e, x| half * x * (one + e)),
            Self::GeluTanh => both(inner_tanh(xs), &|t, x| half * x * (one + t)),
            Self::Exp => kernel(xs.to_vec(), T::exp_all),
            Self::Log => wide(xs, f64::ln),
            Self::Sqrt => wide(xs, f64::sqrt),
            Self::Reciprocal => apply(xs, |x| one / x),
            Self::Neg => apply(xs, |x| -x),
            Self::Abs => apply(xs, |x| if x < zero { -x } else { x }),
            Self::Softplus => wide(xs, |x| x.max(0.0) + (-x.abs()).exp().ln_1p()),
            Self::Softsign => wide(xs, |x| x / (1.0 + x.abs())),
            Self::Sin => wide(xs, f64::sin),
            Self::Cos => wide(xs, f64::cos),
        }
    }

    /// The derivative at every x, where y is the value.
    fn slope<T: Real>(self, xs: &[T], ys: &[T]) -> Vec<T> {
        let (zero, one) = (T::zero(), T::one());
        let half = T::of(0.5);
        let step = |x: T, below: T, above: T| if x < zero { below } else { above };
        let of_y = |f: &dyn Fn(T) -> T| ys.iter().map(|y| f(*y)).collect();
        let both = |a: Vec<T>, f: &dyn Fn(T, T) -> T| a.into_iter().zip(xs).map(|(a, x)| f(a, *x)).collect();
        let density = |scale: f64, sharpness: f64| {
            kernel(apply(xs, |x| -(x * x) * T::of(sharpness)), T::exp_all)
                .into_iter()
                .map(|e| e * T::of(scale))
                .collect()
        };
        match self {
            Self::Same => vec![one; xs.len()],
            Self::Relu => apply(xs, |x| if x > zero { one } else { zero }),
            Self::LeakyRelu(a) => apply(xs, |x| step(x, T::of(a), one)),
            Self::Elu(a) => wide(xs, |x| if x < 0.0 { a * x.exp() } else { 1.0 }),
            Self::Celu(a) => wide(xs, |x| if x < 0.0 { (x / a).exp() } else { 1.0 }),
            Self::ThresholdedRelu(a) => apply(xs, |x| if x > T::of(a) { one } else { zero }),
            Self::Sigmoid => of_y(&|y| y * (one - y)),
            Self::HardSigmoid(a, b) => wide(xs, |x| if (0.0..=1.0).contains(&(a * x + b)) { a } else { 0.0 }),
            Self::HardSwish => wide(xs, |x| {
                if x <= -3.0 {
                    0.0
                } else if x >= 3.0 {
                    1.0
                } else {
                    x / 3.0 + 0.5
                }
            }),
            Self::Swish(a) => both(sigmoid_of(xs, a), &|s, x| s + T::of(a) * x * s * (one - s)),
            Self::Mish => wide(xs, |x| {
                let t = tanh_softplus(x);
                t + x * (1.0 - t * t) / (1.0 + (-x).exp())
            }),
            Self::Tanh => of_y(&|y| one - y * y),
            Self::Erf => density(std::f64::consts::FRAC_2_SQRT_PI, 1.0),
            Self::Gelu => {
                let density: Vec<T> = density(NORMAL, 0.5);
                let erf = normal_erf(xs);
                let at = |((e, d), x): ((T, T), &T)| half * (one + e) + *x * d;
                erf.into_iter().zip(density).zip(xs).map(at).collect()
            }
            Self::GeluTanh => both(inner_tanh(xs), &|t, x| {
                let inner = T::of(TANH_GELU) * (one + T::of(3.0 * 0.044_715) * x * x);
                half * (one + t) + half * x * (one - t * t) * inner
            }),
            Self::Exp => ys.to_vec(),
            Self::Log => apply(xs, |x| one / x),
            Self::Sqrt => of_y(&|y| half / y),
            Self::Reciprocal => of_y(&|y| -(y * y)),
            Self::Neg => vec![-one; xs.len()],
            Self::Abs => apply(xs, |x| if x > zero { one } else { step(x, -one, zero) }),
            Self::Softplus => sigmoid_of(xs, 1.0),
            Self::Softsign => wide(xs, |x| (1.0 + x.abs()).powi(-2)),
            Self::Sin => wide(xs, f64::cos),
            Self::Cos => wide(xs, |x| -x.sin()),
        }
    }
}

impl<T: Real> Rule<T> for Unary {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = inputs.real(0)?;
        if matches!(self, Self::Same) {
            return Ok(vec![x.clone()]);
        }
        Ok(vec![filled(x.shape(), self.value(&flat(x)))?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, g) = (call.inputs.real(0)?, call.grad()?);
        if matches!(self, Self::Same) {
            return Ok(vec![Some(g.clone())]);
        }
        let slope = self.slope(&flat(x), &flat(call.outputs[0]));
        let grad = mapped(g, |g| g.iter_mut().zip(&slope).for_each(|(g, s)| *g *= *s))?;
        Ok(vec![Some(grad)])
    }
}
