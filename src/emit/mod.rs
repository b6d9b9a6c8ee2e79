//! From graphs to files.

mod compressed;
mod layout;
mod matrix;
mod memories;
mod onnx;
mod packed;
mod stage;
mod write;

pub(crate) use compressed::check as check_compressed;
pub use layout::{Layout, MemoryFormat};
pub use onnx::{Artifact, Emit, model, part};
pub(crate) use packed::stored;
pub use stage::{main_file, obstacle, stage};
pub use write::{Staged, WriteError, atomically, discard_staged};
