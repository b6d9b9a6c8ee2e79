//! Matrix products.

use ndarray::IxDyn;

use super::arithmetic::reduced_to;
use super::gemm::{Matrix, multiply};
use super::real::{dense, filled};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] =
    &[row("MatMul", |_| Ok(Box::new(MatMul))), row("Gemm", |node| Ok(Box::new(Gemm::of(node))))];

#[derive(Debug)]
struct MatMul;

/// A product as a batch of matrix products.
struct Batched {
    m: usize,
    k: usize,
    n: usize,
    /// For every product, which matrix of either operand it reads.
    pairs: Vec<(usize, usize)>,
    shape: Vec<usize>,
}

impl Batched {
    fn of(a: &[usize], b: &[usize]) -> Result<Self, GradError> {
        if a.is_empty() || b.is_empty() {
            return err("a product with a scalar");
        }
        let (m, k) = if a.len() == 1 { (1, a[0]) } else { (a[a.len() - 2], a[a.len() - 1]) };
        let (k_too, n) = if b.len() == 1 { (b[0], 1) } else { (b[b.len() - 2], b[b.len() - 1]) };
        if k != k_too {
            return err(format!("shapes {a:?} and {b:?} do not multiply"));
        }
        let (left, right) = (&a[..a.len().saturating_sub(2)], &b[..b.len().saturating_sub(2)]);
        if right.iter().all(|&d| d == 1) && right.len() <= left.len() && b.len() >= 2 && a.len() >= 2 {
            // One matrix on the right: all rows of the left at once.
            let rows = left.iter().product::<usize>() * m;
            let shape = left.iter().copied().chain([m, n]).collect();
            return Ok(Self { m: rows, k, n, pairs: vec![(0, 0)], shape });
        }
        let batch = broadcast_shape(left, right)?;
        let count = batch.iter().product();
        let pairs = (0..count).map(|i| (place(i, &batch, left), place(i, &batch, right))).collect();
        let mut shape = batch.clone();
        shape.extend((a.len() > 1).then_some(m));
        shape.extend((b.len() > 1).then_some(n));
        Ok(Self { m, k, n, pairs, shape })
    }
}

/// The shape that `a` and `b` broadcast to.
pub(super) fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>, GradError> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |i| shape[i]);
    let dim = |i: usize| match (at(a, i), at(b, i)) {
        (x, y) if x == y => Ok(x),
        (1, y) => Ok(y),
        (x, 1) => Ok(x),
        _ => err(format!("shapes {a:?} and {b:?} do not broadcast")),
    };
    (0..rank).map(dim).collect()
}

/// Which element of a tensor of `shape` element `index` of the broadcast `batch` reads.
fn place(index: usize, batch: &[usize], shape: &[usize]) -> usize {
    let (mut rest, mut at, mut stride) = (index, 0, 1);
    for (i, &d) in batch.iter().enumerate().rev() {
        let coordinate = rest % d;
        rest /= d;
        if let Some(own) = (i + shape.len()).checked_sub(batch.len()).map(|i| shape[i]) {
            at += if own == 1 { 0 } else { coordinate * stride };
            stride *= own;
        }
    }
    at
}

fn slice<T: Real>(array: &Array<T>) -> Result<&[T], GradError> {
    array.as_slice().ok_or_else(|| GradError("a bug in onnx-quant: a matrix is not dense".into()))
}

