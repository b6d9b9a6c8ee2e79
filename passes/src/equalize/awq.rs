//! Activation-aware scales: channels that carry much get finer steps.

use std::collections::BTreeSet;

use super::divided::{self, Choice, Group, groups, last_axis};
use crate::grid::{self, Grid};
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::model::{Model, Patch};
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};

crate::declare_pass! {
    /// Multiplies the weights of channels whose activations are large by s and divides those activations by s, so that what weighs
    /// most in the output is rounded in finer steps.
    ///
    /// ```text
    /// s[j] = rms(x[j])^a, scaled so that max s · min s = 1,    x'[j] = x[j] / s[j],    w'[j] = s[j] · w[j]
    /// ```
    ///
    /// The exponent a is searched per tensor from 0, which does nothing, to 0.95, for the smallest
    /// Σ E\[x\[j\]²\] (ŵ\[j\] − w\[j\])² of weights rounded to nearest in the bits and blocks of the scheme. All matrix products that read a
    /// tensor share one s. The division goes into whatever makes the tensor; where nothing takes it, a `Mul` stands before the
    /// products, if it takes a third of the error away. Channels that are always zero keep their weights. Does nothing where
    /// activations are rounded: there `smooth` weighs both.
    INFO {
        name: "awq",
        source: "Lin et al. 2023, arXiv:2306.00978; rms for the mean magnitude, and the diagonal of the error, ours",
        cost: "One forward pass for powers; then every weight is rounded once per candidate exponent, 20 of them.",
        requires: Facts::CALIBRATED,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Awq)) };

/// See [`INFO`].
#[derive(Debug)]
struct Awq;

/// What remains of the error must be below this for a division that is folded, or that costs a node.
const FOLDED: f64 = 0.97;
const INSERTED: f64 = 2.0 / 3.0;

fn wanted(graph: &Graph, cx: &PassContext<'_>) -> Vec<Group> {
    let integers = cx.scheme.activation_bits.is_none() && cx.scheme.weight_format.is_none();
    if integers { groups(graph, cx) } else { Vec::new() }
}

impl Pass for Awq {
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

/// s for exponent `alpha`.
pub(super) fn divisors(powers: &[f64], alpha: f64) -> Vec<f64> {
    let least = powers.iter().copied().filter(|&p| p > 0.0).fold(f64::INFINITY, f64::min);
    let raw: Vec<f64> = powers.iter().map(|&p| (p.max(least)).powf(alpha / 2.0)).collect();
    let (low, high) = raw.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), &s| (low.min(s), high.max(s)));
    let middle = (low * high).sqrt();
    raw.iter().map(|s| if middle.is_normal() { (s / middle).clamp(1e-4, 1e4) } else { 1.0 }).collect()
}

