//! Scales and shifts of norms, fitted anew behind rounded layers.
//!
//! A norm reads x̃ where the float model reads x. Its own row of scales γ and shifts β can take back what changed in mean and in
//! proportion, channel by channel: of all γ', β' those with the smallest
//!
//! ```text
//! E (y − y')² + ρ Var(ỹ) (a − 1)²,    y' = a ỹ + b,    γ' = a γ,    β' = a β + b,    ρ = 2 / n
//! ```
//!
//! where y is what the norm computes in the float model and ỹ what it would compute as planned, over n rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::lockstep::Lockstep;
use crate::model::{Edit, Plan};
use crate::ops;
use crate::pass::PassError;
use crate::simulate::{Crossing, Cutter, Version};
use crate::tensor::{DType, Tensor};

/// Of fewer rows nothing is learned.
const LEAST_ROWS: u64 = 256;

/// A norm whose scale and shift can be fitted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) node: NodeId,
    input: Version,
    /// The input that is the row of scales.
    scale: u16,
    /// The input that is the row of shifts.
    shift: Option<u16>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// `LayerNormalization` over the last axis, with its epsilon.
    Layer(f32),
    /// `RMSNormalization` over the last axis, with its epsilon, or what was called so before it was standard.
    MeanSquare(f32),
    /// The product with a row that ends a norm written out in simpler operators.
    Scale,
}

/// The norms of `graph` that compute in float under `plan`.
pub(super) fn find(graph: &Graph, plan: &Plan) -> Vec<Norm> {
    let cutter = Cutter { graph, plan };
    graph.nodes().filter_map(|(id, node)| norm(graph, &cutter, id, node)).collect()
}

/// Where `nodes` of `graph` read scales and shifts of norms that compute in float under `plan`.
pub(crate) fn sites(graph: &Graph, plan: &Plan, nodes: &[NodeId]) -> Vec<Site> {
    let cutter = Cutter { graph, plan };
    let norms = nodes.iter().filter_map(|&id| norm(graph, &cutter, id, graph.node(id)?));
    let of = |norm: Norm| [Some(norm.scale), norm.shift].into_iter().flatten().map(move |input| (norm.node, input));
    norms.flat_map(of).map(|(node, input)| Site::Use { node, input }).collect()
}

fn norm(graph: &Graph, cutter: &Cutter<'_>, id: NodeId, node: &Node) -> Option<Norm> {
    let rank = graph.value(node.output(0)?).ty.rank().filter(|&rank| rank >= 2)?;
    let row = |input: usize| {
        let tensor = graph.constant_input(node, input).filter(|tensor| tensor.dtype() == DType::F32)?;
        (tensor.shape().len() == 1 && tensor.len() > 1).then_some(())?;
        u16::try_from(input).ok()
    };
    let whole = |kind: fn(f32) -> Kind| {
        let last = ops::positive_axis(node.int("axis", -1), rank)? + 1 == rank;
        let alone = node.outputs.iter().flatten().count() == 1;
        (last && alone).then(|| kind(node.float("epsilon", 1e-5)))
    };
    let (activation, scale, shift, kind) = if node.op.is("LayerNormalization") {
        let shift = if node.input(2).is_some() { Some(row(2)?) } else { None };
        (0, row(1)?, shift, whole(Kind::Layer)?)
    } else if node.op.is("RMSNormalization") || node.op.is("SimplifiedLayerNormalization") {
        (0, row(1)?, None, whole(Kind::MeanSquare)?)
    } else if node.op.is("Mul") {
        let scale = row(0).or_else(|| row(1))?;
        let activation = usize::from(scale == 0);
        ends_a_norm(graph, node.input(activation)?).then_some(())?;
        (activation, scale, None, Kind::Scale)
    } else {
        return None;
    };
    let value = node.input(activation)?;
    let input = cutter.of_use(id, activation, value);
    let free = |input: u16| cutter.plan.encoding(Site::Use { node: id, input }).is_none();
    let of_input = graph.value(value).ty.rank() == Some(rank) && graph.constant(value).is_none();
    (of_input && free(scale) && shift.is_none_or(free)).then_some(Norm { node: id, input, scale, shift, kind })
}

