//! What norms return with one scale and zero point per channel, written as one scale and zero point.

use std::collections::BTreeSet;

use super::affine_norm::Norm;
use super::divided::{Group, groups, last_axis};
use super::smooth::{LEAST_ROWS, Sink, sink};
use crate::id::ValueId;
use crate::ir::Graph;
use crate::ir::walk::Users;
use crate::model::{Model, Patch};
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::target::Activations;

crate::declare_pass! {
    /// Moves what differs between the ranges of a norm's channels into the norm and into the products that read it.
    ///
    /// Rounded with a scale s\[j\] and a zero point z\[j\] of its own, every channel would have all codes. With s̃ and z̃ their means,
    /// r = s / s̃ and t = s · (z − z̃), the codes of one scale and one zero point are those very codes:
    ///
    /// ```text
    /// γ' = γ / r,   β' = (β + t) / r,   W'[j, o] = r[j] · W[j, o],   b'[o] = b[o] − Σ_j t[j] · W[j, o]
    /// ```
    ///
    /// Exact over the reals. What the activation gains the weights lose, whose inputs come to differ: r is taken to the power, of five
    /// from 0 to 1, and with or without a shift t, that gives the smallest expected error of the outputs at the scheme's bits; doing
    /// nothing is among the candidates. A norm is `LayerNormalization` over the last axis or a scale and a shift written out; one
    /// without a shift is scaled only, but for `LayerNormalization`, which gets one. Where it has other readers, as behind a residual
    /// sum, the products read a norm of their own, if it pays at least threefold. Products without a bias get an `Add`. Channels of
    /// one value become zero. Tensors of fewer than 1024 rows are left alone.
    ///
    /// With `to=bare` products read what norms are before their scale and shift, whatever is expected of it: every row has the same length
    /// then, so that one range fits all rows, turned or not.
    INFO {
        name: "reparameterize-norms",
        source: "Li et al. 2022 (RepQ-ViT), arXiv:2212.08254, section 3.2; the choice by expected error and norms of their own ours",
        cost: "One forward pass for ends and powers of channels; then every weight that reads a norm is looked at ten times.",
        requires: Facts::CALIBRATED,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[
            OptionInfo {
                name: "strength",
                doc: "this power for every norm, shifted, whatever is expected of it; 1 is what the source does",
            },
            OptionInfo {
                name: "to",
                doc: "even (default): channels of ranges that are alike; bare: no scale and no shift, whatever samples say",
            },
            OptionInfo {
                name: "sigmas",
                doc: "ranges of channels end at most so many standard deviations from their means; by default at the ends of what was seen",
            },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(ReparameterizeNorms::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct ReparameterizeNorms {
    strength: Option<f64>,
    sigmas: Option<f64>,
    bare: bool,
}

/// A norm of its own is worth it where it takes two thirds of the error away.
const COPIED: f64 = 1.0 / 3.0;
/// Scales of channels within this of their mean.
const REACH: f64 = 64.0;

impl ReparameterizeNorms {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let (strength, sigmas) = (options.number("strength")?, options.number("sigmas")?);
        let refuse = |option: &str, given: f64, range: &str| {
            Err(OptionError { option: option.into(), problem: format!("`{given}` is not {range}") })
        };
        let bare = match options.text("to", "even") {
            "even" => false,
            "bare" => true,
            other => {
                let problem = format!("`{other}` is neither even nor bare");
                return Err(OptionError { option: "to".into(), problem });
            }
        };
        if bare && (strength.is_some() || sigmas.is_some()) {
            let problem = "with `bare` there is neither strength nor sigmas".to_owned();
            return Err(OptionError { option: "to".into(), problem });
        }
        match (strength, sigmas) {
            (Some(given), _) if !(0.0..=1.0).contains(&given) => refuse("strength", given, "from 0 to 1"),
            (_, Some(given)) if given <= 0.0 => refuse("sigmas", given, "more than 0"),
            _ => Ok(Self { strength, sigmas, bare }),
        }
    }
}

impl Pass for ReparameterizeNorms {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if self.bare {
            return BTreeSet::new();
        }
        let graph = model.graph();
        let of = |group: Group| Some((group.value, last_axis(graph, group.value)?));
        let both = |(value, axis)| [(value, Wish::Ends { axis }), (value, Wish::Peaks { axis })];
        wanted(graph, cx).into_iter().filter_map(of).flat_map(both).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let graph = model.graph();
        let users = Users::of(graph);
        let groups = wanted(graph, cx);
        let choices = parallel::map(&groups, |group| self.choose(model, group, cx));
        for (group, choice) in groups.iter().zip(choices) {
            let Some((affine, left)) = choice else { continue };
            if group.sinks.iter().any(|id| patch.touches(*id)) || !(group.alone || left < COPIED) {
                continue;
            }
            let Some(norm) = Norm::of(graph, group.value) else { continue };
            let mark = patch.mark();
            if norm.reparameterize(graph, &users, group, &affine, &mut patch).is_some() {
                patch.count(if group.alone { "norms" } else { "copied" }, 1);
            } else {
                patch.roll_back(&mark);
            }
        }
        Ok(patch)
    }
}

/// Norms that matrix products with a constant read, where activations are integers with ranges that are fixed beforehand.
fn wanted(graph: &Graph, cx: &PassContext<'_>) -> Vec<Group> {
    if !cx.scheme.fixes_ranges() || cx.scheme.activation_format.is_some() {
        return Vec::new();
    }
    let mut groups = groups(graph, cx);
    groups.retain(|group| Norm::of(graph, group.value).is_some());
    groups
}

/// y' = y / divisor + shift, per channel.
pub(super) struct Affine {
    pub(super) divisor: Vec<f64>,
    pub(super) shift: Vec<f64>,
}

impl Affine {
    /// What brings channels of `ranges` into one range of so many `steps`: the divisor is s / s̃ to the power of `strength`, and the
    /// middles of all ranges come to lie together, at the mean of the zero points; without `shifted`, zero stays zero.
    ///
    /// At `strength` 1 the codes of one scale and zero point are those of the channels' own. Channels without a range have the mean
    /// scale, and shifted become zero.
    fn of(ranges: &[(f64, f64)], steps: f64, strength: f64, shifted: Shifted) -> Self {
        let width = |(low, high): &(f64, f64)| match shifted {
            Shifted::No => 2.0 * low.abs().max(high.abs()),
            _ => high - low,
        };
        let live = || ranges.iter().map(width).filter(|width| *width > 0.0);
        let mean = live().sum::<f64>() / live().count().max(1) as f64;
        let relative = |range: &(f64, f64)| {
            if width(range) > 0.0 { (width(range) / mean).clamp(1.0 / REACH, REACH).powf(strength) } else { 1.0 }
        };
        let divisor: Vec<f64> = ranges.iter().map(relative).collect();
        if shifted == Shifted::No {
            return Self { shift: vec![0.0; divisor.len()], divisor };
        }
        // −low / s is the zero point of a channel.
        let zeros = || ranges.iter().filter(|range| width(range) > 0.0).map(|range| -range.0 / width(range) * steps);
        let zero = (zeros().sum::<f64>() / zeros().count().max(1) as f64).round().clamp(0.0, steps);
        let widest = ranges.iter().zip(&divisor).map(|(range, r)| width(range) / r).fold(0.0, f64::max);
        let middle = if shifted == Shifted::Centered { 0.0 } else { (0.5 - zero / steps) * widest };
        let shift = |(range, r): (&(f64, f64), &f64)| {
            // What is constant goes into biases whole.
            if width(range) > 0.0 { middle - f64::midpoint(range.0, range.1) / r } else { -range.0 }
        };
        Self { shift: ranges.iter().zip(&divisor).map(shift).collect(), divisor }
    }
}

/// Whether channels are shifted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shifted {
    No,
    /// To the mean of their zero points.
    Affine,
    /// To zero points in the middle, for codes that have no other.
    Centered,
}

/// What is known of the channels of a norm, and what reads them.
struct Channels {
    ranges: Vec<(f64, f64)>,
    means: Vec<f64>,
    variances: Vec<f64>,
    sinks: Vec<Sink>,
}

impl Channels {
    fn of(model: &Model, group: &Group, sigmas: Option<f64>) -> Option<Self> {
        let axis = last_axis(model.graph(), group.value)?;
        let (ends, peaks) = (model.stats().ends(group.value, axis)?, model.stats().peaks(group.value, axis)?);
        let (mut ranges, means, powers) = (ends.ranges()?, ends.means()?, peaks.powers());
        let sinks: Vec<Sink> = group.sinks.iter().map(|&id| sink(model.graph(), id)).collect::<Option<_>>()?;
        let channels = ranges.len();
        let fits = powers.len() == channels && sinks.iter().all(|sink| sink.energy.len() == channels);
        (fits && peaks.count() >= LEAST_ROWS).then_some(())?;
        let variances: Vec<f64> = powers.iter().zip(&means).map(|(p, m)| (p - m * m).max(0.0)).collect();
        if let Some(sigmas) = sigmas {
            for ((range, mean), variance) in ranges.iter_mut().zip(&means).zip(&variances) {
                let reach = sigmas * variance.sqrt();
                *range = (range.0.max(mean - reach), range.1.min(mean + reach));
            }
        }
        Some(Self { ranges, means, variances, sinks })
    }

    /// The expected squared error of all outputs behind `affine`: rounding noise of the activation through the weights, and of the
    /// weights under the activation's power, both uniform within a step.
    fn error(&self, affine: &Affine, symmetric: bool, steps: f64, weight_steps: f64) -> f64 {
        let ends = |((range, r), t): ((&(f64, f64), &f64), &f64)| (range.0 / r + t, range.1 / r + t);
        let moved = || self.ranges.iter().zip(&affine.divisor).zip(&affine.shift).map(ends);
        let (low, high) = moved().fold((0.0_f64, 0.0_f64), |all, range| (all.0.min(range.0), all.1.max(range.1)));
        let width = if symmetric { 2.0 * high.max(-low) } else { high - low };
        let noise = (width / steps).powi(2) / 12.0;
        let of = |j: usize| {
            let (r, t) = (affine.divisor[j], affine.shift[j]);
            self.variances[j] / (r * r) + (self.means[j] / r + t).powi(2)
        };
        let power: f64 = (0..self.means.len()).map(of).sum();
        let of_sink = |sink: &Sink| {
            let through: f64 = sink.energy.iter().zip(&affine.divisor).map(|(e, r)| e * r * r).sum();
            let step = |row: &Vec<f32>| {
                let peak = row.iter().zip(&affine.divisor).map(|(w, r)| f64::from(w.abs()) * r).fold(0.0, f64::max);
                (peak / weight_steps).powi(2)
            };
            noise * through + sink.rows.iter().map(step).sum::<f64>() / 12.0 * power
        };
        self.sinks.iter().map(of_sink).sum()
    }
}

impl ReparameterizeNorms {
    /// What is best done to what `group` reads, when it beats doing nothing by a tenth, with the share of the error that is left; with a
    /// given strength, that, and nothing left.
    fn choose(&self, model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<(Affine, f64)> {
        let norm = Norm::of(model.graph(), group.value)?;
        if self.bare {
            let affine = norm.bare(model.graph()).filter(Affine::changes)?;
            let shifts = affine.shift.iter().any(|t| *t != 0.0);
            return (norm.takes_shift() || !shifts).then_some((affine, 0.0));
        }
        let channels = Channels::of(model, group, self.sigmas)?;
        let levels = |bits: u32| 2.0_f64.powi(i32::try_from(bits).unwrap_or(8)) - 1.0;
        let (steps, weight_steps) =
            (levels(cx.scheme.activation_bits?), levels(cx.scheme.weight_bits.saturating_sub(1).max(1)));
        let symmetric = cx.target.accepts().activations != Activations::Affine;
        let shifted = match (norm.takes_shift(), symmetric) {
            (false, _) => Shifted::No,
            (true, false) => Shifted::Affine,
            (true, true) => Shifted::Centered,
        };
        let affine = |strength: f64, shifted: Shifted| Affine::of(&channels.ranges, steps, strength, shifted);
        if let Some(strength) = self.strength {
            return Some((affine(strength, shifted), 0.0)).filter(|(affine, _)| affine.changes());
        }
        let error = |affine: &Affine| channels.error(affine, symmetric, steps, weight_steps);
        let nothing = error(&affine(0.0, Shifted::No));
        let candidates = (0..=4)
            .flat_map(|step| [affine(f64::from(step) / 4.0, Shifted::No), affine(f64::from(step) / 4.0, shifted)]);
        let (best, affine) = candidates.map(|a| (error(&a), a)).min_by(|a, b| a.0.total_cmp(&b.0))?;
        (best < 0.9 * nothing && affine.changes()).then(|| (affine, best / nothing))
    }
}

impl Affine {
    /// Whether anything is changed, in numbers that can be computed with.
    fn changes(&self) -> bool {
        let finite = self.divisor.iter().chain(&self.shift).all(|v| v.is_finite());
        finite && self.divisor.iter().zip(&self.shift).any(|(r, t)| (r - 1.0).abs() > 1e-9 || *t != 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::uniform;

    /// Codes of `value`, with a scale and a zero point: round(value / scale) + zero.
    fn code(value: f64, scale: f64, zero: f64) -> f64 {
        (value / scale).round() + zero
    }

    #[test]
    fn one_scale_and_zero_point_give_the_codes_of_the_channels_own() {
        let steps = 15.0;
        for seed in 0..50_u64 {
            let random = |at: u64| uniform(seed << 32 | at);
            // Ends on whole codes, as quantizers choose them.
            let scales: Vec<f64> = (0..8).map(|j| 10.0_f64.powf(1.5 * random(j) - 1.0)).collect();
            let zeros: Vec<f64> = (0..8).map(|j| (steps * random(20 + j)).round()).collect();
            let range = |j: usize| (-zeros[j] * scales[j], (steps - zeros[j]) * scales[j]);
            let ranges: Vec<(f64, f64)> = (0..8).map(range).collect();
            let affine = Affine::of(&ranges, steps, 1.0, Shifted::Affine);
            let scale = scales.iter().sum::<f64>() / 8.0;
            let zero = (zeros.iter().sum::<f64>() / 8.0).round();
            for at in 0..100_u64 {
                let j = usize::try_from(at % 8).unwrap();
                let y = ranges[j].0 + random(100 + at) * (ranges[j].1 - ranges[j].0);
                let moved = y / affine.divisor[j] + affine.shift[j];
                let (own, one) = (code(y, scales[j], zeros[j]), code(moved, scale, zero));
                assert!((own - one).abs() < 1e-9, "{seed}: {y} in channel {j} has code {own} and {one}");
            }
        }
    }

    #[test]
    fn equal_channels_and_those_of_one_value_change_nothing() {
        for shifted in [Shifted::No, Shifted::Affine] {
            let equal = Affine::of(&[(-2.0, 3.0); 4], 15.0, 1.0, shifted);
            assert!(equal.divisor.iter().all(|r| (r - 1.0).abs() < 1e-12), "{shifted:?}");
            assert!(equal.shift.windows(2).all(|t| (t[0] - t[1]).abs() < 1e-12), "{shifted:?}");
            let dead = Affine::of(&[(0.0, 0.0); 3], 15.0, 1.0, shifted);
            assert!(!dead.changes(), "{shifted:?}");
        }
        let one = Affine::of(&[(0.5, 0.5), (-1.0, 3.0)], 15.0, 1.0, Shifted::Affine);
        assert!(
            (one.divisor[0] - 1.0).abs() < 1e-12 && (one.shift[0] + 0.5).abs() < 1e-12,
            "what is constant becomes zero"
        );
    }

    #[test]
    fn wild_ranges_stay_within_reach() {
        let wild = Affine::of(&[(-1e-30, 1e-30), (-1e30, 1e30), (5.0, 6.0)], 255.0, 1.0, Shifted::Affine);
        assert!(wild.divisor.iter().all(|r| *r >= 1.0 / REACH && *r <= REACH), "{:?}", wild.divisor);
        assert!(wild.shift.iter().all(|t| t.is_finite()));
    }

    #[test]
    fn centered_ranges_lie_around_zero() {
        let affine = Affine::of(&[(1.0, 3.0), (-8.0, -2.0)], 255.0, 1.0, Shifted::Centered);
        for (range, j) in [((1.0, 3.0), 0), ((-8.0, -2.0), 1)] {
            let (low, high) =
                (range.0 / affine.divisor[j] + affine.shift[j], range.1 / affine.divisor[j] + affine.shift[j]);
            assert!((low + high).abs() < 1e-12 && (high - 2.0).abs() < 1e-12, "{low} {high}");
        }
    }
}
