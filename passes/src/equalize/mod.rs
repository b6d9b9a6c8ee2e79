//! Equalization: other weights for the same function, easier to quantize.

mod absorb_high_bias;
mod affine_norm;
mod annealing;
mod awq;
mod axes;
mod balance;
mod defer_softmax;
mod divided;
mod equalize_layers;
mod factors;
mod fit_clamps;
mod hadamard;
mod keeps_mean;
mod lanes;
mod learn_rotation;
mod learn_scaling;
mod orthogonal;
mod pivots;
mod pool_to_conv;
mod region;
mod relax_clamps;
mod reparameterize_norms;
mod rescaled;
mod rotate;
mod rotate_bottlenecks;
mod rotate_heads;
mod rotate_inputs;
mod rounding_loss;
mod scale_outliers;
mod scaled;
mod scaled_loss;
mod shifted;
mod smooth;
mod smooth_caches;
mod stream;
mod stream_norms;
mod stream_weights;
mod taps;
mod turned_loss;
mod utilization;
mod value_path;

use crate::pass::PassEntry;

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[
    smooth::ENTRY,
    scale_outliers::ENTRY,
    equalize_layers::ENTRY,
    relax_clamps::ENTRY,
    absorb_high_bias::ENTRY,
    reparameterize_norms::ENTRY,
    awq::ENTRY,
    learn_scaling::ENTRY,
    rotate::ENTRY,
    learn_rotation::ENTRY,
    rotate_heads::ENTRY,
    rotate_bottlenecks::ENTRY,
    smooth_caches::ENTRY,
    rotate_inputs::ENTRY,
    defer_softmax::ENTRY,
    fit_clamps::ENTRY,
    pool_to_conv::ENTRY,
];
