//! What rounding costs at the outputs to first order, weight by weight and activation by activation.
//!
//! With e the error that rounding makes somewhere and g a gradient drawn at the outputs of the float model (see `Measure::drawn`), E\[(g · e)²\]
//! is the mean error at the outputs, divergence where they are logits and squares else, so that |g · e| has the unit of its root. Labels
//! would be needed for the gradient of a task's loss, and the divergence of a model from itself has none.
//!
//! Source: Alizadeh et al. 2020, arXiv:2002.07520: the L1 norm of gradients bounds what errors of limited size do. Here every error counts
//! as large as it is, so that numbers cut off at the ends of their range are in it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::block::Also;
use super::chain::{Arrived, Chain, Link};
use super::measure::Wish;
use super::objective::LANES;
use super::saliency::fits;
use crate::grad::{Array, GradError, Slot, Values};
use crate::id::Site;
use crate::model::{Model, Plan};
use crate::pass::{PassContext, PassError};
use crate::{rounding, seed, simulate};

/// The most weights of neighboring blocks whose tape is held at once.
const LAYERS: usize = 4;
/// Gradients are drawn from this.
const SEED: u64 = 0xf12_57ed;

/// What the errors at one place cost, as roots of mean errors at the outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// The root of the mean over samples of (Σ |g| |e|)²: no more than that, whatever the signs.
    pub most: f64,
    /// The root of the mean over samples of Σ g² e²: what errors of independent signs come to.
    pub usual: f64,
}

/// What rounding costs at every weight and activation that it alters and that gradients reach.
pub type Costs = BTreeMap<Site, Cost>;

/// Sums of one sample: Σ |g| |e| and Σ g² e².
type Sums = BTreeMap<Site, (f64, f64)>;

/// By sample and place, of which not all readers have been passed: how many have, and the sum of their gradients. These are of tensors that
/// links hand on, whose gradients are held meanwhile in any case.
type Arriving = BTreeMap<(usize, Site), (usize, Option<Array<f32>>)>;

/// What the plan of `model` costs to first order, place by place, on at most so many `samples` of the data; or why gradients cannot
/// tell. Activations before the first layer have no gradient, and weights that several nodes read are left out. Reported to the progress
/// of `cx` as `stage`.
///
/// # Errors
/// [`PassError`] without samples, when the model does not run, or when the user interrupts.
pub fn first_order(
    model: &Model,
    cx: &PassContext<'_>,
    samples: usize,
    stage: &str,
) -> Result<Result<Costs, String>, PassError> {
    let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
    let rounded = rounding::in_nearest(model)?;
    let plan = rounded.plan();
    let chain = match Chain::for_draws(model.graph(), plan, cx, (LAYERS, samples), also, Wish::Fitting)? {
        Ok(chain) => chain,
        Err(reason) => return Ok(Err(reason)),
    };
    // The errors of every weight are a number each, like the gradients of `saliency`.
    if let Err(reason) = fits(&chain, cx) {
        return Ok(Err(reason));
    }
    let errors = errors(model, plan, &chain)?;
    let mut readers: BTreeMap<Site, usize> = BTreeMap::new();
    chain.links.iter().flat_map(places).for_each(|(_, site)| *readers.entry(site).or_default() += 1);
    let all: Vec<usize> = (0..chain.samples()).collect();
    let (sums, arriving) = (Mutex::new(vec![Sums::new(); all.len()]), Mutex::new(Arriving::new()));
    let wanted = |link: &Link| places(link).map(|(slot, _)| slot).collect::<Vec<Slot>>();
    let see = |link: &Link, sample: usize, values: &Values<f32>, grads: Arrived| {
        for ((slot, site), grad) in places(link).zip(grads) {
            let Some(grad) = joined(&mut locked(&arriving), (sample, site), grad, readers[&site]) else { continue };
            let of_values = || error(plan, site, values.real(slot)?);
            let cost = match errors.get(&site) {
                Some(errors) => cost(&grad, errors),
                None => of_values().map_or((0.0, 0.0), |errors| cost(&grad, &errors)),
            };
            locked(&sums)[sample].insert(site, cost);
        }
    };
    cx.progress.begin(stage, all.chunks(LANES).len() as u64);
    let traced = all.chunks(LANES).take_while(|_| !cx.progress.cancelled()).try_for_each(|batch| {
        chain.trace(batch, seed::mixed(SEED), &wanted, &see)?;
        cx.progress.step();
        Ok::<(), GradError>(())
    });
    cx.progress.end();
    if cx.progress.cancelled() {
        return Err(PassError::Interrupted);
    }
    Ok(traced.map_err(|error| error.to_string()).and_then(|()| means(&locked(&sums))))
}

