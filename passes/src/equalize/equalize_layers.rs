//! Cross-layer equalization.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::balance;
use super::lanes::Lanes;
use super::region::{Region, free_regions};
use super::rescaled::rescale;
use super::smooth::divisors;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, ValueId};
use crate::model::{Edit, Model, Patch, Statistic};
use crate::observe::Peaks;
use crate::parallel;
use crate::pass::{
    Facts, Fidelity, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish,
};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Divides channels of the tensors between convolutions by s, in the weights of the convolutions that write them, and multiplies
    /// the weights that read them by s.
    ///
    /// ```text
    /// W'[o, …] = W[o, …] / s[o],   b'[o] = b[o] / s[o]      where the tensor is written
    /// W'[…, j, …] = s[j] · W[…, j, …]                       where it is read
    /// ```
    ///
    /// Tensors that `Relu`, `LeakyRelu`, pools and sums connect share one s; a region that anything else writes or reads is left
    /// alone, and so is one with a clamp such as Relu6, through which no scale passes. With `clamps=M` it is not: channels of which some
    /// sample reaches the end of the clamp share one s, and the others grow until M times their largest value would reach it, so
    /// that the clamp stays as it is and the function is the same for all samples, and for what is neither M times larger than the peak
    /// of its channel nor beyond the end of the clamp. That is exact for the samples only, which a note says.
    /// s\[j\] = peak(x\[j\])^a / peak(w\[j\])^(1−a) with the exponent a that gives the smallest expected error of what is computed from the region at the scheme's bits; doing nothing
    /// is among the candidates. Dead channels keep s = 1, and so does every region of which
    /// something was not measured or the user wants something in float. Exact over the reals where no clamps are passed.
    ///
    /// With `from=weights` no samples are asked: s\[j\] = √(r₁ / r₂), with r₁ the largest weight that writes a channel and r₂ the largest that
    /// reads it, so that both come to one. That goes channel by channel, through products, `Gemm` and transposed convolutions as well, `PRelu`,
    /// factors, joins (`Concat`), and what moves or cuts axes anew, runs of a channel among it; a channel that anything else writes or reads
    /// stays, and no other. With `clamps=exact` every channel of a clamp ends where it did, by a `Min` behind it, which kernels on bytes do not take in as they do a
    /// clamp. In place of `smooth` and the form by peaks, not behind them: it would undo their choice.
    INFO {
        name: "equalize-layers",
        source: "Nagel et al. 2019, arXiv:1906.04721, section 4.1; regions after Brevitas; choice by expected error, and channel by channel, ours",
        cost: "One forward pass for peaks; then every weight of a region is measured once per candidate exponent. No more data. From weights: no data; sweeps over every kernel's largest weight, 50 of them where there are many, and more where few.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[
            OptionInfo {
                name: "clamps",
                doc: "regions with clamps too, channels growing until so many times their peak would be clamped, from 1 on; or, from weights, exact: a `Min` behind the clamp; by default such regions are left alone",
            },
            OptionInfo { name: "from", doc: "peaks (default): by peaks of samples and expected error; weights: by ranges of weights alone" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(EqualizeLayers::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct EqualizeLayers {
    /// How many times the peak of a channel its clamp lets pass.
    clamps: Option<f64>,
    /// Whether ranges of weights decide alone; with clamps that end per channel, or without clamps.
    by_weights: Option<bool>,
}

impl EqualizeLayers {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let refused = |option: &str, problem: String| Err(OptionError { option: option.into(), problem });
        let by_weights = match options.text("from", "peaks") {
            "peaks" => false,
            "weights" => true,
            other => return refused("from", format!("`{other}` is neither peaks nor weights")),
        };
        match (options.text("clamps", ""), by_weights) {
            ("exact", true) => return Ok(Self { clamps: None, by_weights: Some(true) }),
            ("", true) => return Ok(Self { clamps: None, by_weights: Some(false) }),
            ("exact", false) => return refused("clamps", "`exact` goes with from=weights".into()),
            (_, true) => return refused("clamps", "with from=weights it is exact, or left out".into()),
            (_, false) => {}
        }
        let clamps = options.number("clamps")?;
        match clamps.filter(|margin| *margin < 1.0) {
            Some(margin) => refused("clamps", format!("`{margin}` is less than 1")),
            None => Ok(Self { clamps, by_weights: None }),
        }
    }
}

/// `model` with channels divided by what ranges of weights say; with `clamps`, through clamps that end somewhere too.
fn balanced(model: &Model, cx: &PassContext<'_>, clamps: bool) -> Result<Patch, PassError> {
    let (mut patch, lanes) = (Patch::on(model), Lanes::of(model, cx, clamps));
    let Some(s) = balance::factors(&lanes, cx, INFO.about.name)? else { return Ok(patch) };
    if rescale(model, &lanes, &s, &mut patch).is_none() {
        return Ok(Patch::on(model));
    }
    patch.count("channels", s.iter().filter(|s| (**s - 1.0).abs() > f64::EPSILON).count() as u64);
    Ok(patch)
}

impl Pass for EqualizeLayers {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn fidelity(&self) -> Fidelity {
        if self.clamps.is_some() { Fidelity::OnSamples } else { INFO.fidelity }
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if !cx.scheme.fixes_ranges() || self.by_weights.is_some() {
            return BTreeSet::new();
        }
        let graph = model.graph();
        let read = |sink: &NodeId| graph.node(*sink)?.input(0);
        let of = |region: &Region| -> Vec<ValueId> {
            region.sinks.iter().filter_map(read).chain(region.clamps.iter().map(|clamp| clamp.0)).collect()
        };
        let values = free_regions(graph, cx, self.clamps.is_some()).iter().flat_map(of).collect::<Vec<_>>();
        values.into_iter().map(|value| (value, Wish::Peaks { axis: 1 })).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        if let Some(clamps) = self.by_weights {
            return balanced(model, cx, clamps);
        }
        let mut patch = Patch::on(model);
        if !cx.scheme.fixes_ranges() {
            return Ok(patch);
        }
        let graph = model.graph();
        let regions = free_regions(graph, cx, self.clamps.is_some());
        let divisors = parallel::map(&regions, |region| divisor(model, region, self.clamps, cx));
        let mut clamped = 0;
        for (region, divisor) in regions.iter().zip(divisors) {
            let nodes = || region.sources.iter().chain(&region.inside).chain(&region.sinks);
            let Some(divisor) = divisor.filter(|_| !nodes().any(|id| patch.touches(*id))) else { continue };
            if apply(model, region, &divisor, &mut patch).is_some() {
                patch.count("regions", 1);
                clamped += u32::from(!region.clamps.is_empty());
            }
        }
        if let Some(margin) = self.clamps.filter(|_| clamped > 0) {
            let message = format!(
                "equalize-layers: {clamped} regions with clamps were changed; the function is the same for the samples, and for what is \
                 neither {margin} times larger than the peak of its channel nor beyond the end of the clamp"
            );
            patch.note(Diagnostic::new(diag::RELAXED, Severity::Note, Place::Model, message));
        }
        Ok(patch)
    }
}

/// What a sink does with the channels of the region.
struct Sink<'a> {
    peaks: &'a Peaks,
    /// Per input channel, the largest magnitude and the sum of squares of the weights that read it.
    largest: Vec<f64>,
    energy: Vec<f64>,
    /// Per output row, the first channel that it reads, and the largest weight per channel from there on.
    rows: Vec<(usize, Vec<f64>)>,
}

fn sink(model: &Model, id: NodeId, channels: usize) -> Option<Sink<'_>> {
    let graph = model.graph();
    let node = graph.node(id)?;
    let peaks = model.stats().peaks(node.input(0)?, 1).filter(|peaks| peaks.values().len() == channels)?;
    let weight = graph.constant_input(node, 1)?;
    let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
    let taps: usize = weight.shape()[2..].iter().product();
    let groups = channels.checked_div(inputs)?;
    (groups > 0 && groups * inputs == channels && outputs.is_multiple_of(groups)).then_some(())?;
    let values = weight.floats()?;
    let (mut largest, mut energy) = (vec![0.0_f64; channels], vec![0.0_f64; channels]);
    let mut rows = Vec::with_capacity(outputs);
    for (o, row) in values.chunks(inputs * taps).enumerate() {
        let first = o / (outputs / groups) * inputs;
        let mut tops = vec![0.0_f64; inputs];
        for (j, kernel) in row.chunks(taps.max(1)).enumerate() {
            let top = kernel.iter().fold(0.0_f64, |m, w| m.max(f64::from(w.abs())));
            tops[j] = top;
            largest[first + j] = largest[first + j].max(top);
            energy[first + j] += kernel.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        }
        rows.push((first, tops));
    }
    Some(Sink { peaks, largest, energy, rows })
}

