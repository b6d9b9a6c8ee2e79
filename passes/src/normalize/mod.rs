//! Passes that bring a float graph to a plain form without changing its function.

mod absorb_blocks;
mod absorb_caches;
mod absorb_dynamic;
mod absorb_nbits;
mod absorb_qdq;
mod absorb_qonnx;
mod absorb_rows;
mod absorb_tables;
mod drop_dead;
mod eliminate_identity;
mod expand_qoperators;
mod expand_trunc;
mod fold_affine;
mod fold_batch_norm;
mod fold_constants;
mod fold_gemm_scalars;
mod fold_pad;
mod infer_shapes;
mod one_sample;
mod scale_linear;
mod split_gemm;

use crate::pass::PassEntry;

/// What `split-gemm` adds to the names of weights that it turns.
pub const TRANSPOSED: &str = ".transposed";

/// Order is the order of the manual, not of the pipeline.
pub static PASSES: &[PassEntry] = &[
    infer_shapes::ENTRY,
    one_sample::ENTRY,
    expand_qoperators::ENTRY,
    absorb_qdq::ENTRY,
    fold_constants::ENTRY,
    eliminate_identity::ENTRY,
    fold_gemm_scalars::ENTRY,
    split_gemm::ENTRY,
    fold_batch_norm::ENTRY,
    fold_affine::ENTRY,
    fold_pad::ENTRY,
    drop_dead::ENTRY,
];
