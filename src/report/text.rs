//! The summary for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use passes::diag::Severity;

use super::{Layer, layers, peak_rss_bytes};
use crate::driver::{Outcome, Request};

/// Diagnostics shown in full; the rest are counted by code.
const SHOWN: usize = 8;
/// Layers in the table of the worst.
const WORST: usize = 5;

/// The summary of `outcome`, ending with the command that reproduces it.
pub fn summary(request: &Request, outcome: &Outcome, command: &str) -> String {
    let all = layers(outcome);
    let mut text = String::new();
    notes(&mut text, outcome);
    operators(&mut text, &all);
    worst(&mut text, &all);
    costly(&mut text, &all);
    numbers(&mut text, request, outcome);
    let _ = writeln!(text, "again      {command}");
    text
}

fn notes(text: &mut String, outcome: &Outcome) {
    let told: Vec<_> = outcome.notes.iter().filter(|n| n.severity > Severity::Note).collect();
    for note in told.iter().take(SHOWN) {
        let _ = writeln!(text, "{note}");
    }
    let mut rest: BTreeMap<&str, usize> = BTreeMap::new();
    for note in outcome.notes.iter().filter(|n| n.severity == Severity::Note).chain(told.iter().skip(SHOWN).copied()) {
        *rest.entry(note.code.0).or_default() += 1;
    }
    if !rest.is_empty() {
        let counts: Vec<String> = rest.iter().map(|(code, n)| format!("{n} x {code}")).collect();
        let _ = writeln!(text, "also noted: {} (onnx-quant explain CODE; all of them in --report)", counts.join(", "));
    }
}

fn operators(text: &mut String, all: &[Layer]) {
    let mut rows: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for layer in all {
        let row = rows.entry(&layer.op).or_default();
        if layer.quantized {
            row.0 += 1;
        } else {
            row.1 += 1;
            *reasons.entry(&layer.reason).or_default() += 1;
        }
    }
    let _ = writeln!(text, "\n{:28}{:>10}{:>10}", "operator", "quantized", "float");
    for (op, (quantized, float)) in rows.iter().filter(|(_, (quantized, _))| *quantized > 0) {
        let _ = writeln!(text, "{op:28}{quantized:>10}{float:>10}");
    }
    let other: usize = rows.values().filter(|(quantized, _)| *quantized == 0).map(|(_, float)| float).sum();
    let _ = writeln!(text, "{:28}{:>10}{other:>10}", "all others", 0);
    let mut reasons: Vec<(&str, usize)> =
        reasons.into_iter().filter(|(reason, _)| !reason.starts_with("the target does not run")).collect();
    reasons.sort_by_key(|(reason, n)| (std::cmp::Reverse(*n), *reason));
    for (reason, n) in reasons.iter().take(6) {
        let _ = writeln!(text, "  {n} in float: {reason}");
    }
}

fn worst(text: &mut String, all: &[Layer]) {
    let mut measured: Vec<(&Layer, f64)> = all.iter().filter_map(|layer| Some((layer, layer.sqnr_db?))).collect();
    measured.sort_by(|a, b| a.1.total_cmp(&b.1));
    if measured.is_empty() {
        return;
    }
    let _ = writeln!(text, "\nworst layers (signal to noise of what they compute, errors before them included)");
    for (layer, sqnr) in measured.iter().take(WORST) {
        let _ = writeln!(text, "  {sqnr:6.1} dB  {}  {}", layer.op, layer.name.escape_debug());
    }
}

/// Where rounding costs most to first order.
fn costly(text: &mut String, all: &[Layer]) {
    let weights = all.iter().filter_map(|layer| Some((layer.weight_cost?, "its weight", layer)));
    let activations = all.iter().filter_map(|layer| Some((layer.activation_cost?, "what it reads", layer)));
    let mut costs: Vec<_> = weights.chain(activations).collect();
    costs.sort_by(|a, b| b.0.usual.total_cmp(&a.0.usual));
    if costs.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\ncostliest rounding (root of the error at the outputs, to first order: as usual, and at most)"
    );
    for (cost, what, layer) in costs.iter().take(WORST) {
        let name = layer.name.escape_debug();
        let _ = writeln!(text, "  {:9.2e} {:9.2e}  {} {name}: {what}", cost.usual, cost.most, layer.op);
    }
}

fn numbers(text: &mut String, request: &Request, outcome: &Outcome) {
    let sizes = &outcome.sizes;
    let ratio = sizes.input_bytes as f64 / sizes.output_bytes.max(1) as f64;
    let _ = writeln!(
        text,
        "\nsize       {} -> {} ({ratio:.2} times smaller)",
        size(sizes.input_bytes),
        size(sizes.output_bytes)
    );
    if let Some(fidelity) = &outcome.fidelity {
        let fitted = "of the samples it was fitted to: on others it may be worse (--hold-out N judges by those)";
        let of = if outcome.held_out { "held-out samples" } else { fitted };
        let n = fidelity.samples;
        let divergence = fidelity.kl_top.map_or_else(String::new, |kl| format!(", divergence {kl:.2e} (of classes)"));
        let _ = writeln!(
            text,
            "fidelity   {:.2} dB, cosine {:.5}{divergence} to the float model on {n} {of}",
            fidelity.sqnr_db, fidelity.cosine
        );
    }
    match &outcome.verdict {
        Some(v) if v.passed && v.max_steps.is_none() => {
            let _ = writeln!(text, "verified   read back as planned; not run: there were no samples");
        }
        Some(v) if v.passed => {
            let _ = writeln!(
                text,
                "verified   read back as planned; at most {:.3} steps from the simulation",
                v.max_steps.unwrap_or(0.0)
            );
        }
        Some(v) => {
            let _ = writeln!(text, "verified   FAILED: {} findings", v.findings.len());
        }
        None => {
            let _ = writeln!(text, "verified   no: nothing was written (--dry-run)");
        }
    }
    let _ = writeln!(text, "executor   {}", outcome.executor);
    let stages: Vec<String> =
        outcome.stages.iter().map(|stage| format!("{} {:.2} s", stage.name, stage.time.as_secs_f64())).collect();
    let _ = writeln!(text, "time       {}", stages.join(", "));
    if let Some(peak) = peak_rss_bytes() {
        let estimate = outcome.estimated_bytes.map_or(String::new(), |bytes| format!(", {} expected", size(bytes)));
        let _ = writeln!(text, "memory     {} at most{estimate}", size(peak));
    }
    if let Some(output) = &request.output {
        let _ = writeln!(text, "written    {}", output.display());
    }
}

/// Bytes in the unit that reads best.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
