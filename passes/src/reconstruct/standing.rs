//! Where learning of the whole model stands, and how a journal keeps that.

use super::block::Program;
use super::chain::{Chain, Link};
use super::ledger::Ledger;
use super::settings::Settings;
use super::train::Course;
use crate::grad::GradError;
use crate::id::Site;
use crate::journal::Journal;
use crate::model::{Edit, Model, Plan, record};
use crate::pass::PassError;

/// Where learning stands.
pub(super) struct Standing<'a> {
    /// So many steps have been made.
    pub(super) steps: usize,
    pub(super) courses: Vec<Course<'a>>,
    /// The least loss on the samples that are held out, and what came to it.
    pub(super) best: (f64, Vec<Edit>),
    /// So many checks in a row found nothing better.
    pub(super) in_vain: usize,
    /// The most bytes that the edits of a best one take.
    most: u64,
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
        let most = chain.links.iter().map(|link| most_edits(&link.program, model.plan())).sum();
        Ok(Self { steps: 0, courses, best: (f64::INFINITY, Vec::new()), in_vain: 0, most })
    }

    /// Shows all that steps and checks change.
    fn show(&mut self, ledger: &mut Ledger<'_>) {
        let (mut steps, mut loss) = (self.steps as u64, self.best.0.to_bits());
        let mut in_vain = self.in_vain as u64;
        let mut edits = match ledger {
            Ledger::Count(bytes) => {
                *bytes += self.most;
                Vec::new()
            }
            _ => record::write(&self.best.1).unwrap_or_default(),
        };
        ledger.whole(&mut steps);
        ledger.whole(&mut loss);
        ledger.whole(&mut in_vain);
        ledger.bytes(&mut edits);
        self.courses.iter_mut().for_each(|course| course.show(ledger));
        if let Ledger::Read(rest) = ledger {
            match (usize::try_from(steps), usize::try_from(in_vain), record::read(&edits)) {
                (Ok(steps), Ok(in_vain), Some(edits)) => {
                    (self.steps, self.in_vain, self.best) = (steps, in_vain, (f64::from_bits(loss), edits));
                }
                _ => *rest = None,
            }
        }
    }

    /// The most bytes that it ever takes.
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

    /// Keeps in `journal` under `key` where it stands, in no more than `room` bytes; whether it did.
    pub(super) fn keep(&mut self, journal: &dyn Journal, key: &str, room: u64) -> Result<bool, PassError> {
        let mut ledger = Ledger::Write(Vec::with_capacity(usize::try_from(self.bytes().min(room)).unwrap_or(0)));
        self.show(&mut ledger);
        let Ledger::Write(state) = ledger else { return Ok(false) };
        if state.len() as u64 > room {
            return Ok(false);
        }
        let kept = journal.stand(key, &state).map(|()| true);
        kept.map_err(|problem| PassError::Model(format!("what was learned so far cannot be kept: {problem}")))
    }
}

/// Beside its lists an edit takes no more: kind and site, the name of a grid, numbers, and the sizes of a tensor of up to eight dimensions.
const EDIT: u64 = 256;

/// The most bytes that edits of what is learned of `program` take: scales and zero points anew, and codes or values, for everything that
/// is learned; for biases in 32 bits twice, as they follow scales before they are learned.
fn most_edits(program: &Program, plan: &Plan) -> u64 {
    let scales = |site: Site| plan.encoding(site).map_or(0, |encoding| 8 * encoding.scale.len() as u64);
    let weights = program.weights.iter().map(|(_, site, tensor)| {
        let bits = plan.encoding(*site).map_or(32, |encoding| u64::from(encoding.grid.info().storage.bits()));
        2 * EDIT + scales(*site) + (bits * tensor.len() as u64).div_ceil(8)
    });
    let biases = program.biases.iter().map(|(_, site, tensor)| 3 * EDIT + scales(*site) + 8 * tensor.len() as u64);
    let steps = program.steps.iter().map(|(_, site)| EDIT + scales(*site));
    weights.chain(biases).chain(steps).sum()
}

#[cfg(test)]
mod tests {
    use super::super::block::Also;
    use super::super::by_blocks::edits;
    use super::super::chain::Budget;
    use super::super::measure::Wish;
    use super::super::settings::Usual;
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products};
    use super::*;
    use crate::journal::NoJournal;
    use crate::pass::{Options, PassContext};
    use crate::rounding;

    #[test]
    fn edits_take_no_more_than_is_said_before_there_are_any() {
        let data = Drawn(9);
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let model = rounding::in_nearest(&two_products(0.7)).unwrap();
        let also = Also { steps: true, norms: true, inputs: true, rest: 0 };
        let chain = Chain::linked(model.graph(), model.plan(), &cx, 1, also).unwrap().unwrap();
        let all = Budget { samples: cx.pair_budget, all: cx.lone_budget, batch: 4 };
        let chain = chain.with_samples(model.graph(), &cx, all, Wish::Fitting).unwrap().unwrap();
        let usual = Usual { learn: "latent", iterations: 9, batch: 4, norms: true, loss: "fitting", warmup: 0.2 };
        let settings = Settings::of(&Options::default(), &usual).unwrap().unwrap();
        let mut at = Standing::begin(&model, &chain, &settings, 1).unwrap();
        let bound = at.bytes();
        for link in &chain.links {
            let weights = link.program.weights_of(model.plan()).unwrap();
            let mut hard = link.program.start(&weights);
            // Other scales than before, so that they are written too.
            hard.scales.iter_mut().flatten().for_each(|scale| *scale *= 1.5);
            at.best.1.extend(edits(&model, &link.block, &link.program, &weights, &hard).unwrap());
        }
        assert!(at.best.1.len() >= 4, "{:?}", at.best.1);
        assert_eq!(at.bytes(), bound);
        let mut out = Ledger::Write(Vec::new());
        at.show(&mut out);
        let Ledger::Write(state) = out else { panic!("{out:?}") };
        let bytes = state.len() as u64;
        assert!(bytes <= bound, "{bytes} bytes, and at most {bound}");
        assert!(at.keep(&NoJournal, "way", bytes).unwrap());
        assert!(!at.keep(&NoJournal, "way", bytes - 1).unwrap(), "no more than there is room for");
    }
}
