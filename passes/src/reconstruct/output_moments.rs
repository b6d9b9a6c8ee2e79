//! Second moments of the gradients that arrive at what layers compute: how errors of their channels add up at the outputs.
//!
//! Gradients are drawn at the outputs so that their second moment is that of an error there (see `Measure::drawn`) and go back through
//! the float model. With g what arrives at a row of a layer's result and x what the layer reads there, the curvature of what the model
//! returns is E\[g gᵀ ⊗ x xᵀ\], taken as G ⊗ H with H = E\[x xᵀ\] and G = E\[g gᵀ / ‖g‖\]: a few rows carry most of the gradients, and would
//! decide alone.
//!
//! Source: Martens and Grosse 2015 (K-FAC), arXiv:1503.05671, section 3; for rounding Tseng et al. 2025 (YAQA), arXiv:2505.22988,
//! section 3; rows that weigh by the size of their gradient, not by its square, ours.

use std::collections::BTreeMap;

use faer::MatRef;

use super::chain::{Arrived, Chain, Link};
use super::objective::LANES;
use super::triangle::Triangle;
use crate::grad::{Array, Slot, Values};
use crate::id::{NodeId, Site};
use crate::ir::Graph;
use crate::model::Model;
use crate::ops;
use crate::parallel;
use crate::pass::{PassContext, PassError};
use crate::seed;

/// The most weights of neighboring blocks whose tape is held at once.
const LAYERS: usize = 4;
/// Gradients are drawn from this.
const SEED: u64 = 0x6f_7574;
/// Layers with more channels in a group have none: factors take m³ / 3 multiply-adds, and m² numbers twice over.
const MAX_CHANNELS: usize = 4096;
/// So many rows of gradients are enough for every layer, times what is asked for; gradients are drawn at most so often for a sample, and
/// as much oftener where more is asked for.
const ROWS: usize = 1 << 13;
const DRAWS: usize = 4;

/// Σ g gᵀ / ‖g‖ over the rows g of what arrives at the channels of a layer's result, group after group.
#[derive(Debug)]
pub(crate) struct OutputMoments {
    /// Channels of a group.
    pub(crate) channels: usize,
    groups: Vec<Triangle>,
    /// Σ ‖g‖ and Σ ‖g‖² of rows of gradients.
    norms: (f64, f64),
}

impl OutputMoments {
    /// Nothing yet; `None` where channels are alone in their group, or too many.
    pub(crate) fn new(channels: usize, groups: usize) -> Option<Self> {
        let is_fitting = (2..=MAX_CHANNELS).contains(&channels);
        let groups = || (0..groups).map(|_| Triangle::new(channels)).collect();
        is_fitting.then(|| Self { channels, groups: groups(), norms: (0.0, 0.0) })
    }

    /// The bytes that it holds.
    pub(crate) fn held(&self) -> u64 {
        Self::bytes(self.channels, self.groups.len())
    }

    /// The bytes that so many take.
    fn bytes(channels: usize, groups: usize) -> u64 {
        Triangle::bytes(channels) * groups as u64
    }

    /// Adds `gradient`: `outer` times all channels of all groups, each over `inner` places.
    pub(crate) fn see(&mut self, gradient: &[f32], (outer, inner): (usize, usize)) {
        let m = self.channels;
        let size = self.groups.len() * m * inner;
        if size == 0 {
            return;
        }
        for sample in gradient.chunks_exact(size).take(outer) {
            let mut squares = vec![0.0_f32; inner];
            for channel in sample.chunks_exact(inner) {
                squares.iter_mut().zip(channel).for_each(|(square, g)| *square += g * g);
            }
            let roots = self.roots(&squares);
            let weighed: Vec<f32> =
                sample.chunks_exact(inner).flat_map(|g| g.iter().zip(&roots).map(|(g, root)| g * root)).collect();
            for (group, rows) in self.groups.iter_mut().zip(weighed.chunks_exact(m * inner)) {
                group.add(MatRef::from_row_major_slice(rows, m, inner));
            }
        }
    }

    /// The same for all channels of one group place by place.
    fn see_last(&mut self, gradient: &[f32]) {
        let m = self.channels;
        let squares: Vec<f32> = gradient.chunks_exact(m).map(|row| row.iter().map(|g| g * g).sum()).collect();
        let roots = self.roots(&squares);
        let weighed: Vec<f32> =
            gradient.chunks_exact(m).zip(&roots).flat_map(|(row, root)| row.iter().map(move |g| g * root)).collect();
        let rows = MatRef::from_row_major_slice(&weighed, roots.len(), m);
        self.groups.iter_mut().for_each(|group| group.add(rows.transpose()));
    }

