//! From graphs to files.

mod onnx;
mod write;

pub use onnx::{Artifact, Emit, model, part};
pub use write::{Staged, WriteError, atomically, discard_staged};
