//! How the tensors of quantized nodes are written.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::parameters::{parameters, weight_alone};
use super::select::Selection;
use super::width::Wide;
use super::{Goal, Goals, formats, logarithm, weights};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::Encoding;
use crate::grid::Grid;
use crate::grid::block::{BlockFormat, BlockScale};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::Users;
use crate::model::{Edit, Model, Patch};
use crate::observe::{self, Observer, Purpose, Seen, Sketch};
use crate::pass::PassError;
use crate::target::{Activations, RangesOf};
use crate::{ops, parallel};

/// How ranges are chosen.
pub(super) struct Observers<'a> {
    /// Of all tensors but these.
    pub(super) usual: &'a dyn Observer,
    /// Of tensors that a matrix product reads.
    pub(super) products: &'a dyn Observer,
    /// The small floats among which that of every tensor is searched, with its range; none where they are not.
    pub(super) formats: Vec<&'static dyn Grid>,
}

/// The decibels that the usual values of every tensor in `values` keep in the codes that it would get: their mean square, what
/// lies beyond the 99.9th percentile counted as that, over the expected squared error. One outlier can set a scale in which
/// nothing else is left.
pub(super) fn kept(
    model: &Model,
    values: &BTreeSet<ValueId>,
    products: &BTreeSet<ValueId>,
    observers: &Observers<'_>,
    goals: &Goals,
) -> Vec<(ValueId, f64)> {
    let values: Vec<ValueId> = values.iter().copied().collect();
    let kept = parallel::map(&values, |value| {
        let seen = seen(model, *value)?;
        let observer = if products.contains(value) { observers.products } else { observers.usual };
        let encoding = activation(&seen, observer, &goals.base);
        let (signal, error) = expected_error(seen.all, &encoding, seen.all.quantile_of_magnitude(0.999));
        Some(10.0 * (signal.max(1e-300) / error.max(1e-300)).log10())
    });
    values.into_iter().zip(kept).filter_map(|(value, kept)| Some((value, kept?))).collect()
}

/// The tensors that quantized matrix products read.
pub(super) fn read_by_products(graph: &Graph, selection: &Selection) -> BTreeSet<ValueId> {
    let read = |(node, input): &(NodeId, u16)| {
        let node = graph.node(*node).filter(|node| node.op.is("MatMul") || node.op.is("Gemm"))?;
        node.input((*input).into())
    };
    selection.reads.iter().filter_map(read).collect()
}

/// Records the encodings of everything that `selection` reads and writes; of `wide` activations with the bits of `others`.
pub(super) fn encode(
    model: &Model,
    selection: &Selection,
    observers: &Observers<'_>,
    goals: &Goals,
    (wide, others): (&Wide, &Goal),
    patch: &mut Patch,
) {
    let graph = model.graph();
    let read = |&(node, input): &(NodeId, u16)| graph.node(node)?.input(input.into());
    let mut encodings = activations(model, selection, observers, (&goals.base, wide, others));
    let products = read_by_products(graph, selection);
    let each = encodings.iter().map(|((value, _), encoding)| (*value, encoding));
    note_cuts(model, observers, (&products, each), patch);
    if let Some(own) = observers.formats.first() {
        let found = |encoding: &&Encoding| encoding.grid.info().about.name != own.info().about.name;
        patch.count("formats of activations found", encodings.values().filter(found).count() as u64);
    }
    for &(value, shares) in &selection.written {
        if wide.is_apart(value) {
            continue;
        }
        let is_wide = wide.is_written(value);
        if let Some(source) = shares {
            let shared = encodings.get(&(source, is_wide)).cloned();
            encodings.extend(shared.map(|shared| ((value, is_wide), shared)));
        }
        if let Some(encoding) = encodings.get(&(value, is_wide)) {
            note_dead(model, value, patch);
            patch.edit(Edit::Encode { site: Site::Value(value), encoding: encoding.clone() });
        }
    }
    let written = selection.written.iter().map(|(value, _)| *value);
    let written: BTreeSet<ValueId> = written.filter(|value| !wide.is_apart(*value)).collect();
    let users = Users::of(graph);
    for &(node, input) in &selection.reads {
        let Some(value) = read(&(node, input)) else { continue };
        if let Some((site, encoding)) = logarithm::of(graph, &users, (node, input), &goals.base) {
            patch.edit(Edit::Encode { site, encoding });
        } else if let Some(encoding) = encodings.get(&(value, wide.is_read((node, input))))
            && !written.contains(&value)
        {
            note_dead(model, value, patch);
            patch.edit(Edit::Encode { site: Site::Use { node, input }, encoding: encoding.clone() });
        }
    }
    let linear: Vec<(NodeId, u16)> =
        selection.reads.iter().copied().filter(|(node, _)| ops::linear(graph, *node).is_some()).collect();
    let parameters = parallel::map(&linear, |at| {
        let encoding = encodings.get(&(read(at)?, wide.is_read(*at)))?;
        parameters(model, at.0, *encoding.scale.first()?, goals.of(at.0))
    });
    for edits in parameters.into_iter().flatten() {
        edits.edits.into_iter().for_each(|edit| patch.edit(edit));
        edits.note.into_iter().for_each(|note| patch.note(note));
    }
}

