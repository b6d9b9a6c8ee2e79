//! `onnx-quant inspect`

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use passes::ir::{Graph, Type};
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::reconstruct::{self, Block};
use passes::target::Target;
use serde_json::json;

use super::common::target_named;
use super::{Ended, eprint, print};
use crate::driver::{self, Error};
use crate::import;
use crate::report::readable_size;
use crate::targets::NORMALIZE;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model.
    model: PathBuf,
    /// What this target can run on codes.
    #[arg(long, default_value = "ort-cpu")]
    target: String,
    /// Show the blocks that `quantize --learn` learns one after another, of at most so many weights each, and where gradients stop.
    #[arg(long, value_name = "LAYERS", num_args = 0..=1, default_missing_value = "4")]
    blocks: Option<usize>,
    /// With --blocks: where blocks end instead, behind nodes whose names match this pattern (`*` stands for anything), as `ends` of --learn has it.
    #[arg(long, value_name = "PATTERN", requires = "blocks")]
    ends: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let target = target_named(&args.target)?;
    let imported = import::file(&args.model).map_err(Error::input)?;
    for note in &imported.notes {
        eprint(&format!("{note}\n"));
    }
    if let Some(layers) = args.blocks {
        print(&blocks(imported.model, target, (layers, args.ends.as_deref()), args.json)?);
        return Ok(Ended::Done);
    }
    let model = &imported.model;
    let graph = model.graph();
    let mut operators: BTreeMap<String, (usize, bool)> = BTreeMap::new();
    for (_, node) in graph.nodes() {
        let row = operators.entry(node.op.display()).or_insert((0, target.rule(&node.op).is_some()));
        row.0 += 1;
    }
    if args.json {
        let ops: BTreeMap<_, _> =
            operators.iter().map(|(op, (n, able))| (op, json!({ "count": n, "on_codes": able }))).collect();
        let value = json!({
            "opset": imported.opset,
            "nodes": graph.n_nodes(),
            "weight_bytes": graph.constant_bytes(),
            "inputs": ends(graph, graph.inputs()),
            "outputs": ends(graph, graph.outputs()),
            "operators": ops,
        });
        print(&format!("{value:#}\n"));
    } else {
        print(&text(model, imported.opset, &operators, target.info().about.name));
    }
    Ok(Ended::Done)
}

/// The blocks of `model`, normalized, with what enters and leaves them.
fn blocks(
    model: Model,
    target: &dyn Target,
    (layers, ends): (usize, Option<&str>),
    as_json: bool,
) -> Result<String, Error> {
    let pipeline = Pipeline::parse(NORMALIZE, &passes::catalogue::passes()).map_err(Error::input)?;
    let executor = driver::executor("auto", &model)?;
    let mut cx = PassContext::new(target, executor.as_ref());
    let (model, _) = PassManager::new(Vec::new(), false).run(&pipeline, model, &mut cx)?;
    let graph = model.graph();
    let plan = reconstruct::all_weights(graph);
    let is_there = |pattern: &&str| graph.nodes().any(|(_, node)| reconstruct::matches(pattern, &node.name));
    if let Some(pattern) = ends.filter(|pattern| !is_there(pattern)) {
        return Err(Error::Input(format!("--ends {pattern}: no node has such a name")));
    }
    let found = reconstruct::blocks(graph, &plan, layers, ends);
    let name = |value: &passes::id::ValueId| graph.value(*value).name.to_string();
    let first = |block: &Block| block.nodes.first().and_then(|id| graph.node(*id)).map(|node| node.name.to_string());
    let rows = found.iter().map(|block| {
        let outputs: Vec<String> = block.outputs.iter().map(name).collect();
        (block, first(block).unwrap_or_default(), outputs, reconstruct::boundary(graph, &plan, block))
    });
    if as_json {
        let rows = rows.map(|(block, first, outputs, stop)| {
            json!({ "layers": block.layers, "nodes": block.nodes.len(), "first": first, "outputs": outputs, "boundary": stop })
        });
        return Ok(format!("{:#}\n", serde_json::Value::Array(rows.collect())));
    }
    let mut text = format!("{:>5} {:>7} {:>6}  first node .. tensors that leave\n", "block", "weights", "nodes");
    for (i, (block, first, outputs, stop)) in rows.enumerate() {
        let stop = stop.map_or(String::new(), |reason| format!("\n{:22}gradients stop: {reason}", ""));
        let _ = writeln!(
            text,
            "{i:>5} {:>7} {:>6}  {first} .. {}{stop}",
            block.layers,
            block.nodes.len(),
            outputs.join(", ")
        );
    }
    Ok(text)
}

fn ends(graph: &Graph, ids: &[passes::id::ValueId]) -> Vec<String> {
    let show = |id: &passes::id::ValueId| {
        let value = graph.value(*id);
        match &value.ty {
            Type::Tensor(ty) => format!("{}: {ty}", value.name),
            Type::Opaque(_) => format!("{}: no tensor", value.name),
        }
    };
    ids.iter().map(show).collect()
}

fn text(model: &Model, opset: u32, operators: &BTreeMap<String, (usize, bool)>, target: &str) -> String {
    let graph = model.graph();
    let mut text = String::new();
    let _ = writeln!(
        text,
        "opset {opset}, {} nodes, {} of constants",
        graph.n_nodes(),
        readable_size(graph.constant_bytes() as u64)
    );
    for (what, ids) in [("input", graph.inputs()), ("output", graph.outputs())] {
        for end in ends(graph, ids) {
            let _ = writeln!(text, "{what:8}{end}");
        }
    }
    let _ = writeln!(text, "\n{:32}{:>8}  on codes in {target}", "operator", "nodes");
    for (op, (n, able)) in operators {
        let _ = writeln!(text, "{op:32}{n:>8}  {}", if *able { "yes" } else { "no: stays in float" });
    }
    let mut largest: Vec<(usize, String)> = graph
        .value_ids()
        .filter_map(|id| {
            let tensor = graph.constant(id)?;
            let shape = passes::ir::TensorType::of(tensor);
            Some((tensor.bytes().len(), format!("{}: {shape}", graph.value(id).name)))
        })
        .collect();
    largest.sort_by(|a, b| b.cmp(a));
    let _ = writeln!(text, "\nlargest constants");
    for (bytes, name) in largest.iter().take(5) {
        let _ = writeln!(text, "  {:>10}  {name}", readable_size(*bytes as u64));
    }
    text
}
