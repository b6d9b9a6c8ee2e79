//! More pictures out of few: parts of the given ones, mirrored, in other colors, over and beside one another.
//!
//! A hundred crops of ten photographs hold ten things: what is learned from them fits those ten. Where the float model says what is right,
//! any picture will do, and the further they are from the given ones, the more of the model they show.
//!
//! Source: parts of all sizes, Szegedy et al. 2015, arXiv:1409.4842; mixtures, Zhang et al. 2018 (mixup), arXiv:1710.09412, and Yun et al.
//! 2019 (`CutMix`), arXiv:1905.04899; as what a model is learned by from another one, Beyer et al. 2022, arXiv:2106.05237, section 3.

use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma};
use passes::exec::{DataError, Dataset};
use passes::seed;
use passes::tensor::Tensor;

use super::Files;
use super::rounds::Rounds;

/// The shares of a picture's area that a view shows.
const AREA: (f64, f64) = (0.15, 1.0);
/// How much wider than high a part may be, or higher than wide: e to this.
const ASPECT: f64 = 0.3;
/// What brightness and contrast may change by, and how much color stays or grows.
const LIGHT: (f64, f64) = (0.6, 1.4);
const COLOR: (f64, f64) = (0.0, 1.6);
/// So many views are mixtures of two, and so many hold parts of others.
const MIXED: f64 = 0.3;
const PASTED: f64 = 0.4;
/// What one of the two counts in a mixture.
const SHARE: (f64, f64) = (0.2, 0.8);
/// The most parts of others, and their sides in shares of the picture's.
const PARTS: usize = 3;
const SIDE: (f64, f64) = (0.27, 0.8);
/// Everything is drawn from this.
const SEED: u64 = 0x7669_6577;

/// Pictures, followed by views of them.
#[derive(Debug)]
pub struct Views<'a> {
    rounds: Rounds<'a>,
    shape: [usize; 3],
    /// The least and the most of every channel.
    ranges: Vec<(f32, f32)>,
}

/// One number after the other, each drawn from where the last one was.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        seed::uniform(self.0)
    }

    fn between(&mut self, (least, most): (f64, f64)) -> f64 {
        least + (most - least) * self.next()
    }

    #[expect(clippy::cast_possible_truncation, reason = "what pictures are multiplied with")]
    fn factor(&mut self, range: (f64, f64)) -> f32 {
        self.between(range) as f32
    }

    /// One of the numbers below `n`.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below `n`")]
    fn below(&mut self, n: usize) -> usize {
        ((self.next() * n as f64) as usize).min(n.saturating_sub(1))
    }

    /// `share` of `whole`, at least 1 and at most all.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most `whole`")]
    fn part(share: f64, whole: usize) -> usize {
        ((share * whole as f64) as usize).clamp(1, whole.max(1))
    }
}

impl<'a> Views<'a> {
    /// `files`, which hold pictures for one input (1 or 3 channels before height and width), followed by `times` views of each.
    ///
    /// # Errors
    /// [`DataError`] where a sample cannot be read, or is no picture.
    pub fn new(files: &'a Files, times: usize) -> Result<Self, DataError> {
        let rounds = Rounds { files, times, noun: "view" };
        let mut views = Self { rounds, shape: [0; 3], ranges: Vec::new() };
        for index in 0..files.len() {
            let sample = files.sample(index)?;
            let refuse = || {
                DataError {
                sample: files.name(index),
                problem: "--views takes pictures: one input of 32-bit floats, 1 or 3 channels before height and width, all of \
                          one size"
                    .into(),
            }
            };
            let [tensor] = &*sample else { return Err(refuse()) };
            let [1, c @ (1 | 3), h, w] = *tensor.shape() else { return Err(refuse()) };
            let values = tensor.values::<f32>().filter(|values| !values.is_empty()).ok_or_else(refuse)?;
            if index == 0 {
                (views.shape, views.ranges) = ([c, h, w], vec![(f32::INFINITY, f32::NEG_INFINITY); c]);
            } else if views.shape != [c, h, w] {
                return Err(refuse());
            }
            for (range, plane) in views.ranges.iter_mut().zip(values.chunks(h * w)) {
                *range = plane.iter().fold(*range, |(least, most), x| (least.min(*x), most.max(*x)));
            }
        }
        Ok(views)
    }

    /// The given picture `index`, channel by channel from 0, the least there is, to 1: libraries cut pictures off there.
    fn given(&self, index: usize) -> Result<Vec<f32>, DataError> {
        let missing =
            || DataError { sample: self.rounds.files.name(index), problem: "it is no picture any more".into() };
        let sample = self.rounds.files.sample(index)?;
        let values = sample.first().and_then(Tensor::values::<f32>).ok_or_else(missing)?;
        let mut picture = values.into_owned();
        self.each_channel(
            &mut picture,
            |x, (least, most)| if most > least { (x - least) / (most - least) } else { 0.0 },
        );
        Ok(picture)
    }

