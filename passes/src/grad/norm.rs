//! Normalizations as single operators. Their primitive spellings need no rule of their own.

use super::real::{dense, filled, flat};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, axis, err, microsoft, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[
    row("LayerNormalization", |node| Ok(Box::new(LayerNorm::of(node, true)))),
    row("RMSNormalization", |node| Ok(Box::new(LayerNorm::of(node, false)))),
    row("SimplifiedLayerNormalization", |node| Ok(Box::new(LayerNorm::of(node, false)))),
    microsoft("SimplifiedLayerNormalization", |node| Ok(Box::new(LayerNorm::of(node, false)))),
    row("InstanceNormalization", |node| Ok(Box::new(ChannelNorm { epsilon: epsilon(node), groups: None }))),
    row("BatchNormalization", |node| {
        let trains = node.int("training_mode", 0) != 0 || node.outputs.iter().skip(1).any(Option::is_some);
        if trains { err("BatchNormalization in training mode") } else { Ok(Box::new(BatchNorm(epsilon(node)))) }
    }),
    row("GroupNormalization", |node| {
        let groups = usize::try_from(node.int("num_groups", 1)).ok().filter(|&n| n > 0);
        match groups {
            Some(_) if node.op.opset < 21 => err("GroupNormalization before opset 21, with a scale per group"),
            Some(groups) => Ok(Box::new(ChannelNorm { epsilon: epsilon(node), groups: Some(groups) })),
            None => err("num_groups is not positive"),
        }
    }),
];

fn epsilon(node: &Node) -> f64 {
    f64::from(node.float("epsilon", 1e-5))
}

/// Rows brought to mean 0 (where `centers`) and variance 1: (x − μ) / √(σ² + ε).
fn normalized<T: Real>(row: &mut [T], centers: bool, epsilon: f64) -> T {
    let n = T::of(1.0 / row.len().max(1) as f64);
    if centers {
        let mean = row.iter().copied().sum::<T>() * n;
        row.iter_mut().for_each(|x| *x -= mean);
    }
    let square = row.iter().map(|x| *x * *x).sum::<T>() * n;
    let inverse = T::of(1.0 / (square.wide() + epsilon).sqrt());
    row.iter_mut().for_each(|x| *x *= inverse);
    inverse
}

/// The gradient behind [`normalized`], given the gradient `g` of the normalized `row`.
fn denormalized<T: Real>(g: &mut [T], row: &[T], inverse: T, centers: bool) {
    let n = T::of(1.0 / row.len().max(1) as f64);
    let mean = if centers { g.iter().copied().sum::<T>() * n } else { T::zero() };
    let along = g.iter().zip(row).map(|(g, x)| *g * *x).sum::<T>() * n;
    g.iter_mut().zip(row).for_each(|(g, x)| *g = (*g - mean - *x * along) * inverse);
}

/// Over trailing axes, with a scale and a shift per element of a row.
#[derive(Debug)]
struct LayerNorm {
    axis: i64,
    epsilon: f64,
    centers: bool,
}

impl LayerNorm {
    fn of(node: &Node, centers: bool) -> Self {
        Self { axis: node.int("axis", -1), epsilon: epsilon(node), centers }
    }

    fn width(&self, shape: &[usize]) -> Result<usize, GradError> {
        Ok(shape[axis(self.axis, shape.len())?..].iter().product::<usize>().max(1))
    }
}

/// The `width` elements of a scale or shift.
fn per_element<T: Real>(array: &Array<T>, width: usize) -> Result<Vec<T>, GradError> {
    match array.len() {
        1 => Ok(vec![flat(array)[0]; width]),
        n if n == width => Ok(flat(array).into_owned()),
        n => err(format!("a scale of {n} elements for rows of {width}")),
    }
}

