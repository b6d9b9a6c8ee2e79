//! Activations whose rows get their scales from each run, back into the plan: what `lower/rows` writes.

use crate::encoding::{Encoding, Granularity};
use crate::grid::{self, Grid};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::ops::positive_axis;
use crate::tensor::DType;

/// Rows that a quantize and a dequantize node share their computed parameters for.
pub(super) struct Rows {
    pub(super) encoding: Encoding,
    /// The nodes that compute the parameters, readers first.
    pub(super) makers: Vec<NodeId>,
}

/// The nodes that were walked, readers first.
struct Walk<'a> {
    graph: &'a Graph,
    seen: Vec<NodeId>,
}

/// The rows of what `quantize` reads, whose codes of `grid` it and `dequantize` read and write, by scales that the graph computes from it.
pub(super) fn at(graph: &Graph, quantize: &Node, dequantize: &Node, grid: &'static dyn Grid) -> Option<Rows> {
    let source = quantize.input(0)?;
    let same = (1..=2).all(|input| quantize.input(input) == dequantize.input(input));
    let rank = graph.value(source).ty.rank()?;
    let rows = of(graph, quantize, grid).filter(|_| same)?;
    let Granularity::DynamicRows { axis, size } = rows.encoding.granularity else { return None };
    self::same(&(axis, size), dequantize, rank).then_some(rows)
}

/// The rows of what `quantize` reads, whose codes of `grid` it writes by scales that the graph computes from it.
pub(super) fn of(graph: &Graph, quantize: &Node, grid: &'static dyn Grid) -> Option<Rows> {
    let source = quantize.input(0)?;
    let rank = graph.value(source).ty.rank()?;
    let place = |node: &Node| {
        let size = usize::try_from(node.int("block_size", 0)).ok().filter(|size| *size > 0)?;
        Some((positive_axis(node.int("axis", 1), rank)?, size))
    };
    let (axis, size) = place(quantize)?;
    // Rows as long as their axis, where that is known.
    let shape = graph.value(source).ty.tensor().and_then(|ty| ty.shape.as_ref());
    let known = shape.and_then(|shape| shape.get(axis)?.known());
    let mut walk = Walk { graph, seen: Vec::new() };
    let scale = quantize.input(1)?;
    let (low, high) = grid.range();
    // The axis that a product sums over; and what a quantize node makes of numbers below zero is only a zero point where codes start there.
    (axis + 1 == rank && (low == 0.0 || !grid.info().integer)).then_some(())?;
    let reach;
    let mut found = grid;
    if grid.info().integer {
        let zeros = walk.node(quantize.input(2)?, "QuantizeLinear")?;
        let of_rows = zeros.int("block_size", 0) == 1 && positive_axis(zeros.int("axis", 1), rank) == Some(axis);
        let stored = DType::from_code(zeros.int("output_dtype", 0)) == Some(grid.info().storage);
        (of_rows && stored && zeros.input(1) == Some(scale) && zeros.input(2).is_none()).then_some(())?;
        let below = walk.node(zeros.input(0)?, "Neg")?.input(0)?;
        let range = walk.scaled(scale, high - low, f32::MIN_POSITIVE)?;
        let range = walk.node(range, "Sub")?;
        let (to, from) = (range.input(0)?, range.input(1).filter(|from| *from == below)?);
        let (from, of_from) = walk.reached(from)?;
        let (to, of_to) = walk.reached(to)?;
        (of_from.to_bits() == of_to.to_bits()).then_some(())?;
        reach = of_to;
        let lowest = walk.bounded(from, "Min", 0.0)?;
        let highest = walk.bounded(to, "Max", 0.0)?;
        (walk.reduced(lowest, "ReduceMin", axis, rank)? == source).then_some(())?;
        (walk.reduced(highest, "ReduceMax", axis, rank)? == source).then_some(())?;
    } else {
        quantize.input(2).is_none().then_some(())?;
        let own = |(own, factor): (&'static dyn Grid, f32)| {
            let levels = own.range().1 * f64::from(factor);
            Some((own, walk.scaled(scale, levels, f32::MIN_POSITIVE / factor)?))
        };
        let (own, most) = grid::carried(grid).find_map(own)?;
        found = own;
        let (most, of_most) = walk.reached(most)?;
        reach = of_most;
        // Codes go on where a carried format ends.
        (of_most.to_bits() == 1.0_f32.to_bits() || own.info().about.name == grid.info().about.name).then_some(())?;
        let sizes = walk.reduced(most, "ReduceMax", axis, rank)?;
        (walk.node(sizes, "Abs")?.input(0)? == source).then_some(())?;
    }
    let whole = known.is_none_or(|known| known == size);
    whole.then(|| Rows { encoding: Encoding::dynamic_rows(found, axis, size, reach), makers: walk.seen })
}