    /// The given picture to put over or beside picture `index`: one that judges where that does, so that neither side shows the other.
    fn other(&self, index: usize, draws: &mut Draws) -> usize {
        let n = self.rounds.files.len();
        let judges = passes::judges::is_judge(index);
        let from = draws.below(n);
        (from..n).chain(0..from).find(|other| passes::judges::is_judge(*other) == judges).unwrap_or(index)
    }

    /// A view of picture `index`.
    fn view(&self, index: usize, draws: &mut Draws) -> Result<Vec<f32>, DataError> {
        let mut seen = self.colored(self.part_of(&self.given(index)?, draws), draws);
        let kind = draws.next();
        if kind < MIXED {
            let other = self.other(index, draws);
            let other = self.colored(self.part_of(&self.given(other)?, draws), draws);
            let share = draws.factor(SHARE);
            seen.iter_mut().zip(other).for_each(|(x, y)| *x = share * *x + (1.0 - share) * y);
        } else if kind < MIXED + PASTED {
            for _ in 0..=draws.below(PARTS) {
                let other = self.other(index, draws);
                let other = self.colored(self.part_of(&self.given(other)?, draws), draws);
                self.paste(&mut seen, &other, draws);
            }
        }
        self.each_channel(&mut seen, |x, (least, most)| {
            (least + x.clamp(0.0, 1.0) * (most - least)).clamp(least, most)
        });
        Ok(seen)
    }

    /// Makes `f` of every number of `picture` and the range of its channel.
    fn each_channel(&self, picture: &mut [f32], f: impl Fn(f32, (f32, f32)) -> f32) {
        let plane = self.shape[1] * self.shape[2];
        for (values, range) in picture.chunks_mut(plane.max(1)).zip(&self.ranges) {
            values.iter_mut().for_each(|x| *x = f(*x, *range));
        }
    }

    /// A part of `picture` at the size of the whole, as it is or mirrored.
    fn part_of(&self, picture: &[f32], draws: &mut Draws) -> Vec<f32> {
        let [_, h, w] = self.shape;
        let (share, aspect) = (draws.between(AREA).sqrt(), draws.between((-ASPECT, ASPECT)).exp());
        let (height, width) = (Draws::part(share * aspect, h), Draws::part(share / aspect, w));
        let (y, x) = (draws.below(h - height + 1), draws.below(w - width + 1));
        let mirrored = draws.next() < 0.5;
        let seen = |plane: &[f32]| {
            let part = (y..y + height).flat_map(|row| plane[row * w + x..][..width].iter().copied()).collect();
            let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let part = ImageBuffer::<Luma<f32>, Vec<f32>>::from_vec(size(width), size(height), part);
            let whole = part.map(|part| imageops::resize(&part, size(w), size(h), FilterType::CatmullRom));
            let whole = whole.map(|whole| if mirrored { imageops::flip_horizontal(&whole) } else { whole });
            whole.map_or_else(|| plane.to_vec(), ImageBuffer::into_raw)
        };
        picture.chunks(h * w).flat_map(seen).collect()
    }

    /// `picture` lighter or darker, with more or less contrast and color.
    fn colored(&self, mut picture: Vec<f32>, draws: &mut Draws) -> Vec<f32> {
        let [light, contrast, color] = [LIGHT, LIGHT, COLOR].map(|range| draws.factor(range));
        let plane = self.shape[1] * self.shape[2];
        picture.iter_mut().for_each(|x| *x *= light);
        let mean = picture.iter().sum::<f32>() / picture.len().max(1) as f32;
        picture.iter_mut().for_each(|x| *x = mean + contrast * (*x - mean));
        let channels = picture.len() / plane.max(1);
        for at in 0..plane {
            let places = (0..channels).map(|c| c * plane + at);
            let grey = places.clone().map(|place| picture[place]).sum::<f32>() / channels.max(1) as f32;
            places.for_each(|place| picture[place] = grey + color * (picture[place] - grey));
        }
        picture
    }

    /// Puts a part of `other` over the same part of `picture`.
    fn paste(&self, picture: &mut [f32], other: &[f32], draws: &mut Draws) {
        let [_, h, w] = self.shape;
        let (height, width) = (Draws::part(draws.between(SIDE), h), Draws::part(draws.between(SIDE), w));
        let (y, x) = (draws.below(h - height + 1), draws.below(w - width + 1));
        for (into, from) in picture.chunks_mut(h * w).zip(other.chunks(h * w)) {
            for row in y..y + height {
                into[row * w + x..][..width].copy_from_slice(&from[row * w + x..][..width]);
            }
        }
    }
}