impl<T: Real> Rule<T> for LayerNorm {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = dense(inputs.real(0)?);
        let width = self.width(x.shape())?;
        let scale = per_element(inputs.real(1)?, width)?;
        let shift = inputs.optional(2)?.map(|shift| per_element(shift, width)).transpose()?;
        let mut out = flat(&x).into_owned();
        for row in out.chunks_exact_mut(width) {
            normalized(row, self.centers, self.epsilon);
            row.iter_mut().zip(&scale).for_each(|(x, s)| *x *= *s);
            if let Some(shift) = &shift {
                row.iter_mut().zip(shift).for_each(|(x, s)| *x += *s);
            }
        }
        Ok(vec![filled(x.shape(), out)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, g) = (dense(call.inputs.real(0)?), dense(call.grad()?));
        let width = self.width(x.shape())?;
        let scale = per_element(call.inputs.real(1)?, width)?;
        let (mut out, rows) = (flat(&g).into_owned(), flat(&x));
        let (mut of_scale, mut of_shift) = (vec![T::zero(); width], vec![T::zero(); width]);
        for (g, row) in out.chunks_exact_mut(width).zip(rows.chunks_exact(width)) {
            let mut row = row.to_vec();
            let inverse = normalized(&mut row, self.centers, self.epsilon);
            of_shift.iter_mut().zip(&*g).for_each(|(sum, g)| *sum += *g);
            of_scale.iter_mut().zip(&*g).zip(&row).for_each(|((sum, g), x)| *sum += *g * *x);
            g.iter_mut().zip(&scale).for_each(|(g, s)| *g *= *s);
            denormalized(g, &row, inverse, self.centers);
        }
        let parameter = |at: usize, sums: Vec<T>| -> Result<Option<Array<T>>, GradError> {
            let Some(array) = call.inputs.optional(at)?.filter(|_| call.wants(at)) else { return Ok(None) };
            let sums = if array.len() == width { sums } else { vec![sums.into_iter().sum()] };
            filled(array.shape(), sums).map(Some)
        };
        Ok(vec![Some(filled(x.shape(), out)?), parameter(1, of_scale)?, parameter(2, of_shift)?])
    }
}

/// Over the plane of every channel, or of every group of channels, with a scale and a shift per channel.
#[derive(Debug)]
struct ChannelNorm {
    epsilon: f64,
    groups: Option<usize>,
}

/// Channels, elements per channel, and elements that are normalized together.
struct Plane {
    channels: usize,
    size: usize,
    width: usize,
}

impl ChannelNorm {
    fn plane(&self, shape: &[usize]) -> Result<Plane, GradError> {
        let Some(&channels) = shape.get(1).filter(|&&c| c > 0) else { return err("no channels") };
        let size = shape[2..].iter().product::<usize>().max(1);
        let groups = self.groups.unwrap_or(channels);
        if !channels.is_multiple_of(groups) {
            return err(format!("{channels} channels in {groups} groups"));
        }
        Ok(Plane { channels, size, width: channels / groups * size })
    }
}

impl<T: Real> Rule<T> for ChannelNorm {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = dense(inputs.real(0)?);
        let plane = self.plane(x.shape())?;
        let scale = per_element(inputs.real(1)?, plane.channels)?;
        let shift = per_element(inputs.real(2)?, plane.channels)?;
        let mut out = flat(&x).into_owned();
        for row in out.chunks_exact_mut(plane.width) {
            normalized(row, true, self.epsilon);
        }
        for (i, values) in out.chunks_exact_mut(plane.size).enumerate() {
            let channel = i % plane.channels;
            values.iter_mut().for_each(|x| *x = *x * scale[channel] + shift[channel]);
        }
        Ok(vec![filled(x.shape(), out)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, g) = (dense(call.inputs.real(0)?), dense(call.grad()?));
        let plane = self.plane(x.shape())?;
        let scale = per_element(call.inputs.real(1)?, plane.channels)?;
        let (mut out, mut rows) = (flat(&g).into_owned(), flat(&x).into_owned());
        let inverses: Vec<T> =
            rows.chunks_exact_mut(plane.width).map(|row| normalized(row, true, self.epsilon)).collect();
        let (mut of_scale, mut of_shift) = (vec![T::zero(); plane.channels], vec![T::zero(); plane.channels]);
        for (i, (g, x)) in out.chunks_exact_mut(plane.size).zip(rows.chunks_exact(plane.size)).enumerate() {
            let channel = i % plane.channels;
            of_shift[channel] += g.iter().copied().sum::<T>();
            of_scale[channel] += g.iter().zip(x).map(|(g, x)| *g * *x).sum::<T>();
            g.iter_mut().for_each(|g| *g *= scale[channel]);
        }
        let all = out.chunks_exact_mut(plane.width).zip(rows.chunks_exact(plane.width)).zip(inverses);
        all.for_each(|((g, row), inverse)| denormalized(g, row, inverse, true));
        let parameter = |at: usize, sums: Vec<T>| -> Result<Option<Array<T>>, GradError> {
            call.wants(at).then(|| filled(call.inputs.real(at)?.shape(), sums)).transpose()
        };
        Ok(vec![Some(filled(x.shape(), out)?), parameter(1, of_scale)?, parameter(2, of_shift)?])
    }
}

