//! Where weights would go if they did not have to lie on points.
//!
//! With codes chosen, errors E = Ŵ − W cost tr(G E H Eᵀ) (see [`super::coupled`]; G is the identity where rows are alone). With all other
//! weights held, one weight would lie at its point less (G E H)ᵢⱼ / (Gᵢᵢ Hⱼⱼ). Coordinate descent rounds that to the point where it is; how far
//! it leans towards the neighbor says what it would cost to take that one instead: next to nothing half way there. What is learned begins
//! there, so that codes which matter least change first, and one after the other instead of all at once.

use super::coupled::{metric, take_away};
use super::layer::Layer;
use super::tile::{LANES, Lanes, Quadratic, Tile, WIDE};
use super::work::{self, Rounded};
use crate::grid;
use crate::model::Leanings;
use crate::parallel;
use crate::reconstruct::OutputMoments;
use crate::simd::vectorized;

/// Where the weights of `layer`, `rounded` so, would go, in the order of storage; by `outputs`, what its rows have in common. `None` where
/// nothing was measured.
pub(super) fn leanings(layer: &Layer<'_>, rounded: &Rounded, outputs: Option<&OutputMoments>) -> Option<Leanings> {
    let weights = layer.goal()?;
    let groups: Vec<usize> = (0..layer.groups).collect();
    let of_group = |group: &usize| of_group(layer, rounded, &weights, (*group, outputs));
    let all: Option<Vec<Vec<OfTile>>> = parallel::map(&groups, of_group).into_iter().collect();
    let mut leanings = vec![0_i8; weights.len()];
    for (rows, of_columns) in all?.into_iter().flatten() {
        for (column, of_lanes) in of_columns.iter().enumerate() {
            rows.iter().zip(of_lanes).for_each(|(row, leaning)| leanings[layer.index(*row, column)] = *leaning);
        }
    }
    Some(leanings.into())
}

/// The rows of a tile, and their leanings, column after column.
type OfTile = (Vec<usize>, Vec<[i8; LANES]>);

/// The leanings of the rows of `group`, tile by tile.
fn of_group(
    layer: &Layer<'_>,
    rounded: &Rounded,
    weights: &[f32],
    (group, outputs): (usize, Option<&OutputMoments>),
) -> Option<Vec<OfTile>> {
    let q = Quadratic::new(&layer.quadratic(group)?, layer.columns);
    let rows = work::consecutive(group, layer.rows / layer.groups);
    let tiles = parallel::map(&rows, |rows| rounded.tile(layer, weights, rows));
    let pulls = parallel::map(&tiles, |tile| pull(&tile.errors(), &q));
    let pulls = match outputs {
        Some(outputs) => together(&pulls, &metric(outputs, group), outputs.channels),
        None => pulls,
    };
    let pulled: Vec<(&Tile, &Vec<Lanes>)> = tiles.iter().zip(&pulls).collect();
    let of_tile = |(tile, pulls): &(&Tile, &Vec<Lanes>)| -> Vec<[i8; LANES]> {
        let leaning = |column: usize, lane: usize| {
            let block = column / tile.block;
            let units = -pulls[column][lane] / (q.h.at(column, column) * tile.scales[block][lane]);
            let at = f64::from(tile.points[column][lane]) + f64::from(tile.zeros[block][lane]);
            let gap = (grid::neighbor(layer.encoding.grid, at, units > 0.0) - at).abs();
            in_gaps(f64::from(units) / gap)
        };
        let of_lanes = |column| std::array::from_fn(|lane| if lane < tile.live { leaning(column, lane) } else { 0 });
        (0..layer.columns).map(of_lanes).collect()
    };
    let all = parallel::map(&pulled, of_tile);
    Some(rows.into_iter().zip(all).collect())
}

/// A leaning of so many gaps, in [`Leanings`]' units; none where it is no number.
#[expect(clippy::cast_possible_truncation, reason = "clamped to what fits")]
fn in_gaps(gaps: f64) -> i8 {
    let most = 0.49 * f64::from(crate::model::GAP);
    if gaps.is_finite() { (gaps * f64::from(crate::model::GAP)).clamp(-most, most).round() as i8 } else { 0 }
}

