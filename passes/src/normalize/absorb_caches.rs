//! Caches in codes back into float ones with their encoding in the plan: what `lower/caches` writes.

use std::collections::BTreeMap;

use super::absorb_rows;
use crate::encoding::{Encoding, Granularity};
use crate::grid;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Attr, Dim, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Edit, Patch};
use crate::ops::positive_axis;
use crate::tensor::DType;

/// A cache in codes.
struct Found {
    /// The inputs: bytes, scales, zero points.
    past: [ValueId; 3],
    /// The past in float.
    float: ValueId,
    /// Where it is read.
    site: Site,
    /// The `Concat` of what is computed with, where that reads it; the axis, and what would be put behind it, where nothing does.
    both: Result<NodeId, (usize, ValueId)>,
    encoding: Encoding,
    /// The outputs, in the order of the inputs.
    present: [ValueId; 3],
    /// What makes the past float, and the outputs.
    makers: Vec<NodeId>,
}

/// The nodes that were walked.
struct Walk<'a> {
    graph: &'a Graph,
    users: &'a Users,
    seen: Vec<NodeId>,
}

/// Turns every cache in codes into a float input and a float output under their names.
pub(super) fn absorb(graph: &Graph, users: &Users, opset: u32, patch: &mut Patch) {
    let found: Vec<Found> = graph.nodes().filter_map(|(id, node)| at(graph, users, id, node)).collect();
    if found.is_empty() {
        return;
    }
    let mut swapped: BTreeMap<ValueId, Option<ValueId>> = BTreeMap::new();
    let mut names = Vec::new();
    for cache in &found {
        let both = match cache.both {
            Ok(concat) => graph.node(concat).and_then(|node| node.output(0)).unwrap_or(cache.float),
            Err((axis, new)) => append(graph, opset, cache, (axis, new), patch),
        };
        for (ends, float) in [(cache.past, cache.float), (cache.present, both)] {
            swapped.insert(ends[0], Some(float));
            swapped.extend([(ends[1], None), (ends[2], None)]);
            names.push((ends[0], float));
        }
        patch.edit(Edit::Encode { site: cache.site, encoding: cache.encoding.clone() });
        cache.makers.iter().for_each(|maker| patch.erase(*maker));
        patch.count("caches", 1);
    }
    let swap = |value: &ValueId| swapped.get(value).copied().unwrap_or(Some(*value));
    let inputs = graph.inputs().iter().filter_map(swap).collect();
    let outputs = graph.outputs().iter().filter_map(swap).collect();
    patch.edit(Edit::Interface { inputs, outputs, names });
}

/// A `Concat` of ai.onnx `opset` that puts `new` behind the past of `cache` along `axis`, for the caller alone.
fn append(graph: &Graph, opset: u32, cache: &Found, (axis, new): (usize, ValueId), patch: &mut Patch) -> ValueId {
    let name = format!("{}.append", graph.value(cache.present[0]).name);
    let axis = Attr::Int(i64::try_from(axis).unwrap_or(i64::MAX));
    let concat = Node {
        name: name.as_str().into(),
        op: OpKey { domain: "".into(), name: "Concat".into(), opset },
        inputs: vec![Some(cache.float), Some(new)],
        outputs: Vec::new(),
        attrs: [("axis".into(), axis)].into_iter().collect(),
        bodies: Vec::new(),
        notes: None,
    };
    // As long as the codes, and as wide as the rows that they stand for.
    let codes = graph.value(cache.present[0]).ty.tensor().and_then(|ty| ty.shape.as_ref());
    let Granularity::DynamicRows { axis: row, size } = cache.encoding.granularity else { return cache.float };
    let whole = |(at, dim): (usize, &Dim)| if at == row { Dim::Known(size) } else { dim.clone() };
    let ty = TensorType::new(Some(DType::F32), codes.map(|dims| dims.iter().enumerate().map(whole).collect()));
    patch.node(concat, &name, Type::Tensor(ty), None)
}

/// The cache that node `id` makes float.
fn at(graph: &Graph, users: &Users, id: NodeId, node: &Node) -> Option<Found> {
    let mut walk = Walk { graph, users, seen: vec![id] };
    let float = node.output(0).filter(|_| node.op.is("DequantizeLinear"))?;
    let (scale, zero_point) = (node.input(1)?, node.input(2)?);
    let (bytes, is_packed) = walk.unpacked(node.input(0)?)?;
    let past = [bytes, scale, zero_point];
    past.iter().all(|value| graph.inputs().contains(value)).then_some(())?;
    let rank = graph.value(bytes).ty.rank()?;
    let size = usize::try_from(node.int("block_size", 0)).ok().filter(|size| *size > 0)?;
    let row = positive_axis(node.int("axis", 1), rank).filter(|axis| axis + 1 == rank)?;
    let (reader, input) = walk.only_reader(float)?;
    let axis = |node: &Node| positive_axis(node.int("axis", 0), rank).filter(|axis| axis + 1 < rank);
    let grown = axis(graph.node(walk.append(bytes)?)?)?;
    let mut present = past;
    let mut added = past;
    for (end, added) in present.iter_mut().zip(&mut added) {
        let append = walk.append(*end)?;
        let append_node = graph.node(append).filter(|node| axis(node) == Some(grown))?;
        *added = append_node.input(1)?;
        *end = append_node.output(0)?;
        walk.seen.push(append);
    }
    let grid = grid::find(if is_packed { "uint4-in-8" } else { "uint8" })?;
    let codes = if is_packed { walk.packed(added[0])? } else { added[0] };
    let codes = if is_packed { walk.node(codes, "Clip")?.input(0)? } else { codes };
    let quantize = walk.node(codes, "QuantizeLinear")?;
    let parameters = quantize.input(1) == Some(added[1]) && quantize.input(2) == Some(added[2]);
    let new = quantize.input(0)?;
    let rows = absorb_rows::of(graph, quantize, grid).filter(|_| parameters)?;
    let same =
        rows.encoding == Encoding::dynamic_rows(grid, row, size, 1.0) && graph.value(new).ty.rank() == Some(rank);
    walk.seen.extend(rows.makers);
    // What is computed with is the past with the same rows behind it, maybe rounded, or something of its own.
    let reads = graph.node(reader)?;
    let is_both = reads.op.is("Concat") && reads.inputs.len() == 2 && input == 0 && axis(reads) == Some(grown);
    let both = if is_both && leads_to(graph, reads.input(1)?, new) { Ok(reader) } else { Err((grown, new)) };
    walk.is_alone(&past, float, &present).then_some(())?;
    let site = Site::Use { node: reader, input };
    same.then_some(Found { past, float, site, both, encoding: rows.encoding, present, makers: walk.seen })
}