    /// Counts rows of gradients with these `squares`, and returns the roots of what they weigh: one over their size.
    fn roots(&mut self, squares: &[f32]) -> Vec<f32> {
        for size in squares.iter().map(|square| f64::from(square.sqrt())) {
            self.norms = (self.norms.0 + size, self.norms.1 + size * size);
        }
        squares.iter().map(|square| if *square > 0.0 { square.powf(-0.25) } else { 0.0 }).collect()
    }

    /// So many rows of gradients, all of one size, these are worth.
    pub(crate) fn effective(&self) -> f64 {
        self.norms.0 * self.norms.0 / self.norms.1.max(f64::MIN_POSITIVE)
    }

    /// The moment of channels `a` and `b` of `group`, up to a factor that all share.
    pub(crate) fn at(&self, group: usize, a: usize, b: usize) -> f32 {
        self.groups[group].at(a, b)
    }

    /// Whether there is something for every group, all of it numbers.
    fn tells(&self) -> bool {
        self.effective().is_finite() && self.groups.iter().all(Triangle::tells)
    }
}

/// A layer, and where its channels are in what it computes.
#[derive(Clone, Copy, Debug)]
struct Layer {
    node: NodeId,
    slot: Slot,
    channels: usize,
    groups: usize,
    /// Whether they are the last axis, or the second.
    last: bool,
}

impl Layer {
    /// That whose weight is read at `site` and whose result is in `slot`.
    fn of(graph: &Graph, site: Site, slot: Slot) -> Option<Self> {
        let Site::Use { node: id, .. } = site else { return None };
        let roles = ops::linear(graph, id)?;
        let node = graph.node(id)?;
        let rows = graph.constant_input(node, roles.weight.into())?.shape()[roles.out_axis];
        let (groups, last) = match &*node.op.name {
            "MatMul" | "Gemm" if roles.weight == 1 => (1, true),
            "Conv" => (usize::try_from(node.int("group", 1)).ok().filter(|n| *n > 0)?, false),
            _ => return None,
        };
        Some(Self { node: id, slot, channels: rows / groups, groups, last })
    }

    /// Rows of gradients in `grad`.
    fn rows(&self, grad: &Array<f32>) -> usize {
        grad.len() / (self.channels * self.groups).max(1)
    }

    /// Adds what arrived for one sample; one of another shape is left out.
    fn add(&self, moments: &mut OutputMoments, grad: &Array<f32>) {
        let (shape, standard) = (grad.shape(), grad.as_standard_layout());
        let Some(values) = standard.as_slice() else { return };
        let channels = self.channels * self.groups;
        if self.last && shape.last() == Some(&channels) {
            moments.see_last(values);
        } else if !self.last && shape.get(1) == Some(&channels) {
            moments.see(values, (shape[0], shape[2..].iter().product()));
        }
    }
}

/// The layers of `link` whose channels are not alone.
fn layers(graph: &Graph, link: &Link) -> Vec<Layer> {
    let results = link.program.weights.iter().zip(&link.program.results);
    let layers = results.filter_map(|((_, site, _), slot)| Layer::of(graph, *site, *slot));
    layers.filter(|layer| (2..=MAX_CHANNELS).contains(&layer.channels)).collect()
}

