//! Blocks as `TensorRT` has them: 4-bit floats dequantized twice, and operators of its own domain where every run gives blocks their
//! scales, or scales are E8M0.
//!
//! Source: the ONNX exporter of NVIDIA's model optimizer, 2026-08. No GPU ran what is written here.

use std::sync::Arc;

use super::qdq::{Lowering, bug};
use crate::encoding::{Encoding, Granularity};
use crate::grid::block::{self, BlockFormat, BlockScale};
use crate::id::{Name, Site, ValueId};
use crate::ir::{Attr, Attrs, Dim, Node, OpKey, TensorType, Type};
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};
use crate::trt::{DOMAIN, FP4_QUANTIZE, MXFP8_DEQUANTIZE, MXFP8_QUANTIZE, e8m0};

impl Lowering<'_> {
    /// The block format to write `encoding` of a constant in, where this dialect has one for it.
    pub(super) fn block_format(&self, encoding: &Encoding) -> Option<&'static BlockFormat> {
        let Granularity::Block { size, .. } = encoding.granularity else { return None };
        let format = block::of(encoding.grid, size).filter(|_| self.dialect.trt)?;
        matches!(format.about.name, "nvfp4" | "mxfp8").then_some(format)
    }

    /// A constant in blocks behind what turns it into floats.
    pub(super) fn block_constant(
        &mut self,
        value: ValueId,
        format: &BlockFormat,
        encoding: &Encoding,
        codes: &Arc<Tensor>,
    ) -> Result<ValueId, LowerError> {
        let name = Arc::clone(&self.graph.value(value).name);
        let Granularity::Block { axis, .. } = encoding.granularity else { return Err(no_scales(&name)) };
        let top = self.graph.constant(value).and_then(|tensor| tensor.floats());
        let top = top.map_or(0.0, |values| values.iter().fold(0.0_f32, |most, v| most.max(v.abs())));
        let codes_id = self.named(&format!("{name}.codes"), Arc::clone(codes))?;
        let shape = encoding.scale_shape(codes.shape());
        let whole = Type::Tensor(TensorType::known(DType::F32, codes.shape()));
        if format.scale != BlockScale::Float8 {
            let scales = e8m0(&encoding.scale).ok_or_else(|| no_scales(&name))?;
            let scales = self.small_constant(&name, "scale", DType::U8, &shape, scales)?;
            return self.block_dequantize(&name, (codes_id, scales), axis, format, whole);
        }
        let (factor, bytes) = BlockFormat::factored(&encoding.scale, top).ok_or_else(|| no_scales(&name))?;
        let scales = self.small_constant(&name, "scale", DType::F8E4M3Fn, &shape, bytes)?;
        let scale_type = Type::Tensor(TensorType::known(DType::F32, &shape));
        let scales = self.scales_dequantize(&name, scales, factor, scale_type)?;
        self.block_dequantize(&name, (codes_id, scales), axis, format, whole)
    }

    /// The result of quantizing an activation in blocks by the scales of each run.
    pub(super) fn block_pair(&mut self, value: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
        let name = Arc::clone(&self.graph.value(value).name);
        let fail = |problem: &str| LowerError { place: format!("tensor `{name}`"), problem: problem.into() };
        let Granularity::DynamicBlocks { axis, size } = encoding.granularity else { return Err(no_scales(&name)) };
        let format = block::of(encoding.grid, size).filter(|_| self.dialect.trt).filter(|format| {
            matches!(format.about.name, "nvfp4" | "mxfp8") && self.plan.encoding(Site::Value(value)).is_none()
        });
        let format = format
            .ok_or_else(|| fail("each run gives its blocks their scales, which only --target tensorrt can say"))?;
        let tensor = self.type_of(&self.graph.value(value).ty, false).tensor().cloned().unwrap_or_default();
        let cut = |dims: &Vec<Dim>| -> Vec<Dim> {
            let shorter = |(at, dim): (usize, &Dim)| match dim {
                Dim::Known(n) if at == axis => Dim::Known(n.div_ceil(size)),
                _ if at == axis => Dim::Unknown,
                dim => dim.clone(),
            };
            dims.iter().enumerate().map(shorter).collect()
        };
        let scale_shape = tensor.shape.as_ref().map(cut);
        let typed = |dtype, shape: &Option<Vec<Dim>>| Type::Tensor(TensorType::new(Some(dtype), shape.clone()));
        let (op, dtype, scale_dtype) = match format.scale {
            BlockScale::Float8 => (FP4_QUANTIZE, DType::F4E2M1, DType::F8E4M3Fn),
            BlockScale::PowerOfTwo { .. } => (MXFP8_QUANTIZE, DType::F8E4M3Fn, DType::U8),
        };
        let mut attrs = block_attrs(axis, size);
        let mut inputs = vec![Some(self.raw[&value])];
        if format.scale == BlockScale::Float8 {
            let factor = Arc::new(Tensor::scalar(encoding.scale[0]));
            inputs.push(Some(self.named(&format!("{name}.factor"), factor)?));
            attrs.insert("scale_type".into(), Attr::Int(i64::from(DType::F8E4M3Fn.code())));
        } else {
            attrs.insert("output_dtype".into(), Attr::Int(i64::from(DType::F8E4M3Fn.code())));
        }
        let codes = self.typed(&format!("{name}.codes"), typed(dtype, &tensor.shape));
        let scales = self.typed(&format!("{name}.scale"), typed(scale_dtype, &scale_shape));
        let factor = inputs.get(1).copied().flatten();
        self.call((DOMAIN, op), &format!("{name}.quantize"), inputs, &[codes, scales], attrs)?;
        let scales = match factor {
            Some(factor) => {
                let result = self.typed(&format!("{name}.scale.dequantized"), typed(DType::F32, &scale_shape));
                let inputs = vec![Some(scales), Some(factor)];
                let node = format!("{name}.scale.dequantize");
                self.call(("", "DequantizeLinear"), &node, inputs, &[result], Attrs::new())?;
                result
            }
            None => scales,
        };
        let result = self.block_dequantize(&name, (codes, scales), axis, format, Type::Tensor(tensor))?;
        self.pairs.entry(value).or_default().push((encoding.clone(), result));
        Ok(result)
    }

    fn scales_dequantize(
        &mut self,
        name: &Name,
        scales: ValueId,
        factor: f32,
        ty: Type,
    ) -> Result<ValueId, LowerError> {
        let factor = Arc::new(Tensor::scalar(factor));
        let factor = self.named(&format!("{name}.factor"), factor)?;
        let result = self.typed(&format!("{name}.scale.dequantized"), ty);
        let inputs = vec![Some(scales), Some(factor)];
        let node = format!("{name}.scale.dequantize");
        self.call(("", "DequantizeLinear"), &node, inputs, &[result], Attrs::new())?;
        Ok(result)
    }

    fn block_dequantize(
        &mut self,
        name: &Name,
        (codes, scales): (ValueId, ValueId),
        axis: usize,
        format: &BlockFormat,
        ty: Type,
    ) -> Result<ValueId, LowerError> {
        let result = self.typed(&format!("{name}.dequantized"), ty);
        let mut attrs = block_attrs(axis, format.size);
        let op = if format.scale == BlockScale::Float8 {
            ("", "DequantizeLinear")
        } else {
            attrs.insert("output_dtype".into(), Attr::Int(i64::from(DType::F32.code())));
            (DOMAIN, MXFP8_DEQUANTIZE)
        };
        let inputs = vec![Some(codes), Some(scales)];
        self.call(op, &format!("{name}.dequantize"), inputs, &[result], attrs)?;
        Ok(result)
    }

    fn small_constant(
        &mut self,
        name: &Name,
        what: &str,
        dtype: DType,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<ValueId, LowerError> {
        let tensor = Tensor::new(dtype, shape.to_vec(), bytes.into());
        let tensor = tensor.map_err(|e| LowerError { place: format!("tensor `{name}`"), problem: e.to_string() })?;
        self.named(&format!("{name}.{what}"), Arc::new(tensor))
    }

    /// A constant under a name like `stem`.
    pub(super) fn named(&mut self, stem: &str, tensor: Arc<Tensor>) -> Result<ValueId, LowerError> {
        let name = self.fresh(stem);
        self.builder.constant(&name, tensor).map_err(bug)
    }

    /// A value under a name like `stem`, of type `ty`.
    pub(super) fn typed(&mut self, stem: &str, ty: Type) -> ValueId {
        let name = self.fresh(stem);
        let id = self.builder.value(&name);
        self.builder.set_type(id, ty);
        id
    }

    pub(super) fn call(
        &mut self,
        (domain, op): (&str, &str),
        name: &str,
        inputs: Vec<Option<ValueId>>,
        outputs: &[ValueId],
        attrs: Attrs,
    ) -> Result<(), LowerError> {
        let opset = if domain == DOMAIN { 1 } else { self.opset };
        self.trt_used |= domain == DOMAIN;
        let op = OpKey { domain: domain.into(), name: op.into(), opset };
        let outputs = outputs.iter().copied().map(Some).collect();
        let node = Node { name: name.into(), op, inputs, outputs, attrs, bodies: Vec::new(), notes: None };
        self.builder.node(node).map_err(bug)?;
        Ok(())
    }
}

fn no_scales(name: &Name) -> LowerError {
    let problem =
        "the scales of its blocks are no codes of the format times one factor: quantize it for --target tensorrt";
    LowerError { place: format!("tensor `{name}`"), problem: problem.into() }
}

pub(super) fn block_attrs(axis: usize, size: usize) -> Attrs {
    let int = |n: usize| Attr::Int(i64::try_from(n).unwrap_or(i64::MAX));
    [("axis".into(), int(axis)), ("block_size".into(), int(size))].into_iter().collect()
}
