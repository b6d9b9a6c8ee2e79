//! Convolutions over a line or a plane, grouped, dilated and transposed.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use pulp::NullaryFnOnce;

use super::gemm::{Matrix, multiply};
use super::real::{dense, filled, flat};
use super::window::{Geometry, Windows};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, err, row};
use crate::ir::Node;
use crate::simd::{vectorized, vectorized_always};

pub(super) static ROWS: &[Row] = &[
    row("Conv", |node| Ok(Box::new(Conv::of(node, false)?))),
    row("ConvTranspose", |node| Ok(Box::new(Conv::of(node, true)?))),
];

#[derive(Debug)]
struct Conv {
    windows: Windows,
    groups: usize,
    transposed: bool,
}

/// The most elements that the windows of one image and group may have together.
const MAX_COLUMNS: usize = 1 << 28;

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    n: usize,
    groups: usize,
    /// Channels per group of what windows lie on: the input, or the result of a transposed convolution.
    below: usize,
    /// Channels per group of what has one element per window.
    above: usize,
    geometry: Geometry,
}

impl Sizes {
    /// Elements per image and group, below and above.
    fn per_group(&self) -> (usize, usize) {
        (self.below * self.geometry.size(), self.above * self.geometry.count())
    }

    fn columns(&self) -> usize {
        self.below * self.geometry.taps()
    }

    fn is_depthwise(&self) -> bool {
        self.below == 1
    }

    /// Numbers of the windows that are gathered for a product.
    fn gathered(&self) -> usize {
        let nothing = self.is_depthwise() || self.geometry.is_pointwise();
        if nothing { 0 } else { self.columns() * self.geometry.count() }
    }
}

impl Conv {
    fn of(node: &Node, transposed: bool) -> Result<Self, GradError> {
        match usize::try_from(node.int("group", 1)) {
            Ok(groups) if groups > 0 => Ok(Self { windows: Windows::of(node), groups, transposed }),
            _ => err("group is not positive"),
        }
    }

    fn sizes(&self, x: &[usize], w: &[usize]) -> Result<Sizes, GradError> {
        let (Some((&[n, c], plane)), Some((&[first, second], kernel))) =
            (x.split_first_chunk::<2>(), w.split_first_chunk::<2>())
        else {
            return err(format!("a convolution of {x:?} with {w:?}"));
        };
        let groups = self.groups;
        if !first.is_multiple_of(groups) || !c.is_multiple_of(groups) {
            return err(format!("{c} channels and a weight of {w:?} in {groups} groups"));
        }
        let (below, above, geometry, fits) = if self.transposed {
            (second, c / groups, self.windows.under(plane, kernel)?, first == c)
        } else {
            (second, first / groups, self.windows.over(plane, kernel)?, second == c / groups)
        };
        let columns = below.saturating_mul(geometry.taps()).saturating_mul(geometry.count());
        if columns > MAX_COLUMNS {
            return err(format!("windows of {columns} elements"));
        }
        if fits {
            Ok(Sizes { n, groups, below, above, geometry })
        } else {
            err(format!("a convolution of {x:?} with {w:?}"))
        }
    }

    /// The shape of the result.
    fn result(&self, sizes: &Sizes, rank: usize) -> Vec<usize> {
        let (channels, plane) = if self.transposed {
            (sizes.groups * sizes.below, sizes.geometry.plane)
        } else {
            (sizes.groups * sizes.above, sizes.geometry.windows)
        };
        [sizes.n, channels].into_iter().chain(plane[4 - rank..].iter().copied()).collect()
    }
}

/// The weight's part for `group`, as a matrix of `above` rows.
fn weight_of<'a, T: Real>(w: &'a [T], group: usize, s: &Sizes) -> Matrix<'a, T> {
    let size = s.above * s.columns();
    Matrix::new(&w[group * size..][..size], s.above, s.columns())
}

