//! Second moments of the gradients of weights, each gradient that of one sample: the output-adaptive matrix of a layer,
//!
//! ```text
//! H = Σ_s G_sᵀ G_s,    G_s = ∂(what the outputs lose on sample s) / ∂W
//! ```
//!
//! Gradients of samples are squared one by one, so that they never cancel; those of the words of one sample add up first, which is what
//! tells this from weighing rows (`stakes`). Gradients are drawn at the outputs of the float model instead of taken of labels (see
//! `Measure::drawn`): their second moment is the same.
//!
//! Source: Edalati et al. 2024 (OAC), arXiv:2405.15025, section 3; drawn, and without what a bias takes back, ours.

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
const SEED: u64 = 0x0a_c0ac;
/// Layers with more columns have none: each takes the half of their square, and as many multiply-adds per row.
const MAX_COLUMNS: usize = 4096;
/// Gradients that are enough, and how often one is drawn for a sample at most.
const ENOUGH: usize = 64;
const MOST_DRAWS: usize = 4;
/// Of so many gradients one may be no number.
const DROPPED: usize = 20;
/// So many rows of gradients, at the channels of one sample, are worth one that is independent.
const ALIKE: f64 = 8.0;

/// Σ Gᵀ G, group after group.
#[derive(Debug)]
pub(crate) struct WeightMoments {
    /// The length of a row of the weight.
    pub(crate) columns: usize,
    groups: Vec<Group>,
    /// Σ ‖G‖² and Σ ‖G‖⁴.
    norms: (f64, f64),
    /// Σ of the highest rank that gradients can have.
    ranks: f64,
    seen: usize,
    /// Gradients that were no numbers.
    dropped: usize,
}

/// The sums of one group, with b the gradient of a bias.
#[derive(Debug)]
struct Group {
    square: Triangle,
    /// Σ Gᵀ b.
    cross: Vec<f64>,
    /// Σ ‖b‖².
    biases: f64,
}

/// A layer, and where gradients of its weight and of what it computes arrive.
#[derive(Clone, Copy, Debug)]
struct Layer {
    node: NodeId,
    slots: [Slot; 2],
    rows: usize,
    columns: usize,
    groups: usize,
    /// Whether the weight is stored column by column.
    turned: bool,
    /// Whether channels are the last axis of what it computes, or the second.
    last: bool,
}

impl Layer {
    /// That whose weight is in `slot` and read at `site`, and whose result is in `result`.
    fn of(graph: &Graph, (slot, site): (Slot, Site), result: Slot) -> Option<Self> {
        let Site::Use { node: id, .. } = site else { return None };
        let (roles, node) = (ops::linear(graph, id)?, graph.node(id)?);
        let weight = graph.constant_input(node, roles.weight.into())?;
        let plain = roles.weight == 1 && weight.shape().len() == 2 && node.int("transA", 0) == 0;
        let (groups, last) = match &*node.op.name {
            "MatMul" | "Gemm" if plain => (1, true),
            "Conv" => (usize::try_from(node.int("group", 1)).ok().filter(|n| *n > 0)?, false),
            _ => return None,
        };
        let rows = weight.shape()[roles.out_axis];
        let columns = weight.len().checked_div(rows)?;
        let fits = (1..=MAX_COLUMNS).contains(&columns) && rows.is_multiple_of(groups);
        let turned = roles.out_axis == 1;
        fits.then_some(Self { node: id, slots: [slot, result], rows, columns, groups, turned, last })
    }

    /// The gradient of a bias, by what arrives at the result, and how many rows that has.
    fn bias(&self, grad: &Array<f32>) -> Option<(Vec<f32>, usize)> {
        let (shape, standard) = (grad.shape(), grad.as_standard_layout());
        let axis = if self.last { shape.len().checked_sub(1)? } else { 1 };
        (shape.get(axis) == Some(&self.rows)).then_some(())?;
        let inner = shape[axis + 1..].iter().product::<usize>().max(1);
        let mut sums = vec![0.0_f32; self.rows];
        standard.as_slice()?.iter().enumerate().for_each(|(at, g)| sums[at / inner % self.rows] += g);
        Some((sums, grad.len() / self.rows))
    }
}

