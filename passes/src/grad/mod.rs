//! Gradients through float graphs: a tape of operators, each with its vector-Jacobian product.
//!
//! A [`Tape`] is a static program over slots: nodes of a graph, and whatever steps its maker puts between them (rounding with a
//! straight-through gradient, for one). [`Tape::forward`] runs it on one sample, [`Tape::backward`] takes gradients from
//! outputs to the slots that want them. Samples are independent, so callers run them side by side; a tape itself runs on one
//! thread.
//!
//! Every operator is one [`Rule`], and every rule one row of [`RULES`]. An operator without a row is a boundary for whoever
//! cuts the graph, not a failure. Rules are generic over the number type: models run in f32, and tests compare every
//! vector-Jacobian product with central differences in f64.

mod arithmetic;
#[cfg(test)]
mod check;
mod clip;
mod conv;
pub(crate) mod gemm;
mod join;
mod matmul;
mod movement;
mod norm;
mod pool;
mod real;
mod reduce;
mod resize;
mod softmax;
mod tape;
mod unary;
mod window;

use std::fmt::Debug;

use crate::ir::Node;
pub(crate) use real::map_two;
pub use real::{Array, Real};
#[cfg(test)]
pub(crate) use tape::tests::tape_of_sums;
pub use tape::{Sizes, Slot, Tape, Values};

/// What flows through a tape: numbers that have gradients, or whole numbers (shapes, indices, conditions) that have none.
#[derive(Clone, Debug)]
pub enum Value<T> {
    /// Numbers.
    Real(Array<T>),
    /// Whole numbers; conditions are 0 and 1.
    Whole(Array<i64>),
}

impl<T: Real> Value<T> {
    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Real(array) => array.shape(),
            Self::Whole(array) => array.shape(),
        }
    }
}

/// Why a rule cannot run or a node has none: one phrase.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GradError(pub String);

/// For phrases made on the spot.
fn err<T>(problem: impl Into<String>) -> Result<T, GradError> {
    Err(GradError(problem.into()))
}

/// The inputs of one call of a rule.
#[derive(Debug)]
pub struct Inputs<'a, T>(Vec<Option<&'a Value<T>>>);

impl<'a, T: Real> Inputs<'a, T> {
    /// The numbers at `at`.
    pub(crate) fn real(&self, at: usize) -> Result<&'a Array<T>, GradError> {
        match self.0.get(at) {
            Some(Some(Value::Real(array))) => Ok(array),
            _ => err(format!("input {at} holds no real numbers")),
        }
    }

    /// The numbers at `at`, where that input is given.
    pub(crate) fn optional(&self, at: usize) -> Result<Option<&'a Array<T>>, GradError> {
        if self.given(at) { self.real(at).map(Some) } else { Ok(None) }
    }

    /// The whole numbers at `at`, flat.
    pub(crate) fn whole(&self, at: usize) -> Result<&'a Array<i64>, GradError> {
        match self.0.get(at) {
            Some(Some(Value::Whole(array))) => Ok(array),
            _ => err(format!("input {at} holds no whole numbers")),
        }
    }

    /// The list of whole numbers at `at`, where that input is given.
    pub(crate) fn list(&self, at: usize) -> Result<Option<Vec<i64>>, GradError> {
        if self.given(at) { Ok(Some(self.whole(at)?.iter().copied().collect())) } else { Ok(None) }
    }

    pub(crate) fn given(&self, at: usize) -> bool {
        matches!(self.0.get(at), Some(Some(_)))
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// What the vector-Jacobian product of one call may look at.
#[derive(Debug)]
pub struct Call<'a, T> {
    pub(crate) inputs: Inputs<'a, T>,
    /// What forward returned.
    pub(crate) outputs: Vec<&'a Array<T>>,
    /// The gradient of every output; `None` where nobody asked.
    grads: Vec<Option<&'a Array<T>>>,
    /// The inputs whose gradients are wanted.
    wanted: &'a [bool],
}

impl<'a, T: Real> Call<'a, T> {
    /// The gradient of the only output that carries one.
    pub(crate) fn grad(&self) -> Result<&'a Array<T>, GradError> {
        self.grads.first().copied().flatten().ok_or_else(|| GradError("no gradient arrived".into()))
    }

    pub(crate) fn wants(&self, at: usize) -> bool {
        self.wanted.get(at).copied().unwrap_or(false)
    }
}

