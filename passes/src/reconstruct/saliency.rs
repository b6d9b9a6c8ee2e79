//! How much what the model returns depends on every weight, from gradients: what rounding one alters costs.
//!
//! Gradients are drawn at the outputs of the float model so that their second moment there is that of an error (see `Measure::drawn`):
//! divergence where outputs are logits, squares elsewhere. No labels are needed; the divergence of a model from itself has no gradient.
//! Every batch goes forward and back once and tells it of all weights, where a probe per weight runs the model as often as there are weights.
//!
//! Source: true distribution instead of labels Kunstner et al. 2019, arXiv:1905.12558, section 2; random signs Hutchinson 1990.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::block::Also;
use super::chain::{Chain, FLOAT, Moment, Pull};
use super::measure::Wish;
use super::objective::LANES;
use super::run::{Gradients, add};
use crate::about::About;
use crate::grad::GradError;
use crate::id::Site;
use crate::model::Model;
use crate::pass::{PassContext, PassError};
use crate::{rounding, seed};

/// The most weights of neighboring blocks whose tape is held at once.
const LAYERS: usize = 4;
/// Gradients are drawn from this.
const SEED: u64 = 0xf15_4e12;

/// A way to tell from gradients what rounding costs.
#[derive(Debug)]
pub struct Saliency {
    /// Its name as a sensitivity, what it adds up, and where that is from.
    pub about: About,
    /// What is added up of gradients.
    moment: Moment,
    /// What an error costs: of the mean over samples of what was added up, the error, and the float weight.
    cost: fn(f64, f64, f64) -> f64,
}

/// What `metric=` of `allocate-bits` names besides probes.
pub static SALIENCIES: &[Saliency] = &[
    Saliency {
        about: About {
            name: "fisher",
            doc: "Σ F e² over a weight, e its rounding errors and F the mean squared gradient: the diagonal of the Fisher information. What \
                  independent errors cost at the outputs, to second order.",
            source: "Amari 1998, Neural Computation 10(2), section 2; as a sensitivity Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852",
        },
        moment: Moment::Square,
        cost: |gradient, error, _| gradient * error * error,
    },
    Saliency {
        about: About {
            name: "tacq",
            doc: "Σ A |e| |w| over a weight w, e its rounding errors and A the mean size of the gradient, sample by sample: how much a change \
                  matters, how much there is, and how large what is changed. Comparable between weights, though in no unit of loss.",
            source: "Xiao et al. 2025 (TaCQ), arXiv:2504.07389; gradients drawn instead of those of a task's answers, and sums over weights, ours",
        },
        moment: Moment::Size,
        cost: |gradient, error, weight| gradient * error.abs() * weight.abs(),
    },
    Saliency {
        about: About {
            name: "gradient-l1",
            doc: "Σ A |e| over a weight, e its rounding errors and A the mean size of the gradient, sample by sample: the most that the root of \
                  the mean error at the outputs can change on average, to first order, whatever the signs of the errors.",
            source: "Alizadeh et al. 2020, arXiv:2002.07520, with every error instead of half a step; drawn gradients ours",
        },
        moment: Moment::Size,
        cost: |gradient, error, _| gradient * error.abs(),
    },
];

/// What is added up of the gradient by each element of a weight, as a mean over samples, in the order of storage.
pub(crate) type Gradient = BTreeMap<Site, Vec<f32>>;

impl Saliency {
    /// What the `errors` of a weight with these elements cost, by its `gradient`.
    pub(crate) fn of(&self, gradient: &[f32], errors: impl Iterator<Item = f32>, weight: &[f32]) -> f64 {
        let each = gradient.iter().zip(errors).zip(weight);
        each.map(|((g, e), w)| (self.cost)(f64::from(*g), f64::from(e), f64::from(*w))).sum()
    }

    /// Per weight that the plan of `model` encodes, its gradient, measured on at most so many `samples` of the data; or why gradients
    /// cannot tell. Reported to the progress of `cx` as `stage`.
    ///
    /// # Errors
    /// [`PassError`] without samples, when the model does not run, or when the user interrupts.
    pub(crate) fn gradient(
        &self,
        model: &Model,
        cx: &PassContext<'_>,
        samples: usize,
        stage: &str,
    ) -> Result<Result<Gradient, String>, PassError> {
        let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
        // Which weights count: those with codes, whatever these are.
        let rounded = rounding::in_nearest(model)?;
        let mut chain =
            match Chain::for_draws(model.graph(), rounded.plan(), cx, (LAYERS, samples), also, Wish::Fitting)? {
                Ok(chain) => chain,
                Err(reason) => return Ok(Err(reason)),
            };
        let fitted = fits(&chain, cx).and_then(|sums| chain.fit_draws(cx, (sums, 4)));
        if let Err(reason) = fitted {
            return Ok(Err(reason));
        }
        let all: Vec<usize> = (0..chain.samples()).collect();
        cx.progress.begin(stage, all.chunks(LANES).len() as u64);
        let sums = sums(&chain, cx, self.moment, &all);
        cx.progress.end();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        Ok(sums.map_err(|error| error.to_string()).and_then(|sums| means(&chain, sums)))
    }
}

