//! Making a graph from nothing, as import does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Def, Graph, Node, TensorType, Type, Value};
use crate::id::{Name, NodeId, ValueId};
use crate::tensor::Tensor;

/// Why a graph cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Two definitions of one name.
    #[error("`{0}` is defined twice")]
    Duplicate(Name),
    /// A read of something that nothing defines.
    #[error("`{value}` is read by {reader} but nothing defines it")]
    Undefined {
        /// What is read.
        value: Name,
        /// Who reads it.
        reader: String,
    },
    /// Nodes that wait for each other.
    #[error("these nodes form a cycle: {}", .0.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "))]
    Cycle(Vec<Name>),
    /// More values or inputs than ids have room for.
    #[error("{0}")]
    TooLarge(String),
}

/// Builds a [`Graph`] by names: values may be read before they are defined.
#[derive(Debug, Default)]
pub struct Builder {
    graph: Graph,
    by_name: BTreeMap<Name, ValueId>,
    defined: BTreeSet<ValueId>,
    node_names: BTreeSet<Name>,
    /// Per stem, the number that a made-up node name tries next.
    next_number: BTreeMap<Name, u64>,
}

impl Builder {
    /// An empty graph called `name`.
    pub fn new(name: &str, doc: &str) -> Self {
        Self { graph: Graph { name: name.to_owned(), doc: doc.to_owned(), ..Graph::default() }, ..Self::default() }
    }

    /// The id of `name`, minted when it is new.
    pub fn value(&mut self, name: &str) -> ValueId {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let name: Name = name.into();
        let id = ValueId(u32::try_from(self.graph.values.len()).unwrap_or(u32::MAX));
        // Until something defines it, a value counts as an input; `finish` refuses what stays undefined.
        self.graph.values.push(Value { name: Arc::clone(&name), ty: Type::default(), def: Def::Input });
        self.by_name.insert(name, id);
        id
    }

