//! `SmoothQuant`: outliers of activations moved into weights.

use std::collections::BTreeSet;

use super::divided::{self, Choice, Group, groups, last_axis};
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::model::{Model, Patch};
use crate::observe::Peaks;
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};

crate::declare_pass! {
    /// Divides channels of an activation by s and multiplies the weights that read them by s, so that outliers of the
    /// activation no longer set the scale of all its channels.
    ///
    /// ```text
    /// s[j] = peak(x[j])^a / peak(w[j])^(1-a),    x'[j] = x[j] / s[j],    w'[j] = s[j] · w[j]
    /// ```
    ///
    /// All matrix products that read a tensor share one s. The exponent a is searched per tensor, with doing nothing among
    /// the candidates, for the smallest expected error of the outputs at the scheme's bits, from the peaks and powers of
    /// the channels. The division goes into whatever makes the tensor: a norm's scale and shift, also where it is written in
    /// primitives, the weight and bias of a product or a convolution, both sides of a sum, one operand of a product, the values of
    /// attention (heads that are grouped share factors); on its way it passes activations without a threshold, pools, what joins tensors,
    /// and what moves or cuts axes anew while channels stay apart. Where a tensor has other readers, or nothing takes the division, an
    /// explicit `Mul` stands before the products, if it pays at least threefold. Dead channels keep s = 1. Tensors of fewer than 1024 rows
    /// are left alone: their peaks are chance. Does nothing where activations stay in float.
    INFO {
        name: "smooth",
        source: "Xiao et al. 2022, arXiv:2211.10438; expected error in closed form ours",
        cost: "One forward pass for peaks; then every weight that reads a smoothed tensor is looked at once per candidate exponent, 21 of them. No more data.",
        requires: Facts::CALIBRATED,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Smooth)) };

/// See [`INFO`].
#[derive(Debug)]
struct Smooth;

/// A node is worth it where it takes two thirds of the error away.
pub(super) const INSERTED: f64 = 1.0 / 3.0;

impl Pass for Smooth {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        divided::wishes(model.graph(), wanted(model.graph(), cx))
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let groups = wanted(model.graph(), cx);
        Ok(divided::divide_all(model, &groups, INSERTED, |group| choose(model, group, cx)))
    }
}

/// Tensors that matrix products with a constant read, where the scheme rounds activations.
pub(super) fn wanted(graph: &Graph, cx: &PassContext<'_>) -> Vec<Group> {
    if cx.scheme.activation_bits.is_none() { Vec::new() } else { groups(graph, cx) }
}

/// Per sink: for every input channel the largest and the summed squared weight, and per output row the weights.
pub(super) struct Sink {
    /// Rows of `inputs` weights, one per output.
    pub(super) rows: Vec<Vec<f32>>,
    /// Σ over outputs of w².
    pub(super) energy: Vec<f64>,
}

pub(super) fn sink(graph: &Graph, id: NodeId) -> Option<Sink> {
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(graph.node(id)?, 1)?;
    let [first, second] = *weight.shape() else { return None };
    let values = weight.floats()?;
    let (outputs, inputs) = if roles.out_axis == 0 { (first, second) } else { (second, first) };
    let at = |o: usize, j: usize| values[if roles.out_axis == 0 { o * second + j } else { j * second + o }];
    let rows: Vec<Vec<f32>> = (0..outputs).map(|o| (0..inputs).map(|j| at(o, j)).collect()).collect();
    let mut energy = vec![0.0; inputs];
    for row in &rows {
        energy.iter_mut().zip(row).for_each(|(e, w)| *e += f64::from(*w).powi(2));
    }
    Some(Sink { rows, energy })
}

/// Peaks of fewer rows say little about the next one: a channel that was quiet by chance would be blown up, and clip.
pub(super) const LEAST_ROWS: u64 = 1024;

