//! Inputs while they are made: their start, what they may look like, and how they are moved.

use crate::exec::Dataset;
use crate::grad::{Array, GradError};
use crate::reconstruct::Adam;
use crate::seed;
use crate::tensor::{Tensor, count};

/// A start has blots of this share of its sides, and noise of this share of their spread.
const BLOTS: usize = 8;
const NOISE: f32 = 0.3;
/// Shifts are up to this share of the sides.
const SHIFT: usize = 28;
/// Pictures with smaller sides are not halved.
const SMALL: usize = 64;

/// What inputs look like; channel by channel (axis 1) their mean, spread, least and most.
#[derive(Clone, Debug)]
pub(super) struct Looks {
    shape: Vec<usize>,
    channels: Vec<Channel>,
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    mean: f32,
    spread: f32,
    least: f32,
    most: f32,
}

impl Looks {
    /// What the first inputs of all samples of `given` look like, which are read one by one.
    pub(super) fn of(given: &dyn Dataset) -> Result<Self, GradError> {
        let read = |index| match given.sample(index) {
            Ok(mut sample) if !sample.is_empty() => Ok(sample.swap_remove(0)),
            Ok(_) => Err(GradError(format!("{} has no input", given.name(index)))),
            Err(error) => Err(GradError(error.to_string())),
        };
        if given.is_empty() {
            return Err(GradError("there is no sample to make others like".into()));
        }
        let shape = read(0)?.shape().to_vec();
        if shape.contains(&0) {
            return Err(GradError(format!("{} is empty", given.name(0))));
        }
        let n = shape.get(1).copied().filter(|_| shape.len() > 2).unwrap_or(1).max(1);
        let mut sums = vec![(0.0_f64, 0.0_f64, 0_usize, f32::INFINITY, f32::NEG_INFINITY); n];
        let plane = plane(&shape);
        for index in 0..given.len() {
            let tensor = read(index)?;
            let numbers = tensor.values::<f32>().filter(|_| tensor.shape() == shape);
            let numbers =
                numbers.ok_or_else(|| GradError("samples differ in shape, or are no 32-bit floats".into()))?;
            for (part, numbers) in numbers.chunks(plane).enumerate() {
                let sum = &mut sums[part % n];
                for &x in numbers {
                    sum.0 += f64::from(x);
                    sum.1 += f64::from(x).powi(2);
                    sum.3 = sum.3.min(x);
                    sum.4 = sum.4.max(x);
                }
                sum.2 += numbers.len();
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "moments of f32 numbers")]
        let channel = |(first, second, n, least, most): (f64, f64, usize, f32, f32)| {
            let mean = first / n.max(1) as f64;
            let spread = (second / n.max(1) as f64 - mean * mean).max(0.0).sqrt();
            Channel { mean: mean as f32, spread: spread as f32, least, most }
        };
        Ok(Self { shape, channels: sums.into_iter().map(channel).collect() })
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The same at half the height and width, for pictures that are large enough.
    pub(super) fn halved(&self) -> Option<Self> {
        let &[n, c, h, w] = &*self.shape else { return None };
        let halves = h >= SMALL && w >= SMALL && h % 2 == 0 && w % 2 == 0;
        halves.then(|| Self { shape: vec![n, c, h / 2, w / 2], channels: self.channels.clone() })
    }

    fn channel(&self, part: usize) -> Channel {
        self.channels[part % self.channels.len()]
    }
}

/// How many neighboring elements of a tensor of `shape` belong to one channel.
fn plane(shape: &[usize]) -> usize {
    let from = if shape.len() > 2 { 2 } else { 0 };
    shape[from..].iter().product::<usize>().max(1)
}

/// Height and width; those of other tensors than pictures are 1 and all.
fn sides(shape: &[usize]) -> (usize, usize) {
    match shape {
        &[_, _, h, w] => (h, w),
        _ => (1, plane(shape)),
    }
}

/// One input.
#[derive(Debug)]
pub(super) struct Picture {
    shape: Vec<usize>,
    numbers: Vec<f32>,
    adam: Adam,
    seed: u64,
}

impl Picture {
    /// Blots and noise, of the mean and spread of `looks`.
    pub(super) fn drawn(looks: &Looks, seed: u64) -> Self {
        let shape = looks.shape.clone();
        let n = count(&shape).unwrap_or(0);
        let ((h, w), plane) = (sides(&shape), plane(&shape));
        let blots = (h.div_ceil(BLOTS), w.div_ceil(BLOTS));
        let mut numbers = Vec::with_capacity(n);
        for part in 0..n / plane {
            let channel = looks.channel(part);
            let draw = |what: u64, at: usize| normal(seed ^ what << 62 ^ ((part * plane + at) as u64));
            let coarse: Vec<f32> = (0..blots.0 * blots.1).map(|at| draw(1, at)).collect();
            let fine = resized(&coarse, blots, (h, w));
            let of = |(at, blot): (usize, &f32)| {
                (channel.mean + channel.spread * (blot + NOISE * draw(2, at))).clamp(channel.least, channel.most)
            };
            numbers.extend(fine.iter().enumerate().map(of));
        }
        Self { shape, adam: Adam::new(numbers.len()), numbers, seed }
    }

