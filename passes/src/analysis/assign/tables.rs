//! Tables that are gathered from, and products that share them.

use std::collections::BTreeMap;

use super::select::{Choice, Selection};
use super::{Goal, weights};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch};
use crate::pass::PassContext;
use crate::tables;
use crate::tensor::{DType, Tensor};

/// Encodes every float table that a `Gather` takes rows from, in blocks along its rows, and with it the products with that table
/// transposed: a head that is tied to the embedding shares its codes. Returns how many there are, encoded or kept in float.
pub(super) fn encode(
    model: &Model,
    cx: &PassContext<'_>,
    goal: &Goal,
    selection: &mut Selection,
    patch: &mut Patch,
) -> usize {
    let graph = model.graph();
    let users = Users::of(graph);
    let mut found = 0;
    let mut encodings: BTreeMap<ValueId, Result<Encoding, String>> = BTreeMap::new();
    for (id, node) in graph.nodes().filter(|(_, node)| tables::is_gather(node)) {
        let Some((value, table)) = node.input(0).and_then(|value| Some((value, graph.constant(value)?))) else {
            continue;
        };
        if table.dtype() != DType::F32 || table.shape().len() != 2 {
            continue;
        }
        found += 1;
        let kept = [&*node.name, &*graph.value(value).name].iter().find_map(|name| cx.keep_float.get(*name));
        let encoding = match kept {
            Some(option) => Err(format!("kept in float by `{option}`")),
            None => encodings.entry(value).or_insert_with(|| table_encoding(table, goal)).clone(),
        };
        let choice = match encoding {
            Err(reason) => Choice::Float { reason, notable: true },
            Ok(encoding) => {
                patch.edit(Edit::Encode { site: Site::Use { node: id, input: 0 }, encoding: encoding.clone() });
                for (transpose, products) in heads(graph, &users, cx, value) {
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
    found
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

/// The transposes of `table` that products of float activations alone read, with those products.
fn heads(graph: &Graph, users: &Users, cx: &PassContext<'_>, table: ValueId) -> Vec<(NodeId, Vec<NodeId>)> {
    let kept = |node: &Node| {
        cx.keep_float.contains_key(&*node.name)
            || node.outputs.iter().flatten().any(|value| cx.keep_float.contains_key(&*graph.value(*value).name))
    };
    let found = tables::transposes(graph, users, table);
    found.filter(|(_, products)| !products.iter().any(|id| graph.node(*id).is_some_and(kept))).collect()
}
