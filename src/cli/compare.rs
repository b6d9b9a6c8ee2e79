//! `onnx-quant compare`

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use passes::caches::{self, Cache};
use passes::exec::Dataset as _;
use passes::id::{Name, Site, ValueId};
use passes::ir::{Def, Graph, Node};
use passes::model::{Model, Plan};
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::tensor::Tensor;
use serde_json::json;

use super::common::{DataArgs, target_named};
use super::progress::Shown;
use super::{Ended, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::import;
use crate::report;
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
    /// What `quantize --report` wrote about the quantized model: why each node got what it has.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

struct Row {
    tensor: String,
    op: String,
    noise: Noise,
    /// What the node that computes it multiplies with, in the quantized model: format and who shares a scale.
    weight: Option<(String, String)>,
    /// The format that it reads.
    activation: Option<String>,
    /// Why, where the report says.
    reason: Option<String>,
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
    let mut common = common(float.graph(), quantized.graph());
    let turned = turned(float.graph(), quantized.graph());
    common.retain(|(_, theirs)| !turned.iter().any(|cache| cache.present == *theirs));
    let mine: Vec<ValueId> = common.iter().map(|pair| pair.0).collect();
    let theirs: Vec<ValueId> = common.iter().map(|pair| pair.1).collect();
    let a = Simulation::prepare(float.graph(), &Plan::default(), executor.as_ref(), &mine).map_err(Error::input)?;
    let b =
        Simulation::prepare(quantized.graph(), quantized.plan(), executor.as_ref(), &theirs).map_err(Error::input)?;
    let reasons = args.report.as_deref().map(reasons).transpose()?.unwrap_or_default();
    let mut rows: Vec<Row> = common.iter().map(|pair| row(float.graph(), &quantized, *pair, &reasons)).collect();
    passes::exec::Progress::begin(&progress, "compare", dataset.len() as u64);
    for index in 0..dataset.len() {
        if passes::exec::Progress::cancelled(&progress) {
            return Err(Error::Interrupted);
        }
        let feeds = dataset.sample(index).map_err(Error::input)?;
        refuse_past(quantized.graph(), &turned, &feeds, &dataset.name(index))?;
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
    let name = |cache: &Cache| quantized.graph().value(cache.present).name.to_string();
    let left_out: Vec<String> = turned.iter().map(name).collect();
    print(&if args.json { as_json(&rows, &left_out) } else { as_text(&rows, &left_out, dataset.len()) });
    Ok(Ended::Done)
}

/// Computed float tensors that both models have under one name.
fn common(float: &Graph, quantized: &Graph) -> Vec<(ValueId, ValueId)> {
    let computed = |graph: &Graph, id: ValueId| matches!(graph.value(id).def, Def::Output { .. });
    let theirs: BTreeMap<_, _> = quantized
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

/// Caches of `quantized` whose numbers are others than those of `float` by design (see the pass `smooth-caches`): the past is read through
/// a product with a constant there, and as it is here.
fn turned(float: &Graph, quantized: &Graph) -> Vec<Cache> {
    let scaled = |graph: &Graph, cache: &Cache| {
        let Site::Use { node, .. } = cache.site else { return false };
        let by_constant = |node: &Node| node.inputs.iter().flatten().any(|value| graph.constant(*value).is_some());
        cache.is_apart && graph.node(node).is_some_and(|node| node.op.is("Mul") && by_constant(node))
    };
    let plain: BTreeSet<Name> = {
        let all = caches::find(float).0;
        let name = |cache: &Cache| float.value(cache.past).name.clone();
        all.iter().filter(|cache| !scaled(float, cache)).map(name).collect()
    };
    let theirs = caches::find(quantized).0.into_iter();
    theirs.filter(|cache| scaled(quantized, cache) && plain.contains(&quantized.value(cache.past).name)).collect()
}

/// Refuses a sample that brings a past for one of the `turned` caches: the same numbers would mean something else to each model.
fn refuse_past(graph: &Graph, turned: &[Cache], feeds: &[Tensor], sample: &str) -> Result<(), Error> {
    let has_past = |cache: &&Cache| {
        let at = graph.inputs().iter().position(|input| *input == cache.past);
        at.and_then(|at| feeds.get(at)).is_some_and(|past| !past.is_empty())
    };
    turned.iter().find(has_past).map_or(Ok(()), |cache| {
        Err(Error::Input(format!(
            "{sample} brings a past for `{}`, which the quantized model keeps in another basis (smooth-caches): compare both on samples \
             with none",
            graph.value(cache.past).name.escape_debug()
        )))
    })
}

fn row(graph: &Graph, quantized: &Model, (id, theirs): (ValueId, ValueId), reasons: &BTreeMap<String, String>) -> Row {
    let op = graph.producer(id).map_or_else(String::new, |(_, node)| node.op.display());
    let producer = quantized.graph().producer(theirs);
    let node = producer.map(|(node, _)| node);
    Row {
        tensor: graph.value(id).name.to_string(),
        op,
        noise: Noise::default(),
        weight: node.and_then(|node| report::weight(quantized, node)),
        activation: node.and_then(|node| report::activation(quantized, node)),
        reason: producer.and_then(|(_, node)| reasons.get(&*node.name).cloned()),
    }
}

/// The largest report that is read, in bytes: some kilobytes per node are many.
const LARGEST: u64 = 256 << 20;

/// Why nodes got what they have, by their names, as the report at `path` says.
fn reasons(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let wrong = |problem: String| Error::Input(format!("{}: {problem}", path.display()));
    let size = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if size > LARGEST {
        return Err(wrong(format!("a report of {size} bytes is none that quantize --report wrote")));
    }
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let report: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let layers = report.get("layers").and_then(|layers| layers.as_array());
    let layers = layers.ok_or_else(|| wrong("it has no `layers`: not a report of quantize --report".into()))?;
    let text = |layer: &serde_json::Value, key: &str| layer.get(key).and_then(|v| v.as_str()).map(str::to_owned);
    Ok(layers.iter().filter_map(|layer| Some((text(layer, "name")?, text(layer, "reason")?))).collect())
}

impl Row {
    /// The formats of what is multiplied, in words.
    fn formats(&self) -> String {
        match (&self.weight, &self.activation) {
            (Some((format, shared)), Some(activation)) => format!("{format} per {shared}, reads {activation}"),
            (Some((format, shared)), None) => format!("{format} per {shared}, reads float"),
            (None, Some(activation)) => format!("reads {activation}"),
            (None, None) => "float".into(),
        }
    }
}

fn as_json(rows: &[Row], left_out: &[String]) -> String {
    let finite = |v: f64| if v.is_finite() { json!(v) } else { serde_json::Value::Null };
    let row = |r: &Row| {
        json!({
            "tensor": r.tensor,
            "op": r.op,
            "sqnr_db": finite(r.noise.decibels()),
            "cosine": finite(r.noise.cosine()),
            "weight": r.weight.as_ref().map(|(format, granularity)| json!({ "format": format, "granularity": granularity })),
            "activation": r.activation.as_ref().map(|format| json!({ "format": format })),
            "reason": r.reason,
        })
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    format!("{:#}\n", json!({ "version": 1, "layers": rows, "left_out": left_out }))
}

fn as_text(rows: &[Row], left_out: &[String], samples: usize) -> String {
    let mut text = format!(
        "{} tensors on {samples} samples, worst first\n{:>8}  {:>9}  operator, tensor (formats: why)\n",
        rows.len(),
        "dB",
        "cosine"
    );
    for row in rows {
        let why = row.reason.as_ref().map_or_else(String::new, |reason| format!(": {}", reason.escape_debug()));
        let _ = writeln!(
            text,
            "{:8.2}  {:9.6}  {} {} ({}{why})",
            row.noise.decibels(),
            row.noise.cosine(),
            row.op,
            row.tensor.escape_debug(),
            row.formats()
        );
    }
    for name in left_out {
        let _ = writeln!(
            text,
            "left out: cache {}, which is in another basis by design (smooth-caches)",
            name.escape_debug()
        );
    }
    text
}
