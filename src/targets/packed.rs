//! ONNX whose weights lie in a `.safetensors` file.

use std::borrow::Cow;

use passes::about::About;
use passes::model::Model;
use passes::target::{Container, Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};

use super::ort_cpu;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct Packed;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "packed",
        doc: "A folder with model.onnx, model.safetensors and manifest.json: ONNX Runtime loads the model as it is, and whoever reads \
              safetensors reads the very bytes of its codes and scales. Otherwise as ort-cpu.",
        source: "ONNX Runtime 1.31.1 with external data inside a safetensors file; safetensors 0.8",
    },
    version: "1.31.1",
};

impl Target for Packed {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        ort_cpu::RULES
    }

    fn container(&self) -> Container {
        Container::Packed
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        ort_cpu::pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        ort_cpu::OrtCpu.refuses(scheme)
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        ort_cpu::OrtCpu.lower(model)
    }
}
