//! Fixed shapes for consumers that compile for one sample at a time.

use crate::ir::batch;
use crate::model::{Edit, Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Writes the open leading extents of inputs, and whatever has the same symbol, as 1.
    ///
    /// What is computed from shapes becomes constant, so that `fold-constants` takes it away: hardware generators have no `Shape`.
    INFO {
        name: "one-sample",
        source: "qonnx 1.0.0 and hls4ml 1.3.0, which run graphs of fixed shapes only",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::NONE,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(OneSample)) };

/// See [`INFO`].
#[derive(Debug)]
struct OneSample;

impl Pass for OneSample {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let mut patch = Patch::on(model);
        let symbols = batch::batch_symbols(graph);
        for value in graph.value_ids() {
            let declared = &graph.value(value).ty;
            let fixed = batch::of_one_sample(declared, &symbols, graph.inputs().contains(&value));
            if let Some(ty) = fixed.tensor().filter(|_| fixed != *declared) {
                patch.edit(Edit::Refine { value, ty: ty.clone() });
                patch.count("refined", 1);
            }
        }
        Ok(patch)
    }
}
