//! `AdaRound` on the layer quadratic: up or down, learned by gradient.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use super::descend::descend;
use super::tile::{LANES, Lanes, Quadratic, Tile, WIDE};
use super::{Method, Prepared, gptq};
use crate::about::About;
use crate::grid::Grid;
use crate::simd::vectorized;

static ABOUT: About = About {
    name: "adaround",
    doc: "Between the points below and above every weight, ŵ = below + h(v) · gap with the rectified sigmoid h; v learned by Adam on the \
          layer quadratic, exactly and without noise, while a regularizer drives h to 0 or 1. Starts from gptq and \
          finishes with exact coordinate descent; every row keeps the best of nearest, gptq and this. Rows of more than 384 \
          columns go by gptq and descent, which a gradient does not beat there in reasonable time.",
    source: "Nagel et al. 2020, arXiv:2004.10568, section 3.3; on the Gram matrix and from GPTQ ours",
};

/// One iteration costs as much as a sweep of descent; wider rows than this take minutes a layer.
const MOST_COLUMNS: usize = 384;

const ITERATIONS: u32 = 400;
/// The share of iterations without regularizer.
const WARM_UP: f32 = 0.2;
/// The exponent of the regularizer falls from the first to the second.
const BETA: (f32, f32) = (20.0, 2.0);
/// Against a reconstruction gradient of mean magnitude 1.
const LAMBDA: f32 = 1.0;
const RATE: f32 = 0.02;
/// How far the rectified sigmoid reaches beyond 0 and 1.
const STRETCH: f32 = 0.1;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct AdaRound;

/// Ready for rows that share a quadratic form.
struct Ready {
    start: Box<dyn Prepared>,
    learns: bool,
}

impl Method for AdaRound {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "400 steps of m d² multiply-adds for weights of up to 384 columns, and what `gptq` and `descend` cost."
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
            let mut learned = tile.clone();
            vectorized(
                #[inline(always)]
                || learn(&mut learned, grid, q),
            );
            candidates.push(learned);
        }
        for mut candidate in candidates {
            descend(&mut candidate, grid, q, 10);
            tile.keep_better(&candidate, q);
        }
    }
}

/// Per column, the two neighbors.
struct Neighbors {
    below: Vec<Lanes>,
    above: Vec<Lanes>,
}

impl Neighbors {
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
    fn of(tile: &Tile, grid: &dyn Grid) -> Self {
        let side = |column: usize, pick: &dyn Fn(f64) -> f64| -> Lanes {
            let block = column / tile.block;
            std::array::from_fn(|lane| {
                let zero = f64::from(tile.zeros[block][lane]);
                let at = f64::from(tile.weights[column][lane] / tile.scales[block][lane]) + zero;
                (pick(at) - zero) as f32
            })
        };
        let columns = 0..tile.weights.len();
        Self {
            below: columns.clone().map(|column| side(column, &|x| grid.below(x))).collect(),
            above: columns.map(|column| side(column, &|x| grid.above(x))).collect(),
        }
    }
}

/// The rectified sigmoid and its slope.
#[inline(always)]
fn rectified(v: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + (-v).exp());
    let h = s * (1.0 + 2.0 * STRETCH) - STRETCH;
    if (0.0..=1.0).contains(&h) { (h, (1.0 + 2.0 * STRETCH) * s * (1.0 - s)) } else { (h.clamp(0.0, 1.0), 0.0) }
}

/// Where v starts: on the side that `tile` chose, else in the middle.
fn start(tile: &Tile, near: &Neighbors, column: usize, lane: usize) -> f32 {
    let (below, above) = (near.below[column][lane], near.above[column][lane]);
    let point = tile.points[column][lane];
    if point <= below {
        -1.5
    } else if point >= above {
        1.5
    } else {
        0.0
    }
}

