//! What is learned about a weight.

mod brecq;
mod bytes;
mod chance;
mod discquant;
mod divisors;
mod flexround;
mod latent;
mod latent_settled;
mod latent_stochastic;
mod lora;
mod low_rank;
mod lrq;
mod projection;
mod q_galore;
mod scale_aware;
mod settled;
mod signround;
mod soft;
mod talr;

use std::fmt::Debug;

use crate::about::About;
use crate::encoding::Encoding;
use crate::grid;
use crate::model::{GAP, Leanings};
use crate::reconstruct::ledger::Ledger;
use crate::tensor::Tensor;

/// Every parameterization, in the order of the manual.
pub static PARAMETERIZATIONS: &[&dyn Parameterization] = &[
    &brecq::Brecq,
    &scale_aware::ScaleAware,
    &lora::LoraRounding,
    &flexround::FlexRound,
    &lrq::Lrq,
    &signround::SignRound,
    &latent::Latent,
    &latent_stochastic::LatentStochastic,
    &latent_settled::LatentSettled,
    &talr::Talr,
    &q_galore::QGalore,
    &discquant::DiscQuant,
];

/// A way to learn the points of a weight.
#[allow(private_interfaces, reason = "parameterizations are listed outside, and implemented here only")]
pub trait Parameterization: Debug + Send + Sync {
    /// Name, documentation, source.
    fn about(&self) -> &'static About;
    /// The parameters of one weight, at their start; what is drawn is drawn from `seed`.
    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned>;
    /// The bytes that the parameters of one weight take, with what the optimizer keeps of them.
    fn bytes_per_weight(&self) -> u64;
    /// Whether it begins where weights would go if they had not to lie on points, where that is known.
    fn leans(&self) -> bool {
        true
    }
    /// Whether it asks for scales that stay as they are.
    fn keeps_scales(&self) -> bool {
        false
    }
}

/// The parameterization called `name`.
pub(super) fn find(name: &str) -> Option<&'static dyn Parameterization> {
    PARAMETERIZATIONS.iter().copied().find(|p| p.about().name == name)
}

/// How far from a point what rounds to it may lie at the start, in gaps to its neighbor.
const REACH: f32 = 0.25;

/// A weight before learning.
#[derive(Debug)]
pub(super) struct Weight {
    /// As in the float model, in units of its scales, in the order of storage.
    pub(super) float: Vec<f32>,
    /// The points (codes less zero points) that were chosen so far.
    pub(super) points: Vec<f32>,
    /// The group of every element.
    pub(super) groups: Vec<u32>,
    /// Of the matrix as which it is stored: its first axis, and all others.
    pub(super) rows: usize,
    pub(super) encoding: Encoding,
    /// Where it would go if it did not have to lie on points, where that is known.
    leanings: Option<Leanings>,
}

