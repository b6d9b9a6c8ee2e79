//! A block as a tape: weights, biases and scales of activations are leaves, rounding of activations is a step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::blocks::{self, Block};
use super::fake_quant::FakeQuant;
use super::room::Room;
use super::steps;
use crate::encoding::Encoding;
use crate::grad::{self, Slot, Tape, Value};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::lockstep;
use crate::model::Plan;
use crate::ops;
use crate::rounding;
use crate::simulate::{self, Cutter, Version};
use crate::tensor::Tensor;

/// The program of a block. Leaves are filled per sample (`feeds`), once (`constants`), or by what is learned.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) tape: Tape,
    /// What a sample brings, with padding.
    pub(super) feeds: Vec<(Slot, ValueId)>,
    /// Those of the feeds that only the block itself computes: whole numbers that depend on shapes alone.
    pub(super) inner: Vec<ValueId>,
    pub(super) constants: Vec<(Slot, Value<f32>)>,
    /// Those of the constants that the plan rounds or replaces, as the float model has them.
    pub(super) float_constants: Vec<(Slot, Value<f32>)>,
    /// Encoded weights of linear nodes.
    pub(super) weights: Vec<(Slot, Site, Arc<Tensor>)>,
    /// What each of those nodes computes.
    pub(super) results: Vec<Slot>,
    /// Where everything that nodes compute is, as it is before it is rounded.
    pub(super) computed: BTreeMap<ValueId, Slot>,
    /// Their biases as they are read, and as the float model has them.
    pub(super) biases: Vec<(Slot, Site, Arc<Tensor>)>,
    /// Which share of the activations stays in float, with a seed.
    pub(super) drop: Slot,
    pub(super) float_biases: Vec<(Slot, Site, Arc<Tensor>)>,
    /// Of every bias, whether it stays as it is; empty where none does.
    pub(super) held: Vec<bool>,
    pub(super) outputs: Vec<(Slot, ValueId)>,
    /// How much of it memory holds at once.
    pub(super) room: Room,
    /// What activations are once they are rounded.
    pub(super) roundings: Vec<(Slot, Site)>,
    /// The logarithms of what scales of activations are multiplied with.
    pub(super) steps: Vec<(Slot, Site)>,
    /// Of every bias that is in codes, what its scale is made of.
    pub(super) products: Vec<Option<Product>>,
}

/// What gets gradients besides weights and biases.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Also {
    /// Scales of activations.
    pub(super) steps: bool,
    /// Scales and shifts of norms that compute in float.
    pub(super) norms: bool,
    /// What the block reads of other blocks.
    pub(super) inputs: bool,
    /// So many of the last nodes are what follows the block, and not its own.
    pub(super) rest: usize,
}

/// The scale of a bias: that of an activation times that of a weight.
#[derive(Clone, Debug)]
pub(super) struct Product {
    /// Where the activation is encoded, and how.
    pub(super) activation: (Site, Encoding),
    /// Where the weight is encoded.
    pub(super) weight: Site,
    /// The encoding of the bias.
    pub(super) encoding: Encoding,
}

struct Maker<'a> {
    graph: &'a Graph,
    plan: &'a Plan,
    given: &'a Plan,
    touched: &'a BTreeSet<ValueId>,
    program: Program,
    slots: BTreeMap<Version, Slot>,
    /// Sites of biases, and of what is learned like them.
    biases: BTreeSet<Site>,
    /// What nodes of the block compute, and the tape does not.
    inner: BTreeSet<ValueId>,
    produced: BTreeSet<ValueId>,
    /// Sites of activations whose scale is learned.
    free: BTreeSet<Site>,
    /// Whether what is read of other blocks gets gradients.
    through: bool,
}

impl Program {
    /// Leaves biases as they are, and not norms.
    pub(super) fn hold_biases(&mut self, graph: &Graph, plan: &Plan, block: &Block) {
        let norms: BTreeSet<Site> = rounding::norm_sites(graph, plan, &block.nodes).into_iter().collect();
        self.held = self.biases.iter().map(|(_, site, _)| !norms.contains(site)).collect();
    }