/// above = W ∗ below, for every image and group.
fn correlate<T: Real>(below: &[T], w: &[T], s: &Sizes) -> Vec<T> {
    let g = &s.geometry;
    let (low, high) = s.per_group();
    let mut above = vec![T::zero(); s.n * s.groups * high];
    let mut columns = vec![T::zero(); s.gathered()];
    for (i, out) in above.chunks_exact_mut(high.max(1)).enumerate() {
        let (planes, group) = (&below[i * low..][..low], i % s.groups);
        if s.is_depthwise() {
            for (row, out) in out.chunks_exact_mut(g.count().max(1)).enumerate() {
                let taps = &w[(group * s.above + row) * g.taps()..][..g.taps()];
                vectorized_always(Depthwise { g, taps, below: planes, above: out });
            }
        } else if g.is_pointwise() {
            multiply(out, weight_of(w, group, s), Matrix::new(planes, s.columns(), g.count()), false);
        } else {
            g.gather(planes, s.below, &mut columns);
            multiply(out, weight_of(w, group, s), Matrix::new(&columns, s.columns(), g.count()), false);
        }
    }
    above
}

/// above += taps ∗ below, on one plane.
struct Depthwise<'a, T> {
    g: &'a Geometry,
    taps: &'a [T],
    below: &'a [T],
    above: &'a mut [T],
}

impl<T: Real> NullaryFnOnce for Depthwise<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.g.runs(|tap, windows, first, step| {
            let (to, a, from) = (&mut self.above[windows], self.taps[tap], &self.below[first..]);
            if step == 1 {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += a * *from);
            } else {
                to.iter_mut().zip(from.chunks(step)).for_each(|(to, from)| *to += a * from[0]);
            }
        });
    }
}

/// The transpose: below += tapsᵀ ∗ above.
struct DepthwiseBack<'a, T> {
    g: &'a Geometry,
    taps: &'a [T],
    above: &'a [T],
    below: &'a mut [T],
}

impl<T: Real> NullaryFnOnce for DepthwiseBack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.g.runs(|tap, windows, first, step| {
            let (to, a, from) = (&mut self.below[first..], self.taps[tap], &self.above[windows]);
            if step == 1 {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += a * *from);
            } else {
                to.chunks_mut(step).zip(from).for_each(|(to, from)| to[0] += a * *from);
            }
        });
    }
}

/// The gradient of the taps: above with what every tap reads below.
struct DepthwiseTaps<'a, T> {
    g: &'a Geometry,
    above: &'a [T],
    below: &'a [T],
    taps: &'a mut [T],
}

impl<T: Real> NullaryFnOnce for DepthwiseTaps<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.g.runs(|tap, windows, first, step| {
            self.taps[tap] += dot(&self.above[windows], &self.below[first..], step);
        });
    }
}

/// below = Wᵀ ∗ above: the transpose of [`correlate`].
fn spread<T: Real>(above: &[T], w: &[T], s: &Sizes) -> Vec<T> {
    let g = &s.geometry;
    let (low, high) = s.per_group();
    let mut below = vec![T::zero(); s.n * s.groups * low];
    let mut columns = vec![T::zero(); s.gathered()];
    for (i, out) in below.chunks_exact_mut(low.max(1)).enumerate() {
        let (rows, group) = (&above[i * high..][..high], i % s.groups);
        if s.is_depthwise() {
            for (row, rows) in rows.chunks_exact(g.count().max(1)).enumerate() {
                let taps = &w[(group * s.above + row) * g.taps()..][..g.taps()];
                vectorized_always(DepthwiseBack { g, taps, above: rows, below: out });
            }
        } else if g.is_pointwise() {
            multiply(out, weight_of(w, group, s).t(), Matrix::new(rows, s.above, g.count()), false);
        } else {
            multiply(&mut columns, weight_of(w, group, s).t(), Matrix::new(rows, s.above, g.count()), false);
            g.scatter(&columns, s.below, out);
        }
    }
    below
}

/// The gradient of the weight: above with what every window reads below.
fn outer<T: Real>(below: &[T], above: &[T], s: &Sizes) -> Vec<T> {
    let g = &s.geometry;
    let (low, high) = s.per_group();
    let mut w = vec![T::zero(); s.groups * s.above * s.columns()];
    let mut columns = vec![T::zero(); s.gathered()];
    for i in 0..s.n * s.groups {
        let (planes, rows, group) = (&below[i * low..][..low], &above[i * high..][..high], i % s.groups);
        let size = s.above * s.columns();
        let into = &mut w[group * size..][..size];
        if s.is_depthwise() {
            for (rows, into) in rows.chunks_exact(g.count().max(1)).zip(into.chunks_exact_mut(g.taps().max(1))) {
                vectorized_always(DepthwiseTaps { g, above: rows, below: planes, taps: into });
            }
            continue;
        }
        let read = if g.is_pointwise() {
            planes
        } else {
            g.gather(planes, s.below, &mut columns);
            &columns
        };
        let rows = Matrix::new(rows, s.above, g.count());
        multiply(into, rows, Matrix::new(read, s.columns(), g.count()).t(), true);
    }
    w
}