impl Sink<'_> {
    /// The expected squared error of its outputs with channels divided by `s`: the activation's rounding through the weights, and
    /// that of the weights under the activation's power.
    fn error(&self, s: &[f64], activation_levels: f64, weight_levels: f64) -> f64 {
        let top = self.peaks.values().iter().zip(s).map(|(p, s)| f64::from(*p) / s).fold(0.0, f64::max);
        let noise = (top / activation_levels).powi(2) / 12.0;
        let through: f64 = self.energy.iter().zip(s).map(|(e, s)| e * s * s).sum();
        let powers = self.peaks.powers();
        let of_row = |(first, tops): &(usize, Vec<f64>)| {
            let mine = *first..first + tops.len();
            let step = tops.iter().zip(&s[mine.clone()]).map(|(w, s)| w * s).fold(0.0, f64::max) / weight_levels;
            let power: f64 = powers[mine.clone()].iter().zip(&s[mine]).map(|(p, s)| p / (s * s)).sum();
            step * step / 12.0 * power
        };
        noise * through + self.rows.iter().map(of_row).sum::<f64>()
    }
}

/// Less than this is not worth other weights.
const LEAST_GAIN: f64 = 0.95;

/// What the clamps of a region ask of s.
struct Bounds {
    /// Which channels are divided by 1: those that reach the end of a clamp, and dead ones.
    fixed: Vec<bool>,
    /// The least that every other channel may be divided by; 0 for dead ones.
    least: Vec<f64>,
}