impl Weight {
    /// A weight and its codes; `None` where they do not fit.
    pub(super) fn new(tensor: &Tensor, encoding: &Encoding, codes: &Tensor) -> Option<Self> {
        let groups = encoding.groups(tensor.shape()).ok()?;
        let in_units = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(&groups).map(|(w, group)| w / encoding.scale[*group as usize]).collect()
        };
        let unit = Encoding { scale: vec![1.0; encoding.scale.len()].into(), ..encoding.clone() };
        Some(Self {
            float: in_units(&tensor.floats()?),
            points: unit.decode(codes).ok()?,
            rows: tensor.shape().first().copied().unwrap_or(1).max(1),
            groups,
            encoding: encoding.clone(),
            leanings: None,
        })
    }

    /// The same, leaning so, where that is known of every element.
    pub(super) fn leaning(self, leanings: Option<&Leanings>) -> Self {
        let leanings = leanings.filter(|leanings| leanings.len() == self.points.len()).cloned();
        Self { leanings, ..self }
    }

    fn zero(&self, i: usize) -> f64 {
        f64::from(self.encoding.zero_point[self.groups[i] as usize])
    }

    /// The neighbor of element `i`'s point that lies towards the float weight, or on the other side where there is none.
    fn neighbor(&self, i: usize) -> f32 {
        self.next(i, self.float[i] > self.points[i])
    }

    /// The point after that of element `i`, above it where `up`, else below, or on the other side where there is none.
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
    fn next(&self, i: usize, up: bool) -> f32 {
        let at = f64::from(self.points[i]) + self.zero(i);
        (grid::neighbor(self.encoding.grid, at, up) - self.zero(i)) as f32
    }

    /// The point of element `i` that lies at or under `unit` and that at or over it; where the grid ends, twice its end.
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
    fn around(&self, i: usize, unit: f32) -> (f32, f32) {
        let (grid, zero) = (self.encoding.grid, self.zero(i));
        let (low, high) = grid.range();
        let at = (f64::from(unit) + zero).clamp(low, high);
        ((grid.below(at) - zero) as f32, (grid.above(at) - zero) as f32)
    }

    /// The points that `units` round to.
    fn rounded(&self, units: &[f32]) -> Vec<f32> {
        let mut points = units.to_vec();
        if self.encoding.is_symmetric() {
            self.encoding.grid.snap(&mut points, 0.0);
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "zero points of integer grids of up to 16 bits")]
            let snap = |(i, point): (usize, &mut f32)| {
                self.encoding.grid.snap(std::slice::from_mut(point), self.zero(i) as f32);
            };
            points.iter_mut().enumerate().for_each(snap);
        }
        points
    }

    /// What learning begins with, of methods that lean: it rounds to the points that were chosen. Where it is known, that is where every weight would go; else the
    /// float weight, moved so near to its point, but on its side.
    fn within_reach(&self) -> Vec<f32> {
        if let Some(leanings) = &self.leanings {
            let leant = |(i, (leaning, point)): (usize, (&i8, &f32))| {
                let share = f32::from(*leaning) / f32::from(GAP);
                point + share * (self.next(i, *leaning > 0) - point).abs()
            };
            return leanings.iter().zip(&self.points).enumerate().map(leant).collect();
        }
        let moved = |(i, (float, point)): (usize, (&f32, &f32))| {
            let gap = (self.neighbor(i) - point).abs();
            point + (float - point).clamp(-REACH * gap, REACH * gap)
        };
        self.float.iter().zip(&self.points).enumerate().map(moved).collect()
    }
}

