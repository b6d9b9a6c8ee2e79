//! Channels of activations that are outliers, brought nearer to the others.

use std::collections::BTreeSet;

use super::divided::{self, Choice, Group, last_axis};
use super::smooth::{INSERTED, LEAST_ROWS, Sink, expected_error, sink, wanted};
use crate::id::ValueId;
use crate::model::{Model, Patch};
use crate::observe::inliers_end;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};

crate::declare_pass! {
    /// Divides those channels of an activation that are outliers among its channels, and multiplies the weights that read them.
    ///
    /// ```text
    /// s[j] = sqrt(peak(x[j]) / t) where peak(x[j]) > t,  1 elsewhere,    x'[j] = x[j] / s[j],    w'[j] = s[j] · w[j]
    /// ```
    ///
    /// once, or as often as `rounds` says, by no more than 1000 in all. t is the largest peak that is no outlier, found coarse to fine as the observer `cfp` does. Few columns of weights grow, whatever
    /// the weights are: for weights of few bits, where `smooth` moves all of them; in its place, not behind it. `weights=cfp` of
    /// `assign-encodings` belongs behind it, with `calibrate` between. Folded as `smooth` folds; an explicit `Mul` stands before the products
    /// only where it takes two thirds of the expected error away, and nothing is done where that error would rise. Tensors of fewer than 16
    /// channels or 1024 rows, and models whose activations stay in float, are left alone.
    INFO {
        name: "scale-outliers",
        source: "Ding et al. 2023 (CBQ), arXiv:2312.07950, section 3.3, activations; judged by expected error, ours",
        cost: "One forward pass for peaks; every weight that reads a tensor with outliers is looked at twice. No more data.",
        requires: Facts::CALIBRATED,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "rounds", doc: "how often what is left is looked at again: 1 by default, 3 at most" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(ScaleOutliers::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct ScaleOutliers {
    rounds: usize,
}

/// Of fewer channels none is an outlier.
const FEWEST: usize = 16;
/// No channel is divided by more.
const REACH: f64 = 1e3;

impl ScaleOutliers {
    fn new(options: &Options) -> Result<Self, OptionError> {
        match options.count("rounds", 1)? {
            rounds @ 1..=3 => Ok(Self { rounds }),
            _ => Err(OptionError { option: "rounds".into(), problem: "it must be 1, 2 or 3".into() }),
        }
    }

    /// The division of the outliers of `group`, where there are any and the products that read it lose less.
    fn choose(&self, model: &Model, group: &Group, cx: &PassContext<'_>) -> Option<Choice> {
        let graph = model.graph();
        let peaks = model.stats().peaks(group.value, last_axis(graph, group.value)?)?;
        let channels = peaks.values().len();
        if peaks.count() < LEAST_ROWS || channels < FEWEST {
            return None;
        }
        let divisor = group.tied(divisors(peaks.values(), self.rounds)?);
        let sinks: Vec<Sink> = group.sinks.iter().map(|&id| sink(graph, id)).collect::<Option<_>>()?;
        if sinks.iter().any(|sink| sink.energy.len() != channels) {
            return None;
        }
        let error = |divisor: &[f64]| expected_error(peaks, &sinks, divisor, cx);
        let left = error(&divisor) / error(&vec![1.0; channels]);
        (left < 1.0).then_some(Choice { divisor, left })
    }
}

impl Pass for ScaleOutliers {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        divided::wishes(model.graph(), wanted(model.graph(), cx))
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let groups = wanted(model.graph(), cx);
        Ok(divided::divide_all(model, &groups, INSERTED, |group| self.choose(model, group, cx)))
    }
}

/// What each channel of these `peaks` is divided by; `None` where none is an outlier.
fn divisors(peaks: &[f32], rounds: usize) -> Option<Vec<f64>> {
    let mut divisor = vec![1.0_f64; peaks.len()];
    for _ in 0..rounds {
        let left: Vec<f64> = peaks.iter().zip(&divisor).map(|(peak, s)| f64::from(*peak) / s).collect();
        let Some(end) = inliers_end(&mut left.iter().map(|peak| (*peak, 1)).collect()) else { break };
        for (s, peak) in divisor.iter_mut().zip(&left).filter(|(_, peak)| **peak > end) {
            *s = (*s * (peak / end).sqrt()).min(REACH);
        }
    }
    divisor.iter().any(|s| *s > 1.0).then_some(divisor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::uniform;

    /// Peaks of channels between 2 and 4, and two of `loud`.
    #[expect(clippy::cast_possible_truncation, reason = "peaks are f32")]
    fn peaks(loud: f32) -> Vec<f32> {
        let mut peaks: Vec<f32> = (0..200).map(|at| (2.0 + 2.0 * uniform(at)) as f32).collect();
        (peaks[17], peaks[90]) = (loud, 1.1 * loud);
        peaks
    }

    #[test]
    fn outliers_come_half_the_way_and_nothing_else_moves() {
        let peaks = peaks(50.0);
        let found = divisors(&peaks, 1).unwrap();
        let end = peaks.iter().copied().filter(|peak| *peak < 10.0).fold(0.0, f32::max);
        for (at, (s, peak)) in found.iter().zip(&peaks).enumerate() {
            let want = if *peak > end { f64::from(peak / end).sqrt() } else { 1.0 };
            assert!((s - want).abs() < 1e-4, "{at}: {s} {want}");
        }
        assert_eq!(found.iter().filter(|s| **s > 1.0).count(), 2);
        // Another round takes half of what is left.
        let again = divisors(&peaks, 2).unwrap();
        assert!((again[17] - f64::from(50.0 / end).powf(0.75)).abs() < 1e-3, "{}", again[17]);
        // Neither the unit nor the order of channels plays a part.
        let louder: Vec<f32> = peaks.iter().map(|peak| 64.0 * peak).collect();
        assert_eq!(divisors(&louder, 1).unwrap(), found);
        let turned: Vec<f32> = peaks.iter().rev().copied().collect();
        assert!(divisors(&turned, 1).unwrap().iter().rev().eq(&found));
        assert!(divisors(&self::peaks(1e12), 3).unwrap().iter().all(|s| (1.0..=REACH).contains(s)));
    }

    #[test]
    fn even_channels_have_no_outliers() {
        assert_eq!(divisors(&peaks(3.0), 3), None);
        assert_eq!(divisors(&[2.0; 64], 1), None);
        assert_eq!(divisors(&[0.0; 64], 1), None);
    }

    #[test]
    fn rounds_are_one_to_three() {
        let of = |rounds: &str| ScaleOutliers::new(&Options([("rounds".to_owned(), rounds.to_owned())].into()));
        assert!(of("2").is_ok() && of("0").is_err() && of("4").is_err());
    }
}
