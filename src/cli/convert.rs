//! `onnx-quant convert`

use std::path::PathBuf;

use passes::exec::Dataset;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};

use super::common::{DataArgs, target_named};
use super::progress::{self, Shown};
use super::{Ended, eprint, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::report::readable_size;
use crate::{emit, import, samples, verify};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A quantized model, in any dialect that is read: QDQ, `QOperator`, `MatMulNBits`, QONNX, packed.
    model: PathBuf,
    /// Where the result goes.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Whose dialect it is to be written in.
    #[arg(long)]
    target: String,
    /// How --target rtl-mem folds and writes weights: pe=4,simd=8,format=coe.
    #[arg(long, value_name = "LAYOUT", default_value = "format=mem")]
    memory: emit::Layout,
    #[command(flatten)]
    data: DataArgs,
}

/// Quantization into the plan; nothing else of the graph changes.
const PIPELINE: &str = "infer-shapes, expand-qoperators, absorb-qdq, infer-shapes, drop-dead";

/// Runs the command: the same codes and scales, spelled for another consumer. Samples, where given, only check the result.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let request = args.data.request(&args.model, &args.target)?;
    let target = target_named(&args.target)?;
    let imported = import::file(&args.model).map_err(Error::input)?;
    driver::guard_inputs(&emit::main_file(target, &args.output), &args.model, &imported.external)?;
    samples::refuse_herding(&request)?;
    let dataset = samples::open(&request, Slot::of(imported.model.graph()))?;
    let executor = driver::executor(&request.executor, &imported.model)?;
    let progress = Shown::new(args.data.progress);
    let mut cx = PassContext {
        dataset: dataset.as_ref().map(|data| data as &dyn Dataset),
        threads: request.threads,
        progress: &progress,
        ..PassContext::new(target, executor.as_ref())
    };
    let pipeline = Pipeline::parse(PIPELINE, &passes::catalogue::passes()).map_err(Error::input)?;
    let (model, trace) = PassManager::default().run(&pipeline, imported.model, &mut cx)?;
    trace.notes.iter().for_each(|note| eprint(&format!("{note}\n")));
    if model.plan().is_empty() {
        return Err(Error::Input(format!(
            "`{}` holds no codes that are read here: make some with `onnx-quant quantize`",
            args.model.display()
        )));
    }
    let lowered = target.lower(&model).map_err(|e| Error::Target(e.to_string()))?;
    driver::refuse_rejected(target, &lowered)?;
    lowered.notes.iter().for_each(|note| eprint(&format!("{note}\n")));
    let staged = emit::stage(target, (&model, lowered), &args.output, &imported.external, &args.memory)?;
    let verdict = verify::artifact(&staged.path(), &model, &mut cx)?;
    if progress::is_cancelled() {
        return Err(Error::Interrupted);
    }
    verdict.findings.iter().for_each(|finding| eprint(&format!("{finding}\n")));
    let bytes = staged.bytes()?;
    staged.publish()?;
    print(&summary(&model, args, bytes, verdict.passed));
    Ok(if verdict.passed { Ended::Done } else { Ended::Broken })
}

fn summary(model: &Model, args: &Args, bytes: u64, passed: bool) -> String {
    let weights = model.plan().encodings().filter(|(site, _)| model.plan().codes(*site).is_some()).count();
    let activations = model.plan().encodings().count() - weights;
    let verified = if passed { "read back with the same codes and scales" } else { "FAILED: see above" };
    format!(
        "{} -> {}, {}\n{weights} constants and {activations} activations in codes\nverified   {verified}\n",
        args.model.display(),
        args.output.display(),
        readable_size(bytes)
    )
}