/// The best division for `group`, when it is worth it.
fn choose(model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<Choice> {
    let graph = model.graph();
    let powers = model.stats().peaks(group.value, last_axis(graph, group.value)?)?.powers();
    let grid = grid::find(&format!("int{}", cx.scheme.weight_bits))?;
    let sinks: Vec<Vec<Vec<f32>>> =
        group.sinks.iter().map(|&id| rows(graph, id, powers.len())).collect::<Option<_>>()?;
    let error = |divisor: &[f64]| {
        let of_row = |row: &Vec<f32>| row_error(row, divisor, &powers, grid, cx.scheme.block.unwrap_or(row.len()));
        sinks.iter().flatten().map(of_row).sum::<f64>()
    };
    let nothing = error(&vec![1.0; powers.len()]);
    let candidates = (1..20).map(|step| group.tied(divisors(&powers, f64::from(step) / 20.0)));
    let (best, divisor) = candidates.map(|d| (error(&d), d)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best < FOLDED * nothing).then(|| Choice { divisor, left: best / nothing })
}

/// The rows of the weight of the product `id`, one per output.
fn rows(graph: &Graph, id: NodeId, inputs: usize) -> Option<Vec<Vec<f32>>> {
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(graph.node(id)?, roles.weight.into())?;
    let values = weight.floats()?;
    let [first, second] = *weight.shape() else { return None };
    let rows: Vec<Vec<f32>> = if roles.out_axis == 0 {
        values.chunks_exact(second.max(1)).map(<[f32]>::to_vec).collect()
    } else {
        (0..second).map(|o| (0..first).map(|j| values[j * second + o]).collect()).collect()
    };
    rows.iter().all(|row| row.len() == inputs).then_some(rows)
}

/// Σ E\[x²\] (ŵ − w)² of a row rounded to nearest after multiplication, in blocks whose peak is the largest code.
#[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
fn row_error(row: &[f32], divisor: &[f64], powers: &[f64], grid: &dyn Grid, block: usize) -> f64 {
    let mut error = 0.0;
    let block = block.max(1);
    for ((row, divisor), powers) in row.chunks(block).zip(divisor.chunks(block)).zip(powers.chunks(block)) {
        let scaled: Vec<f32> = row.iter().zip(divisor).map(|(w, s)| (f64::from(*w) * s) as f32).collect();
        let peak = scaled.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
        let scale = peak / grid.range().1 as f32;
        if !scale.is_normal() {
            continue;
        }
        let mut points: Vec<f32> = scaled.iter().map(|w| w / scale).collect();
        grid.snap(&mut points, 0.0);
        for (((w, p), s), power) in scaled.iter().zip(&points).zip(divisor).zip(powers) {
            error += power * (f64::from(p * scale - w) / s).powi(2);
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    #[test]
    fn divisors_grow_with_the_power_and_mean_nothing_at_zero() {
        let flat = divisors(&[4.0, 1.0, 0.0], 0.0);
        assert!(flat.iter().all(|s| (s - 1.0).abs() < 1e-12), "{flat:?}");
        let some = divisors(&[4.0, 1.0, 0.0], 0.5);
        assert!(
            (some[0] / some[1] - 2.0_f64.sqrt()).abs() < 1e-9 && (some[0] * some[1] - 1.0).abs() < 1e-9,
            "{some:?}"
        );
        assert!((some[2] - some[1]).abs() < 1e-12, "a channel that is always zero counts as the quietest");
        assert!(divisors(&[0.0; 3], 0.5).iter().all(|s| (s - 1.0).abs() < 1e-12));
        let even = divisors(&[9.0; 4], 0.7);
        assert!(even.iter().all(|s| (s - 1.0).abs() < 1e-12), "equal channels need nothing: {even:?}");
    }

    #[test]
    fn divisors_are_positive_within_reach_and_grow_with_the_power() {
        for seed in 0..200_u64 {
            let random = |at: u64| uniform(seed << 32 | at);
            let power = |at: u64| if random(at) < 0.2 { 0.0 } else { 10.0_f64.powf(30.0 * random(at + 1) - 15.0) };
            let powers: Vec<f64> = (0..=mixed(seed) % 20).map(|j| power(10 + 2 * j)).collect();
            let found = divisors(&powers, random(0));
            assert_eq!(found.len(), powers.len());
            assert!(found.iter().all(|s| (9.99e-5..=1.001e4).contains(s)), "{seed}: {found:?}");
            let least = found.iter().copied().fold(f64::INFINITY, f64::min);
            for (p, s) in powers.iter().zip(&found) {
                let grows = powers.iter().zip(&found).all(|(q, t)| p > q || *s <= t * (1.0 + 1e-12));
                assert!(grows, "{seed}: {powers:?} {found:?}");
                assert!(*p > 0.0 || (s - least).abs() < 1e-12, "{seed}: {powers:?} {found:?}");
            }
        }
    }

    /// The loudest channel grows as much as the quietest shrinks; the unit of the activation, and the order of channels, play no part.
    #[test]
    fn divisors_lie_around_one_in_any_order_and_unit() {
        for seed in 0..100_u64 {
            let power = |j: u64| 10.0_f64.powf(6.0 * uniform(seed << 32 | j) - 3.0);
            let powers: Vec<f64> = (0..2 + mixed(seed) % 20).map(power).collect();
            let alpha = uniform(mixed(seed));
            let found = divisors(&powers, alpha);
            let ends = found.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), s| (low.min(*s), high.max(*s)));
            assert!((ends.0 * ends.1 - 1.0).abs() < 1e-9, "{seed}: {found:?}");
            let turned = divisors(&powers.iter().rev().copied().collect::<Vec<_>>(), alpha);
            assert!(turned.iter().rev().eq(found.iter()), "{seed}: {turned:?} {found:?}");
            let louder = divisors(&powers.iter().map(|p| 1e4 * p).collect::<Vec<_>>(), alpha);
            assert!(louder.iter().zip(&found).all(|(a, b)| (a / b - 1.0).abs() < 1e-9), "{seed}: {louder:?} {found:?}");
        }
    }
}