/// Adam on v of every lane; leaves the hard choice in `tile`.
#[inline(always)]
fn learn(tile: &mut Tile, grid: &dyn Grid, q: &Quadratic) {
    let near = Neighbors::of(tile, grid);
    let d = tile.weights.len();
    let gap = |column: usize, lane: usize| {
        (near.above[column][lane] - near.below[column][lane]) * tile.scales[column / tile.block][lane]
    };
    let mut v: Vec<Lanes> = (0..d).map(|j| std::array::from_fn(|l| start(tile, &near, j, l))).collect();
    let (mut first, mut second) = (vec![[0.0_f32; LANES]; d], vec![[0.0_f32; LANES]; d]);
    let mut errors = vec![[0.0_f32; LANES]; d];
    let mut unit = [0.0_f32; LANES];
    for step in 1..=ITERATIONS {
        for j in 0..d {
            let (block, w) = (j / tile.block, &tile.weights[j]);
            errors[j] = std::array::from_fn(|l| {
                near.below[j][l] * tile.scales[block][l] + rectified(v[j][l]).0 * gap(j, l) - w[l]
            });
        }
        let progress = step as f32 / ITERATIONS as f32;
        let beta = BETA.1 + (BETA.0 - BETA.1) * (1.0 - (progress - WARM_UP).max(0.0) / (1.0 - WARM_UP));
        let lambda = if progress < WARM_UP { 0.0 } else { LAMBDA };
        let corrections = (1.0 - 0.9_f32.powi(step.cast_signed()), 1.0 - 0.999_f32.powi(step.cast_signed()));
        for start in (0..d).step_by(WIDE).filter(|_| step == 1) {
            let gradients = q.h.dots(&errors, 0, start);
            for j in start..(start + WIDE).min(d) {
                (0..LANES).for_each(|l| unit[l] += (gradients[j - start][l] * gap(j, l)).abs() / d as f32);
            }
        }
        for start in (0..d).step_by(WIDE) {
            let gradients = q.h.dots(&errors, 0, start);
            for j in start..(start + WIDE).min(d) {
                for l in 0..LANES {
                    let pull = gradients[j - start][l] * gap(j, l);
                    let (h, slope) = rectified(v[j][l]);
                    let away = 2.0 * h - 1.0;
                    let settle = -lambda * beta * away.abs().powf(beta - 1.0) * 2.0 * away.signum();
                    let scale = if unit[l] > 0.0 { 1.0 / unit[l] } else { 0.0 };
                    let gradient = (pull * scale + settle) * slope;
                    first[j][l] = 0.9 * first[j][l] + 0.1 * gradient;
                    second[j][l] = 0.999 * second[j][l] + 0.001 * gradient * gradient;
                    let (m, s) = (first[j][l] / corrections.0, second[j][l] / corrections.1);
                    v[j][l] -= RATE * m / (s.sqrt() + 1e-8);
                }
            }
        }
    }
    for (j, column) in v.iter().enumerate() {
        tile.points[j] = std::array::from_fn(|l| if column[l] >= 0.0 { near.above[j][l] } else { near.below[j][l] });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_case, random_quadratic, random_tile};
    use super::*;

    #[test]
    fn it_gains_on_gptq_and_no_row_loses() {
        let d = 40;
        let q = Quadratic::new(&random_quadratic(d, 80), d);
        for name in ["int4", "float4e2m1"] {
            let mut learned = random_tile(d, 8, 4);
            let mut by_gptq = learned.clone();
            AdaRound.prepare(&q).unwrap().round(&mut learned, grid(name), &q);
            gptq::Gptq.prepare(&q).unwrap().round(&mut by_gptq, grid(name), &q);
            let (a, b) = (learned.losses(&q), by_gptq.losses(&q));
            assert!(a.iter().zip(&b).all(|(x, y)| *x <= y + 1e-9), "{name}: {a:?} {b:?}");
            assert!(a.iter().sum::<f64>() < b.iter().sum::<f64>(), "{name}");
        }
    }

    #[test]
    fn what_is_learned_lies_next_to_the_weight() {
        for seed in 0..12 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            let near = Neighbors::of(&tile, grid);
            learn(&mut tile, grid, &q);
            for (j, points) in tile.points.iter().enumerate() {
                let mut sides = points.iter().zip(near.below[j].iter().zip(&near.above[j]));
                let is_side = |(x, (a, b)): (&f32, (&f32, &f32))| (x - a).abs() < 1e-6 || (x - b).abs() < 1e-6;
                assert!(sides.all(is_side), "case {seed}, column {j}");
            }
        }
    }

    #[test]
    fn the_rectified_sigmoid_rises_from_0_to_1_with_the_slope_that_it_tells() {
        let step = 1.0 / 64.0;
        for i in -512..=512_i16 {
            let v = f32::from(i) * step;
            let [(below, _), (h, slope), (above, _)] = [v - step, v, v + step].map(rectified);
            assert!((0.0..=1.0).contains(&h) && below <= h && h <= above, "{v}: {below} {h} {above}");
            if below > 0.0 && above < 1.0 {
                let want = (above - below) / (2.0 * step);
                assert!((slope - want).abs() < 1e-3, "{v}: {slope} {want}");
            } else if below >= 1.0 || above <= 0.0 {
                assert!(slope == 0.0, "{v}: {slope}");
            }
        }
    }
}