impl Bounds {
    /// Those of `region`, where a clamp must let pass `margin` times the peak of a channel; `None` where one was not measured.
    fn of(model: &Model, region: &Region, margin: f64) -> Option<Self> {
        let mut bounds = Self { fixed: vec![false; region.channels], least: vec![0.0; region.channels] };
        for (value, high) in &region.clamps {
            let peaks = model.stats().peaks(*value, 1).filter(|peaks| peaks.values().len() == region.channels)?;
            for (j, peak) in peaks.values().iter().enumerate() {
                bounds.fixed[j] |= f64::from(*peak) >= *high;
                bounds.least[j] = bounds.least[j].max(margin * f64::from(*peak) / high);
            }
        }
        let dead = |least: &f64| *least == 0.0 && !region.clamps.is_empty();
        bounds.fixed.iter_mut().zip(&bounds.least).for_each(|(fixed, least)| *fixed |= dead(least));
        Some(bounds)
    }

    /// `s` with what the clamps ask of it, in units in which channels that reach an end have 1 on average.
    fn within(&self, s: &[f64]) -> Vec<f64> {
        let all = || s.iter().zip(&self.fixed).zip(&self.least).map(|((s, fixed), least)| (s, *fixed, *least));
        let reached = || all().filter(|(_, fixed, least)| *fixed && *least > 0.0);
        let unit = (reached().map(|(s, ..)| s.ln()).sum::<f64>() / reached().count().max(1) as f64).exp();
        all().map(|(s, fixed, least)| if fixed { 1.0 } else { (s / unit).max(least) }).collect()
    }
}

