//! A compiler that quantizes ONNX models for the place where they will run.
//!
//! [`driver::quantize`] is the whole run; the modules around it are its stages: [`import`] brings a file into the middle
//! (the crate `passes`), [`exec`] runs float graphs for calibration, [`targets`] say what a place accepts, [`emit`] writes
//! files and [`verify`] reads them back. [`cli`] is the command line.

pub mod cli;
pub mod cost;
pub mod dataset;
pub mod driver;
pub mod emit;
pub mod exec;
pub mod import;
mod journal;
pub mod lint;
pub mod load;
mod max_drop;
mod memory;
pub mod overrides;
mod recipe;
mod refusals;
pub mod report;
mod request;
mod resume;
mod samples;
mod stages;
pub mod stats;
pub mod targets;
pub mod verify;
