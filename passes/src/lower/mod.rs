//! Spelling a plan as graph nodes. Used by targets.

mod blocks;
mod caches;
mod dialect;
mod dynamic;
mod pairs;
mod qdq;
mod qonnx;
mod qoperator;
mod rows;
mod tables;
mod trunc;

pub use dialect::Dialect;
pub use qdq::{is_native, lower};
pub use qoperator::lower_to_qoperators;
