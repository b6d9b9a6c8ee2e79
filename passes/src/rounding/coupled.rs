//! Rows that make up for one another.
//!
//! Rows of a weight share H = E\[x xᵀ\], and each is rounded as if the others were exact. But the outputs of the model add up what rows are
//! off by: with G = E\[g gᵀ\], g being the gradients that arrive at what the rows compute, errors E cost tr(G E H Eᵀ). With G = U D Uᵀ, U
//! being unit upper triangular by blocks of rows,
//!
//! ```text
//! tr(G E H Eᵀ) = Σ_b tr(D_b E'_b H E'_bᵀ),     E'_b = E_b + Σ_{a<b} U_abᵀ E_a
//! ```
//!
//! so that every block is rounded as if it were alone, around a weight that makes up for the errors of the blocks before it. Rows that
//! matter most come first, while all others can still make up for them. Rows of one block are taken as independent.
//!
//! Source: Tseng et al. 2025 (YAQA), arXiv:2505.22988, section 3; blocks of rows and their order ours.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};

use super::tile::{LANES, Lanes, Tile};
use crate::parallel;
use crate::reconstruct::OutputMoments;
use crate::simd::vectorized;

/// Tiles in a block of rows: they are rounded in parallel.
const TILES: usize = 2;

/// What is added to the diagonal of G, in its mean.
const DAMPING: f64 = 0.01;

/// So many effective rows of gradients per channel halve what is off the diagonal of G. smollm2 `w3a16g64` by 8,192 rows: divergence 0.3135
/// with 1, 0.3068 with 6.
const SHRINKAGE: f64 = 6.0;

/// How errors of the rows of one group of a weight add up, lane by lane of its tiles.
#[derive(Debug)]
pub(super) struct Coupling {
    lanes: usize,
    /// U over the diagonal, row-major: what an error in one lane brings to a lane of a later block; 0 elsewhere.
    feedback: Vec<f32>,
}

/// Those of all groups of a weight.
#[derive(Debug)]
pub(super) struct Couplings {
    /// The rows of each group, tile by tile, and how their errors add up, where G has a factor.
    groups: Vec<(Vec<Vec<usize>>, Option<Coupling>)>,
}

impl Couplings {
    /// Those of a weight with so many `groups`.
    pub(super) fn of(moments: &OutputMoments, groups: usize) -> Self {
        let groups: Vec<usize> = (0..groups).collect();
        Self { groups: parallel::map(&groups, |group| (tiles(moments, *group), Coupling::of(moments, *group))) }
    }

    /// The rows of `group`, tile by tile.
    pub(super) fn tiles(&self, group: usize) -> Vec<Vec<usize>> {
        self.groups[group].0.clone()
    }

    /// How errors of the rows of `group` add up; `None` where rows are taken as independent.
    pub(super) fn of_group(&self, group: usize) -> Option<&Coupling> {
        self.groups[group].1.as_ref()
    }
}

/// The rows of `group`, tile by tile.
fn tiles(moments: &OutputMoments, group: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..moments.channels).collect();
    let stake = |row: usize| moments.at(group, row, row);
    order.sort_by(|&a, &b| stake(b).total_cmp(&stake(a)).then(a.cmp(&b)));
    order.chunks(LANES).map(<[usize]>::to_vec).collect()
}

/// What errors of two rows of `group` cost together, by what was measured: G, damped, and shrunk off the diagonal.
pub(super) fn metric(moments: &OutputMoments, group: usize) -> impl Fn(usize, usize) -> f64 + Sync {
    let m = moments.channels;
    let mean = (0..m).map(|row| f64::from(moments.at(group, row, row))).sum::<f64>() / m as f64;
    // Few rows of gradients overfit, and neighbors are alike.
    let keep = moments.effective() / (moments.effective() + SHRINKAGE * m as f64);
    move |a: usize, b: usize| {
        let moment = f64::from(moments.at(group, a, b));
        if a == b { moment + DAMPING * mean } else { keep * moment }
    }
}

impl Coupling {
    /// That of the rows of `group`; `None` where G has no factor.
    #[expect(clippy::cast_possible_truncation, reason = "feedback is used as f32")]
    fn of(moments: &OutputMoments, group: usize) -> Option<Self> {
        let m = moments.channels;
        // All tiles but the last are full, so that the lane of a row is its place in the order.
        let order: Vec<usize> = tiles(moments, group).concat();
        let by_row = metric(moments, group);
        let g = |a: usize, b: usize| by_row(order[a], order[b]);
        let lanes = m.div_ceil(LANES) * LANES;
        let mut feedback = vec![0.0_f32; lanes * lanes];
        factor(m, TILES * LANES, &g, |a, b, brought| feedback[a * lanes + b] = brought as f32)?;
        feedback.iter().all(|v| v.is_finite()).then_some(Self { lanes, feedback })
    }

