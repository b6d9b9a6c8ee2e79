//! Any graph in text form, in whatever dialect, into the plan, then into every target's dialect, in 16 bits too, and through every rule.
#![no_main]

use passes::exec::{ExecError, Executor, Session};
use passes::pass::{PassContext, PassManager, Pipeline};

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

const PIPELINE: &str = "infer-shapes, expand-qoperators, absorb-qdq, infer-shapes, drop-dead";

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(model) = passes::text::parse(text) else { return };
    for target in onnx_quant::targets::TARGETS {
        onnx_quant::lint::lint(&model, model.meta.opset(), target.info().about.name);
    }
    let Ok(model) = passes::half::widen(model) else { return };
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(PIPELINE, &catalogue).expect("the pipeline parses");
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], &NoExecutor);
    let Ok((model, _)) = PassManager::new(Vec::new(), true).run(&pipeline, model, &mut cx) else { return };
    for target in onnx_quant::targets::TARGETS {
        let Ok(lowered) = target.lower(&model) else { continue };
        if let Ok(half) = passes::half::narrow(lowered.clone()) {
            let model = passes::model::Model::new(half.graph, half.meta.as_ref().clone()).expect("16 bits are a graph");
            passes::half::widen(model).expect("what was narrowed can be widened");
        }
        let model = passes::model::Model::new(lowered.graph, lowered.meta.as_ref().clone()).expect("what is lowered is a graph");
        onnx_quant::lint::lint(&model, lowered.meta.opset(), target.info().about.name);
    }
});