    /// `tensor` itself.
    #[cfg(test)]
    pub(super) fn of(tensor: &Tensor) -> Self {
        let numbers = tensor.values::<f32>().map(std::borrow::Cow::into_owned).unwrap_or_default();
        Self { shape: tensor.shape().to_vec(), adam: Adam::new(numbers.len()), numbers, seed: 0 }
    }

    /// The same in the size of `looks`, from where it is moved anew.
    pub(super) fn resize(&mut self, looks: &Looks) {
        if self.shape == looks.shape {
            return;
        }
        let (from, to) = (sides(&self.shape), sides(&looks.shape));
        let parts = self.numbers.chunks(plane(&self.shape));
        self.numbers = parts.flat_map(|part| resized(part, from, to)).collect();
        self.shape.clone_from(&looks.shape);
        self.adam = Adam::new(self.numbers.len());
    }

    /// The class that it should be taken for, out of so many.
    pub(super) fn class(&self, classes: usize) -> usize {
        usize::try_from(seed::mixed(self.seed) % classes.max(1) as u64).unwrap_or(0)
    }

    /// By how many rows and columns it is shifted in `step`.
    pub(super) fn shift(&self, step: usize) -> (usize, usize) {
        let (h, w) = if self.shape.len() == 4 { sides(&self.shape) } else { (1, 1) };
        let draw = |what: u64, side: usize| {
            let most = side / SHIFT;
            let at = seed::mixed(self.seed ^ (what << 32) ^ step as u64) % (2 * most as u64 + 1);
            (side + usize::try_from(at).unwrap_or(0) - most) % side.max(1)
        };
        (draw(1, h), draw(2, w))
    }

    pub(super) fn array(&self) -> Result<Array<f32>, GradError> {
        self.of_shape(self.numbers.clone())
    }

    /// The picture with its rows and columns turned by `shift`.
    pub(super) fn shifted(&self, shift: (usize, usize)) -> Result<Array<f32>, GradError> {
        self.of_shape(self.turned(&self.numbers, shift))
    }

    /// `gradient` of what was shifted, of the picture.
    pub(super) fn unshifted(&self, gradient: &Array<f32>, shift: (usize, usize)) -> Vec<f32> {
        let (h, w) = sides(&self.shape);
        let numbers: Vec<f32> = gradient.iter().copied().collect();
        self.turned(&numbers, ((h - shift.0) % h.max(1), (w - shift.1) % w.max(1)))
    }