impl<T: Real> Rule<T> for MatMul {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (a, b) = (dense(inputs.real(0)?), dense(inputs.real(1)?));
        let Batched { m, k, n, pairs, shape, .. } = Batched::of(a.shape(), b.shape())?;
        let (x, y) = (slice(&a)?, slice(&b)?);
        let mut out = vec![T::zero(); pairs.len() * m * n];
        for ((i, j), out) in pairs.into_iter().zip(out.chunks_exact_mut((m * n).max(1))) {
            let left = Matrix::new(&x[i * m * k..][..m * k], m, k);
            multiply(out, left, Matrix::new(&y[j * k * n..][..k * n], k, n), false);
        }
        Ok(vec![filled(&shape, out)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (a, b, g) = (dense(call.inputs.real(0)?), dense(call.inputs.real(1)?), dense(call.grad()?));
        let Batched { m, k, n, pairs, .. } = Batched::of(a.shape(), b.shape())?;
        let (x, y, g) = (slice(&a)?, slice(&b)?, slice(&g)?);
        let products = || pairs.iter().zip(g.chunks_exact((m * n).max(1)));
        let left = call.wants(0).then(|| {
            let mut sum = vec![T::zero(); a.len()];
            for (&(i, j), g) in products() {
                let right = Matrix::new(&y[j * k * n..][..k * n], k, n);
                multiply(&mut sum[i * m * k..][..m * k], Matrix::new(g, m, n), right.t(), true);
            }
            filled(a.shape(), sum)
        });
        let right = call.wants(1).then(|| {
            let mut sum = vec![T::zero(); b.len()];
            for (&(i, j), g) in products() {
                let left = Matrix::new(&x[i * m * k..][..m * k], m, k);
                multiply(&mut sum[j * k * n..][..k * n], left.t(), Matrix::new(g, m, n), true);
            }
            filled(b.shape(), sum)
        });
        let (left, right) = (left.transpose()?, right.transpose()?);
        Ok(vec![left, right])
    }
}

/// `alpha · A B + beta · C`, with A and B possibly transposed.
#[derive(Debug)]
struct Gemm {
    alpha: f64,
    beta: f64,
    turned: (bool, bool),
}

impl Gemm {
    fn of(node: &Node) -> Self {
        Self {
            alpha: f64::from(node.float("alpha", 1.0)),
            beta: f64::from(node.float("beta", 1.0)),
            turned: (node.int("transA", 0) != 0, node.int("transB", 0) != 0),
        }
    }
}

impl Gemm {
    fn scale<T: Real>(&self, product: &mut Array<T>) {
        if (self.alpha - 1.0).abs() > 0.0 {
            *product *= T::of(self.alpha);
        }
    }
}

fn matrix<T: Real>(array: &Array<T>) -> Result<Matrix<'_, T>, GradError> {
    match array.shape() {
        [rows, columns] => Ok(Matrix::new(slice(array)?, *rows, *columns)),
        shape => err(format!("a Gemm of shape {shape:?}")),
    }
}

fn read<T: Real>(matrix: Matrix<'_, T>, turned: bool) -> Matrix<'_, T> {
    if turned { matrix.t() } else { matrix }
}

impl<T: Real> Rule<T> for Gemm {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (a, b) = (dense(inputs.real(0)?), dense(inputs.real(1)?));
        let (x, y) = (read(matrix(&a)?, self.turned.0), read(matrix(&b)?, self.turned.1));
        let rows = a.shape()[usize::from(self.turned.0)];
        let (inner, columns) = (b.shape()[usize::from(self.turned.1)], b.shape()[1 - usize::from(self.turned.1)]);
        if a.shape()[1 - usize::from(self.turned.0)] != inner {
            return err(format!("shapes {:?} and {:?} do not multiply", a.shape(), b.shape()));
        }
        let mut out = vec![T::zero(); rows * columns];
        multiply(&mut out, x, y, false);
        let mut out = filled(&[rows, columns], out)?;
        self.scale(&mut out);
        if let Some(c) = inputs.optional(2)? {
            let c = c.broadcast(IxDyn(&[rows, columns])).ok_or_else(|| GradError("C does not broadcast".into()))?;
            out.scaled_add(T::of(self.beta), &c);
        }
        Ok(vec![out])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (a, b, g) = (dense(call.inputs.real(0)?), dense(call.inputs.real(1)?), dense(call.grad()?));
        let mut scaled = g.clone();
        self.scale(&mut scaled);
        let (x, y, s) = (read(matrix(&a)?, self.turned.0), read(matrix(&b)?, self.turned.1), matrix(&scaled)?);
        let product = |of: &Array<T>, left: Matrix<'_, T>, right: Matrix<'_, T>, turned: bool| {
            let mut into = vec![T::zero(); of.len()];
            let (left, right) = if turned { (right.t(), left.t()) } else { (left, right) };
            multiply(&mut into, left, right, false);
            filled(of.shape(), into)
        };
        let of_a = call.wants(0).then(|| product(&a, s, y.t(), self.turned.0)).transpose()?;
        let of_b = call.wants(1).then(|| product(&b, x.t(), s, self.turned.1)).transpose()?;
        let c = call.inputs.optional(2)?.filter(|_| call.wants(2));
        let of_c = c.map(|c| reduced_to(&(&g * T::of(self.beta)).into_shared(), c.shape())).transpose()?;
        Ok(vec![of_a, of_b, of_c])
    }
}
