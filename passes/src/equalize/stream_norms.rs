//! Norms of residual streams: root mean square norms and layer norms, whole or written out in simpler operators.

use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// A norm over the last axis.
pub(super) struct Norm {
    /// What it reads, \[..., D\].
    pub(super) source: ValueId,
    /// Its nodes in graph order, without those of a gain and a shift that are nodes of their own.
    pub(super) nodes: Vec<NodeId>,
    /// What it returns, \[..., D\], before a gain and a shift that are nodes of their own.
    pub(super) result: ValueId,
    /// Whether the mean is taken away, so that only bases that keep the mean commute with it.
    pub(super) is_centered: bool,
    /// Whether it is one operator, which has its own gain and shift: rows \[D\], absent where they change nothing.
    pub(super) is_whole: bool,
    pub(super) gain: Option<ValueId>,
    pub(super) shift: Option<ValueId>,
}

impl Norm {
    /// The norm that begins with `node`, or, for a mean that is taken away first, with the nodes in front of it.
    pub(super) fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        match &*node.op.name {
            _ if !node.op.domain.is_empty() => return None,
            "LayerNormalization" => return Self::whole(graph, id, node, true),
            "RMSNormalization" | "SimplifiedLayerNormalization" => return Self::whole(graph, id, node, false),
            _ => {}
        }
        let norm = Self::root_mean_square(graph, users, id, node)?;
        Some(norm.centered(graph, users).unwrap_or(norm))
    }

    /// A norm that is one operator, over the last axis, of whose results only the first is read.
    fn whole(graph: &Graph, id: NodeId, node: &Node, is_centered: bool) -> Option<Self> {
        let source = node.input(0)?;
        let ty = graph.value(source).ty.tensor()?;
        let (rank, width) = (ty.shape.as_ref()?.len(), ty.shape.as_ref()?.last()?.known()?);
        let last = ops::positive_axis(node.int("axis", -1), rank)? + 1 == rank;
        let alone = node.outputs.iter().flatten().count() == 1;
        let is_row = |value: ValueId| graph.constant(value).is_some_and(|row| is_row(row, width));
        let shift = node.input(2).filter(|_| is_centered);
        let rows = is_row(node.input(1)?) && node.input(2) == shift && shift.is_none_or(is_row);
        let other = |value: &ValueId, neutral: f32| {
            graph
                .constant(*value)
                .and_then(|row| row.floats())
                .is_none_or(|row| row.iter().any(|v| v.total_cmp(&neutral).is_ne()))
        };
        (last && alone && rows).then_some(Self {
            source,
            nodes: vec![id],
            result: node.output(0)?,
            is_centered,
            is_whole: true,
            gain: node.input(1).filter(|gain| other(gain, 1.0)),
            shift: shift.filter(|shift| other(shift, 0.0)),
        })
    }

    /// x · 1 / √(mean(x²) + ε), from the square `node` on.
    fn root_mean_square(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Self> {
        let source = node.input(0)?;
        let scalar = |node: &Node, input: usize| {
            graph.constant_input(node, input).filter(|t| t.len() == 1)?.floats()?.first().copied()
        };
        let squares =
            node.op.is("Pow") && scalar(node, 1) == Some(2.0) || node.op.is("Mul") && node.input(1) == Some(source);
        squares.then_some(())?;
        let only = |node: &Node| {
            let (next, input) = users.only_input(node.output(0)?)?;
            Some((next, graph.node(next)?, input))
        };
        let (mean_id, mean, 0) = only(node)? else { return None };
        is_mean(graph, mean, graph.value(source).ty.rank()?).then_some(())?;
        let (sum_id, sum, input) = only(mean)?;
        (sum.op.is("Add") && scalar(sum, other_than(input)?).is_some()).then_some(())?;
        let (root_id, root, 0) = only(sum).filter(|(_, root, _)| root.op.is("Sqrt"))? else { return None };
        let (next_id, next, input) = only(root)?;
        let mut nodes = vec![id, mean_id, sum_id, root_id, next_id];
        let last = match &*next.op.name {
            "Reciprocal" => {
                let (scale_id, scale, input) = only(next)?;
                nodes.push(scale_id);
                (scale.op.is("Mul") && scale.input(other_than(input)?) == Some(source)).then_some(scale)?
            }
            "Div" if input == 1 && next.input(0) == Some(source) => next,
            _ => return None,
        };
        let result = last.output(0)?;
        Some(Self { source, nodes, result, is_centered: false, is_whole: false, gain: None, shift: None })
    }

    /// The same with the mean that is taken away in front of it, x − mean(x), where nobody else reads that.
    fn centered(&self, graph: &Graph, users: &Users) -> Option<Self> {
        let (difference, node) = graph.producer(self.source).filter(|(_, node)| node.op.is("Sub"))?;
        let source = node.input(0)?;
        let (mean, reduce) = graph.producer(node.input(1)?)?;
        let of_norm = |user: &User| matches!(user, User::Input { node, .. } if self.nodes.contains(node));
        let alone = users.only_input(node.input(1)?).is_some() && users.of_value(self.source).iter().all(of_norm);
        let whole = reduce.input(0) == Some(source) && is_mean(graph, reduce, graph.value(source).ty.rank()?);
        (alone && whole).then(|| Self {
            source,
            nodes: [mean, difference].into_iter().chain(self.nodes.iter().copied()).collect(),
            result: self.result,
            is_centered: true,
            is_whole: false,
            gain: None,
            shift: None,
        })
    }

    /// Its gain and shift, as rows \[D\], and what it returns behind them: its own, or those of a product and a sum that alone read
    /// what it returns.
    pub(super) fn affine(&self, graph: &Graph, users: &Users, width: usize) -> Affine {
        if self.is_whole {
            return Affine { gain: self.gain, shift: self.shift, nodes: Vec::new(), result: self.result };
        }
        let mut affine = Affine { gain: None, shift: None, nodes: Vec::new(), result: self.result };
        for op in ["Mul", "Add"] {
            let next = users.only_input(affine.result).and_then(|(id, input)| {
                let node = graph.node(id).filter(|node| node.op.is(op))?;
                let row = node.input(other_than(input)?)?;
                // Of more axes, it would give the result more as well.
                (graph.constant(row)?.shape().len() <= graph.value(affine.result).ty.rank()?).then_some(())?;
                is_row(graph.constant(row)?, width).then_some(((id, input.into()), row, node.output(0)?))
            });
            let Some((at, row, result)) = next else { continue };
            *(if op == "Mul" { &mut affine.gain } else { &mut affine.shift }) = Some(row);
            affine.nodes.push(at);
            affine.result = result;
        }
        affine
    }
}

