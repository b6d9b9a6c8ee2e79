//! What a request asks for that cannot be done: told before anything runs.

use std::path::Path;

use crate::driver::{Error, Request};
use crate::emit;
use crate::load::Source;
use crate::recipe::pipeline_text;
use crate::request::Rest;
use crate::targets;

/// Refuses what `request` asks for and its target, recipe or data do not allow.
///
/// # Errors
/// [`Error`] says what, why and what to do instead.
pub(crate) fn check_request(request: &Request) -> Result<(), Error> {
    if let Some(what) = request.target.refuses(&request.scheme) {
        let name = request.target.info().about.name;
        return Err(Error::Target(format!("target `{name}` cannot take scheme {}: {what}", request.scheme)));
    }
    if request.rest == Rest::F16 && !request.target.accepts().half {
        let name = request.target.info().about.name;
        return Err(Error::Target(format!(
            "target `{name}` computes what stays in float in 32 bits: leave --rest f16 out"
        )));
    }
    if request.rotate && request.pipeline.is_some() {
        return Err(Error::Input(
            "--rotate changes the recipe's pipeline: put `rotate` into the one of --pipeline instead".into(),
        ));
    }
    if let Some(bits) = request.cache.filter(|bits| ![4, 8].contains(bits) || request.pipeline.is_some()) {
        return Err(Error::Input(if request.pipeline.is_some() {
            "--cache changes the recipe's pipeline: put `encode-caches` into the one of --pipeline instead".into()
        } else {
            format!("--cache {bits}: numbers in a cache have 4 or 8 bits")
        }));
    }
    if let Some(bits) = request.cache.filter(|_| !request.target.accepts().caches) {
        let take =
            targets::TARGETS.iter().filter(|target| target.accepts().caches).map(|target| target.info().about.name);
        return Err(Error::Target(format!(
            "--cache {bits}: {} takes no caches in codes; {} do",
            request.target.info().about.name,
            take.collect::<Vec<_>>().join(" and ")
        )));
    }
    if let Some(method) = request.learn.as_ref().filter(|_| !pipeline_text(request).contains("round-in-order")) {
        return Err(Error::Input(format!(
            "--learn {method}: codes are learned from those that `round-in-order` chose, which this recipe does not run: add \
                 `--recipe best`"
        )));
    }
    for (option, method) in [("--learn", &request.learn), ("--distill", &request.distill)] {
        if let Some(method) = method.as_ref().filter(|_| request.data.is_none()) {
            return Err(Error::Input(format!("{option} {method} needs samples to learn from: pass them with --data")));
        }
    }
    if let Some(scheme) = request.embeddings {
        let blocks = scheme.weight_format.is_none() && scheme.activation_bits.is_none() && scheme.block.is_some();
        if !blocks || request.target.refuses(&scheme).is_some() {
            return Err(Error::Target(format!(
                "--embeddings {scheme}: tables are integers of 2 to 8 bits in blocks of 16, 32, 64, 128 or 256 columns, and what is \
                 gathered is float: write w8a16g32 or w4a16g32asym"
            )));
        }
    }
    if request.first_order && request.data.is_none() {
        return Err(Error::Input("--first-order needs samples to take gradients on: pass them with --data".into()));
    }
    if let Some(problem) = request.output.as_ref().and_then(|o| emit::obstacle(request.target, o, &request.input)) {
        return Err(Error::Input(problem));
    }
    let measures = request.scheme.measures();
    if measures && request.data.is_none() && request.stats.is_none() && request.pipeline.is_none() {
        return Err(Error::Input(format!(
            "scheme {} needs calibration samples: pass a folder or file with --data, or measured statistics with --stats",
            request.scheme
        )));
    }
    Ok(())
}

/// Refuses a budget that the pipeline `text` has no place for, and a way to judge weights where nothing is to be spent on them.
pub(crate) fn check_budget(request: &Request, text: &str) -> Result<(), Error> {
    if let Some(metric) = &request.sensitivity {
        let problem = match (request.budget, request.max_drop) {
            (None, _) => Some("--sensitivity says how --budget judges weights: give that too"),
            (_, Some(_)) => {
                Some("--sensitivity is for --budget alone: --max-drop goes by squared errors of the outputs")
            }
            _ if text.contains(&format!("metric={metric}")) => None,
            _ => Some(
                "--sensitivity: the pipeline has an `allocate-bits` of its own, or no `assign-encodings`; set metric= there",
            ),
        };
        if let Some(problem) = problem {
            return Err(Error::Input(problem.into()));
        }
    }
    if request.budget.is_none() || text.contains("allocate-bits") {
        return Ok(());
    }
    let problem = "--budget gives weights their bits behind `assign-encodings`, which the pipeline does not have";
    Err(Error::Input(problem.into()))
}

/// Refuses an output that would replace the input model at `input` or one of its external files.
///
/// # Errors
/// [`Error::Input`] names the file.
pub(crate) fn guard_inputs(output: &Path, input: &Path, external: &[Source]) -> Result<(), Error> {
    let mut data = output.as_os_str().to_owned();
    data.push(".data");
    for written in [output, Path::new(&data)] {
        let Ok(written) = written.canonicalize() else { continue };
        let read = std::iter::once(input).chain(external.iter().map(|source| source.path.as_path()));
        if read.filter_map(|path| path.canonicalize().ok()).any(|path| path == written) {
            let name = written.display();
            return Err(Error::Input(format!(
                "writing `{name}` would replace the input, which is never touched: choose another -o"
            )));
        }
    }
    Ok(())
}
