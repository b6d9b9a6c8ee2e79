//! A plan as `QuantizeLinear` and `DequantizeLinear` nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::dynamic::{IntegerWeights, Quantized};
use super::tables::Tables;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::{Encoding, Granularity};
use crate::grid::Grid;
use crate::id::{Name, NodeId, Site, ValueId};
use crate::ir::{Attr, Attrs, BuildError, Builder, Def, Graph, Node, OpKey, TensorType, Type, batch, walk};
use crate::model::{Model, Plan};
use crate::nbits;
use crate::target::{LowerError, Lowered};
use crate::tensor::{DType, Tensor};

/// What encodings become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent properties of a dialect")]
pub struct Dialect {
    /// `Quant` and `FloatQuant` instead of `QuantizeLinear` and `DequantizeLinear`.
    pub qonnx: bool,
    /// `com.microsoft::MatMulNBits` for matrix products of float activations with a weight of integers in blocks: it computes in float
    /// where ONNX Runtime's own fusion rounds activations to 8 bits, and has room for 2 bits. Tables of integers in blocks are read by
    /// `com.microsoft::GatherBlockQuantized`.
    pub nbits: bool,
    /// Open leading extents are written as 1, for consumers that compile for fixed shapes.
    pub one_sample: bool,
    /// 32-bit biases are written as the float numbers that they stand for.
    pub float_biases: bool,
}

impl Dialect {
    /// Quantize and dequantize nodes.
    pub const QDQ: Self = Self { qonnx: false, nbits: false, one_sample: false, float_biases: false };
    /// The same, with packed products.
    pub const QDQ_AND_NBITS: Self = Self { nbits: true, ..Self::QDQ };
    /// The same without those, for one sample.
    pub const QDQ_OF_ONE: Self = Self { one_sample: true, ..Self::QDQ };
    /// The same for any number, with biases in float.
    pub const QDQ_AND_FLOAT_BIASES: Self = Self { float_biases: true, ..Self::QDQ };
    /// QONNX, see [`super::qonnx`].
    pub const QONNX: Self = Self { qonnx: true, one_sample: true, ..Self::QDQ };
}

/// The float graph of `model` with a quantize-dequantize pair for every encoded activation and a dequantized constant for
/// every encoded constant, as `dialect` spells them.
///
/// A tensor encoded at its value is read through its pair by everyone, graph outputs included: the pair's result then
/// carries the output's name. A tensor encoded at some uses has one pair for those that share an encoding. Zero points are
/// explicit, except for 32-bit biases and symmetric blocks. A grid with fewer codes than its type has a `Clip` inside its pairs. A product
/// whose activation has the range of each run is `DynamicQuantizeLinear` and `MatMulInteger`.
///
/// # Errors
/// [`LowerError`] for an encoded constant without codes, a tensor with two different encodings, a name clash, or what the dialect
/// cannot say.
pub fn lower(model: &Model, dialect: Dialect) -> Result<Lowered, LowerError> {
    let graph = model.graph();
    let mut lowering = Lowering {
        graph,
        plan: model.plan(),
        opset: model.meta.opset(),
        nbits: (dialect.nbits).then(|| walk::Users::of(graph)),
        dialect,
        batch: if dialect.one_sample { batch::batch_symbols(graph) } else { BTreeSet::new() },
        packed: false,
        builder: Builder::new(graph.name(), graph.doc()),
        taken: graph.value_ids().map(|id| Arc::clone(&graph.value(id).name)).collect(),
        raw: BTreeMap::new(),
        pairs: BTreeMap::new(),
        constants: BTreeMap::new(),
        dynamic: BTreeMap::new(),
        integers: BTreeMap::new(),
        tables: BTreeMap::new(),
        turned: BTreeMap::new(),
        unwritable: BTreeSet::new(),
        notes: Vec::new(),
    };
    for &input in graph.inputs() {
        let value = graph.value(input);
        let ty = lowering.type_of(&value.ty, true);
        let id = lowering.builder.input(&value.name, ty).map_err(bug)?;
        lowering.raw.insert(input, id);
    }
    lowering.reserve_names();
    for (id, node) in graph.nodes() {
        lowering.node(id, node)?;
    }
    for &output in graph.outputs() {
        lowering.output(output)?;
    }
    let notes = lowering.notes;
    let mut meta = Arc::clone(&model.meta);
    if dialect.qonnx {
        super::qonnx::import(Arc::make_mut(&mut meta));
    }
    if lowering.packed {
        let (domain, version) = nbits::DOMAIN;
        Arc::make_mut(&mut meta).opsets.insert(domain.into(), version);
    }
    Ok(Lowered { graph: lowering.builder.finish().map_err(bug)?, meta, notes })
}

