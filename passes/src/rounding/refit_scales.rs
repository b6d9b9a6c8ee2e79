//! Scales that fit the chosen codes.

use std::collections::BTreeSet;

use super::tile::{Quadratic, Tile};
use super::work;
use crate::grid::Grid;
use crate::id::ValueId;
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simd::vectorized;

crate::declare_pass! {
    /// Moves the scale of every block of a rounded weight to where the squared error of the layer's output is smallest, then
    /// lets the codes follow, a few times over.
    ///
    /// For codes c (less zero point) of block k of one row,
    ///
    /// ```text
    /// s ← s − cᵀ((Ŵ − W) H)ₖ / cᵀ Hₖₖ c,     then sweeps of coordinate descent
    /// ```
    ///
    /// Every step is exact and none loses. Scales keep their sign; rows whose 32-bit bias would saturate stay as they are. Declines
    /// weights that share one scale over all rows, and block formats, whose scales have a format of their own.
    INFO {
        name: "refit-scales",
        source: "least squares on the layer quadratic",
        cost: "m d² multiply-adds per round, and two sweeps of `descend`.",
        requires: Facts::ROUNDED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "rounds", doc: "scales, then codes, so many times, 3 by default" },
            OptionInfo { name: "sweeps", doc: "sweeps of descent after every round, 2 by default" },
        ],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry {
    info: &INFO,
    build: |options| -> Result<Box<dyn Pass>, OptionError> {
        Ok(Box::new(RefitScales { rounds: options.count("rounds", 3)?, sweeps: options.count("sweeps", 2)? }))
    },
};

/// See [`INFO`].
#[derive(Debug)]
struct RefitScales {
    rounds: usize,
    sweeps: usize,
}

impl Pass for RefitScales {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        work::wishes(model, cx)
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        if cx.scheme.block_format().is_some() {
            return Ok(Patch::on(model)); // their scales have a format of their own, which fitting would leave
        }
        work::polish(model, cx, INFO.about.name, |tile, grid, q| refit(tile, grid, q, self.rounds, self.sweeps))
    }
}

/// Whether the mantissa of `scale` is 1; also for the 0 of rows beyond the last.
pub(super) fn is_power_of_two(scale: f32) -> bool {
    scale.to_bits().trailing_zeros() >= f32::MANTISSA_DIGITS - 1
}

/// Scales, then `sweeps` of descent, `rounds` times over.
pub(super) fn refit(tile: &mut Tile, grid: &dyn Grid, q: &Quadratic, rounds: usize, sweeps: usize) {
    if tile.scales.iter().flatten().all(|scale| is_power_of_two(*scale)) {
        return; // they are that on purpose
    }
    let before = tile.clone();
    for _ in 0..rounds {
        let mut errors = tile.errors();
        vectorized(
            #[inline(always)]
            || {
                tile.refit_scales(q, &mut errors);
                for _ in 0..sweeps {
                    if !tile.descend(grid, q, &mut errors) {
                        break;
                    }
                }
            },
        );
    }
    // Sums in f32 could lose a hair where nothing is left to gain.
    tile.keep_better(&before, q);
}
