//! What rounding upstream did to the input of a layer, and what the layer can do about it.
//!
//! A layer that reads x̃ where the float model reads x should not imitate its own weight W but make up for the difference:
//! the weight nearest to the float output is
//!
//! ```text
//! W* = argmin E‖W x + e − W* x̃‖² = W + (W E[(x − x̃) x̃ᵀ] + E[e x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹
//! ```
//!
//! and what is left is the quadratic form of x̃ around W*, which every rounding method works on unchanged. e is the error that
//! the other operand of a sum after the layer already carries, for layers that write into a residual stream.

mod inputs;
mod measure;
mod roots;
mod target;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) use self::measure::{Halves, measure};
pub(super) use self::roots::Roots;
pub(super) use self::target::{centered, shift, target};
use crate::id::{NodeId, ValueId};
use crate::observe::{Cross, Gram, Rows};
use crate::simulate::Version;

/// A tensor that layers read, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reading {
    /// As the model reads it.
    pub(super) version: Version,
    /// How its rows are cut.
    pub(super) rows: Rows,
    /// The layer whose stakes the rows weigh; `None` where all weigh the same.
    pub(super) weighed_for: Option<NodeId>,
}

/// What a layer reads, and the other operand of the sum that alone reads its result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs {
    pub(super) node: NodeId,
    pub(super) reading: Reading,
    pub(super) beside: Option<Version>,
}

/// Moments of one reading: of x̃, and of x − x̃ with x̃.
pub(super) struct Moments {
    pub(super) gram: Arc<Gram>,
    /// Those of either half of the samples, where both have some.
    pub(super) halves: Option<[Arc<Gram>; 2]>,
    pub(super) drift: Option<Cross>,
}

/// What is measured for the layers of one stage.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) of_reading: BTreeMap<Reading, Moments>,
    /// E\[e x̃ᵀ\] and E\[e\] for layers beside which something drifted.
    pub(super) of_sum: BTreeMap<NodeId, Cross>,
    /// How many of the values that layers read were NaN or infinite, where any were.
    pub(super) nonfinite: BTreeMap<ValueId, u64>,
    /// Peaks of the channels of every reading, as planned.
    pub(super) peaks: BTreeMap<Reading, Vec<f32>>,
}

impl Measured {
    fn extend(&mut self, other: Self) {
        self.of_reading.extend(other.of_reading);
        self.of_sum.extend(other.of_sum);
        self.nonfinite.extend(other.nonfinite);
        self.peaks.extend(other.peaks);
    }
}