/// Whether `value` is something times the inverse of its own root mean square: a product or quotient whose other operand came through
/// a mean and a root.
fn ends_a_norm(graph: &Graph, value: ValueId) -> bool {
    let Some((_, product)) = graph.producer(value).filter(|(_, node)| node.op.is("Mul") || node.op.is("Div")) else {
        return false;
    };
    let mut below: Vec<_> = product.inputs.iter().flatten().copied().collect();
    let (mut root, mut mean) = (false, false);
    for _ in 0..6 {
        let producers: Vec<&Node> = below.iter().filter_map(|value| Some(graph.producer(*value)?.1)).collect();
        let of_norm =
            |node: &&&Node| ["Sqrt", "Reciprocal", "Div", "Add", "ReduceMean", "Pow"].iter().any(|op| node.op.is(op));
        root |= producers.iter().any(|node| node.op.is("Sqrt") || node.op.is("Pow"));
        mean |= producers.iter().any(|node| node.op.is("ReduceMean"));
        below = producers.iter().filter(of_norm).flat_map(|node| node.inputs.iter().flatten().copied()).collect();
    }
    root && mean
}

/// Whether `edit` is the scale of one of `norms`.
pub(super) fn is_scale(edit: &Edit, norms: &[Norm]) -> bool {
    let of = |norm: &Norm| Site::Use { node: norm.node, input: norm.scale };
    matches!(edit, Edit::Substitute { site, .. } if norms.iter().any(|norm| of(norm) == *site))
}

/// Sums over the rows of one sample, channel by channel: y, ỹ, ỹ², y ỹ.
struct Sums {
    sample: usize,
    rows: u64,
    channels: Vec<[f64; 4]>,
}

/// The edits that fit `norms`, all of one stage.
pub(super) fn fit(walk: &Lockstep<'_>, graph: &Graph, plan: &Plan, norms: &[Norm]) -> Result<Vec<Edit>, PassError> {
    if norms.is_empty() {
        return Ok(Vec::new());
    }
    let crossing = Crossing::of(graph, plan);
    let seen = walk.each_fitted(usize::MAX, BTreeMap::new, |seen: &mut BTreeMap<NodeId, Vec<Sums>>, pair| {
        for norm in norms {
            let planned = pair.planned(norm.input, &crossing)?;
            let Some(float) = pair.float(norm.input.0).filter(|float| float.shape() == planned.shape()) else {
                continue;
            };
            if let (Some(y), Some(other)) = (norm.compute(graph, &float), norm.compute(graph, &planned)) {
                let channels = planned.shape().last().copied().unwrap_or(1).max(1);
                let mut sums = vec![[0.0; 4]; channels];
                for (y, other) in y.chunks_exact(channels).zip(other.chunks_exact(channels)) {
                    for (sums, (y, other)) in sums.iter_mut().zip(y.iter().zip(other)) {
                        let (y, other) = (f64::from(*y), f64::from(*other));
                        [y, other, other * other, y * other].iter().zip(sums).for_each(|(v, sum)| *sum += v);
                    }
                }
                let rows = (y.len() / channels) as u64;
                seen.entry(norm.node).or_default().push(Sums { sample: pair.index, rows, channels: sums });
            }
        }
        Ok(())
    })?;
    let mut edits = Vec::new();
    for norm in norms {
        let mut of_norm: Vec<&Sums> = seen.iter().filter_map(|seen| seen.get(&norm.node)).flatten().collect();
        // Sums of floats depend on their order: that of the samples.
        of_norm.sort_by_key(|sums| sums.sample);
        edits.extend(norm.edits(graph, &of_norm).into_iter().flatten());
    }
    Ok(edits)
}

impl Norm {
    /// What the norm returns, behind the addition of a row of shifts where it is written out, and where its scales and shifts are read.
    pub(super) fn returned(&self, graph: &Graph, users: &Users, plan: &Plan) -> Option<(ValueId, Vec<Site>)> {
        let own = [Some(self.scale), self.shift].into_iter().flatten();
        let mut sites: Vec<Site> = own.map(|input| Site::Use { node: self.node, input }).collect();
        let value = graph.node(self.node)?.output(0)?;
        let channels = self.row(graph, self.scale)?.len();
        let after =
            ops::only_addition(graph, users, value).filter(|_| self.kind == Kind::Scale).and_then(|(add, input)| {
                let node = graph.node(add)?;
                let row = graph.constant_input(node, input.into()).filter(|row| row.dtype() == DType::F32)?;
                (row.shape() == [channels]).then_some((Site::Use { node: add, input }, node.output(0)?))
            });
        match after {
            Some((site, shifted)) if plan.encoding(site).is_none() => {
                sites.push(site);
                Some((shifted, sites))
            }
            Some(_) => None,
            None => Some((value, sites)),
        }
    }

    fn row(&self, graph: &Graph, input: u16) -> Option<Vec<f32>> {
        Some(graph.constant_input(graph.node(self.node)?, input.into())?.floats()?.into_owned())
    }