/// With a mean and a variance per channel that are given, a scale and a shift.
#[derive(Debug)]
struct BatchNorm(f64);

impl BatchNorm {
    /// Per channel what it is multiplied with before the scale, the mean, and the elements of one channel that lie together.
    fn parts<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<(Vec<T>, Vec<T>, usize), GradError> {
        let shape = inputs.real(0)?.shape();
        let Some(&channels) = shape.get(1).filter(|&&c| c > 0) else { return err("no channels") };
        let (mean, variance) = (per_element(inputs.real(3)?, channels)?, per_element(inputs.real(4)?, channels)?);
        let inverse = variance.iter().map(|v| T::of(1.0 / (v.wide() + self.0).sqrt())).collect();
        Ok((inverse, mean, shape[2..].iter().product::<usize>().max(1)))
    }
}

impl<T: Real> Rule<T> for BatchNorm {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (inverse, mean, size) = self.parts(inputs)?;
        let channels = mean.len();
        let (scale, shift) = (per_element(inputs.real(1)?, channels)?, per_element(inputs.real(2)?, channels)?);
        let x = dense(inputs.real(0)?);
        let mut out = flat(&x).into_owned();
        for (i, values) in out.chunks_exact_mut(size).enumerate() {
            let c = i % channels;
            values.iter_mut().for_each(|x| *x = (*x - mean[c]) * inverse[c] * scale[c] + shift[c]);
        }
        Ok(vec![filled(x.shape(), out)?])
    }

    /// Mean and variance are constants of the model: they get none.
    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (inverse, mean, size) = self.parts(&call.inputs)?;
        let channels = mean.len();
        let scale = per_element(call.inputs.real(1)?, channels)?;
        let (x, g) = (dense(call.inputs.real(0)?), dense(call.grad()?));
        let (mut out, rows) = (flat(&g).into_owned(), flat(&x));
        let (mut of_scale, mut of_shift) = (vec![T::zero(); channels], vec![T::zero(); channels]);
        for (i, (g, x)) in out.chunks_exact_mut(size).zip(rows.chunks_exact(size)).enumerate() {
            let c = i % channels;
            of_shift[c] += g.iter().copied().sum::<T>();
            of_scale[c] += g.iter().zip(x).map(|(g, x)| *g * (*x - mean[c]) * inverse[c]).sum::<T>();
            g.iter_mut().for_each(|g| *g = *g * inverse[c] * scale[c]);
        }
        let parameter = |at: usize, sums: Vec<T>| -> Result<Option<Array<T>>, GradError> {
            let Some(array) = call.inputs.optional(at)?.filter(|_| call.wants(at)) else { return Ok(None) };
            let sums = if array.len() == sums.len() { sums } else { vec![sums.into_iter().sum()] };
            filled(array.shape(), sums).map(Some)
        };
        Ok(vec![Some(filled(x.shape(), out)?), parameter(1, of_scale)?, parameter(2, of_shift)?, None, None])
    }
}