    /// The value called `name`, if anything mentioned it.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.by_name.get(name).copied()
    }

    /// A name that nothing in the graph has yet, starting with `stem`.
    pub fn fresh(&self, stem: &str) -> String {
        fresh(stem, |name| self.by_name.contains_key(name))
    }

    /// Whether something defines `name` already.
    pub fn is_defined(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(|id| self.defined.contains(id))
    }

    /// What is known of `value` so far.
    pub fn get(&self, value: ValueId) -> &Value {
        self.graph.value(value)
    }

    /// The node built as `id`.
    pub fn node_at(&self, id: NodeId) -> Option<&Node> {
        self.graph.node(id)
    }

    /// Says what is known of the type of `value`.
    pub fn set_type(&mut self, value: ValueId, ty: Type) {
        self.graph.values[value.index()].ty = ty;
    }

    /// Defines `name` as a graph input.
    ///
    /// # Errors
    /// [`BuildError::Duplicate`].
    pub fn input(&mut self, name: &str, ty: Type) -> Result<ValueId, BuildError> {
        let id = self.define(name, Def::Input)?;
        self.set_type(id, ty);
        self.graph.inputs.push(id);
        Ok(id)
    }

    /// Defines `name` as a constant.
    ///
    /// # Errors
    /// [`BuildError::Duplicate`].
    pub fn constant(&mut self, name: &str, tensor: Arc<Tensor>) -> Result<ValueId, BuildError> {
        let ty = Type::Tensor(TensorType::of(&tensor));
        let id = self.define(name, Def::Const(tensor))?;
        self.set_type(id, ty);
        Ok(id)
    }

    /// Defines `name` as a value of the enclosing graph.
    ///
    /// # Errors
    /// [`BuildError::Duplicate`].
    pub fn capture(&mut self, name: &str, outer: ValueId, ty: Type) -> Result<ValueId, BuildError> {
        let id = self.define(name, Def::Capture(outer))?;
        self.set_type(id, ty);
        Ok(id)
    }

    /// Adds a node whose inputs were named by [`Self::value`]; defines its outputs. An empty or repeated node name gets
    /// a fresh one.
    ///
    /// # Errors
    /// [`BuildError::Duplicate`] for an output that exists; [`BuildError::TooLarge`] past 65,535 inputs or outputs.
    pub fn node(&mut self, mut node: Node) -> Result<NodeId, BuildError> {
        if node.inputs.len().max(node.outputs.len()) > usize::from(u16::MAX) {
            return Err(BuildError::TooLarge(format!("node `{}` has more than 65535 inputs or outputs", node.name)));
        }
        let id = NodeId(u32::try_from(self.graph.nodes.len()).unwrap_or(u32::MAX));
        for (index, output) in node.outputs.iter().enumerate() {
            if let Some(value) = *output {
                let index = u16::try_from(index).unwrap_or(u16::MAX);
                self.define_id(value, Def::Output { node: id, index })?;
            }
        }
        if node.name.is_empty() || self.node_names.contains(&node.name) {
            let stem = Arc::clone(if node.name.is_empty() { &node.op.name } else { &node.name });
            node.name = self.fresh_node_name(&stem);
        }
        self.node_names.insert(Arc::clone(&node.name));
        self.graph.nodes.push(Some(node));
        self.graph.order.push(id);
        Ok(id)
    }

    fn fresh_node_name(&mut self, stem: &Name) -> Name {
        if !stem.is_empty() && !self.node_names.contains(stem) {
            return Arc::clone(stem);
        }
        let next = self.next_number.entry(Arc::clone(stem)).or_insert(1);
        loop {
            let name: Name = format!("{stem}_{next}").into();
            *next += 1;
            if !self.node_names.contains(&name) {
                return name;
            }
        }
    }

    /// Declares `name` a graph output.
    pub fn output(&mut self, name: &str) -> ValueId {
        let id = self.value(name);
        self.graph.outputs.push(id);
        id
    }

    /// The names that are read but that nothing defines yet: in a body, what it captures.
    pub fn undefined(&self) -> Vec<Name> {
        let read = self.read();
        self.graph
            .value_ids()
            .filter(|id| read[id.index()] && !self.defined.contains(id))
            .map(|id| Arc::clone(&self.graph.value(id).name))
            .collect()
    }

    /// The graph, sorted.
    ///
    /// # Errors
    /// [`BuildError::Undefined`] or [`BuildError::Cycle`].
    pub fn finish(mut self) -> Result<Graph, BuildError> {
        let read = self.read();
        if let Some(value) = self.graph.value_ids().find(|id| read[id.index()] && !self.defined.contains(id)) {
            let reader = self
                .graph
                .nodes()
                .find(|(_, node)| node.inputs.contains(&Some(value)))
                .map_or_else(|| "the graph's outputs".to_owned(), |(_, node)| format!("node `{}`", node.name));
            return Err(BuildError::Undefined { value: Arc::clone(&self.graph.value(value).name), reader });
        }
        self.graph.sort().map_err(BuildError::Cycle)?;
        self.graph.sync_captures();
        Ok(self.graph)
    }

    /// Per value, whether a node, a body or the graph's outputs read it: a name that nobody reads needs no definition.
    fn read(&self) -> Vec<bool> {
        let mut read = vec![false; self.graph.n_values()];
        let by_nodes = self.graph.nodes().flat_map(|(_, node)| super::walk::reads(node));
        by_nodes.chain(self.graph.outputs.iter().copied()).for_each(|value| read[value.index()] = true);
        read
    }

    fn define(&mut self, name: &str, def: Def) -> Result<ValueId, BuildError> {
        let id = self.value(name);
        self.define_id(id, def)?;
        Ok(id)
    }

    fn define_id(&mut self, id: ValueId, def: Def) -> Result<(), BuildError> {
        if !self.defined.insert(id) {
            return Err(BuildError::Duplicate(Arc::clone(&self.graph.value(id).name)));
        }
        self.graph.values[id.index()].def = def;
        Ok(())
    }
}

/// `stem`, or `stem_1`, `stem_2`, …: the first that is not taken.
pub(crate) fn fresh(stem: &str, taken: impl Fn(&str) -> bool) -> String {
    if !stem.is_empty() && !taken(stem) {
        return stem.to_owned();
    }
    let mut n = 1_u64;
    loop {
        let name = format!("{stem}_{n}");
        if !taken(&name) {
            return name;
        }
        n += 1;
    }
}
