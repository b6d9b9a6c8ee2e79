//! Clamps whose end no sample reaches.

use std::collections::BTreeSet;

use super::region::{clamp_end, is_kept_in_float};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, ValueId};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};

crate::declare_pass! {
    /// Turns clamps from 0 to a number, such as Relu6, into `Relu` where no sample brings more than that number.
    ///
    /// Scales pass through `Relu`: `equalize-layers` then sees one region where there were two, and `absorb-high-bias` need not mind the
    /// end. Exact for the samples; what would have been clamped elsewhere is not any more, which a note says. A clamp of which nothing,
    /// or something infinite, was measured stays.
    INFO {
        name: "relax-clamps",
        source: "Nagel et al. 2019, arXiv:1906.04721, section 5.1.1, which replaces every ReLU6; only where the samples allow it ours",
        cost: "One forward pass for the largest values in front of clamps; one walk over the nodes.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: OnSamples,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(RelaxClamps)) };

/// See [`INFO`].
#[derive(Debug)]
struct RelaxClamps;

impl Pass for RelaxClamps {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        clamps(model.graph(), cx).filter_map(|(_, node, _)| Some((node.input(0)?, Wish::Distribution))).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let (mut all, mut relaxed) = (0, 0);
        for (id, node, high) in clamps(model.graph(), cx) {
            all += 1;
            let seen = node.input(0).and_then(|value| model.stats().distribution(value));
            let stays_below = seen.is_some_and(|s| s.finite() > 0 && s.nonfinite() == 0 && s.max() <= high);
            if !stays_below || model.plan().encodes_any_of(model.graph(), id) {
                continue;
            }
            let op = OpKey { name: "Relu".into(), ..node.op.clone() };
            let relu = Node { op, inputs: node.inputs[..1].to_vec(), attrs: Attrs::new(), ..node.clone() };
            // On the samples, which all that was measured comes from, its output is the very same.
            patch.replace(id, relu);
            patch.count("clamps", 1);
            relaxed += 1;
        }
        if relaxed > 0 {
            let message = format!(
                "relax-clamps: {relaxed} of {all} clamps became Relu, as no sample reaches their end; what does is clamped no more"
            );
            patch.note(Diagnostic::new(diag::RELAXED, Severity::Note, Place::Model, message));
        }
        Ok(patch)
    }
}

/// The clamps of `graph` from 0 to some number that nobody wants in float, nor what they read or return, with that number.
fn clamps<'a>(graph: &'a Graph, cx: &'a PassContext<'_>) -> impl Iterator<Item = (NodeId, &'a Node, f64)> {
    let end = |node: &Node| clamp_end(graph, node).filter(|high| high.is_finite());
    let of = move |(id, node): (NodeId, &'a Node)| Some((id, node, end(node)?));
    graph.nodes().filter_map(of).filter(move |(id, ..)| !is_kept_in_float(graph, cx, *id))
}