/// The best division for `group`, when it beats doing nothing by a tenth.
fn choose(model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<Choice> {
    let graph = model.graph();
    let peaks = model.stats().peaks(group.value, last_axis(graph, group.value)?)?;
    let sinks: Vec<Sink> = group.sinks.iter().map(|&id| sink(graph, id)).collect::<Option<_>>()?;
    let channels = peaks.values().len();
    if peaks.count() < LEAST_ROWS || channels == 0 || sinks.iter().any(|sink| sink.energy.len() != channels) {
        return None;
    }
    let largest = largest(&sinks, channels);
    let error = |divisor: &[f64]| expected_error(peaks, &sinks, divisor, cx);
    let nothing = error(&vec![1.0; channels]);
    let candidates = (0..=20).map(|step| group.tied(divisors(peaks.values(), &largest, f64::from(step) / 20.0, 1e3)));
    let (best, divisor) = candidates.map(|d| (error(&d), d)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best < 0.9 * nothing).then(|| Choice { divisor, left: best / nothing })
}

/// The largest weight of every channel.
pub(super) fn largest(sinks: &[Sink], channels: usize) -> Vec<f64> {
    let mut largest = vec![0.0_f64; channels];
    for row in sinks.iter().flat_map(|sink| &sink.rows) {
        largest.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(f64::from(w.abs())));
    }
    largest
}

/// s for exponent `alpha`, with geometric mean 1 and within `reach` of it; 1 for dead channels.
pub(super) fn divisors(peaks: &[f32], weights: &[f64], alpha: f64, reach: f64) -> Vec<f64> {
    let live = |x: f64, w: f64| x > 1e-9 && w > 1e-9;
    let raw: Vec<f64> = peaks
        .iter()
        .zip(weights)
        .map(|(&x, &w)| {
            let x = f64::from(x);
            if live(x, w) { x.powf(alpha) / w.powf(1.0 - alpha) } else { 1.0 }
        })
        .collect();
    let is_live = |j: usize| live(f64::from(peaks[j]), weights[j]);
    let n = (0..raw.len()).filter(|&j| is_live(j)).count().max(1) as f64;
    let mean = ((0..raw.len()).filter(|&j| is_live(j)).map(|j| raw[j].ln()).sum::<f64>() / n).exp();
    (0..raw.len()).map(|j| if is_live(j) { (raw[j] / mean).clamp(1.0 / reach, reach) } else { 1.0 }).collect()
}

