//! Passes that decide.

mod allocate;
mod assign;
mod encode_caches;
mod keep_columns;
mod truncate_pools;

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] =
    &[assign::ENTRY, allocate::ENTRY, keep_columns::ENTRY, encode_caches::ENTRY, truncate_pools::ENTRY];