impl WeightMoments {
    fn new(of: &Layer) -> Self {
        let group = |_| Group { square: Triangle::new(of.columns), cross: vec![0.0; of.columns], biases: 0.0 };
        let groups = (0..of.groups).map(group).collect();
        Self { columns: of.columns, groups, norms: (0.0, 0.0), ranks: 0.0, seen: 0, dropped: 0 }
    }

    /// The bytes that those of a layer take.
    fn bytes(of: &Layer) -> u64 {
        Triangle::bytes(of.columns) * of.groups as u64
    }

    /// The bytes that it holds.
    pub(crate) fn held(&self) -> u64 {
        Triangle::bytes(self.columns) * self.groups.len() as u64
    }

    /// How many groups there are.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Adds what arrives for one sample at the weight of a layer, and at its result.
    fn see(&mut self, of: &Layer, [weight, result]: [&Array<f32>; 2]) {
        self.seen += 1;
        let standard = weight.as_standard_layout();
        let (Some(g), Some((b, n))) = (standard.as_slice(), of.bias(result)) else {
            self.dropped += 1;
            return;
        };
        let power: f64 = g.iter().map(|g| f64::from(*g).powi(2)).sum();
        if g.len() != of.rows * of.columns || !power.is_finite() || !b.iter().all(|b| b.is_finite()) {
            self.dropped += 1;
            return;
        }
        let (m, d) = (of.rows / of.groups, of.columns);
        for (group, sums) in self.groups.iter_mut().enumerate() {
            let own = &g[group * m * d..][..m * d];
            let columns = if of.turned {
                MatRef::from_row_major_slice(own, d, m)
            } else {
                MatRef::from_row_major_slice(own, m, d).transpose()
            };
            sums.square.add(columns);
            let b = &b[group * m..][..m];
            for (j, cross) in sums.cross.iter_mut().enumerate() {
                let product = |(i, b): (usize, &f32)| f64::from(columns[(j, i)]) * f64::from(*b);
                *cross += b.iter().enumerate().map(product).sum::<f64>();
            }
            sums.biases += b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
        }
        self.norms = (self.norms.0 + power, self.norms.1 + power * power);
        self.ranks += m.min(n) as f64;
    }

    /// The share that is kept off the diagonal: N / (N + d) for N independent rows, gradients counting as far as they are of one size.
    pub(crate) fn kept(&self) -> f64 {
        let gradients = self.norms.0 * self.norms.0 / self.norms.1.max(f64::MIN_POSITIVE);
        let rank = self.ranks / (self.seen - self.dropped).max(1) as f64;
        let n = gradients * rank / ALIKE;
        n / (n + self.columns as f64)
    }

    /// An entry of Σ (G − b μᵀ)ᵀ (G − b μᵀ) for what columns are on average, μ, which a bias takes back.
    pub(crate) fn centered(&self, group: usize, (i, j): (usize, usize), (mean_i, mean_j): (f64, f64)) -> f64 {
        let Group { square, cross, biases } = &self.groups[group];
        f64::from(square.at(i, j)) - cross[i] * mean_j - mean_i * cross[j] + biases * mean_i * mean_j
    }

    /// Whether there is something for a group, and next to all gradients were numbers.
    fn tells(&self) -> bool {
        let is_finite = self.groups.iter().all(|group| group.square.is_finite());
        DROPPED * self.dropped <= self.seen && is_finite && self.groups.iter().any(|group| group.square.tells())
    }
}

/// The layers of `link` whose moments are not too large.
fn layers(graph: &Graph, link: &Link) -> Vec<Layer> {
    let results = link.program.weights.iter().zip(&link.program.results);
    results.filter_map(|((slot, site, _), result)| Layer::of(graph, (*slot, *site), *result)).collect()
}

