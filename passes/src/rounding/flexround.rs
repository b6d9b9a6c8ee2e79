//! `FlexRound` on the layer quadratic: a divisor before rounding for every weight, learned by gradient.

use super::descend::descend;
use super::divisors::{Divided, ITERATIONS, MOST_COLUMNS, rate};
use super::tile::{LANES, Lanes, Quadratic, Tile};
use super::{Method, Prepared, gptq};
use crate::about::About;
use crate::grid::Grid;
use crate::reconstruct::Adam;

static ABOUT: About = About {
    name: "flexround",
    doc: "ŵ = s · round(w / (s S)) with S = exp θ of one element and one row together; θ learned by Adam on the layer quadratic, \
          straight through the rounding, so that large weights may move by several points. Scales s stay as assigned \
          (`refit-scales` fits them after), and no factor belongs to a column, which would tie rows together. Starts from gptq and \
          finishes with exact coordinate descent; every row keeps the best of nearest, gptq and all that was tried. Rows of \
          more than 1152 columns go by gptq and descent.",
    source: "Lee et al. 2023 (FlexRound), arXiv:2306.00317, section 3; on the Gram matrix and from GPTQ ours",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct FlexRound;

/// Ready for rows that share a quadratic form.
struct Ready {
    start: Box<dyn Prepared>,
    learns: bool,
}

impl Method for FlexRound {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "400 steps of m d² multiply-adds for weights of up to 1152 columns, and what `gptq` and `descend` cost."
    }

    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>> {
        Some(Box::new(Ready { start: gptq::Gptq.prepare(q)?, learns: q.columns <= MOST_COLUMNS }))
    }
}

impl Prepared for Ready {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
        self.start.round(tile, grid, q);
        let mut candidates = vec![tile.clone()];
        if self.learns {
            candidates.push(learned(tile, grid, q));
        }
        for mut candidate in candidates {
            descend(&mut candidate, grid, q, 10);
            tile.keep_better(&candidate, q);
        }
    }
}

/// The best that every lane of `tile` came to while its divisors were learned.
fn learned(tile: &Tile, grid: &dyn Grid, q: &Quadratic) -> Tile {
    let d = tile.weights.len();
    let mut divided = Divided::new(tile, grid);
    let (mut each, mut row) = (vec![[0.0_f32; LANES]; d], [0.0_f32; LANES]);
    let (mut adam, mut adam_of_row) = (Adam::new(d * LANES), Adam::new(LANES));
    let mut logs = each.clone();
    divided.divide(&logs, grid, q);
    // Adam is blind to the unit of a gradient as long as it is not tiny.
    let units: Lanes = divided.mean_slopes().map(|mean| if mean.is_normal() { 1.0 / mean } else { 0.0 });
    for iteration in 0..ITERATIONS {
        let mut sums = [0.0_f32; LANES];
        for slopes in &mut divided.slopes {
            slopes.iter_mut().zip(&units).for_each(|(slope, unit)| *slope *= unit);
            sums.iter_mut().zip(&*slopes).for_each(|(sum, slope)| *sum += slope);
        }
        adam.step(each.as_flattened_mut(), divided.slopes.as_flattened(), rate(iteration));
        adam_of_row.step(&mut row, &sums, rate(iteration));
        for (logs, each) in logs.iter_mut().zip(&each) {
            *logs = std::array::from_fn(|l| each[l] + row[l]);
        }
        divided.divide(&logs, grid, q);
    }
    divided.best()
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_case, random_quadratic, random_tile};
    use super::*;

    #[test]
    fn it_gains_on_gptq_with_descent_and_no_row_loses() {
        let d = 40;
        let q = Quadratic::new(&random_quadratic(d, 80), d);
        for name in ["int3", "int4", "float4e2m1"] {
            let mut found = random_tile(d, 8, 4);
            let mut by_gptq = found.clone();
            FlexRound.prepare(&q).unwrap().round(&mut found, grid(name), &q);
            gptq::Gptq.prepare(&q).unwrap().round(&mut by_gptq, grid(name), &q);
            descend(&mut by_gptq, grid(name), &q, 10);
            let (a, b) = (found.losses(&q), by_gptq.losses(&q));
            assert!(a.iter().zip(&b).all(|(x, y)| *x <= y + 1e-9), "{name}: {a:?} {b:?}");
            assert!(a.iter().sum::<f64>() < 0.99 * b.iter().sum::<f64>(), "{name}: {a:?} {b:?}");
        }
    }

    #[test]
    fn learning_alone_gains_on_its_start() {
        let d = 40;
        let q = Quadratic::new(&random_quadratic(d, 80), d);
        for name in ["int3", "int4", "float4e2m1"] {
            let mut start = random_tile(d, 8, 4);
            start.nearest(grid(name));
            let (a, b) = (learned(&start, grid(name), &q).losses(&q), start.losses(&q));
            assert!(a.iter().zip(&b).all(|(x, y)| *x <= y + 1e-9), "{name}: {a:?} {b:?}");
            assert!(a.iter().sum::<f64>() < 0.8 * b.iter().sum::<f64>(), "{name}: {a:?} {b:?}");
        }
    }

    #[test]
    fn weights_on_the_grid_stay_where_they_are() {
        for seed in 0..24 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            for j in 0..q.columns {
                let s = tile.scales[j / tile.block];
                tile.weights[j] = std::array::from_fn(|l| tile.points[j][l] * s[l]);
            }
            let want = tile.points.clone();
            // Without anything that its columns are multiplied with there is nothing to learn by.
            let Some(prepared) = FlexRound.prepare(&q) else { continue };
            prepared.round(&mut tile, grid, &q);
            assert_eq!(tile.points, want, "case {seed}");
        }
    }
}
