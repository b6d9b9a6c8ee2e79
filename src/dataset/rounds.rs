//! Samples, followed by rounds of others that are made of each.

use passes::exec::Dataset;

use super::Files;

/// The given samples, and so many rounds of others behind them, each in the order of what it is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounds<'a> {
    pub(super) files: &'a Files,
    /// How many rounds.
    pub(super) times: usize,
    /// What one that is made is called.
    pub(super) noun: &'static str,
}

impl Rounds<'_> {
    /// How many samples there are in all.
    pub(super) fn len(&self) -> usize {
        self.files.len().saturating_mul(self.times.saturating_add(1))
    }

    /// The round of sample `index`, 0 for a given one, and the number of the given one that it is made of.
    pub(super) fn place(&self, index: usize) -> (usize, usize) {
        let n = self.files.len().max(1);
        (index / n, index % n)
    }

    pub(super) fn name(&self, index: usize) -> String {
        let (round, of) = self.place(index);
        let name = self.files.name(of);
        if round == 0 { name } else { format!("{name}, {} {round}", self.noun) }
    }
}
