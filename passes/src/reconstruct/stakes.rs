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
use crate::grad::{Array, Slot, Values};
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
    let layers = |link: &Link| {
        let results = link.program.weights.iter().zip(&link.program.results);
        let layer = |((_, site, _), slot): (&(_, Site, _), &Slot)| match site {
            Site::Use { node, .. } => Some((*node, *slot)),
            Site::Value(_) => None,
        };
        results.filter_map(layer).collect()
    };
    let rows = |node: NodeId, grad: &Array<f32>| rows(model.graph(), node, grad);
    let draw = Draw { layers: LAYERS, draws, stage, what: "row of all layers" };
    draw.squares(model, cx, &layers, &rows)
}

/// How gradients are drawn, and what is kept of them.
pub(super) struct Draw<'a> {
    /// The most weights of neighboring blocks whose tape is held at once.
    pub(super) layers: usize,
    /// So often, for every sample.
    pub(super) draws: usize,
    /// What progress calls it.
    pub(super) stage: &'a str,
    /// What a number is kept of, for messages.
    pub(super) what: &'static str,
}

/// Squared gradients, by what they are of and by sample.
type Squares<K> = BTreeMap<K, Vec<Vec<f32>>>;

/// What is kept of what arrives at a key; nothing where it does not count.
type Kept<'a, K> = &'a (dyn Fn(K, &Array<f32>) -> Option<Vec<f32>> + Sync);

impl Draw<'_> {
    /// For everything in the slots that `wanted` names, sample by sample, what `kept` makes of the squared gradients that arrive there,
    /// summed over the draws; left out where they are no numbers or all 0. Or why gradients cannot tell.
    ///
    /// # Errors
    /// [`PassError`] without samples, when the model does not run, or when the user interrupts.
    pub(super) fn squares<K: Copy + Ord + Send>(
        &self,
        model: &Model,
        cx: &PassContext<'_>,
        wanted: &(dyn Fn(&Link) -> Vec<(K, Slot)> + Sync),
        kept: Kept<'_, K>,
    ) -> Result<Result<Squares<K>, String>, PassError> {
        let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
        let rounded = rounding::in_nearest(model)?;
        let samples = cx.dataset.map_or(0, Dataset::len);
        let size = (self.layers, samples);
        let mut chain = match Chain::for_draws(model.graph(), rounded.plan(), cx, size, also, Wish::Fitting)? {
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
        // The squares are looked at as they come.
        if let Err(reason) = chain.fit_draws(cx, (0, 0)) {
            return Ok(Err(reason));
        }
        let all: Vec<usize> = (0..samples).collect();
        let squares = Mutex::new(Squares::<K>::new());
        let slots = |link: &Link| wanted(link).into_iter().map(|(_, slot)| slot).collect();
        let see = |link: &Link, sample: usize, _: &Values<f32>, grads: Arrived| {
            for ((of, _), grad) in wanted(link).into_iter().zip(grads) {
                let Some(numbers) = grad.and_then(|grad| kept(of, &grad)) else { continue };
                let mut squares = squares.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let sum = &mut squares.entry(of).or_insert_with(|| vec![Vec::new(); samples])[sample];
                super::run::add(sum, numbers.into_iter());
            }
        };
        cx.progress.begin(self.stage, (self.draws * all.chunks(LANES).len()) as u64);
        for draw in 0..self.draws as u64 {
            for batch in all.chunks(LANES) {
                if cx.progress.cancelled() {
                    return Err(PassError::Interrupted);
                }
                if let Some(reason) = self.crowded(&squares, samples, cx) {
                    return Ok(Err(reason));
                }
                if let Err(error) = chain.trace(batch, seed::mixed(SEED ^ draw), &slots, &see) {
                    return Ok(Err(error.to_string()));
                }
                cx.progress.step();
            }
        }
        cx.progress.end();
        let squares = squares.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(Ok(squares.into_iter().filter(|(_, samples)| tells(samples)).collect()))
    }

    /// Why memory does not hold the squares of all `samples`, by those that there are.
    fn crowded<K>(&self, squares: &Mutex<Squares<K>>, samples: usize, cx: &PassContext<'_>) -> Option<String> {
        let squares = squares.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let seen = squares.values().map(|all| all.iter().filter(|one| !one.is_empty()).count()).max().unwrap_or(0);
        let numbers: usize = squares.values().flatten().map(Vec::len).sum();
        // They are kept twice: in what rows or errors weigh as well.
        let needed = 8 * (numbers / seen.max(1)) as u64 * samples as u64;
        let left = cx.state_budget.saturating_add(cx.pair_budget);
        (needed > left).then(|| {
            format!(
                "a number per {} takes {} MB for {samples} samples, and {} MB are left: pass fewer with --samples",
                self.what,
                needed / 1_000_000,
                left / 1_000_000
            )
        })
    }
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
