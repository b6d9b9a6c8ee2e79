//! `onnx-quant compare`

use std::fmt::Write as _;
use std::path::PathBuf;

use passes::exec::Dataset as _;
use passes::id::ValueId;
use passes::ir::{Def, Graph};
use passes::model::{Model, Plan};
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use serde_json::json;

use super::common::{DataArgs, target_named};
use super::progress::Shown;
use super::{Ended, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::import;
use crate::samples;
use crate::verify::Noise;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The float model.
    float: PathBuf,
    /// The quantized model, with quantize and dequantize nodes.
    quantized: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

struct Row {
    tensor: String,
    op: String,
    noise: Noise,
}

/// Brings a model to the form in which both can be compared: quantization in the plan, constants folded.
const PIPELINE: &str = "infer-shapes, expand-qoperators, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead)";

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let request = args.data.request(&args.float, "ort-cpu")?;
    let float = import::in_f32(&args.float).map_err(Error::input)?.model;
    let quantized = import::in_f32(&args.quantized).map_err(Error::input)?.model;
    samples::refuse_herding(&request)?;
    let dataset = samples::open(&request, Slot::of(float.graph()))?;
    let dataset = dataset.ok_or_else(|| Error::Input("samples are needed: pass them with --data".into()))?;
    let executor = driver::executor(&request.executor, &float)?;
    let progress = Shown::new(args.data.progress);
    let mut cx = PassContext {
        dataset: Some(&dataset),
        threads: request.threads,
        progress: &progress,
        ..PassContext::new(target_named("ort-cpu")?, executor.as_ref())
    };
    driver::fit_memory(&request, &float, &mut cx, false)?;
    let catalogue = passes::catalogue::passes();
    let mut plain = |model: Model| -> Result<Model, Error> {
        let pipeline = Pipeline::parse(PIPELINE, &catalogue).map_err(Error::input)?;
        Ok(PassManager::default().run(&pipeline, model, &mut cx)?.0)
    };
    let (float, quantized) = (plain(float)?, plain(quantized)?);
    let common = common(float.graph(), quantized.graph());
    let mine: Vec<ValueId> = common.iter().map(|pair| pair.0).collect();
    let theirs: Vec<ValueId> = common.iter().map(|pair| pair.1).collect();
    let a = Simulation::prepare(float.graph(), &Plan::default(), executor.as_ref(), &mine).map_err(Error::input)?;
    let b =
        Simulation::prepare(quantized.graph(), quantized.plan(), executor.as_ref(), &theirs).map_err(Error::input)?;
    let mut rows: Vec<Row> = common.iter().map(|(id, _)| row(float.graph(), *id)).collect();
    passes::exec::Progress::begin(&progress, "compare", dataset.len() as u64);
    for index in 0..dataset.len() {
        if passes::exec::Progress::cancelled(&progress) {
            return Err(Error::Interrupted);
        }
        let feeds = dataset.sample(index).map_err(Error::input)?;
        let (x, y) = (a.run(&feeds).map_err(Error::input)?, b.run(&feeds).map_err(Error::input)?);
        for (row, (x, y)) in rows.iter_mut().zip(x.iter().zip(&y)) {
            if let (Some(x), Some(y)) = (x.values::<f32>(), y.values::<f32>()) {
                row.noise.add(&x, &y);
            }
        }
        passes::exec::Progress::step(&progress);
    }
    passes::exec::Progress::end(&progress);
    rows.sort_by(|p, q| p.noise.decibels().total_cmp(&q.noise.decibels()));
    print(&if args.json { as_json(&rows) } else { as_text(&rows, dataset.len()) });
    Ok(Ended::Done)
}

/// Computed float tensors that both models have under one name.
fn common(float: &Graph, quantized: &Graph) -> Vec<(ValueId, ValueId)> {
    let computed = |graph: &Graph, id: ValueId| matches!(graph.value(id).def, Def::Output { .. });
    let theirs: std::collections::BTreeMap<_, _> = quantized
        .value_ids()
        .filter(|id| computed(quantized, *id) && quantized.producer(*id).is_some())
        .map(|id| (quantized.value(id).name.clone(), id))
        .collect();
    float
        .nodes()
        .flat_map(|(_, node)| node.outputs.iter().flatten().copied())
        .filter(|id| passes::simulate::is_float_activation(float, *id))
        .filter_map(|id| Some((id, *theirs.get(&float.value(id).name)?)))
        .collect()
}

fn row(graph: &Graph, id: ValueId) -> Row {
    let op = graph.producer(id).map_or_else(String::new, |(_, node)| node.op.display());
    Row { tensor: graph.value(id).name.to_string(), op, noise: Noise::default() }
}

fn as_json(rows: &[Row]) -> String {
    let finite = |v: f64| if v.is_finite() { json!(v) } else { serde_json::Value::Null };
    let rows: Vec<_> = rows
        .iter()
        .map(|r| json!({ "tensor": r.tensor, "op": r.op, "sqnr_db": finite(r.noise.decibels()), "cosine": finite(r.noise.cosine()) }))
        .collect();
    format!("{:#}\n", json!({ "version": 1, "layers": rows }))
}

fn as_text(rows: &[Row], samples: usize) -> String {
    let mut text =
        format!("{} tensors on {samples} samples, worst first\n{:>8}  {:>9}  operator\n", rows.len(), "dB", "cosine");
    for row in rows {
        let _ = writeln!(
            text,
            "{:8.2}  {:9.6}  {} {}",
            row.noise.decibels(),
            row.noise.cosine(),
            row.op,
            row.tensor.escape_debug()
        );
    }
    text
}