/// The parameters of one weight.
pub(super) trait Learned: Debug + Send + Sync {
    /// The weight as the block is run with it at `progress` of the way, 0 to 1, in units of its scales: the same until the next step.
    fn soft(&mut self, progress: f32, weight: &Weight) -> Vec<f32>;
    /// Moves the parameters against `gradient`, that of the loss by the units that [`Self::soft`] returned, by `rate` times what is
    /// usual.
    fn step(&mut self, gradient: &[f32], progress: f32, rate: f32, weight: &Weight);
    /// Shows the parameters, and all that steps change with them.
    fn show(&mut self, ledger: &mut Ledger<'_>);
    /// The points that it has come to.
    fn hard(&self, weight: &Weight) -> Vec<f32>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    pub(super) fn weight(grid: &str, zero: i32) -> Weight {
        let grid = grid::find(grid).unwrap();
        let n = 24_u16;
        let float: Vec<f32> = (0..n).map(|i| (f32::from(i) - 11.3) * 0.137).collect();
        let encoding = Encoding {
            grid,
            granularity: crate::encoding::Granularity::Axis(0),
            scale: vec![0.21, -0.3, 0.4, 0.5].into(),
            zero_point: vec![zero; 4].into(),
        };
        let tensor = Tensor::of([4, 6], float);
        let codes = encoding.encode(&tensor.values::<f32>().unwrap(), &[4, 6]).unwrap();
        Weight::new(&tensor, &encoding, &codes).unwrap()
    }

    /// A step may ask twice: on its way forward, and on its way back.
    #[test]
    fn every_parameterization_is_the_same_until_the_next_step() {
        let weight = weight("int4", 0);
        for method in PARAMETERIZATIONS {
            let mut learned = method.start(&weight, 7);
            for step in 0..20_u8 {
                let progress = f32::from(step) / 20.0;
                let units = learned.soft(progress, &weight);
                assert_eq!(learned.soft(progress, &weight), units, "{} at step {step}", method.about().name);
                let gradient: Vec<f32> = units.iter().map(|unit| unit - 1.7).collect();
                learned.step(&gradient, progress, 100.0, &weight);
            }
        }
    }

    const GRIDS: [(&str, i32); 5] = [("int4", 0), ("int2", 0), ("uint4", 7), ("float4e2m1", 0), ("float8e4m3fn", 0)];

    /// Nothing is lost by starting: without a step every method gives the points that were chosen before.
    #[test]
    fn every_parameterization_starts_at_the_points_that_were_chosen() {
        for (grid, zero) in GRIDS.into_iter().chain([("bipolar", 0)]) {
            let weight = weight(grid, zero);
            for method in PARAMETERIZATIONS {
                let mut learned = method.start(&weight, 7);
                assert_eq!(learned.soft(0.0, &weight).len(), 24);
                assert_eq!(learned.hard(&weight), weight.points, "{} on {grid}", method.about().name);
            }
        }
    }

    /// Where it is known where weights would go, that changes where learning begins, and not the points.
    #[test]
    fn leanings_lead_towards_the_neighbor_and_change_no_point() {
        for (grid, zero) in GRIDS {
            let weight = weight(grid, zero);
            let leanings: Leanings = (0..24_i8).map(|i| if i % 2 == 0 { 125 } else { -125 }).collect();
            let weight = weight.leaning(Some(&leanings));
            for (i, (start, point)) in weight.within_reach().into_iter().zip(&weight.points).enumerate() {
                assert!((start > *point) == (i % 2 == 0), "{grid} {i}: {start} {point}");
            }
            for method in PARAMETERIZATIONS {
                let learned = method.start(&weight, 7);
                assert_eq!(learned.hard(&weight), weight.points, "{} on {grid}", method.about().name);
            }
        }
        let short = weight("int4", 0).leaning(Some(&vec![3; 23].into()));
        assert!(short.leanings.is_none(), "of another weight");
    }

    /// Whatever the gradient says, what comes out lies on the grid.
    #[test]
    fn every_parameterization_stays_on_the_grid() {
        for (grid, zero) in GRIDS {
            let weight = weight(grid, zero);
            for method in PARAMETERIZATIONS {
                let mut learned = method.start(&weight, 7);
                let first = learned.soft(0.0, &weight);
                for step in 0..50_u8 {
                    let progress = f32::from(step) / 50.0;
                    let units = learned.soft(progress, &weight);
                    let gradient: Vec<f32> = units.iter().map(|unit| unit - 1.7).collect();
                    learned.step(&gradient, progress, 100.0, &weight);
                }
                let hard = learned.hard(&weight);
                assert_eq!(hard, weight.rounded(&hard), "{} on {grid}", method.about().name);
                assert_ne!(learned.soft(0.5, &weight), first, "{} on {grid} does not move", method.about().name);
            }
        }
    }

    /// What is put back goes on as if it had never been taken down.
    #[test]
    fn every_parameterization_goes_on_from_where_it_stood() {
        let step = |learned: &mut dyn Learned, weight: &Weight, at: u8| {
            let progress = f32::from(at) / 40.0;
            let units = learned.soft(progress, weight);
            let gradient: Vec<f32> = units.iter().map(|unit| unit - 1.7).collect();
            learned.step(&gradient, progress, 10.0, weight);
        };
        for (grid, zero) in GRIDS {
            let weight = weight(grid, zero);
            for method in PARAMETERIZATIONS {
                let name = method.about().name;
                let mut learned = method.start(&weight, 7);
                let mut most = Ledger::Count(0);
                learned.show(&mut most);
                (0..20).for_each(|at| step(&mut *learned, &weight, at));
                let mut out = Ledger::Write(Vec::new());
                learned.show(&mut out);
                let Ledger::Write(state) = out else { panic!("{out:?}") };
                assert!(state.len() as u64 <= 24 * method.bytes_per_weight() + 1000, "{name}: {} bytes", state.len());
                let is_bound = matches!(most, Ledger::Count(most) if state.len() as u64 <= most);
                assert!(is_bound, "{name} on {grid}: {} bytes, and {most:?} at the start", state.len());
                let mut again = method.start(&weight, 7);
                let mut back = Ledger::Read(Some(&state));
                again.show(&mut back);
                assert!(matches!(back, Ledger::Read(Some(rest)) if rest.is_empty()), "{name} on {grid}");
                for at in 20..40 {
                    step(&mut *learned, &weight, at);
                    step(&mut *again, &weight, at);
                }
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
                assert_eq!(bits(learned.soft(1.0, &weight)), bits(again.soft(1.0, &weight)), "{name} on {grid}");
                assert_eq!(learned.hard(&weight), again.hard(&weight), "{name} on {grid}");
            }
        }
    }

    /// The neighbor is the next point, on the side of the float weight where the grid goes on.
    #[test]
    fn neighbors_are_the_next_points() {
        let weight = weight("int2", 0);
        for i in 0..24 {
            let (point, next) = (weight.points[i], weight.neighbor(i));
            assert!(((point - next).abs() - 1.0).abs() < 1e-6 && (-2.0..=1.0).contains(&next), "{point} {next}");
        }
    }

    /// The points of `grid`, in order, and those behind them.
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 8 bits are exact in f32")]
    fn gaps(grid: &dyn grid::Grid) -> Vec<(f32, f32)> {
        let (low, high) = grid.range();
        let mut pairs = Vec::new();
        let mut at = low;
        while at < high {
            let next = grid.above(at + 1e-6 * at.abs().max(1e-30));
            assert!(next > at, "{grid:?} {at}");
            pairs.push((at as f32, next as f32));
            at = next;
        }
        pairs
    }

    /// Gaps are those of the grid, point by point, for every grid of up to 8 bits: across the edges of binades, around zero, and at the
    /// ends, where the neighbor lies inside; and every weight between two points is its share of the way from one to the other.
    #[test]
    fn gaps_are_those_of_the_grid_point_by_point() {
        for grid in grid::all().filter(|grid| grid.info().bits <= 8) {
            let pairs = gaps(grid);
            for (share, up) in [0.1_f32, 0.4, 0.6, 0.9].into_iter().flat_map(|share| [(share, false), (share, true)]) {
                let float: Vec<f32> = pairs.iter().map(|(low, high)| low + share * (high - low)).collect();
                let chosen: Vec<f32> = pairs.iter().map(|(low, high)| if up { *high } else { *low }).collect();
                let encoding = Encoding::per_tensor(grid, 1.0, 0);
                let codes = encoding.pack_points(&chosen, &[chosen.len()]);
                let weight = Weight::new(&Tensor::of([float.len()], float.clone()), &encoding, &codes).unwrap();
                assert_eq!(weight.points, chosen, "{grid:?}");
                let between = soft::Between::ends_of(&weight);
                let again = between.at(&between.shares(&weight), &weight);
                for (i, (low, high)) in pairs.iter().enumerate() {
                    let (gap, other) = (high - low, if up { *low } else { *high });
                    assert!((weight.neighbor(i) - other).abs() <= 1e-6 * gap, "{grid:?}: {low} {high}, {}", chosen[i]);
                    assert!((between.gaps()[i].abs() - gap).abs() <= 1e-6 * gap, "{grid:?}: {low} {high}");
                    assert!((again[i] - float[i]).abs() <= 1e-5 * float[i].abs().max(gap), "{grid:?}: {}", float[i]);
                }
            }
        }
    }

    /// Some methods have forces of their own: none leads away from points that are nearest.
    #[test]
    fn without_gradients_nothing_leaves_its_nearest_point() {
        for (grid, zero) in GRIDS.into_iter().chain([("bipolar", 0)]) {
            let weight = weight(grid, zero);
            for method in PARAMETERIZATIONS {
                let mut learned = method.start(&weight, 7);
                for step in 0..50_u8 {
                    let progress = f32::from(step) / 50.0;
                    assert_eq!(learned.soft(progress, &weight).len(), 24);
                    learned.step(&[0.0; 24], progress, 100.0, &weight);
                }
                assert_eq!(learned.hard(&weight), weight.points, "{} on {grid}", method.about().name);
            }
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn methods_between_two_points_end_at_one_of_them() {
        for (grid, zero) in GRIDS {
            let weight = weight(grid, zero);
            for name in ["brecq", "scale-aware", "lora-rounding", "discquant"] {
                for seed in 0..10_u64 {
                    let mut learned = find(name).unwrap().start(&weight, seed);
                    for step in 0..50_u8 {
                        let progress = f32::from(step) / 50.0;
                        let draw = |at: u64| uniform(mixed(seed << 8 | u64::from(step)) ^ at) - 0.5;
                        let gradient: Vec<f32> = (0..24).map(|at| draw(at) as f32).collect();
                        assert_eq!(learned.soft(progress, &weight).len(), 24);
                        learned.step(&gradient, progress, 100.0, &weight);
                    }
                    for (i, end) in learned.hard(&weight).into_iter().enumerate() {
                        let (point, neighbor) = (weight.points[i], weight.neighbor(i));
                        let apart = (end - point).abs().min((end - neighbor).abs());
                        assert!(apart < 1e-6, "{name} on {grid}: {end} is neither {point} nor {neighbor}");
                    }
                }
            }
        }
    }
}
