//! What rows weigh by what they have at stake.

use std::collections::BTreeMap;

use super::Reading;
use crate::id::NodeId;
use crate::lockstep::Pair;
use crate::reconstruct::Stakes;

/// Of the rows that layers read, per layer and sample, the roots of what they weigh, the largest of a layer 1; padding and all.
#[derive(Debug, Default)]
pub(in crate::rounding) struct Roots(BTreeMap<NodeId, Vec<Vec<f32>>>);

/// No row counts more than so many average ones.
const MOST: f64 = 32.0;

impl Roots {
    /// Rows that weigh what they have at stake in a `share` of their weight, and the same in the rest of it; those of samples that are
    /// `spared` have no say in what the others weigh.
    #[expect(clippy::cast_possible_truncation, reason = "from 0 to 1")]
    pub(in crate::rounding) fn of_stakes(stakes: Stakes, share: f64, spared: impl Fn(usize) -> bool) -> Self {
        let roots = |(node, samples): (NodeId, Vec<Vec<f32>>)| {
            let fitted = || samples.iter().enumerate().filter(|(at, _)| !spared(*at)).flat_map(|(_, rows)| rows);
            let mean = fitted().map(|w| f64::from(*w)).sum::<f64>() / fitted().count().max(1) as f64;
            let weight = |stake: f32| 1.0 - share + share * (f64::from(stake) / mean).min(MOST);
            let top = fitted().map(|stake| weight(*stake)).fold(0.0, f64::max);
            let root = |stake: &f32| (weight(*stake) / top).sqrt() as f32;
            (node, samples.iter().map(|rows| rows.iter().map(root).collect()).collect())
        };
        Self(stakes.into_iter().map(roots).collect())
    }

    /// Whether the rows of layer `node` weigh differently.
    pub(in crate::rounding) fn weigh(&self, node: NodeId) -> bool {
        self.0.contains_key(&node)
    }

    /// The roots for what `reading` reads of the sample in `pair`: a tensor of `shape`, without its padding where it had any.
    pub(super) fn of(&self, reading: &Reading, pair: &Pair, shape: &[usize]) -> Option<Vec<f32>> {
        let roots = self.0.get(&reading.weighed_for?)?.get(pair.index)?;
        let whole = roots.len() == reading.rows.whole_count(shape);
        Some(if whole { roots.clone() } else { pair.unpadded_rows(roots) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    #[test]
    fn rows_with_as_much_at_stake_weigh_the_same() {
        let node = NodeId(0);
        let varied = vec![vec![0.5, 3.0, 0.0], vec![100.0]];
        for (samples, share) in [(vec![vec![0.7; 5], vec![0.7; 2]], 0.9), (varied, 0.0)] {
            let roots = Roots::of_stakes(BTreeMap::from([(node, samples)]), share, |_| false);
            assert!(roots.weigh(node) && !roots.weigh(NodeId(1)));
            assert!(roots.0[&node].iter().flatten().all(|root| (root - 1.0).abs() < 1e-6));
        }
    }

    #[test]
    fn spared_samples_have_no_say_in_what_others_weigh() {
        let node = NodeId(0);
        let fitted = vec![vec![0.5, 3.0, 0.0], vec![1.0]];
        let all = vec![fitted[0].clone(), vec![100.0], fitted[1].clone()];
        let alone = Roots::of_stakes(BTreeMap::from([(node, fitted)]), 0.8, |_| false);
        let beside = Roots::of_stakes(BTreeMap::from([(node, all)]), 0.8, |at| at == 1);
        assert_eq!([&beside.0[&node][0], &beside.0[&node][2]], [&alone.0[&node][0], &alone.0[&node][1]]);
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn roots_lie_between_0_and_1_in_the_order_of_stakes() {
        let node = NodeId(0);
        for seed in 0..50 {
            // Over eight orders of magnitude.
            let draw = |at: u64| 10.0_f64.powf(8.0 * uniform(mixed(seed) ^ at) - 4.0) as f32;
            let samples: Vec<Vec<f32>> = (0..5).map(|s| (0..7).map(|r| draw(7 * s + r)).collect()).collect();
            let stakes: Vec<f32> = samples.iter().flatten().copied().collect();
            let roots = Roots::of_stakes(BTreeMap::from([(node, samples)]), uniform(seed), |_| false);
            let mut pairs: Vec<(f32, f32)> = stakes.into_iter().zip(roots.0[&node].iter().flatten().copied()).collect();
            pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(pairs.iter().all(|(_, root)| (0.0..=1.0).contains(root)), "{pairs:?}");
            assert!(pairs.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{pairs:?}");
            assert!((pairs[34].1 - 1.0).abs() < 1e-6, "{pairs:?}");
        }
    }
}