    /// The program of `block`, or why gradients do not pass it. Weights that had codes in the `given` plan keep them.
    pub(super) fn of(graph: &Graph, plan: &Plan, given: &Plan, block: &Block, also: Also) -> Result<Self, String> {
        let touched = lockstep::touched(graph, plan);
        let users = Users::of(graph);
        let layers = block.nodes.iter().filter(|id| blocks::is_layer(graph, plan, **id));
        let mut biases: BTreeSet<Site> = layers.filter_map(|id| ops::bias_site(graph, &users, *id)).collect();
        if also.norms {
            biases.extend(rounding::norm_sites(graph, plan, &block.nodes));
        }
        let mut tape = Tape::default();
        let drop = tape.leaf(false);
        let program = Self {
            tape,
            feeds: Vec::new(),
            inner: Vec::new(),
            constants: Vec::new(),
            float_constants: Vec::new(),
            weights: Vec::new(),
            results: Vec::new(),
            computed: BTreeMap::new(),
            biases: Vec::new(),
            drop,
            float_biases: Vec::new(),
            held: Vec::new(),
            outputs: Vec::new(),
            room: Room::ALL,
            roundings: Vec::new(),
            steps: Vec::new(),
            products: Vec::new(),
        };
        let own = &block.nodes[..block.nodes.len().saturating_sub(also.rest)];
        let free = if also.steps { steps::free(graph, plan, &users, own) } else { BTreeSet::new() };
        let outputs =
            block.nodes.iter().filter_map(|id| graph.node(*id)).flat_map(|node| node.outputs.iter().flatten());
        let produced = outputs.copied().collect();
        let (slots, inner) = (BTreeMap::new(), BTreeSet::new());
        let through = also.inputs;
        let mut maker =
            Maker { graph, plan, given, touched: &touched, program, slots, biases, inner, produced, free, through };
        for &id in &block.nodes {
            if let Some(node) = graph.node(id) {
                maker.node(id, node)?;
            }
        }
        for &value in block.outputs.iter().filter(|value| simulate::is_float_activation(graph, **value)) {
            let slot = *maker.slots.get(&(value, None)).ok_or("its result does not depend on its weights")?;
            // What the graph returns is returned as rounded.
            let site = Site::Value(value);
            let returned = graph.outputs().contains(&value) && plan.encoding(site).is_some();
            let slot = if returned { maker.rounded(site, slot)? } else { slot };
            maker.program.outputs.push((slot, value));
        }
        let mut program = maker.program;
        let result = |(_, site, _): &(Slot, Site, _)| {
            let Site::Use { node, .. } = site else { return None };
            program.computed.get(&graph.node(*node)?.output(0)?).copied()
        };
        let results: Option<Vec<Slot>> = program.weights.iter().map(result).collect();
        program.results = results.ok_or("a bug in onnx-quant: a layer without a result")?;
        program.products = program.biases.iter().map(|(_, site, _)| product(graph, plan, *site)).collect();
        Ok(program)
    }
}

/// What the scale of the bias at `site` is made of, where it is in codes.
fn product(graph: &Graph, plan: &Plan, site: Site) -> Option<Product> {
    let Site::Use { node, .. } = site else { return None };
    let roles = ops::linear(graph, node)?;
    let read = Site::Use { node, input: roles.activation };
    let value = Site::Value(graph.node(node)?.input(roles.activation.into())?);
    let activation = [read, value].into_iter().find_map(|site| Some((site, plan.encoding(site)?.clone())))?;
    let weight = Site::Use { node, input: roles.weight };
    Some(Product { activation, weight, encoding: plan.encoding(site)?.clone() })
}

