//! `onnx-quant stats`

use std::path::PathBuf;

use passes::exec::Dataset as _;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::target::Goal;

use super::common::{DataArgs, target_named};
use super::progress::Shown;
use super::{Ended, eprint};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::import;
use crate::samples;
use crate::stats::StatsFile;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The float model.
    #[arg(required = true)]
    model: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// Measure what this target needs.
    #[arg(long, default_value = "ort-cpu")]
    target: String,
    /// Where the statistics go.
    #[arg(short, long, required = true)]
    output: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Join statistics that were measured on parts of the data.
    Merge {
        /// Files written by `onnx-quant stats`.
        #[arg(required = true)]
        parts: Vec<PathBuf>,
        /// Where the joined statistics go.
        #[arg(short, long)]
        output: PathBuf,
    },
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    match &args.command {
        Some(Command::Merge { parts, output }) => merge(parts, output),
        None => measure(args),
    }
}

fn merge(parts: &[PathBuf], output: &std::path::Path) -> Result<Ended, Error> {
    let mut joined: Option<StatsFile> = None;
    for part in parts {
        let next = StatsFile::read(part)?;
        joined = Some(match joined {
            Some(before) => before.merged(next)?,
            None => next,
        });
    }
    let joined = joined.unwrap_or_default();
    joined.write(output)?;
    eprint(&format!("{} samples, {} tensors in {}\n", joined.samples, joined.tensors.len(), output.display()));
    Ok(Ended::Done)
}

fn measure(args: &Args) -> Result<Ended, Error> {
    let (Some(input), Some(output)) = (&args.model, &args.output) else {
        return Err(Error::Input("a model and -o are needed".into()));
    };
    let target = target_named(&args.target)?;
    let request = args.data.request(input, &args.target)?;
    let model = import::in_f32(input).map_err(Error::input)?.model;
    samples::refuse_herding(&request)?;
    let dataset = samples::open(&request, Slot::of(model.graph()))?;
    let dataset = dataset.ok_or_else(|| Error::Input("samples are needed: pass them with --data".into()))?;
    let executor = driver::executor(&request.executor, &model)?;
    let progress = Shown::new(args.data.progress);
    // The target's own pipeline, up to and with what makes wishes: deciding is cheap, and nothing is written. The fast one
    // wishes for all that fits a file; matrices do not.
    let text = target.pipeline(Goal::Fast, &request.scheme);
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(&text, &catalogue).map_err(Error::input)?;
    let mut cx = PassContext {
        dataset: Some(&dataset),
        threads: request.threads,
        progress: &progress,
        ..PassContext::new(target, executor.as_ref())
    };
    driver::fit_memory(&request, &model, &mut cx, false)?;
    let (model, _) = PassManager::default().run(&pipeline, model, &mut cx)?;
    let file = StatsFile::of(dataset.len() as u64, &model);
    file.write(output)?;
    eprint(&format!("{} samples, {} tensors in {}\n", file.samples, file.tensors.len(), output.display()));
    Ok(Ended::Done)
}
