//! Patches: the only door through which a model changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Decision, Leanings, Model, Statistic};
use crate::diag::Diagnostic;
use crate::encoding::Encoding;
use crate::id::{Name, NodeId, Site, ValueId};
use crate::ir::{Def, Graph, Node, TensorType, Type, Value, check};
use crate::tensor::Tensor;

/// One change. Graph edits keep the function that every surviving value id stands for; those of a pass that is exact on the samples
/// only keep it there, and `Forget` says where not even that holds.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Graph: adds a node, before `before` in the order, or last.
    Insert {
        /// The id that [`Patch::node`] handed out.
        id: NodeId,
        /// The node; its outputs were minted by the patch.
        node: Node,
        /// The neighbor.
        before: Option<NodeId>,
    },
    /// Graph: another way to compute the very same outputs.
    Replace {
        /// The node that goes.
        id: NodeId,
        /// What takes its place and its outputs.
        node: Node,
    },
    /// Graph: removes a node that nobody reads any more.
    Erase(NodeId),
    /// Graph: whoever reads `from` reads `to`; both compute the same function. Where `from` is a graph output, `to` takes
    /// over its name.
    Redirect {
        /// No longer read.
        from: ValueId,
        /// Read instead.
        to: ValueId,
    },
    /// Graph: `value` is this constant; its producer no longer computes it.
    Freeze {
        /// The value.
        value: ValueId,
        /// What it always is.
        tensor: Arc<Tensor>,
    },
    /// Graph: more is known of the type of `value`.
    Refine {
        /// The value.
        value: ValueId,
        /// What is known.
        ty: TensorType,
    },
    /// Graph: other inputs and outputs. What a new input stands for, its producer computed before.
    Interface {
        /// All inputs.
        inputs: Vec<ValueId>,
        /// All outputs.
        outputs: Vec<ValueId>,
        /// Values that trade names: those that people know them by.
        names: Vec<(ValueId, ValueId)>,
    },
    /// Plan: how the tensor at `site` is written.
    Encode {
        /// Where.
        site: Site,
        /// How.
        encoding: Encoding,
    },
    /// Plan: the codes of the constant at `site`.
    Round {
        /// Where.
        site: Site,
        /// The codes, in the storage type of the encoding's grid.
        codes: Arc<Tensor>,
    },
    /// Plan: what the codes at `site` lose over what nearest ones would (see [`super::Plan::loss_over_nearest`]).
    Compare {
        /// Where.
        site: Site,
        /// One loss over the other.
        over_nearest: f64,
    },
    /// Plan: where weights at `site` would go (see [`super::Plan::leanings`]).
    Lean {
        /// Where.
        site: Site,
        /// Of every weight.
        leanings: Leanings,
    },
    /// Plan: the float constant that is read at `site` instead of that of the graph.
    Substitute {
        /// Where.
        site: Site,
        /// What is read, of the same type and shape.
        tensor: Arc<Tensor>,
    },
    /// Plan: whether `node` runs quantized, and why.
    Decide {
        /// Which node.
        node: NodeId,
        /// What.
        decision: Decision,
    },
    /// Stats: a measurement of `value`.
    Record {
        /// Which tensor.
        value: ValueId,
        /// What was measured.
        statistic: Statistic,
    },
    /// Stats: what samples brought of a value is not known any more. What training saw of it stays.
    Forget(ValueId),
}

impl Edit {
    /// Whether the graph itself changes.
    pub fn touches_graph(&self) -> bool {
        !matches!(
            self,
            Self::Encode { .. }
                | Self::Round { .. }
                | Self::Compare { .. }
                | Self::Lean { .. }
                | Self::Substitute { .. }
                | Self::Decide { .. }
                | Self::Record { .. }
                | Self::Forget(_)
        )
    }
}

/// Why a patch was refused. The model is as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// Made for another state of the model.
    #[error("the patch was made for another revision of the model")]
    Stale,
    /// An edit names a node that is not there.
    #[error("an edit names node {0:?}, which is not there")]
    NoNode(NodeId),
    /// A replacement does not compute the same outputs.
    #[error("the replacement of node `{0}` has other outputs")]
    OtherOutputs(Name),
    /// A graph output cannot be redirected to a graph input, a constant or another output.
    #[error("graph output `{from}` cannot be taken over by `{to}`")]
    Output {
        /// The output.
        from: Name,
        /// What should have become it.
        to: Name,
    },
    /// Nodes that wait for each other.
    #[error("the patch makes a cycle through {0:?}")]
    Cycle(Vec<Name>),
    /// The result breaks a structural rule.
    #[error(transparent)]
    Check(#[from] check::CheckError),
}

