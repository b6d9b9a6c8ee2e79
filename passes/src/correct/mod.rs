//! Passes that correct what rounding left.

mod correct_bias;
mod expected;

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[correct_bias::ENTRY];
