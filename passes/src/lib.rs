//! The middle of onnx-quant: the graph, the numbers, and the passes over them.
//!
//! Start reading at [`model`]: a [`model::Model`] is a float [`ir::Graph`], what was measured on it ([`model::Stats`]) and
//! what was decided about it ([`model::Plan`]). A [`pass::Pass`] is a pure function from a model to a
//! [`model::Patch`]; [`pass::PassManager`] applies patches and checks them. [`simulate`] runs a plan, [`lower`] spells it.
//!
//! Stages, in the order a model meets them: [`normalize`], [`calibrate`], [`analysis`], [`rounding`], [`correct`], [`lower`]. They do
//! not use one another; they meet in the model.
//!
//! This crate does not read, write, print, or ask for the time; it knows no protobuf and no named target.

pub mod about;
pub mod analysis;
pub mod caches;
pub mod calibrate;
pub mod catalogue;
pub mod correct;
pub mod diag;
pub mod encoding;
pub mod equalize;
pub mod exec;
pub mod grad;
pub mod grid;
pub mod half;
pub mod herding;
pub mod id;
pub mod imagine;
pub mod ir;
pub mod journal;
pub mod judges;
mod lockstep;
pub mod lower;
pub mod model;
mod nbits;
pub mod normalize;
pub mod observe;
pub mod ops;
mod padding;
pub mod parallel;
pub mod pass;
pub mod reconstruct;
pub mod returned;
pub mod rounding;
pub mod seed;
pub mod sensitivity;
pub mod simd;
pub mod simulate;
pub mod slices;
mod tables;
pub mod target;
pub mod tensor;
pub mod text;
pub mod trt;
mod trunc;
