//! Spelling a plan as graph nodes. Used by targets.

mod qdq;

pub use qdq::lower as qdq;