#[expect(clippy::needless_pass_by_value, reason = "it is the function given to map_err")]
pub(super) fn bug(error: BuildError) -> LowerError {
    LowerError { place: "the model".into(), problem: format!("a bug in onnx-quant: {error}") }
}

/// Where a constant's codes come from: equal ones are stored once.
pub(super) type CodesKey = (ValueId, Option<*const Tensor>);

pub(super) struct Lowering<'a> {
    pub(super) graph: &'a Graph,
    pub(super) plan: &'a Plan,
    pub(super) opset: u32,
    /// Who reads what, where weights may be packed into `MatMulNBits`; and whether one was.
    pub(super) nbits: Option<walk::Users>,
    pub(super) dialect: Dialect,
    /// Symbols of extents that are written as 1.
    batch: BTreeSet<Name>,
    pub(super) packed: bool,
    pub(super) builder: Builder,
    /// The names of the float graph.
    taken: BTreeSet<Name>,
    /// Values as they are computed.
    pub(super) raw: BTreeMap<ValueId, ValueId>,
    /// Values behind their pairs, by encoding.
    pairs: BTreeMap<ValueId, Vec<(Encoding, ValueId)>>,
    /// Constants behind their dequantize nodes, by codes and encoding.
    constants: BTreeMap<CodesKey, Vec<(Encoding, ValueId)>>,
    /// Values with the codes, scale and zero point that each run gives them.
    pub(super) dynamic: BTreeMap<ValueId, Quantized>,
    /// Tables in blocks; and their codes as products read them, by the node that transposed them.
    pub(super) tables: Tables,
    pub(super) turned: BTreeMap<NodeId, ValueId>,
    /// The codes and scales of weights that are multiplied as integers.
    pub(super) integers: IntegerWeights,
    /// Formats that were written as float numbers.
    unwritable: BTreeSet<&'static str>,
    notes: Vec<Diagnostic>,
}

/// Whether ONNX operators of opset 21 read codes of `grid`.
pub fn is_native(grid: &dyn Grid) -> bool {
    let info = grid.info();
    let float8 = [DType::F8E4M3Fn, DType::F8E4M3FnUz, DType::F8E5M2, DType::F8E5M2FnUz];
    info.integer || float8.contains(&info.storage)
}

