//! Ranges of weights, chosen by what rounding does to the layer's output.

#![expect(clippy::inline_always, reason = "what runs inside `vectorized` must be compiled into it")]

use std::collections::BTreeSet;
use std::ops::Range;

use super::refit_scales::is_power_of_two;
use super::tile::{LANES, Lanes, Quadratic, Tile, WIDE};
use super::work;
use crate::grid::Grid;
use crate::id::ValueId;
use crate::model::{Model, Patch};
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simd::vectorized;

crate::declare_pass! {
    /// Chooses the range of every row or block of a weight anew, before its codes are chosen: of the scales from half to twice the one that
    /// it has, that whose nearest points do least harm to the layer's output.
    ///
    /// For the errors δ of block k under a candidate,
    ///
    /// ```text
    /// diagonal:  Σⱼ Hⱼⱼ δⱼ²        block:  δᵀ Hₖₖ δ
    /// ```
    ///
    /// The diagonal is for methods that make up for errors by other columns, the block for nearest rounding, which does not.
    /// Ties stay with the scale that was assigned, so no block loses; rows whose 32-bit bias would saturate in another keep it too. Declines
    /// weights that share one scale over all rows, scales that are powers of two on purpose, and block formats, whose scales have a format
    /// of their own.
    INFO {
        name: "clip-weights",
        source: "Lin et al. 2023 (AWQ), arXiv:2306.00978, its search for clipping; on the Gram matrix, and wider ranges too, ours",
        cost: "49 roundings of every weight; with `form=block` m d b multiply-adds for each, for blocks of b columns. Reads Gram matrices that `calibrate` has summed.",
        requires: Facts::ENCODED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo { name: "form", doc: "how errors are weighed: diagonal (default), or block, with how columns move together" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(ClipWeights { form: Form::of(options)? })) };

/// How errors within a block are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Every column by its power.
    Diagonal,
    /// By how columns move together, too.
    Block,
}

impl Form {
    fn of(options: &Options) -> Result<Self, OptionError> {
        match options.text("form", "diagonal") {
            "diagonal" => Ok(Self::Diagonal),
            "block" => Ok(Self::Block),
            other => {
                let problem = format!("`{other}` is none of diagonal, block");
                Err(OptionError { option: "form".into(), problem })
            }
        }
    }
}

/// See [`INFO`].
#[derive(Debug)]
struct ClipWeights {
    form: Form,
}

impl Pass for ClipWeights {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        work::wishes(model, cx)
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        if cx.scheme.block_format().is_some() {
            return Ok(patch); // their scales have a format of their own, which a search would leave
        }
        let layers = work::layers(model);
        cx.progress.begin(INFO.about.name, layers.len() as u64);
        for layer in layers.iter().filter(|layer| layer.scales_are_own() && model.plan().codes(layer.site).is_none()) {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            let grid = layer.encoding.grid;
            let clipped = work::over_tiles(
                layer,
                None,
                |_| (),
                |tiles, q, ()| parallel::each(tiles, |tile| clip(tile, grid, q, self.form)),
            );
            let no_points = || Some(vec![0.0; layer.tensor.len()]); // they are chosen later
            let clipped = clipped.and_then(|clipped| clipped.in_reach(model, layer, no_points));
            let edits = clipped.and_then(|clipped| clipped.scaled(model, layer)).unwrap_or_default();
            patch.count("clipped", u64::from(!edits.is_empty()));
            edits.into_iter().for_each(|edit| patch.edit(edit));
            cx.progress.step();
        }
        cx.progress.end();
        Ok(patch)
    }
}

/// Factors of scales, beside 1: from a half to 2 in steps of 1/32.
fn factors() -> impl Iterator<Item = f32> {
    (16..=64_u8).filter(|step| *step != 32).map(|step| f32::from(step) / 32.0)
}

/// The scale of every block to where its nearest points lose least in `form`. Points are left alone.
pub(super) fn clip(tile: &mut Tile, grid: &dyn Grid, q: &Quadratic, form: Form) {
    if tile.scales.iter().flatten().all(|scale| is_power_of_two(*scale)) {
        return; // they are that on purpose
    }
    vectorized(
        #[inline(always)]
        || {
            for block in 0..tile.scales.len() {
                let assigned = tile.scales[block];
                let (mut best, mut lowest) = (assigned, block_losses(tile, block, grid, q, form));
                for factor in factors() {
                    let scales = assigned.map(|scale| scale * factor);
                    tile.scales[block] = scales;
                    let losses = block_losses(tile, block, grid, q, form);
                    for l in 0..LANES {
                        if losses[l] < lowest[l] && scales[l].is_normal() {
                            (best[l], lowest[l]) = (scales[l], losses[l]);
                        }
                    }
                }
                tile.scales[block] = best;
            }
        },
    );
}

/// What the nearest points of a block lose, all other columns being exact.
#[inline(always)]
fn block_losses(tile: &Tile, block: usize, grid: &dyn Grid, q: &Quadratic, form: Form) -> [f64; LANES] {
    let columns = block * tile.block..((block + 1) * tile.block).min(tile.weights.len());
    let errors: Vec<Lanes> = columns
        .clone()
        .map(|column| {
            let (w, s) = (&tile.weights[column], &tile.scales[block]);
            let points = tile.snapped(grid, block, w);
            std::array::from_fn(|l| points[l] * s[l] - w[l])
        })
        .collect();
    let mut losses = [0.0_f64; LANES];
    let mut add = |column: usize, pull: &Lanes| {
        let error = &errors[column - columns.start];
        (0..LANES).for_each(|l| losses[l] += f64::from(error[l]) * f64::from(pull[l]));
    };
    match form {
        Form::Diagonal => columns.clone().for_each(|column| {
            let weight = q.h.at(column, column);
            add(column, &errors[column - columns.start].map(|error| error * weight));
        }),
        Form::Block => with_pulls(&errors, columns.clone(), q, add),
    }
    // Sums in f32 may end below 0 where H says nothing.
    losses.map(|loss| loss.max(0.0))
}

