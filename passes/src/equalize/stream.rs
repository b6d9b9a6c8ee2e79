//! Residual streams: the sums that norms read, and everything that adds to them.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
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
    /// Adds the constant row in this input.
    AddsRow(usize),
    /// Multiplies or divides by a constant scalar, or belongs to a norm: computes the same function of other values.
    Follows,
}

/// A product that reads what a norm returns.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    pub(super) node: NodeId,
    /// The norm's result without its gain, and the gain.
    pub(super) normed: ValueId,
    pub(super) gain: Option<ValueId>,
    /// The weight \[D, N\], or the table \[N, D\] that is transposed into it.
    pub(super) weight: ValueId,
    pub(super) transposed: bool,
}

/// Sums of one width that only RMS norms and further sums read: proven, node by node.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) width: usize,
    /// The nodes whose results change with the basis of the stream.
    pub(super) roles: BTreeMap<NodeId, Role>,
    pub(super) readers: Vec<Reader>,
    values: BTreeSet<ValueId>,
}

/// Why a stream is not proven: the node, and what it does.
pub(super) type Refusal = (Option<NodeId>, &'static str);

/// A root mean square norm written out, x · 1 / √(mean(x²) + ε).
struct Norm {
    source: ValueId,
    nodes: Vec<NodeId>,
    result: ValueId,
}

/// The streams of `graph` that RMS norms read, each proven or refused, in graph order.
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

impl Norm {
    /// The norm that begins with the square `node`.
    fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let source = node.input(0)?;
        let scalar = |node: &Node, input: usize| {
            graph.constant_input(node, input).filter(|t| t.len() == 1)?.floats()?.first().copied()
        };
        let squares =
            node.op.is("Pow") && scalar(node, 1) == Some(2.0) || node.op.is("Mul") && node.input(1) == Some(source);
        squares.then_some(())?;
        let rank = graph.value(source).ty.rank()?;
        let only = |node: &Node| {
            let (next, input) = users.only_input(node.output(0)?)?;
            Some((next, graph.node(next)?, input))
        };
        let (mean_id, mean, 0) = only(node)? else { return None };
        let axes = match graph.constant_input(mean, 1) {
            Some(axes) => axes.integers()?,
            None => mean.ints("axes")?.to_vec(),
        };
        let last = i64::try_from(rank).ok()? - 1;
        let is_mean = mean.op.is("ReduceMean") && mean.int("keepdims", 1) == 1 && (axes == [-1] || axes == [last]);
        is_mean.then_some(())?;
        let (sum_id, sum, input) = only(mean)?;
        (sum.op.is("Add") && scalar(sum, usize::from(1 - input)).is_some()).then_some(())?;
        let (root_id, root, 0) = only(sum).filter(|(_, root, _)| root.op.is("Sqrt"))? else { return None };
        let (next_id, next, input) = only(root)?;
        let mut nodes = vec![id, mean_id, sum_id, root_id, next_id];
        let last = match &*next.op.name {
            "Reciprocal" => {
                let (scale_id, scale, input) = only(next)?;
                nodes.push(scale_id);
                (scale.op.is("Mul") && scale.input(usize::from(1 - input)) == Some(source)).then_some(scale)?
            }
            "Div" if input == 1 && next.input(0) == Some(source) => next,
            _ => return None,
        };
        Some(Self { source, nodes, result: last.output(0)? })
    }
}

struct Walk<'a> {
    graph: &'a Graph,
    users: &'a Users,
    norms: &'a [Norm],
    stream: Stream,
}