/// The moments of all layers with an encoded weight whose channels are not alone, from samples that are not `spared`, of `times` as many
/// rows as usual; or why gradients cannot tell. Reported to the progress of `cx` as `stage`.
///
/// # Errors
/// [`PassError`] without samples, when the model does not run, or when the user interrupts.
pub(crate) fn output_moments(
    model: &Model,
    cx: &PassContext<'_>,
    (spared, times): (impl Fn(usize) -> bool, f64),
    stage: &str,
) -> Result<Result<BTreeMap<NodeId, OutputMoments>, String>, PassError> {
    let mut chain = match Chain::of_nearest(model, cx, LAYERS)? {
        Ok(chain) => chain,
        Err(reason) => return Ok(Err(reason)),
    };
    let fitted = crowded(model.graph(), &chain, cx).and_then(|sums| chain.fit_draws(cx, (sums, 0)));
    if let Err(reason) = fitted {
        return Ok(Err(reason));
    }
    let (chain, mut order) = chain.in_any_order();
    order.retain(|at| !spared(chain.numbers[*at]));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most a thousand times as many")]
    let [enough, draws] = [ROWS as f64 * times, DRAWS as f64 * times.max(1.0)].map(|count| count.ceil() as usize);
    let batches = (0..draws as u64).flat_map(|draw| order.chunks(LANES).map(move |batch| (batch, draw)));
    let mut all: BTreeMap<NodeId, OutputMoments> = BTreeMap::new();
    let mut rows = 0;
    cx.progress.begin(stage, enough as u64);
    for (batch, draw) in batches {
        if rows >= enough {
            break;
        }
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        match gather(model.graph(), &chain, (batch, draw), &mut all) {
            // Where no layer has any, there is nothing to wait for.
            Ok(usize::MAX) => break,
            Ok(more) => {
                (rows..enough.min(rows.saturating_add(more))).for_each(|_| cx.progress.step());
                rows = rows.saturating_add(more);
            }
            Err(reason) => return Ok(Err(reason)),
        }
    }
    cx.progress.end();
    all.retain(|_, moments| moments.tells());
    Ok(Ok(all))
}

/// The bytes of the moments of all layers; or why memory does not hold them.
fn crowded(graph: &Graph, chain: &Chain, cx: &PassContext<'_>) -> Result<u64, String> {
    let layers = chain.links.iter().flat_map(|link| layers(graph, link));
    let needed: u64 = layers.map(|layer| OutputMoments::bytes(layer.channels, layer.groups)).sum();
    // Samples that wait between stages can make room: they run again.
    let left = cx.state_budget.saturating_add(cx.pair_budget);
    if needed <= left {
        return Ok(needed);
    }
    Err(format!(
        "second moments of gradients take {} MB, and {} MB are left: allow more with --max-memory",
        needed / 1_000_000,
        left / 1_000_000
    ))
}

