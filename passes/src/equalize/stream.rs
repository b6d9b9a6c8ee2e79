//! Residual streams: the sums that norms read, and everything that adds to them.

use std::collections::{BTreeMap, BTreeSet};

use super::stream_norms::{Affine, Norm};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::ops;
use crate::tables;
use crate::tensor::{DType, Tensor};

/// What a node does about a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A product whose result is part of it, by the weight in input 1.
    Writes,
    /// A `Gather` of rows of a table, in input 0.
    Gathers,
    /// Adds two parts.
    Adds,
    /// Adds the constant rows in this input: biases, positions.
    AddsRows(usize),
    /// Multiplies or divides by a constant scalar, lays rows out anew, or belongs to a norm: computes the same function of other values.
    Follows,
    /// A norm that is one operator, which loses its gain and its shift.
    Bares,
    /// The gain or the shift of a norm, a node of its own, which falls away: the value that it reads in this input stands for its result.
    Falls(usize),
    /// Reads the extents of a part, which stay.
    Measures,
}

/// A product that reads what a norm returns.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    pub(super) node: NodeId,
    /// The norm's result: without its gain and shift where those are nodes of their own, with them where it `is_whole`.
    pub(super) normed: ValueId,
    pub(super) is_whole: bool,
    /// Rows \[D\].
    pub(super) gain: Option<ValueId>,
    pub(super) shift: Option<ValueId>,
    /// What the product reads: all that, its rows laid out anew or not.
    pub(super) read: ValueId,
    /// The weight \[D, N\], or the table \[N, D\] that is transposed into it.
    pub(super) weight: ValueId,
    pub(super) transposed: bool,
}

impl Reader {
    /// Whether the norm that it reads has a gain or a shift.
    pub(super) fn has_affine(&self) -> bool {
        self.gain.is_some() || self.shift.is_some()
    }
}

/// Sums of one width that only norms and further sums read: proven, node by node.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) width: usize,
    /// Whether a norm takes the mean away, so that only bases that keep it leave the function as it is.
    pub(super) is_centered: bool,
    /// The nodes whose results change with the basis of the stream.
    pub(super) roles: BTreeMap<NodeId, Role>,
    pub(super) readers: Vec<Reader>,
    values: BTreeSet<ValueId>,
}

/// Why a stream is not proven: the node, and what it does.
pub(super) type Refusal = (Option<NodeId>, &'static str);

/// The streams of `graph` that norms read, each proven or refused, in graph order.
pub(super) fn streams(graph: &Graph, users: &Users) -> Vec<Result<Stream, Refusal>> {
    let norms: Vec<Norm> = graph.nodes().filter_map(|(id, node)| Norm::at(graph, users, id, node)).collect();
    let mut seen: BTreeSet<ValueId> = BTreeSet::new();
    let mut found = Vec::new();
    for norm in &norms {
        if seen.contains(&norm.source) {
            continue;
        }
        let walked = Walk { graph, users, norms: &norms, stream: Stream::default() }.from(norm.source, &mut seen);
        found.push(walked);
    }
    found
}

struct Walk<'a> {
    graph: &'a Graph,
    users: &'a Users,
    norms: &'a [Norm],
    stream: Stream,
}

