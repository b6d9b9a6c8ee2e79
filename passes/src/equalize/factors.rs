//! Tensors multiplied by one number, with weights that make up for it.

use std::collections::BTreeMap;

use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::model::{Edit, Patch};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// Who reads a tensor, where all of it ends in linear nodes.
pub(super) struct Readers {
    /// What lies between.
    pub(super) inside: Vec<NodeId>,
    /// The linear nodes.
    pub(super) linear: Vec<NodeId>,
}

impl Readers {
    /// The readers of `value`; `None` where one is neither linear nor passes factors on.
    pub(super) fn of(graph: &Graph, users: &Users, value: ValueId) -> Option<Self> {
        let (mut inside, mut linear, mut reached) = (Vec::new(), Vec::new(), vec![value]);
        while let Some(value) = reached.pop() {
            for user in users.of_value(value) {
                let User::Input { node: reader, input } = *user else { return None };
                let node = graph.node(reader)?;
                if is_linear(graph, reader, input) {
                    linear.push(reader);
                } else if input == 0 && passes_factors(node) {
                    inside.push(reader);
                    reached.push(node.output(0)?);
                } else {
                    return None;
                }
            }
        }
        (!linear.is_empty()).then_some(Self { inside, linear })
    }
}

/// Whether `id` reads its activation at `input` and has an f32 weight, with an f32 bias if any.
pub(super) fn is_linear(graph: &Graph, id: NodeId, input: u16) -> bool {
    let (Some(roles), Some(node)) = (ops::linear(graph, id), graph.node(id)) else { return false };
    let constant = |input: u16| graph.constant_input(node, input.into()).is_some_and(|c| c.dtype() == DType::F32);
    let one = |name: &str| (node.float(name, 1.0) - 1.0).abs() < f32::EPSILON;
    let plain = one("alpha") && one("beta");
    roles.activation == input && constant(roles.weight) && roles.bias.is_none_or(constant) && plain
}

/// Whether `f(s x) = s f(x)` for every s > 0.
fn passes_factors(node: &Node) -> bool {
    let names = [
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Flatten",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Identity",
    ];
    names.iter().any(|name| node.op.is(name)) && node.outputs.iter().flatten().count() == 1
}

/// What stands where a node stood.
pub(super) enum Instead {
    /// The same clamp with another upper end.
    Clamp {
        /// That.
        high: f64,
    },
    /// Another operator that reads the node's first input, and these constants.
    Operator {
        /// Without inputs.
        node: Node,
        /// Its further inputs.
        constants: Vec<Tensor>,
    },
}

/// What nodes return and read as a multiple of what they did.
#[derive(Default)]
pub(super) struct Factors {
    returned: BTreeMap<NodeId, f64>,
    read: BTreeMap<NodeId, f64>,
    instead: BTreeMap<NodeId, Instead>,
}

impl Factors {
    /// `sources` and what lies between them and linear nodes return `factor` times what they did, and `readers` read it.
    pub(super) fn add(&mut self, sources: &[NodeId], readers: &Readers, factor: f64) {
        self.returned.extend(readers.inside.iter().chain(sources).map(|id| (*id, factor)));
        self.read.extend(readers.inside.iter().chain(&readers.linear).map(|id| (*id, factor)));
    }

    /// `id` reads `factor` times what it did.
    pub(super) fn read(&mut self, id: NodeId, factor: f64) {
        self.read.insert(id, factor);
    }

    /// Puts something else where `id` stands.
    pub(super) fn instead(&mut self, id: NodeId, instead: Instead) {
        self.returned.entry(id).or_insert(1.0);
        self.instead.insert(id, instead);
    }

    /// Writes the nodes anew.
    pub(super) fn apply(&self, graph: &Graph, patch: &mut Patch) {
        let mut renewed: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        for (id, node) in graph.nodes() {
            let (returned, read) = (self.returned.get(&id), self.read.get(&id));
            let moved = node.inputs.iter().flatten().any(|value| renewed.contains_key(value));
            if returned.is_none() && read.is_none() && !moved {
                continue;
            }
            let mut copy = self.copy(graph, id, node, patch);
            for input in copy.inputs.iter_mut().flatten() {
                *input = renewed.get(input).copied().unwrap_or(*input);
            }
            match node.output(0).filter(|_| returned.is_some()) {
                Some(output) => {
                    patch.erase(id);
                    let value = graph.value(output);
                    let new = patch.node(copy, &format!("{}.fitted", value.name), value.ty.clone(), Some(id));
                    if graph.outputs().contains(&output) {
                        patch.edit(Edit::Redirect { from: output, to: new });
                    }
                    renewed.insert(output, new);
                }
                None => patch.replace(id, copy),
            }
        }
    }

    /// What stands for `node`, with its inputs as they were.
    fn copy(&self, graph: &Graph, id: NodeId, node: &Node, patch: &mut Patch) -> Node {
        let mut copy = node.clone();
        match self.instead.get(&id) {
            Some(Instead::Clamp { high }) => {
                #[expect(clippy::cast_possible_truncation, reason = "codes' end times a power of two: exact")]
                let high = Tensor::of([], vec![*high as f32]);
                copy.inputs[2] = Some(patch.constant(&format!("{}.high", node.name), high));
            }
            Some(Instead::Operator { node: other, constants }) => {
                copy = other.clone();
                copy.inputs = vec![node.input(0)];
                for tensor in constants {
                    copy.inputs.push(Some(patch.constant(&format!("{}.weight", node.name), tensor.clone())));
                }
            }
            None => {
                let Some(roles) = ops::linear(graph, id) else { return copy };
                let of = |all: &BTreeMap<NodeId, f64>| all.get(&id).copied().unwrap_or(1.0);
                let (returned, read) = (of(&self.returned), of(&self.read));
                let factors = [(Some(roles.weight), returned / read), (roles.bias, returned)];
                for (input, factor) in factors.into_iter().filter_map(|(input, f)| Some((usize::from(input?), f))) {
                    let scaled = graph.constant_input(node, input).and_then(|tensor| scaled(tensor, factor));
                    let name = node.input(input).map_or("", |value| &graph.value(value).name);
                    copy.inputs[input] = scaled.map(|tensor| patch.constant(&format!("{name}.fitted"), tensor));
                }
            }
        }
        copy
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn scaled(tensor: &Tensor, factor: f64) -> Option<Tensor> {
    let values = tensor.floats()?.iter().map(|v| (f64::from(*v) * factor) as f32).collect();
    Some(Tensor::of(tensor.shape(), values))
}
