//! Resizing: along every axis, each element of the result is a weighted sum of a few of the input's.

use ndarray::{Axis, IxDyn};

use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, row};
use crate::ir::Node;

pub(super) static ROWS: &[Row] = &[row("Resize", Resize::of), row("Upsample", Resize::of)];

#[derive(Clone, Copy, Debug)]
enum Mode {
    Nearest(Nearest),
    Linear,
}

#[derive(Clone, Copy, Debug)]
enum Nearest {
    HalfDown,
    HalfUp,
    Floor,
    Ceil,
}

#[derive(Clone, Copy, Debug)]
enum Coordinates {
    HalfPixel,
    PyTorchHalfPixel,
    AlignCorners,
    Asymmetric,
}

#[derive(Debug)]
struct Resize {
    mode: Mode,
    coordinates: Coordinates,
    /// The inputs that hold scales and sizes.
    inputs: (usize, usize),
}

/// The input elements that an output element reads along one axis, with their weights.
type Reads = Vec<[(usize, f64); 2]>;

impl Resize {
    fn of(node: &Node) -> Result<Box<dyn super::AnyRule>, GradError> {
        let old = !node.op.is("Resize") || node.op.opset < 11;
        if node.text("keep_aspect_ratio_policy", "stretch") != "stretch" {
            return err("Resize that keeps the aspect ratio");
        }
        if node.ints("axes").is_some() || node.int("antialias", 0) != 0 {
            return err("Resize with axes or antialias");
        }
        let mode = match (node.text("mode", "nearest"), node.text("nearest_mode", "round_prefer_floor")) {
            ("nearest", _) if old => Mode::Nearest(Nearest::Floor),
            ("nearest", "round_prefer_floor") => Mode::Nearest(Nearest::HalfDown),
            ("nearest", "round_prefer_ceil") => Mode::Nearest(Nearest::HalfUp),
            ("nearest", "floor") => Mode::Nearest(Nearest::Floor),
            ("nearest", "ceil") => Mode::Nearest(Nearest::Ceil),
            ("linear", _) => Mode::Linear,
            (mode, _) => return err(format!("Resize by {mode}")),
        };
        let coordinates = match node.text("coordinate_transformation_mode", "half_pixel") {
            _ if old => Coordinates::Asymmetric,
            "half_pixel" => Coordinates::HalfPixel,
            "pytorch_half_pixel" => Coordinates::PyTorchHalfPixel,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            other => return err(format!("Resize with coordinates by {other}")),
        };
        Ok(Box::new(Self { mode, coordinates, inputs: if old { (1, usize::MAX) } else { (2, 3) } }))
    }

    /// For every axis its output size and scale.
    fn sizes<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<Vec<(usize, f64)>, GradError> {
        let shape = inputs.real(0)?.shape();
        if let Some(sizes) = inputs.list(self.inputs.1)?.filter(|sizes| !sizes.is_empty()) {
            let pair = |(&size, &own): (&i64, &usize)| {
                let size = usize::try_from(size).unwrap_or(0);
                (size, size as f64 / own.max(1) as f64)
            };
            return Ok(sizes.iter().zip(shape).map(pair).collect());
        }
        let scales = inputs.optional(self.inputs.0)?.ok_or_else(|| GradError("neither scales nor sizes".into()))?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded by the check below")]
        let pair = |(scale, &own): (&T, &usize)| {
            let size = (own as f64 * scale.wide()).floor();
            (if (0.0..1e9).contains(&size) { size as usize } else { 0 }, scale.wide())
        };
        Ok(scales.iter().zip(shape).map(pair).collect())
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the axis before")]
    fn reads(&self, size: usize, own: usize, scale: f64) -> Reads {
        let last = (own - 1) as f64;
        let at = |i: usize| {
            let i = i as f64;
            let x = match self.coordinates {
                Coordinates::Asymmetric => i / scale,
                Coordinates::PyTorchHalfPixel | Coordinates::AlignCorners if size == 1 => 0.0,
                Coordinates::HalfPixel | Coordinates::PyTorchHalfPixel => (i + 0.5) / scale - 0.5,
                Coordinates::AlignCorners => i * last / (size - 1) as f64,
            };
            match self.mode {
                Mode::Linear => {
                    let x = x.clamp(0.0, last);
                    let below = x.floor();
                    let next = (below + 1.0).min(last);
                    [(below as usize, 1.0 - (x - below)), (next as usize, x - below)]
                }
                Mode::Nearest(how) => {
                    let nearest = match how {
                        Nearest::Floor => x.floor(),
                        Nearest::Ceil => x.ceil(),
                        Nearest::HalfDown => (x - 0.5).ceil(),
                        Nearest::HalfUp => (x + 0.5).floor(),
                    };
                    let place = nearest.clamp(0.0, last) as usize;
                    [(place, 1.0), (place, 0.0)]
                }
            }
        };
        (0..size).map(at).collect()
    }

    /// The reads of every axis that changes.
    fn plan<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<Vec<(usize, Reads)>, GradError> {
        let shape = inputs.real(0)?.shape();
        let sizes = self.sizes(inputs)?;
        let total = crate::tensor::count(&sizes.iter().map(|(size, _)| *size).collect::<Vec<_>>());
        if sizes.len() != shape.len() || shape.contains(&0) || total.is_none_or(|n| n == 0 || n > 1 << 30) {
            return err(format!("Resize of {shape:?} to {sizes:?}"));
        }
        let changes =
            sizes.into_iter().enumerate().filter(|&(i, (size, scale))| size != shape[i] || (scale - 1.0).abs() > 0.0);
        Ok(changes.map(|(i, (size, scale))| (i, self.reads(size, shape[i], scale))).collect())
    }
}

impl<T: Real> Rule<T> for Resize {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let mut x = inputs.real(0)?.clone();
        for (axis, reads) in self.plan(inputs)? {
            let mut shape = x.shape().to_vec();
            shape[axis] = reads.len();
            let mut out = ndarray::ArrayD::<T>::zeros(IxDyn(&shape));
            for (mut row, read) in out.axis_iter_mut(Axis(axis)).zip(&reads) {
                for (from, weight) in read.iter().filter(|(_, weight)| *weight != 0.0) {
                    row.scaled_add(T::of(*weight), &x.index_axis(Axis(axis), *from));
                }
            }
            x = out.into_shared();
        }
        Ok(vec![x])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let mut g = call.grad()?.clone();
        let own = call.inputs.real(0)?.shape();
        for (axis, reads) in self.plan(&call.inputs)?.into_iter().rev() {
            let mut shape = g.shape().to_vec();
            shape[axis] = own[axis];
            let mut out = ndarray::ArrayD::<T>::zeros(IxDyn(&shape));
            for (row, read) in g.axis_iter(Axis(axis)).zip(&reads) {
                for (to, weight) in read.iter().filter(|(_, weight)| *weight != 0.0) {
                    out.index_axis_mut(Axis(axis), *to).scaled_add(T::of(*weight), &row);
                }
            }
            g = out.into_shared();
        }
        Ok(vec![Some(g)])
    }
}
