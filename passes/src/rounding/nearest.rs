//! Every entry to its nearest point.

use super::tile::{Quadratic, Tile};
use super::{Method, Prepared};
use crate::about::About;
use crate::grid::Grid;

static ABOUT: About = About {
    name: "nearest",
    doc: "Every weight to the nearest point of the grid, ties to even, as QuantizeLinear would. Needs no data.",
    source: "ONNX operator specification, QuantizeLinear-21",
};

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Nearest;

impl Method for Nearest {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn cost(&self) -> &'static str {
        "One division and one rounding per weight; no data."
    }

    fn prepare(&self, _: &Quadratic) -> Option<Box<dyn Prepared>> {
        Some(Box::new(Self))
    }

    fn needs_data(&self) -> bool {
        false
    }
}

impl Prepared for Nearest {
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, _: &Quadratic) {
        tile.nearest(grid);
    }
}
