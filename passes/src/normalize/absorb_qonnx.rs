//! What `Quant`, `IntQuant`, `BipolarQuant` and `FloatQuant` of the QONNX dialect say.

use std::collections::BTreeMap;

use crate::encoding::{Encoding, Granularity};
use crate::grid::{self, Grid};
use crate::id::{Site, ValueId};
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// The domains that the operators are written in; exporters of training tools use the second.
pub(super) const DOMAINS: [&str; 2] = [crate::ops::QONNX_DOMAIN, "onnx.brevitas"];

/// The encoding that `node` rounds its input with, where it is such an operator and all its parameters are constants that a grid here
/// has: ties to even, whole zero points, one scale in all or per index of one axis.
pub(super) fn encoding_of(graph: &Graph, node: &Node) -> Option<Encoding> {
    let known = DOMAINS.contains(&&*node.op.domain);
    let rounds = node.text("rounding_mode", "ROUND");
    let even = rounds.eq_ignore_ascii_case("ROUND") || rounds.eq_ignore_ascii_case("HALF_EVEN");
    if !known || !even {
        return None;
    }
    let scale = floats(graph, node, 1)?;
    let shape = graph.constant_input(node, 1)?.shape();
    let rank = graph.value(node.input(0)?).ty.rank().or_else(|| scale_is_one(shape).then_some(shape.len()))?;
    let granularity = granularity(shape, rank)?;
    let (grid, zero_point) = match &*node.op.name {
        "Quant" | "IntQuant" => {
            let zero = floats(graph, node, 2)?;
            let like_scales = graph.constant_input(node, 2).is_some_and(|zero| zero.shape() == shape);
            (zero.len() == 1 || like_scales).then_some(())?;
            let zero = if zero.len() == 1 { vec![zero[0]; scale.len()] } else { zero };
            (integers(graph, node)?, zero.into_iter().map(whole).collect::<Option<Vec<i32>>>()?)
        }
        "BipolarQuant" => (grid::find("bipolar")?, vec![0; scale.len()]),
        "FloatQuant" => (float(graph, node)?, vec![0; scale.len()]),
        _ => return None,
    };
    let sound = scale.iter().all(|s| s.is_finite() && *s > 0.0) && scale.len() == zero_point.len();
    sound.then(|| Encoding { grid, granularity, scale: scale.into(), zero_point: zero_point.into() })
}

fn floats(graph: &Graph, node: &Node, input: usize) -> Option<Vec<f32>> {
    let tensor = graph.constant_input(node, input).filter(|tensor| tensor.dtype() == DType::F32)?;
    (!tensor.is_empty()).then(|| tensor.floats().map(std::borrow::Cow::into_owned))?
}

fn scale_is_one(shape: &[usize]) -> bool {
    shape.iter().all(|dim| *dim == 1)
}

/// One number, a float or a whole one.
pub(super) fn one(graph: &Graph, node: &Node, input: usize) -> Option<f32> {
    let whole = graph.constant_input(node, input).and_then(|tensor| tensor.integers());
    let whole = whole.map(|values| values.into_iter().map(|value| value as f32).collect::<Vec<_>>());
    floats(graph, node, input).or(whole).filter(|values| values.len() == 1)?.first().copied()
}

/// Who shares a scale of this shape, which broadcasts against the tensor from the back.
fn granularity(shape: &[usize], rank: usize) -> Option<Granularity> {
    let missing = rank.checked_sub(shape.len())?;
    let mut long = shape.iter().enumerate().filter(|(_, dim)| **dim != 1).map(|(axis, _)| missing + axis);
    match (long.next(), long.next()) {
        (None, _) => Some(Granularity::Tensor),
        (Some(axis), None) => Some(Granularity::Axis(axis)),
        _ => None,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "whole numbers below 2^24")]
fn whole(number: f32) -> Option<i32> {
    (number.fract() == 0.0 && number.abs() < 16_777_216.0).then_some(number as i32)
}

/// The integers of a `Quant`. Constants of two bits lie in four, as everywhere here.
fn integers(graph: &Graph, node: &Node) -> Option<&'static dyn Grid> {
    let bits = u32::try_from(whole(one(graph, node, 3)?)?).ok()?;
    let (signed, narrow) = (node.int("signed", 1) != 0, node.int("narrow", 0) != 0);
    let name = match (signed, narrow) {
        (true, true) => format!("int{bits}-narrow"),
        (true, false) => format!("int{bits}"),
        (false, false) => format!("uint{bits}"),
        (false, true) => return None,
    };
    let constant = graph.constant_input(node, 0).is_some();
    let name = match (constant, bits) {
        (true, 2) if !narrow => format!("{name}-in-4"),
        (false, 2 | 3) if !narrow => format!("{name}-in-8"),
        _ => name,
    };
    grid::find(&name)
}

/// The floating-point numbers of a `FloatQuant`.
fn float(graph: &Graph, node: &Node) -> Option<&'static dyn Grid> {
    let [exponent, mantissa, bias] = [2, 3, 4].map(|input| one(graph, node, input).and_then(whole));
    let (exponent, mantissa, bias) = (u32::try_from(exponent?).ok()?, u32::try_from(mantissa?).ok()?, bias?);
    let largest = f64::from(one(graph, node, 5)?);
    let alike = |grid: &&'static dyn Grid| {
        let same = |f: grid::FloatFormat| (f.exponent, f.mantissa, f.bias) == (exponent, mantissa, bias);
        grid.float_format().is_some_and(same) && (grid.range().1 - largest).abs() < f64::EPSILON * largest
    };
    (node.int("has_subnormal", 1) != 0 && node.int("saturation", 1) != 0).then(|| grid::all().find(alike))?
}

/// The codes of the constant that `node` rounds.
pub(super) fn codes(graph: &Graph, node: &Node, encoding: &Encoding) -> Option<Tensor> {
    let values = graph.constant_input(node, 0).filter(|tensor| tensor.dtype() == DType::F32)?;
    encoding.encode(&values.floats()?, values.shape()).ok()
}

/// Encodes what is only moved out of a tensor with an encoding as that is: the dialect does not say it twice.
pub(super) fn carry(model: &Model, patch: &mut Patch) {
    let (graph, plan) = (model.graph(), model.plan());
    let mut carried: BTreeMap<ValueId, &Encoding> = BTreeMap::new();
    for (_, node) in graph.nodes().filter(|(_, node)| ops::only_moves(graph, node)) {
        let (Some(source), Some(result)) = (node.input(0), node.output(0)) else { continue };
        let encoding = plan.encoding(Site::Value(source)).or_else(|| carried.get(&source).copied());
        let Some(encoding) = encoding.filter(|encoding| encoding.granularity == Granularity::Tensor) else { continue };
        if plan.encoding(Site::Value(result)).is_none() && !graph.outputs().contains(&result) {
            carried.insert(result, encoding);
            patch.edit(Edit::Encode { site: Site::Value(result), encoding: encoding.clone() });
        }
    }
}
