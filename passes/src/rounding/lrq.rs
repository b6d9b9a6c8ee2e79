//! `LRQ` on the layer quadratic: divisors before rounding whose logarithms are a matrix of low rank.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use super::descend::descend;
use super::divisors::{Divided, ITERATIONS, MOST_COLUMNS, rate};
use super::tile::{LANES, Lanes, Panels, Quadratic, Tile, WIDE};
use super::{Method, Prepared, gptq};
use crate::about::About;
use crate::grid::Grid;
use crate::parallel;
use crate::reconstruct::Adam;
use crate::seed::{mixed, uniform};
use crate::simd::vectorized;

static ABOUT: About = About {
    name: "lrq",
    doc: "As flexround, with ln S = L U + r + c: L and U of a quarter of the smaller side in rank, r one number per row, c one per \
          column. Far fewer parameters than weights fit the samples less closely. Rows learn together, 1024 at a time, which have \
          U and c in common; every row keeps the best of nearest, gptq and all that was tried. Rows of more than 1152 columns go \
          by gptq and descent.",
    source: "Lee et al. 2025 (LRQ), arXiv:2407.11534, section 2; on the Gram matrix and from GPTQ ours",
};

/// Rows that learn together, in tiles: what they take while they do is half a kilobyte per column and tile.
const TOGETHER: usize = 64;
/// The rank, as a share of the smaller side.
const SHARE: usize = 4;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Lrq;

/// Ready for rows that share a quadratic form.
struct Ready {
    start: Box<dyn Prepared>,
    learns: bool,
}

impl Method for Lrq {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "400 steps of up to 2 m d² multiply-adds for weights of up to 1152 columns, and what `gptq` and `descend` cost."
    }

    fn learns_together(&self) -> bool {
        true
    }

    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>> {
        Some(Box::new(Ready { start: gptq::Gptq.prepare(q)?, learns: q.columns <= MOST_COLUMNS }))
    }
}

impl Prepared for Ready {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
        self.round_all(std::slice::from_mut(tile), grid, q);
    }

    fn round_all(&self, tiles: &mut [Tile], grid: &dyn Grid, q: &Quadratic) {
        parallel::each(tiles, |tile| self.start.round(tile, grid, q));
        for band in tiles.chunks_mut(TOGETHER) {
            let mut learned = if self.learns { learned(band, grid, q) } else { Vec::new() }.into_iter();
            let mut pairs: Vec<_> = band.iter_mut().map(|tile| (tile, learned.next())).collect();
            parallel::each(&mut pairs, |(tile, learned)| {
                for mut candidate in std::iter::once(tile.clone()).chain(learned.take()) {
                    descend(&mut candidate, grid, q, 10);
                    tile.keep_better(&candidate, q);
                }
            });
        }
    }
}

/// What all rows have in common.
struct Common {
    rank: usize,
    /// U, row after row.
    right: Vec<f32>,
    /// c.
    columns: Vec<f32>,
    adam: (Adam, Adam),
}

/// What the rows of a tile have for themselves.
struct Own {
    /// So many lanes are rows.
    live: usize,
    divided: Divided,
    /// L, one column after the other.
    left: Vec<Lanes>,
    /// r.
    rows: Lanes,
    adam: (Adam, Adam),
}

impl Common {
    /// U drawn evenly between ±1/√d, c 0.
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn new(rank: usize, d: usize) -> Self {
        let reach = 1.0 / (d.max(1) as f64).sqrt();
        let draw = |at: usize| ((2.0 * uniform(mixed(d as u64) ^ at as u64) - 1.0) * reach) as f32;
        Self {
            rank,
            right: (0..rank * d).map(draw).collect(),
            columns: vec![0.0; d],
            adam: (Adam::new(rank * d), Adam::new(d)),
        }
    }

    /// U to be multiplied with from the left, and its transpose.
    fn panels(&self) -> (Panels, Panels) {
        let (rank, d) = (self.rank, self.columns.len());
        let entry = |k: usize, j: usize| self.right[k * d + j];
        (Panels::new(rank, d, entry), Panels::new(d, rank, |j, k| entry(k, j)))
    }

    fn step(&mut self, of: &[(Vec<f32>, f32)], rate: f32) {
        let of_right: Vec<f32> = (0..self.rank).flat_map(|k| of.iter().map(move |(column, _)| column[k])).collect();
        let of_columns: Vec<f32> = of.iter().map(|(_, sum)| *sum).collect();
        self.adam.0.step(&mut self.right, &of_right, rate);
        self.adam.1.step(&mut self.columns, &of_columns, rate);
    }
}

impl Own {
    /// L and r 0.
    fn new(tile: &Tile, grid: &dyn Grid, rank: usize) -> Self {
        Self {
            live: tile.live,
            divided: Divided::new(tile, grid),
            left: vec![[0.0; LANES]; rank],
            rows: [0.0; LANES],
            adam: (Adam::new(rank * LANES), Adam::new(LANES)),
        }
    }

