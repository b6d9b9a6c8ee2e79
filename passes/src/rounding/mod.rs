//! Rounding: codes for encoded constants.
//!
//! `clip-weights` chooses ranges anew, `round` codes, by a [`Method`]; `descend` and `refit-scales` improve what was chosen. All of them see a weight as
//! a matrix whose rows are independent and share one quadratic form (see [`crate::observe::Gram`]).

mod adaround;
mod clip_weights;
mod coupled;
mod descend;
mod divisors;
mod enumerate;
mod flexround;
mod gptq;
mod held_out;
mod layer;
mod leanings;
mod learned;
mod lrq;
mod moments;
mod nearest;
mod norms;
mod prefix;
mod readers;
mod refit_scales;
mod round;
mod round_in_order;
mod stochastic;
mod tile;
mod told;
mod work;

use std::fmt::Debug;

pub(crate) use moments::{losses, wished};
pub(crate) use norms::sites as norm_sites;
pub(crate) use round::in_nearest;

use crate::about::About;
use crate::grid::Grid;
use crate::parallel;
use crate::pass::PassEntry;
use tile::{Quadratic, Tile};

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[
    round::ENTRY,
    round_in_order::ENTRY,
    clip_weights::ENTRY,
    descend::ENTRY,
    refit_scales::ENTRY,
    crate::reconstruct::DISTILL,
    crate::reconstruct::SEARCH_SCALES,
    crate::half::ENTRY,
];

/// Every method of `round`, in the order of the manual.
pub static ROUNDINGS: &[&dyn Method] = &[
    &nearest::Nearest,
    &stochastic::Stochastic,
    &gptq::Gptq,
    &enumerate::Enumerate,
    &adaround::AdaRound,
    &flexround::FlexRound,
    &lrq::Lrq,
];

/// A way to choose the points of a weight.
#[allow(private_interfaces, reason = "methods are listed outside, and implemented here only")]
pub trait Method: Debug + Send + Sync {
    /// Name, documentation, source.
    fn about(&self) -> &'static About;
    /// What it takes.
    fn cost(&self) -> &'static str;
    /// What can be done once for all rows that share `q`; `None` leaves them to nearest.
    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>>;
    /// Whether rows learn together, so that they cannot be rounded a few at a time.
    fn learns_together(&self) -> bool {
        false
    }
    /// Whether it needs to know what the weight is multiplied with.
    fn needs_data(&self) -> bool {
        true
    }
}

/// A method, ready for the rows that share a quadratic form.
#[allow(private_interfaces, reason = "methods are listed outside, and implemented here only")]
pub trait Prepared: Send + Sync {
    /// Chooses the points of every lane.
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic);
    /// The same for all rows that share `q`, in parallel; a method whose rows learn together sees them together here.
    fn round_all(&self, tiles: &mut [Tile], grid: &dyn Grid, q: &Quadratic) {
        parallel::each(tiles, |tile| self.round(tile, grid, q));
    }
}

/// The method called `name`.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    ROUNDINGS.iter().copied().find(|method| method.about().name == name)
}

#[cfg(test)]
mod tests {
    use super::tile::tests::{exact_losses, random_case};
    use super::tile::{LANES, Lanes};
    use super::*;

    /// The slowest method takes a while on each.
    const CASES: u64 = 24;

    /// What `method` makes of `tile`, or nearest where it leaves that to it.
    fn rounded(method: &dyn Method, tile: &Tile, grid: &dyn Grid, q: &Quadratic) -> Tile {
        let mut tile = tile.clone();
        match method.prepare(q) {
            Some(prepared) => prepared.round(&mut tile, grid, q),
            None => tile.nearest(grid),
        }
        tile
    }

    fn moved(columns: &[Lanes]) -> Vec<Lanes> {
        columns.iter().map(|lanes| std::array::from_fn(|lane| lanes[(5 * lane + 3) % LANES])).collect()
    }

    #[test]
    fn a_row_does_not_depend_on_its_place_in_the_tile() {
        for seed in 0..CASES {
            let (tile, q, grid) = random_case(seed);
            let elsewhere = Tile {
                live: tile.live,
                weights: moved(&tile.weights),
                points: moved(&tile.points),
                scales: moved(&tile.scales),
                zeros: moved(&tile.zeros),
                block: tile.block,
            };
            // Rows of lrq share a matrix, whose gradient is a sum over them.
            for &method in ROUNDINGS.iter().filter(|method| method.about().name != "lrq") {
                let (here, there) = (rounded(method, &tile, grid, &q), rounded(method, &elsewhere, grid, &q));
                assert_eq!(moved(&here.points), there.points, "{} on case {seed}", method.about().name);
            }
        }
    }

    /// Four times as much is exact in every step.
    #[test]
    fn the_unit_of_inputs_does_not_matter() {
        for seed in 0..CASES {
            let (tile, q, grid) = random_case(seed);
            let d = q.columns;
            let h: Vec<f32> = (0..d * d).map(|at| 4.0 * q.h.at(at / d, at % d)).collect();
            let larger = Quadratic::new(&h, d);
            for &method in ROUNDINGS {
                let (one, other) = (rounded(method, &tile, grid, &q), rounded(method, &tile, grid, &larger));
                assert_eq!(one.points, other.points, "{} on case {seed}", method.about().name);
            }
        }
    }

    #[test]
    fn no_row_loses_on_nearest_or_leaves_the_grid() {
        for seed in 0..CASES {
            let (tile, q, grid) = random_case(seed);
            let mut nearest = tile.clone();
            nearest.nearest(grid);
            let most = exact_losses(&nearest, &q);
            for &method in ROUNDINGS {
                let name = method.about().name;
                let found = rounded(method, &tile, grid, &q);
                let losses = exact_losses(&found, &q);
                assert!(losses.iter().zip(&most).all(|(a, b)| a.is_at_most(b)), "{name} on case {seed}");
                let mut again = found.points.clone();
                for (column, points) in again.iter_mut().enumerate() {
                    let zeros = &tile.zeros[column / tile.block];
                    points.iter_mut().zip(zeros).for_each(|(x, zero)| grid.snap(std::slice::from_mut(x), *zero));
                }
                assert_eq!(again, found.points, "{name} on case {seed}");
            }
        }
    }

    #[test]
    fn what_no_input_tells_apart_is_left_to_nearest() {
        for seed in 0..CASES {
            let (tile, q, grid) = random_case(seed);
            let mut nearest = tile.clone();
            nearest.nearest(grid);
            let dead: Vec<usize> = (0..q.columns).filter(|&j| (0..q.columns).all(|k| q.h.at(j, k) == 0.0)).collect();
            let empty = |lane: &usize| tile.weights.iter().all(|column| column[*lane] == 0.0);
            let empty: Vec<usize> = (0..LANES).filter(empty).collect();
            for &method in ROUNDINGS {
                let name = method.about().name;
                let found = rounded(method, &tile, grid, &q);
                for &j in &dead {
                    let mut pairs = found.points[j].iter().zip(&nearest.points[j]);
                    assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-6), "{name} on case {seed}, column {j}");
                }
                for &lane in &empty {
                    let mut points = found.points.iter().map(|column| column[lane]);
                    assert!(points.all(|point| point == 0.0), "{name} on case {seed}, lane {lane}");
                }
            }
        }
    }
}
