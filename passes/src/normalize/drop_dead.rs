//! Nodes that nobody reads.

use crate::ir::walk;
use crate::model::{Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Removes nodes whose results reach no graph output.
    ///
    /// No ONNX operator has side effects, so nothing else can keep a node alive. Constants that nobody reads are left out
    /// when the model is written.
    INFO {
        name: "drop-dead",
        source: "ONNX intermediate representation specification",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(DropDead)) };

/// See [`INFO`].
#[derive(Debug)]
struct DropDead;

impl Pass for DropDead {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let (alive, _) = walk::needed(graph, &std::collections::BTreeSet::new(), graph.outputs());
        let alive: std::collections::BTreeSet<_> = alive.into_iter().collect();
        let mut patch = Patch::on(model);
        for (id, _) in graph.nodes().filter(|(id, _)| !alive.contains(id)) {
            patch.erase(id);
            patch.count("removed", 1);
        }
        Ok(patch)
    }
}