/// The encodings of all activations that `selection` reads or writes, by whether they are wide ones.
fn activations(
    model: &Model,
    selection: &Selection,
    observers: &Observers<'_>,
    (usual, wide, others): (&Goal, &Wide, &Goal),
) -> BTreeMap<(ValueId, bool), Encoding> {
    let graph = model.graph();
    let written = selection.written.iter().map(|(value, _)| (*value, wide.is_written(*value)));
    let read =
        |&(node, input): &(NodeId, u16)| Some((graph.node(node)?.input(input.into())?, wide.is_read((node, input))));
    let wanted: BTreeSet<(ValueId, bool)> = written.chain(selection.reads.iter().filter_map(read)).collect();
    let wanted: Vec<(ValueId, bool)> = wanted.into_iter().collect();
    let products = read_by_products(graph, selection);
    let encodings = parallel::map(&wanted, |(value, is_wide)| {
        let observer = if products.contains(value) { observers.products } else { observers.usual };
        let (seen, goal) = (seen(model, *value)?, if *is_wide { others } else { usual });
        let is_float = !goal.activation_grid().info().integer;
        let fitted = || formats::fitted(&seen, &observers.formats, goal.scheme.power_of_two);
        Some(is_float.then(fitted).flatten().unwrap_or_else(|| activation(&seen, observer, goal)))
    });
    wanted.into_iter().zip(encodings).filter_map(|(at, encoding)| Some((at, encoding?))).collect()
}

fn note_dead(model: &Model, value: ValueId, patch: &mut Patch) {
    if let Some(sketch) = model.stats().distribution(value)
        && sketch.min() == 0.0
        && sketch.max() == 0.0
    {
        let place = Place::Value(Arc::clone(&model.graph().value(value).name));
        let message = "it was all zero in calibration: its scale is 1, and the data may not exercise the model";
        patch.note(Diagnostic::new(diag::SMALL_RANGE, Severity::Warning, place, message));
    }
}

/// Counts the ranges of `encodings` that an observer which is judged has cut, and tells the user what judged.
fn note_cuts<'e>(
    model: &Model,
    observers: &Observers<'_>,
    (products, encodings): (&BTreeSet<ValueId>, impl Iterator<Item = (ValueId, &'e Encoding)>),
    patch: &mut Patch,
) {
    let fits = !observers.formats.is_empty();
    if !observers.usual.is_judged() && !observers.products.is_judged() && !fits {
        return;
    }
    let (mut cut, mut all, mut apart) = (0_u64, 0, None);
    for (value, encoding) in encodings {
        let observer = if products.contains(&value) { observers.products } else { observers.usual };
        let Some(seen) = seen(model, value).filter(|_| fits || observer.is_judged()) else { continue };
        let (low, high) = encoding.grid.range();
        let (scale, zero) =
            (f64::from(encoding.scale[0]), encoding.zero_point.first().map_or(0.0, |zero| f64::from(*zero)));
        let (least, most) = ((low - zero) * scale, (high - zero) * scale);
        // Whole ranges end within a step of the ends of what was seen.
        cut += u64::from(seen.all.min() < least - scale || seen.all.max() > most + scale);
        all += 1;
        apart = apart.or(seen.judges.map(|judges| judges.apart));
    }
    let judges = match apart {
        Some(true) => "samples that are held out",
        Some(false) => "every eighth sample, which they were not found on",
        None => "nobody",
    };
    patch.count("ranges cut", cut);
    let message = format!("{cut} of {all} ranges of activations leave outliers out; judged by {judges}");
    patch.note(Diagnostic::new(diag::JUDGED, Severity::Note, Place::Model, message));
}

/// What was measured of `value`.
fn seen(model: &Model, value: ValueId) -> Option<Seen<'_>> {
    Some(Seen { all: model.stats().distribution(value)?, judges: model.stats().judges(value) })
}

