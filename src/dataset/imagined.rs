//! More samples out of few: the given ones and those that the model itself makes.

use passes::exec::{DataError, Dataset, Executor, Progress};
use passes::imagine::{self, Remembered};
use passes::ir::Graph;
use passes::tensor::Tensor;

use super::Files;

/// Samples, followed by those that were made; see [`imagine`].
#[derive(Debug)]
pub struct Imagined<'a> {
    files: &'a Files,
    made: Vec<Tensor>,
}

impl<'a> Imagined<'a> {
    /// `files`, followed by `times` as many made by `graph`, whose batch norms remembered `remembered`, where half of `room` bytes holds them;
    /// `None` when the user interrupts.
    ///
    /// # Errors
    /// [`DataError`] where a sample cannot be read, or says why none are made.
    pub fn new(
        files: &'a Files,
        (graph, remembered): (&Graph, &[Remembered]),
        (times, room): (usize, Option<u64>),
        (executor, threads): (&dyn Executor, usize),
        progress: &dyn Progress,
    ) -> Result<Option<Self>, DataError> {
        let refused = |problem| DataError { sample: "--augment".into(), problem };
        let n = files.len().saturating_mul(times);
        let each: usize = files.sample(0)?.iter().map(|tensor| tensor.bytes().len()).sum();
        let needed = (n as u64).saturating_mul(each as u64);
        if let Some(room) = room.filter(|room| needed > room / 2) {
            return Err(refused(format!(
                "{n} more samples of {each} bytes are {} MB, and {} MB are free for all: make fewer of them",
                needed / 1_000_000,
                room / 1_000_000
            )));
        }
        let made = imagine::imagine(graph, remembered, (files, n), (executor, threads), progress);
        let refuse = |error| {
            refused(format!(
                "it makes inputs by what batch norms remember of training, or draws token ids anew, and this model can do neither: \
                 {error}; give more samples instead"
            ))
        };
        Ok(made.map_err(refuse)?.map(|made| Self { files, made }))
    }
}

impl Dataset for Imagined<'_> {
    fn len(&self) -> usize {
        self.files.len() + self.made.len()
    }

    fn name(&self, index: usize) -> String {
        match index.checked_sub(self.files.len()) {
            None => self.files.name(index),
            Some(made) => format!("sample {made} of those that the model made"),
        }
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        match index.checked_sub(self.files.len()) {
            None => self.files.sample(index),
            Some(made) => {
                let missing = || DataError { sample: self.name(index), problem: "there are not so many".into() };
                Ok(vec![self.made.get(made).ok_or_else(missing)?.clone()])
            }
        }
    }
}