    fn turned(&self, numbers: &[f32], (down, right): (usize, usize)) -> Vec<f32> {
        let (h, w) = sides(&self.shape);
        let mut turned = numbers.to_vec();
        if (down, right) != (0, 0) {
            for part in turned.chunks_exact_mut(h * w) {
                part.rotate_right(down * w);
                part.chunks_exact_mut(w).for_each(|row| row.rotate_right(right));
            }
        }
        turned
    }

    fn of_shape(&self, numbers: Vec<f32>) -> Result<Array<f32>, GradError> {
        let array = ndarray::ArrayD::from_shape_vec(&*self.shape, numbers);
        array.map(ndarray::ArrayBase::into_shared).map_err(|error| GradError(error.to_string()))
    }

    /// Adds the gradient of `weight` times the mean square of differences of neighbors, in spreads.
    pub(super) fn smooth(&self, looks: &Looks, weight: f32, gradient: &mut [f32]) {
        let (h, w) = sides(&self.shape);
        let unit = 2.0 * weight / self.numbers.len().max(1) as f32;
        let parts = self.numbers.chunks_exact(h * w).zip(gradient.chunks_exact_mut(h * w));
        for (part, (x, g)) in parts.enumerate() {
            let spread = looks.channel(part).spread;
            let unit = if spread > 0.0 { unit / (spread * spread) } else { 0.0 };
            for at in 0..h * w {
                let mut pair = |other: usize| {
                    let d = unit * (x[other] - x[at]);
                    g[other] += d;
                    g[at] -= d;
                };
                if (at + 1) % w != 0 {
                    pair(at + 1);
                }
                if at + w < h * w {
                    pair(at + w);
                }
            }
        }
    }

    /// Moves it against `gradient`, and back to where `looks` reach.
    pub(super) fn step(&mut self, looks: &Looks, gradient: &[f32], rate: f32) {
        let plane = plane(&self.shape);
        // In spreads, so that one rate suits all channels.
        let mut units = vec![0.0; self.numbers.len()];
        self.adam.step(&mut units, gradient, rate);
        for (part, (x, u)) in self.numbers.chunks_mut(plane).zip(units.chunks(plane)).enumerate() {
            let c = looks.channel(part);
            x.iter_mut().zip(u).for_each(|(x, u)| *x = (*x + c.spread * u).clamp(c.least, c.most));
        }
    }