impl Walk<'_> {
    fn from(mut self, source: ValueId, seen: &mut BTreeSet<ValueId>) -> Result<Stream, Refusal> {
        self.stream.width =
            self.graph.value(source).ty.tensor().and_then(|ty| ty.shape.as_ref()?.last()?.known()).unwrap_or(0);
        let mut open = vec![source];
        let mut outcome = Ok(());
        while let Some(value) = open.pop() {
            if self.stream.values.insert(value) {
                seen.insert(value);
                // What is refused is walked to its end all the same, so that it is refused once.
                let step = self.made(value, &mut open).and_then(|()| self.read(value, &mut open));
                outcome = outcome.and(step);
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
            "Gather" if tables::is_gather(node) => {
                matrix(self.graph, node, 0).filter(|w| w.shape()[1] == width).map(|_| Role::Gathers)
            }
            "Add" => match (0..2).find(|input| self.graph.constant_input(node, *input).is_some()) {
                None => {
                    open.extend(node.inputs.iter().flatten());
                    Some(Role::Adds)
                }
                Some(row) => {
                    open.extend(node.input(1 - row));
                    let is_row =
                        |t: &Tensor| t.dtype() == DType::F32 && t.len() == width && t.shape().last() == Some(&width);
                    self.graph.constant_input(node, row).filter(|t| is_row(t)).map(|_| Role::AddsRow(row))
                }
            },
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
                if norm.nodes.last() == Some(&id) {
                    self.stream.roles.extend(norm.nodes.iter().map(|id| (*id, Role::Follows)));
                    self.normed(norm)?;
                }
                continue;
            }
            let scalar = || node.inputs.iter().flatten().any(|v| self.graph.constant(*v).is_some_and(|t| t.len() == 1));
            if node.op.is("Add") || (matches!(&*node.op.name, "Mul" | "Div") && scalar()) {
                open.extend(node.output(0));
            } else {
                return Err((Some(id), "reads the residual stream without a root mean square norm"));
            }
        }
        Ok(())
    }

    /// Accounts for everyone who reads what `norm` returns.
    fn normed(&mut self, norm: &Norm) -> Result<(), Refusal> {
        let width = self.stream.width;
        let gain = match self.users.only_input(norm.result).and_then(|(id, input)| Some((self.graph.node(id)?, input)))
        {
            Some((node, input)) if node.op.is("Mul") => {
                let row = node.input(usize::from(1 - input)).zip(node.output(0));
                row.filter(|(gain, _)| {
                    let gain = self.graph.constant(*gain);
                    gain.is_some_and(|g| {
                        g.dtype() == DType::F32 && g.len() == width && g.shape().last() == Some(&width)
                    })
                })
            }
            _ => None,
        };
        let result = gain.map_or(norm.result, |(_, result)| result);
        for user in self.users.of_value(result) {
            let refused = (
                norm.nodes.last().copied(),
                "norms a residual stream for something other than products with constant weights",
            );
            let User::Input { node: id, input: 0 } = *user else { return Err(refused) };
            let node = self.graph.node(id).filter(|node| node.op.is("MatMul")).ok_or(refused)?;
            let reader = |weight, transposed| Reader {
                node: id,
                normed: norm.result,
                gain: gain.map(|g| g.0),
                weight,
                transposed,
            };
            let of = |weight: Option<&Tensor>, axis: usize| weight.is_some_and(|w| w.shape()[axis] == width);
            let turned = || {
                let (_, transpose) = self.graph.producer(node.input(1)?).filter(|(_, node)| tables::turns(node))?;
                of(matrix(self.graph, transpose, 0), 1).then(|| transpose.input(0))?
            };
            let found = match node.input(1).filter(|_| of(matrix(self.graph, node, 1), 0)) {
                Some(weight) => Some(reader(weight, false)),
                None => turned().map(|table| reader(table, true)),
            };
            self.stream.readers.push(
                found.ok_or((
                    Some(id),
                    "reads a norm of the residual stream with a weight that is no constant matrix",
                ))?,
            );
        }
        Ok(())
    }
}

/// The f32 matrix in an input of `node`.
fn matrix<'a>(graph: &'a Graph, node: &Node, input: usize) -> Option<&'a Tensor> {
    let tensor = graph.constant_input(node, input)?;
    (tensor.shape().len() == 2 && tensor.dtype() == DType::F32).then_some(tensor)
}
