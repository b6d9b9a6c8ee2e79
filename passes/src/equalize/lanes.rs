//! Which channels of which tensors can only be divided together.
//!
//! Every channel of every tensor between linear nodes gets a class; channels that something adds, joins or hands on come to share one. A
//! channel that anything else writes or reads is pinned with its class, and no other.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::axes::{divided_row, joins_along, merged_into, moved_from};
use super::region::{clamp_end, is_kept_in_float};
use super::taps::Taps;
use crate::id::{NodeId, ValueId};
use crate::ir::walk::{self, User, Users};
use crate::ir::{Graph, Node};
use crate::model::Model;
use crate::ops;
use crate::pass::PassContext;

/// The axis of the channels of a tensor, and the class of each.
#[derive(Clone, Debug)]
struct Lane {
    axis: usize,
    classes: Arc<[usize]>,
}

/// The channels of a graph in classes: dividing all channels of one class changes nothing but the weights around them.
pub(super) struct Lanes<'a> {
    pub(super) graph: &'a Graph,
    pub(super) users: Users,
    /// Whether clamps that end somewhere are passed: their ends are divided too.
    clamps: bool,
    of: BTreeMap<ValueId, Lane>,
    parent: Vec<usize>,
    pinned: Vec<bool>,
}

/// Tensors have no more channels than this; shapes may say anything.
const MOST_CHANNELS: usize = 1 << 22;

/// The class that stands for all that were united with `class`.
fn root(parent: &[usize], mut class: usize) -> usize {
    while parent[class] != class {
        class = parent[class];
    }
    class
}

impl<'a> Lanes<'a> {
    /// Those of `model`; with `clamps`, through clamps that end somewhere too.
    pub(super) fn of(model: &'a Model, cx: &PassContext<'_>, clamps: bool) -> Self {
        let graph = model.graph();
        let (of, users) = (BTreeMap::new(), Users::of(graph));
        let mut all = Self { graph, users, clamps, of, parent: Vec::new(), pinned: Vec::new() };
        for (id, node) in graph.nodes() {
            let free = !is_kept_in_float(graph, cx, id) && !model.plan().encodes_any_of(graph, id);
            let lane = if free { all.through(id, node) } else { None };
            let fits = |lane: &Lane| all.extent(node.output(0), lane.axis) == Some(lane.classes.len());
            match (node.output(0), lane.filter(fits)) {
                (Some(result), Some(lane)) => {
                    all.of.insert(result, lane);
                    // Outputs of the graph, and what bodies capture.
                    let users = all.users.of_value(result);
                    if users.iter().any(|user| !matches!(user, User::Input { .. })) {
                        all.pin(result);
                    }
                }
                _ => walk::reads(node).for_each(|value| all.pin(value)),
            }
        }
        // Those that stand for others come before them.
        for class in 0..all.parent.len() {
            all.parent[class] = all.parent[all.parent[class]];
        }
        all
    }

    /// How many classes there are.
    pub(super) fn len(&self) -> usize {
        self.parent.len()
    }

    /// Whether channels of `class` can be divided.
    pub(super) fn is_free(&self, class: usize) -> bool {
        !self.pinned[class]
    }

    /// The axis of the channels of `value` and their classes, where any can be divided.
    pub(super) fn free(&self, value: ValueId) -> Option<(usize, Vec<usize>)> {
        let lane = self.of.get(&value)?;
        let classes: Vec<usize> = lane.classes.iter().map(|class| self.parent[*class]).collect();
        classes.iter().any(|class| self.is_free(*class)).then_some((lane.axis, classes))
    }

    /// The axis of the channels of `value`, and what each is divided by when classes are by `s`; `None` where all stay.
    pub(super) fn divisor(&self, value: ValueId, s: &[f64]) -> Option<(usize, Vec<f64>)> {
        let (axis, classes) = self.free(value)?;
        let divisor: Vec<f64> = classes.iter().map(|class| s[*class]).collect();
        divisor.iter().any(|s| (s - 1.0).abs() > f64::EPSILON).then_some((axis, divisor))
    }

    fn extent(&self, value: Option<ValueId>, axis: usize) -> Option<usize> {
        let extent = self.graph.value(value?).ty.tensor()?.shape.as_ref()?.get(axis)?.known();
        extent.filter(|extent| *extent <= MOST_CHANNELS)
    }

    fn fresh(&mut self, n: usize, pinned: bool) -> Arc<[usize]> {
        let new = self.parent.len()..self.parent.len() + n;
        self.parent.extend(new.clone());
        self.pinned.resize(new.end, pinned);
        new.collect()
    }

    fn pin(&mut self, value: ValueId) {
        let Some(lane) = self.of.get(&value) else { return };
        for class in lane.classes.iter() {
            self.pinned[root(&self.parent, *class)] = true;
        }
    }

    fn unite(&mut self, a: usize, b: usize) {
        let [a, b] = [a, b].map(|mut class| {
            while self.parent[class] != class {
                self.parent[class] = self.parent[self.parent[class]];
                class = self.parent[class];
            }
            class
        });
        self.parent[a.max(b)] = a.min(b);
        self.pinned[a.min(b)] |= self.pinned[a.max(b)];
    }