impl Lowering<'_> {
    /// Keeps the names of all original tensors for themselves, whatever is added.
    fn reserve_names(&mut self) {
        for (_, node) in self.graph.nodes() {
            for &output in node.outputs.iter().flatten() {
                let value = self.graph.value(output);
                let hidden =
                    self.plan.encoding(Site::Value(output)).is_some() && self.graph.outputs().contains(&output);
                let name = if hidden { format!("{}.float", value.name) } else { value.name.to_string() };
                let name = if hidden { self.fresh(&name) } else { name };
                let id = self.builder.value(&name);
                let ty = self.type_of(&value.ty, false);
                self.builder.set_type(id, ty);
                self.raw.insert(output, id);
            }
        }
    }

    /// A name that is free here and in the float graph.
    pub(super) fn fresh(&self, stem: &str) -> String {
        let mut name = self.builder.fresh(stem);
        while self.taken.contains(name.as_str()) {
            name.push('_');
            name = self.builder.fresh(&name);
        }
        name
    }

    fn node(&mut self, id: NodeId, node: &Node) -> Result<(), LowerError> {
        if let Some(users) = &self.nbits
            && let Some(packed) = nbits::pack(self.graph, users, self.plan, id, node)
        {
            return self.packed(node, packed);
        }
        if self.reads_table(id, node)? {
            return Ok(());
        }
        if self.is_dynamic(id) {
            return self.dynamic(id, node);
        }
        let mut copy = node.clone();
        for (index, input) in copy.inputs.iter_mut().enumerate() {
            if let Some(value) = *input {
                let site = u16::try_from(index).ok().map(|input| Site::Use { node: id, input });
                *input = Some(self.read(value, site)?);
            }
        }
        let mut captured = BTreeMap::new();
        for value in walk::captures(node) {
            captured.insert(value, self.read(value, None)?);
        }
        for inner in copy.bodies.iter_mut().flat_map(|body| &mut body.graph.values) {
            if let Def::Capture(outer) = &mut inner.def {
                *outer = captured[outer];
            }
        }
        for output in copy.outputs.iter_mut().flatten() {
            *output = self.raw[output];
        }
        if self.dialect.qonnx {
            self.plain_for_qonnx(&mut copy, node)?;
        }
        self.builder.node(copy).map_err(bug)?;
        Ok(())
    }

    fn type_of(&self, ty: &Type, input: bool) -> Type {
        if self.dialect.one_sample { batch::of_one_sample(ty, &self.batch, input) } else { ty.clone() }
    }

    /// A matrix product with its weight in it.
    fn packed(&mut self, node: &Node, packed: nbits::Packed) -> Result<(), LowerError> {
        let activation = node.input(0).map(|value| self.read(value, None)).transpose()?;
        let name = node.input(1).map_or_else(Name::default, |weight| Arc::clone(&self.graph.value(weight).name));
        let mut inputs = vec![activation];
        let parameters =
            [("codes", Some(packed.codes)), ("scale", Some(packed.scales)), ("zero_point", packed.zero_points)];
        for (what, tensor) in parameters.into_iter().filter_map(|(what, tensor)| Some((what, tensor?))) {
            let name = self.fresh(&format!("{name}.{what}"));
            inputs.push(Some(self.builder.constant(&name, Arc::new(tensor)).map_err(bug)?));
        }
        let nbits::Layout { k, n, block, bits } = packed.layout;
        let attr = |(name, value): (&str, usize)| (name.into(), Attr::Int(i64::try_from(value).unwrap_or(i64::MAX)));
        let (domain, version) = nbits::DOMAIN;
        let node = Node {
            op: OpKey { domain: domain.into(), name: nbits::OP.into(), opset: version },
            inputs,
            outputs: node.outputs.iter().map(|output| output.map(|output| self.raw[&output])).collect(),
            attrs: [("K", k), ("N", n), ("bits", bits), ("block_size", block)].map(attr).into_iter().collect(),
            ..node.clone()
        };
        self.builder.node(node).map_err(bug)?;
        self.packed = true;
        Ok(())
    }

    fn output(&mut self, value: ValueId) -> Result<(), LowerError> {
        let read = self.read(value, None)?;
        let name = Arc::clone(&self.builder.get(read).name);
        self.builder.output(&name);
        Ok(())
    }

    /// The value that a reader at `site` (or anyone, for `None`) sees.
    pub(super) fn read(&mut self, value: ValueId, site: Option<Site>) -> Result<ValueId, LowerError> {
        let at_value = Site::Value(value);
        let by_use = site.and_then(|site| Some((site, self.plan.encoding(site)?)));
        let by_value = self.plan.encoding(at_value).map(|encoding| (at_value, encoding));
        if let (Some((_, a)), Some((_, b))) = (by_use, by_value)
            && a != b
        {
            let place = format!("tensor `{}`", self.graph.value(value).name);
            return Err(LowerError {
                place,
                problem: "it has two different encodings: it would be rounded twice".into(),
            });
        }
        if let (None, Some(site)) = (by_use.or(by_value), site)
            && let Some(tensor) = self.plan.substitute(site)
        {
            return self.substitute(value, tensor);
        }
        match (by_use.or(by_value), self.graph.constant(value)) {
            (Some((site, encoding)), Some(_)) => self.encoded_constant(value, site, &encoding.clone()),
            (Some((_, encoding)), None) => self.pair(value, &encoding.clone()),
            (None, Some(tensor)) => self.plain_constant(value, &Arc::clone(tensor)),
            (None, None) => Ok(self.raw[&value]),
        }
    }

    fn plain_constant(&mut self, value: ValueId, tensor: &Arc<Tensor>) -> Result<ValueId, LowerError> {
        if let Some(&id) = self.raw.get(&value) {
            return Ok(id);
        }
        let name = Arc::clone(&self.graph.value(value).name);
        let id = self.builder.constant(&name, Arc::clone(tensor)).map_err(bug)?;
        self.raw.insert(value, id);
        Ok(id)
    }

    /// A float constant in place of that of the graph.
    fn substitute(&mut self, value: ValueId, tensor: &Arc<Tensor>) -> Result<ValueId, LowerError> {
        let name = self.fresh(&format!("{}.corrected", self.graph.value(value).name));
        self.builder.constant(&name, Arc::clone(tensor)).map_err(bug)
    }

    fn encoded_constant(&mut self, value: ValueId, site: Site, encoding: &Encoding) -> Result<ValueId, LowerError> {
        let name = Arc::clone(&self.graph.value(value).name);
        let codes = self.plan.codes(site).ok_or_else(|| LowerError {
            place: format!("tensor `{name}`"),
            problem: "it is encoded but was never rounded: put `round` into the pipeline".into(),
        })?;
        let key = (value, Some(Arc::as_ptr(codes)));
        if let Some((_, id)) = self.constants.get(&key).and_then(|all| all.iter().find(|(e, _)| e == encoding)) {
            return Ok(*id);
        }
        let as_float = self.dialect.float_biases && encoding.grid.info().storage == DType::I32;
        if self.dialect.qonnx || as_float || !is_native(encoding.grid) {
            let codes = Arc::clone(codes);
            if self.dialect.qonnx && !survives(encoding, &codes) {
                let problem = "its codes need more than the 24 bits that a float constant holds: QONNX cannot say them";
                return Err(LowerError { place: format!("tensor `{name}`"), problem: problem.into() });
            }
            let mut result = self.rounded(&name, encoding, &codes)?;
            if self.dialect.qonnx {
                result = self.quant((&name, codes.shape()), result, encoding, None)?;
            }
            self.constants.entry(key).or_default().push((encoding.clone(), result));
            return Ok(result);
        }
        let stem = self.fresh(&format!("{name}.codes"));
        let codes_id = self.builder.constant(&stem, Arc::clone(codes)).map_err(bug)?;
        let shape = codes.shape().to_vec();
        let result = self.dequantize(&name, codes_id, encoding, &shape)?;
        self.constants.entry(key).or_default().push((encoding.clone(), result));
        Ok(result)
    }

    /// The numbers that codes of a format without an ONNX type stand for, as a float constant.
    fn rounded(&mut self, name: &Name, encoding: &Encoding, codes: &Arc<Tensor>) -> Result<ValueId, LowerError> {
        let fail = |problem: String| LowerError { place: format!("tensor `{name}`"), problem };
        let values = encoding.decode(codes).map_err(|e| fail(e.to_string()))?;
        let stem = self.fresh(&format!("{name}.rounded"));
        let tensor = Arc::new(Tensor::of(codes.shape(), values));
        if !self.dialect.qonnx && !is_native(encoding.grid) && self.unwritable.insert(encoding.grid.info().about.name) {
            let message = format!(
                "`{}` has no operator in opset {}: its weights are written as the float numbers that their codes stand for",
                encoding.grid.info().about.name,
                self.opset
            );
            self.notes.push(Diagnostic::new(diag::NOT_WRITABLE, Severity::Warning, Place::Model, message));
        }
        self.builder.constant(&stem, tensor).map_err(bug)
    }

    /// The result of the quantize-dequantize pair for an activation, made when it is first asked for.
    fn pair(&mut self, value: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
        if let Some((_, id)) = self.pairs.get(&value).and_then(|all| all.iter().find(|(e, _)| e == encoding)) {
            return Ok(*id);
        }
        let name = Arc::clone(&self.graph.value(value).name);
        if encoding.granularity == Granularity::Dynamic {
            let problem = "its range is chosen by each run, which only products with a constant weight can use".into();
            return Err(LowerError { place: format!("tensor `{name}`"), problem });
        }
        let shape_type = self.type_of(&self.graph.value(value).ty, false).tensor().cloned().unwrap_or_default();
        let returned = self.graph.outputs().contains(&value) && self.plan.encoding(Site::Value(value)).is_some();
        if self.dialect.qonnx {
            if !returned && self.is_moved(value, encoding) {
                return Ok(self.raw[&value]);
            }
            let result_name = returned.then(|| name.to_string());
            let result = self.quant((&name, &[]), self.raw[&value], encoding, result_name)?;
            self.builder.set_type(result, Type::Tensor(shape_type));
            self.pairs.entry(value).or_default().push((encoding.clone(), result));
            return Ok(result);
        }
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
        self.pairs.entry(value).or_default().push((encoding.clone(), result));
        Ok(result)
    }

    /// A clamp of `codes`, the result of a quantize node, to the codes of a grid that has fewer than their type.
    fn clipped(&mut self, name: &Name, codes: ValueId, encoding: &Encoding) -> Result<ValueId, LowerError> {
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

    fn dequantize(
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
            Granularity::Tensor | Granularity::Dynamic => {}
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

/// Whether `codes` come back from the float numbers that they stand for.
fn survives(encoding: &Encoding, codes: &Tensor) -> bool {
    let again = encoding.decode(codes).and_then(|values| encoding.encode(&values, codes.shape()));
    encoding.grid.info().bits <= 16 || again.is_ok_and(|again| again == *codes)
}

/// Whether every code of the type that `grid` is stored in is one of its own.
fn fills_storage(grid: &dyn Grid) -> bool {
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
