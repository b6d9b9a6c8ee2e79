//! What a target will reject, leave in float, fail to fuse or run slowly, before anybody runs it: one table of rules per target.

mod finn;
mod hls4ml;
mod npu;
mod onnx;
mod openvino;
mod ort_cpu;
mod qonnx;
mod rows;
mod subject;
mod tensorrt;
mod tract;

use passes::diag::{Code, Diagnostic, Place, Severity};
use passes::ir::Node;
use passes::model::Model;

use subject::Subject;

/// One thing that a consumer does not take, or not well.
#[derive(Debug)]
pub struct Lint {
    /// `OQ8` and three digits: 0xx any reader of the format, 1xx ONNX Runtime, 2xx `OpenVINO`, 3xx `TensorRT`, 4xx QONNX and its readers,
    /// 5xx tract, 6xx NPUs.
    pub code: Code,
    /// An error is rejected, or computed wrong; a warning stays in float, does not fuse or is slow.
    pub severity: Severity,
    /// What is wrong, one line.
    pub title: &'static str,
    /// What to do about it.
    pub help: &'static str,
    /// How it is known.
    pub source: &'static str,
    check: fn(&Subject<'_>, &mut Findings<'_>),
}

const fn error(
    code: &'static str,
    title: &'static str,
    help: &'static str,
    source: &'static str,
    check: Check,
) -> Lint {
    Lint { code: Code(code), severity: Severity::Error, title, help, source, check }
}

const fn warning(
    code: &'static str,
    title: &'static str,
    help: &'static str,
    source: &'static str,
    check: Check,
) -> Lint {
    Lint { code: Code(code), severity: Severity::Warning, title, help, source, check }
}

type Check = fn(&Subject<'_>, &mut Findings<'_>);

/// The rules of a target, by its name.
static TABLES: &[(&str, &[&[Lint]])] = &[
    ("ort-cpu", &[onnx::LINTS, rows::COMPUTED, ort_cpu::LINTS]),
    ("onnx-qdq", &[onnx::LINTS, rows::COMPUTED]),
    ("qoperator", &[onnx::LINTS, rows::REJECTED]),
    ("openvino-cpu", &[onnx::LINTS, rows::REJECTED, openvino::LINTS]),
    ("tensorrt", &[onnx::LINTS, rows::REJECTED, tensorrt::LINTS]),
    ("qonnx", &[rows::REJECTED, qonnx::LINTS]),
    ("hls4ml", &[rows::REJECTED, qonnx::LINTS, hls4ml::LINTS]),
    ("finn", &[rows::REJECTED, qonnx::LINTS, finn::LINTS]),
    ("tract", &[onnx::LINTS, rows::REJECTED, tract::LINTS]),
    ("qnn", &[onnx::LINTS, rows::REJECTED, npu::SHAPES, npu::QNN]),
    ("packed", &[onnx::LINTS, rows::COMPUTED, ort_cpu::LINTS]),
    ("rtl-mem", &[rows::REJECTED, qonnx::LINTS]),
    ("vitisai", &[onnx::LINTS, rows::REJECTED, npu::SHAPES, npu::VITISAI]),
    ("safetensors-ct", &[rows::REJECTED]),
];

/// Every rule, in the order of codes.
pub fn all() -> Vec<&'static Lint> {
    let mut lints: Vec<&Lint> =
        TABLES.iter().flat_map(|(_, tables)| tables.iter()).flat_map(|table| table.iter()).collect();
    lints.sort_by_key(|lint| lint.code);
    lints.dedup_by_key(|lint| lint.code);
    lints
}

/// The targets that `lint` holds for.
pub fn targets_of(lint: &Lint) -> Vec<&'static str> {
    let has = |tables: &[&[Lint]]| tables.iter().any(|table| table.iter().any(|other| other.code == lint.code));
    TABLES.iter().filter(|(_, tables)| has(tables)).map(|(name, _)| *name).collect()
}

/// What the rules of `target` find in `model`, which was imported from a file of `opset` and not changed since; errors first.
pub fn lint(model: &Model, opset: u32, target: &str) -> Vec<Diagnostic> {
    found_by(model, opset, tables(target).flat_map(|table| table.iter()))
}

/// What `target` rejects in the quantized `model` and no conversion mends.
pub fn lasting(model: &Model, opset: u32, target: &str) -> Vec<Diagnostic> {
    let rejects = |lint: &Lint| tables(target).flat_map(|table| table.iter()).any(|other| other.code == lint.code);
    found_by(model, opset, rows::REJECTED.iter().filter(|lint| rejects(lint)))
}

/// The rules of `target`.
fn tables(target: &str) -> impl Iterator<Item = &'static [Lint]> {
    TABLES.iter().filter(move |(name, _)| *name == target).flat_map(|(_, tables)| tables.iter().copied())
}

fn found_by(model: &Model, opset: u32, lints: impl Iterator<Item = &'static Lint>) -> Vec<Diagnostic> {
    let subject = Subject::of(model, opset);
    let mut found = Vec::new();
    for lint in lints {
        (lint.check)(&subject, &mut Findings { lint, found: &mut found });
    }
    found.sort_by_key(|finding: &Diagnostic| std::cmp::Reverse(finding.severity));
    found
}

/// Where one rule reports to.
struct Findings<'a> {
    lint: &'static Lint,
    found: &'a mut Vec<Diagnostic>,
}

impl Findings<'_> {
    fn at(&mut self, place: Place, message: impl Into<String>) {
        let message = format!("{}: {}", self.lint.title, message.into());
        self.found.push(Diagnostic::new(self.lint.code, self.lint.severity, place, message).help(self.lint.help));
    }

    fn node(&mut self, node: &Node, message: impl Into<String>) {
        self.at(Place::Node(node.name.clone()), message);
    }

    fn model(&mut self, message: impl Into<String>) {
        self.at(Place::Model, message);
    }
}