/// Adds what arrives for `batch` in this draw; the fewest rows of any layer, `usize::MAX` where there is none.
fn gather(
    graph: &Graph,
    chain: &Chain,
    (batch, draw): (&[usize], u64),
    all: &mut BTreeMap<NodeId, OutputMoments>,
) -> Result<usize, String> {
    let slots = |link: &Link| layers(graph, link).iter().map(|layer| layer.slot).collect();
    let see = |_: &Link, _: usize, _: &Values<f32>, grads: Arrived| grads;
    let mut fewest = usize::MAX;
    let mut done = |link: &Link, arrived: Vec<Arrived>| {
        let own = |(at, layer): (usize, Layer)| {
            let grads: Vec<&Array<f32>> = arrived.iter().filter_map(|grads| grads[at].as_ref()).collect();
            let moments = all.remove(&layer.node).or_else(|| OutputMoments::new(layer.channels, layer.groups));
            Some((layer, grads, moments?))
        };
        let mut here: Vec<_> = layers(graph, link).into_iter().enumerate().filter_map(own).collect();
        parallel::each(&mut here, |(layer, grads, moments)| grads.iter().for_each(|grad| layer.add(moments, grad)));
        for (layer, grads, moments) in here {
            fewest = fewest.min(grads.iter().map(|grad| layer.rows(grad)).sum());
            all.insert(layer.node, moments);
        }
    };
    chain.arrivals(batch, seed::mixed(SEED ^ draw), &slots, &see, &mut done).map_err(|error| error.to_string())?;
    Ok(fewest)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products};
    use super::*;
    use crate::exec::Dataset as _;
    use crate::model::Plan;
    use crate::seed::uniform;
    use crate::simulate::Simulation;

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn numbers(n: usize) -> Vec<f32> {
        (0..n as u64).map(|at| 2.0 * uniform(at) as f32 - 1.0).collect()
    }

    /// Whatever panels cut through, and wherever channels are.
    #[test]
    fn moments_are_those_of_the_rows() {
        for (m, groups, inner) in [(5, 1, 3), (130, 2, 4), (300, 1, 1)] {
            let outer = 2;
            let values = numbers(outer * groups * m * inner);
            let mut moments = OutputMoments::new(m, groups).unwrap();
            moments.see(&values, (outer, inner));
            let value = |o: usize, group: usize, c: usize, i: usize| values[((o * groups + group) * m + c) * inner + i];
            for (group, a, b) in [(0, 0, 0), (groups - 1, m - 1, 2), (0, 1, m - 2), (groups - 1, m - 1, m - 1)] {
                let size = |o: usize, i: usize| {
                    let all = (0..groups).flat_map(|group| (0..m).map(move |c| (group, c)));
                    all.map(|(group, c)| value(o, group, c, i).powi(2)).sum::<f32>().sqrt()
                };
                let places = (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i)));
                let want: f32 = places.map(|(o, i)| value(o, group, a, i) * value(o, group, b, i) / size(o, i)).sum();
                assert!((moments.at(group, a, b) - want).abs() < 1e-4, "{m} {group} {a} {b}");
                assert!((moments.at(group, b, a) - want).abs() < 1e-4, "{m} {group} {a} {b}");
            }
            if groups == 1 && inner == 1 {
                let mut last = OutputMoments::new(m, 1).unwrap();
                last.see_last(&values);
                assert!((last.at(0, 7, 4) - moments.at(0, 7, 4)).abs() < 1e-5);
                assert!((last.effective() - moments.effective()).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn rows_of_one_size_are_worth_their_number() {
        let mut moments = OutputMoments::new(2, 1).unwrap();
        (0..6).for_each(|_| moments.see(&[0.6, 0.8], (1, 1)));
        assert!((moments.effective() - 6.0).abs() < 1e-5);
        moments.see(&[600.0, 800.0], (1, 1));
        assert!((moments.effective() - 1.0).abs() < 0.02);
    }

    /// At logits the moments are those of gradients (√q ∘ r − q (√q · r)) / √2 with random signs r, q being what the float model says: a
    /// divergence is half of what its curvature says.
    #[test]
    fn moments_of_logits_are_those_of_draws() {
        const SAMPLES: usize = 512;
        let (model, data) = (two_products(0.7), Drawn(SAMPLES));
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let all = output_moments(&model, &cx, (|at| at % 2 == 1, 1.0), "test").unwrap().unwrap();
        let (node, _) = model.graph().nodes().last().unwrap();
        let y = model.graph().outputs()[0];
        let float = Simulation::prepare(model.graph(), &Plan::default(), &Tapes, &[y]).unwrap();
        let mut want = [0.0_f64; 9];
        for sample in (0..SAMPLES).step_by(2) {
            let z = float.run(&data.sample(sample).unwrap()).unwrap()[0].floats().unwrap().to_vec();
            let exp: Vec<f64> = z.iter().map(|z| f64::from(*z).exp()).collect();
            let q: Vec<f64> = exp.iter().map(|e| e / exp.iter().sum::<f64>()).collect();
            // All eight ways to draw three signs.
            for signs in 0..8_u8 {
                let signed: Vec<f64> =
                    (0..3).map(|k| if signs >> k & 1 == 0 { q[k].sqrt() } else { -q[k].sqrt() }).collect();
                let sum: f64 = signed.iter().sum();
                let g: Vec<f64> = (0..3).map(|k| (signed[k] - q[k] * sum) * 0.5_f64.sqrt()).collect();
                let size = g.iter().map(|g| g * g).sum::<f64>().sqrt().max(1e-9);
                want.iter_mut().enumerate().for_each(|(at, want)| *want += g[at / 3] * g[at % 3] / size / 8.0);
            }
        }
        for (at, want) in want.iter().enumerate() {
            let found = f64::from(all[&node].at(0, at / 3, at % 3)) / DRAWS as f64;
            assert!((found - want).abs() < 0.1 * want.abs() + 1.0, "{at}: {found} {want}");
        }
    }

    #[test]
    fn few_samples_are_drawn_as_often_where_fewer_rows_are_enough() {
        let (model, data) = (two_products(0.7), Drawn(3));
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let (node, _) = model.graph().nodes().last().unwrap();
        let [half, whole, twice] = [0.5, 1.0, 2.0].map(|times| {
            let all = output_moments(&model, &cx, (|_| false, times), "test").unwrap().unwrap();
            all[&node].norms
        });
        assert_eq!(half, whole);
        assert!(twice.0 > 1.5 * whole.0, "{twice:?} {whole:?}");
    }

    #[test]
    fn what_memory_does_not_hold_is_refused() {
        let (model, data) = (two_products(0.7), Drawn(3));
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let tight = PassContext { state_budget: 100, pair_budget: 100, ..cx };
        let reason = output_moments(&model, &tight, (|_| false, 1.0), "test").unwrap().unwrap_err();
        assert!(reason.contains("--max-memory"), "{reason}");
    }
}
