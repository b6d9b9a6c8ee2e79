//! A compiler that quantizes ONNX models for the place where they will run.

pub mod emit;
pub mod import;
pub mod load;
pub mod exec;
pub mod dataset;
pub mod targets;