    /// Divides by what ln S has come to; slopes are in units of `unit`⁻¹ then, and 0 where there is no row.
    fn divide(&mut self, right: &Panels, columns: &[f32], grid: &dyn Grid, q: &Quadratic, unit: f32) {
        let mut logs = vectorized(
            #[inline(always)]
            || products(&self.left, right, columns.len()),
        );
        for (logs, column) in logs.iter_mut().zip(columns) {
            logs.iter_mut().zip(&self.rows).for_each(|(log, row)| *log += row + column);
        }
        self.divided.divide(&logs, grid, q);
        for slopes in &mut self.divided.slopes {
            let (rows, beyond) = slopes.split_at_mut(self.live);
            rows.iter_mut().for_each(|slope| *slope *= unit);
            beyond.fill(0.0);
        }
    }

    /// Moves L and r against the slopes.
    fn step(&mut self, turned: &Panels, rate: f32) {
        let of_left = vectorized(
            #[inline(always)]
            || products(&self.divided.slopes, turned, self.left.len()),
        );
        let mut of_rows = [0.0_f32; LANES];
        for slopes in &self.divided.slopes {
            of_rows.iter_mut().zip(slopes).for_each(|(sum, slope)| *sum += slope);
        }
        self.adam.0.step(self.left.as_flattened_mut(), of_left.as_flattened(), rate);
        self.adam.1.step(&mut self.rows, &of_rows, rate);
    }
}

/// Rows times a matrix of so many `columns`.
#[inline(always)]
fn products(lanes: &[Lanes], by: &Panels, columns: usize) -> Vec<Lanes> {
    let mut products = Vec::with_capacity(columns.next_multiple_of(WIDE));
    (0..columns).step_by(WIDE).for_each(|start| products.extend(by.dots(lanes, 0, start)));
    products.truncate(columns);
    products
}

/// The slopes by column `j` of U, and by c there: sums over all rows, in their order.
fn by_column(own: &[Own], rank: usize, j: usize) -> (Vec<f32>, f32) {
    let (mut sums, mut sum) = (vec![[0.0_f32; LANES]; rank], [0.0_f32; LANES]);
    vectorized(
        #[inline(always)]
        || {
            for own in own {
                let slopes = &own.divided.slopes[j];
                for (sums, left) in sums.iter_mut().zip(&own.left) {
                    (0..LANES).for_each(|l| sums[l] = slopes[l].mul_add(left[l], sums[l]));
                }
                (0..LANES).for_each(|l| sum[l] += slopes[l]);
            }
        },
    );
    (sums.iter().map(|lanes| lanes.iter().sum()).collect(), sum.iter().sum())
}

