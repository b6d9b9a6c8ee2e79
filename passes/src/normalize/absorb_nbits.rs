//! Packed matrix products back to plain ones with their weight in the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Patch};
use crate::nbits::{Layout, OP, unpacked};
use crate::tensor::Tensor;

/// A weight that was unpacked.
#[derive(Clone)]
pub(super) struct Weight {
    value: ValueId,
    encoding: Encoding,
    codes: Arc<Tensor>,
}

/// Weights by the inputs and the layout that they were unpacked from.
pub(super) type Made = BTreeMap<(Vec<Option<ValueId>>, Layout), Weight>;

/// Turns node `id`, a `com.microsoft::MatMulNBits` with constant parameters, into a `MatMul` of ai.onnx `opset` by the float weight that
/// its codes stand for, with its encoding and codes. One with a bias, an order of inputs or float zero points stays as it is.
/// Weights that several nodes read are made once: `made` remembers them.
pub(super) fn absorb(graph: &Graph, id: NodeId, node: &Node, opset: u32, made: &mut Made, patch: &mut Patch) -> bool {
    let absorbed = (|| {
        if &*node.op.domain != "com.microsoft"
            || &*node.op.name != OP
            || node.inputs.iter().skip(4).any(Option::is_some)
        {
            return None;
        }
        let size = |name: &str, default: i64| usize::try_from(node.int(name, default)).ok();
        let (k, n, block) = (size("K", 0)?, size("N", 0)?, size("block_size", 0)?);
        let layout = Layout { k, n, block, bits: size("bits", 4)? };
        layout.is_sound().then_some(())?;
        let zero_points = match node.input(3) {
            Some(value) => Some(graph.constant(value)?),
            None => None,
        };
        let (codes, scales) = (graph.constant_input(node, 1)?, graph.constant_input(node, 2)?);
        let key = (node.inputs[1..].to_vec(), layout);
        if let Some(weight) = made.get(&key) {
            return Some(weight.clone());
        }
        let (encoding, codes) = unpacked(layout, codes, scales, zero_points.map(AsRef::as_ref))?;
        let weight = Tensor::of([k, n], encoding.decode(&codes).ok()?);
        let weight = Weight {
            value: patch.constant(&format!("{}.weight", node.name), weight),
            encoding,
            codes: Arc::new(codes),
        };
        made.insert(key, weight.clone());
        Some(weight)
    })();
    let Some(Weight { value: weight, encoding, codes }) = absorbed else { return false };
    let plain = Node {
        op: OpKey { domain: "".into(), name: "MatMul".into(), opset },
        inputs: vec![node.input(0), Some(weight)],
        attrs: Attrs::new(),
        ..node.clone()
    };
    patch.replace(id, plain);
    let site = Site::Use { node: id, input: 1 };
    patch.edit(Edit::Encode { site, encoding });
    patch.edit(Edit::Round { site, codes });
    patch.count("packed products", 1);
    true
}
