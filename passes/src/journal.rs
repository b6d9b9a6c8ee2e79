//! What a long pass has come to so far, kept outside of the run, so that a later run goes on from there.
//!
//! Passes are pure and deterministic: what a journal holds are answers that would come out again, just later. Besides them it holds where
//! one pass stood on its way to a single answer that takes long, each time in place of what it held before. The driver sees to it that a
//! journal is only shown to a run with the same model, data and options.

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
    /// The most bytes that [`Self::stand`] takes; `None` where it keeps nothing.
    fn room(&self) -> Option<u64>;
    /// Where the way called `key` stood, where that was the last to be kept.
    fn standing(&self, key: &str) -> Option<Vec<u8>>;
    /// Keeps where the way called `key` stands, in place of all that stood before: either the one or the other is there at any time.
    ///
    /// # Errors
    /// What is wrong, in words, where it cannot be kept.
    fn stand(&self, key: &str, state: &[u8]) -> Result<(), String>;
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

    fn room(&self) -> Option<u64> {
        None
    }

    fn standing(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn stand(&self, _: &str, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}
