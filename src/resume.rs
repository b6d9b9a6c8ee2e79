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
/// began: how many samples fit, and whether gradients' moments do, decides what is learned.
pub(crate) fn keep_budgets(journal: &FileJournal, cx: &mut PassContext<'_>) -> Result<(), Error> {
    let key = "budgets";
    let numbers = |bytes: Vec<u8>| -> Option<[u64; 3]> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(8 * at..8 * at + 8)?.try_into().ok()?));
        Some([number(0)?, number(1)?, number(2)?])
    };
    // Nothing is bound by a run that came to nothing.
    let kept = journal.get(key).filter(|_| journal.len() > 1 || journal.stands());
    if let Some([pair, lone, state]) = kept.and_then(numbers) {
        (cx.pair_budget, cx.lone_budget, cx.state_budget) = (pair, lone, state);
    } else {
        let all = [cx.pair_budget, cx.lone_budget, cx.state_budget].map(u64::to_le_bytes).concat();
        journal.put(key, &all).map_err(Error::Resources)?;
    }
    Ok(())
}

/// What an interruption leaves behind.
pub(crate) fn paused(error: Error, journal: Option<&FileJournal>) -> Error {
    match (error, journal) {
        (Error::Interrupted, Some(journal)) => Error::Paused(journal.path().display().to_string()),
        (error, _) => error,
    }
}
