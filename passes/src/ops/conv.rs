//! Shape rules of convolutions and pooling.

use super::Call;
use crate::ir::{Dim, Node, TensorType};
use crate::tensor::DType;

/// The geometry of one spatial axis.
struct Window {
    kernel: usize,
    stride: usize,
    dilation: usize,
    pads: (usize, usize),
}

impl Window {
    fn of(node: &Node, kernel: usize, axis: usize, n_axes: usize) -> Option<Self> {
        let list = |name: &str, index: usize, default: usize| match node.ints(name) {
            Some(values) => values.get(index).and_then(|&v| usize::try_from(v).ok()),
            None => Some(default),
        };
        Some(Self {
            kernel,
            stride: list("strides", axis, 1).filter(|&s| s > 0)?,
            dilation: list("dilations", axis, 1).filter(|&d| d > 0)?,
            pads: (list("pads", axis, 0)?, list("pads", axis + n_axes, 0)?),
        })
    }

    /// Output extent for an input of `extent`, by ONNX's formula.
    fn slide(&self, extent: usize, auto_pad: &str, ceil: bool) -> Option<usize> {
        let reach = self.dilation.checked_mul(self.kernel.checked_sub(1)?)?.checked_add(1)?;
        if auto_pad.starts_with("SAME") {
            return Some(extent.div_ceil(self.stride));
        }
        let padded =
            if auto_pad == "VALID" { extent } else { extent.checked_add(self.pads.0)?.checked_add(self.pads.1)? };
        let room = padded.checked_sub(reach)?;
        if !ceil {
            return Some(room / self.stride + 1);
        }
        // A window that would start in the padding at the end is dropped.
        let steps = room.div_ceil(self.stride);
        let starts_in_padding = steps.checked_mul(self.stride)? >= extent.checked_add(self.pads.0)?;
        Some(if starts_in_padding { steps } else { steps + 1 })
    }
}

fn slide_all(call: &Call<'_>, input: &[Dim], kernels: &[usize]) -> Option<Vec<Dim>> {
    let auto_pad = call.node.text("auto_pad", "NOTSET");
    let ceil = call.node.int("ceil_mode", 0) != 0;
    let axes = input.len().checked_sub(2).filter(|&n| n == kernels.len())?;
    (0..axes)
        .map(|axis| {
            let window = Window::of(call.node, kernels[axis], axis, axes)?;
            Some(match input[axis + 2].known() {
                Some(extent) => window.slide(extent, auto_pad, ceil).map_or(Dim::Unknown, Dim::Known),
                None => Dim::Unknown,
            })
        })
        .collect()
}

fn kernel_of(call: &Call<'_>, weight: &[Dim]) -> Option<Vec<usize>> {
    match call.node.ints("kernel_shape") {
        Some(kernel) => kernel.iter().map(|&k| usize::try_from(k).ok()).collect(),
        None => weight.get(2..)?.iter().map(Dim::known).collect(),
    }
}

fn conv_shape(call: &Call<'_>) -> Option<Vec<Dim>> {
    let (input, weight) = (call.shape(0)?, call.shape(1)?);
    let unknown = || vec![Dim::Unknown; input.len().saturating_sub(2)];
    let spatial = kernel_of(call, &weight).and_then(|kernel| slide_all(call, &input, &kernel)).unwrap_or_else(unknown);
    Some([input.first()?.clone(), weight.first()?.clone()].into_iter().chain(spatial).collect())
}

pub(super) fn conv(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(call.dtype(0).or(call.dtype(1)), conv_shape(call))]
}

pub(super) fn conv_integer(call: &Call<'_>) -> Vec<TensorType> {
    vec![TensorType::new(Some(DType::I32), conv_shape(call))]
}

pub(super) fn conv_transpose(call: &Call<'_>) -> Vec<TensorType> {
    let shape = (|| {
        let (input, weight) = (call.shape(0)?, call.shape(1)?);
        let groups = usize::try_from(call.node.int("group", 1)).ok()?;
        let channels = weight.get(1)?.known().and_then(|n| n.checked_mul(groups)).map_or(Dim::Unknown, Dim::Known);
        let spatial = vec![Dim::Unknown; input.len().checked_sub(2)?];
        Some([input.first()?.clone(), channels].into_iter().chain(spatial).collect())
    })();
    vec![TensorType::new(call.dtype(0).or(call.dtype(1)), shape)]
}

pub(super) fn pool(call: &Call<'_>) -> Vec<TensorType> {
    let shape = (|| {
        let input = call.shape(0)?;
        let kernel: Vec<usize> =
            call.node.ints("kernel_shape")?.iter().map(|&k| usize::try_from(k).ok()).collect::<Option<_>>()?;
        let spatial = slide_all(call, &input, &kernel)?;
        Some(input[..2].iter().cloned().chain(spatial).collect::<Vec<_>>())
    })();
    vec![TensorType::new(call.dtype(0), shape.clone()), TensorType::new(Some(DType::I64), shape)]
}

pub(super) fn global_pool(call: &Call<'_>) -> Vec<TensorType> {
    let keep = |(axis, dim): (usize, Dim)| if axis < 2 { dim } else { Dim::Known(1) };
    let shape = call.shape(0).map(|shape| shape.into_iter().enumerate().map(keep).collect());
    vec![TensorType::new(call.dtype(0), shape)]
}