/// Edits against one revision of one model, with the values they introduce.
#[derive(Debug)]
pub struct Patch {
    base: u64,
    first_value: usize,
    first_node: usize,
    n_new_nodes: usize,
    pub(super) values: Vec<Value>,
    edits: Vec<Edit>,
    counts: BTreeMap<&'static str, u64>,
    notes: Vec<Diagnostic>,
    erased: BTreeSet<NodeId>,
    /// The same in the order of their coming, for rolling back.
    erased_log: Vec<NodeId>,
}

/// A point to come back to, for a rewrite that finds out late that it cannot go through.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    values: usize,
    edits: usize,
    nodes: usize,
    erased: usize,
}

impl Patch {
    /// An empty patch for `model` as it is now.
    pub fn on(model: &Model) -> Self {
        Self {
            base: model.revision,
            first_value: model.graph.values.len(),
            first_node: model.graph.nodes.len(),
            n_new_nodes: 0,
            values: Vec::new(),
            edits: Vec::new(),
            counts: BTreeMap::new(),
            notes: Vec::new(),
            erased: BTreeSet::new(),
            erased_log: Vec::new(),
        }
    }

    fn mint(&mut self, name: &str, ty: Type, def: Def) -> ValueId {
        let id = self.minted(self.values.len());
        self.values.push(Value { name: name.into(), ty, def });
        id
    }

    /// A new constant, called `name` or, if that is taken, something like it.
    pub fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let ty = Type::Tensor(TensorType::of(&tensor));
        self.mint(name, ty, Def::Const(Arc::new(tensor)))
    }

    /// A new node and its one output, called `name` or something like it.
    pub fn node(&mut self, node: Node, name: &str, ty: Type, before: Option<NodeId>) -> ValueId {
        self.node_with_id(node, name, ty, before).0
    }

    /// The same, with the id of the node, for what is planned about it.
    pub fn node_with_id(&mut self, mut node: Node, name: &str, ty: Type, before: Option<NodeId>) -> (ValueId, NodeId) {
        let id = NodeId(u32::try_from(self.first_node + self.n_new_nodes).unwrap_or(u32::MAX));
        self.n_new_nodes += 1;
        let output = self.mint(name, ty, Def::Output { node: id, index: 0 });
        node.outputs = vec![Some(output)];
        self.edits.push(Edit::Insert { id, node, before });
        (output, id)
    }

    /// Another way to compute the outputs of node `id`.
    pub fn replace(&mut self, id: NodeId, node: Node) {
        self.touch(id);
        self.edits.push(Edit::Replace { id, node });
    }

    /// Removes node `id`, which nobody will read.
    pub fn erase(&mut self, id: NodeId) {
        self.touch(id);
        self.edits.push(Edit::Erase(id));
    }

    fn touch(&mut self, id: NodeId) {
        if self.erased.insert(id) {
            self.erased_log.push(id);
        }
    }

    /// Adds any edit.
    pub fn edit(&mut self, edit: Edit) {
        self.edits.push(edit);
    }

    /// Counts `n` more of `what`, for the trace.
    pub fn count(&mut self, what: &'static str, n: u64) {
        *self.counts.entry(what).or_default() += n;
    }

    /// Tells the user something.
    pub fn note(&mut self, note: Diagnostic) {
        self.notes.push(note);
    }

    /// Whether nothing changes. Notes are no change.
    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// Whether this patch already removes or replaces node `id`.
    pub fn touches(&self, id: NodeId) -> bool {
        self.erased.contains(&id)
    }

    /// The edits so far.
    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// The id of the value that this patch introduced as its `index`-th.
    pub(super) fn minted(&self, index: usize) -> ValueId {
        ValueId(u32::try_from(self.first_value + index).unwrap_or(u32::MAX))
    }

    /// Whether `value` comes with this patch.
    pub(super) fn introduces(&self, value: ValueId) -> bool {
        value.index() >= self.first_value
    }

    /// A patch for the same model with the same ids, but these `values` and `edits`, and nothing to report.
    pub(super) fn with(&self, values: Vec<Value>, edits: Vec<Edit>) -> Self {
        Self {
            values,
            edits,
            counts: BTreeMap::new(),
            notes: Vec::new(),
            erased: BTreeSet::new(),
            erased_log: Vec::new(),
            ..*self
        }
    }

    pub(crate) fn report(&mut self) -> (BTreeMap<&'static str, u64>, Vec<Diagnostic>) {
        (std::mem::take(&mut self.counts), std::mem::take(&mut self.notes))
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark {
            values: self.values.len(),
            edits: self.edits.len(),
            nodes: self.n_new_nodes,
            erased: self.erased_log.len(),
        }
    }

    pub(crate) fn roll_back(&mut self, mark: &Mark) {
        self.values.truncate(mark.values);
        self.edits.truncate(mark.edits);
        self.n_new_nodes = mark.nodes;
        for id in self.erased_log.drain(mark.erased..) {
            self.erased.remove(&id);
        }
    }
}

