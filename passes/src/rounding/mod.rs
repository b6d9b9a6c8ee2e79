//! Rounding: codes for encoded constants.
//!
//! `round` chooses codes, by a [`Method`]; `descend` and `refit-scales` improve what was chosen. All of them see a weight as
//! a matrix whose rows are independent and share one quadratic form (see [`crate::observe::Gram`]).

mod adaround;
mod descend;
mod enumerate;
mod gptq;
mod layer;
mod nearest;
mod norms;
mod prefix;
mod refit_scales;
mod round;
mod round_in_order;
mod stochastic;
mod tile;
mod work;

use std::fmt::Debug;

pub(crate) use norms::sites as norm_sites;
pub(crate) use round::in_nearest;

use crate::about::About;
use crate::grid::Grid;
use crate::pass::PassEntry;
use tile::{Quadratic, Tile};

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[
    round::ENTRY,
    round_in_order::ENTRY,
    descend::ENTRY,
    refit_scales::ENTRY,
    crate::reconstruct::DISTILL,
    crate::half::ENTRY,
];

/// Every method of `round`, in the order of the manual.
pub static ROUNDINGS: &[&dyn Method] =
    &[&nearest::Nearest, &stochastic::Stochastic, &gptq::Gptq, &enumerate::Enumerate, &adaround::AdaRound];

/// A way to choose the points of a weight.
#[allow(private_interfaces, reason = "methods are listed outside, and implemented here only")]
pub trait Method: Debug + Send + Sync {
    /// Name, documentation, source.
    fn about(&self) -> &'static About;
    /// What can be done once for all rows that share `q`; `None` leaves them to nearest.
    fn prepare(&self, q: &Quadratic) -> Option<Box<dyn Prepared>>;
    /// Whether it needs to know what the weight is multiplied with.
    fn needs_data(&self) -> bool {
        true
    }
}

/// A method, ready for the rows that share a quadratic form.
#[allow(private_interfaces, reason = "methods are listed outside, and implemented here only")]
pub trait Prepared: Send + Sync {
    /// Chooses the points of every lane.
    fn round(&self, tile: &mut Tile, grid: &dyn Grid, q: &Quadratic);
}

/// The method called `name`.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    ROUNDINGS.iter().copied().find(|method| method.about().name == name)
}
