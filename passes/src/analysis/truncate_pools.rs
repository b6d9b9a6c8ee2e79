//! Means of integers that lose their lowest bits.

use crate::ir::{Attrs, Node, OpKey, Type};
use crate::model::{Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::Tensor;
use crate::trunc;

crate::declare_pass! {
    /// Shifts what average pools of 2^t elements read by less than half a step, so that rounding their result to nearest cuts the lowest t
    /// bits of the sum off, as hardware does.
    ///
    /// Where the result has the encoding of the input, without zero point, and the pool is not padded. The loss is half a step in the mean,
    /// which corrections of biases behind it see.
    INFO {
        name: "truncate-pools",
        source: "FINN, conversion of AveragePool, Mul and Trunc to QuantAvgPool2d, source of 2026-04",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::ENCODED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(TruncatePools)) };

/// See [`INFO`].
#[derive(Debug)]
struct TruncatePools;

impl Pass for TruncatePools {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let (graph, plan) = (model.graph(), model.plan());
        for (id, pool) in graph.nodes() {
            let Some(n) = trunc::window(graph, pool) else { continue };
            let (Some(input), Some(result)) = (pool.input(0), pool.output(0)) else { continue };
            let Some(encoding) = trunc::shared(plan, input, result).filter(|_| !graph.outputs().contains(&result))
            else {
                continue;
            };
            let name = format!("{}.shift", pool.name);
            let by = patch.constant(&format!("{name}.by"), Tensor::scalar(trunc::shift(encoding.scale[0], n)));
            let add = Node {
                name: name.as_str().into(),
                op: OpKey { domain: "".into(), name: "Add".into(), opset: model.meta.opset() },
                inputs: vec![Some(input), Some(by)],
                outputs: Vec::new(),
                attrs: Attrs::new(),
                bodies: Vec::new(),
                notes: None,
            };
            let ty: Type = graph.value(input).ty.clone();
            let shifted = patch.node(add, &name, ty, Some(id));
            patch.replace(id, Node { inputs: vec![Some(shifted)], ..pool.clone() });
            patch.count("pools", 1);
        }
        Ok(patch)
    }
}
