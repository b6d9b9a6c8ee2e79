//! Formats that are lists of levels.

use super::{Grid, GridInfo};
use crate::about::About;
use crate::tensor::DType;

/// Sorted levels; a code is a position in the list.
#[derive(Debug)]
pub struct CodebookGrid {
    info: GridInfo,
    levels: &'static [f32],
}

/// Level i is the mean of two neighboring quantiles of the normal distribution, scaled to reach 1, with 0 among them.
pub(super) static NF4: CodebookGrid = CodebookGrid {
    info: GridInfo {
        about: About {
            name: "nf4",
            doc: "NormalFloat: 16 levels from -1 to 1 at quantiles of the normal distribution; no ONNX type, stored in 4 bits.",
            source: "Dettmers et al. 2023, arXiv:2305.14314, appendix E",
        },
        bits: 4,
        storage: DType::U4,
        integer: false,
    },
    levels: &[
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ],
};

impl CodebookGrid {
    /// The position of the nearest level; of two as near, the even one.
    fn place(&self, x: f64) -> usize {
        // Far outside both distances would round alike.
        let x = x.clamp(self.level(0), self.level(self.levels.len() - 1));
        let above = self.levels.partition_point(|&level| f64::from(level) < x).min(self.levels.len() - 1);
        let below = above.saturating_sub(1);
        let (down, up) = (x - f64::from(self.levels[below]), f64::from(self.levels[above]) - x);
        let even = if above.is_multiple_of(2) { above } else { below };
        match down.abs().total_cmp(&up.abs()) {
            std::cmp::Ordering::Less => below,
            std::cmp::Ordering::Equal => even,
            std::cmp::Ordering::Greater => above,
        }
    }

    fn level(&self, place: usize) -> f64 {
        f64::from(self.levels[place.min(self.levels.len() - 1)])
    }
}

impl Grid for CodebookGrid {
    fn info(&self) -> &GridInfo {
        &self.info
    }

    fn range(&self) -> (f64, f64) {
        (self.level(0), self.level(self.levels.len() - 1))
    }

    fn nearest(&self, x: f64) -> f64 {
        self.level(self.place(if x.is_nan() { 0.0 } else { x }))
    }

    fn below(&self, x: f64) -> f64 {
        self.level(self.levels.partition_point(|&level| f64::from(level) <= x).saturating_sub(1))
    }

    fn above(&self, x: f64) -> f64 {
        self.level(self.levels.partition_point(|&level| f64::from(level) < x))
    }

    #[expect(clippy::cast_possible_truncation, reason = "levels are f32")]
    fn snap(&self, xs: &mut [f32], _: f32) {
        xs.iter_mut().for_each(|x| *x = self.nearest(f64::from(*x)) as f32);
    }

    #[expect(clippy::cast_possible_truncation, reason = "there are no more than 256 levels")]
    fn encode(&self, point: f64) -> u32 {
        self.place(if point.is_nan() { 0.0 } else { point }) as u32
    }

    fn decode(&self, code: u32) -> f64 {
        self.level(code as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_found_from_both_sides() {
        assert_eq!(NF4.encode(0.0), 7);
        assert_eq!(NF4.encode(0.05), 8);
        assert_eq!(NF4.encode(-5.0), 0);
        assert!((NF4.below(0.1) - NF4.decode(8)).abs() < 1e-12 && (NF4.above(0.1) - NF4.decode(9)).abs() < 1e-12);
    }
}
