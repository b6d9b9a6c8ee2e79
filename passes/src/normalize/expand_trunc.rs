//! `Trunc` of QONNX as the arithmetic that it stands for.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::absorb_qonnx::{encoding_of, one};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Patch};
use crate::ops;
use crate::tensor::Tensor;
use crate::trunc;

/// The encodings of means that were found to be cut off.
pub(super) type Cut = BTreeMap<ValueId, Encoding>;

/// `Trunc` takes low bits away: `f(round(x / scale + zero) / 2^bits)`, back at a scale. Version 1 keeps the scale of its input and takes
/// away as many bits as the widths differ; version 2 (six inputs) names the scale of its result and cuts to its width. `None` where
/// parameters are not constant, or `f` is none of floor, ceil and rounding to even.
///
/// Source: operator definitions of qonnx 1.0.0.
pub(super) fn expand(
    graph: &Graph,
    opset: u32,
    (id, node): (NodeId, &Node),
    cut: &mut Cut,
    patch: &mut Patch,
) -> Option<()> {
    pool(graph, opset, (id, node), cut, patch).or_else(|| arithmetic(graph, opset, (id, node), patch))
}

/// A mean of codes that cuts their lowest bits off, as the shifted mean that rounds to it: see [`trunc`].
fn pool(graph: &Graph, opset: u32, (id, node): (NodeId, &Node), cut: &mut Cut, patch: &mut Patch) -> Option<()> {
    let number = |input: usize| one(graph, node, input).filter(|number| number.is_finite());
    let (scale, zero, from, to) = (number(1).filter(|scale| *scale > 0.0)?, number(2)?, number(3)?, number(4)?);
    let floor = node.text("rounding_mode", "FLOOR").eq_ignore_ascii_case("FLOOR");
    (floor && zero == 0.0 && node.inputs.len() == 5).then_some(())?;
    let (times, mul) = graph.producer(node.input(0)?).filter(|(_, mul)| mul.op.is("Mul"))?;
    let by = graph.constant_input(mul, 1)?.floats()?.first().copied()?;
    let (mean, pool) = graph.producer(mul.input(0)?)?;
    let users = Users::of(graph);
    users.only_input(pool.output(0)?)?;
    users.only_input(mul.output(0)?)?;
    let n = trunc::window(graph, pool)?;
    (by.to_bits() == (n as f32).to_bits() && (from - to).to_bits() == (n.trailing_zeros() as f32).to_bits())
        .then_some(())?;
    // Whether codes are signed is said where they are made.
    let source = pool.input(0)?;
    let made = before(graph, cut, source)?;
    let same = made.scale.len() == 1 && made.scale[0].to_bits() == scale.to_bits() && made.is_symmetric();
    let bits = (made.grid.info().bits as f32).to_bits() == to.to_bits();
    (same && bits && made.grid.info().integer).then_some(())?;
    let name = format!("{}.shift", pool.name);
    let by = patch.constant(&format!("{name}.by"), Tensor::scalar(trunc::shift(scale, n)));
    let op = OpKey { domain: "".into(), name: "Add".into(), opset };
    let inputs = vec![Some(source), Some(by)];
    let add = Node { name: name.as_str().into(), op, inputs, outputs: Vec::new(), attrs: Attrs::new(), ..pool.clone() };
    let shifted = patch.node(add, &name, graph.value(source).ty.clone(), Some(id));
    patch.replace(id, Node { inputs: vec![Some(shifted)], outputs: node.outputs.clone(), ..pool.clone() });
    patch.erase(times);
    patch.erase(mean);
    cut.insert(node.output(0)?, made.clone());
    patch.edit(Edit::Encode { site: Site::Value(node.output(0)?), encoding: made });
    Some(())
}

/// The encoding of `value`: that of the node that rounds it, or of what it is only moved out of.
fn before(graph: &Graph, cut: &Cut, mut value: ValueId) -> Option<Encoding> {
    // Nobody moves a tensor more often.
    for _ in 0..16 {
        if let Some(encoding) = cut.get(&value) {
            return Some(encoding.clone());
        }
        let (_, node) = graph.producer(value)?;
        match encoding_of(graph, node) {
            Some(encoding) => return Some(encoding),
            None if node.op.is("MaxPool") || ops::only_moves(graph, node) => value = node.input(0)?,
            None => return None,
        }
    }
    None
}

fn arithmetic(graph: &Graph, opset: u32, (id, node): (NodeId, &Node), patch: &mut Patch) -> Option<()> {
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
