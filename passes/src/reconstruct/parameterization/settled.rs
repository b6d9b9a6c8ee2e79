//! Weights that keep near to their point for long are let go of: they never move again.

use super::Weight;
use crate::reconstruct::ledger::Ledger;

/// Of the running mean of distances: the authors' 0.99 is for epochs, not for hundreds of steps.
const MEMORY: f32 = 0.9;
/// Nothing is let go of before this share of the way.
const WARM_UP: f32 = 0.5;
/// The farthest that a weight between two points is from the nearer one, in gaps.
const FARTHEST: f32 = 0.5;

/// Running means of the distances to the nearest point, in gaps of the grid; negative for what has been let go of. Beyond the ends of the
/// grid the distance is 0, as where weights are cut to them.
///
/// Source: Zhong et al. 2022 (lottery ticket scratcher), arXiv:2211.08544, section 3.3, with the threshold rising in proportion to the
/// steps, up to the farthest distance there is.
#[derive(Debug)]
pub(super) struct Settled {
    distance: Vec<f32>,
}

impl Settled {
    /// Nothing has settled.
    pub(super) fn new(n: usize) -> Self {
        Self { distance: vec![1.0; n] }
    }

    /// Shows what steps change.
    pub(super) fn show(&mut self, ledger: &mut Ledger<'_>) {
        ledger.floats(&mut self.distance);
    }

    /// Puts those of `w` that have settled back to where they were `before` the step.
    pub(super) fn hold(&self, w: &mut [f32], before: &[f32]) {
        for ((w, before), distance) in w.iter_mut().zip(before).zip(&self.distance) {
            if *distance < 0.0 {
                *w = *before;
            }
        }
    }

    /// Takes in a step, after which weights are at `w` and their points, `old` before it, are `new`; lets go of what has settled at
    /// `progress` of the way.
    pub(super) fn follow(&mut self, progress: f32, w: &[f32], (old, new): (&[f32], &[f32]), weight: &Weight) {
        let share = ((progress - WARM_UP) / (1.0 - WARM_UP)).max(0.0);
        for (i, distance) in self.distance.iter_mut().enumerate().filter(|(_, distance)| **distance >= 0.0) {
            let (below, above) = weight.around(i, w[i]);
            let away = if above > below { (w[i] - new[i]).abs() / (above - below) } else { 0.0 };
            *distance = if (new[i] - old[i]).abs() > 0.0 { 1.0 } else { MEMORY * *distance + (1.0 - MEMORY) * away };
            if share > 0.0 && *distance <= share * FARTHEST {
                *distance = -1.0;
            }
        }
    }

    /// How many have not settled.
    pub(super) fn free(&self) -> usize {
        self.distance.iter().filter(|distance| **distance >= 0.0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::weight;
    use super::*;

    /// Whether each has settled.
    fn settled(of: &Settled) -> Vec<bool> {
        of.distance.iter().map(|distance| *distance < 0.0).collect()
    }

    /// What rests on its point, or lies beyond the end of the grid, settles before what lies between two; what has settled stays settled,
    /// and stays where it is to the bit.
    #[test]
    fn what_is_near_settles_first_and_stays() {
        for (grid, zero) in [("int2", 0), ("uint4", 7), ("float4e2m1", 0)] {
            let weight = weight(grid, zero);
            // A fifth of the weights on a point, a fifth far beyond the end, the others at many distances.
            let mut w: Vec<f32> = weight.within_reach();
            (0..24).filter(|i| i % 5 == 0).for_each(|i| w[i] = weight.points[i]);
            (0..24).filter(|i| i % 5 == 1).for_each(|i| w[i] = 1e3);
            let points = weight.rounded(&w);
            let (mut state, mut first) = (Settled::new(24), vec![f32::INFINITY; 24]);
            let start = w.clone();
            for step in 0..200_u8 {
                let progress = f32::from(step) / 200.0;
                let before = settled(&state);
                // Steps to and fro, too small to change a point.
                let was = w.clone();
                w.iter_mut().for_each(|w| *w += if step % 2 == 0 { 1e-3 } else { -1e-3 });
                state.hold(&mut w, &was);
                for (i, settled) in before.iter().enumerate().filter(|(_, settled)| **settled) {
                    assert!(*settled && w[i].to_bits() == was[i].to_bits(), "{grid} {i} moves");
                }
                state.follow(progress, &w, (&points, &points), &weight);
                let after = settled(&state);
                assert!(before.iter().zip(&after).all(|(before, after)| *after || !*before), "{grid}: one came back");
                assert!(progress > WARM_UP || after.iter().all(|settled| !*settled), "{grid}: too early");
                (0..24).filter(|i| after[*i] && !before[*i]).for_each(|i| first[i] = progress);
            }
            assert_eq!(state.free(), 0, "{grid}: all have settled at the end");
            for (i, at) in first.iter().enumerate() {
                let (below, above) = weight.around(i, start[i]);
                let apart = if above > below { (start[i] - points[i]).abs() / (above - below) } else { 0.0 };
                let is_near = i % 5 < 2 || apart < 0.05;
                assert!(!is_near || *at < 0.6, "{grid} {i}: {at}");
                assert!(is_near || apart < 0.2 || *at > 0.6, "{grid} {i}: {apart} settles at {at}");
            }
        }
    }

    #[test]
    fn a_change_of_the_point_begins_anew() {
        let weight = weight("int4", 0);
        let points = weight.points.clone();
        let mut state = Settled::new(24);
        (0..100).for_each(|_| state.follow(0.0, &points, (&points, &points), &weight));
        assert!(state.distance.iter().all(|distance| *distance < 0.01));
        let mut other = points.clone();
        other[3] += 1.0;
        state.follow(0.6, &other, (&points, &other), &weight);
        assert!(!settled(&state)[3] && settled(&state)[4] && state.free() == 1, "{state:?}");
    }
}