/// The best s of `region`; `None` where doing nothing is about as good.
fn divisor(model: &Model, region: &Region, clamps: Option<f64>, cx: &PassContext<'_>) -> Option<Vec<f64>> {
    let bounds = Bounds::of(model, region, clamps.unwrap_or(1.0))?;
    let sinks: Vec<Sink<'_>> =
        region.sinks.iter().map(|&id| sink(model, id, region.channels)).collect::<Option<_>>()?;
    let levels = |bits: u32| 2.0_f64.powi(i32::try_from(bits).unwrap_or(8)) - 1.0;
    let activation_levels = levels(cx.scheme.activation_bits?);
    let weight_levels = levels(cx.scheme.weight_bits.saturating_sub(1).max(1));
    let error = |s: &[f64]| sinks.iter().map(|sink| sink.error(s, activation_levels, weight_levels)).sum::<f64>();
    let mut peaks = vec![0.0_f32; region.channels];
    let mut weights = vec![0.0_f64; region.channels];
    for sink in &sinks {
        peaks.iter_mut().zip(sink.peaks.values()).for_each(|(top, peak)| *top = top.max(*peak));
        weights.iter_mut().zip(&sink.largest).for_each(|(top, weight)| *top = top.max(*weight));
    }
    let candidate = |step: i32| bounds.within(&divisors(&peaks, &weights, f64::from(step) / 20.0, 1e2));
    let nothing = error(&vec![1.0; region.channels]);
    let scored = (0..=20).map(candidate).map(|s| (error(&s), s));
    let (best, s) = scored.min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best < LEAST_GAIN * nothing && s.iter().all(|s| s.is_finite())).then_some(s)
}

/// Writes the nodes of `region` anew with channels divided by `s`; `None`, with an unchanged patch, where a constant does not fit.
fn apply(model: &Model, region: &Region, s: &[f64], patch: &mut Patch) -> Option<()> {
    let mark = patch.mark();
    let done = renew(model, region, s, patch);
    if done.is_none() {
        patch.roll_back(&mark);
    }
    done
}

fn renew(model: &Model, region: &Region, s: &[f64], patch: &mut Patch) -> Option<()> {
    let graph = model.graph();
    let within = |id: &NodeId| region.sources.contains(id) || region.inside.contains(id);
    let mut renewed: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (id, node) in graph.nodes().filter(|(id, _)| within(id)) {
        let output = node.output(0)?;
        let mut copy = node.clone();
        if region.sources.contains(&id) {
            let reads = region.sinks.contains(&id);
            for input in 1..node.inputs.len().min(3) {
                let Some(value) = node.input(input) else { continue };
                let tensor = graph.constant(value)?;
                let inner = tensor.len() / s.len();
                let columns = (reads && input == 1).then(|| Columns::of(tensor, s)).flatten();
                let factor = |index: usize| columns.as_ref().map_or(1.0, |c| c.factor(index)) / s[index / inner.max(1)];
                let name = format!("{}.equalized", graph.value(value).name);
                copy.inputs[input] = Some(patch.constant(&name, scaled(tensor, factor)?));
            }
        }
        for input in copy.inputs.iter_mut().flatten() {
            *input = renewed.get(input).copied().unwrap_or(*input);
        }
        patch.erase(id);
        let value = graph.value(output);
        let new = patch.node(copy, &format!("{}.equalized", value.name), value.ty.clone(), Some(id));
        renewed.insert(output, new);
        if let Some(trained) = model.stats().trained(output).and_then(|trained| trained.divided(s)) {
            patch.edit(Edit::Record { value: new, statistic: Statistic::Trained(Arc::new(trained)) });
        }
    }
    for &id in region.sinks.iter().filter(|id| !region.sources.contains(id)) {
        let node = graph.node(id)?;
        let weight = graph.constant_input(node, 1)?;
        let columns = Columns::of(weight, s)?;
        let mut copy = node.clone();
        let name = format!("{}.equalized", graph.value(node.input(1)?).name);
        copy.inputs[1] = Some(patch.constant(&name, scaled(weight, |index| columns.factor(index))?));
        copy.inputs[0] = Some(*renewed.get(&node.input(0)?)?);
        // Its output is the same over the reals; behind clamps on the samples, which all that was measured comes from.
        patch.replace(id, copy);
    }
    Some(())
}

