//! Nodes that do nothing.

use crate::ir::{Graph, Node};
use crate::model::{Edit, Patch, can_redirect};
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};
use crate::tensor::DType;

crate::declare_pass! {
    /// Removes nodes whose result is their input: `Identity`, `Dropout` at inference, a `Cast` to the type it has, a
    /// `Transpose` that moves no axis, a `Pad` by nothing, a `Concat` or `Sum` of one.
    ///
    /// Declines where the result is a graph output that the input cannot take over.
    INFO {
        name: "eliminate-identity",
        source: "ONNX operator specification",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(EliminateIdentity))) };

/// See [`INFO`].
#[derive(Debug)]
struct EliminateIdentity;

impl Rewrite for EliminateIdentity {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Identity", "Dropout", "Cast", "Transpose", "Pad", "Concat", "Sum"]
    }

    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let (graph, node) = (site.graph(), site.node);
        let (from, to) = node.output(0).zip(node.input(0)).ok_or(Miss::NoMatch)?;
        let in_codes = site.model.plan().encodes_any_of(graph, site.id);
        if !does_nothing(graph, node) || !can_redirect(graph, from, to) || in_codes {
            return Err(Miss::NoMatch);
        }
        // An output changes hands once a round: a chain is seen again when its first link is done.
        let meets = |edit: &Edit| matches!(edit, Edit::Redirect { from: f, to: t } if [*f, *t].iter().any(|v| *v == from || *v == to));
        if graph.outputs().contains(&from) && patch.edits().iter().any(meets) {
            return Err(Miss::NoMatch);
        }
        patch.edit(Edit::Redirect { from, to });
        patch.erase(site.id);
        patch.count("removed", 1);
        Ok(())
    }
}

fn does_nothing(graph: &Graph, node: &Node) -> bool {
    match &*node.op.name {
        "Identity" => true,
        // The mask and training at inference time are refused: they would need the node.
        "Dropout" => node.output(1).is_none() && node.input(2).is_none(),
        "Cast" => {
            let from = node.input(0).and_then(|value| graph.value(value).ty.dtype());
            from.is_some() && from == DType::from_code(node.int("to", -1))
        }
        "Transpose" => node.ints("perm").is_some_and(|perm| (0_i64..).zip(perm).all(|(i, &axis)| i == axis)),
        "Pad" => {
            let pads = graph.constant_input(node, 1).and_then(|pads| pads.integers());
            pads.is_some_and(|pads| pads.iter().all(|&n| n == 0))
        }
        "Concat" | "Sum" => node.inputs.len() == 1,
        _ => false,
    }
}