/// Codes over the observer's range: for integers as the target has them, for other formats the largest magnitude at the largest
/// number.
fn activation(seen: &Seen<'_>, observer: &dyn Observer, goal: &Goal) -> Encoding {
    let sketch = seen.all;
    let grid = goal.activation_grid();
    let (low, high) = grid.range();
    if grid.info().integer && goal.accepts.activations != Activations::Affine {
        return symmetric(seen, observer, goal);
    }
    if !grid.info().integer {
        let whole = formats::at(grid, sketch.max().max(-sketch.min()), goal.scheme.power_of_two);
        return whole.unwrap_or_else(|| Encoding::per_tensor(grid, 1.0, 0));
    }
    let range = observer.judged(seen, Purpose { levels: high - low + 1.0, symmetric: false });
    let (scale, zero_point) = affine(range, low, high);
    if !goal.scheme.power_of_two {
        return Encoding::per_tensor(grid, scale, zero_point);
    }
    better_of(sketch, scale, |scale| {
        #[expect(clippy::cast_possible_truncation, reason = "a zero point between the ends of the grid")]
        let zero = (low - range.0.min(0.0) / f64::from(scale)).round_ties_even().clamp(low, high) as i32;
        Encoding::per_tensor(grid, scale, zero)
    })
}

/// Codes with zero point 0 over the observer's range: signed, or unsigned where the target has those for tensors that are never
/// negative.
fn symmetric(seen: &Seen<'_>, observer: &dyn Observer, goal: &Goal) -> Encoding {
    let sketch = seen.all;
    let unsigned = goal.accepts.activations == Activations::BySign && sketch.min() >= 0.0;
    let grid = goal.integers(unsigned);
    let (low, high) = grid.range();
    let range = observer.judged(seen, Purpose { levels: high - low + 1.0, symmetric: !unsigned });
    #[expect(clippy::cast_possible_truncation, reason = "a scale rounded to f32")]
    let scale = (range.1.max(-range.0) / high) as f32;
    if !scale.is_normal() {
        return Encoding::per_tensor(grid, 1.0, 0);
    }
    if !goal.scheme.power_of_two {
        return Encoding::per_tensor(grid, scale, 0);
    }
    better_of(sketch, scale, |scale| Encoding::per_tensor(grid, scale, 0))
}

/// Of the encodings with the powers of two around `scale`, that with the smaller expected error.
#[expect(clippy::cast_possible_truncation, reason = "powers of two are exact")]
fn better_of(sketch: &Sketch, scale: f32, encoding: impl Fn(f32) -> Encoding) -> Encoding {
    let [below, above] = weights::powers_of_two(f64::from(scale)).map(|scale| encoding(scale as f32));
    let error = |encoding: &Encoding| expected_error(sketch, encoding, f64::INFINITY).1;
    if error(&below) < error(&above) { below } else { above }
}

/// Σ x² and the expected Σ (x̂ − x)² of `sketch` in `encoding`, magnitudes beyond `usual` counted as that in the first sum.
fn expected_error(sketch: &Sketch, encoding: &Encoding, usual: f64) -> (f64, f64) {
    let (low, high) = encoding.grid.range();
    let (scale, zero) = (f64::from(encoding.scale[0]), f64::from(encoding.zero_point[0]));
    observe::expected_error(sketch, ((low - zero) * scale, (high - zero) * scale), scale, usual)
}

/// Scale and zero point that map `range` onto the codes from `low` to `high`; scale 1 for a range without extent.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a zero point between the ends of the grid; a scale rounded to f32"
)]
pub(super) fn affine(range: (f64, f64), low: f64, high: f64) -> (f32, i32) {
    let (from, to) = (range.0.min(0.0), range.1.max(0.0));
    let scale = (to - from) / (high - low);
    if scale < f64::from(f32::MIN_POSITIVE) || !scale.is_finite() {
        return (1.0, low as i32);
    }
    let zero_point = (low - from / scale).round_ties_even().clamp(low, high);
    (scale as f32, zero_point as i32)
}

