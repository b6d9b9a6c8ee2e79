//! Activations whose rows get their scales from each run: nodes that compute those, and a pair in blocks of a whole row each.
//!
//! Both nodes of a pair take scales that are computed (opset 21, measured in ONNX Runtime 1.22 and 1.31, on the CPU); a zero point is what
//! a quantize node without one makes of the range below zero. Floats of fewer than eight bits are written as the lowest codes of one of eight
//! (see [`grid::carrier`]): in units that are some powers of two larger, so that rows of more than 1e34 overflow there.

use std::sync::Arc;

use super::blocks::block_attrs;
use super::pairs::fills_storage;
use super::qdq::Lowering;
use crate::encoding::{Encoding, Granularity};
use crate::grid::{self, Grid};
use crate::id::{Name, Site, ValueId};
use crate::ir::{Attr, Attrs, Dim, TensorType, Type};
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

/// What is being quantized.
pub(super) struct Row<'a> {
    name: &'a Name,
    /// As it is computed.
    source: ValueId,
    axis: usize,
    encoding: &'a Encoding,
    /// Whose codes are written, and what the numbers of the encoding's grid are multiplied by there.
    grid: &'static dyn Grid,
    factor: f32,
    /// The shape of its scales.
    scales: Option<Vec<Dim>>,
}

impl<'a> Row<'a> {
    /// The rows of `source`, a tensor of type `tensor`, along `axis`; `name` begins the names of what is made.
    pub(super) fn of(
        name: &'a Name,
        source: ValueId,
        axis: usize,
        encoding: &'a Encoding,
        tensor: &TensorType,
    ) -> Self {
        let short = |(at, dim): (usize, &Dim)| if at == axis { Dim::Known(1) } else { dim.clone() };
        let scales = tensor.shape.as_ref().map(|dims| dims.iter().enumerate().map(short).collect());
        let (grid, factor) = grid::carrier(encoding.grid).unwrap_or((encoding.grid, 1.0));
        Self { name, source, axis, encoding, grid, factor, scales }
    }

    /// Whether codes of a wider format are written.
    fn is_carried(&self) -> bool {
        self.grid.info().about.name != self.encoding.grid.info().about.name
    }

    /// The share of a range that is not cut.
    fn reach(&self) -> f32 {
        self.encoding.scale.first().copied().unwrap_or(1.0)
    }
}