    /// What the norm makes of `x`.
    fn compute(&self, graph: &Graph, x: &Tensor) -> Option<Vec<f32>> {
        let scales = self.row(graph, self.scale)?;
        let shifts = match self.shift {
            Some(input) => self.row(graph, input)?,
            None => vec![0.0; scales.len()],
        };
        let values = x.values::<f32>()?;
        if x.shape().last() != Some(&scales.len()) || shifts.len() != scales.len() {
            return None;
        }
        let mut result = Vec::with_capacity(values.len());
        for row in values.chunks_exact(scales.len()) {
            let (mean, inverse) = match self.kind {
                Kind::Scale => (0.0, 1.0),
                Kind::MeanSquare(epsilon) => {
                    let square = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
                    (0.0, 1.0 / (square + epsilon).sqrt())
                }
                Kind::Layer(epsilon) => {
                    let n = row.len() as f32;
                    let mean = row.iter().sum::<f32>() / n;
                    let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
                    (mean, 1.0 / (variance + epsilon).sqrt())
                }
            };
            let channels = row.iter().zip(scales.iter().zip(&shifts));
            result.extend(channels.map(|(v, (scale, shift))| (v - mean) * inverse * scale + shift));
        }
        result.iter().all(|v| v.is_finite()).then_some(result)
    }

    #[expect(clippy::cast_possible_truncation, reason = "scales and shifts are f32")]
    fn edits(&self, graph: &Graph, seen: &[&Sums]) -> Option<Vec<Edit>> {
        let mut scales = self.row(graph, self.scale)?;
        let mut shifts = match self.shift {
            Some(input) => Some(self.row(graph, input)?),
            None => None,
        };
        let n = seen.iter().map(|sums| sums.rows).sum::<u64>();
        if n < LEAST_ROWS || seen.iter().any(|sums| sums.channels.len() != scales.len()) {
            return None;
        }
        let rows = n as f64;
        for channel in 0..scales.len() {
            let [y, other, squares, products] =
                std::array::from_fn(|k| seen.iter().map(|sums| sums.channels[channel][k]).sum::<f64>() / rows);
            let (a, b) = if shifts.is_some() {
                fitted((squares - other * other, products - y * other), rows).map_or((1.0, 0.0), |a| (a, y - a * other))
            } else {
                (fitted((squares, products), rows).unwrap_or(1.0), 0.0)
            };
            scales[channel] = (f64::from(scales[channel]) * a) as f32;
            if let Some(shifts) = &mut shifts {
                shifts[channel] = (f64::from(shifts[channel]) * a + b) as f32;
            }
        }
        let substitute = |input: u16, values: Vec<f32>| Edit::Substitute {
            site: Site::Use { node: self.node, input },
            tensor: Arc::new(Tensor::of([values.len()], values)),
        };
        let shift = self.shift.zip(shifts).map(|(input, shifts)| substitute(input, shifts));
        Some(std::iter::once(substitute(self.scale, scales)).chain(shift).collect())
    }
}

/// a for the variance of ỹ and its covariance with y, when it stays near 1: a norm whose output changed beyond that is broken, not off.
fn fitted((variance, covariance): (f64, f64), rows: f64) -> Option<f64> {
    let ridge = 2.0 / rows * variance;
    let a = (covariance + ridge) / (variance + ridge);
    (variance > 0.0 && (0.5..=2.0).contains(&a)).then_some(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    #[test]
    fn a_channel_that_was_halved_is_doubled_and_noise_shrinks() {
        // Var 0.25, cov 0.5: y = 2 ỹ.
        assert!((fitted((0.25, 0.5), 1e9).unwrap() - 2.0).abs() < 1e-6);
        // Noise as strong as a tenth of the signal.
        assert!((fitted((1.1, 1.0), 1e9).unwrap() - 1.0 / 1.1).abs() < 1e-6);
        assert_eq!(fitted((0.0, 0.0), 1e3), None);
        assert_eq!(fitted((1.0, 3.0), 1e3), None);
    }

    #[test]
    fn what_did_not_change_stays() {
        for (variance, rows) in [(0.3, 256.0), (1e-6, 1e4), (50.0, 1e9)] {
            assert!((fitted((variance, variance), rows).unwrap() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn what_is_fitted_never_loses_on_what_was() {
        let mut found = 0;
        for seed in 0..500_u64 {
            let draw = |at: u64| uniform(mixed(seed) ^ at);
            let (variance, rows) = (0.01 + 4.0 * draw(0), 256.0 + 10_000.0 * draw(1));
            let covariance = 3.0 * variance * draw(2);
            let Some(a) = fitted((variance, covariance), rows) else { continue };
            let ridge = 2.0 * variance / rows;
            let loss = |a: f64| a * a * variance - 2.0 * a * covariance + ridge * (a - 1.0).powi(2);
            assert!(loss(a) <= loss(1.0) + 1e-12, "{variance} {covariance} {rows}: {a}");
            found += 1;
        }
        assert!(found > 100, "{found}");
    }
}