/// The bytes of a number per weight; or what is missing where memory does not hold them beside the gradients of one block.
pub(super) fn fits(chain: &Chain, cx: &PassContext<'_>) -> Result<u64, String> {
    let of_links =
        chain.links.iter().map(|link| link.program.weights.iter().map(|(.., w)| w.len() as u64).sum::<u64>());
    let (all, largest) = of_links.fold((0, 0), |(all, largest): (u64, u64), n| (all + n, largest.max(n)));
    let needed = 4 * (all + largest * (LANES as u64 + 1));
    let left = cx.state_budget.saturating_add(cx.pair_budget);
    if needed <= left {
        return Ok(4 * all);
    }
    Err(format!("what they tell of every weight takes {} MB, and {} MB are left", needed / 1_000_000, left / 1_000_000))
}

/// Block by block and weight by weight, the sums of the `moment` of gradients over the samples in `all`.
fn sums(chain: &Chain, cx: &PassContext<'_>, moment: Moment, all: &[usize]) -> Result<Vec<Vec<Vec<f32>>>, GradError> {
    let mut sums: Vec<Vec<Vec<f32>>> =
        chain.links.iter().map(|link| vec![Vec::new(); link.program.weights.len()]).collect();
    for batch in all.chunks(LANES) {
        if cx.progress.cancelled() {
            break;
        }
        let mut leaves = |at: usize, _: bool| Ok(chain.links[at].program.float_leaves());
        let mut see = |at: usize, of_batch: Gradients| {
            let weights = sums[at].par_iter_mut().zip(of_batch.weights).filter(|(_, more)| !more.is_empty());
            weights.for_each(|(sum, more)| add(sum, more.into_iter()));
            Ok(())
        };
        chain.sweep(batch, FLOAT, Pull::Drawn(seed::mixed(SEED), moment), &mut leaves, &mut see)?;
        cx.progress.step();
    }
    Ok(sums)
}

/// The means of `sums` over the samples of `chain`, or why they tell nothing.
fn means(chain: &Chain, sums: Vec<Vec<Vec<f32>>>) -> Result<Gradient, String> {
    let n = chain.samples() as f32;
    let mut gradient = Gradient::new();
    for (link, sums) in chain.links.iter().zip(sums) {
        for ((_, site, _), mut sums) in link.program.weights.iter().zip(sums) {
            sums.iter_mut().for_each(|sum| *sum /= n);
            gradient.insert(*site, sums);
        }
    }
    let mut all = gradient.values().flatten();
    if !all.clone().all(|g| g.is_finite()) {
        return Err("its gradients are no numbers".into());
    }
    if all.all(|g| *g == 0.0) {
        return Err("all of its gradients are 0".into());
    }
    Ok(gradient)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(name: &str, gradient: &[f32], errors: &[f32], weight: &[f32]) -> f64 {
        let saliency = SALIENCIES.iter().find(|saliency| saliency.about.name == name).unwrap();
        saliency.of(gradient, errors.iter().copied(), weight)
    }

    #[test]
    fn costs_by_hand() {
        let (gradient, errors, weight) = ([2.0, 0.5], [0.25, -1.0], [-3.0, 4.0]);
        assert!((cost("fisher", &gradient, &errors, &weight) - 0.625).abs() < 1e-12);
        assert!((cost("tacq", &gradient, &errors, &weight) - 3.5).abs() < 1e-12);
        assert!((cost("gradient-l1", &gradient, &errors, &weight) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_costs_nothing_and_more_costs_no_less() {
        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        let number = |seed: u64, at: u64| (seed::uniform(seed::mixed(seed) ^ at) - 0.5) as f32;
        let random = |seed: u64| (0..20).map(|at| number(seed, at)).collect::<Vec<f32>>();
        for seed in 0..50 {
            let gradient: Vec<f32> = random(seed).iter().map(|g| g.abs()).collect();
            let (errors, weight) = (random(seed + 100), random(seed + 200));
            let twice: Vec<f32> = errors.iter().map(|e| 2.0 * e).collect();
            for saliency in SALIENCIES {
                let name = saliency.about.name;
                assert!(cost(name, &gradient, &[0.0; 20], &weight) == 0.0, "{name}");
                assert!(cost(name, &[0.0; 20], &errors, &weight) == 0.0, "{name}");
                let (once, twice) = (cost(name, &gradient, &errors, &weight), cost(name, &gradient, &twice, &weight));
                assert!(once > 0.0 && twice > 1.9 * once, "{name}: {once} {twice}");
            }
        }
    }
}
