//! A divisor of low rank before rounding.

use super::divisors::{Core, Divisors};
use super::low_rank::LowRank;
use super::{Learned, Parameterization, Weight};
use crate::about::About;

static ABOUT: About = About {
    name: "lrq",
    doc: "As flexround, with ln S = L U + r + c of low rank: far fewer parameters, for few samples and large weights.",
    source: "Lee et al. 2025 (LRQ), arXiv:2407.11534, section 2; around a start ours",
};

/// The rank, as a share of the smaller side.
const SHARE: usize = 4;

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Lrq;

#[allow(private_interfaces, reason = "see the trait")]
impl Parameterization for Lrq {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    /// Matrices of low rank and their moments.
    fn bytes_per_weight(&self) -> u64 {
        4
    }

    fn start(&self, weight: &Weight, seed: u64) -> Box<dyn Learned> {
        let columns = weight.points.len() / weight.rows;
        let rank = (weight.rows.min(columns) / SHARE).max(1);
        Box::new(Divisors::new(weight, Core::Product(LowRank::new(weight.rows, columns, rank, seed))))
    }
}
