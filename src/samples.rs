//! Which samples a run is fitted to, and which it is judged by.

use std::borrow::Cow;
use std::path::Path;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::exec::{Dataset, Executor, Progress};
use passes::imagine::Remembered;
use passes::ir::Graph;
use passes::model::Model;
use passes::pass::{PassContext, RunError};

use crate::dataset::{Augmented, Files, Imagined, Slot, Views};
use crate::driver::{Error, Request, Select};
use crate::memory;
use crate::recipe;

/// The samples of a request, when it names any.
pub(crate) fn open(request: &Request, slots: Vec<Slot>) -> Result<Option<Files>, Error> {
    if request.select != Select::First && request.samples.is_none_or(|n| n == 0) {
        return Err(Error::Input("--select says how samples are chosen: say how many with --samples".into()));
    }
    let limit = request.samples.filter(|_| request.select == Select::First);
    let open = |path: &Path| Files::open(path, slots, request.image.clone(), limit).map_err(Error::input);
    let mut files = request.data.as_deref().map(open).transpose()?;
    if let (Some(files), Select::Random, Some(n)) = (&mut files, request.select, request.samples) {
        files.keep(&drawn(files.n_samples(), n));
    }
    Ok(files)
}

/// Takes the samples out of `files` that nothing is fitted to, spread over all of them.
///
/// # Errors
/// [`Error::Input`] where none would be left.
pub(crate) fn hold_out(request: &Request, files: Option<&mut Files>) -> Result<Option<Files>, Error> {
    let wanted = request.hold_out;
    let Some(files) = files.filter(|_| wanted > 0) else {
        let problem = "--hold-out takes samples away from --data, and there are none";
        return if wanted > 0 { Err(Error::Input(problem.into())) } else { Ok(None) };
    };
    let all = files.n_samples();
    if wanted >= all {
        return Err(Error::Input(format!("--hold-out {wanted} leaves none of the {all} samples to calibrate with")));
    }
    let held: Vec<usize> = (0..wanted).map(|i| (2 * i + 1) * all / (2 * wanted)).collect();
    let rest: Vec<usize> = (0..all).filter(|index| held.binary_search(index).is_err()).collect();
    let judge = files.only(&held);
    files.keep(&rest);
    Ok(Some(judge))
}

/// `request` with as many variants of every sample of `files` as its recipe draws for `graph`, which is said in `notes`; as it is where the
/// user said how many, or inputs hold no words.
///
/// # Errors
/// [`Error::Input`] where a sample cannot be read.
pub(crate) fn with_variants<'r>(
    request: &'r Request,
    files: Option<&Files>,
    graph: &Graph,
    notes: &mut Vec<Diagnostic>,
) -> Result<Cow<'r, Request>, Error> {
    let as_it_is = || Ok(Cow::Borrowed(request));
    let Some(files) = files.filter(|_| recipe::asks_for_words(request)) else { return as_it_is() };
    let Some(words) = Augmented::new(files, graph, 0).map_err(Error::input)? else { return as_it_is() };
    let (all, kept) = (files.n_samples(), request.samples.unwrap_or(usize::MAX));
    let given = words.words().map_err(Error::input)? * kept.min(all) / all.max(1);
    let times = recipe::variants(given);
    if times == 0 {
        return as_it_is();
    }
    let message = format!("samples hold {given} words: the recipe draws {times} variants of each");
    let note = Diagnostic::new(diag::VARIANTS, Severity::Note, Place::Model, message);
    notes.push(note.help("--augment N says how many, 0 for none"));
    Ok(Cow::Owned(Request { augment: Some(times), ..request.clone() }))
}

/// The samples of `files` and the others that `request` asks for: views of pictures; variants where `model` takes token ids; made by it where its batch norms
/// remembered `remembered`.
///
/// # Errors
/// [`Error::Input`] where there are no samples, or `model` has neither.
pub(crate) fn augmented<'a>(
    request: &Request,
    (model, remembered): (&Model, &[Remembered]),
    files: Option<&'a Files>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Option<Box<dyn Dataset + 'a>>, Error> {
    let times = request.augment.unwrap_or(0);
    if request.views > 0 {
        let nothing = || Error::Input("--views shows the pictures of --data in other ways, and there are none".into());
        let made = Views::new(files.ok_or_else(nothing)?, request.views).map_err(Error::input)?;
        return Ok(Some(Box::new(made)));
    }
    if times == 0 {
        return Ok(None);
    }
    let nothing = || Error::Input("--augment makes samples like those of --data, and there are none".into());
    let (files, graph) = (files.ok_or_else(nothing)?, model.graph());
    let made: Option<Box<dyn Dataset + 'a>> = match Augmented::new(files, graph, times).map_err(Error::input)? {
        Some(words) => Some(Box::new(words.spoken(graph, (executor, request.threads), progress))),
        None => Imagined::new(
            files,
            (graph, remembered),
            (times, memory::allowed(request.max_memory)),
            (executor, request.threads),
            progress,
        )
        .map_err(Error::input)?
        .map(|made| Box::new(made) as Box<dyn Dataset + 'a>),
    };
    if progress.cancelled() { Err(Error::Interrupted) } else { Ok(made) }
}

/// What a run is fitted to.
pub(crate) fn all<'a>(varied: Option<&'a dyn Dataset>, given: Option<&'a Files>) -> Option<&'a dyn Dataset> {
    varied.or(given.map(|files| files as &dyn Dataset))
}

/// Refuses what only `quantize` can do with samples.
///
/// # Errors
/// [`Error::Input`].
pub(crate) fn refuse_herding(request: &Request) -> Result<(), Error> {
    if request.select == Select::Herding {
        return Err(Error::Input("--select herding runs the model to choose: only `quantize` does that".into()));
    }
    Ok(())
}

/// The numbers of as many samples of `files` as were asked for, by herding.
///
/// # Errors
/// [`Error`] when a sample cannot be read or run.
pub(crate) fn herded(
    request: &Request,
    model: &Model,
    files: &Files,
    cx: &PassContext<'_>,
) -> Result<Vec<usize>, Error> {
    let n = request.samples.unwrap_or(usize::MAX);
    let chosen = passes::herding::select(model.graph(), files, cx, n);
    Ok(chosen.map_err(|error| RunError::Pass { pass: "select", error })?)
}

/// `n` of the numbers below `all`, ascending, by a draw that is always the same.
fn drawn(all: usize, n: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..all).collect();
    numbers.sort_by_key(|&i| passes::seed::mixed(i as u64));
    numbers.truncate(n);
    numbers.sort_unstable();
    numbers
}
