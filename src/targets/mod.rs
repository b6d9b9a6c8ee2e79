//! Targets: one file each, mostly a table.

mod finn;
mod fpga;
mod hls4ml;
mod onnx_qdq;
mod openvino_cpu;
mod ort_cpu;
mod packed;
mod qnn;
mod qonnx;
mod qoperator;
mod rtl_mem;
mod safetensors_ct;
mod tensorrt;
mod tract;
mod vitisai;

use passes::target::Target;

pub(crate) use hls4ml::OPERATORS as HLS4ML_OPERATORS;

/// Every target, in the order of the manual. The first is the default.
pub static TARGETS: &[&dyn Target] = &[
    &ort_cpu::OrtCpu,
    &onnx_qdq::OnnxQdq,
    &qoperator::QOperator,
    &openvino_cpu::OpenVinoCpu,
    &tensorrt::TensorRt,
    &qonnx::Qonnx,
    &hls4ml::Hls4ml,
    &finn::Finn,
    &tract::Tract,
    &qnn::Qnn,
    &vitisai::VitisAi,
    &packed::Packed,
    &rtl_mem::RtlMem,
    &safetensors_ct::SafetensorsCt,
];

/// The target called `name`.
pub fn find(name: &str) -> Option<&'static dyn Target> {
    TARGETS.iter().copied().find(|target| target.info().about.name == name)
}

/// The part of a pipeline that every target starts with: a plain float graph, with the same function.
pub(crate) const NORMALIZE: &str = "\
infer-shapes, expand-qoperators, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead)";
