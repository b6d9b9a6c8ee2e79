//! How much what the model returns depends on every row of what its layers compute.
//!
//! Gradients are drawn at the outputs so that their second moment is that of an error there (see `Measure::drawn`) and go back through
//! the float model once. The square of what arrives at a row of a layer's result, summed over channels, is what a unit of squared error in
//! that row costs at the outputs, channels and rows taken as independent: E\[‖g‖² x xᵀ\] is then the curvature of what the model returns,
//! where E\[x xᵀ\] is that of what the layer returns.
//!
//! Source: Edalati et al. 2024 (OAC), arXiv:2405.15025, section 3, with rows independent, so that a number per row is all that is kept.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::block::Also;
use super::chain::{Arrived, Chain, Link};
use super::measure::Wish;
use super::objective::LANES;
use crate::exec::Dataset;
use crate::grad::Array;
use crate::id::{NodeId, Site};
use crate::ir::Graph;
use crate::model::Model;
use crate::ops;
use crate::pass::{PassContext, PassError};
use crate::{rounding, seed};

/// The most weights of neighboring blocks whose tape is held at once.
const LAYERS: usize = 4;
/// Gradients are drawn from this.
const SEED: u64 = 0x57a_4e5;

/// Per layer and sample, of every row of its result (in the order of storage, channels left out), the squared gradient.
pub(crate) type Stakes = BTreeMap<NodeId, Vec<Vec<f32>>>;

/// The stakes of all layers with an encoded weight, from so many `draws` of gradients; or why gradients cannot tell. Reported to the
/// progress of `cx` as `stage`.
///
/// # Errors
/// [`PassError`] without samples, when the model does not run, or when the user interrupts.
pub(crate) fn stakes(
    model: &Model,
    cx: &PassContext<'_>,
    draws: usize,
    stage: &str,
) -> Result<Result<Stakes, String>, PassError> {
    let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
    let rounded = rounding::in_nearest(model)?;
    let samples = cx.dataset.map_or(0, Dataset::len);
    let chain = match Chain::of(model.graph(), rounded.plan(), cx, (LAYERS, samples), also, Wish::Fitting)? {
        Ok(chain) => chain,
        Err(reason) => return Ok(Err(reason)),
    };
    if chain.samples() < samples {
        let reason = format!(
            "memory holds what {} of {samples} samples need: allow more with --max-memory, or pass fewer with --samples",
            chain.samples()
        );
        return Ok(Err(reason));
    }
    let all: Vec<usize> = (0..samples).collect();
    let stakes = Mutex::new(Stakes::new());
    let graph = model.graph();
    let see = |link: &Link, sample: usize, grads: Arrived| {
        let layers = link.program.weights.iter().filter_map(|(_, site, _)| match site {
            Site::Use { node, .. } => Some(*node),
            Site::Value(_) => None,
        });
        for (node, grad) in layers.zip(grads) {
            let Some(rows) = grad.and_then(|grad| rows(graph, node, &grad)) else { continue };
            let mut stakes = stakes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let of_layer = &mut stakes.entry(node).or_insert_with(|| vec![Vec::new(); samples])[sample];
            super::run::add(of_layer, rows.into_iter());
        }
    };
    cx.progress.begin(stage, (draws * all.chunks(LANES).len()) as u64);
    for draw in 0..draws as u64 {
        for batch in all.chunks(LANES) {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            if let Some(reason) = crowded(&stakes, samples, cx) {
                return Ok(Err(reason));
            }
            if let Err(error) = chain.trace(batch, seed::mixed(SEED ^ draw), &see) {
                return Ok(Err(error.to_string()));
            }
            cx.progress.step();
        }
    }
    cx.progress.end();
    let stakes = stakes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(Ok(stakes.into_iter().filter(|(_, samples)| tells(samples)).collect()))
}

/// Why memory does not hold a number per row of all layers and `samples`, by those that there are.
fn crowded(stakes: &Mutex<Stakes>, samples: usize, cx: &PassContext<'_>) -> Option<String> {
    let stakes = stakes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let seen = stakes.values().map(|all| all.iter().filter(|rows| !rows.is_empty()).count()).max().unwrap_or(0);
    let numbers: usize = stakes.values().flatten().map(Vec::len).sum();
    // They are kept twice while roots are made of them.
    let needed = 8 * (numbers / seen.max(1)) as u64 * samples as u64;
    let left = cx.state_budget.saturating_add(cx.pair_budget);
    (needed > left).then(|| {
        format!(
            "a number per row of all layers takes {} MB for {samples} samples, and {} MB are left: pass fewer with --samples",
            needed / 1_000_000,
            left / 1_000_000
        )
    })
}

/// Whether there is something for every sample, all of it numbers and not all 0.
fn tells(samples: &[Vec<f32>]) -> bool {
    let mut all = samples.iter().flatten();
    samples.iter().all(|rows| !rows.is_empty()) && all.clone().all(|w| w.is_finite()) && all.any(|w| *w > 0.0)
}

/// The squares in `grad`, the gradient of what layer `node` computes, summed over its channels.
fn rows(graph: &Graph, node: NodeId, grad: &Array<f32>) -> Option<Vec<f32>> {
    let roles = ops::linear(graph, node)?;
    let shape = grad.shape();
    // Products have their channels last, convolutions second.
    let is_product = matches!(&*graph.node(node)?.op.name, "MatMul" | "Gemm") && roles.weight == 1;
    let axis = if is_product { shape.len().checked_sub(1)? } else { 1 };
    let channels = *shape.get(axis)?;
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    let mut rows = vec![0.0_f32; outer * inner];
    for (at, g) in grad.iter().enumerate() {
        rows[at / inner.max(1) / channels.max(1) * inner + at % inner.max(1)] += g * g;
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stakes_tell_where_all_samples_have_numbers_and_some_are_not_0() {
        assert!(tells(&[vec![0.0, 1.0], vec![0.0]]));
        assert!(!tells(&[vec![0.0; 3], vec![0.0; 2]]));
        assert!(!tells(&[vec![1.0], Vec::new()]));
        assert!(!tells(&[vec![1.0], vec![f32::NAN]]));
        assert!(!tells(&[vec![f32::INFINITY], vec![1.0]]));
        assert!(!tells(&[]));
    }
}
