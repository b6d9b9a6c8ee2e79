//! Caches as codes: see [`crate::caches`].
//!
//! The input of bytes keeps the name of the float one, with `.scale` and `.zero_point` beside it, and so do the outputs. Two codes of 4
//! bits share a byte: those of the first half of a row are the low ones.

use std::sync::Arc;

use super::blocks::block_attrs;
use super::qdq::{Lowering, bug};
use super::rows::Row;
use crate::caches::Cache;
use crate::encoding::Encoding;
use crate::id::ValueId;
use crate::ir::{Attr, Attrs, Dim, TensorType, Type};
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

/// The ends of a cache that is written as codes.
#[derive(Clone, Debug)]
pub(super) struct Carried {
    pub(super) cache: Cache,
    pub(super) encoding: Encoding,
    /// The inputs: bytes, scales, zero points.
    past: [ValueId; 3],
}

/// What is behind the names of scales and zero points.
const PARTS: [&str; 3] = ["", ".scale", ".zero_point"];

/// Whether two codes share a byte.
fn is_packed(encoding: &Encoding) -> bool {
    encoding.grid.info().bits == 4
}

impl Lowering<'_> {
    /// The inputs of a cache, and what reads them as floats.
    pub(super) fn cache_input(&mut self, cache: Cache, encoding: Encoding) -> Result<(), LowerError> {
        let name = Arc::clone(&self.graph.value(cache.past).name);
        if !self.dialect.rows {
            let problem = "the target has no nodes for rows that bring scales of their own: take another --target, or leave the cache in float";
            return Err(LowerError { place: format!("cache `{name}`"), problem: problem.into() });
        }
        let mut past = [ValueId(0); 3];
        for ((part, at), ty) in PARTS.into_iter().zip(&mut past).zip(self.types(&cache, &encoding, cache.past)) {
            let name = if part.is_empty() { name.to_string() } else { self.fresh(&format!("{name}{part}")) };
            *at = self.builder.input(&name, ty).map_err(bug)?;
        }
        let [bytes, scale, zero_point] = past;
        let codes = if is_packed(&encoding) { self.unpacked(&name, &cache, bytes)? } else { bytes };
        let float = self.graph.value(cache.past).ty.clone();
        let result = self.typed(&format!("{name}.dequantized"), float);
        let inputs = vec![Some(codes), Some(scale), Some(zero_point)];
        let attrs = block_attrs(cache.row.0, cache.row.1);
        self.call(("", "DequantizeLinear"), &format!("{name}.dequantize"), inputs, &[result], attrs)?;
        self.raw.insert(cache.past, result);
        self.pairs.entry(cache.past).or_default().push((encoding.clone(), result));
        self.caches.insert(cache.present, Carried { cache, encoding, past });
        Ok(())
    }

    /// The outputs of a cache: what came in, and what this run adds.
    pub(super) fn cache_output(&mut self, carried: &Carried) -> Result<(), LowerError> {
        let Carried { cache, encoding, past } = carried;
        let name = Arc::clone(&self.graph.value(cache.present).name);
        let new: Arc<str> = format!("{name}.new").into();
        let tensor = self.graph.value(cache.new).ty.tensor().cloned().unwrap_or_default();
        let source = self.raw[&cache.new];
        let row = Row::of(&new, source, cache.row.0, encoding, &tensor);
        let (codes, scale, zero_point) = self.row_codes(&row, cache.row.1, &tensor)?;
        let zero_point = zero_point.ok_or_else(|| LowerError {
            place: format!("cache `{name}`"),
            problem: "a bug in onnx-quant: a cache of integers without zero points".into(),
        })?;
        let bytes = if is_packed(encoding) { self.packed_rows(&new, (cache, encoding), codes)? } else { codes };
        let types = self.types(cache, encoding, cache.present);
        for (((part, old), added), ty) in PARTS.into_iter().zip(past).zip([bytes, scale, zero_point]).zip(types) {
            let result = if part.is_empty() { name.to_string() } else { self.fresh(&format!("{name}{part}")) };
            let both = self.builder.value(&result);
            self.builder.set_type(both, ty);
            let axis = Attr::Int(i64::try_from(cache.axis).unwrap_or(i64::MAX));
            let attrs: Attrs = [("axis".into(), axis)].into_iter().collect();
            self.call(("", "Concat"), &format!("{result}.append"), vec![Some(*old), Some(added)], &[both], attrs)?;
            self.builder.output(&result);
        }
        Ok(())
    }

    /// The types of bytes, scales and zero points for the float tensor `like`.
    fn types(&self, cache: &Cache, encoding: &Encoding, like: ValueId) -> [Type; 3] {
        let shape = self.graph.value(like).ty.tensor().and_then(|ty| ty.shape.clone());
        let of = |dtype: DType, extent: usize| {
            let narrowed = |(at, dim): (usize, &Dim)| if at == cache.row.0 { Dim::Known(extent) } else { dim.clone() };
            let shape = shape.as_ref().map(|dims| dims.iter().enumerate().map(narrowed).collect());
            Type::Tensor(TensorType::new(Some(dtype), shape))
        };
        let bytes = if is_packed(encoding) { cache.row.1 / 2 } else { cache.row.1 };
        [of(DType::U8, bytes), of(DType::F32, 1), of(DType::U8, 1)]
    }

    /// The codes in `bytes`, one by one.
    fn unpacked(&mut self, name: &str, cache: &Cache, bytes: ValueId) -> Result<ValueId, LowerError> {
        let half = self.builder.get(bytes).ty.clone();
        let mask = self.byte(name, "mask", 15)?;
        let low = self.step_of_bytes("BitwiseAnd", &format!("{name}.low"), vec![bytes, mask], &half, Attrs::new())?;
        let by = self.byte(name, "bits", 4)?;
        let high =
            self.step_of_bytes("BitShift", &format!("{name}.high"), vec![bytes, by], &half, direction("RIGHT"))?;
        let float = self.graph.value(cache.past).ty.tensor().cloned().unwrap_or_default();
        let whole = Type::Tensor(TensorType::new(Some(DType::U8), float.shape));
        let axis = Attr::Int(i64::try_from(cache.row.0).unwrap_or(i64::MAX));
        let attrs = [("axis".into(), axis)].into_iter().collect();
        self.step_of_bytes("Concat", &format!("{name}.codes"), vec![low, high], &whole, attrs)
    }

    /// `codes`, two in a byte.
    fn packed_rows(
        &mut self,
        name: &str,
        (cache, encoding): (&Cache, &Encoding),
        codes: ValueId,
    ) -> Result<ValueId, LowerError> {
        let [half, ..] = self.types(cache, encoding, cache.new);
        let (low, high) =
            (self.typed(&format!("{name}.low"), half.clone()), self.typed(&format!("{name}.high"), half.clone()));
        let size = i64::try_from(cache.row.1 / 2).unwrap_or(i64::MAX);
        let sizes = self.named(&format!("{name}.halves"), Arc::new(Tensor::of([2], vec![size, size])))?;
        let axis = Attr::Int(i64::try_from(cache.row.0).unwrap_or(i64::MAX));
        let attrs: Attrs = [("axis".into(), axis)].into_iter().collect();
        self.call(("", "Split"), &format!("{name}.split"), vec![Some(codes), Some(sizes)], &[low, high], attrs)?;
        let by = self.byte(name, "bits", 4)?;
        let high =
            self.step_of_bytes("BitShift", &format!("{name}.shifted"), vec![high, by], &half, direction("LEFT"))?;
        self.step_of_bytes("BitwiseOr", &format!("{name}.bytes"), vec![low, high], &half, Attrs::new())
    }

    fn byte(&mut self, name: &str, what: &str, byte: u8) -> Result<ValueId, LowerError> {
        self.named(&format!("{name}.{what}"), Arc::new(Tensor::scalar(byte)))
    }

    fn step_of_bytes(
        &mut self,
        op: &str,
        name: &str,
        inputs: Vec<ValueId>,
        ty: &Type,
        attrs: Attrs,
    ) -> Result<ValueId, LowerError> {
        let result = self.typed(name, ty.clone());
        self.call(("", op), name, inputs.into_iter().map(Some).collect(), &[result], attrs)?;
        Ok(result)
    }
}

/// Which way bits are shifted.
fn direction(way: &str) -> Attrs {
    [("direction".into(), Attr::String(way.as_bytes().to_vec().into()))].into_iter().collect()
}
