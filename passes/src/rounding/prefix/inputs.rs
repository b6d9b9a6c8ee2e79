//! Which layers are rounded, and what they read.

use super::{Inputs, Reading};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::Users;
use crate::lockstep::Lockstep;
use crate::model::Model;
use crate::ops;
use crate::rounding::layer::{self, Layer};
use crate::simulate::Cutter;

impl Inputs {
    /// Those of the encoded layers with a weight of their own, in graph order.
    pub(in crate::rounding) fn all(model: &Model, users: &Users) -> Vec<Self> {
        let graph = model.graph();
        let cutter = Cutter { graph, plan: model.plan() };
        let inputs = |id: NodeId| {
            let layer = Layer::of(model, id).filter(|layer| model.plan().codes(layer.site).is_none())?;
            let Site::Use { input, .. } = layer.site else { return None };
            users.only_input(graph.node(id)?.input(input.into())?)?;
            let roles = ops::linear(graph, id)?;
            let (value, rows) = layer::rows_of(graph, id, &roles)?;
            let version = cutter.of_use(id, roles.activation.into(), value);
            let beside = sum_after(graph, users, id).map(|(add, input, value)| cutter.of_use(add, input, value));
            Some(Self { node: id, reading: Reading { version, rows, weighed_for: None }, beside })
        };
        graph.nodes().filter_map(|(id, _)| inputs(id)).collect()
    }

    /// Without the other operand of the sum after it, unless that `counts` and is there before the layer is.
    pub(in crate::rounding) fn at_its_stage(mut self, graph: &Graph, walk: &Lockstep<'_>, counts: bool) -> Self {
        let stage = walk.stage_of(self.node);
        let ready = |value: ValueId| graph.producer(value).is_none_or(|(producer, _)| walk.stage_of(producer) < stage);
        self.beside = self.beside.filter(|version| counts && ready(version.0));
        self
    }
}

/// The addition of a computed tensor that alone reads the result of layer `id`, behind an addition of a constant where there is
/// one, and its other operand.
fn sum_after(graph: &Graph, users: &Users, id: NodeId) -> Option<(NodeId, usize, ValueId)> {
    let mut value = graph.node(id)?.output(0)?;
    for _ in 0..2 {
        let (add, other) = ops::only_addition(graph, users, value)?;
        let operand = graph.node(add)?.input(other.into())?;
        if graph.constant(operand).is_none() {
            let alike = graph.value(operand).ty.rank() == graph.value(value).ty.rank();
            return (alike && operand != value).then_some((add, other.into(), operand));
        }
        value = graph.node(add)?.output(0)?;
    }
    None
}
