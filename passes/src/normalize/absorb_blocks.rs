//! Blocks with scales of their own format, as `TensorRT` has them, back into the plan. See [`crate::trt`].

use std::sync::Arc;

use super::absorb_qdq::grid_of;
use crate::encoding::{Encoding, Granularity};
use crate::grid::block::{self, BlockFormat};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::ops::positive_axis;
use crate::tensor::{DType, Tensor};
use crate::trt::{DOMAIN, FP4_QUANTIZE, MXFP8_DEQUANTIZE, MXFP8_QUANTIZE, from_e8m0};

/// A node that turns blocks into floats.
pub(super) struct Blocks {
    pub(super) encoding: Encoding,
    /// Where they are constant.
    pub(super) codes: Option<Arc<Tensor>>,
    /// What is quantized, and by whom, where they are not.
    pub(super) source: Option<(ValueId, NodeId)>,
    /// The node that turns the scales into floats.
    pub(super) scales: Option<NodeId>,
}

/// Whether the only reader of what `node` returns takes it for the scales of blocks.
pub(super) fn are_scales(graph: &Graph, users: &Users, node: &Node) -> bool {
    let reader = node.output(0).and_then(|value| users.only_input(value));
    reader.is_some_and(|(reader, input)| {
        input == 1 && graph.node(reader).is_some_and(|reader| reader.op.is("DequantizeLinear"))
    })
}

/// The blocks that `node` turns into floats, if that is what it does.
pub(super) fn at(graph: &Graph, users: &Users, node: &Node) -> Option<Blocks> {
    let own = |node: &Node, name: &str| &*node.op.domain == DOMAIN && &*node.op.name == name;
    let (scales, dequantized) = if own(node, MXFP8_DEQUANTIZE) {
        (node.input(1)?, None)
    } else {
        let inner = node.op.is("DequantizeLinear").then(|| graph.producer(node.input(1)?)).flatten();
        let (id, inner) =
            inner.filter(|(_, inner)| inner.op.is("DequantizeLinear") && are_scales(graph, users, inner))?;
        (inner.input(0)?, Some((id, inner)))
    };
    // Only ONNX's own operator counts from the front.
    let default_axis = if dequantized.is_some() { 1 } else { -1 };
    let size = usize::try_from(node.int("block_size", 0)).ok().filter(|size| *size > 0)?;
    let factor = match dequantized {
        Some((_, inner)) => match (graph.constant_input(inner, 1)?.floats()?.as_ref(), inner.input(2)) {
            ([factor], None) if factor.is_finite() && *factor > 0.0 => *factor,
            _ => return None,
        },
        None => 1.0,
    };
    let scales_by = dequantized.map(|(id, _)| id);
    if node.input(2).is_some() {
        return None;
    }
    if let (Some(codes), Some(multiples)) = (graph.constant_input(node, 0), graph.constant(scales)) {
        let axis = positive_axis(node.int("axis", default_axis), codes.shape().len())?;
        let scale = decoded(multiples, dequantized.map(|_| factor))?;
        let grid = grid_of(codes.dtype())?;
        let zero_point = vec![0; scale.len()].into();
        let encoding =
            Encoding { grid, granularity: Granularity::Block { axis, size }, scale: scale.into(), zero_point };
        return Some(Blocks { encoding, codes: Some(Arc::clone(codes)), source: None, scales: scales_by });
    }
    let (id, quantizer) = graph.producer(node.input(0)?)?;
    let format: &BlockFormat = match dequantized {
        Some((_, inner)) if own(quantizer, FP4_QUANTIZE) && quantizer.input(1) == inner.input(1) => {
            block::find("nvfp4")?
        }
        None if own(quantizer, MXFP8_QUANTIZE) => block::find("mxfp8")?,
        _ => return None,
    };
    let rank = graph.value(quantizer.input(0)?).ty.rank()?;
    let axes =
        [(quantizer, -1), (node, default_axis)].map(|(node, default)| positive_axis(node.int("axis", default), rank));
    let same = axes[0] == axes[1] && quantizer.int("block_size", -1) == node.int("block_size", -1);
    let source = quantizer.input(0).filter(|_| same && size == format.size && quantizer.output(1) == Some(scales))?;
    let axis = positive_axis(node.int("axis", default_axis), graph.value(source).ty.rank()?)?;
    let encoding = Encoding::dynamic_blocks(format, axis, factor);
    Some(Blocks { encoding, codes: None, source: Some((source, id)), scales: scales_by })
}

/// The f32 scales that small codes stand for: floats times a factor, exponents where there is none.
#[expect(clippy::cast_possible_truncation, reason = "codes of 8 bits are exact in f32")]
fn decoded(scales: &Tensor, factor: Option<f32>) -> Option<Vec<f32>> {
    let sound = |scale: &f32| scale.is_finite() && *scale > 0.0;
    let scales: Vec<f32> = match (scales.dtype(), factor) {
        (DType::U8, None) => scales.bytes().iter().map(|code| from_e8m0(*code)).collect(),
        (_, None) => return None,
        (dtype, Some(factor)) => {
            let grid = grid_of(dtype).filter(|grid| !grid.info().integer)?;
            crate::encoding::unpack(scales).into_iter().map(|code| grid.decode(code) as f32 * factor).collect()
        }
    };
    scales.iter().all(sound).then_some(scales)
}