impl Maker<'_> {
    fn node(&mut self, id: NodeId, node: &Node) -> Result<(), String> {
        let depends = |value: &ValueId| self.touched.contains(value) && !self.inner.contains(value);
        let reads = crate::ir::walk::reads(node).filter(|value| self.graph.constant(*value).is_none());
        let changes = reads.into_iter().any(|value| depends(&value))
            || node
                .inputs
                .iter()
                .enumerate()
                .any(|(i, value)| value.is_some_and(|v| self.version(id, i, v).1.is_some()));
        let is_real = node.outputs.iter().flatten().all(|value| simulate::is_float_activation(self.graph, *value));
        if !changes || node.op.is("Shape") || node.op.is("Size") {
            self.inner.extend(node.outputs.iter().flatten());
            return Ok(());
        }
        if !is_real {
            return Err(format!(
                "node `{}` ({}) decides by values that rounding changes",
                node.name,
                node.op.display()
            ));
        }
        let rule = grad::rule(node).map_err(|error| format!("node `{}`: {error}", node.name))?;
        let mut inputs = Vec::new();
        for (i, value) in node.inputs.iter().enumerate() {
            inputs.push(value.map(|value| self.read(id, i, value)).transpose()?);
        }
        let outputs = self.program.tape.push(&node.name, rule, inputs, node.outputs.len());
        for (value, slot) in node.outputs.iter().zip(outputs) {
            if let Some(value) = value {
                self.slots.insert((*value, None), slot);
                self.program.computed.insert(*value, slot);
            }
        }
        Ok(())
    }

    fn version(&self, id: NodeId, input: usize, value: ValueId) -> Version {
        Cutter { graph: self.graph, plan: self.plan }.of_use(id, input, value)
    }

    /// The slot of what `input` of node `id` reads.
    fn read(&mut self, id: NodeId, input: usize, value: ValueId) -> Result<Slot, String> {
        let version = self.version(id, input, value);
        // Biases that share a constant are learned apart.
        let here = u16::try_from(input).ok().map(|input| Site::Use { node: id, input });
        let is_bias = here.is_some_and(|site| self.biases.contains(&site));
        if let Some(&slot) = self.slots.get(&version).filter(|_| !is_bias) {
            return Ok(slot);
        }
        let slot = if let Some(tensor) = self.graph.constant(value) {
            self.constant(id, input, version, tensor)?
        } else if let Some(site) = version.1 {
            let raw = self.raw(value);
            self.rounded(site, raw)?
        } else {
            self.raw(value)
        };
        if !is_bias {
            self.slots.insert(version, slot);
        }
        Ok(slot)
    }

    /// The slot of a value as computed.
    fn raw(&mut self, value: ValueId) -> Slot {
        if let Some(&slot) = self.slots.get(&(value, None)) {
            return slot;
        }
        let carried = self.touched.contains(&value) && !self.produced.contains(&value);
        let slot = self.program.tape.leaf(self.through && carried);
        self.program.feeds.push((slot, value));
        if self.produced.contains(&value) {
            self.program.inner.push(value);
        }
        self.slots.insert((value, None), slot);
        slot
    }

    fn constant(&mut self, id: NodeId, input: usize, version: Version, tensor: &Arc<Tensor>) -> Result<Slot, String> {
        let name = &self.graph.value(version.0).name;
        let read = match version.1 {
            Some(site) => {
                simulate::rounded_constant(self.plan, site, tensor, name).map_err(|error| error.to_string())?
            }
            None => Arc::clone(tensor),
        };
        let value = grad::value_of(&read).ok_or_else(|| format!("tensor `{name}` is {}", read.dtype().name()))?;
        let here = u16::try_from(input).ok().map(|input| Site::Use { node: id, input });
        let of_layer = ops::linear(self.graph, id).filter(|roles| usize::from(roles.weight) == input);
        let coded = version.1.filter(|site| self.plan.codes(*site).is_some() && self.given.codes(*site).is_none());
        let slot = if let (Some(site), true) = (coded, of_layer.is_some()) {
            let slot = self.program.tape.leaf(true);
            self.program.weights.push((slot, site, Arc::clone(tensor)));
            slot
        } else if let Some(site) = here.filter(|site| self.biases.contains(site)) {
            let slot = self.program.tape.leaf(true);
            self.program.biases.push((slot, site, read));
            self.program.float_biases.push((slot, site, Arc::clone(tensor)));
            slot
        } else {
            let slot = self.program.tape.leaf(false);
            if version.1.is_some() {
                self.program.float_constants.extend(grad::value_of(tensor).map(|float| (slot, float)));
            }
            self.program.constants.push((slot, value));
            slot
        };
        Ok(slot)
    }

    /// The slot of `raw` as rounded at `site`.
    fn rounded(&mut self, site: Site, raw: Slot) -> Result<Slot, String> {
        let encoding: &Encoding = self.plan.encoding(site).ok_or("a bug in onnx-quant: a site without an encoding")?;
        let rule = FakeQuant { encoding: encoding.clone() };
        let mut inputs = vec![Some(raw), Some(self.program.drop)];
        if self.free.contains(&site) {
            let step = self.program.tape.leaf(true);
            self.program.steps.push((step, site));
            inputs.push(Some(step));
        }
        let outputs = self.program.tape.push("rounding", Box::new(rule), inputs, 1);
        let slot = *outputs.first().ok_or("a bug in onnx-quant: a step without a result")?;
        self.program.roundings.push((slot, site));
        Ok(slot)
    }
}