/// The moments of all layers with an encoded weight, from samples that are not `spared`; or why gradients cannot tell. So many bytes are
/// `held` beside. Reported to the progress of `cx` as `stage`.
///
/// # Errors
/// [`PassError`] without samples, when the model does not run, or when the user interrupts.
pub(crate) fn weight_moments(
    model: &Model,
    cx: &PassContext<'_>,
    (spared, held): (impl Fn(usize) -> bool, u64),
    stage: &str,
) -> Result<Result<BTreeMap<NodeId, WeightMoments>, String>, PassError> {
    let mut chain = match Chain::of_nearest(model, cx, LAYERS)? {
        Ok(chain) => chain,
        Err(reason) => return Ok(Err(reason)),
    };
    let fitted = crowded(model.graph(), &chain, cx, held).and_then(|sums| chain.fit_draws(cx, (sums + held, 4)));
    if let Err(reason) = fitted {
        return Ok(Err(reason));
    }
    let (chain, mut order) = chain.in_any_order();
    order.retain(|at| !spared(chain.numbers[*at]));
    let draws = ENOUGH.div_ceil(order.len().max(1)).clamp(1, MOST_DRAWS) as u64;
    let mut all = BTreeMap::new();
    cx.progress.begin(stage, draws * order.len() as u64);
    for (batch, draw) in (0..draws).flat_map(|draw| order.chunks(LANES).map(move |batch| (batch, draw))) {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        if let Err(reason) = gather(model.graph(), &chain, (batch, draw), &mut all) {
            return Ok(Err(reason));
        }
        batch.iter().for_each(|_| cx.progress.step());
    }
    cx.progress.end();
    all.retain(|_, moments| moments.tells());
    Ok(Ok(all))
}

/// The bytes of the moments of all layers; or why memory does not hold them, with the gradients of one block for all samples side by side.
fn crowded(graph: &Graph, chain: &Chain, cx: &PassContext<'_>, held: u64) -> Result<u64, String> {
    let gradients = |link: &Link| -> u64 {
        let numbers: usize = layers(graph, link).iter().map(|layer| layer.rows * layer.columns).sum();
        4 * (LANES * numbers) as u64
    };
    let sums: u64 = chain.links.iter().flat_map(|link| layers(graph, link)).map(|of| WeightMoments::bytes(&of)).sum();
    let needed = sums.saturating_add(chain.links.iter().map(gradients).max().unwrap_or(0));
    // Samples that wait between stages can make room: they run again.
    let left = cx.state_budget.saturating_add(cx.pair_budget).saturating_sub(held);
    if needed <= left {
        return Ok(sums);
    }
    Err(format!(
        "second moments of gradients of weights take {} MB, and {} MB are left: allow more with --max-memory",
        needed / 1_000_000,
        left / 1_000_000
    ))
}