/// Where numbers that rounding alters are read in `link`: its weights, and what it rounds.
fn places(link: &Link) -> impl Iterator<Item = (Slot, Site)> {
    let weights = link.program.weights.iter().map(|(slot, site, _)| (*slot, *site));
    weights.chain(link.program.roundings.iter().copied())
}

/// What arrives at the place and of the sample `at` from all of its `readers` together, once `grad`, that of one more, was the last;
/// `None` before, and where nothing arrives.
fn joined(arriving: &mut Arriving, at: (usize, Site), grad: Option<Array<f32>>, readers: usize) -> Option<Array<f32>> {
    let (passed, sum) = arriving.remove(&at).unwrap_or_default();
    let sum = match (sum, grad) {
        (Some(sum), Some(grad)) => Some(sum + &grad),
        (sum, grad) => sum.or(grad),
    };
    if passed + 1 >= readers {
        return sum;
    }
    arriving.insert(at, (passed + 1, sum));
    None
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of every weight of `chain`, the errors that `plan` makes.
fn errors(model: &Model, plan: &Plan, chain: &Chain) -> Result<BTreeMap<Site, Vec<f32>>, PassError> {
    let mut errors = BTreeMap::new();
    for (_, site, tensor) in chain.links.iter().flat_map(|link| &link.program.weights) {
        let name = match site {
            Site::Use { node, .. } => model.graph().node(*node).map_or("", |node| &node.name),
            Site::Value(value) => &model.graph().value(*value).name,
        };
        let rounded = simulate::rounded_constant(plan, *site, tensor, name)?;
        if let (Some(float), Some(rounded)) = (tensor.floats(), rounded.floats()) {
            errors.insert(*site, rounded.iter().zip(float.iter()).map(|(r, f)| r - f).collect());
        }
    }
    Ok(errors)
}

/// The errors that rounding at `site` makes of `values`.
fn error(plan: &Plan, site: Site, values: &Array<f32>) -> Option<Vec<f32>> {
    let mut rounded: Vec<f32> = values.iter().copied().collect();
    plan.encoding(site)?.simulate(&mut rounded, values.shape()).ok()?;
    rounded.iter_mut().zip(values).for_each(|(r, v)| *r -= v);
    Some(rounded)
}

/// Σ |g| |e| and Σ g² e².
fn cost(grad: &Array<f32>, errors: &[f32]) -> (f64, f64) {
    grad.iter().zip(errors).fold((0.0, 0.0), |(most, square), (g, e)| {
        let product = (f64::from(*g) * f64::from(*e)).abs();
        (most + product, square + product * product)
    })
}

/// The means over samples, or why they tell nothing.
fn means(samples: &[Sums]) -> Result<Costs, String> {
    let mut sums = Sums::new();
    for (site, (most, square)) in samples.iter().flatten() {
        let sum = sums.entry(*site).or_default();
        *sum = (sum.0 + most * most, sum.1 + square);
    }
    if !sums.values().all(|(most, square)| most.is_finite() && square.is_finite()) {
        return Err("its gradients are no numbers".into());
    }
    let n = samples.len().max(1) as f64;
    let root = |sum: f64| (sum / n).sqrt();
    Ok(sums.into_iter().map(|(site, (most, square))| (site, Cost { most: root(most), usual: root(square) })).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products};
    use super::*;
    use crate::encoding::Encoding;
    use crate::id::ValueId;
    use crate::model::{Edit, Patch};

    #[test]
    fn costs_by_hand() {
        let grad = Array::from_shape_vec(vec![1, 3], vec![2.0, -0.5, 0.0]).unwrap();
        let (most, square) = cost(&grad, &[0.25, 1.0, 9.0]);
        assert!((most - 1.0).abs() < 1e-12 && (square - 0.5).abs() < 1e-12);
    }

    /// What two readers make of an error may cancel out: they see the same error.
    #[test]
    fn readers_of_one_place_are_added_up_before_they_are_squared() {
        let grad = |values: [f32; 2]| Some(Array::from_shape_vec(vec![1, 2], values.to_vec()).unwrap());
        let (one, other) = ((0, Site::Value(ValueId(0))), (1, Site::Value(ValueId(0))));
        let mut arriving = Arriving::new();
        assert!(joined(&mut arriving, one, grad([2.0, 1.0]), 3).is_none());
        assert_eq!(joined(&mut arriving, other, grad([5.0, 5.0]), 1), grad([5.0, 5.0]), "another sample");
        assert!(joined(&mut arriving, one, None, 3).is_none(), "nothing comes back from this one");
        let sum = joined(&mut arriving, one, grad([-2.0, 3.0]), 3).unwrap();
        let (most, square) = cost(&sum, &[0.5, 0.5]);
        assert!((most - 2.0).abs() < 1e-12 && (square - 4.0).abs() < 1e-12, "{most} {square}");
        assert!(arriving.is_empty());
        assert!(joined(&mut arriving, one, None, 1).is_none());
    }

    #[test]
    fn what_memory_does_not_hold_is_no_error() {
        let data = Drawn(5);
        let cx = PassContext::new(&NoTarget, &Tapes);
        let cx = PassContext { dataset: Some(&data), state_budget: 0, pair_budget: 100, ..cx };
        let reason = first_order(&two_products(0.7), &cx, 5, "test").unwrap().unwrap_err();
        assert!(reason.contains("MB"), "{reason}");
    }

    #[test]
    fn what_is_usual_is_no_more_than_the_most() {
        let site = Site::Value(ValueId(0));
        for seed in 0..50 {
            #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
            let random = |at: u64| (seed::uniform(seed::mixed(seed) ^ at) - 0.5) as f32;
            let errors: Vec<f32> = (0..8).map(random).collect();
            let (mut sums, mut squares) = (Vec::new(), 0.0);
            for sample in 1..4 {
                let grad = Array::from_shape_vec(vec![8], (8 * sample..8 * sample + 8).map(random).collect()).unwrap();
                let dot: f64 = grad.iter().zip(&errors).map(|(g, e)| f64::from(*g) * f64::from(*e)).sum();
                squares += dot * dot;
                sums.push(Sums::from([(site, cost(&grad, &errors))]));
            }
            let all = means(&sums).unwrap()[&site];
            assert!(all.usual > 0.0 && all.usual <= all.most, "{all:?}");
            assert!((squares / 3.0_f64).sqrt() <= all.most * (1.0 + 1e-12), "{squares} {all:?}");
        }
        assert!(means(&[Sums::from([(site, (f64::NAN, 0.0))])]).is_err());
    }

    /// `model` with all weights at steps of so many thousandths.
    fn at(model: &Model, step: f32) -> Model {
        let mut other = model.clone();
        let mut patch = Patch::on(model);
        for (site, _) in model.plan().encodings() {
            let encoding = Encoding::per_tensor(crate::grid::find("int8").unwrap(), step, 0);
            patch.edit(Edit::Encode { site, encoding });
        }
        other.apply(patch).unwrap();
        other
    }

    #[test]
    fn finer_steps_cost_less_and_a_part_without_influence_nothing() {
        let data = Drawn(5);
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let model = two_products(0.7);
        let [coarse, fine] = [0.1, 0.02].map(|step| first_order(&at(&model, step), &cx, 5, "test").unwrap().unwrap());
        assert!(coarse.len() == 2 && coarse.keys().eq(fine.keys()), "both weights: {coarse:?}");
        for (site, cost) in &coarse {
            assert!(fine[site].most > 0.0 && fine[site].most < 0.5 * cost.most, "{site:?}: {cost:?} {fine:?}");
            assert!(cost.usual > 0.0 && cost.usual < cost.most, "{cost:?}");
        }
        // Where the second weight is 0, nothing that the first one makes arrives.
        let cut = first_order(&at(&two_products(0.0), 0.1), &cx, 5, "test").unwrap().unwrap();
        assert!(cut.values().all(|cost| cost.most == 0.0), "{cut:?}");
    }
}
