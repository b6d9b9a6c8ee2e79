//! Tables that are gathered from, and products that share them.

use std::collections::BTreeMap;

use super::select::{Choice, Selection};
use super::{Goal, Goals, weights};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch};
use crate::pass::{PassContext, PassError};
use crate::tables;
use crate::tensor::{DType, Tensor};

/// Encodes every float table that a `Gather` takes rows from, in blocks along its rows, and with it the products with that table
/// transposed: a head that is tied to the embedding shares its codes. Fails where there is no such table, or where `others` say how one
/// is written too.
pub(super) fn encode(
    model: &Model,
    cx: &PassContext<'_>,
    (goal, others): (&Goal, &Goals),
    selection: &mut Selection,
    patch: &mut Patch,
) -> Result<(), PassError> {
    let graph = model.graph();
    let users = Users::of(graph);
    let mut found = false;
    let mut encodings: BTreeMap<ValueId, Result<Encoding, String>> = BTreeMap::new();
    for (id, node) in graph.nodes().filter(|(_, node)| tables::is_gather(node)) {
        let Some((value, table)) = node.input(0).and_then(|value| Some((value, graph.constant(value)?))) else {
            continue;
        };
        if table.dtype() != DType::F32 || table.shape().len() != 2 {
            continue;
        }
        found = true;
        let heads = heads(graph, &users, cx, selection, value);
        if heads.iter().flat_map(|(_, products)| products).chain([&id]).any(|id| others.by_node.contains_key(id)) {
            let name = &graph.value(value).name;
            return Err(PassError::Model(format!("--embeddings and --set both say how table `{name}` is written")));
        }
        let encoding = match kept(graph, cx, node) {
            Some(option) => Err(format!("kept in float by `{option}`")),
            None => encodings.entry(value).or_insert_with(|| table_encoding(table, goal)).clone(),
        };
        let choice = match encoding {
            Err(reason) => Choice::Float { reason, notable: true },
            Ok(encoding) => {
                patch.edit(Edit::Encode { site: Site::Use { node: id, input: 0 }, encoding: encoding.clone() });
                for (transpose, products) in heads {
                    let site = Site::Use { node: transpose, input: 0 };
                    patch.edit(Edit::Encode { site, encoding: encoding.clone() });
                    let reason = "its weight is the table that a Gather reads, in the same codes";
                    selection.choices.extend(products.iter().map(|product| (*product, Choice::Quantized { reason })));
                }
                Choice::Quantized { reason: "its table is in codes" }
            }
        };
        selection.choices.insert(id, choice);
    }
    if found {
        return Ok(());
    }
    Err(PassError::Model("--embeddings: no Gather takes rows out of a constant float matrix".into()))
}

/// The option that keeps `node` in float, by its name or that of one of its tensors.
fn kept<'a>(graph: &Graph, cx: &PassContext<'a>, node: &Node) -> Option<&'a String> {
    let tensors = node.inputs.iter().chain(&node.outputs).flatten().map(|value| &graph.value(*value).name);
    std::iter::once(&node.name).chain(tensors).find_map(|name| cx.keep_float.get(&**name))
}

/// How `table` is written, or why it is not.
fn table_encoding(table: &Tensor, goal: &Goal) -> Result<Encoding, String> {
    let (block, columns) = (goal.scheme.block.unwrap_or(1), table.shape()[1]);
    if table.is_empty() || !columns.is_multiple_of(block) {
        return Err(format!("the {columns} columns of its table are no whole blocks of {block}"));
    }
    if table.floats().is_none_or(|values| values.iter().any(|v| !v.is_finite())) {
        return Err("its table has NaN or infinite values".into());
    }
    weights::blocked(table, 1, block, goal).ok_or_else(|| "its table cannot be cut into blocks".into())
}

/// The transposes of `table` that only products read whose activations stay in float, with those products.
fn heads(
    graph: &Graph,
    users: &Users,
    cx: &PassContext<'_>,
    selection: &Selection,
    table: ValueId,
) -> Vec<(NodeId, Vec<NodeId>)> {
    let in_float = |id: &NodeId| graph.node(*id).is_none_or(|node| kept(graph, cx, node).is_some());
    let on_codes = |id: &NodeId| selection.reads.iter().any(|(reader, _)| reader == id);
    tables::transposes(graph, users, table)
        .filter(|(transpose, products)| !in_float(transpose) && !products.iter().any(|id| in_float(id) || on_codes(id)))
        .collect()
}
