//! What the operators' definition asks, and `onnx.checker` does not check.

use passes::tensor::DType;

use super::{Lint, error, warning};

const SPEC: &str = "ONNX operator specification, QuantizeLinear-21 and DequantizeLinear-21";

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8001",
        "a scale is zero or not finite",
        "quantize the model again; a channel without values takes any positive scale",
        SPEC,
        |subject, found| {
            for q in subject.quantizers() {
                if let Some(scale) = q.scales().iter().find(|s| !s.is_finite() || **s == 0.0) {
                    found.node(q.node, format!("a scale is {scale}"));
                }
            }
        },
    ),
    error("OQ8002", "scale and zero point have different shapes", "give both one shape", SPEC, |subject, found| {
        for q in subject.quantizers() {
            if let (Some(scale), Some(zero)) = (q.scale, q.zero)
                && scale.shape() != zero.shape()
                && (scale.len() > 1 || zero.len() > 1)
            {
                found.node(q.node, format!("the scale is {:?}, the zero point {:?}", scale.shape(), zero.shape()));
            }
        }
    }),
    error(
        "OQ8003",
        "the number of scales is not the extent of their axis",
        "write one scale per index of `axis`",
        SPEC,
        |subject, found| {
            for q in subject.quantizers().filter(|q| q.block() == 0) {
                let (Some(codes), Some([scales])) = (q.codes, q.scale.map(passes::tensor::Tensor::shape)) else {
                    continue;
                };
                let axis = passes::ops::positive_axis(q.node.int("axis", 1), codes.shape().len());
                let extent = axis.map(|axis| codes.shape()[axis]);
                if *scales > 1 && extent.is_some_and(|extent| extent != *scales) {
                    let shape = codes.shape();
                    found.node(q.node, format!("{scales} scales for axis {} of {shape:?}", q.node.int("axis", 1)));
                }
            }
        },
    ),
    error("OQ8004", "the axis is out of range", "name an axis that the tensor has", SPEC, |subject, found| {
        for q in subject.quantizers().filter(|q| !q.per_tensor()) {
            let Some(rank) = q.codes.map(|codes| codes.shape().len()) else { continue };
            let axis = q.node.int("axis", 1);
            if passes::ops::positive_axis(axis, rank).is_none() {
                found.node(q.node, format!("axis {axis} of a tensor of {rank} dimensions"));
            }
        }
    }),
    error(
        "OQ8005",
        "scales of blocks do not have the shape of the codes with the axis cut",
        "write ceil(extent / block_size) scales along the axis",
        SPEC,
        |subject, found| {
            for q in subject.quantizers().filter(|q| q.block() > 0) {
                let (Some(codes), Some(scale)) = (q.codes, q.scale) else { continue };
                let axis = passes::ops::positive_axis(q.node.int("axis", 1), codes.shape().len());
                let (Some(axis), Ok(block)) = (axis, usize::try_from(q.block())) else { continue };
                let mut want = codes.shape().to_vec();
                want[axis] = want[axis].div_ceil(block);
                if scale.shape() != want {
                    found.node(q.node, format!("the scales are {:?} and should be {want:?}", scale.shape()));
                }
            }
        },
    ),
    error("OQ8006", "the zero point has another type than the codes", "give both one type", SPEC, |subject, found| {
        for q in subject.quantizers() {
            if let (Some(codes), Some(zero)) = (q.codes, q.zero)
                && codes.dtype() != zero.dtype()
            {
                found.node(
                    q.node,
                    format!("codes are {}, the zero point {}", codes.dtype().name(), zero.dtype().name()),
                );
            }
        }
    }),
    warning(
        "OQ8007",
        "a scale or zero point is computed by the model",
        "fold constants first (`onnx-quant opt --pipeline fold-constants`), or quantize again",
        "readers fuse constant parameters only: selectors of ONNX Runtime 1.31, parser of TensorRT",
        |subject, found| {
            for q in subject.quantizers() {
                if subject.is_computed(q) && q.block() == 0 {
                    found.node(q.node, "its parameters are not constants: nobody fuses it");
                }
            }
        },
    ),
    error(
        "OQ8008",
        "a small float has a zero point other than 0",
        "leave the zero point out and name the type by output_dtype",
        SPEC,
        |subject, found| {
            for q in subject.quantizers().filter(|q| q.is_float8()) {
                if q.zeros().iter().any(|zero| *zero != 0) {
                    let name = q.storage.map_or("", DType::name);
                    found.node(q.node, format!("codes are {name}"));
                }
            }
        },
    ),
];
