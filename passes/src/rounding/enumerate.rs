//! Every choice between the two neighbors, for rows of few columns.

use super::tile::{LANES, Quadratic, Tile};
use super::{Method, Prepared, gptq};
use crate::about::About;
use crate::grid::Grid;

static ABOUT: About = About {
    name: "enumerate",
    doc: "Rows of up to 9 columns, such as those of 3 x 3 depthwise convolutions, take the best of all choices between the points \
          below and above every weight; longer rows go by gptq.",
    source: "exhaustive search; the quadratic after Nagel et al. 2020, arXiv:2004.10568, section 3.2",
};

/// 2⁹ choices are fewer steps than a sweep over a wide row.
const MOST_COLUMNS: usize = 9;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Enumerate;

impl Method for Enumerate {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "2^d · d² per row of d up to 9 columns; what `gptq` costs for longer ones."
    }

    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>> {
        if q.columns > MOST_COLUMNS { gptq::Gptq.prepare(q) } else { Some(Box::new(Self)) }
    }
}

impl Prepared for Enumerate {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
        tile.nearest(grid);
        let mut found = tile.clone();
        for lane in 0..LANES {
            row(&mut found, lane, grid, q);
        }
        // Ties and the last bits of f32 sums go to nearest.
        tile.keep_better(&found, q);
    }
}

/// The best choice for one row, by a walk in which neighbors differ in one column (Gray code).
#[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
fn row(tile: &mut Tile, lane: usize, grid: &dyn Grid, q: &Quadratic) {
    let d = tile.weights.len();
    let scale = |j: usize| f64::from(tile.scales[j / tile.block][lane]);
    let zero = |j: usize| f64::from(tile.zeros[j / tile.block][lane]);
    let weight = |j: usize| f64::from(tile.weights[j][lane]);
    let h = |i: usize, j: usize| f64::from(q.h.at(i, j));
    let pairs: Vec<[f64; 2]> = (0..d)
        .map(|j| {
            if h(j, j) <= 0.0 {
                return [f64::from(tile.points[j][lane]); 2]; // nothing tells them apart: nearest
            }
            let at = weight(j) / scale(j) + zero(j);
            [grid.below(at) - zero(j), grid.above(at) - zero(j)]
        })
        .collect();
    let mut side = vec![0_usize; d];
    let mut errors: Vec<f64> = (0..d).map(|j| pairs[j][0] * scale(j) - weight(j)).collect();
    let loss =
        |errors: &[f64]| -> f64 { (0..d).map(|i| errors[i] * (0..d).map(|j| h(i, j) * errors[j]).sum::<f64>()).sum() };
    let (mut best, mut chosen) = (loss(&errors), side.clone());
    for step in 1_u32..1 << d {
        let j = step.trailing_zeros() as usize;
        side[j] = 1 - side[j];
        errors[j] = pairs[j][side[j]] * scale(j) - weight(j);
        let next = loss(&errors);
        if next < best {
            best = next;
            chosen.clone_from(&side);
        }
    }
    for (j, side) in chosen.into_iter().enumerate() {
        tile.points[j][lane] = pairs[j][side] as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{exact_losses, grid, random_case, random_quadratic, random_tile};
    use super::*;

    #[test]
    fn no_method_beats_it_on_short_rows() {
        let d = 9;
        let q = Quadratic::new(&random_quadratic(d, 30), d);
        let mut best = random_tile(d, d, 5);
        let mut by_gptq = best.clone();
        Enumerate.prepare(&q).unwrap().round(&mut best, grid("int4"), &q);
        gptq::Gptq.prepare(&q).unwrap().round(&mut by_gptq, grid("int4"), &q);
        let (a, b) = (best.losses(&q).iter().sum::<f64>(), by_gptq.losses(&q).iter().sum::<f64>());
        assert!(a <= b, "{a} {b}");
    }

    /// The least that a lane loses, of all choices between the neighbors of its weights.
    fn least(tile: &Tile, lane: usize, grid: &dyn Grid, q: &Quadratic) -> f64 {
        let d = q.columns;
        let errors = |j: usize| {
            let (block, weight) = (j / tile.block, f64::from(tile.weights[j][lane]));
            let (scale, zero) = (f64::from(tile.scales[block][lane]), f64::from(tile.zeros[block][lane]));
            let at = weight / scale + zero;
            [grid.below(at), grid.above(at)].map(|point| (point - zero) * scale - weight)
        };
        let errors: Vec<[f64; 2]> = (0..d).map(errors).collect();
        let loss = |choice: usize| -> f64 {
            let error = |j: usize| errors[j][choice >> j & 1];
            (0..d * d).map(|at| error(at / d) * f64::from(q.h.at(at / d, at % d)) * error(at % d)).sum()
        };
        (0..1_usize << d).map(loss).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn no_choice_between_neighbors_loses_less() {
        for (mut tile, q, grid) in (0..150).map(random_case).filter(|(_, q, _)| q.columns <= 7) {
            Enumerate.round(&mut tile, grid, &q);
            for (lane, found) in exact_losses(&tile, &q).iter().enumerate() {
                let least = least(&tile, lane, grid, &q);
                let slack = 1e-6 * (least + found.size);
                assert!(found.loss <= least + slack, "{} columns, lane {lane}: {found:?} {least}", q.columns);
            }
        }
    }
}
