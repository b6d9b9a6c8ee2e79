//! Tensors that can only be scaled together, with the convolutions that write and read them.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::ops;
use crate::pass::PassContext;
use crate::tensor::{DType, Tensor};

/// A region: dividing channel c of all its tensors by s\[c\] > 0 needs nothing but other weights in `sources` and `sinks`.
#[derive(Debug, Default)]
pub(super) struct Region {
    /// Convolutions that write into it.
    pub(super) sources: Vec<NodeId>,
    /// Nodes inside, for which f(x / s) = f(x) / s, in graph order.
    pub(super) inside: Vec<NodeId>,
    /// Convolutions that read from it.
    pub(super) sinks: Vec<NodeId>,
    /// What clamps inside return, and where they end: scaled, a channel must stay below that.
    pub(super) clamps: Vec<(ValueId, f64)>,
    /// Channels of its tensors.
    pub(super) channels: usize,
}

/// Whether the user wants node `id` in float, by its name or that of what it reads or returns.
pub(super) fn is_kept_in_float(graph: &Graph, cx: &PassContext<'_>, id: NodeId) -> bool {
    graph.node(id).is_some_and(|node| {
        let kept = |name: &str| cx.keep_float.contains_key(name);
        let mut values = node.inputs.iter().chain(&node.outputs).flatten();
        kept(&node.name) || values.any(|value| kept(&graph.value(*value).name))
    })
}

/// Where the clamp `node` ends when it begins at 0: infinity for one without an end. `None` for what is no such clamp.
pub(super) fn clamp_end(graph: &Graph, node: &Node) -> Option<f64> {
    if !node.op.is("Clip") || graph.constant(node.input(0)?).is_some() {
        return None;
    }
    let bound = |input: usize| graph.constant_input(node, input)?.floats()?.first().copied();
    let high = if node.input(2).is_some() { f64::from(bound(2)?) } else { f64::INFINITY };
    (bound(1) == Some(0.0) && high > 0.0).then_some(high)
}

/// Whether scaling channels by positive numbers passes through `node`: activations without a threshold, pools, sums of two tensors
/// of one shape; with `clamps` also those that end somewhere.
fn passes_scales(graph: &Graph, node: &Node, clamps: bool) -> bool {
    if let Some(high) = clamp_end(graph, node) {
        return clamps || high.is_infinite();
    }
    // A constant operand would not be divided.
    let constant = node.inputs.iter().flatten().any(|value| graph.constant(*value).is_some());
    let plain = node.op.domain.is_empty() && node.outputs.iter().flatten().count() == 1 && !constant;
    let same = |a: usize, b: usize| {
        let shape = |input: usize| graph.value(node.input(input)?).ty.tensor()?.shape.clone();
        shape(a).is_some_and(|s| Some(s) == shape(b)) && node.input(a) != node.input(b)
    };
    plain
        && match &*node.op.name {
            "Relu" | "LeakyRelu" | "Identity" | "MaxPool" | "AveragePool" | "GlobalAveragePool" => true,
            "Add" => same(0, 1),
            _ => false,
        }
}

/// The convolution `id`, when its weight is f32 and read by it alone, and its bias is an f32 row or absent.
fn convolution<'a>(graph: &'a Graph, users: &Users, id: NodeId) -> Option<(&'a Node, &'a Tensor)> {
    let node = graph.node(id).filter(|node| node.op.is("Conv"))?;
    ops::linear(graph, id)?;
    let weight = graph.constant_input(node, 1).filter(|weight| weight.dtype() == DType::F32)?;
    users.only_input(node.input(1)?)?;
    let bias = node.input(2).map(|_| graph.constant_input(node, 2));
    let plain = bias.is_none_or(|bias| bias.is_some_and(|b| b.dtype() == DType::F32 && b.len() == weight.shape()[0]));
    (plain && weight.shape()[0] > 0).then_some((node, weight.as_ref()))
}

/// The regions in which nothing has to stay in float: tensors get new names, which no pattern would find.
pub(super) fn free_regions(graph: &Graph, cx: &PassContext<'_>, clamps: bool) -> Vec<Region> {
    let named = |id: &NodeId| is_kept_in_float(graph, cx, *id);
    let mut regions = regions(graph, &Users::of(graph), clamps);
    regions.retain(|region| !region.sources.iter().chain(&region.inside).chain(&region.sinks).any(named));
    regions
}

/// Every region of `graph`, in the order of the first node of each; with `clamps`, those with clamps that end somewhere too.
pub(super) fn regions(graph: &Graph, users: &Users, clamps: bool) -> Vec<Region> {
    let mut parent: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let root = |parent: &BTreeMap<ValueId, ValueId>, mut value: ValueId| {
        while let Some(&up) = parent.get(&value).filter(|up| **up != value) {
            value = up;
        }
        value
    };
    let mut inside: BTreeSet<NodeId> = BTreeSet::new();
    for (id, node) in graph.nodes().filter(|(_, node)| passes_scales(graph, node, clamps)) {
        inside.insert(id);
        let Some(output) = node.output(0) else { continue };
        // The bounds of clamps are constants that nothing is scaled with.
        for &input in node.inputs.iter().flatten().filter(|input| graph.constant(**input).is_none()) {
            let (a, b) = (root(&parent, input), root(&parent, output));
            parent.insert(a.max(b), a.min(b));
        }
    }
    let mut regions: BTreeMap<ValueId, Option<Region>> = BTreeMap::new();
    let reject = |regions: &mut BTreeMap<ValueId, Option<Region>>, value: ValueId| drop(regions.insert(value, None));
    for (id, node) in graph.nodes() {
        let Some(output) = node.output(0) else { continue };
        let class = root(&parent, output);
        let slot = regions.entry(class).or_insert_with(|| Some(Region::default()));
        let Some(region) = slot else { continue };
        if inside.contains(&id) {
            region.inside.push(id);
            region.clamps.extend(clamp_end(graph, node).filter(|high| high.is_finite()).map(|high| (output, high)));
        } else if let Some((_, weight)) = convolution(graph, users, id) {
            let channels = weight.shape()[0];
            let fits = region.channels == 0 || region.channels == channels;
            region.sources.push(id);
            region.channels = channels;
            if !fits {
                reject(&mut regions, class);
                continue;
            }
        } else {
            reject(&mut regions, class);
            continue;
        }
        // Every reader must be inside, or a convolution that reads it as its activation.
        for user in users.of_value(output) {
            let sink = match user {
                User::Input { node, .. } if inside.contains(node) => continue,
                User::Input { node, input: 0 } => convolution(graph, users, *node).map(|_| *node),
                _ => None,
            };
            if let (Some(sink), Some(Some(region))) = (sink, regions.get_mut(&class)) {
                region.sinks.push(sink);
            } else {
                reject(&mut regions, class);
                break;
            }
        }
    }
    for &input in graph.inputs() {
        reject(&mut regions, root(&parent, input));
    }
    let whole = |region: &Region| !region.sources.is_empty() && !region.sinks.is_empty();
    regions.into_values().flatten().filter(whole).collect()
}
