//! 16-bit floats: graphs computed in them as graphs computed in f32, and back.
//!
//! Passes, simulation and executors compute in f32. What a file has as f16 is [`widen`]ed as it comes in, and [`narrow`]ed again as it
//! goes out, where that is asked for; inputs and outputs keep their types by a `Cast` each.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::f16;

use crate::encoding::{Encoding, Granularity};
use crate::grid::block;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attr, Attrs, BuildError, Builder, Def, Graph, Node, OpKey, Type, walk};
use crate::model::{Edit, Model};
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::target::{LowerError, Lowered};
use crate::tensor::{DType, Tensor};

/// A scale that 16 bits change by more than this share of it is refused: it is nearly subnormal.
const SCALE_ERROR: f32 = 1.0 / 256.0;

crate::declare_pass! {
    /// Rounds every float constant, and the scale of every encoding, to what 16-bit floats hold, so that `--rest f16` writes exactly
    /// what was planned and simulated.
    ///
    /// What is larger than 65504 becomes that, what is not 0 stays so. 32-bit biases keep f32 scales, the products of those of what they are
    /// added to. What operators without a form in 16 bits read stays as it is, as do the scales of formats that have scales
    /// of their own (nvfp4, mxfp8).
    INFO {
        name: "round-to-half",
        source: "IEEE 754 binary16; TensorRT documentation: the type of a scale is the type that is dequantized to",
        cost: "One walk over the constants.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: UpToRounding,
        options: &[],
    }
}

/// See [`INFO`].
pub const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(RoundToHalf)) };

/// See [`INFO`].
#[derive(Debug)]
struct RoundToHalf;

impl Pass for RoundToHalf {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<crate::model::Patch, PassError> {
        let mut patch = crate::model::Patch::on(model);
        let (graph, plan) = (model.graph(), model.plan());
        let mut encodings: BTreeMap<Site, Encoding> = BTreeMap::new();
        let mine = |encoding: &Encoding| !has_own_scales(encoding) && encoding.grid.info().storage != DType::I32;
        for (site, encoding) in plan.encodings().filter(|(_, encoding)| mine(encoding)) {
            let scale: Arc<[f32]> = encoding.scale.iter().map(|scale| rounded(*scale)).collect();
            let off = |(a, b): (&f32, &f32)| (a - b).abs() > SCALE_ERROR * a.abs();
            if encoding.scale.iter().zip(scale.iter()).any(off) {
                return Err(PassError::Model(format!(
                    "{}: 16-bit floats do not hold its scale: write the rest in f32 (--rest f32), or leave it in float (--keep-float)",
                    place(graph, site)
                )));
            }
            if scale != encoding.scale {
                let encoding = Encoding { scale, ..encoding.clone() };
                patch.edit(Edit::Encode { site, encoding: encoding.clone() });
                if let Some(codes) = plan.codes(site) {
                    patch.edit(Edit::Round { site, codes: Arc::clone(codes) });
                }
                encodings.insert(site, encoding);
                patch.count("scales", 1);
            }
        }
        for (id, _) in graph.nodes() {
            for edit in bias_of(model, id, &encodings).into_iter().flatten() {
                patch.edit(edit);
            }
        }
        for value in graph.value_ids() {
            let constant = graph.constant(value).filter(|tensor| tensor.dtype() == DType::F32);
            let Some(values) = constant.and_then(|tensor| tensor.values::<f32>()) else { continue };
            if values.iter().any(|v| rounded(*v).to_bits() != v.to_bits()) && is_plain(model, value) {
                let tensor =
                    Tensor::of(constant.map_or(&[][..], |t| t.shape()), values.iter().map(|v| rounded(*v)).collect());
                patch.edit(Edit::Freeze { value, tensor: Arc::new(tensor) });
                patch.count("constants", 1);
            }
        }
        for (site, tensor) in plan.substitutes() {
            if let Some(values) = tensor.values::<f32>() {
                let tensor = Tensor::of(tensor.shape(), values.iter().map(|v| rounded(*v)).collect());
                patch.edit(Edit::Substitute { site, tensor: Arc::new(tensor) });
            }
        }
        Ok(patch)
    }
}

