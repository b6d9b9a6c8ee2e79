//! `onnx-quant convert`

use std::path::PathBuf;

use passes::exec::Dataset;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::target::Target;

use super::common::{DataArgs, target_named};
use super::progress::{self, Shown};
use super::{Ended, eprint, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::report::readable_size;
use crate::{emit, import, lint, samples, verify};

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
    if let Some(problem) = emit::obstacle(target, &args.output, &args.model) {
        return Err(Error::Input(problem));
    }
    let imported = import::in_f32(&args.model).map_err(Error::input)?;
    driver::guard_inputs(&emit::main_file(target, &args.output), &args.model, &imported.external)?;
    refuse_lasting(&imported, target)?;
    samples::refuse_herding(&request)?;
    let executor = driver::executor(&request.executor, &imported.model)?;
    let progress = Shown::new(args.data.progress);
    let mut cx =
        PassContext { threads: request.threads, progress: &progress, ..PassContext::new(target, executor.as_ref()) };
    let pipeline = Pipeline::parse(PIPELINE, &passes::catalogue::passes()).map_err(Error::input)?;
    let (model, trace) = PassManager::default().run(&pipeline, imported.model, &mut cx)?;
    // Caches in codes have become float inputs.
    let dataset = samples::open(&request, Slot::of(model.graph()))?;
    cx.dataset = dataset.as_ref().map(|data| data as &dyn Dataset);
    trace.notes.iter().for_each(|note| eprint(&format!("{note}\n")));
    if model.plan().is_empty() {
        return Err(Error::Input(format!(
            "`{}` holds no codes that are read here: make some with `onnx-quant quantize`",
            args.model.display()
        )));
    }
    refuse_unread(&model)?;
    let lowered = target.lower(&model).map_err(|e| Error::Target(e.to_string()))?;
    driver::refuse_rejected(target, &lowered)?;
    lowered.notes.iter().for_each(|note| eprint(&format!("{note}\n")));
    let staged = emit::stage(target, (&model, lowered), &args.output, &imported.external, &args.memory)?;
    let verdict = verify::artifact(&staged.path(), &model, &mut cx)?;
    if progress::is_cancelled() {
        return Err(Error::Interrupted);
    }
    verdict.findings.iter().for_each(|finding| eprint(&format!("{finding}\n")));
    if !verdict.passed {
        eprint("error: the result does not read back as it was; nothing was written\n");
        return Ok(Ended::Broken);
    }
    let bytes = staged.bytes()?;
    staged.publish()?;
    print(&summary(&model, args, bytes));
    Ok(Ended::Done)
}

/// Refuses what `target` does not take in whatever dialect it is written.
fn refuse_lasting(imported: &import::Imported, target: &dyn Target) -> Result<(), Error> {
    let name = target.info().about.name;
    let found = lint::lasting(&imported.model, imported.opset, name);
    if found.is_empty() {
        return Ok(());
    }
    let said: Vec<String> = found.iter().map(ToString::to_string).collect();
    Err(Error::Target(format!("target `{name}` cannot take this model; nothing was written\n{}", said.join("\n"))))
}

/// Refuses quantizers of QONNX that were not read: no other dialect has them.
fn refuse_unread(model: &Model) -> Result<(), Error> {
    let ours = |domain: &str| domain == passes::ops::QONNX_DOMAIN || domain == "onnx.brevitas";
    let left = model.graph().nodes().find(|(_, node)| ours(&node.op.domain));
    left.map_or(Ok(()), |(_, node)| {
        let tensor = node.input(0).map_or(String::new(), |value| model.graph().value(value).name.escape_debug().to_string());
        Err(Error::Target(format!(
            "node `{}` rounds tensor `{tensor}` in a way that has no codes here: ties not to even, parameters that are computed, or a width \
             that no grid has",
            node.name.escape_debug()
        )))
    })
}

fn summary(model: &Model, args: &Args, bytes: u64) -> String {
    let weights = model.plan().encodings().filter(|(site, _)| model.plan().codes(*site).is_some()).count();
    let activations = model.plan().encodings().count() - weights;
    format!(
        "{} -> {}, {}\n{weights} constants and {activations} activations in codes\nverified   read back with the same codes and scales\n",
        args.model.display(),
        args.output.display(),
        readable_size(bytes)
    )
}
