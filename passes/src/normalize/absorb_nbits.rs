//! Packed matrix products back to plain ones with their weight in the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Patch};
use crate::nbits::{Layout, OP, unpacked};
use crate::parallel;
use crate::tensor::Tensor;

/// The inputs and the layout that a weight is unpacked from.
type Key = (Vec<Option<ValueId>>, Layout);

/// A weight that was unpacked.
struct Weight {
    encoding: Encoding,
    codes: Arc<Tensor>,
    float: Tensor,
}

/// Turns every `com.microsoft::MatMulNBits` with constant parameters into a `MatMul` of ai.onnx `opset` by the float weight that its
/// codes stand for, with its encoding and codes. One with a bias, an order of inputs or float zero points stays as it is. What several
/// nodes read is unpacked once.
pub(super) fn absorb(graph: &Graph, opset: u32, patch: &mut Patch) {
    let found: Vec<(NodeId, &Node, Key)> =
        graph.nodes().filter_map(|(id, node)| Some((id, node, key(node)?))).collect();
    let mut keys: Vec<&Key> = found.iter().map(|(_, _, key)| key).collect();
    keys.sort_unstable();
    keys.dedup();
    let weights = parallel::map(&keys, |key| unpack(graph, key));
    let mut made: BTreeMap<&Key, (ValueId, Encoding, Arc<Tensor>)> = BTreeMap::new();
    for (key, weight) in keys.into_iter().zip(weights) {
        if let (Some(Weight { encoding, codes, float }), Some(packed)) = (weight, key.0.first().copied().flatten()) {
            let name = format!("{}.unpacked", graph.value(packed).name);
            made.insert(key, (patch.constant(&name, float), encoding, codes));
        }
    }
    for (id, node, key) in &found {
        let Some((weight, encoding, codes)) = made.get(key) else { continue };
        let plain = Node {
            op: OpKey { domain: "".into(), name: "MatMul".into(), opset },
            inputs: vec![node.input(0), Some(*weight)],
            attrs: Attrs::new(),
            ..(*node).clone()
        };
        patch.replace(*id, plain);
        let site = Site::Use { node: *id, input: 1 };
        patch.edit(Edit::Encode { site, encoding: encoding.clone() });
        patch.edit(Edit::Round { site, codes: Arc::clone(codes) });
        patch.count("packed products", 1);
    }
}

/// What the weight of `node` is packed in, where it is a product that can be absorbed.
fn key(node: &Node) -> Option<Key> {
    let is_packed = &*node.op.domain == "com.microsoft" && &*node.op.name == OP;
    if !is_packed || node.inputs.iter().skip(4).any(Option::is_some) {
        return None;
    }
    let size = |name: &str, default: i64| usize::try_from(node.int(name, default)).ok();
    let (k, n, block) = (size("K", 0)?, size("N", 0)?, size("block_size", 0)?);
    let layout = Layout { k, n, block, bits: size("bits", 4)? };
    layout.is_sound().then_some(())?;
    Some((node.inputs.get(1..)?.to_vec(), layout))
}

fn unpack(graph: &Graph, (inputs, layout): &Key) -> Option<Weight> {
    let constant = |at: usize| graph.constant((*inputs.get(at)?)?);
    let zero_points = match inputs.get(2).copied().flatten() {
        Some(value) => Some(graph.constant(value)?.as_ref()),
        None => None,
    };
    let (encoding, codes) = unpacked(*layout, constant(0)?, constant(1)?, zero_points)?;
    let float = Tensor::of([layout.k, layout.n], encoding.decode(&codes).ok()?);
    Some(Weight { encoding, codes: Arc::new(codes), float })
}