/// Sums side by side, for vectors of any machine alike.
const SUMS: usize = 16;

/// The product of `a` with every `step`-th of `b`.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T], step: usize) -> T {
    if step != 1 {
        return a.iter().zip(b.chunks(step)).map(|(a, b)| *a * b[0]).sum();
    }
    let mut sums = [T::zero(); SUMS];
    let (chunks, rest) = a.as_chunks::<SUMS>();
    let (others, _) = b[..a.len()].as_chunks::<SUMS>();
    for (a, b) in chunks.iter().zip(others) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += *a * *b);
    }
    let tail = rest.iter().zip(&b[chunks.len() * SUMS..]).map(|(a, b)| *a * *b).sum::<T>();
    sums.into_iter().sum::<T>() + tail
}

fn sum<T: Real>(values: &[T]) -> T {
    let (chunks, rest) = values.as_chunks::<SUMS>();
    let mut sums = [T::zero(); SUMS];
    vectorized(|| {
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += *x);
        }
    });
    sums.into_iter().sum::<T>() + rest.iter().copied().sum::<T>()
}

/// The sums of every channel, over images and the plane.
fn channel_sums<T: Real>(values: &[T], channels: usize, size: usize) -> Vec<T> {
    let mut sums = vec![T::zero(); channels];
    for (i, plane) in values.chunks_exact(size.max(1)).enumerate() {
        sums[i % channels] += sum(plane);
    }
    sums
}

impl<T: Real> Rule<T> for Conv {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (x, w) = (dense(inputs.real(0)?), dense(inputs.real(1)?));
        let s = self.sizes(x.shape(), w.shape())?;
        let (x_values, w_values) = (flat(&x), flat(&w));
        let mut out =
            if self.transposed { spread(&x_values, &w_values, &s) } else { correlate(&x_values, &w_values, &s) };
        let shape = self.result(&s, x.ndim());
        if let Some(bias) = inputs.optional(2)? {
            let size = shape[2..].iter().product::<usize>();
            let bias = flat(bias);
            if bias.len() != shape[1] {
                return err(format!("a bias of {} for {} channels", bias.len(), shape[1]));
            }
            for (i, plane) in out.chunks_exact_mut(size.max(1)).enumerate() {
                let b = bias[i % shape[1]];
                vectorized(|| plane.iter_mut().for_each(|x| *x += b));
            }
        }
        Ok(vec![filled(&shape, out)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, w, g) = (dense(call.inputs.real(0)?), dense(call.inputs.real(1)?), dense(call.grad()?));
        let s = self.sizes(x.shape(), w.shape())?;
        let (xs, ws, gs) = (flat(&x), flat(&w), flat(&g));
        let of_x = || if self.transposed { correlate(&gs, &ws, &s) } else { spread(&gs, &ws, &s) };
        let of_w = || if self.transposed { outer(&gs, &xs, &s) } else { outer(&xs, &gs, &s) };
        let channels = g.shape()[1];
        let size = g.shape()[2..].iter().product::<usize>();
        Ok(vec![
            call.wants(0).then(|| filled(x.shape(), of_x())).transpose()?,
            call.wants(1).then(|| filled(w.shape(), of_w())).transpose()?,
            call.wants(2).then(|| filled(&[channels], channel_sums(&gs, channels, size))).transpose()?,
        ])
    }

    fn aside(&self, inputs: &Inputs<'_, T>) -> u64 {
        let (Ok(x), Ok(w)) = (inputs.real(0), inputs.real(1)) else { return 0 };
        self.sizes(x.shape(), w.shape()).map_or(0, |sizes| (sizes.gathered() * size_of::<T>()) as u64)
    }
}
