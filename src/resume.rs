//! Going on from what an interrupted run has learned.

use std::path::{Path, PathBuf};

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::journal::Journal as _;
use passes::pass::PassContext;

use crate::driver::{Error, Kept, Request};
use crate::journal::{self, FileJournal};
use crate::load::Source;

/// The journal of this run, where it learns anything and writes it down.
pub(crate) fn open_journal(
    request: &Request,
    pipeline: &str,
    external: &[Source],
) -> Result<Option<FileJournal>, Error> {
    let learns = ["learn=", "distill"].iter().any(|word| pipeline.contains(word));
    let (Some(output), true) = (&request.output, learns) else {
        let problem = "--resume: only runs that learn (--learn, --distill) and write a file (-o) keep a journal";
        return if request.journal == Kept::Needed { Err(Error::Input(problem.into())) } else { Ok(None) };
    };
    let mut paths: Vec<&Path> = vec![&request.input];
    paths.extend(external.iter().map(|source| source.path.as_path()));
    paths.extend(request.data.iter().chain(&request.stats).map(PathBuf::as_path));
    // What changes no byte of the output may differ.
    let asked = Request { output: None, threads: 0, journal: Kept::Used, first_order: false, ..request.clone() };
    let words = format!("{} {pipeline} {asked:?}", env!("CARGO_PKG_VERSION"));
    let identity = journal::identity(&paths, &words).map_err(Error::input)?;
    let path = FileJournal::beside(output);
    let (fresh, needed) = (request.journal == Kept::Fresh, request.journal == Kept::Needed);
    let opened = FileJournal::open(&path, identity, fresh, needed).map_err(Error::input)?;
    Ok(Some(opened))
}

/// What the user should know of what the journal holds.
pub(crate) fn resumed(journal: &FileJournal) -> Option<Diagnostic> {
    // One record says how much memory there is.
    let blocks = journal.len().saturating_sub(1);
    let stands = journal.stands();
    let way = if stands { ", and where that stood on its way through the whole model" } else { "" };
    let message = format!("it went on behind {blocks} blocks that an earlier run has learned{way}");
    (blocks > 0 || stands).then(|| Diagnostic::new(diag::RESUMED, Severity::Note, Place::Model, message))
}

/// Where anything has been learned, samples that wait between stages, and what is kept of all weights, take as much memory as in the run that
/// began: how many samples fit, and whether gradients' moments do, decides what is learned. What else is free decides it only where `pipeline`
/// draws gradients through the whole model, or learns all of it at once; blocks are learned in what there is now. Returns what the user should
/// know where that is less.
pub(crate) fn keep_budgets(
    journal: &FileJournal,
    pipeline: &str,
    cx: &mut PassContext<'_>,
) -> Result<Option<Diagnostic>, Error> {
    let key = "budgets";
    let numbers = |bytes: Vec<u8>| -> Option<[u64; 3]> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(8 * at..8 * at + 8)?.try_into().ok()?));
        Some([number(0)?, number(1)?, number(2)?])
    };
    let today = [cx.pair_budget, cx.lone_budget, cx.state_budget];
    // Nothing is bound by a run that came to nothing.
    let kept = journal.get(key).filter(|_| journal.len() > 1 || journal.stands());
    let Some([pair, lone, state]) = kept.and_then(numbers) else {
        journal.put(key, &today.map(u64::to_le_bytes).concat()).map_err(Error::Resources)?;
        return Ok(None);
    };
    let is_bound = THROUGH_ALL.iter().any(|word| pipeline.contains(word));
    let began = [pair, if is_bound { lone } else { cx.lone_budget }, state];
    [cx.pair_budget, cx.lone_budget, cx.state_budget] = began;
    Ok(less(began, today))
}

/// What goes through the whole model at once, in the text of a pipeline.
const THROUGH_ALL: [&str; 7] = ["distill", "coupled", "adaptive", "stakes", "fisher", "tacq", "gradient-l1"];

/// What is free differs by so many bytes from one run to the next.
const SLACK: u64 = 256 << 20;

/// What to say where a run goes on with the budgets that it `began` with, and there is less `today`.
fn less(began: [u64; 3], today: [u64; 3]) -> Option<Diagnostic> {
    let missing = began.iter().zip(today).map(|(began, today)| began.saturating_sub(today)).max()?;
    let is_known = began.iter().all(|bytes| *bytes < u64::MAX);
    (is_known && missing > SLACK).then_some(())?;
    let message = format!(
        "it goes on with the memory that the run which began had, and {} MB less are free now: what is learned depends on it",
        missing / 1_000_000
    );
    let help = "close what else takes memory, pass as few --threads as before, or begin anew within what there is with --fresh";
    Some(Diagnostic::new(diag::RESUMED, Severity::Warning, Place::Model, message).help(help))
}

/// What an interruption leaves behind.
pub(crate) fn paused(error: Error, journal: Option<&FileJournal>) -> Error {
    match (error, journal) {
        (Error::Interrupted, Some(journal)) => Error::Paused(journal.path().display().to_string()),
        (error, _) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn went_on(pipeline: &str, today: [u64; 3]) -> ([u64; 3], Option<Diagnostic>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.journal");
        let meta = passes::model::Metadata::default();
        let executor = (crate::exec::find("rten").unwrap().build)(&meta).unwrap();
        let context = |[pair_budget, lone_budget, state_budget]: [u64; 3]| PassContext {
            pair_budget,
            lone_budget,
            state_budget,
            ..PassContext::new(crate::targets::TARGETS[0], executor.as_ref())
        };
        let open = || FileJournal::open(&path, [7; 32], false, false).unwrap();
        let first = open();
        assert!(keep_budgets(&first, pipeline, &mut context([1 << 30, 4 << 30, 2 << 30])).unwrap().is_none());
        first.put("block 1", b"learned").unwrap();
        drop(first); // its lock
        let mut cx = context(today);
        let said = keep_budgets(&open(), pipeline, &mut cx).unwrap();
        ([cx.pair_budget, cx.lone_budget, cx.state_budget], said)
    }

    #[test]
    fn blocks_are_learned_in_what_is_free_now_and_what_decides_stays() {
        let (budgets, said) = went_on("round-in-order{learn=brecq}", [1 << 30, 3 << 30, 2 << 30]);
        assert!(budgets == [1 << 30, 3 << 30, 2 << 30] && said.is_none(), "{said:?}");
        let (budgets, said) = went_on("round-in-order{coupled=1}", [1 << 30, 3 << 30, 2 << 30]);
        assert_eq!(budgets, [1 << 30, 4 << 30, 2 << 30]);
        assert!(said.unwrap().to_string().contains("1073 MB less"));
        let (budgets, said) = went_on("round-in-order{learn=brecq}", [1 << 20, 1 << 30, 0]);
        assert_eq!(budgets, [1 << 30, 1 << 30, 2 << 30]);
        assert!(said.is_some());
    }
}
