//! Spelling a plan as graph nodes. Used by targets.

mod dynamic;
mod qdq;
mod qonnx;
mod tables;

pub use qdq::{Dialect, is_native, lower};