/// Which channel of its input every element of a weight reads.
struct Columns<'a> {
    s: &'a [f64],
    per_group: usize,
    inputs: usize,
    taps: usize,
}

impl<'a> Columns<'a> {
    fn of(weight: &Tensor, s: &'a [f64]) -> Option<Self> {
        let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
        let groups = s.len().checked_div(inputs).filter(|groups| *groups > 0)?;
        let taps = weight.shape()[2..].iter().product();
        Some(Self { s, per_group: outputs / groups, inputs, taps })
    }

    fn factor(&self, index: usize) -> f64 {
        let (o, j) = (index / (self.inputs * self.taps), index / self.taps % self.inputs);
        self.s[o / self.per_group * self.inputs + j]
    }
}

/// `tensor` with the element at `index` multiplied by `factor(index)`.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn scaled(tensor: &Tensor, factor: impl Fn(usize) -> f64) -> Option<Tensor> {
    let values = tensor.floats()?;
    let scaled = values.iter().enumerate().map(|(index, v)| (f64::from(*v) * factor(index)) as f32).collect();
    Some(Tensor::of(tensor.shape(), scaled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_are_clamped_keep_their_units_and_the_others_stay_below_the_end() {
        let bounds = Bounds { fixed: vec![true, false, true, false, true], least: vec![1.0, 0.5, 1.0, 0.01, 0.0] };
        let s = bounds.within(&[4.0, 0.8, 9.0, 12.0, 50.0]);
        // In units of the geometric mean of 4 and 9; the last channel is dead.
        let want = [1.0, 0.5, 1.0, 2.0, 1.0];
        assert!(s.iter().zip(want).all(|(s, want)| (s - want).abs() < 1e-12), "{s:?}");
        let free = Bounds { fixed: vec![false; 2], least: vec![0.0; 2] };
        assert_eq!(free.within(&[0.25, 4.0]), [0.25, 4.0], "nothing is asked where there are no clamps");
    }

    #[test]
    fn every_weight_is_multiplied_by_the_factor_of_the_channel_that_it_reads() {
        for (groups, per_group, inputs, kernel) in
            [(1, 3, 2, [1, 1]), (2, 2, 3, [3, 2]), (4, 1, 1, [3, 3]), (3, 2, 1, [1, 5]), (2, 1, 2, [2, 1])]
        {
            let s: Vec<f64> = (0..groups * inputs).map(|j| 1.0 + j as f64).collect();
            let shape = [groups * per_group, inputs, kernel[0], kernel[1]];
            let weight = Tensor::of(shape, vec![0.0_f32; shape.iter().product()]);
            let columns = Columns::of(&weight, &s).unwrap();
            let taps = kernel[0] * kernel[1];
            for o in 0..groups * per_group {
                for j in 0..inputs {
                    // A filter reads the channels of its own group.
                    let want = s[o / per_group * inputs + j];
                    for tap in 0..taps {
                        let found = columns.factor((o * inputs + j) * taps + tap);
                        assert!((found - want).abs() < 1e-12, "{shape:?} in {groups}: {o} {j} {tap}");
                    }
                }
            }
        }
    }
}