/// Encodes the weights of the products that `selection` chose, and what they read where every run gives that its scales; biases stay in
/// float. Codes of tokens span `reach` times the range of those.
pub(super) fn encode_products(
    model: &Model,
    selection: &Selection,
    goals: &Goals,
    reach: f32,
    patch: &mut Patch,
) -> Result<(), PassError> {
    let scheme = &goals.base.scheme;
    for &(node, input) in &selection.reads {
        let Some(edit) = weight_alone(model, node, goals.of(node)) else { continue };
        patch.edit(edit);
        let encoding = match scheme.activation_block() {
            Some(format) => in_blocks(model, node, input, format)?,
            None => match scheme.dynamic {
                Some(RangesOf::Tensor) => Encoding::dynamic(goals.base.activation_grid()),
                Some(RangesOf::Token) => by_token(model, node, input, (goals.base.activation_grid(), reach))?,
                None => continue,
            },
        };
        patch.edit(Edit::Encode { site: Site::Use { node, input }, encoding });
    }
    Ok(())
}

/// One range per run, of which codes span `reach`, for all that the product `id` sums over, of what it reads at `input`.
fn by_token(
    model: &Model,
    id: NodeId,
    input: u16,
    (grid, reach): (&'static dyn Grid, f32),
) -> Result<Encoding, PassError> {
    let graph = model.graph();
    let (node, roles) = (graph.node(id), ops::linear(graph, id));
    let fail = |problem: &str| PassError::Model(format!("node `{}`: {problem}", node.map_or("", |node| &node.name)));
    let rank = node.and_then(|node| node.input(input.into())).and_then(|value| graph.value(value).ty.rank());
    let last = rank.and_then(|rank| rank.checked_sub(1));
    let last = last.ok_or_else(|| fail("how many extents its activation has is not known: export it with shapes"))?;
    let summed = roles.and_then(|roles| {
        let weight = graph.constant_input(node?, roles.weight.into())?;
        weight.shape().get(1_usize.checked_sub(roles.out_axis)?).copied()
    });
    let summed = summed.ok_or_else(|| fail("it has no weight that says how much it sums over"))?;
    Ok(Encoding::dynamic_rows(grid, last, summed, reach))
}

/// Blocks of `format` along the summed axis of what the product `id` reads at `input`.
fn in_blocks(model: &Model, id: NodeId, input: u16, format: &BlockFormat) -> Result<Encoding, PassError> {
    let graph = model.graph();
    let node = graph.node(id);
    let fail = |problem: &str| PassError::Model(format!("node `{}`: {problem}", node.map_or("", |node| &node.name)));
    let value = node.and_then(|node| node.input(input.into())).ok_or_else(|| fail("it has no activation"))?;
    let last = graph.value(value).ty.rank().and_then(|rank| rank.checked_sub(1));
    let last = last.ok_or_else(|| fail("how many extents its activation has is not known: export it with shapes"))?;
    let factor = match format.scale {
        BlockScale::PowerOfTwo { .. } => 1.0,
        BlockScale::Float8 => {
            let measured = model.stats().distribution(value);
            let sketch = measured.ok_or_else(|| fail("its activation was not measured: pass samples with --data"))?;
            #[expect(clippy::cast_possible_truncation, reason = "the largest of f32 values")]
            BlockFormat::tensor_factor(sketch.max().max(-sketch.min()) as f32)
        }
    };
    let turned = node.is_some_and(|node| node.op.is("Gemm") && node.int("transA", 0) != 0);
    Ok(Encoding::dynamic_blocks(format, last.saturating_sub(usize::from(turned)), factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};
    use crate::target::{Accepts, Scheme};

    #[test]
    fn ranges_map_onto_codes() {
        assert_eq!(affine((0.0, 25.5), 0.0, 255.0), (0.1, 0));
        let (scale, zero_point) = affine((-1.0, 1.0), 0.0, 255.0);
        assert!((scale - 2.0 / 255.0).abs() < 1e-9 && zero_point == 128, "{scale} {zero_point}");
        assert_eq!(affine((0.0, 0.0), 0.0, 255.0), (1.0, 0));
        assert_eq!(affine((0.0, 1e-44), 0.0, 255.0), (1.0, 0));
    }

    static BY_SIGN: Accepts = Accepts { activations: Activations::BySign, ..Accepts::USUAL };
    static SYMMETRIC: Accepts = Accepts { activations: Activations::Symmetric, ..Accepts::USUAL };

    /// Data of many shapes and sizes; sometimes none.
    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    fn drawn(seed: u64) -> Sketch {
        let size = 2.0_f64.powi(i32::try_from(mixed(seed << 32) % 121).unwrap() - 60);
        let value = |i: u64| {
            let x = 2.0 * uniform(seed << 32 | (i + 1)) - 1.0;
            let shaped = match seed % 6 {
                0 => x,
                1 => x.powi(5),
                2 => x.abs(),
                3 => -1.0 - x.abs(),
                4 => 0.75,
                _ => x + 1000.0,
            };
            (size * shaped) as f32
        };
        let values: Vec<f32> =
            (0..[0, 1, 50, 400, 400][usize::from(mixed(seed).to_le_bytes()[0] % 5)]).map(value).collect();
        let mut sketch = Sketch::default();
        sketch.see(&values);
        sketch
    }

    /// Activations of 2 to 8 bits, or of 16, as one of the targets wants them.
    fn goal(seed: u64) -> Goal {
        let of = |at: u64, n: u64| mixed(seed << 32 | (1 << 20) | at) % n;
        let bits = [2, 3, 4, 5, 6, 7, 8, 16][usize::try_from(of(0, 8)).unwrap()];
        let scheme = Scheme { power_of_two: of(1, 3) == 0, ..Scheme::integers(8, Some(bits)) };
        let accepts = [&Accepts::USUAL, &BY_SIGN, &SYMMETRIC][usize::try_from(of(2, 3)).unwrap()];
        Goal::new(scheme, weights::WeightScale::MinMax, accepts).unwrap()
    }

    #[test]
    fn zero_has_a_code_of_its_own_whoever_chooses_the_range() {
        for entry in observe::OBSERVERS {
            let observer = (entry.build)(None);
            // One of them takes its time.
            for seed in 0..if entry.about.name == "entropy" { 12 } else { 300 } {
                let (sketch, goal) = (drawn(seed), goal(seed));
                let encoding = activation(&Seen { all: &sketch, judges: None }, observer.as_ref(), &goal);
                let (low, high) = encoding.grid.range();
                let zero_point = f64::from(encoding.zero_point[0]);
                let mut zero = [0.0];
                encoding.simulate(&mut zero, &[1]).unwrap();
                assert!(zero[0] == 0.0 && (low..=high).contains(&zero_point), "{observer:?} {seed}: {encoding:?}");
                assert!(encoding.scale[0].is_normal() && encoding.scale[0] > 0.0, "{observer:?} {seed}: {encoding:?}");
            }
        }
    }

    #[test]
    fn codes_over_the_extremes_reach_all_that_was_seen() {
        let min_max = observe::find("min-max", None).unwrap();
        for seed in 0..300 {
            let (sketch, goal) = (drawn(seed), goal(seed));
            if goal.scheme.power_of_two {
                continue; // the next smaller one may be the better one
            }
            let encoding = activation(&Seen { all: &sketch, judges: None }, min_max.as_ref(), &goal);
            let (low, high) = encoding.grid.range();
            let (scale, zero) = (f64::from(encoding.scale[0]), f64::from(encoding.zero_point[0]));
            // The zero point is rounded.
            let near = 0.51 * scale;
            let (from, to) = ((low - zero) * scale, (high - zero) * scale);
            assert!(from <= sketch.min() + near && to >= sketch.max() - near, "{seed}: {sketch:?} {encoding:?}");
        }
    }

    #[test]
    fn the_largest_magnitude_is_the_largest_float_of_few_bits() {
        let scheme = Scheme { activation_format: Some("float8e4m3fn"), ..Scheme::integers(8, Some(8)) };
        let goal = Goal::new(scheme, weights::WeightScale::MinMax, &Accepts::USUAL).unwrap();
        let min_max = observe::find("min-max", None).unwrap();
        for seed in 0..60 {
            let sketch = drawn(seed);
            let (encoding, reach) = (
                activation(&Seen { all: &sketch, judges: None }, min_max.as_ref(), &goal),
                sketch.max().max(-sketch.min()),
            );
            let end = encoding.grid.range().1 * f64::from(encoding.scale[0]);
            assert!(reach == 0.0 || (end / reach - 1.0).abs() < 1e-6, "{seed}: {sketch:?} {encoding:?}");
            assert_eq!(encoding.zero_point[0], 0);
        }
    }
}
