//! Packed tables back to plain ones, with their encoding in the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encoding::{Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Attrs, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Edit, Patch};
use crate::nbits::{self, Layout};
use crate::ops::positive_axis;
use crate::tables;
use crate::tensor::{DType, Tensor};

/// Codes, scales and zero points.
type Key = [Option<ValueId>; 3];

/// A table that was unpacked.
struct Table {
    value: ValueId,
    shape: [usize; 2],
    encoding: Encoding,
    codes: Arc<Tensor>,
}

/// Turns every `com.microsoft::GatherBlockQuantized` with constant parameters into a `Gather` of ai.onnx `opset` from the float table
/// that its codes stand for, and every `MatMulNBits` by the same codes, reshaped, into a product with that table transposed.
pub(super) fn absorb(graph: &Graph, users: &Users, opset: u32, patch: &mut Patch) {
    let mut made: BTreeMap<(Key, Layout), Option<Table>> = BTreeMap::new();
    for (id, node) in graph.nodes().filter(|(_, node)| is_contrib(node, tables::OP)) {
        let Some((key, layout)) = gathered(graph, node) else { continue };
        let table = made.entry((key, layout)).or_insert_with(|| unpack(graph, key, layout, patch));
        let Some(table) = table else { continue };
        let plain = Node {
            op: OpKey { domain: "".into(), name: "Gather".into(), opset },
            inputs: vec![Some(table.value), node.input(1)],
            attrs: Attrs::new(),
            ..node.clone()
        };
        patch.replace(id, plain);
        encode(patch, Site::Use { node: id, input: 0 }, table);
        patch.count("packed tables", 1);
    }
    for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("Reshape")) {
        let found = || {
            let products = heads(graph, users, node)?;
            let (key, layout) = shared(graph, node, *products.first()?)?;
            let same = |product: &NodeId| shared(graph, node, *product) == Some((key, layout));
            products.iter().all(same).then_some((made.get(&(key, layout))?.as_ref()?, products))
        };
        if let Some((table, products)) = found() {
            absorb_head(graph, (id, node), &products, table, opset, patch);
        }
    }
}

fn is_contrib(node: &Node, name: &str) -> bool {
    *node.op.domain == *nbits::DOMAIN.0 && *node.op.name == *name
}

/// The parameters of a `GatherBlockQuantized` along the last axis of a matrix.
fn gathered(graph: &Graph, node: &Node) -> Option<(Key, Layout)> {
    let codes = graph.constant_input(node, 0)?;
    let [n, stored] = *codes.shape() else { return None };
    let size = |name: &str, default: i64| usize::try_from(node.int(name, default)).ok();
    let along_rows =
        positive_axis(node.int("gather_axis", 0), 2)? == 0 && positive_axis(node.int("quantize_axis", 1), 2)? == 1;
    let bits = if tables::is_plain(codes.dtype()) { 4 } else { size("bits", 4)? };
    let fits = along_rows && matches!(bits, 2 | 4 | 8);
    let k = if tables::is_plain(codes.dtype()) { stored } else { stored.checked_mul(8)? / bits.max(1) };
    let layout = Layout { k, n, block: size("block_size", 128)?, bits };
    (fits && layout.is_sound()).then_some(([node.input(0), node.input(2), node.input(3)], layout))
}

/// The products that alone read what `reshape` returns, as their packed weight.
fn heads(graph: &Graph, users: &Users, reshape: &Node) -> Option<Vec<NodeId>> {
    let product = |user: &User| match user {
        User::Input { node, input: 1 } if is_contrib(graph.node(*node)?, nbits::OP) => Some(*node),
        _ => None,
    };
    users.of_value(reshape.output(0)?).iter().map(product).collect()
}

/// The parameters that `product` has through `reshape`.
fn shared(graph: &Graph, reshape: &Node, product: NodeId) -> Option<(Key, Layout)> {
    let node = graph.node(product)?;
    node.inputs.iter().skip(4).all(Option::is_none).then_some(())?;
    let size = |name: &str, default: i64| usize::try_from(node.int(name, default)).ok();
    let layout = Layout { k: size("K", 0)?, n: size("N", 0)?, block: size("block_size", 0)?, bits: size("bits", 4)? };
    Some(([reshape.input(0), node.input(2), node.input(3)], layout))
}

fn unpack(graph: &Graph, key: Key, layout: Layout, patch: &mut Patch) -> Option<Table> {
    let constant = |value: Option<ValueId>| graph.constant(value?);
    let (codes, scales) = (constant(key[0])?, constant(key[1])?);
    let zeros = match key[2] {
        Some(value) => Some(graph.constant(value)?),
        None => None,
    };
    let (encoding, codes) = if tables::is_plain(codes.dtype()) {
        plain(layout, codes, scales, zeros)?
    } else {
        tables::unpacked(layout, codes, scales, zeros.map(AsRef::as_ref))?
    };
    let float = encoding.decode(&codes).ok()?;
    let name = format!("{}.unpacked", graph.value(key[0]?).name);
    let value = patch.constant(&name, Tensor::of([layout.n, layout.k], float));
    Some(Table { value, shape: [layout.n, layout.k], encoding, codes: Arc::new(codes) })
}

/// The encoding and the codes of a table of 4-bit integers.
fn plain(layout: Layout, codes: &Tensor, scales: &Tensor, zeros: Option<&Arc<Tensor>>) -> Option<(Encoding, Tensor)> {
    let grid = super::absorb_qdq::grid_of(codes.dtype())?;
    let scale = scales.values::<f32>().filter(|scale| scale.iter().all(|s| s.is_finite() && *s != 0.0))?;
    let zero_point = match zeros.map(|zeros| (zeros.dtype() == codes.dtype()).then_some(zeros)) {
        Some(zeros) => {
            let points = crate::encoding::unpack(zeros?).into_iter();
            points.map(|code| super::absorb_qdq::whole(grid.decode(code))).collect()
        }
        None => vec![0; scale.len()],
    };
    let granularity = Granularity::Block { axis: 1, size: layout.block };
    let encoding = Encoding { grid, granularity, scale: scale.into_owned().into(), zero_point: zero_point.into() };
    Some((encoding, codes.clone()))
}

/// The products with a table transposed, under the name of what reshaped its codes.
fn absorb_head(
    graph: &Graph,
    (id, reshape): (NodeId, &Node),
    products: &[NodeId],
    table: &Table,
    opset: u32,
    patch: &mut Patch,
) {
    let plain = |op: &str, inputs, of: &Node| Node {
        op: OpKey { domain: "".into(), name: op.into(), opset },
        inputs,
        attrs: Attrs::new(),
        ..of.clone()
    };
    let [n, k] = table.shape;
    let mut transpose = plain("Transpose", vec![Some(table.value)], reshape);
    transpose.attrs.insert("perm".into(), crate::ir::Attr::Ints(vec![1, 0]));
    let name = format!("{}.transposed", reshape.name);
    let (turned, made) =
        patch.node_with_id(transpose, &name, Type::Tensor(TensorType::known(DType::F32, &[k, n])), Some(id));
    encode(patch, Site::Use { node: made, input: 0 }, table);
    for &product in products {
        let Some(node) = graph.node(product) else { continue };
        patch.replace(product, plain("MatMul", vec![node.input(0), Some(turned)], node));
        patch.count("products with tables", 1);
    }
    patch.erase(id);
}

fn encode(patch: &mut Patch, site: Site, table: &Table) {
    patch.edit(Edit::Encode { site, encoding: table.encoding.clone() });
    patch.edit(Edit::Round { site, codes: Arc::clone(&table.codes) });
}