/// E H of one tile.
fn pull(errors: &[Lanes], q: &Quadratic) -> Vec<Lanes> {
    let mut all = vec![[0.0; LANES]; q.columns];
    for start in (0..q.columns).step_by(WIDE) {
        let sums = vectorized(
            #[inline(always)]
            || q.h.dots(errors, 0, start),
        );
        all[start..].iter_mut().zip(sums).for_each(|(into, sum)| *into = sum);
    }
    all
}

/// G P, each row over its own entry of the diagonal of G, for the `pulls` P of all tiles of a group of so many `channels`.
#[expect(clippy::cast_possible_truncation, reason = "shares are used as f32")]
fn together(pulls: &[Vec<Lanes>], g: &(dyn Fn(usize, usize) -> f64 + Sync), channels: usize) -> Vec<Vec<Lanes>> {
    let tiles: Vec<usize> = (0..pulls.len()).collect();
    parallel::map(&tiles, |&at| {
        let mut sum = vec![[0.0_f32; LANES]; pulls.first().map_or(0, Vec::len)];
        for (other, pull) in pulls.iter().enumerate() {
            let share =
                |a: usize, b: usize| if a < channels && b < channels { -(g(a, b) / g(b, b)) as f32 } else { 0.0 };
            let shares: [Lanes; LANES] =
                std::array::from_fn(|lane| std::array::from_fn(|to| share(other * LANES + lane, at * LANES + to)));
            vectorized(
                #[inline(always)]
                || take_away(&mut sum, pull, &shares),
            );
        }
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::super::work::tests::{independent, with_a_large_bias};
    use super::*;

    #[test]
    fn leanings_are_cut_before_the_neighbor_takes_over() {
        assert_eq!([0.0, 0.25, -0.25, 7.0, -7.0].map(in_gaps), [0, 64, -64, 125, -125]);
        assert_eq!([f64::NAN, f64::INFINITY].map(in_gaps), [0, 0]);
    }

    /// Columns that have nothing in common: every weight leans to where it was.
    #[test]
    fn alone_a_weight_leans_to_where_it_was() {
        let (model, node) = with_a_large_bias();
        let layer = Layer::of(&model, node).unwrap().behind(independent(), true);
        let rounded = work::over_tiles(
            &layer,
            None,
            |_| (),
            |tiles, _, ()| {
                tiles.iter_mut().for_each(|tile| tile.nearest(layer.encoding.grid));
            },
        );
        let rounded = rounded.unwrap();
        let weights = layer.goal().unwrap();
        let leanings = leanings(&layer, &rounded, None).unwrap();
        let mut leaning = 0;
        for (row, column) in (0..3).flat_map(|row| (0..4).map(move |column| (row, column))) {
            let at = layer.index(row, column);
            let units = weights[at] / layer.encoding.scale[row] - rounded.points[at];
            assert!((f64::from(leanings[at]) / 256.0 - f64::from(units)).abs() <= 0.013, "{row} {column}: {units}");
            leaning += usize::from(leanings[at] != 0);
        }
        assert!(leaning > 2, "{leanings:?}");
    }

    /// What rows have in common pulls a weight whose own row has no error.
    #[test]
    fn rows_in_common_lean_together() {
        let q = Quadratic::new(&[1.0, 0.0, 0.0, 2.0], 2);
        let mut errors = vec![[0.0; LANES]; 2];
        errors[0][0] = 0.3;
        let pulls = [pull(&errors, &q)];
        assert!((pulls[0][0][0] - 0.3).abs() < 1e-6 && pulls[0][1][0] == 0.0);
        let g = |a: usize, b: usize| if a == b { 2.0 } else { 1.0 };
        let both = together(&pulls, &g, 2);
        assert!((both[0][0][0] - 0.3).abs() < 1e-6 && (both[0][0][1] - 0.15).abs() < 1e-6, "{:?}", both[0][0]);
        assert!(both[0][0][2..].iter().all(|v| *v == 0.0));
    }
}