    pub(super) fn into_tensor(self) -> Tensor {
        Tensor::of(self.shape, self.numbers)
    }
}

/// A number of the standard normal distribution.
#[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
fn normal(x: u64) -> f32 {
    let (a, b) = (1.0 - seed::uniform(x ^ 0x5eed), seed::uniform(x ^ 0xfeed << 32));
    ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
}

/// A plane of `from` height and width as one of `to`, bilinear.
fn resized(plane: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "places inside the plane")]
    let place = |at: usize, from: usize, to: usize| {
        let x = ((at as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, from.saturating_sub(1) as f32);
        let low = x as usize;
        (low, (low + 1).min(from.saturating_sub(1)), x - low as f32)
    };
    let columns: Vec<_> = (0..to.1).map(|at| place(at, from.1, to.1)).collect();
    let mut out = Vec::with_capacity(to.0 * to.1);
    for row in 0..to.0 {
        let (above, below, down) = place(row, from.0, to.0);
        let (above, below) = (&plane[above * from.1..], &plane[below * from.1..]);
        out.extend(columns.iter().map(|&(l, r, right)| {
            let mix = |row: &[f32]| row[l] * (1.0 - right) + row[r] * right;
            mix(above) * (1.0 - down) + mix(below) * down
        }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::Given;
    use super::*;

    fn looks(shape: &[usize]) -> Looks {
        let n: usize = shape.iter().product();
        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        let tensor = |seed: u64| {
            Tensor::of(shape, (0..n as u64).map(|i| 3.0 * seed::uniform(seed << 32 | i) as f32).collect::<Vec<_>>())
        };
        Looks::of(&Given(vec![tensor(1), tensor(2)])).unwrap()
    }

    #[test]
    fn starts_look_like_what_is_given_and_differ() {
        for shape in [&[1, 3, 32, 20][..], &[1, 100], &[2, 4, 30]] {
            let looks = looks(shape);
            let (a, b) = (Picture::drawn(&looks, 1), Picture::drawn(&looks, 2));
            assert_eq!((a.numbers.len(), &*a.shape), (shape.iter().product(), shape));
            assert!(a.numbers.iter().all(|x| (0.0..3.0).contains(x)) && a.numbers != b.numbers);
            assert_eq!(Picture::drawn(&looks, 1).numbers, a.numbers);
            let mean = a.numbers.iter().sum::<f32>() / a.numbers.len() as f32;
            assert!((mean - 1.5).abs() < 0.4, "{mean}");
        }
    }

    #[test]
    fn shifts_are_undone_for_gradients() {
        let picture = Picture::drawn(&looks(&[1, 2, 56, 84]), 5);
        assert!((0..50).any(|step| picture.shift(step) != (0, 0)));
        for step in 0..50 {
            let shift = picture.shift(step);
            let back = picture.unshifted(&picture.shifted(shift).unwrap(), shift);
            assert_eq!(back, picture.numbers, "{shift:?}");
        }
    }

    #[test]
    fn smoothness_has_the_gradient_of_differences() {
        let looks = looks(&[1, 2, 3, 4]);
        let mut picture = Picture::drawn(&looks, 3);
        let loss = |picture: &Picture| {
            let one = |(part, x): (usize, &[f32])| {
                let d = |a: usize, b: usize| ((x[a] - x[b]) / looks.channel(part).spread).powi(2);
                let across = (0..12).filter(|at| at % 4 != 3).map(|at| d(at, at + 1)).sum::<f32>();
                across + (0..8).map(|at| d(at, at + 4)).sum::<f32>()
            };
            picture.numbers.chunks(12).enumerate().map(one).sum::<f32>() / 24.0
        };
        let mut gradient = vec![0.0; 24];
        picture.smooth(&looks, 1.0, &mut gradient);
        for (at, gradient) in gradient.iter().enumerate() {
            let before = picture.numbers[at];
            picture.numbers[at] = before + 1e-2;
            let up = loss(&picture);
            picture.numbers[at] = before - 1e-2;
            let slope = (up - loss(&picture)) / 2e-2;
            picture.numbers[at] = before;
            assert!((slope - gradient).abs() < 1e-3 * (1.0 + slope.abs()), "{at}: {slope} {gradient}");
        }
    }

    #[test]
    fn a_plane_keeps_its_mean_and_what_is_flat_when_resized() {
        let plane: Vec<f32> = (0..12).map(|i| (i * 7 % 12) as f32).collect();
        let large = resized(&plane, (3, 4), (6, 8));
        let mean = |x: &[f32]| x.iter().sum::<f32>() / x.len() as f32;
        assert!((mean(&large) - mean(&plane)).abs() < 0.3);
        assert!(resized(&[2.5; 12], (3, 4), (7, 5)).iter().all(|x| (x - 2.5).abs() < 1e-6));
        assert_eq!(resized(&plane, (3, 4), (3, 4)), plane);
    }

    #[test]
    fn only_large_pictures_are_halved() {
        assert_eq!(looks(&[1, 3, 64, 128]).halved().unwrap().shape(), [1, 3, 32, 64]);
        for shape in [&[1, 3, 64, 63][..], &[1, 1, 28, 28], &[1, 64, 64]] {
            assert!(looks(shape).halved().is_none(), "{shape:?}");
        }
        assert!(Looks::of(&Given(vec![Tensor::of([1, 4, 0, 2], Vec::<f32>::new())])).is_err());
        assert!(Looks::of(&Given(Vec::new())).is_err());
        assert!(Looks::of(&Given(vec![Tensor::of([2], vec![1_i64, 2])])).is_err());
    }
}
