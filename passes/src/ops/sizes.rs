//! How many bytes tensors take, from shapes alone.

use std::collections::BTreeMap;

use crate::id::ValueId;
use crate::ir::{Dim, Graph, TensorType, Type};
use crate::tensor::Tensor;

/// The bytes of every activation when `graph` runs on `sample`, where they follow from the shape rules.
pub fn of(graph: &Graph, sample: &[Tensor]) -> BTreeMap<ValueId, u64> {
    let mut types: Vec<Option<TensorType>> = graph
        .value_ids()
        .map(|id| match &graph.value(id).ty {
            Type::Tensor(ty) => Some(TensorType::new(ty.dtype, ty.known_shape().and(ty.shape.clone()))),
            Type::Opaque(_) => None,
        })
        .collect();
    for (&input, tensor) in graph.inputs().iter().zip(sample) {
        types[input.index()] = Some(TensorType::of(tensor));
    }
    let mut bytes = BTreeMap::new();
    bytes.extend(graph.inputs().iter().filter_map(|input| Some((*input, bytes_of(types[input.index()].as_ref()?)?))));
    for (_, node) in graph.nodes() {
        for (output, inferred) in
            node.outputs.iter().zip(super::infer(graph, node, &|value| types[value.index()].clone()))
        {
            let Some(output) = *output else { continue };
            if let Some(slot) = types[output.index()].as_mut() {
                *slot = slot.refined(&inferred);
                bytes.extend(bytes_of(slot).map(|n| (output, n)));
            }
        }
    }
    bytes
}

fn bytes_of(ty: &TensorType) -> Option<u64> {
    let elements = ty.shape.as_ref()?.iter().try_fold(1_usize, |n, dim| match dim {
        Dim::Known(d) => n.checked_mul(*d),
        _ => None,
    })?;
    u64::try_from(ty.dtype?.bytes_for(elements)?).ok()
}

/// Gives those of `values` that have no size that of a tensor of the very same type: equal symbols stand for equal extents.
pub fn by_likeness(graph: &Graph, values: &[ValueId], bytes: &mut BTreeMap<ValueId, u64>) {
    let named = |value: ValueId| -> Option<&TensorType> {
        let ty = graph.value(value).ty.tensor()?;
        ty.shape.as_ref()?.iter().all(|dim| !matches!(dim, Dim::Unknown)).then_some(ty)
    };
    let known: Vec<(&TensorType, u64)> = bytes.iter().filter_map(|(value, n)| Some((named(*value)?, *n))).collect();
    let open = values.iter().filter(|value| !bytes.contains_key(value));
    let alike = open.filter_map(|value| {
        let ty = named(*value)?;
        known.iter().find(|(other, _)| *other == ty).map(|(_, n)| (*value, *n))
    });
    let found: Vec<(ValueId, u64)> = alike.collect();
    bytes.extend(found);
}

/// The most bytes of activations that are alive at once when the nodes run in order and each tensor is let go after its last
/// reader. A tensor whose size is not known counts as much as the largest known one.
pub fn alive_at_once(graph: &Graph, bytes: &BTreeMap<ValueId, u64>) -> u64 {
    let largest = bytes.values().copied().max().unwrap_or(0);
    let size = |value: ValueId| match graph.constant(value) {
        Some(_) => 0,
        None => bytes.get(&value).copied().unwrap_or(largest),
    };
    let mut last_reader: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (at, (_, node)) in graph.nodes().enumerate() {
        let read = node.inputs.iter().flatten().copied().chain(crate::ir::walk::captures(node));
        last_reader.extend(read.map(|value| (value, at)));
    }
    last_reader.extend(graph.outputs().iter().map(|output| (*output, usize::MAX)));
    let mut ending: BTreeMap<usize, Vec<ValueId>> = BTreeMap::new();
    for (value, at) in last_reader {
        ending.entry(at).or_default().push(value);
    }
    let sum = |values: &mut dyn Iterator<Item = ValueId>| values.fold(0_u64, |all, v| all.saturating_add(size(v)));
    let mut alive = sum(&mut graph.inputs().iter().copied());
    let mut most = alive;
    for (at, (_, node)) in graph.nodes().enumerate() {
        alive = alive.saturating_add(sum(&mut node.outputs.iter().flatten().copied()));
        most = most.max(alive);
        alive = alive.saturating_sub(sum(&mut ending.get(&at).into_iter().flatten().copied()));
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Attrs, Builder, Node, OpKey};
    use crate::tensor::DType;

    #[test]
    fn a_chain_holds_two_tensors_at_once() {
        let mut builder = Builder::new("chain", "");
        let open = TensorType::new(Some(DType::F32), Some(vec![Dim::Unknown, Dim::Known(4)]));
        let mut last = builder.input("x", Type::Tensor(open)).unwrap();
        for name in ["a", "b", "y"] {
            let output = builder.value(name);
            let op = OpKey { domain: "".into(), name: "Relu".into(), opset: 21 };
            let (inputs, outputs) = (vec![Some(last)], vec![Some(output)]);
            builder
                .node(Node {
                    name: name.into(),
                    op,
                    inputs,
                    outputs,
                    attrs: Attrs::new(),
                    bodies: Vec::new(),
                    notes: None,
                })
                .unwrap();
            last = output;
        }
        builder.output("y");
        let graph = builder.finish().unwrap();
        let sample = [Tensor::of([8, 4], vec![0.0_f32; 32])];
        let bytes = of(&graph, &sample);
        assert!(bytes.values().all(|&n| n == 128) && bytes.len() == 4, "{bytes:?}");
        assert_eq!(alive_at_once(&graph, &bytes), 256);
    }
}
