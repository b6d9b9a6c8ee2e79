//! Caches of decoders: tensors that a model reads from its last run, extends, and returns for the next.
//!
//! A cache is a float input that a `Concat` puts what is new behind, and whose result the model returns; what the model computes with is that
//! result, or what one other node makes of the past. Written as codes, the input is codes with a scale and a zero point per row, the rows of this run are read as they are, and only what is returned of them is rounded:
//! codes that lie in the cache are never rounded again.
//!
//! Source: Yue et al. 2024 (`WKVQuant`), arXiv:2402.12065, section 3.1, past-only quantization; Liu et al. 2024 (`KIVI`),
//! arXiv:2402.02750, for ranges per token.

use crate::encoding::Encoding;
use crate::grid;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Dim, Graph, Node};
use crate::model::Plan;
use crate::ops::positive_axis;
use crate::simulate;
use crate::tensor::DType;

/// A cache of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// What the last run returned: an input of the graph.
    pub past: ValueId,
    /// Where the past is read, to be computed with.
    pub site: Site,
    /// What puts both together, the past first.
    pub append: NodeId,
    /// Whether that reads the past beside `site`, and nothing but the caller reads its result.
    pub is_apart: bool,
    /// What this run adds.
    pub new: ValueId,
    /// Both: an output of the graph.
    pub present: ValueId,
    /// Along which axis.
    pub axis: usize,
    /// The axis of a row, which is the last one, and its extent.
    pub row: (usize, usize),
}

impl Cache {
    /// The encoding of its rows in so many `bits`, as [`encoded`] knows it; `None` for other numbers of bits, and for rows of which codes do
    /// not fill bytes.
    pub fn encoding(&self, bits: u32) -> Option<Encoding> {
        let grid = match bits {
            8 => grid::find("uint8")?,
            4 if self.row.1.is_multiple_of(2) => grid::find("uint4-in-8")?,
            _ => return None,
        };
        Some(Encoding::dynamic_rows(grid, self.row.0, self.row.1, 1.0))
    }
}

/// The caches of `graph`, in the order of its inputs; and why inputs that look like one are none.
pub fn find(graph: &Graph) -> (Vec<Cache>, Vec<(ValueId, String)>) {
    let users = Users::of(graph);
    let mut caches = Vec::new();
    let mut others = Vec::new();
    for &past in graph.inputs() {
        if let Some(reason) = narrow(graph, &users, past) {
            others.push((past, reason));
        }
        if !simulate::is_float_activation(graph, past) {
            continue;
        }
        match at(graph, &users, past) {
            Ok(cache) => caches.push(cache),
            Err(reason) if graph.value(past).name.contains("past") => others.push((past, reason)),
            Err(_) => {}
        }
    }
    (caches, others)
}

/// Why the input `past` of 16 bits, which would be a cache in 32, is none: what is put behind it is computed in 32, behind a `Cast`.
fn narrow(graph: &Graph, users: &Users, past: ValueId) -> Option<String> {
    let dtype = graph.value(past).ty.dtype().filter(|dtype| matches!(dtype, DType::F16 | DType::Bf16))?;
    let reader = |user: &User| match user {
        User::Input { node, input: 0 } => graph.node(*node),
        _ => None,
    };
    let wide = users.of_value(past).iter().filter_map(reader).find(|node| node.op.is("Cast"))?.output(0)?;
    let appended = users.of_value(wide).iter().filter_map(reader).any(|node| node.op.is("Concat"));
    (appended || graph.value(past).name.contains("past")).then(|| {
        format!(
            "it is {}, and read behind a Cast to f32 where the model computes: export the model with its caches in f32",
            dtype.name()
        )
    })
}

/// The cache that begins with the input `past`.
fn at(graph: &Graph, users: &Users, past: ValueId) -> Result<Cache, String> {
    let (mut append, mut other) = (None, None);
    for user in users.of_value(past) {
        let &User::Input { node: id, input } = user else {
            return Err("it is returned, or read by a body".into());
        };
        let node = graph.node(id).ok_or("it has no reader")?;
        if node.op.is("Shape") {
            continue;
        }
        let slot = if input == 0 && ends(graph, node).is_some() { &mut append } else { &mut other };
        if slot.replace((id, input, node)).is_some() {
            return Err(format!("node `{}` ({}) is one reader too many", node.name, node.op.display()));
        }
    }
    let reads = |(_, _, node): (NodeId, u16, &Node)| format!("node `{}` ({}) reads it", node.name, node.op.display());
    let reason = || other.map_or("nothing reads it".into(), reads);
    let Some((append, _, node)) = append else {
        return Err(format!("no Concat puts anything behind it and is returned; {}", reason()));
    };
    let (new, present) = ends(graph, node).ok_or("what its Concat gives is not returned")?;
    let is_apart = other.is_some();
    if new == past {
        return Err("it is put behind itself".into());
    }
    if is_apart && !users.of_value(present).iter().all(|user| matches!(user, User::Output)) {
        return Err(format!("its Concat is read in the model, and {}", reason()));
    }
    let (node_of_site, input) = other.map_or((append, 0), |(id, input, _)| (id, input));
    let shape = graph.value(past).ty.tensor().and_then(|ty| ty.shape.as_deref()).ok_or("its shape is not known")?;
    let axis = positive_axis(node.int("axis", 0), shape.len()).ok_or("its Concat has no such axis")?;
    let size = shape.last().and_then(Dim::known).filter(|size| *size > 0);
    let size = size.ok_or("the extent of its last axis is not known")?;
    if axis + 1 == shape.len() {
        return Err("it grows along its last axis, of which rows are made".into());
    }
    let site = Site::Use { node: node_of_site, input };
    Ok(Cache { past, site, append, is_apart, new, present, axis, row: (shape.len() - 1, size) })
}

/// What `concat` puts behind its first input, and its result, if it is a `Concat` of two that the graph returns.
fn ends(graph: &Graph, concat: &Node) -> Option<(ValueId, ValueId)> {
    (concat.op.is("Concat") && concat.inputs.len() == 2).then_some(())?;
    let present = concat.output(0)?;
    (graph.outputs().iter().filter(|output| **output == present).count() == 1).then_some(())?;
    Some((concat.input(1).filter(|new| graph.constant(*new).is_none())?, present))
}

/// The caches that `plan` has in codes, with how.
pub fn encoded(graph: &Graph, plan: &Plan) -> Vec<(Cache, Encoding)> {
    let of = |cache: Cache| {
        let encoding = plan.encoding(cache.site)?;
        let known = [8, 4].into_iter().any(|bits| cache.encoding(bits).as_ref() == Some(encoding));
        known.then(|| (cache, encoding.clone()))
    };
    find(graph).0.into_iter().filter_map(of).collect()
}
