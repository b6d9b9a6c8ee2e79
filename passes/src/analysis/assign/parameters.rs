//! How weights and biases of linear nodes are written.

use std::sync::Arc;

use super::{Goal, weights};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::Encoding;
use crate::grid::{self, Grid};
use crate::id::{NodeId, Site};
use crate::ir::Node;
use crate::model::{Edit, Model};
use crate::ops;
use crate::target::Bias;
use crate::tensor::Tensor;

/// A 32-bit bias is kept this far from saturation.
const BIAS_LIMIT: f64 = (1_u64 << 30) as f64;

/// The encoding of the weight of the linear node `id`, whose activation stays in float.
pub(super) fn weight_alone(model: &Model, id: NodeId, goal: &Goal) -> Option<Edit> {
    let graph = model.graph();
    let (node, roles) = (graph.node(id)?, ops::linear(graph, id)?);
    let encoding = of_weight(graph.constant_input(node, roles.weight.into())?, node, roles.out_axis, goal)?;
    Some(Edit::Encode { site: Site::Use { node: id, input: roles.weight }, encoding })
}

/// The encoding of `weight`, that of `node` or one in its place, beside an activation in float.
pub(super) fn of_weight(weight: &Tensor, node: &Node, out_axis: usize, goal: &Goal) -> Option<Encoding> {
    let block = goal.scheme.block_format().map(|format| format.size).or(goal.scheme.block);
    let inputs = weight.shape().get(1 - out_axis).copied().unwrap_or(1).max(1);
    Some(match block {
        Some(size) => weights::blocked(weight, 1 - out_axis, size.min(inputs), goal)?,
        None if goal.scheme.asymmetric => weights::blocked(weight, 1 - out_axis, inputs, goal)?,
        None => {
            let scales = weights::scales(weight, out_axis, goal.by_channel(node), goal)?;
            #[expect(clippy::cast_possible_truncation, reason = "scales are used as f32")]
            per_channel(goal.weight_grid, out_axis, scales.into_iter().map(|s| s as f32).collect())
        }
    })
}

pub(super) struct Parameters {
    pub(super) edits: Vec<Edit>,
    pub(super) note: Option<Diagnostic>,
}

/// The encodings of weight and bias of the linear node `id`, which reads its activation at `input_scale`.
#[expect(clippy::cast_possible_truncation, reason = "scales are rounded to f32 once")]
pub(super) fn parameters(model: &Model, id: NodeId, input_scale: f32, goals: &Goal) -> Option<Parameters> {
    let graph = model.graph();
    let node = graph.node(id)?;
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(node, roles.weight.into())?;
    let input_scale = f64::from(input_scale);
    let ranges = weights::ranges(weight, roles.out_axis, goals.by_channel(node), goals)?;
    let mut scales: Vec<f64> = ranges.iter().map(|(scale, _)| *scale).collect();
    // Only sums of integers are integers: other formats leave the bias in float.
    let integer =
        goals.weight_grid.info().integer && goals.activation_grid().info().integer && goals.accepts.bias == Bias::Int32;
    let bias = roles.bias.filter(|_| integer).and_then(|bias| graph.constant_input(node, bias.into()));
    let raised = match bias {
        Some(bias) => raise_for_bias(&mut scales, &bias.floats()?, input_scale),
        None => 0,
    };
    if goals.scheme.power_of_two && raised > 0 {
        scales.iter_mut().for_each(|scale| *scale = weights::powers_of_two(*scale)[1]);
    }
    let zeros: Vec<i32> = ranges.iter().zip(&scales).map(|(chosen, scale)| zero_at(*scale, *chosen)).collect();
    let weight_scales: Vec<f32> = scales.iter().map(|&s| s as f32).collect();
    let encoding = per_channel(goals.weight_grid, roles.out_axis, weight_scales.clone());
    let mut edits = vec![Edit::Encode {
        site: Site::Use { node: id, input: roles.weight },
        encoding: Encoding { zero_point: zeros.into(), ..encoding },
    }];
    if let (Some(input), Some(bias)) = (roles.bias, bias) {
        // Exactly the f32 product: runtimes check it, or ignore what is stored and use it.
        let products = weight_scales.iter().map(|&s| input_scale as f32 * s).collect();
        let axis = bias.shape().len().saturating_sub(1);
        edits
            .push(Edit::Encode { site: Site::Use { node: id, input }, encoding: per_channel(int32(), axis, products) });
    }
    let note = (raised > 0).then(|| {
        let message = format!("the weight scale of {raised} channels was raised so that their bias fits 32 bits");
        Diagnostic::new(diag::BIAS_SATURATED, Severity::Warning, Place::Node(Arc::clone(&node.name)), message)
    });
    Some(Parameters { edits, note })
}