impl Lowering<'_> {
    /// The result of quantizing an activation by the ranges that its rows have in each run.
    pub(super) fn row_pair(&mut self, value: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
        let name = Arc::clone(&self.graph.value(value).name);
        let fail = |problem: String| LowerError { place: format!("tensor `{name}`"), problem };
        let Granularity::DynamicRows { axis, size } = encoding.granularity else {
            return Err(fail("a bug in onnx-quant: no encoding of rows".into()));
        };
        let what = encoding.grid.info().about.name;
        let unsigned = !encoding.grid.info().integer || encoding.grid.range().0 >= 0.0;
        let (asked, encoding) = (encoding, &self.loadable(value, encoding));
        let tensor = self.type_of(&self.graph.value(value).ty, false).tensor().cloned().unwrap_or_default();
        let row = Row::of(&name, self.raw[&value], axis, encoding, &tensor);
        let encoded = self.plan.encoding(Site::Value(value)).is_some();
        if !self.dialect.rows || encoded || !super::is_native(row.grid) || !unsigned {
            return Err(fail(format!(
                "no quantize node writes `{what}` by the ranges that each run has: take another --target or format"
            )));
        }
        if row.is_carried() && row.reach() < 1.0 {
            return Err(fail(format!(
                "`{what}` is written in codes of 8 bits, which go on where its own end: leave reach at 1"
            )));
        }
        let (codes, scale, zero_point) = self.row_codes(&row, size, &tensor)?;
        let storage = row.grid.info().storage;
        let result = self.typed(&format!("{name}.dequantized"), Type::Tensor(tensor));
        let inputs: Vec<_> = [Some(codes), Some(scale)].into_iter().chain(zero_point.map(Some)).collect();
        self.call(("", "DequantizeLinear"), &format!("{name}.dequantize"), inputs, &[result], block_attrs(axis, size))?;
        let result = if storage.bits() == 8 { self.apart(&row, size, result)? } else { result };
        self.pairs.entry(value).or_default().push((asked.clone(), result));
        Ok(result)
    }

    /// The codes of rows of `size` elements of a tensor of type `tensor`, with their scales and, for integers, zero points.
    pub(super) fn row_codes(
        &mut self,
        row: &Row<'_>,
        size: usize,
        tensor: &TensorType,
    ) -> Result<(ValueId, ValueId, Option<ValueId>), LowerError> {
        let (name, encoding) = (row.name, row.encoding);
        let (scale, zero_point) = self.row_parameters(row)?;
        let storage = row.grid.info().storage;
        let mut attrs = block_attrs(row.axis, size);
        if zero_point.is_none() {
            attrs.insert("output_dtype".into(), Attr::Int(i64::from(storage.code())));
        }
        let codes = Type::Tensor(TensorType::new(Some(storage), tensor.shape.clone()));
        let codes = self.typed(&format!("{name}.codes"), codes);
        let inputs: Vec<_> = [Some(row.source), Some(scale)].into_iter().chain(zero_point.map(Some)).collect();
        self.call(("", "QuantizeLinear"), &format!("{name}.quantize"), inputs, &[codes], attrs)?;
        let codes = if fills_storage(row.grid) { codes } else { self.clipped(name, codes, encoding)? };
        Ok((codes, scale, zero_point))
    }

    /// `dequantized` behind a `Reshape` that changes nothing: ONNX Runtime (1.22, 1.31) takes a product that reads it and an 8-bit weight for
    /// one of integers with a single scale, and fails.
    fn apart(&mut self, row: &Row<'_>, size: usize, dequantized: ValueId) -> Result<ValueId, LowerError> {
        let shape: Vec<i64> =
            std::iter::repeat_n(0, row.axis).chain([i64::try_from(size).unwrap_or(i64::MAX)]).collect();
        let shape = self.named(&format!("{}.shape", row.name), Arc::new(Tensor::of([shape.len()], shape)))?;
        let ty = self.builder.get(dequantized).ty.clone();
        let name = format!("{}.apart", row.name);
        let result = self.typed(&name, ty);
        self.call(("", "Reshape"), &name, vec![Some(dequantized), Some(shape)], &[result], Attrs::new())?;
        Ok(result)
    }

    /// Scales and, for integers, zero points: in the order that [`Encoding::of_run`] computes them in.
    fn row_parameters(&mut self, row: &Row<'_>) -> Result<(ValueId, Option<ValueId>), LowerError> {
        let (low, high) = row.encoding.grid.range();
        #[expect(clippy::cast_possible_truncation, reason = "bounds of grids of up to 16 bits")]
        let (low, high) = (low as f32, high as f32);
        if !row.encoding.grid.info().integer {
            let sizes = self.step(row, "Abs", "magnitudes", vec![row.source])?;
            let most = self.reduced(row, "ReduceMax", "highest", sizes)?;
            let most = self.reached(row, "most", most)?;
            // The factor is a power of two: nothing is rounded by it.
            return Ok((self.row_scale(row, most, high * row.factor)?, None));
        }
        let zero = self.named(&format!("{}.zero", row.name), Arc::new(Tensor::scalar(0.0_f32)))?;
        let from = self.reduced(row, "ReduceMin", "lowest", row.source)?;
        let from = self.step(row, "Min", "from", vec![from, zero])?;
        let from = self.reached(row, "from", from)?;
        let to = self.reduced(row, "ReduceMax", "highest", row.source)?;
        let to = self.step(row, "Max", "to", vec![to, zero])?;
        let to = self.reached(row, "to", to)?;
        let range = self.step(row, "Sub", "range", vec![to, from])?;
        let scale = self.row_scale(row, range, high - low)?;
        let below = self.step(row, "Neg", "below", vec![from])?;
        let storage = row.encoding.grid.info().storage;
        let zero_point = Type::Tensor(TensorType::new(Some(storage), row.scales.clone()));
        let zero_point = self.typed(&format!("{}.zero_point", row.name), zero_point);
        let mut attrs = block_attrs(row.axis, 1);
        attrs.insert("output_dtype".into(), Attr::Int(i64::from(storage.code())));
        let name = format!("{}.zero_point", row.name);
        self.call(("", "QuantizeLinear"), &name, vec![Some(below), Some(scale)], &[zero_point], attrs)?;
        Ok((scale, Some(zero_point)))
    }

    /// What of the range up to `end` is not cut.
    #[expect(clippy::float_cmp, reason = "1 is 1")]
    fn reached(&mut self, row: &Row<'_>, what: &str, end: ValueId) -> Result<ValueId, LowerError> {
        if row.reach() == 1.0 {
            return Ok(end);
        }
        let share = self.named(&format!("{}.reach", row.name), Arc::new(Tensor::scalar(row.reach())))?;
        self.step(row, "Mul", &format!("{what}.reached"), vec![end, share])
    }

    /// `range` in `levels` steps, which are normal numbers for the encoding's own grid.
    fn row_scale(&mut self, row: &Row<'_>, range: ValueId, levels: f32) -> Result<ValueId, LowerError> {
        let constant = |lowering: &mut Self, what: &str, number: f32| {
            lowering.named(&format!("{}.{what}", row.name), Arc::new(Tensor::scalar(number)))
        };
        let levels = constant(self, "levels", levels)?;
        let step = self.step(row, "Div", "step", vec![range, levels])?;
        let least = constant(self, "least", f32::MIN_POSITIVE / row.factor)?;
        self.step(row, "Max", "scale", vec![step, least])
    }

    /// The smallest or largest one of each row of `of`.
    fn reduced(&mut self, row: &Row<'_>, op: &str, what: &str, of: ValueId) -> Result<ValueId, LowerError> {
        let axis = i64::try_from(row.axis).unwrap_or(i64::MAX);
        let axes = self.named(&format!("{}.{what}.axes", row.name), Arc::new(Tensor::of([1], vec![axis])))?;
        self.step(row, op, what, vec![of, axes])
    }

    /// A node of f32, of the shape of the scales but for magnitudes.
    fn step(&mut self, row: &Row<'_>, op: &str, what: &str, inputs: Vec<ValueId>) -> Result<ValueId, LowerError> {
        let shape = if op == "Abs" {
            self.builder.get(row.source).ty.tensor().and_then(|ty| ty.shape.clone())
        } else {
            row.scales.clone()
        };
        let name = format!("{}.{what}", row.name);
        let result = self.typed(&name, Type::Tensor(TensorType::new(Some(DType::F32), shape)));
        self.call(("", op), &name, inputs.into_iter().map(Some).collect(), &[result], Attrs::new())?;
        Ok(result)
    }
}
