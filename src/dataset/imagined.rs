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
    /// `files`, followed by `times` as many made by `graph`, whose batch norms remembered `remembered`; `None` when the user interrupts.
    ///
    /// # Errors
    /// [`DataError`] where a sample cannot be read, or says why the model makes none.
    pub fn new(
        files: &'a Files,
        (graph, remembered): (&Graph, &[Remembered]),
        times: usize,
        executor: &dyn Executor,
        progress: &dyn Progress,
    ) -> Result<Option<Self>, DataError> {
        let given = (0..files.len()).map(|index| Ok(files.sample(index)?.swap_remove(0)));
        let given = given.collect::<Result<Vec<Tensor>, DataError>>()?;
        let n = files.len().saturating_mul(times);
        let made = imagine::imagine(graph, remembered, (&given, n), executor, progress);
        let refuse = |error| DataError {
            sample: "every sample".into(),
            problem: format!(
                "--augment makes inputs by what batch norms remember of training, or draws token ids anew, and this model can do \
                 neither: {error}; give more samples instead"
            ),
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
