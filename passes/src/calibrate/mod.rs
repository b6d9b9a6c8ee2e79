//! Passes that measure.

mod collect;

pub use collect::{CollectError, collect, tap_groups};

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[collect::ENTRY];