/// Per channel, or per tensor where there is one scale: many readers take a vector of one for a scalar.
fn per_channel(grid: &'static dyn Grid, axis: usize, scales: Vec<f32>) -> Encoding {
    match scales.as_slice() {
        [one] => Encoding::per_tensor(grid, *one, 0),
        _ => Encoding::per_axis(grid, axis, scales),
    }
}

/// The code of 0 at `scale` for a range that begins where it did at the scale and the zero point that were `chosen`, on codes from 0 on.
#[expect(
    clippy::cast_possible_truncation,
    reason = "scales are raised, so that zero points of a few bits come nearer to 0"
)]
fn zero_at(scale: f64, chosen: (f64, i32)) -> i32 {
    (f64::from(chosen.1) * chosen.0 / scale).round_ties_even() as i32
}

/// Raises scales until every bias fits, with room, at input scale times weight scale; returns how many were raised.
fn raise_for_bias(scales: &mut [f64], bias: &[f32], input_scale: f64) -> usize {
    let mut raised = 0;
    let largest = [bias.iter().fold(0.0_f32, |most, b| most.max(b.abs()))];
    let bias = if scales.len() == 1 { &largest } else { bias };
    for (scale, &bias) in scales.iter_mut().zip(bias) {
        let least =
            (f64::from(bias).abs() / (input_scale * BIAS_LIMIT)).max(f64::from(f32::MIN_POSITIVE) / input_scale);
        if *scale < least {
            *scale = least;
            raised += 1;
        }
    }
    raised
}

fn int32() -> &'static dyn Grid {
    grid::find("int32").unwrap_or_else(|| unreachable!("the grid table has int32"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::uniform;

    #[test]
    fn a_large_bias_raises_the_weight_scale() {
        // 1e6 / (1e-3 · 1e-9) = 1e18 steps do not fit 32 bits; at 2^30 steps the scale is 1e6 / (1e-3 · 2^30).
        let mut scales = [1e-9, 1.0];
        assert_eq!(raise_for_bias(&mut scales, &[1e6, 1.0], 1e-3), 1);
        assert!((scales[0] - 1e6 / (1e-3 * 1_073_741_824.0)).abs() < 1e-6);
        assert!((scales[1] - 1.0).abs() < 1e-12);
        // One scale for all has to hold the largest.
        let mut one = [1e-9];
        assert_eq!(raise_for_bias(&mut one, &[0.0, -1e6], 1e-3), 1);
        assert!((one[0] - 1e6 / (1e-3 * 1_073_741_824.0)).abs() < 1e-6);
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "zero points of four bits; any bias will do")]
    fn ranges_of_raised_scales_begin_where_they_did() {
        assert_eq!(zero_at(0.0, (0.0, 0)), 0, "a channel of zeros");
        for seed in 0..200 {
            let drawn = |what: u64| uniform(seed << 8 | what);
            let (scale, zero) = (0.01 + drawn(0), (drawn(1) * 15.0).round_ties_even() as i32);
            assert_eq!(zero_at(scale, (scale, zero)), zero, "not raised");
            let mut raised = [scale];
            raise_for_bias(&mut raised, &[1e6 * drawn(2) as f32], 1e-3);
            let (raised, moved) = (raised[0], zero_at(raised[0], (scale, zero)));
            assert!((0..=zero).contains(&moved));
            let begins = |scale: f64, zero: i32| -f64::from(zero) * scale;
            let off = begins(raised, moved) - begins(scale, zero);
            assert!(off.abs() <= 0.5 * raised + 1e-12, "{scale} {zero}: {raised} {moved}");
            let ends = |scale: f64, zero: i32| f64::from(15 - zero) * scale;
            assert!(
                ends(raised, moved) >= ends(scale, zero) - 0.5 * raised - 1e-12,
                "{scale} {zero}: {raised} {moved}"
            );
        }
    }
}
