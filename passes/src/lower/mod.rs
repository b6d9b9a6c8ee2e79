//! Spelling a plan as graph nodes. Used by targets.

mod dynamic;
mod qdq;
mod qonnx;
mod tables;

pub use qdq::{is_native, lower as qdq, lower_of_one as qdq_of_one, lower_with_nbits as qdq_and_nbits};
pub use qonnx::lower as qonnx;
