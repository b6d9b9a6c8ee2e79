//! A product of which some inputs are multiplied apart.

use super::super::assign::{self, WeightScale};
use super::{Candidate, row};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Attr, Attrs, Dim, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Decision, Edit, Model, Patch};
use crate::ops;
use crate::target::{Accepts, Scheme};
use crate::tensor::Tensor;

/// Splits the product of `c` at `rows`; the rest is written in `scheme`. `None`, with an unusable patch, where it cannot be.
pub(super) fn split(
    (model, users): (&Model, &Users),
    accepts: &'static Accepts,
    (c, rows): (&Candidate, &[usize]),
    scheme: Option<(Scheme, WeightScale)>,
    patch: &mut Patch,
) -> Option<()> {
    let graph = model.graph();
    let (id, node) = (c.node, graph.node(c.node)?);
    let x = node.input(0)?;
    let (rest, kept) = parted(graph.constant_input(node, 1)?, c, rows)?;
    let old = model.plan().encoding(Site::Use { node: id, input: 1 })?;
    let anew = scheme.and_then(|scheme| assign::encoding_in_place(graph, id, &rest, scheme, accepts));
    // A format that was searched for stays.
    let encoding =
        anew.filter(|e| e.grid.info().about.name == old.grid.info().about.name).unwrap_or_else(|| old.clone());
    let weight = &graph.value(node.input(1)?).name;
    let rest = patch.constant(&format!("{weight}.rest"), rest);
    let mut inputs = node.inputs.clone();
    inputs[1] = Some(rest);
    let output = graph.value(node.output(0)?);
    let product = Node { inputs, outputs: Vec::new(), ..node.clone() }; // keeps its name
    let (mut sum, product) = patch.node_with_id(product, &format!("{}.rest", output.name), output.ty.clone(), Some(id));
    patch.edit(Edit::Encode { site: Site::Use { node: product, input: 1 }, encoding });
    if let Some(e) = model.plan().encoding(Site::Use { node: id, input: 0 }) {
        patch.edit(Edit::Encode { site: Site::Use { node: product, input: 0 }, encoding: e.clone() });
    }
    if let Some(d) = model.plan().decision(id) {
        let reason = format!("{}; {} of its {} inputs beside it in float", d.reason, rows.len(), c.inputs);
        patch.edit(Edit::Decide { node: product, decision: Decision { quantized: d.quantized, reason } });
        if ops::bias_site(graph, users, id).is_none_or(|s| matches!(s, Site::Use { node, .. } if node == id)) {
            // The old id becomes the sum.
            patch.edit(Edit::Decide {
                node: id,
                decision: Decision { quantized: false, reason: "it adds what is kept in float".into() },
            });
        }
    }
    // A bias stays next to the product: it takes back what rounding shifts.
    let mut last = id;
    if let Some(Site::Use { node: add, .. }) =
        ops::bias_site(graph, users, id).filter(|s| !matches!(s, Site::Use { node, .. } if *node == id))
    {
        let old = graph.node(add)?;
        let inputs = old.inputs.iter().map(|v| if *v == node.output(0) { Some(sum) } else { *v }).collect();
        let ty = graph.value(old.output(0)?).ty.clone();
        sum = patch.node(
            Node { inputs, outputs: Vec::new(), ..old.clone() },
            &format!("{}.rest", graph.value(old.output(0)?).name),
            ty,
            Some(add),
        );
        last = add;
    }
    let side = beside(graph, id, (x, rows), kept, patch)?;
    let end = graph.node(last)?;
    let add = operator(node, &format!("{}.whole", end.name), "Add", &[sum, side]);
    patch.replace(last, Node { outputs: end.outputs.clone(), ..add });
    if last != id {
        patch.erase(id);
    }
    Some(())
}

/// The weight of `c` without `rows`, as it is stored, and those alone, \[rows, N\].
fn parted(weight: &Tensor, c: &Candidate, rows: &[usize]) -> Option<(Tensor, Tensor)> {
    let values = weight.floats()?;
    let kept: Vec<f32> = rows.iter().flat_map(|&k| row(&values, c, k)).collect();
    let mut rest = values.into_owned();
    for &k in rows {
        for n in 0..c.outputs {
            rest[if c.roles.out_axis == 1 { k * c.outputs + n } else { n * c.inputs + k }] = 0.0;
        }
    }
    Some((Tensor::of(weight.shape(), rest), Tensor::of([rows.len(), c.outputs], kept)))
}

/// X\[…, rows\] S, before node `id`.
fn beside(
    graph: &Graph,
    id: NodeId,
    (x, rows): (ValueId, &[usize]),
    kept: Tensor,
    patch: &mut Patch,
) -> Option<ValueId> {
    let node = graph.node(id)?;
    let source = graph.value(x);
    let tensor = source.ty.tensor()?;
    let rank = tensor.rank().filter(|rank| *rank >= 2)?;
    let dims = tensor.shape.as_ref().map(|s| s[..rank - 1].iter().cloned().chain([Dim::Known(rows.len())]).collect());
    let places = rows.iter().map(|&k| i64::try_from(k).ok()).collect::<Option<Vec<i64>>>()?;
    let name = |what: &str| format!("{}.{what}", node.name);
    let places = patch.constant(&name("kept.inputs"), Tensor::of([rows.len()], places));
    let mut gather = operator(node, &name("kept.Gather"), "Gather", &[x, places]);
    gather.attrs.insert("axis".into(), Attr::Int(i64::try_from(rank - 1).ok()?));
    let some = patch.node(gather, &name("kept.x"), Type::Tensor(TensorType::new(tensor.dtype, dims)), Some(id));
    let weight = patch.constant(&name("kept.weight"), kept);
    let product = operator(node, &name("kept.MatMul"), "MatMul", &[some, weight]);
    Some(patch.node(product, &name("kept"), graph.value(node.output(0)?).ty.clone(), Some(id)))
}

fn operator(like: &Node, name: &str, op: &str, inputs: &[ValueId]) -> Node {
    Node {
        name: name.into(),
        op: OpKey { domain: "".into(), name: op.into(), opset: like.op.opset },
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: Vec::new(),
        attrs: Attrs::new(),
        bodies: Vec::new(),
        notes: None,
    }
}