/// Whether `from` may be redirected to `to`: always, unless `from` is a graph output that `to` cannot take over.
pub fn can_redirect(graph: &Graph, from: ValueId, to: ValueId) -> bool {
    let outputs = graph.outputs();
    !outputs.contains(&from) || (matches!(graph.value(to).def, Def::Output { .. }) && !outputs.contains(&to))
}

impl Model {
    /// Applies `patch` whole or not at all, then checks the graph.
    ///
    /// # Errors
    /// [`PatchError`] says which rule the patch breaks; the model is then as it was.
    pub fn apply(&mut self, patch: Patch) -> Result<(), PatchError> {
        if patch.base != self.revision {
            return Err(PatchError::Stale);
        }
        if patch.edits.iter().any(Edit::touches_graph) {
            let next = edited(&self.graph, &patch)?;
            self.forget_moved_uses(&patch);
            self.graph = next;
        }
        for edit in patch.edits {
            match edit {
                Edit::Encode { site, encoding } => {
                    // Codes mean nothing under another encoding.
                    if self.plan.encodings.get(&site) != Some(&encoding) {
                        self.plan.forget_codes(site);
                    }
                    self.plan.encodings.insert(site, encoding);
                }
                Edit::Round { site, codes } => {
                    self.plan.forget_codes(site);
                    self.plan.codes.insert(site, codes);
                }
                Edit::Compare { site, over_nearest } => drop(self.plan.losses.insert(site, over_nearest)),
                Edit::Lean { site, leanings } => drop(self.plan.leanings.insert(site, leanings)),
                Edit::Substitute { site, tensor } => drop(self.plan.substitutes.insert(site, tensor)),
                Edit::Decide { node, decision } => drop(self.plan.decisions.insert(node, decision)),
                Edit::Record { value, statistic } => self.stats.record(value, statistic),
                Edit::Forget(value) => self.stats.forget(value),
                _ => {}
            }
        }
        self.revision += 1;
        Ok(())
    }
}

impl Model {
    /// Drops what the plan says of uses that go away or come to read another value.
    fn forget_moved_uses(&mut self, patch: &Patch) {
        for edit in &patch.edits {
            let (id, kept) = match edit {
                Edit::Erase(id) => (*id, None),
                Edit::Replace { id, node } => (*id, Some(node)),
                _ => continue,
            };
            let Some(old) = self.graph.node(id) else { continue };
            for (index, value) in old.inputs.iter().enumerate() {
                let Ok(input) = u16::try_from(index) else { continue };
                if kept.is_none_or(|node| node.inputs.get(index) != Some(value)) {
                    self.plan.encodings.remove(&Site::Use { node: id, input });
                    self.plan.forget_codes(Site::Use { node: id, input });
                    self.plan.substitutes.remove(&Site::Use { node: id, input });
                }
            }
        }
    }
}

/// `graph` after the graph edits of `patch`.
fn edited(graph: &Graph, patch: &Patch) -> Result<Graph, PatchError> {
    let mut next = graph.clone();
    add_values(&mut next, &patch.values);
    next.nodes.resize(patch.first_node + patch.n_new_nodes, None);
    let mut inserts: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    let mut last = Vec::new();
    let mut redirects = BTreeMap::new();
    for edit in &patch.edits {
        match edit {
            Edit::Insert { id, node, before } => {
                next.nodes[id.index()] = Some(node.clone());
                before.map_or(&mut last, |at| inserts.entry(at).or_default()).push(*id);
            }
            Edit::Replace { id, node } => {
                let old = next.node(*id).ok_or(PatchError::NoNode(*id))?;
                if old.outputs != node.outputs {
                    return Err(PatchError::OtherOutputs(Arc::clone(&old.name)));
                }
                next.nodes[id.index()] = Some(node.clone());
            }
            Edit::Erase(id) => {
                next.node(*id).ok_or(PatchError::NoNode(*id))?;
                next.nodes[id.index()] = None;
            }
            Edit::Redirect { from, to } => drop(redirects.insert(*from, *to)),
            Edit::Freeze { value, tensor } => freeze(&mut next, *value, tensor),
            Edit::Interface { inputs, outputs, names } => expose(&mut next, inputs, outputs, names),
            Edit::Refine { value, ty } => {
                if let Type::Tensor(known) = &mut next.values[value.index()].ty {
                    *known = known.refined(ty);
                }
            }
            _ => {}
        }
    }
    next.order = reordered(&next, graph, &inserts, last);
    redirect(&mut next, &redirects)?;
    next.sort().map_err(PatchError::Cycle)?;
    next.sync_captures();
    check::check(&next)?;
    Ok(next)
}

