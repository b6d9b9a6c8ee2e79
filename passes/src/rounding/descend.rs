//! Exact coordinate descent on codes.

use std::collections::BTreeSet;

use super::tile::{Quadratic, Tile};
use super::work;
use crate::grid::Grid;
use crate::id::ValueId;
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionInfo, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simd::vectorized;

crate::declare_pass! {
    /// Moves every code of a rounded weight to where the squared error of the layer's output is smallest, all others held,
    /// sweep after sweep until nothing moves.
    ///
    /// One coordinate of a convex quadratic on sorted points is solved by rounding its vertex, so every step is exact and
    /// none loses:
    ///
    /// ```text
    /// wⱼ' = point nearest to  ŵⱼ − ((Ŵ − W) H)ⱼ / Hⱼⱼ
    /// ```
    ///
    /// Works on any grid, from any start. Columns that were never anything but zero keep their codes.
    INFO {
        name: "descend",
        source: "coordinate descent on the layer quadratic; as in CDQuant, arXiv:2406.17542",
        cost: "m d² multiply-adds per sweep over a weight of m × d, as a matrix product of its size costs for d rows.",
        requires: Facts::ROUNDED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo { name: "sweeps", doc: "at most so many sweeps, 6 by default" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(Descend { sweeps: options.count("sweeps", 6)? })) };

/// See [`INFO`].
#[derive(Debug)]
struct Descend {
    sweeps: usize,
}

impl Pass for Descend {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        work::wishes(model, cx)
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        work::polish(model, cx, INFO.about.name, |tile, grid, q| descend(tile, grid, q, self.sweeps))
    }
}

/// At most so many `sweeps`, until nothing moves.
pub(super) fn descend(tile: &mut Tile, grid: &dyn Grid, q: &Quadratic, sweeps: usize) {
    let mut errors = tile.errors();
    for _ in 0..sweeps {
        if !vectorized(
            #[inline(always)]
            || tile.descend(grid, q, &mut errors),
        ) {
            break;
        }
    }
}