/// The bias of `id` in codes of the product of the scales in `encodings`, where it has codes.
fn bias_of(model: &Model, id: NodeId, encodings: &BTreeMap<Site, Encoding>) -> Option<[Edit; 2]> {
    let (graph, plan) = (model.graph(), model.plan());
    let roles = ops::linear(graph, id)?;
    let at = |input: u16| Site::Use { node: id, input };
    let now = |site: Site| encodings.get(&site).or_else(|| plan.encoding(site));
    let site = at(roles.bias?);
    let (old, codes) = plan.encoding(site).zip(plan.codes(site))?;
    let read = graph.node(id)?.input(roles.activation.into())?;
    let input = *now(at(roles.activation)).or_else(|| now(Site::Value(read)))?.scale.first()?;
    let weight = &now(at(roles.weight))?.scale;
    let scale = (0..old.scale.len()).map(|i| input * weight[i.min(weight.len() - 1)]).collect();
    let encoding = Encoding { scale, ..old.clone() };
    let codes = encoding.encode(&old.decode(codes).ok()?, codes.shape()).ok()?;
    (encoding != *old).then(|| [Edit::Encode { site, encoding }, Edit::Round { site, codes: Arc::new(codes) }])
}

fn place(graph: &Graph, site: Site) -> String {
    match site {
        Site::Value(value) => format!("tensor `{}`", graph.value(value).name),
        Site::Use { node, input } => format!("input {input} of node `{}`", graph.node(node).map_or("", |n| &n.name)),
    }
}

/// Whether the scales of `encoding` are written in a format of their own.
fn has_own_scales(encoding: &Encoding) -> bool {
    match encoding.granularity {
        Granularity::Block { size, .. } => block::of(encoding.grid, size).is_some(),
        Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => true,
        Granularity::Tensor | Granularity::Axis(_) => false,
    }
}

/// Whether somebody reads the constant `value` as floats: codes are all that others see of it.
fn is_plain(model: &Model, value: ValueId) -> bool {
    let (graph, plan) = (model.graph(), model.plan());
    let coded = |node: crate::id::NodeId, input: usize| {
        u16::try_from(input).is_ok_and(|input| plan.encoding_of_use(graph, node, input).is_some())
    };
    let (mut plain, mut kept) = (false, false);
    for (id, node) in graph.nodes() {
        for (input, _) in node.inputs.iter().enumerate().filter(|(_, read)| **read == Some(value)) {
            let in_f32 = keeps_input(graph, node, input, DType::F32);
            kept |= in_f32;
            plain |= !in_f32 && !coded(id, input);
        }
    }
    // What is read in f32 as well stays what it is.
    plain && !kept
}

/// `x` as 16 bits hold it, cut at their largest; what is not 0 does not become that.
fn rounded(x: f32) -> f32 {
    let near = if x.is_finite() { f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32() } else { x };
    if near == 0.0 && x != 0.0 { f16::from_bits(1).to_f32().copysign(x) } else { near }
}

/// Whether `node` reads `input` in f32 in a graph that computes in f16.
fn keeps_input(graph: &Graph, node: &Node, input: usize, from: DType) -> bool {
    // The factors of a Resize are f32 whatever it resizes.
    computes_in_f32(graph, node, from) || node.op.is("Resize") && input == 2
}

/// Operators that return f32 unless they are told otherwise.
const WINDOWS: &[&str] = &["HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"];

/// Operators of ai.onnx whose floats have no form in 16 bits.
const ONLY_F32: &[&str] = &[
    "Range",
    "NonMaxSuppression",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "TfIdfVectorizer",
    "StringNormalizer",
    "HannWindow",
    "HammingWindow",
    "BlackmanWindow",
    "MelWeightMatrix",
    "SequenceConstruct",
    "SequenceInsert",
    "SequenceAt",
    "SequenceEmpty",
    "SequenceErase",
    "SplitToSequence",
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
];

/// Whether `node` goes on computing in f32: it has no form in 16 bits that is known here, or its scales would not be what they are.
fn computes_in_f32(graph: &Graph, node: &Node, from: DType) -> bool {
    let foreign = !node.op.domain.is_empty();
    let named = ONLY_F32.iter().any(|name| node.op.is(name));
    foreign || named || holds(node, from) || is_dequantizer_in_f32(graph, node)
}

/// Scales that are computed or codes themselves, and those of 32-bit biases.
fn is_dequantizer_in_f32(graph: &Graph, node: &Node) -> bool {
    let dtype = node.input(0).and_then(|codes| graph.value(codes).ty.dtype());
    let multiples = dtype == Some(DType::F8E4M3Fn) && node.int("block_size", 0) == 0 && node.input(2).is_none();
    let computed = graph.constant_input(node, 1).is_none();
    node.op.is("DequantizeLinear") && (computed || multiples || dtype == Some(DType::I32))
}