/// What stands behind the node `id`, which dequantizes rows, to keep it apart from its readers: a `Reshape` that changes nothing, with its
/// result.
pub(super) fn behind(graph: &Graph, users: &Users, id: NodeId) -> Option<(NodeId, ValueId)> {
    let (reshape, 0) = users.only_input(graph.node(id)?.output(0)?)? else { return None };
    let node = graph.node(reshape).filter(|node| node.op.is("Reshape") && node.int("allowzero", 0) == 0)?;
    let shape = graph.constant_input(node, 1)?.values::<i64>()?.into_owned();
    let rank = graph.value(graph.node(id)?.input(0)?).ty.rank()?;
    let (last, others) = shape.split_last()?;
    let size = graph.node(id)?.int("block_size", 0);
    (*last == size && shape.len() == rank && others.iter().all(|dim| *dim == 0)).then_some(())?;
    Some((reshape, node.output(0)?))
}

/// Whether `node` cuts its input of `rank` extents at the same `place`.
fn same((axis, size): &(usize, usize), node: &Node, rank: usize) -> bool {
    positive_axis(node.int("axis", 1), rank) == Some(*axis) && usize::try_from(node.int("block_size", 0)) == Ok(*size)
}

impl<'a> Walk<'a> {
    /// The node that computes `value`, if it is an `op`.
    fn node(&mut self, value: ValueId, op: &str) -> Option<&'a Node> {
        let (id, node) = self.graph.producer(value).filter(|(_, node)| node.op.is(op))?;
        if !self.seen.contains(&id) {
            self.seen.push(id);
        }
        Some(node)
    }

    /// What the `op` that computes `value` compares with `bound`.
    fn bounded(&mut self, value: ValueId, op: &str, bound: f32) -> Option<ValueId> {
        let graph = self.graph;
        let node = self.node(value, op).filter(|node| node.inputs.len() == 2)?;
        let is_bound = graph.constant_input(node, 1)?.floats()?[..] == [bound];
        node.input(0).filter(|_| is_bound)
    }

    /// What is multiplied by a share to give `end`, and that; all of it where there is none.
    fn reached(&mut self, end: ValueId) -> Option<(ValueId, f32)> {
        let graph = self.graph;
        let Some(node) = self.node(end, "Mul") else { return Some((end, 1.0)) };
        let [share] = graph.constant_input(node, 1)?.floats()?[..] else { return None };
        (share > 0.0 && share < 1.0).then_some((node.input(0)?, share))
    }

    /// What is divided by `levels`, and kept above `least`, to give `scale`.
    #[expect(clippy::cast_possible_truncation, reason = "bounds of grids of up to 16 bits")]
    fn scaled(&mut self, scale: ValueId, levels: f64, least: f32) -> Option<ValueId> {
        let graph = self.graph;
        let step = self.bounded(scale, "Max", least)?;
        let node = self.node(step, "Div")?;
        let by = graph.constant_input(node, 1)?.floats()?[..] == [levels as f32];
        node.input(0).filter(|_| by)
    }

    /// What the `op` that computes `value` reduces along `axis`, which it keeps.
    fn reduced(&mut self, value: ValueId, op: &str, axis: usize, rank: usize) -> Option<ValueId> {
        let graph = self.graph;
        let node = self.node(value, op).filter(|node| node.int("keepdims", 1) == 1)?;
        let axes = graph.constant_input(node, 1)?.values::<i64>()?;
        let along = axes.len() == 1 && positive_axis(axes[0], rank) == Some(axis);
        node.input(0).filter(|_| along)
    }
}