impl Dataset for Views<'_> {
    fn len(&self) -> usize {
        self.rounds.len()
    }

    fn name(&self, index: usize) -> String {
        self.rounds.name(index)
    }

    fn origin(&self, index: usize) -> usize {
        self.rounds.place(index).1
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let (round, of) = self.rounds.place(index);
        if round == 0 {
            return self.rounds.files.sample(of);
        }
        let [c, h, w] = self.shape;
        let view = self.view(of, &mut Draws(seed::mixed(SEED ^ index as u64)))?;
        Ok(vec![Tensor::of([1, c, h, w], view)])
    }
}

#[cfg(test)]
mod tests {
    use passes::text;

    use super::*;
    use crate::dataset::Slot;

    const MODEL: &str = "graph (%x: f32[N,C,12,10]) -> (%y) {
  %y = Relu(%x)
}";

    /// 16 pictures of 3 × 12 × 10: smooth, unlike one another, each channel in a range of its own.
    fn open(folder: &std::path::Path, channels: usize) -> Files {
        let value = |n: usize, c: usize, y: usize, x: usize| {
            (10 * c) as f32 + ((n + 1) as f32 * (y as f32 / 12.0 + x as f32 / 10.0)).sin()
        };
        for n in 0..16 {
            let all = (0..channels).flat_map(|c| (0..120).map(move |at| value(n, c, at / 10, at % 10)));
            let tensor = proto::onnx::TensorProto {
                dims: vec![1, i64::try_from(channels).unwrap(), 12, 10],
                data_type: Some(1),
                float_data: all.collect(),
                ..proto::onnx::TensorProto::default()
            };
            std::fs::create_dir_all(folder.join(format!("{n:02}"))).unwrap();
            std::fs::write(folder.join(format!("{n:02}/input_0.pb")), proto::encode(&tensor)).unwrap();
        }
        let model = text::parse(MODEL).unwrap();
        Files::open(folder, Slot::of(model.graph()), None, None).unwrap()
    }

    #[test]
    fn views_are_drawn_once_and_stay_in_range() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path(), 3);
        let views = Views::new(&files, 4).unwrap();
        assert_eq!((views.len(), views.origin(16 + 5)), (80, 5));
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..views.len() {
            let sample = views.sample(index).unwrap();
            assert_eq!(sample, views.sample(index).unwrap(), "the same whenever it is asked for");
            assert_eq!(sample[0].shape(), [1, 3, 12, 10]);
            let values = sample[0].values::<f32>().unwrap();
            for (plane, (least, most)) in values.chunks(120).zip(&views.ranges) {
                assert!(plane.iter().all(|x| (*least..=*most).contains(x)), "{index}");
            }
            seen.insert(values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>());
            assert!(index >= 16 || sample == files.sample(index).unwrap(), "given pictures stay");
        }
        assert_eq!(seen.len(), 80, "no two alike");
    }

    /// Pictures are normalized: most of what they hold lies outside of what 8-bit pictures come from, 0 to 1.
    #[test]
    fn views_are_as_bright_as_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path(), 3);
        let views = Views::new(&files, 8).unwrap();
        let mean = |from: usize, to: usize, c: usize| {
            let own = |index: usize| {
                views.sample(index).unwrap()[0].values::<f32>().unwrap()[c * 120..][..120].iter().sum::<f32>() / 120.0
            };
            (from..to).map(own).sum::<f32>() / (to - from) as f32
        };
        for (c, (least, most)) in views.ranges.iter().enumerate() {
            let (given, seen) = (mean(0, 16, c), mean(16, views.len(), c));
            assert!((given - seen).abs() < 0.1 * (most - least), "{c}: {given} {seen}");
        }
    }

    /// What judges is shown nothing of what is learned from, and the other way around.
    #[test]
    fn judges_are_mixed_with_judges() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path(), 3);
        let views = Views::new(&files, 1).unwrap();
        let mut found = [0, 0];
        for (at, index) in (0..16).flat_map(|index| (0..20).map(move |at| (at, index))) {
            let other = views.other(index, &mut Draws(at * 1000 + index as u64));
            assert_eq!(passes::judges::is_judge(other), passes::judges::is_judge(index), "{index} {other}");
            found[usize::from(other != index)] += 1;
        }
        assert!(found[1] > 4 * found[0], "{found:?}");
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let files = open(folder.path(), 2);
        let error = Views::new(&files, 1).unwrap_err().to_string();
        assert!(error.contains("1 or 3 channels"), "{error}");
    }
}