/// Whether a graph inside `node` computes in `dtype`.
fn holds(node: &Node, dtype: DType) -> bool {
    let typed = |graph: &Graph| graph.value_ids().any(|id| graph.value(id).ty.dtype() == Some(dtype));
    node.bodies.iter().any(|body| typed(&body.graph) || body.graph.nodes().any(|(_, node)| holds(node, dtype)))
}

/// `model` computed in f32, where it was computed in f16 or bf16. Graphs inside nodes are carried as they are.
///
/// # Errors
/// Names a node with a graph inside whose results are of an unknown type.
pub fn widen(mut model: Model) -> Result<Model, PassError> {
    for from in [DType::F16, DType::Bf16] {
        let is_from = |id: ValueId| model.graph().value(id).ty.dtype() == Some(from);
        if model.graph().value_ids().any(is_from) {
            let graph = Retyping { from, to: DType::F32, graph: model.graph() }.run().map_err(PassError::Model)?;
            let widened = Model::new(graph, model.meta.as_ref().clone());
            model = widened.map_err(|error| PassError::Model(error.to_string()))?;
        }
    }
    Ok(model)
}

/// `lowered` computed in f16 but for its inputs and outputs, and operators that have no such form.
///
/// # Errors
/// [`LowerError`] for a node that has no form in 16 bits, where the type of its result is not known.
pub fn narrow(lowered: Lowered) -> Result<Lowered, LowerError> {
    let graph = Retyping { from: DType::F32, to: DType::F16, graph: &lowered.graph }.run();
    let graph = graph.map_err(|problem| LowerError { place: "--rest f16".into(), problem })?;
    Ok(Lowered { graph, ..lowered })
}

/// A graph in another float type.
struct Retyping<'a> {
    from: DType,
    to: DType,
    graph: &'a Graph,
}

/// The same tensor in both types, as far as they are there.
#[derive(Clone, Copy, Default)]
struct Both {
    new: Option<ValueId>,
    old: Option<ValueId>,
}

struct Rebuilt {
    builder: Builder,
    values: BTreeMap<ValueId, Both>,
    opset: u32,
}

