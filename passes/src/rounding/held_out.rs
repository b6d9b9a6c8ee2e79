//! How far second moments are trusted: codes that are chosen by those of one half of the samples, judged by those of the other.

use std::ops::Range;
use std::sync::Arc;

use super::layer::Layer;
use super::tile::LANES;
use crate::id::NodeId;
use crate::ir::Graph;
use crate::observe::Gram;
use crate::parallel;

/// What is done to moments that few samples told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Trust {
    /// Effective rows count so many times: off the diagonal they are shrunk by d / (n + d).
    pub(super) rows: f64,
    /// So many mean diagonals are added to the diagonal: channels that no sample excited may be excited all the same.
    pub(super) floor: f64,
}

impl Default for Trust {
    fn default() -> Self {
        CANDIDATES[0]
    }
}

/// The usual one first. Where the second does not do better, the others are not tried.
const CANDIDATES: [Trust; 5] = [
    Trust { rows: 1.0, floor: 0.0 },
    Trust { rows: 1.0, floor: 0.1 },
    Trust { rows: 1.0, floor: 0.03 },
    Trust { rows: 0.2, floor: 0.03 },
    Trust { rows: 0.2, floor: 0.3 },
];

/// The share of the loss that another trust than the usual one has to save: a few rows and halves of the samples tell nothing finer.
const LEAST: f64 = 0.03;

/// Moments of so many effective rows per column are trusted.
const ENOUGH: f64 = 2.5;

/// Codes of so many bits lose next to nothing, however they are chosen.
const MANY_BITS: u32 = 8;

/// Groups of a weight that are judged, where it has several.
const GROUPS: usize = 24;

/// Tiles of a weight that are judged in every trust.
const TILES: usize = 2;

/// Where so many layers do best in the usual trust, the others are not asked.
const ASKED: usize = 8;

/// A trust, and how it does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    pub(super) trust: Trust,
    /// What codes chosen in this trust lose on samples held out from it, over what nearest codes lose there.
    ratio: f64,
}

/// The layers that were asked so far.
#[derive(Debug, Default)]
pub(super) struct Asked {
    chosen: Vec<(NodeId, Chosen)>,
}

impl Asked {
    /// Whether it is worth while to ask another layer.
    pub(super) fn goes_on(&self) -> bool {
        self.chosen.len() < ASKED || self.chosen.iter().any(|(_, chosen)| chosen.trust != Trust::default())
    }

    /// Keeps what was `chosen` for layer `node`.
    pub(super) fn keep(&mut self, node: NodeId, chosen: Chosen) {
        tracing::debug!(?node, ?chosen, "held out");
        self.chosen.push((node, chosen));
    }

    /// What held-out samples lose, where they were asked, and in how many layers moments are trusted less than usual.
    pub(super) fn said(mut self, graph: &Graph) -> Option<String> {
        self.chosen.sort_by(|(_, a), (_, b)| a.ratio.total_cmp(&b.ratio));
        let (node, worst) = self.chosen.last()?;
        let median = self.chosen[self.chosen.len() / 2].1.ratio;
        let less = self.chosen.iter().filter(|(_, chosen)| chosen.trust != Trust::default()).count();
        Some(format!(
            "on samples held out, codes lose {median:.2} of what nearest codes do (median of {} layers), at most {:.2} (`{}`); \
             moments are trusted less than usual in {less} of them",
            self.chosen.len(),
            worst.ratio,
            graph.node(*node)?.name
        ))
    }
}

/// The rows of a layer that stand for all: a group, and rows of it.
pub(super) type Part = (usize, Range<usize>);

/// Whether `layer` has codes of so few bits that it matters how they are chosen.
pub(super) fn tells(layer: &Layer<'_>) -> bool {
    layer.encoding.grid.info().bits < MANY_BITS
}

/// The rows of so many tiles of `layer`, evenly spread; of one tile for each of a few groups, where it has several.
pub(super) fn parts(layer: &Layer<'_>, tiles: usize) -> Vec<Part> {
    let per_group = layer.rows / layer.groups;
    let groups = layer.groups.min(GROUPS);
    let tiles = per_group.div_ceil(LANES).min(if groups == 1 { tiles } else { 1 });
    let of_group = |i: usize| {
        let group = i * layer.groups / groups;
        (0..tiles).map(move |t| {
            let start = group * per_group + t * per_group.div_ceil(LANES) / tiles * LANES;
            (group, start..(start + LANES).min((group + 1) * per_group))
        })
    };
    (0..groups).flat_map(of_group).collect()
}

