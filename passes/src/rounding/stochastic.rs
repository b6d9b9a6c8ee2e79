//! Up or down by chance.

use super::tile::{LANES, Quadratic, Tile};
use super::{Method, Prepared};
use crate::about::About;
use crate::grid::Grid;
use crate::seed;

static ABOUT: About = About {
    name: "stochastic",
    doc: "Every weight goes up with the probability of its fraction, so that its mean is right; of nearest and 16 such draws every \
          row keeps the best. A baseline for methods that think. Draws depend on the weights alone: the same model gives the \
          same codes.",
    source: "Nagel et al. 2020, arXiv:2004.10568, section 3 (its stochastic baseline)",
};

/// Draws per row.
const DRAWS: u64 = 16;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Stochastic;

impl Method for Stochastic {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "Sixteen draws of every weight, each judged by the layer's quadratic: 16 m d² multiply-adds for a weight of m × d."
    }

    fn prepare(&self, _: &Quadratic) -> Option<Box<dyn Prepared>> {
        Some(Box::new(Self))
    }
}

impl Prepared for Stochastic {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
        tile.nearest(grid);
        for draw in 0..DRAWS {
            let mut drawn = tile.clone();
            for lane in 0..LANES {
                let mut state = hash(tile, lane, draw);
                self::draw(&mut drawn, lane, grid, &mut state);
            }
            // Where nothing is multiplied, nothing tells points apart: nearest.
            for dead in (0..q.columns).filter(|&j| q.h.at(j, j) <= 0.0) {
                drawn.points[dead] = tile.points[dead];
            }
            tile.keep_better(&drawn, q);
        }
    }
}

/// A state that depends on the weights of the row and the number of the draw.
fn hash(tile: &Tile, lane: usize, draw: u64) -> u64 {
    let mix = |hash: u64, bits: u64| (hash ^ bits).wrapping_mul(0x0000_0100_0000_01b3);
    tile.weights.iter().map(|w| u64::from(w[lane].to_bits())).chain([draw]).fold(0xcbf2_9ce4_8422_2325, mix)
}

#[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
fn draw(tile: &mut Tile, lane: usize, grid: &dyn Grid, state: &mut u64) {
    for j in 0..tile.weights.len() {
        let (scale, zero) = (tile.scales[j / tile.block][lane], f64::from(tile.zeros[j / tile.block][lane]));
        let at = f64::from(tile.weights[j][lane] / scale) + zero;
        let (below, above) = (grid.below(at), grid.above(at));
        let fraction = if above > below { (at - below) / (above - below) } else { 0.0 };
        *state = state.wrapping_add(1);
        let point = if seed::uniform(*state) < fraction { above } else { below };
        tile.points[j][lane] = (point - zero) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_quadratic, random_tile};
    use super::*;

    #[test]
    fn the_mean_of_many_draws_is_the_weight() {
        let mut tile = random_tile(1, 1, 3);
        tile.weights[0] = [0.14 * 1.3; LANES];
        let mut state = 1;
        let n = 4000;
        let sum: f32 = (0..n)
            .map(|_| {
                draw(&mut tile, 0, grid("int4"), &mut state);
                tile.points[0][0]
            })
            .sum();
        // 1.3 with a standard error of √(0.3 · 0.7 / 4000) = 0.007.
        assert!((sum / n as f32 - 1.3).abs() < 0.03, "{}", sum / n as f32);
    }

    #[test]
    fn the_same_weights_give_the_same_codes_and_no_row_loses() {
        let d = 24;
        let q = Quadratic::new(&random_quadratic(d, 60), d);
        let (mut a, mut nearest) = (random_tile(d, 8, 9), random_tile(d, 8, 9));
        let mut b = a.clone();
        Stochastic.round(&mut a, grid("int4"), &q);
        Stochastic.round(&mut b, grid("int4"), &q);
        nearest.nearest(grid("int4"));
        assert_eq!(a.points, b.points);
        assert!(a.losses(&q).iter().zip(nearest.losses(&q)).all(|(x, y)| *x <= y));
    }
}
