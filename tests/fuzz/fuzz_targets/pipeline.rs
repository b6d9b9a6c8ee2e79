//! Any graph in text form through the normalizing passes, every promise checked.
#![no_main]

use passes::exec::{ExecError, Executor, Session};
use passes::pass::{PassContext, PassManager, Pipeline, RunError};

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

const PIPELINE: &str = "infer-shapes, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead),
split-gemm, rotate, infer-shapes, drop-dead";

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(model) = passes::text::parse(text) else { return };
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(PIPELINE, &catalogue).expect("the pipeline parses");
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], &NoExecutor);
    match PassManager::new(Vec::new(), true).run(&pipeline, model, &mut cx) {
        Ok(_) | Err(RunError::Pass { .. }) => {}
        Err(error) => panic!("{error}\n{text}"),
    }
});