fn add_values(next: &mut Graph, values: &[Value]) {
    let mut names: BTreeSet<Name> = next.values.iter().map(|value| Arc::clone(&value.name)).collect();
    for value in values {
        let name: Name = crate::ir::fresh_name(&value.name, |name| names.contains(name)).into();
        names.insert(Arc::clone(&name));
        next.values.push(Value { name, ..value.clone() });
    }
}

fn freeze(next: &mut Graph, value: ValueId, tensor: &Arc<Tensor>) {
    if let Def::Output { node, index } = next.values[value.index()].def
        && let Some(node) = next.nodes[node.index()].as_mut()
    {
        node.outputs[usize::from(index)] = None;
    }
    let slot = &mut next.values[value.index()];
    slot.def = Def::Const(Arc::clone(tensor));
    slot.ty = Type::Tensor(TensorType::of(tensor));
}

fn expose(next: &mut Graph, inputs: &[ValueId], outputs: &[ValueId], names: &[(ValueId, ValueId)]) {
    for input in inputs {
        if let Def::Output { node, index } = next.values[input.index()].def
            && let Some(node) = next.nodes[node.index()].as_mut()
        {
            node.outputs[usize::from(index)] = None;
        }
        next.values[input.index()].def = Def::Input;
    }
    next.inputs = inputs.to_vec();
    next.outputs = outputs.to_vec();
    for (a, b) in names {
        let name = Arc::clone(&next.values[a.index()].name);
        next.values[a.index()].name = std::mem::replace(&mut next.values[b.index()].name, name);
    }
}

/// The old order with inserted nodes in their places and erased ones left out.
fn reordered(next: &Graph, old: &Graph, inserts: &BTreeMap<NodeId, Vec<NodeId>>, last: Vec<NodeId>) -> Vec<NodeId> {
    let mut order = Vec::with_capacity(old.order.len());
    for &id in &old.order {
        order.extend(inserts.get(&id).into_iter().flatten().copied());
        order.push(id);
    }
    order.extend(last);
    order.retain(|id| next.nodes[id.index()].is_some());
    order
}

fn redirect(next: &mut Graph, redirects: &BTreeMap<ValueId, ValueId>) -> Result<(), PatchError> {
    if redirects.is_empty() {
        return Ok(());
    }
    let end = |mut value: ValueId| {
        // Bounded: a chain longer than the table of redirects would be a cycle.
        for _ in 0..redirects.len() {
            match redirects.get(&value) {
                Some(&to) => value = to,
                None => break,
            }
        }
        value
    };
    for &from in redirects.keys() {
        if next.outputs.contains(&from) {
            take_over_output(next, from, end(from))?;
        }
    }
    for node in next.nodes.iter_mut().flatten() {
        node.inputs.iter_mut().flatten().for_each(|input| *input = end(*input));
        node.bodies.iter_mut().for_each(|body| body.graph.recapture(end));
    }
    Ok(())
}

/// Makes `to` the graph output that `from` is, under the name that people know it by.
fn take_over_output(next: &mut Graph, from: ValueId, to: ValueId) -> Result<(), PatchError> {
    if !can_redirect(next, from, to) {
        let name = |id: ValueId| Arc::clone(&next.value(id).name);
        return Err(PatchError::Output { from: name(from), to: name(to) });
    }
    // An output can be listed more than once.
    next.outputs.iter_mut().filter(|output| **output == from).for_each(|output| *output = to);
    let name = Arc::clone(&next.values[from.index()].name);
    next.values[from.index()].name = std::mem::replace(&mut next.values[to.index()].name, name);
    if let (Type::Tensor(old), Type::Tensor(new)) =
        (next.values[from.index()].ty.clone(), &mut next.values[to.index()].ty)
    {
        *new = old.refined(new);
    }
    Ok(())
}
