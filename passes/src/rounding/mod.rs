//! Rounding: codes for encoded constants.

mod nearest;

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[nearest::ENTRY];
