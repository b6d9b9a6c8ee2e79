//! Every pass: the stages' tables, joined in the order of the manual.

use crate::pass::PassEntry;
use crate::{analysis, calibrate, correct, equalize, normalize, rounding};

/// Every table of passes.
pub static STAGES: &[(&str, &[PassEntry])] = &[
    ("normalize", normalize::PASSES),
    ("calibrate", calibrate::PASSES),
    ("equalize", equalize::PASSES),
    ("analysis", analysis::PASSES),
    ("rounding", rounding::PASSES),
    ("correct", correct::PASSES),
];

/// Every pass, in the order of the manual.
pub fn passes() -> Vec<&'static PassEntry> {
    STAGES.iter().flat_map(|(_, table)| table.iter()).collect()
}
