//! Tensors put together and cut apart.

use ndarray::Axis;

use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, attribute_or_input, axis, err, ints, row};

pub(super) static ROWS: &[Row] = &[
    row("Concat", |node| Ok(Box::new(Concat(node.int("axis", 0))))),
    row("Split", |node| {
        Ok(Box::new(Split { axis: node.int("axis", 0), sizes: ints(node, "split"), parts: node.outputs.len() }))
    }),
];

#[derive(Debug)]
struct Concat(i64);

impl<T: Real> Rule<T> for Concat {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let parts = (0..inputs.len()).map(|i| Ok(inputs.real(i)?.view())).collect::<Result<Vec<_>, GradError>>()?;
        let at = axis(self.0, parts.first().map_or(0, ndarray::ArrayViewD::ndim))?;
        let whole = ndarray::concatenate(Axis(at), &parts).map_err(|error| GradError(error.to_string()))?;
        Ok(vec![if whole.is_standard_layout() { whole } else { whole.as_standard_layout().into_owned() }.into_shared()])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let g = call.grad()?;
        let at = axis(self.0, g.ndim())?;
        let mut from = 0;
        let mut grads = Vec::new();
        for i in 0..call.inputs.len() {
            let size = call.inputs.real(i)?.shape()[at];
            grads.push(call.wants(i).then(|| part(g, at, from, size)));
            from += size;
        }
        Ok(grads)
    }
}

/// `size` indices of axis `at` from `from` on.
fn part<T: Real>(array: &Array<T>, at: usize, from: usize, size: usize) -> Array<T> {
    array.slice_axis(Axis(at), ndarray::Slice::from(from..from + size)).to_owned().into_shared()
}

#[derive(Debug)]
struct Split {
    axis: i64,
    sizes: Option<Vec<i64>>,
    parts: usize,
}

impl Split {
    fn sizes<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<(usize, Vec<usize>), GradError> {
        let shape = inputs.real(0)?.shape();
        let at = axis(self.axis, shape.len())?;
        // The last part is smaller where the axis does not divide.
        let each = shape[at].div_ceil(self.parts.max(1));
        let even = || (0..self.parts).map(|i| each.min(shape[at].saturating_sub(i * each))).collect();
        let given = attribute_or_input(self.sizes.as_ref(), inputs, 1)?;
        let narrow = |size: &i64| usize::try_from(*size).unwrap_or(usize::MAX);
        let sizes: Vec<usize> = given.map_or_else(even, |sizes| sizes.iter().map(narrow).collect());
        match sizes.iter().try_fold(0_usize, |sum, &size| sum.checked_add(size)) {
            Some(sum) if sum == shape[at] => Ok((at, sizes)),
            _ => err(format!("parts of {sizes:?} out of {}", shape[at])),
        }
    }
}

impl<T: Real> Rule<T> for Split {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (at, sizes) = self.sizes(inputs)?;
        let x = inputs.real(0)?;
        let starts = sizes.iter().scan(0, |sum, &size| Some(std::mem::replace(sum, *sum + size)));
        Ok(starts.zip(&sizes).map(|(from, &size)| part(x, at, from, size)).collect())
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (at, sizes) = self.sizes(&call.inputs)?;
        let x = call.inputs.real(0)?;
        let mut grad = ndarray::ArrayD::<T>::zeros(x.raw_dim());
        let mut from = 0;
        for (g, &size) in call.grads.iter().zip(&sizes) {
            if let Some(g) = g {
                grad.slice_axis_mut(Axis(at), ndarray::Slice::from(from..from + size)).assign(g);
            }
            from += size;
        }
        Ok(vec![Some(grad.into_shared())])
    }
}
