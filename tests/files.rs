//! One test per file under `fixtures/`: a pass over a graph in text form, and graphs that must be refused.

#![allow(missing_docs, clippy::needless_pass_by_value, reason = "test binary; the harness hands texts over by value")]

use std::path::Path;

use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::text;

/// Passes over float graphs run nothing.
#[derive(Debug)]
struct NoExecutor;

impl Executor for NoExecutor {
    fn name(&self) -> &'static str {
        "none"
    }

    fn prepare(&self, _: &Graph) -> Result<Box<dyn Session>, ExecError> {
        Err(ExecError { executor: "none", message: "golden tests run nothing".into() })
    }
}

/// What the pass named by the folder makes of the graph in the file: counts, notes, graph and plan.
fn run(path: &Path, source: &str) -> Result<String, Box<dyn std::error::Error>> {
    let pass = path.parent().and_then(Path::file_name).and_then(|n| n.to_str()).ok_or("a case lies in a folder")?;
    let catalogue = passes::catalogue::passes();
    let steps = if pass == "infer-shapes" { pass.to_owned() } else { format!("infer-shapes, {pass}") };
    let pipeline = Pipeline::parse(&steps, &catalogue)?;
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], &NoExecutor);
    let (model, trace) = PassManager::new(Vec::new(), true).run(&pipeline, text::parse(source)?, &mut cx)?;
    let (_, record) = trace.steps.last().ok_or("no pass ran")?;
    let counts: Vec<String> = record.counts.iter().map(|(what, n)| format!("{what} {n}")).collect();
    let mut out = format!("rounds {} (last one empty)   {}\n", record.rounds, counts.join("   "));
    for note in &trace.notes {
        out.push_str(&note.to_string());
        out.push('\n');
    }
    out += &text::graph(&model);
    if !model.plan().is_empty() {
        out += &text::plan(&model);
    }
    Ok(out)
}

fn golden(path: &Path, source: String) -> datatest_stable::Result<()> {
    let out = run(path, &source)?;
    let folder = std::env::current_dir()?.join(path.parent().ok_or("a case lies in a folder")?);
    let stem = path.file_stem().and_then(|n| n.to_str()).ok_or("a case has a name")?;
    insta::with_settings!({
        snapshot_path => folder, prepend_module_to_snapshot => false, omit_expression => true,
    }, { insta::assert_snapshot!(stem, out) });
    Ok(())
}

/// What the rules of the target in the first line find; the rule that the file is called after must be among them.
fn lint(path: &Path, source: String) -> datatest_stable::Result<()> {
    let target = source.lines().next().and_then(|line| line.strip_prefix("# target: "));
    let target = target.ok_or("a case names its target in the first line")?;
    let catalogue = passes::catalogue::passes();
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], &NoExecutor);
    let shapes = Pipeline::parse("infer-shapes", &catalogue)?;
    let (model, _) = PassManager::new(Vec::new(), true).run(&shapes, text::parse(&source)?, &mut cx)?;
    let found = onnx_quant::lint::lint(&model, model.meta.opset(), target);
    let code = path.file_stem().and_then(|n| n.to_str()).ok_or("a case has a name")?;
    if !found.iter().any(|finding| finding.code.0 == code) {
        return Err(format!("{code} finds nothing").into());
    }
    let out: Vec<String> = found.iter().map(ToString::to_string).collect();
    let out = out.join("\n");
    let folder = std::env::current_dir()?.join(path.parent().ok_or("a case lies in a folder")?);
    insta::with_settings!({
        snapshot_path => folder, prepend_module_to_snapshot => false, omit_expression => true,
    }, { insta::assert_snapshot!(code, out) });
    Ok(())
}

/// The error stands in a comment on the offending line; cycles and reads of nothing have no single line.
fn broken(path: &Path, source: String) -> datatest_stable::Result<()> {
    let marked = source.lines().enumerate().find_map(|(at, line)| Some((at + 1, line.split_once("# error: ")?.1)));
    let (line, expected) = marked.ok_or("a broken case marks its line with `# error: `")?;
    let error = match text::parse(&source) {
        Ok(_) => return Err(format!("{} was accepted", path.display()).into()),
        Err(error) => error.to_string(),
    };
    let graph_wide = expected.contains("cycle") || expected.contains("defines it");
    if !error.contains(expected) || !(graph_wide || error.starts_with(&format!("line {line},"))) {
        return Err(format!("expected `{expected}` on line {line}, got `{error}`").into());
    }
    Ok(())
}

datatest_stable::harness! {
    { test = golden, root = "fixtures/passes", pattern = r"\.oq$" },
    { test = lint, root = "fixtures/lint", pattern = r"\.oq$" },
    { test = broken, root = "fixtures/check", pattern = r"\.oq$" },
}
