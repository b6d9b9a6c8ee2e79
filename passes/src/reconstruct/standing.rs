//! Where learning of the whole model stands, and how a journal keeps that.

use super::chain::{Chain, Link};
use super::ledger::Ledger;
use super::settings::Settings;
use super::train::Course;
use crate::grad::GradError;
use crate::journal::Journal;
use crate::model::{Edit, Model, record};
use crate::pass::PassError;

/// Where learning stands.
pub(super) struct Standing<'a> {
    /// So many steps have been made.
    pub(super) steps: usize,
    pub(super) courses: Vec<Course<'a>>,
    /// The least loss on the samples that are held out, and what came to it.
    pub(super) best: (f64, Vec<Edit>),
}

impl<'a> Standing<'a> {
    /// At the start, of which the loss is still to be measured.
    pub(super) fn begin(model: &Model, chain: &Chain, settings: &'a Settings, seed: u64) -> Result<Self, GradError> {
        let course = |(at, link): (usize, &Link)| {
            let weights = link.program.weights_of(model.plan())?;
            let mut course = Course::new(settings, &weights, link.program.start(&weights), seed ^ (at as u64) << 32);
            course.at.units.clear();
            Ok(course)
        };
        let courses = chain.links.iter().enumerate().map(course).collect::<Result<_, GradError>>()?;
        Ok(Self { steps: 0, courses, best: (f64::INFINITY, Vec::new()) })
    }

    /// Shows all that steps and checks change.
    fn show(&mut self, ledger: &mut Ledger<'_>) {
        let (mut steps, mut loss) = (self.steps as u64, self.best.0.to_bits());
        let mut edits = record::write(&self.best.1).unwrap_or_default();
        ledger.whole(&mut steps);
        ledger.whole(&mut loss);
        ledger.bytes(&mut edits);
        self.courses.iter_mut().for_each(|course| course.show(ledger));
        if let Ledger::Read(rest) = ledger {
            match (usize::try_from(steps), record::read(&edits)) {
                (Ok(steps), Some(edits)) => (self.steps, self.best) = (steps, (f64::from_bits(loss), edits)),
                _ => *rest = None,
            }
        }
    }

    /// The bytes of its numbers.
    pub(super) fn bytes(&mut self) -> u64 {
        let mut ledger = Ledger::Count(0);
        self.show(&mut ledger);
        if let Ledger::Count(bytes) = ledger { bytes } else { 0 }
    }

    /// Where `state` says that it stood; `None` where that is about other numbers.
    pub(super) fn put_back(mut self, state: &[u8]) -> Option<Self> {
        let mut ledger = Ledger::Read(Some(state));
        self.show(&mut ledger);
        matches!(ledger, Ledger::Read(Some(rest)) if rest.is_empty()).then_some(self)
    }

    /// Keeps in `journal` under `key` where it stands.
    pub(super) fn keep(&mut self, journal: &dyn Journal, key: &str) -> Result<(), PassError> {
        let mut ledger = Ledger::Write(Vec::new());
        self.show(&mut ledger);
        let Ledger::Write(state) = ledger else { return Ok(()) };
        let kept = journal.stand(key, &state);
        kept.map_err(|problem| PassError::Model(format!("what was learned so far cannot be kept: {problem}")))
    }
}