/// The best that every lane of `tiles` came to while the divisors were learned.
#[expect(clippy::cast_possible_truncation, reason = "slopes are f32")]
fn learned(tiles: &[Tile], grid: &dyn Grid, q: &Quadratic) -> Vec<Tile> {
    let d = q.columns;
    let rows: usize = tiles.iter().map(|tile| tile.live).sum();
    let rank = (d.min(rows) / SHARE).max(1);
    let mut common = Common::new(rank, d);
    let mut own = parallel::map(tiles, |tile| Own::new(tile, grid, rank));
    let (right, mut turned) = common.panels();
    parallel::each(&mut own, |own| own.divide(&right, &common.columns, grid, q, 1.0));
    let sum: f64 = own.iter().flat_map(|own| own.divided.mean_slopes()).map(f64::from).sum();
    let mean = (sum / rows.max(1) as f64) as f32;
    if !mean.is_normal() {
        return Vec::new(); // nothing is off
    }
    let unit = 1.0 / mean;
    parallel::each(&mut own, |own| own.divided.slopes.as_flattened_mut().iter_mut().for_each(|slope| *slope *= unit));
    let columns: Vec<usize> = (0..d).collect();
    for iteration in 0..ITERATIONS {
        let of = parallel::map(&columns, |&j| by_column(&own, rank, j));
        parallel::each(&mut own, |own| own.step(&turned, rate(iteration)));
        common.step(&of, rate(iteration));
        let right;
        (right, turned) = common.panels();
        parallel::each(&mut own, |own| own.divide(&right, &common.columns, grid, q, unit));
    }
    own.into_iter().map(|own| own.divided.best()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_case, random_quadratic, random_tile};
    use super::*;

    /// Tiles of as many kinds of rows.
    fn tiles(d: usize) -> Vec<Tile> {
        (4..7).map(|seed| random_tile(d, 8, seed)).collect()
    }

    fn loss(tiles: &[Tile], q: &Quadratic) -> f64 {
        tiles.iter().flat_map(|tile| tile.losses(q)).sum()
    }

    #[test]
    fn it_gains_on_gptq_with_descent_and_no_row_loses() {
        let d = 40;
        let q = Quadratic::new(&random_quadratic(d, 80), d);
        for name in ["int3", "int4", "float4e2m1"] {
            let (mut found, mut by_gptq) = (tiles(d), tiles(d));
            Lrq.prepare(&q).unwrap().round_all(&mut found, grid(name), &q);
            for tile in &mut by_gptq {
                gptq::Gptq.prepare(&q).unwrap().round(tile, grid(name), &q);
                descend(tile, grid(name), &q, 10);
            }
            for (found, by_gptq) in found.iter().zip(&by_gptq) {
                let (a, b) = (found.losses(&q), by_gptq.losses(&q));
                assert!(a.iter().zip(&b).all(|(x, y)| *x <= y + 1e-9), "{name}: {a:?} {b:?}");
            }
            assert!(loss(&found, &q) < loss(&by_gptq, &q), "{name}");
        }
    }

    #[test]
    fn learning_alone_gains_on_its_start() {
        let d = 40;
        let q = Quadratic::new(&random_quadratic(d, 80), d);
        for name in ["int3", "int4", "float4e2m1"] {
            let mut start = tiles(d);
            start.iter_mut().for_each(|tile| tile.nearest(grid(name)));
            let found = learned(&start, grid(name), &q);
            assert!(loss(&found, &q) < 0.9 * loss(&start, &q), "{name}");
        }
    }

    /// Neither in the rank, nor in the unit of slopes, nor in what rows have in common, whatever their lanes hold.
    #[test]
    fn lanes_beyond_the_last_row_have_no_say() {
        let (d, last) = (64, 5);
        let q = Quadratic::new(&random_quadratic(d, 100), d);
        for name in ["int3", "bipolar"] {
            let points = |padding: f32, more: &[Tile]| {
                let mut tiles = tiles(d);
                tiles[2].live = last;
                tiles[2].weights.iter_mut().for_each(|column| column[last..].fill(padding));
                tiles.extend_from_slice(more);
                tiles.iter_mut().for_each(|tile| tile.nearest(grid(name)));
                let learned = learned(&tiles, grid(name), &q);
                let rows = learned[..3].iter().zip([LANES, LANES, last]);
                rows.flat_map(|(tile, live)| tile.points.iter().flat_map(move |column| column[..live].to_vec()))
                    .collect::<Vec<f32>>()
            };
            let alone = points(0.0, &[]);
            assert!(alone == points(0.37, &[]), "{name}: what padding holds");
            let empty = Tile { live: 0, ..random_tile(d, 8, 9) };
            assert!(alone == points(0.0, &[empty]), "{name}: how much of it there is");
        }
    }

    /// L U, and what its gradient says about L and U, entry by entry.
    #[test]
    fn gradients_of_factors_are_products_with_the_other() {
        let (d, rank) = (7, 3);
        let mut common = Common::new(rank, d);
        let mut own: Vec<Own> = tiles(d).iter().map(|tile| Own::new(tile, grid("int4"), rank)).collect();
        for (t, own) in own.iter_mut().enumerate() {
            let entry = |at: usize, l: usize| ((5 * at + 3 * l + t) % 11) as f32 - 5.0;
            own.left = (0..rank).map(|k| std::array::from_fn(|l| entry(k, l))).collect();
            own.divided.slopes = (0..d).map(|j| std::array::from_fn(|l| entry(j + 17, l))).collect();
        }
        common.right.iter_mut().enumerate().for_each(|(at, u)| *u = (at % 5) as f32 - 2.0);
        let (right, turned) = common.panels();
        let u = |k: usize, j: usize| common.right[k * d + j];
        for own in &own {
            let (logs, of_left) = (products(&own.left, &right, d), products(&own.divided.slopes, &turned, rank));
            for l in 0..LANES {
                for (j, logs) in logs.iter().enumerate() {
                    let want: f32 = (0..rank).map(|k| own.left[k][l] * u(k, j)).sum();
                    assert!((logs[l] - want).abs() < 1e-4);
                }
                for (k, of) in of_left.iter().enumerate() {
                    let want: f32 = (0..d).map(|j| own.divided.slopes[j][l] * u(k, j)).sum();
                    assert!((of[l] - want).abs() < 1e-4);
                }
            }
        }
        for j in 0..d {
            let (of_right, of_column) = by_column(&own, rank, j);
            let over_rows = |of: &dyn Fn(&Own, usize) -> f32| -> f32 {
                own.iter().map(|own| (0..LANES).map(|l| of(own, l)).sum::<f32>()).sum()
            };
            assert!((of_column - over_rows(&|own, l| own.divided.slopes[j][l])).abs() < 1e-3);
            for (k, of) in of_right.iter().enumerate() {
                let want = over_rows(&|own, l| own.left[k][l] * own.divided.slopes[j][l]);
                assert!((of - want).abs() < 1e-2, "{of} {want}");
            }
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let d = 24;
        let q = Quadratic::new(&random_quadratic(d, 40), d);
        let of = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut tiles = tiles(d);
            pool.install(|| Lrq.prepare(&q).unwrap().round_all(&mut tiles, grid("int3"), &q));
            tiles.into_iter().map(|tile| tile.points).collect::<Vec<_>>()
        };
        assert!(of(1) == of(2) && of(2) == of(3));
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
            let Some(prepared) = Lrq.prepare(&q) else { continue };
            prepared.round(&mut tile, grid, &q);
            assert_eq!(tile.points, want, "case {seed}");
        }
    }
}
