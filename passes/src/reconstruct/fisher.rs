//! How much what the model returns depends on every weight: the diagonal of the Fisher information.
//!
//! A change e of the weights costs about Σ Fᵢ eᵢ² at the outputs, with F the mean square over samples of gradients that are drawn so that
//! their second moment at an output is that of its error (see `Measure::drawn`): divergence where outputs are logits, squares elsewhere.
//! Every batch goes forward and back once and tells it of all weights, where a probe per weight runs the model as often as there are weights.
//!
//! Source: Amari 1998, Neural Computation 10(2), section 2; as a sensitivity Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852; the true
//! distribution instead of labels after Kunstner et al. 2019, arXiv:1905.12558, section 2; random signs after Hutchinson 1990.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::block::Also;
use super::chain::{Chain, FLOAT, Pull};
use super::measure::Wish;
use super::objective::LANES;
use super::run::{Gradients, add};
use crate::grad::GradError;
use crate::id::Site;
use crate::model::Model;
use crate::pass::{PassContext, PassError};
use crate::{rounding, seed};

/// The most weights of neighboring blocks whose tape is held at once.
const LAYERS: usize = 4;
/// Gradients are drawn from this.
const SEED: u64 = 0xf15_4e12;

/// What a squared change of each element of a weight costs, in the order of storage.
pub(crate) type Fisher = BTreeMap<Site, Vec<f32>>;

/// Per weight that the plan of `model` encodes, what a squared change of each element costs, measured on at most so many `samples` of
/// the data; or why gradients cannot tell. Reported to the progress of `cx` as `stage`.
///
/// # Errors
/// [`PassError`] without samples, when the model does not run, or when the user interrupts.
pub(crate) fn fisher(
    model: &Model,
    cx: &PassContext<'_>,
    samples: usize,
    stage: &str,
) -> Result<Result<Fisher, String>, PassError> {
    let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
    // Which weights count: those with codes, whatever these are.
    let rounded = rounding::in_nearest(model)?;
    let chain = match Chain::of(model.graph(), rounded.plan(), cx, (LAYERS, samples), also, Wish::Fitting)? {
        Ok(chain) => chain,
        Err(reason) => return Ok(Err(reason)),
    };
    if let Err(reason) = fits(&chain, cx) {
        return Ok(Err(reason));
    }
    let all: Vec<usize> = (0..chain.samples()).collect();
    cx.progress.begin(stage, all.chunks(LANES).len() as u64);
    let squares = squares(&chain, cx, &all);
    cx.progress.end();
    if cx.progress.cancelled() {
        return Err(PassError::Interrupted);
    }
    Ok(squares.map_err(|error| error.to_string()).and_then(|squares| means(&chain, squares)))
}

/// Whether memory holds a number per weight beside the gradients of one block.
fn fits(chain: &Chain, cx: &PassContext<'_>) -> Result<(), String> {
    let of_links =
        chain.links.iter().map(|link| link.program.weights.iter().map(|(.., w)| w.len() as u64).sum::<u64>());
    let (all, largest) = of_links.fold((0, 0), |(all, largest): (u64, u64), n| (all + n, largest.max(n)));
    let needed = 4 * (all + largest * (LANES as u64 + 1));
    let left = cx.state_budget.saturating_add(cx.pair_budget);
    if needed <= left {
        return Ok(());
    }
    Err(format!("what they tell of every weight takes {} MB, and {} MB are left", needed / 1_000_000, left / 1_000_000))
}

/// Block by block and weight by weight, the sums of squared gradients over the samples in `all`.
fn squares(chain: &Chain, cx: &PassContext<'_>, all: &[usize]) -> Result<Vec<Vec<Vec<f32>>>, GradError> {
    let mut sums: Vec<Vec<Vec<f32>>> =
        chain.links.iter().map(|link| vec![Vec::new(); link.program.weights.len()]).collect();
    for batch in all.chunks(LANES) {
        if cx.progress.cancelled() {
            break;
        }
        let mut leaves = |at: usize, _: bool| Ok(chain.links[at].program.float_leaves());
        let mut see = |at: usize, squares: Gradients| {
            let weights = sums[at].par_iter_mut().zip(squares.weights).filter(|(_, square)| !square.is_empty());
            weights.for_each(|(sum, square)| add(sum, square.into_iter()));
            Ok(())
        };
        chain.sweep(batch, FLOAT, Pull::Drawn(seed::mixed(SEED)), &mut leaves, &mut see)?;
        cx.progress.step();
    }
    Ok(sums)
}

/// The means of `squares` over the samples of `chain`, or why they tell nothing.
fn means(chain: &Chain, squares: Vec<Vec<Vec<f32>>>) -> Result<Fisher, String> {
    let n = chain.samples() as f32;
    let mut fisher = Fisher::new();
    for (link, squares) in chain.links.iter().zip(squares) {
        for ((_, site, _), mut squares) in link.program.weights.iter().zip(squares) {
            squares.iter_mut().for_each(|square| *square /= n);
            fisher.insert(*site, squares);
        }
    }
    let mut costs = fisher.values().flatten();
    if !costs.clone().all(|cost| cost.is_finite()) {
        return Err("its gradients are no numbers".into());
    }
    if costs.all(|cost| *cost == 0.0) {
        return Err("all of its gradients are 0".into());
    }
    Ok(fisher)
}
