//! `Trunc` of QONNX as the arithmetic that it stands for.

use std::sync::Arc;

use super::absorb_qonnx::one;
use crate::id::{NodeId, ValueId};
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::Patch;
use crate::tensor::Tensor;

/// `Trunc` takes low bits away: `f(round(x / scale + zero) / 2^bits)`, back at a scale. Version 1 keeps the scale of its input and takes
/// away as many bits as the widths differ; version 2 (six inputs) names the scale of its result and cuts to its width. `None` where
/// parameters are not constant, or `f` is none of floor, ceil and rounding to even.
///
/// Source: operator definitions of qonnx 1.0.0.
pub(super) fn expand(graph: &Graph, opset: u32, (id, node): (NodeId, &Node), patch: &mut Patch) -> Option<()> {
    let number = |input: usize| one(graph, node, input).filter(|number| number.is_finite());
    let (scale, zero, bits) = (number(1).filter(|scale| *scale > 0.0)?, number(2)?, number(3)?);
    let mode = node.text("rounding_mode", "FLOOR").to_ascii_uppercase();
    let rounding = match &*mode {
        "FLOOR" => "Floor",
        "CEIL" => "Ceil",
        "ROUND" | "HALF_EVEN" => "Round",
        _ => return None,
    };
    let (shift, to, clamp) = if node.inputs.len() > 5 {
        let (to, bits) = (number(4).filter(|scale| *scale > 0.0)?, number(5)?);
        let range = range(bits, node.int("signed", 1) != 0, node.int("narrow", 0) != 0)?;
        ((to / scale).log2().round_ties_even().exp2(), to, Some(range))
    } else {
        ((bits - number(4)?).exp2(), scale, None)
    };
    let back = if clamp.is_some() { zero / shift } else { zero };
    let mut steps: Vec<(&str, Vec<f32>)> = vec![("Div", vec![scale])];
    steps.extend((zero != 0.0).then(|| ("Add", vec![zero])));
    steps.extend([("Round", vec![]), ("Div", vec![shift])]);
    steps.extend(clamp.map(|(low, high)| ("Clip", vec![low, high])));
    steps.push((rounding, vec![]));
    steps.extend((back != 0.0).then(|| ("Sub", vec![back])));
    steps.push(("Mul", vec![to]));
    let ty = graph.value(node.output(0)?).ty.clone();
    let mut current: ValueId = node.input(0)?;
    let last = steps.len() - 1;
    for (at, (op, numbers)) in steps.into_iter().enumerate() {
        let name = format!("{}.{at}", node.name);
        let mut inputs = vec![Some(current)];
        for (which, number) in numbers.into_iter().enumerate() {
            inputs.push(Some(patch.constant(&format!("{name}.{which}"), Tensor::scalar(number))));
        }
        let op = OpKey { domain: "".into(), name: op.into(), opset };
        let plain = Node { op, inputs, attrs: Attrs::new(), ..node.clone() };
        if at == last {
            patch.replace(id, Node { name: Arc::clone(&node.name), ..plain });
        } else {
            let plain = Node { name: name.as_str().into(), outputs: Vec::new(), ..plain };
            current = patch.node(plain, &name, ty.clone(), Some(id));
        }
    }
    Some(())
}

/// The smallest and the largest integer of so many bits.
fn range(bits: f32, signed: bool, narrow: bool) -> Option<(f32, f32)> {
    let narrow = f32::from(u8::from(narrow));
    let sound = bits.fract() == 0.0 && (1.0..=24.0).contains(&bits);
    sound.then(|| {
        let half = (bits - 1.0).exp2();
        if signed { (narrow - half, half - 1.0) } else { (0.0, 2.0 * half - 1.0 - narrow) }
    })
}
