//! Which small float fits a weight, or an activation, best.
//!
//! Of as many bits, more for the exponent reach further and more for the mantissa step finer; which is better depends on how the numbers
//! of a tensor are distributed. Biases of exponents are part of scales, which are free: of an activation the one range goes with the format.
//!
//! Source: Kuzmin et al. 2022, arXiv:2208.09225, section 3.2 (the best division of bits per tensor); Chen et al. 2024, arXiv:2408.06995, for
//! weights and activations of 4 to 8 bits, format and bias together.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{Goal, Goals, parameters, weights};
use crate::encoding::Encoding;
use crate::grid::{self, Grid};
use crate::id::NodeId;
use crate::model::{Edit, Model};
use crate::observe::{Seen, Sketch};
use crate::pass::PassContext;
use crate::target::Scheme;
use crate::{ops, parallel};

/// Per linear node whose goal is a small float, its goal with another one that fits its weight better, where there is one.
pub(super) fn search(model: &Model, cx: &PassContext<'_>, goals: &Goals) -> BTreeMap<NodeId, Goal> {
    let nodes: Vec<NodeId> = model.graph().nodes().map(|(id, _)| id).collect();
    let best = parallel::map(&nodes, |id| best(model, cx, *id, goals.of(*id)));
    nodes.into_iter().zip(best).filter_map(|(id, goal)| Some((id, goal?))).collect()
}

/// The goal with the smallest squared error of rounding to nearest, if it is another than `goal`.
fn best(model: &Model, cx: &PassContext<'_>, id: NodeId, goal: &Goal) -> Option<Goal> {
    let is_free = !goal.weight_grid.info().integer && goal.scheme.block_format().is_none();
    is_free.then_some(())?;
    let mut best = (None, loss(model, id, goal)?);
    for other in others(cx, goal) {
        let other = Goal { weight_grid: other, ..*goal };
        let loss = loss(model, id, &other)?;
        if loss < best.1 {
            best = (Some(other), loss);
        }
    }
    best.0
}

/// The minifloats with as many bits as `goal` that its target takes.
fn others(cx: &PassContext<'_>, goal: &Goal) -> impl Iterator<Item = &'static dyn Grid> {
    let scheme = goal.scheme;
    let is_small = |name: &str| name.starts_with('e');
    of_as_many_bits(cx, goal.weight_grid, is_small, move |name| Scheme { weight_format: Some(name), ..scheme })
}

/// The minifloats besides `own` with as many bits and a name that `is_small`, which the target takes in the scheme that `asked` gives for their name.
fn of_as_many_bits(
    cx: &PassContext<'_>,
    own: &dyn Grid,
    is_small: impl Fn(&str) -> bool,
    asked: impl Fn(&'static str) -> Scheme,
) -> impl Iterator<Item = &'static dyn Grid> {
    let (own, target) = (own.info(), cx.target);
    grid::all().filter(move |grid| {
        let info = grid.info();
        let is_minifloat = is_small(info.about.name) && !info.integer && info.bits == own.bits;
        is_minifloat && info.about.name != own.about.name && target.refuses(&asked(info.about.name)).is_none()
    })
}

/// The small floats that activations of `goal` may have, that of the scheme first; none where they are integers, or have their ranges from
/// every run.
pub(super) fn of_activations(cx: &PassContext<'_>, goal: &Goal) -> Vec<&'static dyn Grid> {
    let own = goal.activation_grid();
    if own.info().integer || !cx.scheme.fixes_ranges() {
        return Vec::new();
    }
    let scheme = goal.scheme;
    // Those of other vendors differ in the bias alone.
    let is_small = |name: &str| name.starts_with('e') || name.starts_with("float8e") && !name.ends_with("fnuz");
    let others = of_as_many_bits(cx, own, is_small, move |name| Scheme { activation_format: Some(name), ..scheme });
    std::iter::once(own).chain(others).collect()
}

/// What of a tensor's reach the largest number of a format may stand for.
const SHARES: [f64; 8] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.25];

/// The format among `grids` and the range in which what was `seen` of a tensor loses least; a range is cut only where those that judge
/// lose less by it as well. `None` where nothing loses less than the whole range in the first of them.
pub(super) fn fitted(seen: &Seen<'_>, grids: &[&'static dyn Grid], powers: bool) -> Option<Encoding> {
    let reach = seen.all.max().max(-seen.all.min());
    let judges = seen.judges.filter(|judges| judges.sketch.finite() > 0);
    // Those that judge are none to go by.
    let part = judges.filter(|judges| !judges.apart && seen.all.holds(&judges.sketch));
    let fit = part.map_or(Cow::Borrowed(seen.all), |judges| Cow::Owned(seen.all.less(&judges.sketch)));
    let loss = |encoding: &Encoding| -> Option<(f64, f64)> {
        let judged = judges.map_or(Some(0.0), |judges| error(&judges.sketch, encoding));
        Some((error(&fit, encoding)?, judged?))
    };
    let whole = |grid: &'static dyn Grid| at(grid, reach, powers);
    let (mut best, mut least) = (None, loss(&whole(*grids.first()?)?)?);
    for &grid in grids {
        let Some(uncut) = whole(grid).and_then(|encoding| loss(&encoding)) else { continue };
        for share in SHARES {
            let Some(encoding) = at(grid, share * reach, powers) else { continue };
            let found = loss(&encoding)?;
            let is_whole = share >= 1.0 || judges.is_none();
            if found.0 < least.0 && (is_whole || found.1 < uncut.1) {
                (best, least) = (Some(encoding), found);
            }
        }
    }
    best
}

