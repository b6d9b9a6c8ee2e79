//! Tables in blocks: `GatherBlockQuantized`, and `MatMulNBits` where a product shares the table.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::qdq::{CodesKey, Lowering, bug};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attr, Attrs, Node, OpKey, TensorType, Type};
use crate::nbits::{self, Layout};
use crate::tables;
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

/// The constants of a table.
#[derive(Clone)]
pub(super) struct Table {
    layout: Layout,
    codes: ValueId,
    scales: ValueId,
    zero_points: Option<ValueId>,
    /// Whether codes are bytes, so that a product can share them.
    bytes: bool,
}

/// The tables that are written, by codes and encoding.
pub(super) type Tables = BTreeMap<CodesKey, Vec<(Encoding, Table)>>;

impl Lowering<'_> {
    /// Writes `node` where it reads a table in blocks, or is a product with one transposed, or the transposing between; says whether
    /// it did.
    pub(super) fn reads_table(&mut self, id: NodeId, node: &Node) -> Result<bool, LowerError> {
        if self.nbits.is_none() {
            return Ok(false);
        }
        if tables::is_gather(node) {
            return self.gather(id, node);
        }
        if node.op.is("Transpose") {
            return Ok(self.is_head(id));
        }
        let transpose = node.input(1).filter(|_| node.op.is("MatMul")).and_then(|value| self.graph.producer(value));
        match transpose.filter(|(transpose, _)| self.is_head(*transpose)) {
            Some((transpose, turned)) => self.head(transpose, turned, node).map(|()| true),
            None => Ok(false),
        }
    }

    /// Whether node `id` transposes a table in blocks for nobody but products that can take it.
    fn is_head(&self, id: NodeId) -> bool {
        let found = || {
            let node = self.graph.node(id).filter(|node| tables::turns(node))?;
            let site = Site::Use { node: id, input: 0 };
            tables::layout(self.plan.encoding(site)?, self.plan.codes(site)?)?;
            let users = self.nbits.as_ref()?;
            let (_, products) =
                tables::transposes(self.graph, users, node.input(0)?).find(|(found, _)| *found == id)?;
            let float = |product: &NodeId| {
                let encoded = |input| self.plan.encoding_of_use(self.graph, *product, input).is_some();
                !encoded(0) && !encoded(1)
            };
            products.iter().all(float).then_some(())
        };
        found().is_some()
    }

    fn gather(&mut self, id: NodeId, node: &Node) -> Result<bool, LowerError> {
        let site = Site::Use { node: id, input: 0 };
        let (Some(value), Some(indices)) = (node.input(0), node.input(1)) else { return Ok(false) };
        let Some(table) = self.table(value, site)? else { return Ok(false) };
        let indices = self.read(indices, None)?;
        let mut attrs = numbers(&[("gather_axis", 0), ("quantize_axis", 1), ("block_size", table.layout.block)]);
        if table.bytes {
            attrs.extend(numbers(&[("bits", table.layout.bits)]));
        }
        let mut inputs = vec![Some(table.codes), Some(indices), Some(table.scales)];
        inputs.extend(table.zero_points.map(Some));
        self.contrib(tables::OP, node, inputs, attrs)?;
        Ok(true)
    }

    /// The product `node` with the table that `turned`, node `transpose`, turns.
    fn head(&mut self, transpose: NodeId, turned: &Node, node: &Node) -> Result<(), LowerError> {
        let fail = || LowerError {
            place: format!("node `{}`", node.name),
            problem: "a bug in onnx-quant: its table is gone".into(),
        };
        let (value, activation) = turned.input(0).zip(node.input(0)).ok_or_else(fail)?;
        let table =
            self.table(value, Site::Use { node: transpose, input: 0 })?.filter(|table| table.bytes).ok_or_else(fail)?;
        let Layout { k, n, block, bits } = table.layout;
        let codes = self.in_blocks(transpose, turned, &table)?;
        let activation = self.read(activation, None)?;
        let mut inputs = vec![Some(activation), Some(codes), Some(table.scales)];
        inputs.extend(table.zero_points.map(Some));
        self.contrib(nbits::OP, node, inputs, numbers(&[("K", k), ("N", n), ("bits", bits), ("block_size", block)]))
    }

    /// The codes of `table` with an axis of blocks, under the name of the node that transposed it: runtimes fold this when they load.
    fn in_blocks(&mut self, transpose: NodeId, turned: &Node, table: &Table) -> Result<ValueId, LowerError> {
        if let Some(codes) = self.turned.get(&transpose) {
            return Ok(*codes);
        }
        let Layout { n, block, bits, .. } = table.layout;
        let shape = [n, table.layout.blocks(), block * bits / 8];
        let list: Vec<i64> = shape.iter().map(|&d| i64::try_from(d).unwrap_or(i64::MAX)).collect();
        let name = self.fresh(&format!("{}.shape", turned.name));
        let list = self.builder.constant(&name, Arc::new(Tensor::of([3], list))).map_err(bug)?;
        let codes = self.builder.value(&self.fresh(&format!("{}.codes", turned.name)));
        self.builder.set_type(codes, Type::Tensor(TensorType::known(DType::U8, &shape)));
        let op = OpKey { domain: "".into(), name: "Reshape".into(), opset: self.opset };
        let node = Node {
            op,
            inputs: vec![Some(table.codes), Some(list)],
            outputs: vec![Some(codes)],
            attrs: Attrs::new(),
            ..turned.clone()
        };
        self.builder.node(node).map_err(bug)?;
        self.turned.insert(transpose, codes);
        Ok(codes)
    }

    /// The constants of the table `value` as it is read at `site`, made when they are first asked for; `None` where it is not in
    /// blocks.
    fn table(&mut self, value: ValueId, site: Site) -> Result<Option<Table>, LowerError> {
        let Some((encoding, codes)) = self.plan.encoding(site).zip(self.plan.codes(site)) else { return Ok(None) };
        let Some(layout) = tables::layout(encoding, codes) else { return Ok(None) };
        let key = (value, Some(Arc::as_ptr(codes)));
        if let Some((_, table)) = self.tables.get(&key).and_then(|all| all.iter().find(|(e, _)| e == encoding)) {
            return Ok(Some(table.clone()));
        }
        let (encoding, codes) = (encoding.clone(), Arc::clone(codes));
        let shared = self.nbits.as_ref().is_some_and(|users| {
            tables::transposes(self.graph, users, value).any(|(transpose, _)| self.is_head(transpose))
        });
        let bytes = shared || layout.bits != 4 || !tables::is_plain(codes.dtype());
        let name = Arc::clone(&self.graph.value(value).name);
        let table = if bytes {
            let packed = tables::packed(layout, &encoding, &codes);
            let mut made = |what: &str, tensor: Tensor| {
                let name = self.fresh(&format!("{name}.{what}"));
                self.builder.constant(&name, Arc::new(tensor)).map_err(bug)
            };
            let (codes, scales) = (made("codes", packed.codes)?, made("scale", packed.scales)?);
            let zero_points = packed.zero_points.map(|zeros| made("zero_point", zeros)).transpose()?;
            Table { layout: packed.layout, codes, scales, zero_points, bytes }
        } else {
            let shape = codes.shape().to_vec();
            let stem = self.fresh(&format!("{name}.codes"));
            let codes = self.builder.constant(&stem, codes).map_err(bug)?;
            let (scales, zero_points) = self.parameters(&name, &encoding, &shape)?;
            Table { layout, codes, scales, zero_points, bytes }
        };
        self.tables.entry(key).or_default().push((encoding, table.clone()));
        Ok(Some(table))
    }

    /// `node` as the contrib operator `op`, which is then imported.
    fn contrib(&mut self, op: &str, node: &Node, inputs: Vec<Option<ValueId>>, attrs: Attrs) -> Result<(), LowerError> {
        let (domain, version) = nbits::DOMAIN;
        let node = Node {
            op: OpKey { domain: domain.into(), name: op.into(), opset: version },
            inputs,
            outputs: node.outputs.iter().map(|output| output.map(|output| self.raw[&output])).collect(),
            attrs,
            ..node.clone()
        };
        self.builder.node(node).map_err(bug)?;
        self.packed = true;
        Ok(())
    }
}

fn numbers(list: &[(&str, usize)]) -> Attrs {
    list.iter().map(|&(name, n)| (name.into(), Attr::Int(i64::try_from(n).unwrap_or(i64::MAX)))).collect()
}