/// Calls `add` with every column of a block and Σ errors · H there.
#[inline(always)]
fn with_pulls(errors: &[Lanes], columns: Range<usize>, q: &Quadratic, mut add: impl FnMut(usize, &Lanes)) {
    for start in (columns.start / WIDE * WIDE..columns.end).step_by(WIDE) {
        let pulls = q.h.dots(errors, columns.start, start);
        for column in start.max(columns.start)..(start + WIDE).min(columns.end) {
            add(column, &pulls[column - start]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::{grid, random_case, random_quadratic, random_tile};
    use super::*;

    const FORMS: [Form; 2] = [Form::Diagonal, Form::Block];

    /// What nearest points of a block lose, in f64.
    fn exact(tile: &Tile, block: usize, lane: usize, (grid, q): (&dyn Grid, &Quadratic), form: Form) -> f64 {
        let mut nearest = tile.clone();
        nearest.nearest(grid);
        let columns = block * tile.block..((block + 1) * tile.block).min(tile.weights.len());
        let s = f64::from(tile.scales[block][lane]);
        let error = |j: usize| f64::from(nearest.points[j][lane]) * s - f64::from(tile.weights[j][lane]);
        let pairs = columns.clone().flat_map(|i| columns.clone().map(move |j| (i, j)));
        let counted = pairs.filter(|(i, j)| form == Form::Block || i == j);
        counted.map(|(i, j)| error(i) * f64::from(q.h.at(i, j)) * error(j)).sum()
    }

    #[test]
    fn no_block_loses_and_scales_stay_in_reach_whatever_the_case() {
        let mut moved = 0;
        for seed in 0..60 {
            let (before, q, grid) = random_case(seed);
            for form in FORMS {
                let mut tile = before.clone();
                clip(&mut tile, grid, &q, form);
                assert_eq!(tile.points, before.points);
                for block in 0..tile.scales.len() {
                    for lane in 0..LANES {
                        let [was, is] = [&before, &tile].map(|t| exact(t, block, lane, (grid, &q), form));
                        assert!(is <= was + 1e-5 * was.abs() + 1e-8, "case {seed} {form:?}: {is} {was}");
                        let ratio = tile.scales[block][lane] / before.scales[block][lane];
                        assert!((0.4999..=2.0001).contains(&ratio), "case {seed} {form:?}: {ratio}");
                        moved += usize::from((ratio - 1.0).abs() > 1e-3);
                    }
                }
            }
        }
        assert!(moved > 1000, "{moved}");
    }

    #[test]
    fn what_lies_on_the_grid_and_what_nothing_reads_keeps_its_scale() {
        for seed in 0..24 {
            let (mut tile, q, grid) = random_case(seed);
            tile.nearest(grid);
            for j in 0..q.columns {
                let s = tile.scales[j / tile.block];
                tile.weights[j] = std::array::from_fn(|l| tile.points[j][l] * s[l]);
            }
            let unread = Quadratic::new(&vec![0.0; q.columns * q.columns], q.columns);
            let (mut random, scales) = (random_case(seed).0, tile.scales.clone());
            for form in FORMS {
                clip(&mut tile, grid, &q, form);
                assert_eq!(tile.scales, scales, "case {seed} {form:?}");
                clip(&mut random, grid, &unread, form);
                assert_eq!(random.scales, random_case(seed).0.scales, "case {seed} {form:?}");
            }
        }
    }

    /// One outlier that hardly anything is multiplied with is cut off, and kept where it carries the output.
    #[test]
    fn an_outlier_is_cut_off_where_it_carries_nothing() {
        let d = 8;
        let mut tile = random_tile(d, d, 3);
        tile.weights[5] = [2.8; LANES];
        tile.scales = vec![[0.4; LANES]]; // 7 · 0.4 is the outlier
        for (power, least, most) in [(1e-4_f32, 0.0, 0.35), (1e4, 0.39, 0.41)] {
            let entry = |at: usize| match (at / d, at % d) {
                (5, 5) => power,
                (i, j) if i == j => 1.0,
                _ => 0.0,
            };
            let q = Quadratic::new(&(0..d * d).map(entry).collect::<Vec<f32>>(), d);
            for form in FORMS {
                let mut clipped = tile.clone();
                clip(&mut clipped, grid("int4"), &q, form);
                let mut scales = clipped.scales[0].iter();
                assert!(scales.all(|scale| (least..=most).contains(scale)), "{power} {form:?}: {:?}", clipped.scales);
            }
        }
    }

    #[test]
    fn powers_of_two_stay_and_the_form_of_blocks_counts_what_moves_together() {
        let d = 12;
        let q = Quadratic::new(&random_quadratic(d, 40), d);
        let mut tile = random_tile(d, 4, 2);
        tile.scales = vec![[0.125; LANES]; 3];
        let before = tile.scales.clone();
        clip(&mut tile, grid("int4"), &q, Form::Block);
        assert_eq!(tile.scales, before);
        tile.scales = vec![[0.2; LANES]; 3];
        for form in FORMS {
            for block in 0..3 {
                let losses = block_losses(&tile, block, grid("int4"), &q, form);
                for (lane, loss) in losses.into_iter().enumerate() {
                    let want = exact(&tile, block, lane, (grid("int4"), &q), form);
                    assert!((loss - want).abs() < 1e-5 * want + 1e-7, "{form:?}: {loss} {want}");
                }
            }
        }
    }
}
