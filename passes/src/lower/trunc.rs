//! Pools that cut bits off, as FINN reads them: `AveragePool`, a `Mul` that makes a sum of the mean, `Trunc`.

use std::sync::Arc;

use super::qdq::{Lowering, bug};
use crate::id::NodeId;
use crate::ir::{Attr, Attrs, Node, OpKey};
use crate::ops::QONNX_DOMAIN as DOMAIN;
use crate::target::LowerError;
use crate::tensor::Tensor;
use crate::trunc::{self, Truncated};

impl Lowering<'_> {
    /// Whether `id` only shifts what pools cut off.
    pub(super) fn is_shift_of_pools(&self, id: NodeId, node: &Node) -> bool {
        let Some(output) = node.output(0).filter(|_| self.dialect.trunc && node.op.is("Add")) else { return false };
        let pools = || self.graph.nodes().filter(|(_, pool)| pool.inputs.contains(&Some(output)));
        let ours = |pool: &Node| trunc::truncated(self.graph, self.plan, pool).is_some_and(|found| found.shift == id);
        !self.graph.outputs().contains(&output) && pools().next().is_some() && pools().all(|(_, pool)| ours(pool))
    }

    /// Writes `pool`, where it cuts bits off; whether it did.
    pub(super) fn truncates(&mut self, pool: &Node) -> Result<bool, LowerError> {
        if !self.dialect.trunc {
            return Ok(false);
        }
        let Some(Truncated { source, n, encoding, .. }) = trunc::truncated(self.graph, self.plan, pool) else {
            return Ok(false);
        };
        let Some(result) = pool.output(0).filter(|result| !self.graph.outputs().contains(result)) else {
            return Ok(false);
        };
        let name = Arc::clone(&self.graph.value(result).name);
        let read = self.read(source, None)?;
        let ty = self.builder.get(self.raw[&result]).ty.clone();
        let made = |lowering: &mut Self, what: &str| {
            let id = lowering.builder.value(&lowering.fresh(&format!("{name}.{what}")));
            lowering.builder.set_type(id, ty.clone());
            id
        };
        let (mean, sum) = (made(self, "mean"), made(self, "sum"));
        let mut attrs = super::qonnx::explicit(self.graph, pool);
        let mut op = pool.op.clone();
        if pool.op.is("GlobalAveragePool") {
            let shape = self.graph.value(source).ty.tensor().and_then(|ty| ty.shape.clone()).unwrap_or_default();
            let kernel: Vec<i64> = shape.iter().skip(2).filter_map(|dim| i64::try_from(dim.known()?).ok()).collect();
            attrs.insert("strides".into(), Attr::Ints(kernel.clone()));
            attrs.insert("kernel_shape".into(), Attr::Ints(kernel));
            op.name = "AveragePool".into();
        }
        let node = Node { op, inputs: vec![Some(read)], outputs: vec![Some(mean)], attrs, ..pool.clone() };
        self.builder.node(node).map_err(bug)?;
        let bits = encoding.grid.info().bits;
        let numbers = [
            ("elements", n as f32),
            ("scale", encoding.scale[0]),
            ("zero_point", 0.0),
            ("in_bits", (bits + n.trailing_zeros()) as f32),
            ("out_bits", bits as f32),
        ];
        let mut constants = Vec::new();
        for (what, number) in numbers {
            let name = self.fresh(&format!("{name}.{what}"));
            constants.push(Some(self.builder.constant(&name, Arc::new(Tensor::scalar(number))).map_err(bug)?));
        }
        let plain = |name: String, domain: &str, op: &str, opset: u32| Node {
            name: name.into(),
            op: OpKey { domain: domain.into(), name: op.into(), opset },
            inputs: Vec::new(),
            outputs: Vec::new(),
            attrs: Attrs::new(),
            bodies: Vec::new(),
            notes: None,
        };
        let mul = plain(format!("{name}.times"), "", "Mul", self.opset);
        let inputs = vec![Some(mean), constants[0]];
        self.builder.node(Node { inputs, outputs: vec![Some(sum)], ..mul }).map_err(bug)?;
        let cut = plain(format!("{name}.trunc"), DOMAIN, "Trunc", 1);
        let inputs = [&[Some(sum)], &constants[1..]].concat();
        let attrs = Attrs::from([("rounding_mode".into(), Attr::String(b"FLOOR".as_slice().into()))]);
        let output = self.raw[&result];
        self.builder.node(Node { inputs, outputs: vec![Some(output)], attrs, ..cut }).map_err(bug)?;
        self.pairs.entry(result).or_default().push((encoding.clone(), output));
        Ok(true)
    }
}
