//! Equalization: other weights for the same function, easier to quantize.

mod absorb_high_bias;
mod affine_norm;
mod awq;
mod divided;
mod equalize_layers;
mod factors;
mod fit_clamps;
mod hadamard;
mod pool_to_conv;
mod region;
mod relax_clamps;
mod reparameterize_norms;
mod rotate;
mod rotate_heads;
mod rotate_inputs;
mod scaled;
mod shifted;
mod smooth;
mod smooth_caches;
mod stream;

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[
    smooth::ENTRY,
    equalize_layers::ENTRY,
    relax_clamps::ENTRY,
    absorb_high_bias::ENTRY,
    reparameterize_norms::ENTRY,
    awq::ENTRY,
    rotate::ENTRY,
    rotate_heads::ENTRY,
    smooth_caches::ENTRY,
    rotate_inputs::ENTRY,
    fit_clamps::ENTRY,
    pool_to_conv::ENTRY,
];