/// The trust in which `layer` loses least on the half of the samples that it was not chosen by, for both of the `halves` together; `None`
/// where nothing is lost, and where there are rows enough or bits enough not to ask. `loss` tells what codes of the rows in `parts` lose that are chosen for the first layer, or nearest ones where
/// there is none, by the moments of the second.
pub(super) fn choose<'a>(
    layer: &Layer<'a>,
    halves: &[Arc<Gram>; 2],
    loss: impl Fn(Option<&Layer<'a>>, &Layer<'a>, &[Part]) -> Option<f64> + Sync,
) -> Option<Chosen> {
    let rows = halves.iter().map(|half| half.effective).sum::<f64>();
    if rows >= ENOUGH * layer.columns as f64 || !tells(layer) {
        return None;
    }
    let parts = parts(layer, TILES);
    let [first, second] = [0, 1].map(|half| layer.measured_by(Arc::clone(&halves[half])));
    let both = |trust: Option<Trust>| {
        let of = |chosen: &Layer<'a>, judge: &Layer<'a>| match trust {
            Some(trust) => loss(Some(&chosen.trusted(trust)), judge, &parts),
            None => loss(None, judge, &parts),
        };
        let (one, other) = parallel::both(|| of(&first, &second), || of(&second, &first));
        Some(one? + other?)
    };
    let nearest = both(None).filter(|loss| *loss > 0.0)?;
    let mut best = (CANDIDATES[0], both(Some(CANDIDATES[0]))?);
    let mut least = best.1 * (1.0 - LEAST);
    for (at, trust) in CANDIDATES.iter().enumerate().skip(1) {
        let loss = both(Some(*trust))?;
        if loss < least {
            (best, least) = ((*trust, loss), loss);
        } else if at == 1 {
            break;
        }
    }
    Some(Chosen { trust: best.0, ratio: best.1 / nearest })
}

#[cfg(test)]
mod tests {
    use super::super::work::tests::{independent, with_a_large_bias};
    use super::*;

    /// Moments of four columns; so many effective rows.
    fn moments(diagonal: [f32; 4], effective: f64) -> Arc<Gram> {
        let moments = (0..16).map(|at| if at % 5 == 0 { diagonal[at / 5] } else { 0.0 }).collect();
        Arc::new(Gram { columns: 4, moments, means: vec![0.0; 4], count: 60, effective })
    }

    /// The trust in which a layer of three rows does best whose `loss` by trust is given, and what it was asked.
    fn chosen(effective: f64, loss: impl Fn(Trust) -> f64 + Sync) -> (Option<Chosen>, Vec<Option<Trust>>) {
        let (model, node) = with_a_large_bias();
        let layer = Layer::of(&model, node).unwrap().behind(independent(), true);
        let halves = [moments([1.0; 4], effective), moments([2.0; 4], effective)];
        let asked = std::sync::Mutex::new(Vec::new());
        let chosen = choose(&layer, &halves, |chosen, judge, parts| {
            assert_eq!(parts, [(0, 0..3)]);
            let trust = chosen.map(Layer::trust);
            asked.lock().unwrap().push(trust);
            let [by, of] = [chosen.unwrap_or(judge), judge].map(|layer| layer.raw_quadratic(0).unwrap()[0]);
            assert!(chosen.is_none() || (by - of).abs() > 0.5, "judged by the half that it was chosen by");
            Some(trust.map_or(4.0, &loss))
        });
        (chosen, asked.into_inner().unwrap())
    }

    #[test]
    fn another_trust_is_taken_only_where_it_saves_loss() {
        let (usual, asked) = chosen(4.0, |trust| 1.0 - 0.1 * trust.floor);
        let usual = usual.unwrap();
        assert_eq!((usual.trust, usual.ratio), (Trust::default(), 0.25));
        assert_eq!(asked.len(), 6, "nearest, the usual trust and one other: {asked:?}");
        let (other, _) = chosen(4.0, |trust| 1.0 - trust.floor);
        let other = other.unwrap();
        assert!(other.trust == CANDIDATES[4] && (other.ratio - 0.7 / 4.0).abs() < 1e-9, "{other:?}");
        let (enough, asked) = chosen(16.0, |trust| 1.0 - trust.floor);
        assert!(enough.is_none() && asked.is_empty(), "many rows are trusted");
        assert!(chosen(4.0, |_| f64::NAN).0.unwrap().trust == Trust::default());
    }

    #[test]
    fn where_the_first_layers_trust_as_usual_no_more_are_asked() {
        let (model, node) = with_a_large_bias();
        let mut asked = Asked::default();
        assert!(Asked::default().said(model.graph()).is_none());
        for at in 0..ASKED {
            assert!(asked.goes_on(), "{at}");
            asked.keep(node, Chosen { trust: Trust::default(), ratio: 0.1 * at as f64 });
        }
        assert!(!asked.goes_on());
        asked.keep(node, Chosen { trust: CANDIDATES[2], ratio: 0.9 });
        assert!(asked.goes_on());
        let said = asked.said(model.graph()).unwrap();
        assert!(
            said.contains("median of 9 layers") && said.contains("0.90") && said.contains("in 1 of them"),
            "{said}"
        );
    }

    #[test]
    fn a_floor_raises_what_was_quiet_and_keeps_what_was_off_the_diagonal() {
        let (model, node) = with_a_large_bias();
        let layer = Layer::of(&model, node).unwrap().behind(moments([0.0, 1.0, 2.0, 1.0], 1e9), false);
        let raised = layer.trusted(Trust { rows: 1.0, floor: 0.1 });
        let (plain, raised) = (layer.quadratic(0).unwrap(), raised.quadratic(0).unwrap());
        for at in 0..16 {
            let want = if at % 5 == 0 { 0.1 } else { 0.0 };
            assert!((raised[at] - plain[at] - want).abs() < 1e-6, "{at}: {} {}", raised[at], plain[at]);
        }
        assert_eq!(layer.trusted(CANDIDATES[4]).raw_quadratic(0), layer.raw_quadratic(0), "judged as measured");
    }
}
