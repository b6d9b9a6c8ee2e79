//! A tensor that matrix products read, divided channel by channel, with weights that make up for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::axes::scaled_weight;
use super::scaled::Folder;
use super::value_path::ValuePath;
use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Model, Patch};
use crate::ops;
use crate::parallel;
use crate::pass::{PassContext, Wish};
use crate::tensor::{DType, Tensor};

/// The products that read one tensor.
pub(super) struct Group {
    pub(super) value: ValueId,
    pub(super) sinks: Vec<NodeId>,
    /// Whether nobody else reads it.
    pub(super) alone: bool,
    /// The way from values to it, where attention makes it.
    path: Option<ValuePath>,
}

impl Group {
    /// `divisor`, with one number for all channels that must share one: those at one place in all heads, where heads are grouped or
    /// change their order. It is the geometric mean of theirs.
    pub(super) fn tied(&self, mut divisor: Vec<f64>) -> Vec<f64> {
        let Some(size) = self.shared() else { return divisor };
        let heads = divisor.len() / size;
        for at in 0..size {
            let sum: f64 = divisor.iter().skip(at).step_by(size).map(|s| s.ln()).sum();
            let mean = (sum / heads.max(1) as f64).exp();
            divisor.iter_mut().skip(at).step_by(size).for_each(|s| *s = mean);
        }
        divisor
    }

    /// After how many channels divisors have to repeat, where they do.
    pub(super) fn shared(&self) -> Option<usize> {
        self.path.as_ref().filter(|path| !path.straight).map(|path| path.size)
    }
}

pub(super) fn last_axis(graph: &Graph, value: ValueId) -> Option<usize> {
    graph.value(value).ty.rank()?.checked_sub(1)
}

/// Tensors that matrix products with a constant read, in the order of the first of those.
pub(super) fn groups(graph: &Graph, cx: &PassContext<'_>) -> Vec<Group> {
    let mut sinks: BTreeMap<ValueId, Vec<NodeId>> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let product = node.op.is("MatMul") || node.op.is("Gemm");
        let kept = |name: &str| cx.keep_float.contains_key(name);
        let named = node.inputs.iter().chain(&node.outputs).flatten().any(|value| kept(&graph.value(*value).name));
        let plain = node.int("transA", 0) == 0 && !kept(&node.name) && !named;
        let Some(roles) = ops::linear(graph, id).filter(|roles| product && plain && roles.weight == 1) else {
            continue;
        };
        let matrix = graph.constant_input(node, 1).is_some_and(|w| w.shape().len() == 2 && w.dtype() == DType::F32);
        if let Some(value) = node.input(roles.activation.into()).filter(|_| matrix) {
            sinks.entry(value).or_default().push(id);
        }
    }
    let users = Users::of(graph);
    let alone = |value: ValueId, sinks: &[NodeId]| {
        users.of_value(value).iter().all(|user| matches!(user, User::Input { node, input: 0 } if sinks.contains(node)))
    };
    let is_activation = |value: &ValueId| crate::simulate::is_float_activation(graph, *value);
    let found = graph.nodes().filter_map(|(id, _)| ValuePath::through(graph, &users, id));
    let mut paths: BTreeMap<NodeId, ValuePath> = found.map(|path| (path.reader, path)).collect();
    let mut group = |(value, sinks): (ValueId, Vec<NodeId>)| {
        let path = sinks.first().and_then(|sink| paths.remove(sink));
        Group { value, alone: alone(value, &sinks), sinks, path }
    };
    let places: BTreeMap<NodeId, usize> = graph.nodes().enumerate().map(|(place, (id, _))| (id, place)).collect();
    let mut found: Vec<Group> = sinks.into_iter().filter(|(value, _)| is_activation(value)).map(&mut group).collect();
    found.sort_by_key(|group| group.sinks.first().and_then(|sink| places.get(sink)).copied());
    found
}

/// A division that was found to pay.
pub(super) struct Choice {
    /// What every channel is divided by.
    pub(super) divisor: Vec<f64>,
    /// The expected error over that of doing nothing.
    pub(super) left: f64,
}

/// The largest magnitude and the power of every channel of what `groups` read.
pub(super) fn wishes(graph: &Graph, groups: Vec<Group>) -> BTreeSet<(ValueId, Wish)> {
    let peaks = |group: Group| Some((group.value, Wish::Peaks { axis: last_axis(graph, group.value)? }));
    groups.into_iter().filter_map(peaks).collect()
}

/// So many tensors are looked at at once, whatever the number of threads.
pub(super) const AT_ONCE: usize = 4;

