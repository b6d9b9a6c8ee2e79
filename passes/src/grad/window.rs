//! Windows over a line or a plane: where every tap of a kernel reads.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use super::{GradError, Real, err, ints};
use crate::ir::Node;

/// What a node says about its windows.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    kernel: Option<Vec<i64>>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    pads: Vec<i64>,
    auto_pad: String,
    ceil: bool,
    output_padding: Vec<i64>,
    output_shape: Option<Vec<i64>>,
}

/// Windows over an input of a known size, a line being a plane of height 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Before the first row and the first column.
    pads: [usize; 2],
    /// What windows lie on.
    pub(super) plane: [usize; 2],
    /// How many windows there are.
    pub(super) windows: [usize; 2],
}

/// Strides, pads and sizes from here on are no geometry that a model was trained with.
const MAX: i64 = 1 << 20;

impl Windows {
    pub(super) fn of(node: &Node) -> Self {
        let list = |name: &str| ints(node, name).unwrap_or_default();
        Self {
            kernel: ints(node, "kernel_shape"),
            strides: list("strides"),
            dilations: list("dilations"),
            pads: list("pads"),
            auto_pad: node.text("auto_pad", "NOTSET").to_owned(),
            ceil: node.int("ceil_mode", 0) != 0,
            output_padding: list("output_padding"),
            output_shape: ints(node, "output_shape"),
        }
    }

    fn at(list: &[i64], i: usize, default: i64) -> Result<i64, GradError> {
        match list.get(i).copied().unwrap_or(default) {
            value if (0..MAX).contains(&value) => Ok(value),
            value => err(format!("{value} in the geometry of a window")),
        }
    }

    /// Kernel, stride and dilation of spatial axis `i`, the two last at least 1.
    fn steps(&self, i: usize, kernel: &[usize]) -> Result<[i64; 3], GradError> {
        let kernel = Self::at(&kernel.iter().map(|&k| k.try_into().unwrap_or(MAX)).collect::<Vec<_>>(), i, 1)?;
        let (stride, dilation) = (Self::at(&self.strides, i, 1)?, Self::at(&self.dilations, i, 1)?);
        if kernel == 0 || stride == 0 || dilation == 0 {
            err("a window of size or stride 0")
        } else {
            Ok([kernel, stride, dilation])
        }
    }

    /// The kernel of a pooling.
    pub(super) fn kernel(&self) -> Result<Vec<usize>, GradError> {
        let kernel = self.kernel.as_ref().ok_or_else(|| GradError("no kernel_shape".into()))?;
        kernel.iter().map(|&k| usize::try_from(k).map_err(|_| GradError(format!("a kernel of {k}")))).collect()
    }

    /// Windows of `kernel` over an input whose spatial sizes are `sizes`.
    pub(super) fn over(&self, sizes: &[usize], kernel: &[usize]) -> Result<Geometry, GradError> {
        let rank = spatial(sizes, kernel)?;
        let mut g = Geometry::unit();
        for (i, &size) in sizes.iter().enumerate() {
            let [k, stride, dilation] = self.steps(i, kernel)?;
            let size = i64::try_from(size).unwrap_or(MAX);
            let span = dilation * (k - 1) + 1;
            let (before, after) = match &*self.auto_pad {
                "NOTSET" => (Self::at(&self.pads, i, 0)?, Self::at(&self.pads, rank + i, 0)?),
                "VALID" => (0, 0),
                same => {
                    let windows = (size + stride - 1) / stride;
                    let total = ((windows - 1) * stride + span - size).max(0);
                    if same == "SAME_LOWER" { (total - total / 2, total / 2) } else { (total / 2, total - total / 2) }
                }
            };
            let room = size + before + after - span;
            if room < 0 {
                return err(format!("a window of {span} over {size}"));
            }
            let mut windows = if self.ceil { (room + stride - 1) / stride } else { room / stride } + 1;
            if self.ceil && (windows - 1) * stride >= size + before {
                windows -= 1; // it would begin beyond the input
            }
            g.set(i + 2 - rank, [k, stride, dilation, before, size, windows]);
        }
        Ok(g)
    }

    /// The windows of a transposed convolution, which lie on its output: one per element of the input.
    pub(super) fn under(&self, sizes: &[usize], kernel: &[usize]) -> Result<Geometry, GradError> {
        let rank = spatial(sizes, kernel)?;
        let mut g = Geometry::unit();
        for (i, &size) in sizes.iter().enumerate() {
            let [k, stride, dilation] = self.steps(i, kernel)?;
            let size = i64::try_from(size).unwrap_or(MAX);
            let span = dilation * (k - 1) + 1;
            let extra = Self::at(&self.output_padding, i, 0)?;
            let full = stride * (size - 1) + span + extra;
            let (plane, before) = match (&self.output_shape, &*self.auto_pad) {
                (Some(shape), _) => {
                    let plane = Self::at(shape, shape.len() - rank.min(shape.len()) + i, 1)?;
                    let total = (full - plane).max(0);
                    (plane, if self.auto_pad == "SAME_UPPER" { total / 2 } else { total - total / 2 })
                }
                (None, "NOTSET") => {
                    let (before, after) = (Self::at(&self.pads, i, 0)?, Self::at(&self.pads, rank + i, 0)?);
                    (full - before - after, before)
                }
                (None, "VALID") => (full, 0),
                (None, same) => {
                    let total = (full - size * stride).max(0);
                    (size * stride, if same == "SAME_UPPER" { total / 2 } else { total - total / 2 })
                }
            };
            if plane <= 0 {
                return err("an empty result");
            }
            g.set(i + 2 - rank, [k, stride, dilation, before, plane, size]);
        }
        Ok(g)
    }
}