impl Retyping<'_> {
    fn run(&self) -> Result<Graph, String> {
        let graph = self.graph;
        let opset = graph.nodes().map(|(_, n)| n).find(|n| n.op.domain.is_empty()).map_or(21, |n| n.op.opset);
        let builder = Builder::new(graph.name(), graph.doc());
        let mut out = Rebuilt { builder, values: BTreeMap::new(), opset };
        self.build(&mut out).map_err(|error| error.to_string())?;
        out.builder.finish().map_err(|error| error.to_string())
    }

    fn build(&self, out: &mut Rebuilt) -> Result<(), Problem> {
        let graph = self.graph;
        for &input in graph.inputs() {
            let value = graph.value(input);
            let id = out.builder.input(&value.name, value.ty.clone())?;
            let both =
                if self.is_from(input) { Both { new: None, old: Some(id) } } else { Both { new: Some(id), old: None } };
            out.values.insert(input, both);
        }
        // Original tensors keep their names, but for outputs: those are what the last `Cast` returns.
        for (_, node) in graph.nodes() {
            if self.is_idle(node) {
                continue;
            }
            for &output in node.outputs.iter().flatten() {
                let hidden = graph.outputs().contains(&output) && self.is_from(output);
                let name = &graph.value(output).name;
                let name =
                    if hidden { out.builder.fresh(&format!("{name}.{}", self.to.name())) } else { name.to_string() };
                let id = out.builder.value(&name);
                let kept = self.is_kept(node);
                if kept && self.is_unclear(output) {
                    let to = self.to.name();
                    return Err(Problem(format!(
                        "node `{}` ({}) has no form in {to}, and the type of its result `{}` is not known: export the model with types",
                        node.name,
                        node.op.display(),
                        self.graph.value(output).name
                    )));
                }
                let ty = if kept { graph.value(output).ty.clone() } else { self.retyped(&graph.value(output).ty) };
                out.builder.set_type(id, ty);
                let both = if kept && self.is_from(output) {
                    Both { new: None, old: Some(id) }
                } else {
                    Both { new: Some(id), old: None }
                };
                out.values.insert(output, both);
            }
        }
        for (_, node) in graph.nodes() {
            self.node(out, node)?;
        }
        for &output in graph.outputs() {
            let name = Arc::clone(&graph.value(output).name);
            let both = out.values.get(&output).copied().unwrap_or_default();
            if let Some(tensor) = graph.constant(output) {
                if !out.builder.is_defined(&name) {
                    out.builder.constant(&name, Arc::clone(tensor))?;
                }
            } else if self.is_from(output) && !graph.inputs().contains(&output) && !out.builder.is_defined(&name) {
                let id = both.new.or(both.old).ok_or_else(|| Problem(format!("output `{name}` is never computed")))?;
                let result = out.builder.value(&name);
                out.builder.set_type(result, graph.value(output).ty.clone());
                out.cast(id, result, self.from)?;
            }
            out.builder.output(&name);
        }
        Ok(())
    }

    /// Whether `node` is a `Cast` between the two types, which then are one.
    fn is_idle(&self, node: &Node) -> bool {
        let [Some(source), Some(result)] = [node.input(0), node.output(0)] else { return false };
        let ours = |value: ValueId| matches!(self.graph.value(value).ty.dtype(), Some(dtype) if dtype == self.from || dtype == self.to);
        let to = node.int("to", 0);
        let both = [self.from, self.to].iter().any(|dtype| to == i64::from(dtype.code()));
        self.to == DType::F32 && node.op.is("Cast") && both && ours(source) && !self.graph.outputs().contains(&result)
    }

    fn node(&self, out: &mut Rebuilt, node: &Node) -> Result<(), Problem> {
        if let (true, Some(source), Some(result)) = (self.is_idle(node), node.input(0), node.output(0)) {
            let id = self.read(out, source, false)?;
            out.values.insert(result, Both { new: Some(id), old: None });
            return Ok(());
        }
        let mut copy = node.clone();
        let kept = self.is_kept(node);
        for (at, input) in copy.inputs.iter_mut().enumerate() {
            if let Some(value) = *input {
                let old = kept || self.to == DType::F16 && keeps_input(self.graph, node, at, self.from);
                *input = Some(self.read(out, value, old)?);
            }
        }
        let mut captured = BTreeMap::new();
        for value in walk::captures(node) {
            captured.insert(value, self.read(out, value, kept)?);
        }
        for inner in copy.bodies.iter_mut().flat_map(|body| &mut body.graph.values) {
            if let Def::Capture(outer) = &mut inner.def {
                *outer = captured[outer];
            }
        }
        for output in copy.outputs.iter_mut().flatten() {
            let both = out.values.get(output).copied().unwrap_or_default();
            *output = both.new.or(both.old).ok_or_else(|| Problem("a result without a value".into()))?;
        }
        if !kept {
            self.attributes(&mut copy);
        }
        out.builder.node(copy)?;
        Ok(())
    }

    /// Element types that attributes name, and numbers in them.
    fn attributes(&self, node: &mut Node) {
        let code = |dtype: DType| Attr::Int(i64::from(dtype.code()));
        // What is drawn is f32 unless said otherwise.
        if matches!(&*node.op.name, "RandomNormal" | "RandomUniform") && node.op.domain.is_empty() {
            node.attrs.entry("dtype".into()).or_insert_with(|| code(DType::F32));
        }
        for name in ["to", "dtype", "output_dtype"] {
            if let Some(attr) = node.attrs.get_mut(name).filter(|attr| **attr == code(self.from)) {
                *attr = code(self.to);
            }
        }
        if let Some(Attr::Tensor(tensor)) = node.attrs.get_mut("value").filter(|_| node.op.is("ConstantOfShape")) {
            *tensor = self.converted(tensor);
        } else if node.op.is("ConstantOfShape") && self.from == DType::F32 && !node.attrs.contains_key("value") {
            node.attrs.insert("value".into(), Attr::Tensor(self.converted(&Arc::new(Tensor::of([1], vec![0.0_f32])))));
        }
    }

    /// What stands for `value` in the new type, or in the `old` one.
    fn read(&self, out: &mut Rebuilt, value: ValueId, old: bool) -> Result<ValueId, Problem> {
        let both = out.values.get(&value).copied().unwrap_or_default();
        if let Some(id) = if !self.is_from(value) {
            both.new
        } else if old {
            both.old
        } else {
            both.new
        } {
            return Ok(id);
        }
        let name = Arc::clone(&self.graph.value(value).name);
        let (id, other) = if let Some(tensor) = self.graph.constant(value) {
            let taken = both.new.or(both.old).is_some() || self.graph.outputs().contains(&value);
            let name = if taken { out.builder.fresh(&format!("{name}.{}", self.to.name())) } else { name.to_string() };
            let tensor = if old || !self.is_from(value) { Arc::clone(tensor) } else { self.converted(tensor) };
            (out.builder.constant(&name, tensor)?, both)
        } else {
            let source =
                both.old.or(both.new).ok_or_else(|| Problem(format!("tensor `{name}` is read before it is there")))?;
            let dtype = if old { self.from } else { self.to };
            let result = out.builder.value(&out.builder.fresh(&format!("{name}.{}", dtype.name())));
            let ty = self.graph.value(value).ty.clone();
            out.builder.set_type(result, if old { ty } else { self.retyped(&ty) });
            out.cast(source, result, dtype)?;
            (result, both)
        };
        let keeps_old = old && self.is_from(value);
        let now = if keeps_old { Both { old: Some(id), ..other } } else { Both { new: Some(id), ..other } };
        out.values.insert(value, now);
        Ok(id)
    }

    fn is_from(&self, value: ValueId) -> bool {
        self.dtype(value) == Some(self.from)
    }

    /// The element type of `value`, as far as it or its producer says.
    fn dtype(&self, value: ValueId) -> Option<DType> {
        let known = self.graph.value(value).ty.dtype();
        known.or_else(|| {
            let Def::Output { node, index } = self.graph.value(value).def else { return None };
            let node = self.graph.node(node)?;
            let body = node.bodies.first().filter(|_| node.op.is("If"));
            match body {
                Some(body) => body.graph.value(*body.graph.outputs().get(usize::from(index))?).ty.dtype(),
                None => WINDOWS.iter().any(|name| node.op.is(name)).then_some(DType::F32),
            }
        })
    }

    /// Whether nothing is known of a result of `node`, which goes on computing in the old type.
    fn is_unclear(&self, value: ValueId) -> bool {
        matches!(&self.graph.value(value).ty, Type::Tensor(_)) && self.dtype(value).is_none()
    }

    /// Whether `node` goes on computing in the old type.
    fn is_kept(&self, node: &Node) -> bool {
        match self.to {
            DType::F16 => computes_in_f32(self.graph, node, self.from),
            _ => holds(node, self.from),
        }
    }

    fn retyped(&self, ty: &Type) -> Type {
        match ty {
            Type::Tensor(tensor) if tensor.dtype == Some(self.from) => {
                let mut tensor = tensor.clone();
                tensor.dtype = Some(self.to);
                Type::Tensor(tensor)
            }
            ty => ty.clone(),
        }
    }

    fn converted(&self, tensor: &Arc<Tensor>) -> Arc<Tensor> {
        let Some(values) = tensor.floats().filter(|_| tensor.dtype() == self.from) else { return Arc::clone(tensor) };
        if self.to == DType::F32 {
            return Arc::new(Tensor::of(tensor.shape(), values.into_owned()));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(rounded(*v)).to_le_bytes()).collect();
        Tensor::new(DType::F16, tensor.shape().to_vec(), bytes.into()).map_or_else(|_| Arc::clone(tensor), Arc::new)
    }
}

impl Rebuilt {
    /// Adds `result`, which is `source` in another type.
    fn cast(&mut self, source: ValueId, result: ValueId, dtype: DType) -> Result<(), Problem> {
        let name = format!("{}.cast", self.builder.get(result).name);
        let node = Node {
            name: name.as_str().into(),
            op: OpKey { domain: "".into(), name: "Cast".into(), opset: self.opset },
            inputs: vec![Some(source)],
            outputs: vec![Some(result)],
            attrs: Attrs::from([("to".into(), Attr::Int(i64::from(dtype.code())))]),
            bodies: Vec::new(),
            notes: None,
        };
        self.builder.node(node)?;
        Ok(())
    }
}

/// What is wrong, in words.
#[derive(Debug)]
struct Problem(String);

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<BuildError> for Problem {
    fn from(error: BuildError) -> Self {
        Self(error.to_string())
    }
}