    /// Rounds `tiles` block after block, as `choose` does with tiles that are alone.
    pub(super) fn round(&self, tiles: &mut [Tile], choose: &dyn Fn(&mut [Tile])) {
        let mut errors: Vec<Vec<Lanes>> = Vec::with_capacity(tiles.len());
        for block in tiles.chunks_mut(TILES) {
            let goals: Vec<Vec<Lanes>> = block.iter().map(|tile| tile.weights.clone()).collect();
            let mut moved: Vec<(usize, &mut Tile)> = (errors.len()..).zip(&mut *block).collect();
            parallel::each(&mut moved, |(at, tile)| self.make_up(&mut tile.weights, &errors, *at));
            choose(block);
            for (tile, goal) in block.iter_mut().zip(goals) {
                tile.weights = goal;
                errors.push(tile.errors());
            }
        }
    }

    /// Moves what tile `at` should imitate, so that it makes up for the `errors` of the blocks before it.
    fn make_up(&self, goal: &mut [Lanes], errors: &[Vec<Lanes>], at: usize) {
        for (other, errors) in errors.iter().enumerate() {
            let from = |lane: usize| &self.feedback[(other * LANES + lane) * self.lanes + at * LANES..][..LANES];
            let brought: [Lanes; LANES] = std::array::from_fn(|lane| std::array::from_fn(|to| from(lane)[to]));
            vectorized(
                #[inline(always)]
                || take_away(goal, errors, &brought),
            );
        }
    }
}

/// Subtracts `errors` from `goal`, each in the shares that it brings to every lane.
#[inline(always)]
pub(super) fn take_away(goal: &mut [Lanes], errors: &[Lanes], brought: &[Lanes; LANES]) {
    for (into, error) in goal.iter_mut().zip(errors) {
        let mut sum = *into;
        for (e, shares) in error.iter().zip(brought) {
            for (s, share) in sum.iter_mut().zip(shares) {
                *s = (-e).mul_add(*share, *s);
            }
        }
        *into = sum;
    }
}

