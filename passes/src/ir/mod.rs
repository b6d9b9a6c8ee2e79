//! The graph: values, nodes and their bodies. Always the float model.
//!
//! Fields are private to this crate's model layer: a graph is read by methods and changed only by
//! [`crate::model::Model::apply`] (import builds one with [`Builder`]).

mod attr;
pub(crate) mod batch;
mod builder;
mod capture;
pub mod check;
mod order;
mod types;
pub mod walk;

use std::sync::Arc;

pub use attr::{Attr, Attrs};
pub(crate) use builder::fresh as fresh_name;
pub use builder::{BuildError, Builder};
pub use types::{Dim, TensorType, Type};

use crate::id::{Name, NodeId, ValueId};
use crate::tensor::Tensor;

/// One tensor (or sequence, map, optional) that flows through the graph.
#[derive(Clone, Debug)]
pub struct Value {
    /// Unique within the graph and not empty.
    pub name: Name,
    /// What is known of its type.
    pub ty: Type,
    /// Where it comes from.
    pub def: Def,
}

/// Where a value comes from.
#[derive(Clone, Debug)]
pub enum Def {
    /// Fed by the caller.
    Input,
    /// A weight or other constant.
    Const(Arc<Tensor>),
    /// The `index`-th output of `node`.
    Output {
        /// The producer.
        node: NodeId,
        /// Which of its outputs.
        index: u16,
    },
    /// In a body: a value of the enclosing graph.
    Capture(ValueId),
}

/// The operator of a node: its domain (empty for ai.onnx) and name, and the version of the domain it is written for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpKey {
    /// Empty for ai.onnx.
    pub domain: Name,
    /// As in `NodeProto.op_type`.
    pub name: Name,
    /// The imported version of `domain`.
    pub opset: u32,
}

impl OpKey {
    /// Whether this is ai.onnx's operator `name`.
    pub fn is(&self, name: &str) -> bool {
        self.domain.is_empty() && &*self.name == name
    }

    /// `Conv`, or `com.microsoft.Gelu` outside ai.onnx.
    pub fn display(&self) -> String {
        if self.domain.is_empty() { self.name.to_string() } else { format!("{}.{}", self.domain, self.name) }
    }
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// For people; may be empty or repeated in files, is made unique on import.
    pub name: Name,
    /// Unknown operators are carried, never dropped.
    pub op: OpKey,
    /// `None`: an optional input left out.
    pub inputs: Vec<Option<ValueId>>,
    /// `None`: an optional output left out.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes by name, graphs excepted.
    pub attrs: Attrs,
    /// The graphs of `If`, `Loop` and `Scan`, by attribute name.
    pub bodies: Vec<Body>,
    /// Documentation and metadata as found in the file.
    pub notes: Option<Arc<Notes>>,
}

impl Node {
    /// The value at `input`, where there is one.
    pub fn input(&self, input: usize) -> Option<ValueId> {
        self.inputs.get(input).copied().flatten()
    }

    /// The value at `output`, where there is one.
    pub fn output(&self, output: usize) -> Option<ValueId> {
        self.outputs.get(output).copied().flatten()
    }

    /// An integer attribute, or `default`.
    pub fn int(&self, name: &str, default: i64) -> i64 {
        match self.attrs.get(name) {
            Some(Attr::Int(value)) => *value,
            _ => default,
        }
    }

    /// A float attribute, or `default`.
    pub fn float(&self, name: &str, default: f32) -> f32 {
        match self.attrs.get(name) {
            Some(Attr::Float(value)) => *value,
            _ => default,
        }
    }

    /// A list of integers, where present.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        match self.attrs.get(name) {
            Some(Attr::Ints(values)) => Some(values),
            _ => None,
        }
    }

    /// A string attribute, or `default`; bytes that are no UTF-8 count as absent.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        match self.attrs.get(name) {
            Some(Attr::String(value)) => std::str::from_utf8(value).unwrap_or(default),
            _ => default,
        }
    }
}

/// Documentation and metadata of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// `doc_string`.
    pub doc: String,
    /// `metadata_props`, in order.
    pub entries: Vec<(String, String)>,
}

/// A graph inside a node. What it reads of the enclosing graph are its values with [`Def::Capture`].
#[derive(Clone, Debug)]
pub struct Body {
    /// The attribute that holds it: `then_branch`, `body`, …
    pub attr: Name,
    /// Its own values and nodes, with ids of their own.
    pub graph: Graph,
}

/// A dataflow graph.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) name: String,
    pub(crate) doc: String,
    pub(crate) nodes: Vec<Option<Node>>,
    pub(crate) values: Vec<Value>,
    pub(crate) order: Vec<NodeId>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
}

impl Graph {
    /// The graph's own name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The graph's documentation.
    pub fn doc(&self) -> &str {
        &self.doc
    }

    /// The nodes in a topological order that is stable under edits.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> {
        self.order.iter().filter_map(|&id| Some((id, self.nodes[id.index()].as_ref()?)))
    }

    /// The number of nodes.
    pub fn n_nodes(&self) -> usize {
        self.order.len()
    }

    /// The number of ids handed out for values; dense tables have this length.
    pub fn n_values(&self) -> usize {
        self.values.len()
    }

    /// The number of ids handed out for nodes; dense tables have this length.
    pub fn n_node_ids(&self) -> usize {
        self.nodes.len()
    }

    /// The node `id`, unless it was erased or is not of this graph.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index())?.as_ref()
    }

    /// The value `id`.
    ///
    /// # Panics
    /// When `id` is not of this graph: ids are handed out by the graph itself.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Every value id, in the order of their making; some may no longer be read or written by anyone.
    #[expect(clippy::cast_possible_truncation, reason = "ids are u32 by construction")]
    pub fn value_ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.values.len() as u32).map(ValueId)
    }

    /// What the caller feeds.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// What the caller gets.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The tensor behind `value`, where it is constant.
    pub fn constant(&self, value: ValueId) -> Option<&Arc<Tensor>> {
        match &self.value(value).def {
            Def::Const(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The tensor at `input` of `node`, where there is one and it is constant.
    pub fn constant_input(&self, node: &Node, input: usize) -> Option<&Arc<Tensor>> {
        self.constant(node.input(input)?)
    }

    /// The node that computes `value`.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, &Node)> {
        match self.value(value).def {
            Def::Output { node, .. } => Some((node, self.node(node)?)),
            _ => None,
        }
    }

    /// The value called `name`. Linear: for single look-ups.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.value_ids().find(|&id| &*self.value(id).name == name)
    }

    /// The bytes of all constants, each counted once.
    pub fn constant_bytes(&self) -> usize {
        let live = walk::Users::of(self);
        self.value_ids()
            .filter(|&id| !live.of_value(id).is_empty() || self.outputs.contains(&id))
            .filter_map(|id| self.constant(id))
            .map(|tensor| tensor.bytes().len())
            .sum()
    }
}
