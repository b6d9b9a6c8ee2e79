//! A graph written anew with channels divided.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::axes::divided_row;
use super::lanes::Lanes;
use super::region::clamp_end;
use super::taps::{Taps, divided_bias, is_finite};
use crate::id::{NodeId, ValueId};
use crate::ir::{Attrs, Node, OpKey};
use crate::model::{Edit, Model, Patch, Statistic};
use crate::tensor::Tensor;

/// Divides the channels of every class by `s`; `None` where a constant does not take it: the patch is of no use then.
pub(super) fn rescale(model: &Model, lanes: &Lanes<'_>, s: &[f64], patch: &mut Patch) -> Option<()> {
    let (graph, mut renewed) = (model.graph(), BTreeMap::<ValueId, ValueId>::new());
    for (id, node) in graph.nodes() {
        let divided = node.output(0).and_then(|value| lanes.divisor(value, s));
        if divided.is_none() && !node.inputs.iter().flatten().any(|value| renewed.contains_key(value)) {
            continue;
        }
        let mut copy = node.clone();
        for (input, tensor) in constants(lanes, (id, node), divided.as_ref(), s)? {
            let name = format!("{}.equalized", graph.value(node.input(input)?).name);
            copy.inputs[input] = Some(patch.constant(&name, tensor));
        }
        for input in copy.inputs.iter_mut().flatten() {
            *input = renewed.get(input).copied().unwrap_or(*input);
        }
        let Some((axis, divisor)) = divided else {
            // A linear node that multiplies again what it reads.
            patch.replace(id, copy);
            continue;
        };
        let output = node.output(0)?;
        let value = graph.value(output);
        patch.erase(id);
        let new = if clamp_end(graph, node).is_some_and(f64::is_finite) {
            bounded(lanes, (id, copy), (axis, &divisor), patch)?
        } else {
            patch.node(copy, &format!("{}.equalized", value.name), value.ty.clone(), Some(id))
        };
        renewed.insert(output, new);
        let trained = model.stats().trained(output).filter(|_| axis == 1);
        if let Some(trained) = trained.and_then(|trained| trained.divided(&divisor)) {
            patch.edit(Edit::Record { value: new, statistic: Statistic::Trained(Arc::new(trained)) });
        }
    }
    Some(())
}

/// An axis, and what every index on it is divided by.
type Divided = (usize, Vec<f64>);

/// The constants that `node` reads instead, with their inputs, when what it returns is `own`: weight and bias of a linear one, operands of a
/// sum.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn constants(
    lanes: &Lanes<'_>,
    (id, node): (NodeId, &Node),
    own: Option<&Divided>,
    s: &[f64],
) -> Option<Vec<(usize, Tensor)>> {
    let graph = lanes.graph;
    if let Some(taps) = Taps::of(graph, &lanes.users, id) {
        let read = lanes.divisor(node.input(0)?, s);
        let at = |side: Option<&Divided>, channel: usize| side.map_or(1.0, |(_, divisor)| divisor[channel]);
        let weight = graph.constant_input(node, 1)?;
        let scaled = |(index, w): (usize, &f32)| {
            let (o, j) = taps.at(index);
            (f64::from(*w) * at(read.as_ref(), j) / at(own, o)) as f32
        };
        let values: Vec<f32> = weight.floats()?.iter().enumerate().map(scaled).collect();
        values.iter().all(|v| v.is_finite()).then_some(())?;
        let bias = own.and_then(|(_, divisor)| Some((2, divided_bias(graph, node, divisor)?)));
        bias.iter().all(|(_, bias)| is_finite(bias)).then_some(())?;
        return Some([(1, Tensor::of(weight.shape(), values))].into_iter().chain(bias).collect());
    }
    let joins = ["Add", "Sub", "Sum", "Min", "Max"].iter().any(|op| node.op.is(op));
    let Some((axis, divisor)) = own.filter(|_| joins) else { return Some(Vec::new()) };
    let place = (graph.value(node.output(0)?).ty.rank()?, *axis);
    let constant = |input: usize| Some((input, graph.constant_input(node, input)?));
    let divided = |(input, constant): (usize, &Arc<Tensor>)| {
        let divided = divided_row(constant, place, divisor)?;
        (is_finite(&divided) || !is_finite(constant)).then_some((input, divided))
    };
    (0..node.inputs.len()).filter_map(constant).map(divided).collect()
}

/// The clamp `clamp`, from 0 on, so that it ends at its end over `divisor[j]` in channel j: it keeps the largest end, and a `Min` behind it
/// has all of them.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn bounded(
    lanes: &Lanes<'_>,
    (id, mut clamp): (NodeId, Node),
    (axis, divisor): (usize, &[f64]),
    patch: &mut Patch,
) -> Option<ValueId> {
    let graph = lanes.graph;
    let node = graph.node(id)?;
    let (high, value) = (clamp_end(graph, node)?, graph.value(node.output(0)?));
    let ends = divided_row(&Tensor::scalar(high as f32), (value.ty.rank()?, axis), divisor)?;
    let top = ends.floats()?.iter().copied().fold(0.0_f32, f32::max);
    clamp.inputs[2] = Some(patch.constant(&format!("{}.high", clamp.name), Tensor::scalar(top)));
    // One `Min` is enough: where each of its ends lies within the clamp's, it does so once both are divided.
    let ended = lanes.users.only_input(node.output(0)?).and_then(|(reader, input)| {
        let least = graph.node(reader).filter(|reader| reader.op.is("Min") && reader.inputs.len() == 2)?;
        let ends = graph.constant_input(least, 1_usize.checked_sub(input.into())?)?;
        ends.floats()?.iter().all(|end| f64::from(*end) <= high).then_some(())
    });
    if ended.is_some() {
        return Some(patch.node(clamp, &format!("{}.equalized", value.name), value.ty.clone(), Some(id)));
    }
    let op = OpKey { name: "Min".into(), ..clamp.op.clone() };
    let name = format!("{}.ends", clamp.name);
    let clamped = patch.node(clamp, &format!("{}.clamped", value.name), value.ty.clone(), Some(id));
    let inputs = vec![Some(clamped), Some(patch.constant(&name, ends))];
    let least = Node {
        name: name.into(),
        op,
        inputs,
        outputs: Vec::new(),
        attrs: Attrs::new(),
        bodies: Vec::new(),
        notes: None,
    };
    Some(patch.node(least, &format!("{}.equalized", value.name), value.ty.clone(), Some(id)))
}
