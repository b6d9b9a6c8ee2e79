//! Any graph in text form through the normalizing passes, every promise checked.
#![no_main]

use std::borrow::Cow;

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline, RunError};
use passes::target::{Goal, LowerError, Lowered, Rule, Target, TargetInfo};

#[derive(Debug)]
struct NoExecutor;

impl Executor for NoExecutor {
    fn name(&self) -> &'static str {
        "none"
    }
    fn prepare(&self, _: &passes::ir::Graph) -> Result<Box<dyn Session>, ExecError> {
        Err(ExecError { executor: "none", message: "fuzzing runs nothing".into() })
    }
}

/// No normalizing pass asks a target anything.
#[derive(Debug)]
struct NoTarget;

static INFO: TargetInfo = TargetInfo { about: About { name: "none", doc: "", source: "" }, version: "" };

impl Target for NoTarget {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }
    fn rules(&self) -> &'static [Rule] {
        &[]
    }
    fn pipeline(&self, _: Goal) -> Cow<'static, str> {
        PIPELINE.into()
    }
    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::qdq(model)
    }
}

const PIPELINE: &str = "infer-shapes, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead)";

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(model) = passes::text::parse(text) else { return };
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(PIPELINE, &catalogue).expect("the pipeline parses");
    let mut cx = PassContext::new(&NoTarget, &NoExecutor);
    match PassManager::new(Vec::new(), true).run(&pipeline, model, &mut cx) {
        Ok(_) | Err(RunError::Pass { .. }) => {}
        Err(error) => panic!("{error}\n{text}"),
    }
});
