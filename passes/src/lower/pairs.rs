//! Quantize and dequantize nodes for one tensor.

use std::sync::Arc;

use super::qdq::{Lowering, bug};
use crate::encoding::{Encoding, Granularity};
use crate::grid::Grid;
use crate::id::{Name, Site, ValueId};
use crate::ir::{Attr, Attrs, Node, OpKey, TensorType, Type};
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    /// The result of the quantize-dequantize pair for an activation, made when it is first asked for.
    pub(super) fn pair(&mut self, value: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
        if let Some((_, id)) = self.pairs.get(&value).and_then(|all| all.iter().find(|(e, _)| e == encoding)) {
            return Ok(*id);
        }
        let name = Arc::clone(&self.graph.value(value).name);
        if let Granularity::DynamicBlocks { .. } = encoding.granularity {
            return self.block_pair(value, encoding);
        }
        if let Granularity::DynamicRows { .. } = encoding.granularity {
            return self.row_pair(value, encoding);
        }
        if encoding.granularity == Granularity::Dynamic {
            let problem = "its range is chosen by each run, which only products with a constant weight can use".into();
            return Err(LowerError { place: format!("tensor `{name}`"), problem });
        }
        let shape_type = self.type_of(&self.graph.value(value).ty, false).tensor().cloned().unwrap_or_default();
        let returned = self.graph.outputs().contains(&value)
            && self.plan.encoding(Site::Value(value)).is_some()
            && !self.caches.contains_key(&value);
        if self.dialect.qonnx {
            if !returned && self.is_moved(value, encoding) {
                return Ok(self.raw[&value]);
            }
            let result_name = returned.then(|| name.to_string());
            self.note_ties(&name, encoding);
            // Only the number of dimensions plays a part.
            let dims = vec![0; shape_type.shape.as_ref().map_or(0, Vec::len)];
            let result = self.quant((&name, &dims), self.raw[&value], encoding, result_name)?;
            self.builder.set_type(result, Type::Tensor(shape_type));
            self.pairs.entry(value).or_default().push((encoding.clone(), result));
            return Ok(result);
        }
        if !super::is_native(encoding.grid) {
            let grid = encoding.grid.info().about.name;
            let problem = format!("no quantize node of ONNX writes `{grid}`: only --target qonnx says it");
            return Err(LowerError { place: format!("tensor `{name}`"), problem });
        }
        let (asked, encoding) = (encoding.clone(), &self.loadable(value, encoding));
        let storage = encoding.grid.info().storage;
        let codes_name = self.fresh(&format!("{name}.codes"));
        let codes = self.builder.value(&codes_name);
        self.builder.set_type(codes, Type::Tensor(TensorType::new(Some(storage), shape_type.shape.clone())));
        let (scale, zero_point) = self.parameters(&name, encoding, &[])?;
        let inputs = vec![Some(self.raw[&value]), Some(scale), zero_point];
        self.add("QuantizeLinear", &format!("{name}.quantize"), inputs, codes, encoding, &[])?;
        let codes = if fills_storage(encoding.grid) { codes } else { self.clipped(&name, codes, encoding)? };
        let result_name = if returned { name.to_string() } else { self.fresh(&format!("{name}.dequantized")) };
        let result = self.builder.value(&result_name);
        self.builder.set_type(result, Type::Tensor(shape_type));
        let inputs = vec![Some(codes), Some(scale), zero_point];
        self.add("DequantizeLinear", &format!("{name}.dequantize"), inputs, result, encoding, &[])?;
        self.pairs.entry(value).or_default().push((asked, result));
        Ok(result)
    }

    /// `encoding` with its codes in bytes where `value` comes out of a `Clip` and they have 4 bits: ONNX Runtime does not load a
    /// quantize node to a 4-bit type behind one (its `ClipQuantFusion` knows no such zero point; 1.31 tried).
    pub(super) fn loadable(&self, value: ValueId, encoding: &Encoding) -> Encoding {
        let info = encoding.grid.info();
        let clipped = self.graph.producer(value).is_some_and(|(_, node)| node.op.is("Clip"));
        let in_bytes = (clipped && info.integer && info.storage.bits() == 4)
            .then(|| crate::grid::find(&format!("{}-in-8", info.about.name)))
            .flatten();
        Encoding { grid: in_bytes.unwrap_or(encoding.grid), ..encoding.clone() }
    }

    /// A clamp of `codes`, the result of a quantize node, to the codes of a grid that has fewer than their type.
    pub(super) fn clipped(&mut self, name: &Name, codes: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
        let storage = encoding.grid.info().storage;
        let (low, high) = encoding.grid.range();
        let mut inputs = vec![Some(codes)];
        for (what, bound) in [("lowest", low), ("highest", high)] {
            let bytes = encoding.grid.encode(bound).to_le_bytes()[..storage.bits().div_ceil(8) as usize].to_vec();
            let bound = Tensor::new(storage, Vec::new(), bytes.into());
            let bound = bound.map_err(|e| LowerError { place: format!("tensor `{name}`"), problem: e.to_string() })?;
            let name = self.fresh(&format!("{name}.{what}"));
            inputs.push(Some(self.builder.constant(&name, Arc::new(bound)).map_err(bug)?));
        }
        let result = self.builder.value(&self.fresh(&format!("{name}.clipped")));
        let ty = self.builder.get(codes).ty.clone();
        self.builder.set_type(result, ty);
        let node = Node {
            name: format!("{name}.clip").into(),
            op: OpKey { domain: "".into(), name: "Clip".into(), opset: self.opset },
            inputs,
            outputs: vec![Some(result)],
            attrs: Attrs::new(),
            bodies: Vec::new(),
            notes: None,
        };
        self.builder.node(node).map_err(bug)?;
        Ok(result)
    }

    pub(super) fn dequantize(
        &mut self,
        name: &Name,
        codes: ValueId,
        encoding: &Encoding,
        shape: &[usize],
    ) -> Result<ValueId, LowerError> {
        let (scale, zero_point) = self.parameters(name, encoding, shape)?;
        let result_name = self.fresh(&format!("{name}.dequantized"));
        let result = self.builder.value(&result_name);
        self.builder.set_type(result, Type::Tensor(TensorType::known(DType::F32, shape)));
        let mut inputs = vec![Some(codes), Some(scale)];
        inputs.extend(zero_point.map(Some));
        self.add("DequantizeLinear", &format!("{name}.dequantize"), inputs, result, encoding, shape)?;
        Ok(result)
    }

    /// The constants for scale and zero point.
    pub(super) fn parameters(
        &mut self,
        name: &Name,
        encoding: &Encoding,
        shape: &[usize],
    ) -> Result<(ValueId, Option<ValueId>), LowerError> {
        let scale_shape = encoding.scale_shape(shape);
        let scale = Arc::new(Tensor::of(scale_shape.clone(), encoding.scale.to_vec()));
        let scale_name = self.fresh(&format!("{name}.scale"));
        let scale = self.builder.constant(&scale_name, scale).map_err(bug)?;
        let blocked = matches!(encoding.granularity, Granularity::Block { .. });
        if encoding.grid.info().storage == DType::I32 || (blocked && signed(encoding) && encoding.is_symmetric()) {
            return Ok((scale, None));
        }
        let ones = Encoding { scale: vec![1.0; encoding.scale.len()].into(), ..encoding.clone() };
        // Decoding subtracts the zero point, encoding adds it: the code of 0 is the zero point itself.
        let zeros = vec![0.0; encoding.zero_point.len()];
        let flat = Encoding { granularity: group_axis(encoding), ..ones };
        let codes = flat.encode(&zeros, &[zeros.len()]).map(|codes| codes.reshaped(scale_shape).unwrap_or(codes));
        let codes = codes.map_err(|e| LowerError { place: format!("tensor `{name}`"), problem: e.to_string() })?;
        let zero_name = self.fresh(&format!("{name}.zero_point"));
        let zero_point = self.builder.constant(&zero_name, Arc::new(codes)).map_err(bug)?;
        Ok((scale, Some(zero_point)))
    }

    fn add(
        &mut self,
        op: &str,
        name: &str,
        inputs: Vec<Option<ValueId>>,
        output: ValueId,
        encoding: &Encoding,
        shape: &[usize],
    ) -> Result<(), LowerError> {
        let mut attrs = Attrs::new();
        let axis = |axis: usize| Attr::Int(i64::try_from(axis).unwrap_or(i64::MAX));
        match encoding.granularity {
            Granularity::Tensor
            | Granularity::Dynamic
            | Granularity::DynamicBlocks { .. }
            | Granularity::DynamicRows { .. } => {}
            Granularity::Axis(a) => drop(attrs.insert("axis".into(), axis(a))),
            Granularity::Block { axis: a, size } => {
                attrs.insert("axis".into(), axis(a));
                attrs.insert("block_size".into(), axis(size.min(shape.get(a).copied().unwrap_or(size).max(1))));
            }
        }
        let node = Node {
            name: name.into(),
            op: OpKey { domain: "".into(), name: op.into(), opset: self.opset },
            inputs,
            outputs: vec![Some(output)],
            attrs,
            bodies: Vec::new(),
            notes: None,
        };
        self.builder.node(node).map_err(bug)?;
        Ok(())
    }
}

/// Whether every code of the type that `grid` is stored in is one of its own.
pub(super) fn fills_storage(grid: &dyn Grid) -> bool {
    let info = grid.info();
    let (low, high) = grid.range();
    !info.integer || high - low + 1.0 >= f64::from(info.storage.bits()).exp2()
}

/// Whether codes are signed: a missing zero point then means 0.
pub(super) fn signed(encoding: &Encoding) -> bool {
    encoding.grid.range().0 < 0.0
}

/// How a flat list of groups is cut: each its own.
fn group_axis(encoding: &Encoding) -> Granularity {
    match encoding.granularity {
        Granularity::Tensor => Granularity::Tensor,
        _ => Granularity::Axis(0),
    }
}