/// What stands between a norm and those who read it.
pub(super) struct Affine {
    /// Rows \[D\].
    pub(super) gain: Option<ValueId>,
    pub(super) shift: Option<ValueId>,
    /// The product and the sum, where they are nodes of their own, and the input of each in which the norm arrives.
    pub(super) nodes: Vec<(NodeId, usize)>,
    /// What is read in the end, \[..., D\].
    pub(super) result: ValueId,
}

/// Whether `node` takes the mean over the last of `rank` axes, which stays as one of extent 1.
fn is_mean(graph: &Graph, node: &Node, rank: usize) -> bool {
    let axes = match graph.constant_input(node, 1) {
        Some(axes) => axes.integers(),
        None => node.ints("axes").map(<[i64]>::to_vec),
    };
    let last = i64::try_from(rank).map(|rank| rank - 1);
    let over_last = axes.is_some_and(|axes| axes == [-1] || last.is_ok_and(|last| axes == [last]));
    node.op.is("ReduceMean") && node.int("keepdims", 1) == 1 && over_last
}

/// The other of two inputs.
fn other_than(input: u16) -> Option<usize> {
    1_u16.checked_sub(input).map(usize::from)
}

/// Whether `tensor` is f32 with `width` numbers along its last axis, and no others.
fn is_row(tensor: &Tensor, width: usize) -> bool {
    tensor.dtype() == DType::F32 && tensor.len() == width && tensor.shape().last() == Some(&width)
}