/// Puts what is over the diagonal of U, entry by entry, for the m × m matrix `g` = U D Uᵀ with blocks of so many rows; `None` where there is
/// no such factor.
fn factor(
    m: usize,
    block: usize,
    g: &dyn Fn(usize, usize) -> f64,
    mut put: impl FnMut(usize, usize, f64),
) -> Option<()> {
    // The Cholesky factor of the matrix read backwards is R read backwards, where G = R Rᵀ with R upper triangular.
    let back = |at: usize| m - 1 - at;
    let factored = Mat::from_fn(m, m, |a, b| g(back(a), back(b))).llt(Side::Lower).ok()?;
    let lower = factored.L();
    let r = |a: usize, b: usize| if a <= b { lower[(back(a), back(b))] } else { 0.0 };
    for start in (block..m).step_by(block) {
        let n = block.min(m - start);
        // U_ab = R_ab R_bb⁻¹: R_bbᵀ U_abᵀ = R_abᵀ.
        let own = Mat::from_fn(n, n, |i, j| r(start + j, start + i));
        let solved = own.partial_piv_lu().solve(&Mat::from_fn(n, start, |i, a| r(a, start + i)));
        for (a, i) in (0..start).flat_map(|a| (0..n).map(move |i| (a, i))) {
            put(a, start + i, solved[(i, a)]);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_quadratic, random_tile};
    use faer::linalg::solvers::DenseSolveCore as _;

    use super::*;
    use crate::grid::Grid;
    use crate::seed::{mixed, uniform};

    const COLUMNS: usize = 12;

    fn int3() -> &'static dyn Grid {
        grid("int3")
    }

    /// Moments of `n` rows of gradients whose channels have `common` in common.
    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn moments(channels: usize, n: u64, common: f32) -> OutputMoments {
        let mut moments = OutputMoments::new(channels, 1).unwrap();
        for row in 0..n {
            let draw = |at: u64| 2.0 * uniform(mixed(row) ^ at) as f32 - 1.0;
            let gradient: Vec<f32> = (0..channels as u64).map(|c| common * draw(0) + draw(1 + c)).collect();
            moments.see(&gradient, (1, 1));
        }
        moments
    }

    fn tiles_of(channels: usize) -> Vec<Tile> {
        let tile = |at: usize| Tile { live: LANES.min(channels - at), ..random_tile(COLUMNS, 4, 3 + at as u64) };
        let mut all: Vec<Tile> = (0..channels).step_by(LANES).map(tile).collect();
        for tile in &mut all {
            let live = tile.live;
            tile.weights.iter_mut().for_each(|lanes| lanes[live..].fill(0.0));
        }
        all
    }

    /// tr(G E H Eᵀ), with G as it was measured.
    fn cost(tiles: &[Tile], moments: &OutputMoments, h: &[f32]) -> f64 {
        let order = super::tiles(moments, 0).concat();
        let errors: Vec<Vec<Lanes>> = tiles.iter().map(Tile::errors).collect();
        let error = |row: usize, column: usize| f64::from(errors[row / LANES][column][row % LANES]);
        let mut sum = 0.0;
        for (a, b) in (0..order.len()).flat_map(|a| (0..order.len()).map(move |b| (a, b))) {
            let pairs = (0..COLUMNS * COLUMNS).map(|at| (at / COLUMNS, at % COLUMNS, f64::from(h[at])));
            let product: f64 = pairs.map(|(i, j, h)| error(a, i) * h * error(b, j)).sum();
            sum += f64::from(moments.at(0, order[a], order[b])) * product;
        }
        sum
    }

    fn nearest(tiles: &mut [Tile]) {
        tiles.iter_mut().for_each(|tile| tile.nearest(int3()));
    }

    #[test]
    fn what_outputs_add_up_is_made_up_for() {
        let h = random_quadratic(COLUMNS, 40);
        for channels in [40, 64, 100] {
            let moments = moments(channels, 2000, 1.0);
            let (mut alone, mut together) = (tiles_of(channels), tiles_of(channels));
            nearest(&mut alone);
            Coupling::of(&moments, 0).unwrap().round(&mut together, &nearest);
            let (alone_costs, costs) = (cost(&alone, &moments, &h), cost(&together, &moments, &h));
            assert!(costs < 0.8 * alone_costs, "{channels}: {costs} {alone_costs}");
            // What is imitated stays what it was.
            assert!(alone.iter().zip(&together).all(|(a, b)| a.weights == b.weights), "{channels}");
        }
    }

    #[test]
    fn what_outputs_do_not_add_up_is_rounded_alone() {
        let mut independent = OutputMoments::new(50, 1).unwrap();
        for channel in 0..50 {
            let mut gradient = vec![0.0; 50];
            gradient[channel] = 1.0 + channel as f32;
            independent.see(&gradient, (1, 1));
        }
        let (mut alone, mut together) = (tiles_of(50), tiles_of(50));
        nearest(&mut alone);
        Coupling::of(&independent, 0).unwrap().round(&mut together, &nearest);
        assert!(alone.iter().zip(&together).all(|(a, b)| a.points == b.points));
    }

    /// U D Uᵀ with the blocks of D that U leaves is G.
    #[test]
    fn the_factor_is_that_of_the_matrix() {
        let (m, block) = (11, 4);
        let h = random_quadratic(m, 30);
        let g = |a: usize, b: usize| f64::from(h[a * m + b]);
        let mut u = vec![0.0; m * m];
        (0..m).for_each(|a| u[a * m + a] = 1.0);
        factor(m, block, &g, |a, b, value| u[a * m + b] = value).unwrap();
        let whole = Mat::from_fn(m, m, |a, b| u[a * m + b]);
        let inverse = whole.partial_piv_lu().inverse();
        let d = &inverse * Mat::from_fn(m, m, g) * inverse.transpose();
        for (a, b) in (0..m).flat_map(|a| (0..m).map(move |b| (a, b))).filter(|(a, b)| a / block != b / block) {
            assert!(d[(a, b)].abs() < 1e-6, "{a} {b}: {}", d[(a, b)]);
        }
    }

    #[test]
    fn rows_that_matter_most_come_first() {
        let mut moments = OutputMoments::new(20, 1).unwrap();
        let gradient: Vec<f32> = (0..20).map(|at| f32::from(u8::try_from(at * 7 % 20).unwrap())).collect();
        moments.see(&gradient, (1, 1));
        let order = tiles(&moments, 0).concat();
        assert!(order.windows(2).all(|pair| gradient[pair[0]] >= gradient[pair[1]]), "{order:?}");
    }
}