/// `grid` over magnitudes up to `reach`.
#[expect(clippy::cast_possible_truncation, reason = "a scale rounded to f32")]
pub(super) fn at(grid: &'static dyn Grid, reach: f64, powers: bool) -> Option<Encoding> {
    let scale = reach / grid.range().1;
    let scale = if powers { weights::powers_of_two(scale)[1] } else { scale } as f32;
    scale.is_normal().then(|| Encoding::per_tensor(grid, scale, 0))
}

/// Σ (x̂ − x)² over `sketch` in `encoding`: steps of so few bits are wide beside its buckets.
#[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
fn error(sketch: &Sketch, encoding: &Encoding) -> Option<f64> {
    let (mut values, mut counts) = (Vec::new(), Vec::new());
    for bucket in sketch.buckets() {
        values.push(bucket.center() as f32);
        counts.push(bucket.count as f64);
    }
    let mut rounded = values.clone();
    encoding.simulate(&mut rounded, &[values.len()]).ok()?;
    let squares = values.iter().zip(&rounded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    Some(squares.zip(counts).map(|(square, n)| n * square).sum())
}

/// The squared error of the weight of node `id` under `goal`.
fn loss(model: &Model, id: NodeId, goal: &Goal) -> Option<f64> {
    let graph = model.graph();
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(graph.node(id)?, roles.weight.into())?;
    let Edit::Encode { encoding, .. } = parameters::weight_alone(model, id, goal)? else { return None };
    let values = weight.floats()?;
    let mut rounded = values.to_vec();
    encoding.simulate(&mut rounded, weight.shape()).ok()?;
    Some(values.iter().zip(&rounded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Judges;
    use crate::seed::uniform;

    fn sketch(of: impl Fn(f64) -> f64, seed: u64) -> Sketch {
        #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
        let values: Vec<f32> = (0..4000).map(|i| of(2.0 * uniform(seed << 32 | i) - 1.0) as f32).collect();
        let mut sketch = Sketch::default();
        sketch.see(&values);
        sketch
    }

    fn grids(names: &[&str]) -> Vec<&'static dyn Grid> {
        names.iter().map(|name| grid::find(name).unwrap()).collect()
    }

    /// Even numbers want fine steps, those over many octaves reach; what is searched never loses more than the format that was asked for.
    #[test]
    fn the_format_follows_the_distribution() {
        let found = |of: fn(f64) -> f64, names: &[&str]| {
            let all = sketch(of, 1);
            let (grids, whole) = (grids(names), at(grids(names)[0], all.max().max(-all.min()), false).unwrap());
            let best = fitted(&Seen { all: &all, judges: None }, &grids, false);
            best.map(|best| {
                assert!(error(&all, &best).unwrap() < error(&all, &whole).unwrap());
                best.grid.info().about.name
            })
        };
        assert_eq!(found(|x| x, &["float8e5m2", "float8e4m3fn"]), Some("float8e4m3fn"));
        // Powers of two over seven octaves.
        assert_eq!(found(|x| x.signum() * (-(7.0 * x.abs()).floor()).exp2(), &["e2m1", "e3m0"]), Some("e3m0"));
        assert_ne!(found(|x| x, &["float8e4m3fn", "float8e5m2"]), Some("float8e5m2"));
    }

    /// A range is cut where an outlier costs all others their steps, and those that judge do not have it too.
    #[test]
    fn outliers_are_cut_where_judges_agree() {
        let of = |outlier: f32| {
            let mut all = sketch(|x| x, 2);
            all.see(&[outlier]);
            all
        };
        let (all, without, with) = (of(3.0), sketch(|x| x, 3), of(3.0));
        let names = ["e2m1"];
        let range = |judge: Option<&Sketch>| {
            let judges = judge.map(|sketch| Judges { sketch: sketch.clone(), apart: true });
            let best = fitted(&Seen { all: &all, judges: judges.as_ref() }, &grids(&names), false);
            best.map_or(3.0, |best| f64::from(best.scale[0]) * best.grid.range().1)
        };
        assert!(range(None) < 2.0 && range(Some(&without)) < 2.0, "{} {}", range(None), range(Some(&without)));
        let mut many = with;
        many.see(&[3.0; 2000]);
        assert!(range(Some(&many)) > 2.9, "half of what judges is out there: {}", range(Some(&many)));
        let powers = fitted(&Seen { all: &all, judges: None }, &grids(&names), true).unwrap();
        assert!(powers.scale[0].log2().fract().abs() < 1e-9);
    }

    #[test]
    fn nothing_and_dead_tensors_have_no_format_to_search() {
        let dead = sketch(|_| 0.0, 1);
        assert!(fitted(&Seen { all: &dead, judges: None }, &grids(&["e2m1", "e3m0"]), false).is_none());
        assert!(fitted(&Seen { all: &dead, judges: None }, &[], false).is_none());
    }
}
