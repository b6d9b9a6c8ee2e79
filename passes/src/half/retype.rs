//! A graph built anew in another float type.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::f16;

use super::kept::{WINDOWS, computes_in_f32, holds, keeps_input};
use super::rounded;
use crate::id::ValueId;
use crate::ir::{Attr, Attrs, BuildError, Builder, Def, Graph, Node, OpKey, Type, walk};
use crate::tensor::{DType, Tensor};

/// A graph in another float type.
pub(super) struct Retyping<'a> {
    pub(super) from: DType,
    pub(super) to: DType,
    pub(super) graph: &'a Graph,
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
    /// The graph in the new type.
    ///
    /// # Errors
    /// What stands in the way, in words.
    pub(super) fn run(&self) -> Result<Graph, String> {
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
