//! One bit: the two signs.

use super::{Grid, GridInfo};
use crate::about::About;
use crate::tensor::DType;

/// −1 and 1. What is negative becomes −1, all else 1; a code is its point in two's complement, so that an operator that reads integers
/// reads it.
#[derive(Debug)]
pub struct SignGrid {
    info: GridInfo,
}

pub(super) static BIPOLAR: SignGrid = SignGrid {
    info: GridInfo {
        about: About {
            name: "bipolar",
            doc: "Signs: -1 and 1, 0 becomes 1; experimental. BipolarQuant in QONNX, elsewhere these two of the 4-bit integers: ONNX has \
                  no type of one bit.",
            source: "operator definition of BipolarQuant, qonnx 1.0.0; as weights Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279",
        },
        bits: 1,
        storage: DType::I4,
        integer: false,
    },
};

impl Grid for SignGrid {
    fn info(&self) -> &GridInfo {
        &self.info
    }

    fn range(&self) -> (f64, f64) {
        (-1.0, 1.0)
    }

    fn nearest(&self, x: f64) -> f64 {
        if x < 0.0 { -1.0 } else { 1.0 }
    }

    fn below(&self, x: f64) -> f64 {
        if x >= 1.0 { 1.0 } else { -1.0 }
    }

    fn above(&self, x: f64) -> f64 {
        if x <= -1.0 { -1.0 } else { 1.0 }
    }

    fn snap(&self, xs: &mut [f32], _: f32) {
        xs.iter_mut().for_each(|x| *x = if *x < 0.0 { -1.0 } else { 1.0 });
    }

    fn encode(&self, point: f64) -> u32 {
        if point < 0.0 { 0xf } else { 1 }
    }

    /// Of the codes of 4 bits that are no sign, those of negative integers are −1 and the others 1.
    fn decode(&self, code: u32) -> f64 {
        if code & 0x8 == 0 { 1.0 } else { -1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid;

    #[test]
    fn zero_is_positive() {
        let mut xs = [0.0, -0.0, -1e-30, 1e-30, -7.0, 7.0, f32::NAN];
        BIPOLAR.snap(&mut xs, 0.0);
        assert_eq!(xs.map(f32::to_bits), [1.0_f32, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0].map(f32::to_bits));
    }

    /// What reads 4-bit integers reads signs.
    #[test]
    fn codes_are_those_of_integers() {
        let integers = grid::find("int4").unwrap();
        for point in [-1.0, 1.0] {
            let code = BIPOLAR.encode(point);
            assert_eq!(code, integers.encode(point));
            assert!((integers.decode(code) - BIPOLAR.decode(code)).abs() < 1e-12, "{point}");
        }
    }
}
