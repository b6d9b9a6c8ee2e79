//! A plan as `QuantizeLinear` and `DequantizeLinear` nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::caches::Carried;
use super::dialect::Dialect;
use super::dynamic::{IntegerWeights, Quantized};
use super::tables::Tables;
use crate::caches::{self, Cache};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::Encoding;
use crate::grid::Grid;
use crate::id::{Name, NodeId, Site, ValueId};
use crate::ir::{Attr, BuildError, Builder, Def, Graph, Node, OpKey, Type, batch, walk};
use crate::model::{Model, Plan};
use crate::nbits;
use crate::target::{LowerError, Lowered};
use crate::tensor::{DType, Tensor};

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
    let inputs: BTreeSet<ValueId> = graph.inputs().iter().copied().collect();
    let is_there = |id: &ValueId| match graph.value(*id).def {
        Def::Input => inputs.contains(id),
        Def::Output { node, .. } => graph.node(node).is_some(),
        Def::Const(_) | Def::Capture(_) => true,
    };
    let mut lowering = Lowering {
        graph,
        plan: model.plan(),
        opset: opset_of(model, dialect),
        nbits: (dialect.nbits).then(|| walk::Users::of(graph)),
        dialect,
        batch: if dialect.one_sample { batch::batch_symbols(graph) } else { BTreeSet::new() },
        packed: false,
        trt_used: false,
        builder: Builder::new(graph.name(), graph.doc()),
        taken: graph.value_ids().filter(is_there).map(|id| Arc::clone(&graph.value(id).name)).collect(),
        raw: BTreeMap::new(),
        pairs: BTreeMap::new(),
        constants: BTreeMap::new(),
        dynamic: BTreeMap::new(),
        integers: BTreeMap::new(),
        tables: BTreeMap::new(),
        turned: BTreeMap::new(),
        unwritable: BTreeSet::new(),
        caches: BTreeMap::new(),
        notes: Vec::new(),
    };
    let mut caches: BTreeMap<ValueId, (Cache, Encoding)> =
        caches::encoded(graph, model.plan()).into_iter().map(|carried| (carried.0.past, carried)).collect();
    for &input in graph.inputs() {
        if let Some((cache, encoding)) = caches.remove(&input) {
            lowering.cache_input(cache, encoding)?;
            continue;
        }
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
        match lowering.caches.get(&output).cloned() {
            Some(carried) => lowering.cache_output(&carried)?,
            None => lowering.output(output)?,
        }
    }
    let mut meta = Arc::clone(&model.meta);
    if dialect.qonnx {
        super::qonnx::import(Arc::make_mut(&mut meta));
    }
    let opset = lowering.opset;
    if lowering.trt_used {
        Arc::make_mut(&mut meta).opsets.insert(crate::trt::DOMAIN.into(), 1);
    }
    if opset != meta.opset() {
        Arc::make_mut(&mut meta).opsets.insert("".into(), opset);
    }
    if lowering.packed {
        let (domain, version) = nbits::DOMAIN;
        Arc::make_mut(&mut meta).opsets.insert(domain.into(), version);
    }
    Ok(Lowered { graph: lowering.builder.finish().map_err(bug)?, meta, notes: lowering.notes })
}

/// The ai.onnx version to write: 4-bit floats came with 23, which took nothing away from 21.
fn opset_of(model: &Model, dialect: Dialect) -> u32 {
    let narrow = |encoding: &Encoding| dialect.trt && encoding.grid.info().storage == DType::F4E2M1;
    let least = if model.plan().encodings().any(|(_, encoding)| narrow(encoding)) { 23 } else { 0 };
    model.meta.opset().max(least)
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
    /// Whether an operator of `TensorRT`'s domain was written.
    pub(super) trt_used: bool,
    pub(super) builder: Builder,
    /// The names of the float graph.
    taken: BTreeSet<Name>,
    /// Values as they are computed.
    pub(super) raw: BTreeMap<ValueId, ValueId>,
    /// Values behind their pairs, by encoding.
    pub(super) pairs: BTreeMap<ValueId, Vec<(Encoding, ValueId)>>,
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
    /// Caches in codes, by what the float model returns.
    pub(super) caches: BTreeMap<ValueId, Carried>,
    pub(super) notes: Vec<Diagnostic>,
}

/// Whether ONNX operators of opset 21 read codes of `grid`.
pub fn is_native(grid: &dyn Grid) -> bool {
    let info = grid.info();
    let float8 = [DType::F8E4M3Fn, DType::F8E4M3FnUz, DType::F8E5M2, DType::F8E5M2FnUz];
    info.integer || float8.contains(&info.storage)
}

/// `encoding` as an operator that dequantizes reads its codes: signs are two of the integers of 2 bits. `None` where no operator of
/// opset 21 does.
fn readable(encoding: &Encoding) -> Option<Encoding> {
    let info = encoding.grid.info();
    let grid = match crate::grid::find("int2-in-4") {
        Some(integers) if !info.integer && info.holds_integers() => integers,
        _ => encoding.grid,
    };
    is_native(grid).then(|| Encoding { grid, ..encoding.clone() })
}

impl Lowering<'_> {
    /// Keeps the names of all original tensors for themselves, whatever is added.
    fn reserve_names(&mut self) {
        for (_, node) in self.graph.nodes() {
            for &output in node.outputs.iter().flatten() {
                let value = self.graph.value(output);
                if self.caches.get(&output).is_some_and(|carried| carried.cache.is_apart) {
                    continue;
                }
                let hidden = self.caches.contains_key(&output)
                    || self.plan.encoding(Site::Value(output)).is_some() && self.graph.outputs().contains(&output);
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
        if node.output(0).and_then(|value| self.caches.get(&value)).is_some_and(|carried| carried.cache.is_apart) {
            return Ok(()); // the outputs of the cache are written instead
        }
        if self.reads_table(id, node)? {
            return Ok(());
        }
        if self.is_dynamic(id) {
            return self.dynamic(id, node);
        }
        if self.is_shift_of_pools(id, node) || self.truncates(node)? {
            return Ok(());
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

    pub(super) fn type_of(&self, ty: &Type, input: bool) -> Type {
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
        if let Some(format) = self.block_format(encoding) {
            let result = self.block_constant(value, format, encoding, &Arc::clone(codes))?;
            self.constants.entry(key).or_default().push((encoding.clone(), result));
            return Ok(result);
        }
        let as_float = self.dialect.float_biases && encoding.grid.info().storage == DType::I32;
        let readable = readable(encoding).filter(|_| !self.dialect.qonnx && !as_float);
        let Some(readable) = readable else {
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
        };
        let stem = self.fresh(&format!("{name}.codes"));
        let codes_id = self.builder.constant(&stem, Arc::clone(codes)).map_err(bug)?;
        let shape = codes.shape().to_vec();
        let result = self.dequantize(&name, codes_id, &readable, &shape)?;
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
}

/// Whether `codes` come back from the float numbers that they stand for.
fn survives(encoding: &Encoding, codes: &Tensor) -> bool {
    let again = encoding.decode(codes).and_then(|values| encoding.encode(&values, codes.shape()));
    encoding.grid.info().bits <= 16 || again.is_ok_and(|again| again == *codes)
}
