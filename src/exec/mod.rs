//! Executors: what runs float graphs. Both are embedded; `auto` chooses.
//!
//! Without the feature `embedded` (which a fuzzer of the importer leaves out, to build in minutes) there is none.
//!
//! The middle hands over float graphs only. Each executor gets them as ONNX bytes of the part that it is to run.

#[cfg(feature = "embedded")]
mod auto;
#[cfg(any(feature = "embedded", feature = "ort"))]
mod feeds;
#[cfg(feature = "ort")]
mod ort;
#[cfg(feature = "embedded")]
mod rten;
#[cfg(feature = "embedded")]
mod tract;

use passes::about::About;
use passes::exec::{ExecError, Executor};
#[cfg(any(feature = "embedded", feature = "ort"))]
use passes::ir::Graph;
use passes::model::Metadata;

#[cfg(feature = "embedded")]
pub use auto::Auto;

/// An executor in the catalogue.
pub struct ExecutorEntry {
    /// Name, documentation, source.
    pub about: &'static About,
    /// Makes it for graphs with the opsets of `meta`.
    pub build: fn(meta: &Metadata) -> Result<Box<dyn Executor>, ExecError>,
}

/// Every executor, in the order of the manual.
pub static EXECUTORS: &[ExecutorEntry] = &[
    #[cfg(feature = "embedded")]
    ExecutorEntry { about: &auto::ABOUT, build: |meta| Ok(Box::new(Auto::new(meta))) },
    #[cfg(feature = "embedded")]
    ExecutorEntry { about: &tract::ABOUT, build: |meta| Ok(Box::new(tract::Tract::new(meta))) },
    #[cfg(feature = "embedded")]
    ExecutorEntry { about: &rten::ABOUT, build: |meta| Ok(Box::new(rten::Rten::new(meta))) },
    #[cfg(feature = "ort")]
    ExecutorEntry { about: &ort::ABOUT, build: |meta| Ok(Box::new(ort::Ort::new(meta)?)) },
];

/// The executor called `name`.
pub fn find(name: &str) -> Option<&'static ExecutorEntry> {
    EXECUTORS.iter().find(|entry| entry.about.name == name)
}

/// `graph` as the bytes that executors read.
#[cfg(any(feature = "embedded", feature = "ort"))]
fn encoded(graph: &Graph, meta: &Metadata) -> Vec<u8> {
    proto::encode(&crate::emit::part(graph, meta))
}

/// Runs `f`; a panic inside a backend becomes an error, as its input came from a stranger.
#[cfg(any(feature = "embedded", feature = "ort"))]
fn guarded<T>(executor: &'static str, f: impl FnOnce() -> Result<T, String>) -> Result<T, ExecError> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    let message = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(message)) => message,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            format!("it panicked: {text}")
        }
    };
    Err(ExecError { executor, message })
}
