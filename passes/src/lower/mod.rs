//! Spelling a plan as graph nodes. Used by targets.

mod dynamic;
mod qdq;
mod qonnx;
mod qoperator;
mod tables;

pub use qdq::{Dialect, is_native, lower};
pub use qoperator::lower_to_qoperators;