/// The patch that divides `groups` as `choose` says; a node is inserted only where less than the share `inserted` of the error is left.
pub(super) fn divide_all(
    model: &Model,
    groups: &[Group],
    inserted: f64,
    choose: impl Fn(&Group) -> Option<Choice> + Sync + Send,
) -> Patch {
    let mut patch = Patch::on(model);
    let users = Users::of(model.graph());
    let folder = Folder { graph: model.graph(), stats: model.stats(), users: &users };
    // From the outputs on: a product that takes a division into its weight waits with its own input for the next round, and so does a
    // path whose values were rewritten.
    for some in groups.rchunks(AT_ONCE) {
        let waits = |group: &Group, patch: &Patch| {
            let rewritten = group.path.as_ref().is_some_and(|path| path.is_touched(patch));
            rewritten || group.sinks.iter().any(|id| patch.touches(*id))
        };
        let open: Vec<&Group> = some.iter().filter(|group| !waits(group, &patch)).collect();
        let choices = parallel::map(&open, |group| choose(group));
        for (group, choice) in open.into_iter().zip(choices).rev() {
            let Some(choice) = choice.filter(|_| !waits(group, &patch)) else { continue };
            if let Some(how) = folder.divide(group, &choice.divisor, choice.left < inserted, &mut patch) {
                patch.count(how, 1);
            }
        }
    }
    patch
}

impl Folder<'_> {
    /// Divides what the products of `group` read by `divisor`: folded into what makes it where that is possible, otherwise, with
    /// `insert`, by a `Mul` before them. Says which, or does nothing.
    fn divide(&self, group: &Group, divisor: &[f64], insert: bool, patch: &mut Patch) -> Option<&'static str> {
        let mark = patch.mark();
        let folded = match &group.path {
            Some(path) => along(self.graph, path, divisor, patch),
            None if group.alone => self.divided(group.value, divisor, patch),
            None => None,
        };
        let (divided, how) = if let Some(value) = folded {
            (value, "folded")
        } else {
            patch.roll_back(&mark);
            insert.then(|| (multiply(self.graph, group, divisor, patch), "inserted"))?
        };
        rewire(self.graph, group, divided, divisor, patch);
        Some(how)
    }
}

/// What the reader of `path` reads, divided: values are.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn along(graph: &Graph, path: &ValuePath, divisor: &[f64], patch: &mut Patch) -> Option<ValueId> {
    path.rebuilt(graph, ".smoothed", patch, |tensor| {
        let width = *tensor.shape().last()?;
        let mut values = tensor.floats()?.into_owned();
        for row in values.chunks_exact_mut(width.max(1)) {
            row.iter_mut().zip(divisor.iter().cycle()).for_each(|(v, s)| *v = (f64::from(*v) / s) as f32);
        }
        Some(Tensor::of(tensor.shape(), values))
    })
}

/// `value` times 1 / s, as a node of its own.
fn multiply(graph: &Graph, group: &Group, divisor: &[f64], patch: &mut Patch) -> ValueId {
    let source = graph.value(group.value);
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
    let inverse = divisor.iter().map(|s| (1.0 / s) as f32).collect();
    let constant = patch.constant(&format!("{}.divisor", source.name), Tensor::of([divisor.len()], inverse));
    let before = group.sinks.first().copied();
    let opset = before.and_then(|id| graph.node(id)).map_or(21, |node| node.op.opset);
    let node = Node {
        name: format!("{}.smooth", source.name).into(),
        op: OpKey { domain: "".into(), name: "Mul".into(), opset },
        inputs: vec![Some(group.value), Some(constant)],
        outputs: Vec::new(),
        attrs: Attrs::new(),
        bodies: Vec::new(),
        notes: None,
    };
    patch.node(node, &format!("{}.smoothed", source.name), source.ty.clone(), before)
}

/// Lets the products read `divided`, with weights that make up for it.
fn rewire(graph: &Graph, group: &Group, divided: ValueId, divisor: &[f64], patch: &mut Patch) {
    for &id in &group.sinks {
        let make = |patch: &mut Patch| {
            let node = graph.node(id)?;
            let roles = ops::linear(graph, id)?;
            let weight = graph.constant_input(node, 1)?;
            let name = Arc::clone(&graph.value(node.input(1)?).name);
            let scaled = scaled_weight(weight, 1 - roles.out_axis, |j| divisor[j])?;
            let mut copy = node.clone();
            copy.inputs[0] = Some(divided);
            copy.inputs[1] = Some(patch.constant(&format!("{name}.smoothed"), scaled));
            Some(copy)
        };
        if let Some(copy) = make(patch) {
            patch.replace(id, copy);
            patch.count("weights", 1);
        }
    }
}