/// The gradient of every input, in order; `None` for those that have none or are not wanted.
pub type Grads<T> = Vec<Option<Array<T>>>;

/// One operator: its value, and the product of a gradient with its Jacobian.
pub trait Rule<T: Real>: Debug + Send + Sync {
    /// The outputs.
    ///
    /// # Errors
    /// [`GradError`] for inputs that do not fit.
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError>;
    /// The gradients of the inputs, given those of the outputs.
    ///
    /// # Errors
    /// [`GradError`], as for [`Self::forward`].
    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError>;
    /// The most bytes that a call takes for itself, beside what it reads and returns.
    fn aside(&self, _inputs: &Inputs<'_, T>) -> u64 {
        0
    }
}

/// A rule for every number type.
pub trait AnyRule: Rule<f32> + Rule<f64> {}

impl<R: Rule<f32> + Rule<f64>> AnyRule for R {}

/// Makes the rule of a node from its attributes; the phrase of [`GradError`] says what of the operator is not supported.
type Build = fn(&Node) -> Result<Box<dyn AnyRule>, GradError>;

/// An operator that gradients pass: domain, name, maker.
#[derive(Debug)]
pub struct Row {
    domain: &'static str,
    op: &'static str,
    build: Build,
}

const fn row(op: &'static str, build: Build) -> Row {
    Row { domain: "", op, build }
}

const fn microsoft(op: &'static str, build: Build) -> Row {
    Row { domain: "com.microsoft", op, build }
}

/// Every family of operators.
pub static RULES: &[&[Row]] = &[
    arithmetic::ROWS,
    clip::ROWS,
    conv::ROWS,
    join::ROWS,
    matmul::ROWS,
    movement::ROWS,
    norm::ROWS,
    pool::ROWS,
    reduce::ROWS,
    resize::ROWS,
    softmax::ROWS,
    unary::ROWS,
];

/// The rule of `node`.
///
/// # Errors
/// [`GradError`] where gradients do not pass it, with the reason.
pub fn rule(node: &Node) -> Result<Box<dyn AnyRule>, GradError> {
    let is = |row: &&Row| row.op == &*node.op.name && row.domain == &*node.op.domain;
    match RULES.iter().flat_map(|rows| rows.iter()).find(is) {
        Some(row) => (row.build)(node),
        None => err(format!("{} has no gradient rule", node.op.display())),
    }
}

/// The tensor behind a value of `graph` as a tape holds it; `None` for types that it does not hold.
pub fn value_of(tensor: &crate::tensor::Tensor) -> Option<Value<f32>> {
    use crate::tensor::DType;
    let shape = tensor.shape();
    let real = |values: Vec<f32>| Some(Value::Real(Array::from_shape_vec(shape, values).ok()?));
    match tensor.dtype() {
        DType::F32 | DType::F16 | DType::Bf16 => real(tensor.floats()?.into_owned()),
        DType::Bool => {
            let bits = tensor.bytes().iter().map(|&byte| i64::from(byte != 0)).collect();
            Some(Value::Whole(Array::from_shape_vec(shape, bits).ok()?))
        }
        _ => Some(Value::Whole(Array::from_shape_vec(shape, tensor.integers()?).ok()?)),
    }
}

/// The opset of `node` says that axes and the like are inputs from this version on.
fn attribute_or_input<T: Real>(
    attribute: Option<&Vec<i64>>,
    inputs: &Inputs<'_, T>,
    at: usize,
) -> Result<Option<Vec<i64>>, GradError> {
    match attribute {
        Some(list) => Ok(Some(list.clone())),
        None => inputs.list(at),
    }
}

/// `axis` counted from the front.
fn axis(axis: i64, rank: usize) -> Result<usize, GradError> {
    let from_front = if axis < 0 { axis.saturating_add_unsigned(rank as u64) } else { axis };
    match usize::try_from(from_front) {
        Ok(axis) if axis < rank => Ok(axis),
        _ => err(format!("axis {axis} of a tensor with {rank} axes")),
    }
}

/// The list attribute `name`.
fn ints(node: &Node, name: &str) -> Option<Vec<i64>> {
    node.ints(name).map(<[i64]>::to_vec)
}