/// Whether `value` is `source`, or what a pair makes of it.
fn leads_to(graph: &Graph, mut value: ValueId, source: ValueId) -> bool {
    const LONGEST: usize = 5;
    for _ in 0..LONGEST {
        if value == source {
            return true;
        }
        let pair = ["Reshape", "DequantizeLinear", "Clip", "QuantizeLinear"];
        let made = graph.producer(value).filter(|(_, node)| pair.iter().any(|op| node.op.is(op)));
        let Some(before) = made.and_then(|(_, node)| node.input(0)) else { return false };
        value = before;
    }
    false
}

impl<'a> Walk<'a> {
    /// Whether the inputs in `past` and all that was walked, but for the past in `float`, serve this cache alone, and what is `present` the
    /// caller alone, once.
    fn is_alone(&self, past: &[ValueId], float: ValueId, present: &[ValueId]) -> bool {
        let seen = |user: &User| matches!(user, User::Input { node, .. } if self.seen.contains(node));
        let makes =
            |id: &NodeId| self.graph.node(*id).into_iter().flat_map(|node| node.outputs.iter().flatten().copied());
        let inner = self.seen.iter().flat_map(makes).filter(|value| *value != float && !present.contains(value));
        let mut own = past.iter().copied().chain(inner);
        own.all(|value| self.users.of_value(value).iter().all(seen))
            && present.iter().all(|value| matches!(self.users.of_value(*value), [User::Output]))
            && present.iter().all(|value| self.graph.outputs().iter().filter(|output| *output == value).count() == 1)
    }

    /// The node that computes `value`, if it is an `op`.
    fn node(&mut self, value: ValueId, op: &str) -> Option<&'a Node> {
        let (id, node) = self.graph.producer(value).filter(|(_, node)| node.op.is(op))?;
        if !self.seen.contains(&id) {
            self.seen.push(id);
        }
        Some(node)
    }

    /// The bytes whose codes `value` is, and whether there are two in each.
    fn unpacked(&mut self, value: ValueId) -> Option<(ValueId, bool)> {
        if self.graph.inputs().contains(&value) {
            return (self.graph.value(value).ty.dtype() == Some(DType::U8)).then_some((value, false));
        }
        let both = self.node(value, "Concat").filter(|node| node.inputs.len() == 2)?;
        let low = self.node(both.input(0)?, "BitwiseAnd")?;
        let high = self.node(both.input(1)?, "BitShift").filter(|node| node.text("direction", "") == "RIGHT")?;
        let same = low.input(0) == high.input(0) && self.is(low, 15) && self.is(high, 4);
        low.input(0).filter(|_| same).map(|bytes| (bytes, true))
    }

    /// The codes of which `bytes` hold two each.
    fn packed(&mut self, bytes: ValueId) -> Option<ValueId> {
        let or = self.node(bytes, "BitwiseOr")?;
        let high = self.node(or.input(1)?, "BitShift").filter(|node| node.text("direction", "") == "LEFT")?;
        let split = self.node(or.input(0)?, "Split").filter(|node| node.outputs.len() == 2)?;
        let order = split.output(0) == or.input(0) && split.output(1) == high.input(0) && self.is(high, 4);
        split.input(0).filter(|_| order)
    }

    /// Whether the second input of `node` is `byte`.
    fn is(&self, node: &Node, byte: u8) -> bool {
        let bytes = self.graph.constant_input(node, 1).and_then(|tensor| tensor.values::<u8>());
        bytes.is_some_and(|bytes| bytes[..] == [byte])
    }

    /// The node that alone, but for `Shape`, reads `past`, and with which input.
    fn only_reader(&self, past: ValueId) -> Option<(NodeId, u16)> {
        let mut found = None;
        for user in self.users.of_value(past) {
            let &User::Input { node: id, input } = user else { return None };
            if !self.graph.node(id)?.op.is("Shape") && found.replace((id, input)).is_some() {
                return None;
            }
        }
        found
    }

    /// The `Concat` that puts something behind the input `part`, first of two, and whose result is returned.
    fn append(&self, part: ValueId) -> Option<NodeId> {
        let appends = self.users.of_value(part).iter().filter_map(|user| match user {
            User::Input { node, input: 0 } => {
                let concat = self.graph.node(*node).filter(|node| node.op.is("Concat") && node.inputs.len() == 2)?;
                let result = concat.output(0)?;
                self.graph.outputs().contains(&result).then_some(*node)
            }
            _ => None,
        });
        let all: Vec<NodeId> = appends.collect();
        <[NodeId; 1]>::try_from(all).ok().map(|[one]| one)
    }
}