/// Adds what arrives for `batch` in this draw.
fn gather(
    graph: &Graph,
    chain: &Chain,
    (batch, draw): (&[usize], u64),
    all: &mut BTreeMap<NodeId, WeightMoments>,
) -> Result<(), String> {
    let slots = |link: &Link| layers(graph, link).iter().flat_map(|layer| layer.slots).collect();
    let see = |_: &Link, _: usize, _: &Values<f32>, grads: Arrived| grads;
    let mut done = |link: &Link, arrived: Vec<Arrived>| {
        let own = |(at, layer): (usize, Layer)| {
            let moments = all.remove(&layer.node).unwrap_or_else(|| WeightMoments::new(&layer));
            let pairs = arrived.iter().filter_map(|grads| Some([grads[2 * at].as_ref()?, grads[2 * at + 1].as_ref()?]));
            (layer, pairs.collect::<Vec<_>>(), moments)
        };
        let mut here: Vec<_> = layers(graph, link).into_iter().enumerate().map(own).collect();
        parallel::each(&mut here, |(layer, pairs, moments)| {
            pairs.iter().for_each(|pair| moments.see(layer, *pair));
        });
        all.extend(here.into_iter().map(|(layer, _, moments)| (layer.node, moments)));
    };
    chain.arrivals(batch, seed::mixed(SEED ^ draw), &slots, &see, &mut done).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products, two_products_of};
    use super::*;
    use crate::encoding::Encoding;
    use crate::exec::Dataset as _;

    use crate::model::{Edit, Patch};
    use crate::pass::{PassManager, Pipeline};
    use crate::seed::uniform;

    /// A layer of four rows of three columns.
    fn layer(groups: usize, turned: bool) -> Layer {
        let slots = [crate::grad::Tape::default().leaf(false); 2];
        Layer { node: NodeId(0), slots, rows: 4, columns: 3, groups, turned, last: turned }
    }

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn numbers(seed: u64, shape: &[usize]) -> Array<f32> {
        let n = shape.iter().product::<usize>() as u64;
        let values = (0..n).map(|at| 2.0 * uniform(seed::mixed(seed) ^ at) as f32 - 1.0).collect();
        Array::from_shape_vec(shape.to_vec(), values).unwrap()
    }

    /// Whatever order weights are stored in, and group by group.
    #[test]
    fn moments_are_sums_of_squares_sample_by_sample() {
        for (groups, turned) in [(2, false), (1, false), (1, true)] {
            let of = layer(groups, turned);
            let (m, d) = (of.rows / groups, of.columns);
            let mut moments = WeightMoments::new(&of);
            let mut want = vec![0.0_f64; groups * d * d];
            let mean = [0.3, -0.2, 0.5];
            for sample in 0..3 {
                let stored = if turned { [d, of.rows] } else { [of.rows, d] };
                let g = numbers(sample, &stored);
                let result = numbers(sample + 100, if turned { &[1, 5, 4] } else { &[1, 4, 5] });
                moments.see(&of, [&g, &result]);
                let at =
                    |row: usize, column: usize| f64::from(if turned { g[[column, row]] } else { g[[row, column]] });
                let bias = |row: usize| -> f64 {
                    (0..5).map(|i| f64::from(if turned { result[[0, i, row]] } else { result[[0, row, i]] })).sum()
                };
                for (group, want) in want.chunks_exact_mut(d * d).enumerate() {
                    for (at_entry, want) in want.iter_mut().enumerate() {
                        let (i, j) = (at_entry / d, at_entry % d);
                        let left = |row: usize, j: usize| at(row, j) - bias(row) * mean[j];
                        *want += (group * m..(group + 1) * m).map(|row| left(row, i) * left(row, j)).sum::<f64>();
                    }
                }
            }
            for (at, want) in want.iter().enumerate() {
                let (group, i, j) = (at / (d * d), at % (d * d) / d, at % d);
                let found = moments.centered(group, (i, j), (mean[i], mean[j]));
                assert!((found - want).abs() < 1e-4, "{groups} {turned} {at}: {found} {want}");
            }
            assert!(moments.tells() && moments.kept() > 0.0 && moments.kept() < 1.0);
        }
    }

    /// One of opposite sign counts as much again, and one that is no number is left out: of few that ends it.
    #[test]
    fn gradients_never_cancel_and_numbers_alone_count() {
        let of = layer(1, false);
        let (g, result) = (numbers(1, &[4, 3]), numbers(2, &[1, 4, 5]));
        let mut moments = WeightMoments::new(&of);
        moments.see(&of, [&g, &result]);
        let once = moments.centered(0, (1, 2), (0.1, 0.2));
        let negated = |array: &Array<f32>| array.mapv(|v| -v).into_shared();
        moments.see(&of, [&negated(&g), &negated(&result)]);
        assert!((moments.centered(0, (1, 2), (0.1, 0.2)) - 2.0 * once).abs() < 1e-5);
        let odd = g.mapv(|v| if v > 0.0 { f32::NAN } else { v }).into_shared();
        moments.see(&of, [&odd, &result]);
        assert!((moments.centered(0, (1, 2), (0.1, 0.2)) - 2.0 * once).abs() < 1e-5);
        assert!(!moments.tells(), "one of three");
        (0..20).for_each(|_| moments.see(&of, [&g, &result]));
        assert!(moments.tells(), "one of 23");
    }

    /// Of one layer with one output, whose error is squared, they are those of what it reads.
    #[test]
    fn of_a_single_layer_they_are_moments_of_what_it_reads() {
        let text = "graph (%x: f32[1,4]) -> (%y: f32[1,1]) {
            %w = const f32[4,1] rand(seed=1, std=0.7)
            %y = MatMul(%x, %w)
        }";
        let pipeline = Pipeline::parse("infer-shapes", &crate::catalogue::passes()).unwrap();
        let model = crate::text::parse(text).unwrap();
        let bare = PassContext::new(&NoTarget, &Tapes);
        let mut model = PassManager::default().run(&pipeline, model, &mut { bare }).unwrap().0;
        let (node, _) = model.graph().nodes().last().unwrap();
        let mut patch = Patch::on(&model);
        let encoding = Encoding::per_tensor(crate::grid::find("int4").unwrap(), 0.3, 0);
        patch.edit(Edit::Encode { site: Site::Use { node, input: 1 }, encoding });
        model.apply(patch).unwrap();
        let data = Drawn(24);
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let all = weight_moments(&model, &cx, (|at| at % 2 == 1, 0), "test").unwrap().unwrap();
        let mut want = [0.0_f64; 16];
        for sample in (0..24).step_by(2) {
            let x = data.sample(sample).unwrap()[0].floats().unwrap().to_vec();
            want.iter_mut().enumerate().for_each(|(at, want)| *want += f64::from(x[at / 4]) * f64::from(x[at % 4]));
        }
        let unit = all[&node].centered(0, (0, 0), (0.0, 0.0)) / want[0];
        for (at, want) in want.iter().enumerate() {
            let found = all[&node].centered(0, (at / 4, at % 4), (0.0, 0.0));
            assert!((found - unit * want).abs() < 1e-4 * unit * 24.0, "{at}: {found} {}", unit * want);
        }
    }

    #[test]
    fn what_memory_does_not_hold_is_refused() {
        let (model, data) = (two_products(0.7), Drawn(3));
        let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let tight = PassContext { state_budget: 100, pair_budget: 100, ..cx };
        let reason = weight_moments(&model, &tight, (|_| false, 0), "test").unwrap().unwrap_err();
        assert!(reason.contains("--max-memory"), "{reason}");
    }

    /// Fewer tapes side by side, and tapes in parts, tell the same; where not even that fits, the fix is named.
    #[test]
    fn memory_decides_how_gradients_are_drawn_and_not_what_they_tell() {
        let (model, data) = (two_products_of(40, 0.7), Drawn(6));
        let told = |lone_budget: u64| {
            let cx = PassContext { dataset: Some(&data), lone_budget, ..PassContext::new(&NoTarget, &Tapes) };
            let found = weight_moments(&model, &cx, (|_| false, 0), "test").unwrap();
            found.map(|all| all.values().map(|moments| moments.norms).collect::<Vec<_>>())
        };
        let plenty = told(u64::MAX).unwrap();
        let all: Vec<_> = (0..200).map(|step| told(step * 512)).collect();
        let fits = all.iter().position(Result::is_ok).unwrap();
        assert!(fits > 0 && all[fits..].iter().all(|found| found.as_ref() == Ok(&plenty)), "{fits}");
        assert!(all[0].as_ref().unwrap_err().contains("--max-memory"));
    }
}
