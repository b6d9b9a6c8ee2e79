//! Types of values, from the operators' shape rules.

use crate::ir::{Node, TensorType, Type};
use crate::model::{Edit, Model, Patch};
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Infers element types and symbolic shapes, as far as they follow.
    ///
    /// Walks the graph once in order. What the file declares stands; rules fill what it leaves open. An operator without a
    /// rule, or a shape that depends on data, leaves its outputs as they are: nothing is ever refused because one shape
    /// is unknown.
    INFO {
        name: "infer-shapes",
        source: "ONNX operator specification, type and shape inference",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::SHAPES,
        preserves: Facts::ALL,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(InferShapes)) };

/// See [`INFO`].
#[derive(Debug)]
struct InferShapes;

impl Pass for InferShapes {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let mut patch = Patch::on(model);
        let mut types: Vec<Option<TensorType>> =
            graph.value_ids().map(|id| graph.value(id).ty.tensor().cloned()).collect();
        for (_, node) in graph.nodes() {
            let inferred = ops::infer(graph, node, &|value| types[value.index()].clone());
            for (output, inferred) in outputs(node).zip(inferred) {
                let Some(output) = output else { continue };
                let Type::Tensor(declared) = &graph.value(output).ty else { continue };
                let refined = declared.refined(&inferred);
                if refined != *declared {
                    patch.edit(Edit::Refine { value: output, ty: refined.clone() });
                    patch.count("refined", 1);
                    types[output.index()] = Some(refined);
                }
            }
        }
        Ok(patch)
    }
}

fn outputs(node: &Node) -> impl Iterator<Item = Option<crate::id::ValueId>> + '_ {
    node.outputs.iter().copied()
}