/// The expected squared error of all outputs: rounding noise of the activation through the weights, and of the weights under
/// the activation's power, both uniform within a step.
pub(super) fn expected_error(peaks: &Peaks, sinks: &[Sink], divisor: &[f64], cx: &PassContext<'_>) -> f64 {
    let top = peaks.values().iter().zip(divisor).map(|(&p, s)| f64::from(p) / s).fold(0.0, f64::max);
    let levels = 2.0_f64.powi(i32::try_from(cx.scheme.activation_bits.unwrap_or(8)).unwrap_or(8)) - 1.0;
    // One bit has no steps of its own: it counts as two.
    let weight_levels = (2.0_f64.powi(i32::try_from(cx.scheme.weight_bits).unwrap_or(8) - 1) - 1.0).max(1.0);
    let noise = (2.0 * top / levels).powi(2) / 12.0;
    let power: f64 = peaks.powers().iter().zip(divisor).map(|(p, s)| p / (s * s)).sum();
    sinks
        .iter()
        .map(|sink| {
            let through: f64 = sink.energy.iter().zip(divisor).map(|(e, s)| e * s * s).sum();
            let step = |row: &Vec<f32>| {
                let peak = row.iter().zip(divisor).map(|(w, s)| f64::from(w.abs()) * s).fold(0.0, f64::max);
                (peak / weight_levels).powi(2)
            };
            noise * through + sink.rows.iter().map(step).sum::<f64>() / 12.0 * power
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    #[test]
    fn divisors_flatten_the_activation_at_one_and_the_weight_at_zero() {
        let (peaks, weights) = ([8.0_f32, 2.0, 0.0], [1.0, 4.0, 1.0]);
        let flat = divisors(&peaks, &weights, 1.0, 1e3);
        assert!((8.0 / flat[0] - 2.0 / flat[1]).abs() < 1e-9, "{flat:?}");
        let weight = divisors(&peaks, &weights, 0.0, 1e3);
        assert!((weights[0] * weight[0] - weights[1] * weight[1]).abs() < 1e-9, "{weight:?}");
        assert!((flat[2] - 1.0).abs() < 1e-12 && (flat[0] * flat[1] - 1.0).abs() < 1e-9, "{flat:?}");
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "peaks are f32")]
    fn divisors_are_positive_within_reach_and_one_where_dead() {
        for seed in 0..200_u64 {
            let random = |at: u64| uniform(seed << 32 | at);
            let size = |at: u64| if random(at) < 0.2 { 0.0 } else { 10.0_f64.powf(24.0 * random(at + 1) - 12.0) };
            let n = 1 + mixed(seed) % 20;
            let peaks: Vec<f32> = (0..n).map(|j| size(10 + 4 * j) as f32).collect();
            let weights: Vec<f64> = (0..n).map(|j| size(12 + 4 * j)).collect();
            let (alpha, reach) = (random(0), 10.0 + 990.0 * random(1));
            let found = divisors(&peaks, &weights, alpha, reach);
            assert_eq!(found.len(), peaks.len());
            let is_live = |j: usize| f64::from(peaks[j]) > 1e-9 && weights[j] > 1e-9;
            for (j, s) in found.iter().enumerate() {
                assert!(s.is_finite() && *s >= 0.999 / reach && *s <= 1.001 * reach, "{seed}: {s} of {reach}");
                assert!(is_live(j) || (s - 1.0).abs() < 1e-12, "{seed}: {s} for a dead channel");
            }
            let log: f64 = divisors(&peaks, &weights, alpha, 1e100).iter().map(|s| s.ln()).sum();
            assert!(log.abs() < 1e-6, "{seed}: a geometric mean of exp({log})");
        }
    }

    /// At a half, the peaks of activation and weight meet but for one factor of all channels: there is nothing left to move. The unit of
    /// the activation, and the order of channels, play no part.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "peaks are f32")]
    fn at_a_half_both_peaks_meet_and_once_is_enough() {
        for seed in 0..100_u64 {
            let size = |at: u64| 10.0_f64.powf(6.0 * uniform(seed << 32 | at) - 3.0);
            let n = 2 + mixed(seed) % 20;
            let peaks: Vec<f32> = (0..n).map(|j| size(2 * j) as f32).collect();
            let weights: Vec<f64> = (0..n).map(|j| size(2 * j + 1)).collect();
            let found = divisors(&peaks, &weights, 0.5, 1e30);
            let smoothed: Vec<f32> = peaks.iter().zip(&found).map(|(x, s)| (f64::from(*x) / s) as f32).collect();
            let grown: Vec<f64> = weights.iter().zip(&found).map(|(w, s)| w * s).collect();
            let ratios: Vec<f64> = smoothed.iter().zip(&grown).map(|(x, w)| f64::from(*x) / w).collect();
            assert!(ratios.iter().all(|r| (r / ratios[0] - 1.0).abs() < 1e-5), "{seed}: {ratios:?}");
            let again = divisors(&smoothed, &grown, 0.5, 1e30);
            assert!(again.iter().all(|s| (s - 1.0).abs() < 1e-5), "{seed}: {again:?}");
            let louder: Vec<f32> = peaks.iter().map(|x| 64.0 * x).collect();
            let turned: Vec<f32> = peaks.iter().rev().copied().collect();
            let turned = divisors(&turned, &weights.iter().rev().copied().collect::<Vec<_>>(), 0.5, 1e30);
            let same = |a: &f64, b: &f64| (a / b - 1.0).abs() < 1e-9;
            assert!(divisors(&louder, &weights, 0.5, 1e30).iter().zip(&found).all(|(a, b)| same(a, b)), "{seed}");
            assert!(turned.iter().rev().zip(&found).all(|(a, b)| same(a, b)), "{seed}");
        }
    }
}