    /// The lane of what `node` returns; where there is none, all that it reads stays as it is.
    fn through(&mut self, id: NodeId, node: &Node) -> Option<Lane> {
        let (graph, result) = (self.graph, node.output(0)?);
        (node.op.domain.is_empty() && node.outputs.iter().flatten().count() == 1).then_some(())?;
        if ops::linear(graph, id).is_some() {
            return self.linear(id, node, result);
        }
        let of_constants = node.inputs.iter().skip(1).flatten().all(|value| graph.constant(*value).is_some());
        match &*node.op.name {
            "Relu" | "LeakyRelu" | "PRelu" | "Identity" | "Abs" | "Neg" if of_constants => self.same(node),
            "Clip" if clamp_end(graph, node).is_some_and(|high| self.clamps || high.is_infinite()) => self.same(node),
            "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" => {
                self.same(node).filter(|lane| lane.axis == 1)
            }
            "Transpose" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" if of_constants => self.moved(node, result),
            "Add" | "Sub" | "Sum" | "Min" | "Max" => self.joined(node, result),
            "Mul" | "Div" => self.factor(node, result),
            "Concat" => self.concatenated(node, result),
            _ => None,
        }
    }

    fn same(&self, node: &Node) -> Option<Lane> {
        self.of.get(&node.input(0)?).cloned()
    }

    fn linear(&mut self, id: NodeId, node: &Node, result: ValueId) -> Option<Lane> {
        let (graph, value) = (self.graph, node.input(0)?);
        let taps = Taps::of(graph, &self.users, id)?;
        let axis = |value: ValueId| {
            let last = graph.value(value).ty.rank()?.checked_sub(1).filter(|last| *last > 0)?;
            Some(if taps.spatial { 1 } else { last })
        };
        let (from, to) = (axis(value)?, axis(result)?);
        if self.of.get(&value).is_some_and(|lane| lane.axis != from || lane.classes.len() != taps.inputs()) {
            self.pin(value);
        }
        Some(Lane { axis: to, classes: self.fresh(taps.outputs(), false) })
    }

    fn moved(&self, node: &Node, result: ValueId) -> Option<Lane> {
        let (graph, from) = (self.graph, node.input(0)?);
        let lane = self.of.get(&from)?;
        let whole = |axis: &usize| moved_from(graph, node, result, *axis) == Some(lane.axis);
        if let Some(axis) = (0..graph.value(result).ty.rank()?).find(whole) {
            return Some(Lane { axis, classes: lane.classes.clone() });
        }
        (!node.op.is("Transpose")).then_some(())?;
        let (axis, run) = merged_into(graph, from, result, lane.axis)?;
        let n = lane.classes.len();
        let extent = self.extent(Some(result), axis)?;
        Some(Lane { axis, classes: (0..extent).map(|at| lane.classes[at / run % n]).collect() })
    }

    /// The lane of an operand as it stands in a result of `rank` axes.
    fn aligned(&self, value: ValueId, rank: usize) -> Option<Lane> {
        let lane = self.of.get(&value)?;
        let axis = (lane.axis + rank).checked_sub(self.graph.value(value).ty.rank()?)?;
        Some(Lane { axis, classes: lane.classes.clone() })
    }

    /// All operands share factors; constants have to take them.
    fn joined(&mut self, node: &Node, result: ValueId) -> Option<Lane> {
        let graph = self.graph;
        let rank = graph.value(result).ty.rank()?;
        let mut found: Option<Lane> = None;
        for value in node.inputs.iter().copied() {
            let value = value?;
            if graph.constant(value).is_some() {
                continue;
            }
            let lane = self.aligned(value, rank)?;
            match &found {
                None => found = Some(lane),
                Some(first) if first.axis == lane.axis && first.classes.len() == lane.classes.len() => {
                    first.classes.iter().zip(lane.classes.iter()).for_each(|(a, b)| self.unite(*a, *b));
                }
                Some(_) => return None,
            }
        }
        let lane = found?;
        let ones = vec![1.0; lane.classes.len()];
        let takes = |value: &ValueId| {
            graph.constant(*value).is_none_or(|constant| divided_row(constant, (rank, lane.axis), &ones).is_some())
        };
        let fits = node.inputs.iter().flatten().all(takes);
        fits.then_some(lane)
    }

    /// A product is divided in one operand, a quotient in its numerator; the other operand stays.
    fn factor(&mut self, node: &Node, result: ValueId) -> Option<Lane> {
        let rank = self.graph.value(result).ty.rank()?;
        let operands = if node.op.is("Mul") { 0..2 } else { 0..1 };
        let (at, lane) = operands.into_iter().find_map(|at| Some((at, self.aligned(node.input(at)?, rank)?)))?;
        self.pin(node.input(1 - at)?);
        Some(lane)
    }

    fn concatenated(&mut self, node: &Node, result: ValueId) -> Option<Lane> {
        let values = node.inputs.iter().copied().collect::<Option<Vec<ValueId>>>()?;
        let axis = values.iter().find_map(|value| self.of.get(value))?.axis;
        if !joins_along(node, axis, self.graph.value(result).ty.rank()?) {
            let all = values.iter().all(|value| self.of.contains_key(value));
            return if all { self.joined(node, result) } else { None };
        }
        self.extent(Some(result), axis)?;
        let mut classes = Vec::new();
        for value in values {
            match self.of.get(&value) {
                Some(lane) if lane.axis == axis => classes.extend(lane.classes.iter()),
                _ => {
                    self.pin(value);
                    let extent = self.extent(Some(value), axis)?;
                    classes.extend(self.fresh(extent, true).iter());
                }
            }
        }
        Some(Lane { axis, classes: classes.into() })
    }
}
