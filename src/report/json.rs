//! The summary for scripts, version 1.

use passes::diag::Place;
use passes::reconstruct::Cost;
use serde_json::{Value, json};

use super::{layers, peak_rss_bytes};
use crate::driver::{Outcome, Request};

/// A number, or null where it is not finite.
fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { Value::Null }
}

fn cost(cost: Cost) -> Value {
    json!({ "most": number(cost.most), "usual": number(cost.usual) })
}

/// The summary of `outcome`.
pub fn summary(request: &Request, outcome: &Outcome) -> Value {
    let all = layers(outcome);
    let rows: Vec<Value> = all
        .iter()
        .map(|layer| {
            json!({
                "name": layer.name,
                "op": layer.op,
                "weight": layer.weight.as_ref().map(|(format, granularity)| json!({ "format": format, "granularity": granularity })),
                "activation": layer.activation.as_ref().map(|format| json!({ "format": format })),
                "sqnr_db": layer.sqnr_db.map_or(Value::Null, number),
                "first_order": outcome.costs.as_ref().map(|_| json!({
                    "weight": layer.weight_cost.map(cost),
                    "activation": layer.activation_cost.map(cost),
                })),
                "loss_vs_nearest": layer.over_nearest.map_or(Value::Null, number),
                "kept_float": !layer.quantized,
                "reason": layer.reason,
            })
        })
        .collect();
    let quantized = all.iter().filter(|layer| layer.quantized).count();
    let able = |layer: &&super::Layer| !layer.quantized && outcome_has_rule(request, layer);
    let kept = all.iter().filter(able).count();
    json!({
        "version": 1,
        "tool": { "name": "onnx-quant", "version": env!("CARGO_PKG_VERSION") },
        "input": { "path": request.input.display().to_string(), "bytes": outcome.sizes.input_bytes, "opset": outcome.sizes.input_opset },
        "output": {
            "path": request.output.as_ref().map(|path| path.display().to_string()),
            "bytes": outcome.sizes.output_bytes,
            "opset": outcome.sizes.output_opset,
        },
        "target": request.target.info().about.name,
        "scheme": request.scheme.to_string(),
        "recipe": format!("{:?}", request.goal).to_lowercase(),
        "pipeline": outcome.pipeline,
        "executor": outcome.executor,
        "samples": outcome.samples,
        "layers": rows,
        "totals": { "quantized": quantized, "kept_float": kept, "skipped": all.len() - quantized - kept },
        "fidelity": outcome.fidelity.as_ref().map(|f| json!({
            "sqnr_db": number(f.sqnr_db),
            "cosine": number(f.cosine),
            "kl_top": f.kl_top.map_or(Value::Null, number),
            "samples": f.samples,
            "held_out": outcome.held_out,
        })),
        "verify": outcome.verdict.as_ref().map(|v| json!({ "passed": v.passed, "max_steps": v.max_steps.map_or(Value::Null, number) })),
        "stages": outcome.stages.iter().map(|s| json!({ "name": s.name, "seconds": s.time.as_secs_f64() })).collect::<Vec<_>>(),
        "peak_rss_bytes": peak_rss_bytes(),
        "estimated_rss_bytes": outcome.estimated_bytes,
        "seed": 0,
        "threads": request.threads,
        "diagnostics": outcome.notes.iter().map(diagnostic).collect::<Vec<_>>(),
    })
}

/// Whether the target runs this operator on codes at all: then it was kept in float, otherwise it was skipped.
fn outcome_has_rule(request: &Request, layer: &super::Layer) -> bool {
    request.target.rules().iter().any(|rule| rule.op == layer.op)
}

fn diagnostic(note: &passes::diag::Diagnostic) -> Value {
    let place = match &note.place {
        Place::Model => Value::Null,
        Place::Node(name) => json!({ "node": &**name }),
        Place::Value(name) => json!({ "tensor": &**name }),
    };
    json!({
        "code": note.code.0,
        "severity": note.severity.to_string(),
        "place": place,
        "message": note.message,
        "help": note.help,
    })
}