impl Walk<'_> {
    fn from(mut self, source: ValueId, seen: &mut BTreeSet<ValueId>) -> Result<Stream, Refusal> {
        let width = self.graph.value(source).ty.tensor().and_then(|ty| ty.shape.as_ref()?.last()?.known());
        let Some(width) = width else {
            seen.insert(source);
            let norm = self.norms.iter().find(|norm| norm.source == source).and_then(|norm| norm.nodes.first());
            return Err((norm.copied(), "norms a tensor whose last extent is not known"));
        };
        self.stream.width = width;
        let mut open = vec![source];
        let mut outcome = Ok(());
        while let Some(value) = open.pop() {
            if self.stream.values.insert(value) {
                seen.insert(value);
                // What is refused is walked on all the same, so that it is refused once.
                let (made, read) = (self.made(value, &mut open), self.read(value, &mut open));
                outcome = outcome.and(made).and(read);
            }
        }
        outcome?;
        match self.stream.readers.iter().find(|reader| self.stream.roles.contains_key(&reader.node)) {
            Some(both) => Err((Some(both.node), "reads a norm of the residual stream and writes to it at once")),
            None => Ok(self.stream),
        }
    }

    /// Accounts for what makes `value`.
    fn made(&mut self, value: ValueId, open: &mut Vec<ValueId>) -> Result<(), Refusal> {
        let Some((id, node)) = self.graph.producer(value) else {
            let first = self.users.of_value(value).iter().find_map(|user| match user {
                User::Input { node, .. } => Some(*node),
                User::Capture { .. } | User::Output => None,
            });
            return first.map_or(Ok(()), |node| Err((Some(node), "reads an input of the model as a residual stream")));
        };
        let width = self.stream.width;
        let role = match &*node.op.name {
            _ if !node.op.domain.is_empty() || node.outputs.len() != 1 => None,
            "MatMul" => matrix(self.graph, node, 1).filter(|w| w.shape()[1] == width).map(|_| Role::Writes),
            "Gather" if tables::is_gather(node) && self.graph.constant_input(node, 0).is_some() => {
                matrix(self.graph, node, 0).filter(|w| w.shape()[1] == width).map(|_| Role::Gathers)
            }
            "Add" => match (0..2).find(|input| self.graph.constant_input(node, *input).is_some()) {
                None => {
                    open.extend(node.inputs.iter().flatten());
                    Some(Role::Adds)
                }
                Some(row) => {
                    open.extend(node.input(1 - row));
                    let rows = |t: &Tensor| t.dtype() == DType::F32 && t.shape().last() == Some(&width);
                    self.graph.constant_input(node, row).filter(|t| rows(t)).map(|_| Role::AddsRows(row))
                }
            },
            _ if self.keeps_rows(node) => {
                open.extend(node.input(0));
                Some(Role::Follows)
            }
            "Mul" | "Div" => {
                let scalar = (0..2).find(|input| self.graph.constant_input(node, *input).is_some_and(|t| t.len() == 1));
                let scalar = scalar.filter(|input| node.op.is("Mul") || *input == 1);
                open.extend(scalar.and_then(|input| node.input(1 - input)));
                scalar.map(|_| Role::Follows)
            }
            _ => None,
        };
        let role = role.ok_or((Some(id), "adds something to the residual stream that no constant weight makes"))?;
        self.stream.roles.insert(id, role);
        Ok(())
    }

    /// Accounts for everyone who reads `value`.
    fn read(&mut self, value: ValueId, open: &mut Vec<ValueId>) -> Result<(), Refusal> {
        for user in self.users.of_value(value) {
            let User::Input { node: id, .. } = *user else {
                let maker = self.graph.producer(value).map(|(id, _)| id);
                return Err((maker, "computes a residual stream that leaves the graph, or that a body reads"));
            };
            let Some(node) = self.graph.node(id) else { continue };
            if let Some(norm) = self.norms.iter().find(|norm| norm.source == value && norm.nodes.contains(&id)) {
                // Once, though it may be read twice: x · x.
                if norm.nodes.first() == Some(&id) && !self.stream.roles.contains_key(&id) {
                    self.normed(norm)?;
                }
                continue;
            }
            let scalar = || node.inputs.iter().flatten().any(|v| self.graph.constant(*v).is_some_and(|t| t.len() == 1));
            if node.op.is("Shape") {
                self.stream.roles.insert(id, Role::Measures);
            } else if node.op.is("Add") || matches!(&*node.op.name, "Mul" | "Div") && scalar() || self.keeps_rows(node)
            {
                open.extend(node.output(0));
            } else {
                return Err((Some(id), "reads the residual stream without a norm"));
            }
        }
        Ok(())
    }

    /// Accounts for `norm` and everyone who reads what it returns.
    fn normed(&mut self, norm: &Norm) -> Result<(), Refusal> {
        let affine = norm.affine(self.graph, self.users, self.stream.width);
        let role = if norm.is_whole { Role::Bares } else { Role::Follows };
        self.stream.is_centered |= norm.is_centered;
        self.stream.roles.extend(norm.nodes.iter().map(|id| (*id, role)));
        self.stream.roles.extend(affine.nodes.iter().map(|(id, input)| (*id, Role::Falls(*input))));
        let mut open = vec![affine.result];
        while let Some(read) = open.pop() {
            for user in self.users.of_value(read) {
                let refused = (
                    norm.nodes.last().copied(),
                    "norms a residual stream for something other than products with constant weights",
                );
                let User::Input { node: id, input: 0 } = *user else { return Err(refused) };
                let node = self.graph.node(id).ok_or(refused)?;
                if node.op.is("Shape") {
                    self.stream.roles.insert(id, Role::Measures);
                } else if self.keeps_rows(node) {
                    self.stream.roles.insert(id, Role::Follows);
                    open.extend(node.output(0));
                } else if node.op.is("MatMul") {
                    let problem = "reads a norm of the residual stream with a weight that is no constant matrix";
                    let (weight, transposed) = self.weight(node).ok_or((Some(id), problem))?;
                    let Affine { gain, shift, .. } = affine;
                    let (normed, is_whole) = (norm.result, norm.is_whole);
                    self.stream.readers.push(Reader {
                        node: id,
                        normed,
                        is_whole,
                        gain,
                        shift,
                        read,
                        weight,
                        transposed,
                    });
                } else if node.op.is("Add") {
                    return Err((
                        refused.0,
                        "hands what it norms on to a sum, as models do whose norms stand behind sums",
                    ));
                } else {
                    return Err(refused);
                }
            }
        }
        Ok(())
    }

    /// The weight \[D, N\] of the product `node`, or the table \[N, D\] that is transposed into it, and which of both.
    fn weight(&self, node: &Node) -> Option<(ValueId, bool)> {
        let of = |weight: Option<&Tensor>, axis: usize| weight.is_some_and(|w| w.shape()[axis] == self.stream.width);
        if of(matrix(self.graph, node, 1), 0) {
            return Some((node.input(1)?, false));
        }
        let (_, transpose) = self.graph.producer(node.input(1)?).filter(|(_, node)| tables::turns(node))?;
        of(matrix(self.graph, transpose, 0), 1).then_some((transpose.input(0)?, true))
    }

    /// Whether `node` lays the rows of its first input out anew, or takes some of them, each as it is.
    fn keeps_rows(&self, node: &Node) -> bool {
        let last = |value: Option<ValueId>| self.graph.value(value?).ty.tensor()?.shape.as_ref()?.last()?.known();
        let width = Some(self.stream.width);
        let rank = || self.graph.value(node.input(0)?).ty.rank();
        let before_last =
            |axis: i64| rank().is_some_and(|rank| ops::positive_axis(axis, rank).is_some_and(|axis| axis + 1 < rank));
        let rows = match &*node.op.name {
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" => true,
            "Gather" => before_last(node.int("axis", 0)),
            "Slice" => {
                let axes = self.graph.constant_input(node, 3).and_then(|axes| axes.integers());
                axes.is_some_and(|axes| axes.into_iter().all(before_last))
            }
            _ => false,
        };
        rows && node.op.domain.is_empty() && last(node.input(0)) == width && last(node.output(0)) == width
    }
}

/// The f32 matrix in an input of `node`.
fn matrix<'a>(graph: &'a Graph, node: &Node, input: usize) -> Option<&'a Tensor> {
    let tensor = graph.constant_input(node, input)?;
    (tensor.shape().len() == 2 && tensor.dtype() == DType::F32).then_some(tensor)
}