fn spatial(sizes: &[usize], kernel: &[usize]) -> Result<usize, GradError> {
    match sizes.len() {
        rank @ 1..=2 if kernel.len() == rank => Ok(rank),
        rank => err(format!("{rank} spatial axes and a kernel of {}", kernel.len())),
    }
}

impl Geometry {
    fn unit() -> Self {
        Self { kernel: [1; 2], stride: [1; 2], dilation: [1; 2], pads: [0; 2], plane: [1; 2], windows: [1; 2] }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "all lie between 0 and 2^41")]
    fn set(&mut self, i: usize, of: [i64; 6]) {
        let [kernel, stride, dilation, pads, plane, windows] = of.map(|n| n as usize);
        (self.kernel[i], self.stride[i], self.dilation[i]) = (kernel, stride, dilation);
        (self.pads[i], self.plane[i], self.windows[i]) = (pads, plane, windows);
    }

    /// Elements of the plane.
    pub(super) fn size(&self) -> usize {
        self.plane[0] * self.plane[1]
    }

    /// The number of windows.
    pub(super) fn count(&self) -> usize {
        self.windows[0] * self.windows[1]
    }

    /// Taps of the kernel.
    pub(super) fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Whether every window is one element, in order.
    pub(super) fn is_pointwise(&self) -> bool {
        self.taps() == 1 && self.stride == [1, 1] && self.pads == [0, 0] && self.plane == self.windows
    }

    /// For every row of windows and every tap: calls `f(tap, windows, first element, step)`, windows being a range of their numbers,
    /// and skips what lies on the padding.
    #[inline(always)]
    pub(super) fn runs(&self, mut f: impl FnMut(usize, std::ops::Range<usize>, usize, usize)) {
        for ky in 0..self.kernel[0] {
            for kx in 0..self.kernel[1] {
                let tap = ky * self.kernel[1] + kx;
                let (from, to) = self.columns(kx);
                if from >= to {
                    continue;
                }
                for oy in 0..self.windows[0] {
                    let y = oy * self.stride[0] + ky * self.dilation[0];
                    let Some(y) = y.checked_sub(self.pads[0]).filter(|&y| y < self.plane[0]) else { continue };
                    let x = from * self.stride[1] + kx * self.dilation[1] - self.pads[1];
                    let row = oy * self.windows[1];
                    f(tap, row + from..row + to, y * self.plane[1] + x, self.stride[1]);
                }
            }
        }
    }

    /// The windows of a row whose tap `kx` lies on the plane.
    fn columns(&self, kx: usize) -> (usize, usize) {
        let shift = kx * self.dilation[1];
        let from = self.pads[1].saturating_sub(shift).div_ceil(self.stride[1]);
        let end = (self.plane[1] + self.pads[1]).saturating_sub(shift);
        (from, end.div_ceil(self.stride[1]).min(self.windows[1]))
    }

    /// What every window of `channels` planes reads: one row per channel and tap, one column per window.
    pub(super) fn gather<T: Real>(&self, planes: &[T], channels: usize, into: &mut [T]) {
        let (size, count, taps) = (self.size(), self.count(), self.taps());
        into.fill(T::zero());
        for c in 0..channels {
            let plane = &planes[c * size..][..size];
            let rows = &mut into[c * taps * count..][..taps * count];
            self.runs(|tap, windows, first, step| {
                let row = &mut rows[tap * count..][windows];
                if step == 1 {
                    row.copy_from_slice(&plane[first..first + row.len()]);
                } else {
                    row.iter_mut().zip(plane[first..].chunks(step)).for_each(|(to, from)| *to = from[0]);
                }
            });
        }
    }

    /// The transpose of [`Self::gather`]: adds every entry to where it was read.
    pub(super) fn scatter<T: Real>(&self, rows: &[T], channels: usize, planes: &mut [T]) {
        let (size, count, taps) = (self.size(), self.count(), self.taps());
        for c in 0..channels {
            let plane = &mut planes[c * size..][..size];
            let rows = &rows[c * taps * count..][..taps * count];
            self.runs(|tap, windows, first, step| {
                let row = &rows[tap * count..][windows];
                if step == 1 {
                    plane[first..first + row.len()].iter_mut().zip(row).for_each(|(to, from)| *to += *from);
                } else {
                    plane[first..].chunks_mut(step).zip(row).for_each(|(to, from)| to[0] += *from);
                }
            });
        }
    }
}
