//! What a long pass has come to so far, kept outside of the run, so that a later run goes on from there.
//!
//! Passes are pure and deterministic: what a journal holds are answers that would come out again, just later. The driver sees to it that
//! a journal is only shown to a run with the same model, data and options.

use std::fmt::Debug;

/// Records by name.
pub trait Journal: Debug + Sync {
    /// The record called `key`, where there is one.
    fn get(&self, key: &str) -> Option<Vec<u8>>;
    /// Keeps `record` under `key`.
    ///
    /// # Errors
    /// What is wrong, in words, where it cannot be kept.
    fn put(&self, key: &str, record: &[u8]) -> Result<(), String>;
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoJournal;

impl Journal for NoJournal {
    fn get(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn put(&self, _: &str, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}
