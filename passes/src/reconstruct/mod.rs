//! Reconstruction: codes learned by gradients through blocks of the graph.
//!
//! `blocks` cuts the graph where a single tensor carries everything on; `block` turns one into a tape whose leaves are its
//! weights; `samples` holds what it reads and should give, `objective` measures how far it is from that, `train` is the loop; a
//! [`Parameterization`] says what is learned about a weight and how codes come out of it. `by_blocks` does this block after block,
//! for passes that round in order; `distribution` moves what blocks read towards the statistics of training.
//! `chain` puts all blocks of a graph one behind the other, and `distill` learns from what the whole model returns, `saliency` tells how much that
//! depends on every weight, `stakes` how much on every row that layers read, `block_stakes` on every element of what blocks return,
//! `first_order` what rounding costs by that. `standing` is how far `distill` has come, shown to a `ledger`.

mod adam;
mod block;
mod block_stakes;
mod blocks;
mod by_blocks;
mod chain;
mod channels;
#[cfg(test)]
mod differences;
mod distill;
mod distribution;
mod fake_quant;
mod first_order;
mod given;
mod inputs;
mod ledger;
mod losses;
mod measure;
mod moments;
mod objective;
mod output_moments;
mod parameterization;
mod room;
mod run;
mod saliency;
mod samples;
mod search_scales;
mod settings;
mod softmax;
mod stakes;
mod standing;
mod steps;
mod tail;
mod teacher;
#[cfg(test)]
pub(crate) mod testing;
mod train;
mod triangle;
mod weight_moments;

pub(crate) use adam::Adam;
pub use blocks::{Block, all_weights, blocks, boundary, matches};
pub use first_order::{Cost, Costs, first_order};
pub use losses::losses;
pub use parameterization::{PARAMETERIZATIONS, Parameterization};
pub use saliency::{SALIENCIES, Saliency};

pub(crate) use block_stakes::BlockStakes;
pub(crate) use by_blocks::{Learner, Turn};
pub(crate) use distill::ENTRY as DISTILL;
pub(crate) use output_moments::{OutputMoments, output_moments};
pub(crate) use room::reserved;
pub(crate) use saliency::Gradient;
pub(crate) use search_scales::ENTRY as SEARCH_SCALES;
pub(crate) use stakes::{Stakes, stakes};
pub(crate) use weight_moments::{WeightMoments, weight_moments};
