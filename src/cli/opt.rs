//! `onnx-quant opt` and `onnx-quant cat`

use std::path::{Path, PathBuf};

use passes::exec::Dataset;
use passes::lower::Dialect;
use passes::model::Model;
use passes::pass::{Instrument, PassContext, PassInfo, PassManager, Pipeline, StepRecord};
use passes::text;

use super::common::{DataArgs, target_named};
use super::progress::{self, Shown};
use super::{Ended, eprint, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::emit::{self, Emit, Staged};
use crate::import;
use crate::load::Source;
use crate::samples;

/// Arguments of `opt`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model, .onnx or .oq.
    model: PathBuf,
    /// The passes to run; empty for none.
    #[arg(long, value_name = "TEXT")]
    pipeline: String,
    /// Where the result goes, .onnx or .oq [default: text on standard output].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The target that passes ask.
    #[arg(long, default_value = "ort-cpu")]
    target: String,
    /// Print the graph before this pass (or `all`), to standard error.
    #[arg(long, value_name = "PASS")]
    dump_before: Vec<String>,
    /// Print the graph after this pass (or `all`), to standard error.
    #[arg(long, value_name = "PASS")]
    dump_after: Vec<String>,
    /// Check every promise after every pass.
    #[arg(long)]
    check: bool,
    /// Stop after so many edits, to find the one that breaks something.
    #[arg(long, value_name = "N")]
    stop_after: Option<u64>,
    #[command(flatten)]
    data: DataArgs,
}

/// Arguments of `cat`.
#[derive(Debug, clap::Args)]
pub(crate) struct CatArgs {
    /// A model, .onnx or .oq.
    model: PathBuf,
    /// The form to print.
    #[arg(long, value_parser = ["oq", "onnx"], default_value = "oq")]
    to: String,
    /// Where it goes [default: standard output for oq].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A model and the files beside it that it keeps weights in.
fn load(path: &Path) -> Result<(Model, Vec<Source>), Error> {
    if path.extension().is_some_and(|e| e == "oq") {
        let fail = |e: &dyn std::fmt::Display| Error::Input(format!("`{}`: {e}", path.display()));
        let source = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
        return text::parse(&source).map(|model| (model, Vec::new())).map_err(|e| fail(&e));
    }
    let imported = import::file(path).map_err(Error::input)?;
    for note in &imported.notes {
        eprint(&format!("{note}\n"));
    }
    Ok((imported.model, imported.external))
}

/// A model as it stands in its file, and its ai.onnx version there.
pub(crate) fn load_as_is(path: &Path) -> Result<(Model, u32), Error> {
    if path.extension().is_some_and(|e| e == "oq") {
        let (model, _) = load(path)?;
        let opset = model.meta.opset();
        return Ok((model, opset));
    }
    let imported = import::file(path).map_err(Error::input)?;
    Ok((imported.model, imported.opset))
}

fn save(model: &Model, input: &Path, external: &[Source], output: Option<&Path>) -> Result<(), Error> {
    let Some(path) = output else {
        print(&text_of(model));
        return Ok(());
    };
    driver::guard_inputs(path, input, external)?;
    if path.extension().is_some_and(|e| e == "oq") {
        emit::atomically(path, |out| out.write_all(text_of(model).as_bytes()))?;
        return Ok(());
    }
    let lowered;
    let graph = if model.plan().is_empty() {
        model.graph()
    } else {
        lowered = passes::lower::lower(model, Dialect::QDQ_AND_ROWS).map_err(|e| Error::Target(e.to_string()))?;
        &lowered.graph
    };
    let file = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let name = (!external.is_empty()).then(|| format!("{file}.data"));
    let options = Emit { external: name, sources: external, ..Emit::default() };
    let staged = Staged::write(emit::model(graph, &model.meta, &options, &file), path, external)?;
    if progress::is_cancelled() {
        return Err(Error::Interrupted);
    }
    staged.publish()?;
    Ok(())
}

fn text_of(model: &Model) -> String {
    let graph = text::graph(model);
    if model.plan().is_empty() { graph } else { graph + &text::plan(model) }
}

/// Runs `opt`.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let (model, external) = load(&args.model)?;
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(&args.pipeline, &catalogue).map_err(Error::input)?;
    pipeline.check(model.facts(), &catalogue).map_err(Error::input)?;
    let request = args.data.request(&args.model, &args.target)?;
    samples::refuse_herding(&request)?;
    let dataset = samples::open(&request, Slot::of(model.graph()))?;
    let executor = driver::executor(&request.executor, &model)?;
    let progress = Shown::new(args.data.progress);
    let mut cx = PassContext {
        dataset: dataset.as_ref().map(|d| d as &dyn Dataset),
        threads: request.threads,
        progress: &progress,
        ..PassContext::new(target_named(&args.target)?, executor.as_ref())
    };
    driver::fit_memory(&request, &model, &mut cx, false)?;
    let watch = Watch { before: &args.dump_before, after: &args.dump_after, stop_after: args.stop_after };
    let mut manager = PassManager::new(vec![Box::new(watch)], args.check).audited(passes::equalize::PASSES);
    let (model, trace) = manager.run(&pipeline, model, &mut cx)?;
    for note in &trace.notes {
        eprint(&format!("{note}\n"));
    }
    save(&model, &args.model, &external, args.output.as_deref())?;
    Ok(Ended::Done)
}

/// Runs `cat`.
pub(crate) fn cat(args: &CatArgs) -> Result<Ended, Error> {
    let (model, external) = load(&args.model)?;
    progress::watch_interrupts();
    if args.to == "onnx" && args.output.is_none() {
        return Err(Error::Input("ONNX is not printed to a terminal: name a file with -o".into()));
    }
    save(&model, &args.model, &external, args.output.as_deref())?;
    Ok(Ended::Done)
}

/// Dumps and stops.
struct Watch<'a> {
    before: &'a [String],
    after: &'a [String],
    stop_after: Option<u64>,
}

fn wanted(list: &[String], pass: &PassInfo) -> bool {
    list.iter().any(|name| name == "all" || name == pass.about.name)
}

impl Instrument for Watch<'_> {
    fn before(&mut self, pass: &PassInfo, model: &Model) {
        if wanted(self.before, pass) {
            eprint(&format!("# before {}\n{}", pass.about.name, text_of(model)));
        }
    }

    fn after(&mut self, pass: &PassInfo, model: &Model, step: &StepRecord) {
        if wanted(self.after, pass) {
            let counts: Vec<String> = step.counts.iter().map(|(what, n)| format!("{what} {n}")).collect();
            eprint(&format!(
                "# after {}: rounds {}, {}\n{}",
                pass.about.name,
                step.rounds,
                counts.join(", "),
                text_of(model)
            ));
        }
    }

    fn stop(&self, edits_so_far: u64) -> bool {
        self.stop_after.is_some_and(|n| edits_so_far >= n)
    }
}
