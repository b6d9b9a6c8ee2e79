//! Gemm as a product and a sum.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, ValueId};
use crate::ir::{Attrs, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Model, Patch};
use crate::ops;
use crate::pass::{Facts, Miss, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::DType;

crate::declare_pass! {
    /// Turns a `Gemm` with a constant weight on the right into a `MatMul`, its weight transposed where it has to be, and an `Add`
    /// of its bias.
    ///
    /// x Wᵀ + b, for runtimes that have a kernel for packed or dynamically quantized products only where a `MatMul` stands, with the
    /// weight as \[inputs, outputs\]. Declines where alpha or beta is not 1, or the activation is transposed.
    INFO {
        name: "split-gemm",
        source: "ONNX operator specification, Gemm-13",
        cost: "One walk over the nodes; every weight that is turned is written once.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(SplitGemm)) };

/// See [`INFO`].
#[derive(Debug)]
struct SplitGemm;

impl Pass for SplitGemm {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        // A weight that several nodes read is turned once.
        let mut turned = BTreeMap::new();
        let in_float = |id: NodeId| !model.plan().encodes_any_of(model.graph(), id);
        for (id, node) in model.graph().nodes().filter(|(id, node)| node.op.is("Gemm") && in_float(*id)) {
            match split(model.graph(), id, node, &mut turned, &mut patch) {
                Ok(()) => patch.count("split", 1),
                Err(Miss::NoMatch) => {}
                Err(Miss::Blocked(reason)) => {
                    let place = Place::Node(Arc::clone(&node.name));
                    let message = format!("split-gemm: {reason}");
                    patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Note, place, message));
                }
            }
        }
        Ok(patch)
    }
}

#[expect(clippy::float_cmp, reason = "a factor of exactly 1 is none")]
fn split(
    graph: &Graph,
    id: NodeId,
    node: &Node,
    turned: &mut BTreeMap<ValueId, ValueId>,
    patch: &mut Patch,
) -> Result<(), Miss> {
    let roles = ops::linear(graph, id).filter(|roles| roles.weight == 1).ok_or(Miss::NoMatch)?;
    if node.float("alpha", 1.0) != 1.0 || node.float("beta", 1.0) != 1.0 || node.int("transA", 0) != 0 {
        return Err(Miss::Blocked("its alpha or beta is not 1, or its activation is transposed".into()));
    }
    let (Some(activation), Some(weight), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
        return Err(Miss::NoMatch);
    };
    let weight = match (graph.constant(weight).filter(|_| roles.out_axis == 0), turned.get(&weight)) {
        (None, _) => weight,
        (_, Some(made)) => *made,
        (Some(tensor), None) => {
            let tensor = tensor.transposed().ok_or(Miss::Blocked("its weight is not f32".into()))?;
            let made = patch.constant(&format!("{}{}", graph.value(weight).name, super::TRANSPOSED), tensor);
            *turned.entry(weight).or_insert(made)
        }
    };
    let plain = |op: &str, inputs| Node {
        op: OpKey { domain: "".into(), name: op.into(), opset: node.op.opset },
        inputs,
        attrs: Attrs::new(),
        ..node.clone()
    };
    let product = plain("MatMul", vec![Some(activation), Some(weight)]);
    let Some(bias) = node.input(2) else {
        patch.replace(id, product);
        return Ok(());
    };
    let ty = graph.value(output).ty.tensor().cloned();
    let ty = Type::Tensor(ty.unwrap_or_else(|| TensorType::new(Some(DType::F32), None)));
    let product = patch.node(product, &format!("{}.product", graph.value(output).name), ty, Some(id));
    let name = format!("{}.bias", node.name).into();
    patch.replace(id, Node { name, ..plain("Add", vec![Some(product), Some(bias)]) });
    Ok(())
}
