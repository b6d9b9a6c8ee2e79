//! A plan in the QONNX dialect: `Quant` and `FloatQuant`, which round and stay float.
//!
//! Every encoded constant is stored as the float numbers that its codes stand for. Attributes of convolutions and pools that have defaults
//! are spelled out, a clamp whose upper end the quantizer after it implies becomes a `Relu`, and what is only moved is not rounded again:
//! readers of this dialect want all three.

use std::sync::Arc;

use super::qdq::{Lowering, bug};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::{Encoding, Granularity};
use crate::grid::FloatFormat;
use crate::id::{Name, Site, ValueId};
use crate::ir::{Attr, Attrs, Graph, Node, OpKey, TensorType, Type};
use crate::model::Metadata;
use crate::ops::{self, QONNX_DOMAIN as DOMAIN};
use crate::target::LowerError;
use crate::tensor::{DType, Tensor};

/// Adds the domain to those that the model imports.
pub(super) fn import(meta: &mut Metadata) {
    meta.opsets.insert(DOMAIN.into(), 1);
}

/// The attributes of `node` with those that have defaults written out.
pub(super) fn explicit(graph: &Graph, node: &Node) -> Attrs {
    let mut attrs = node.attrs.clone();
    let spatial = match &*node.op.name {
        "Conv" => graph.constant_input(node, 1).and_then(|weight| Some(weight.shape().get(2..)?.to_vec())),
        "MaxPool" | "AveragePool" => {
            node.ints("kernel_shape").map(|k| k.iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect())
        }
        _ => None,
    };
    let Some(kernel) = spatial.filter(|_| node.op.domain.is_empty()) else { return attrs };
    let mut set = |name: &str, value: Attr| {
        attrs.entry(name.into()).or_insert(value);
    };
    let wide = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    set("kernel_shape", Attr::Ints(kernel.iter().map(|&n| wide(n)).collect()));
    set("strides", Attr::Ints(vec![1; kernel.len()]));
    let pads = match node.text("auto_pad", "NOTSET") {
        "NOTSET" => Some(vec![0; 2 * kernel.len()]),
        how => resolved_pads(graph, node, &kernel, how),
    };
    if let Some(pads) = pads {
        set("pads", Attr::Ints(pads));
        attrs.remove("auto_pad");
    }
    let mut set = |name: &str, value: Attr| {
        attrs.entry(name.into()).or_insert(value);
    };
    if node.op.is("Conv") {
        set("dilations", Attr::Ints(vec![1; kernel.len()]));
        set("group", Attr::Int(1));
    }
    attrs
}

/// The pads that `auto_pad` stands for, where all extents are known.
fn resolved_pads(graph: &Graph, node: &Node, kernel: &[usize], how: &str) -> Option<Vec<i64>> {
    if how == "VALID" {
        return Some(vec![0; 2 * kernel.len()]);
    }
    let dims = graph.value(node.input(0)?).ty.tensor()?.shape.as_ref()?;
    let list = |name: &str, at: usize| node.ints(name).and_then(|l| l.get(at).copied()).unwrap_or(1).max(1);
    let (mut begins, mut ends) = (Vec::new(), Vec::new());
    for (at, &taps) in kernel.iter().enumerate() {
        let extent = i64::try_from(dims.get(at + 2)?.known()?).ok()?;
        let (stride, dilation) = (list("strides", at), list("dilations", at));
        let outputs = extent.checked_add(stride - 1)? / stride;
        let reach = i64::try_from(taps).ok()?.checked_sub(1)?.checked_mul(dilation)?.checked_add(1)?;
        let total = (outputs - 1).checked_mul(stride)?.checked_add(reach)?.checked_sub(extent)?.max(0);
        let begin = if how == "SAME_LOWER" { total - total / 2 } else { total / 2 };
        begins.push(begin);
        ends.push(total - begin);
    }
    Some([begins, ends].concat())
}

impl Lowering<'_> {
    /// Whether `node` clamps from 0 to where the quantizer of its result ends anyway: a `Relu` says the same.
    pub(super) fn is_relu_before_quant(&self, node: &Node) -> bool {
        let bound = |input: usize| self.graph.constant_input(node, input).and_then(|c| c.floats()?.first().copied());
        let end = node.output(0).and_then(|value| self.plan.encoding(Site::Value(value)));
        let (Some(low), Some(high), Some(end)) = (bound(1), bound(2), end) else { return false };
        let (from, to) = end.grid.range();
        let scale = f64::from(end.scale.first().copied().unwrap_or(f32::INFINITY));
        // What the clamp cuts off rounds to the last code either way.
        let implied = end.is_symmetric() && from >= 0.0 && f64::from(high) / scale > to - 0.5;
        node.op.is("Clip") && low == 0.0 && implied
    }

    /// Tells where zero points make ties round otherwise.
    pub(super) fn note_ties(&mut self, name: &Name, encoding: &Encoding) {
        if encoding.zero_point.iter().any(|zero| zero % 2 != 0) {
            let message = "its zero point is odd: values exactly between two codes become the other one in QONNX";
            let place = Place::Value(Arc::clone(name));
            self.notes.push(Diagnostic::new(diag::TIES_DIFFER, Severity::Note, place, message));
        }
    }

    /// The result of a node that rounds `source`, a tensor of `shape` (needed for scales along an axis) called `name`.
    pub(super) fn quant(
        &mut self,
        (name, shape): (&Name, &[usize]),
        source: ValueId,
        encoding: &Encoding,
        result: Option<String>,
    ) -> Result<ValueId, LowerError> {
        let fail = |problem: &str| LowerError { place: format!("tensor `{name}`"), problem: problem.into() };
        let scale_shape = match encoding.granularity {
            Granularity::Tensor => Vec::new(),
            Granularity::Axis(axis) if axis >= shape.len() => {
                return Err(fail("the number of its dimensions is not known"));
            }
            Granularity::Axis(axis) => {
                (0..shape.len()).map(|at| if at == axis { encoding.scale.len() } else { 1 }).collect()
            }
            Granularity::Block { .. } => return Err(fail("scales of blocks cannot be said in QONNX")),
            Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => {
                return Err(fail("a range that each run chooses cannot be said in QONNX"));
            }
        };
        let result = result.unwrap_or_else(|| self.fresh(&format!("{name}.quant")));
        let result = self.builder.value(&result);
        self.builder.set_type(result, Type::Tensor(TensorType::known(DType::F32, shape)));
        let parameter = |lowering: &mut Self, what: &str, shape: &[usize], values: Vec<f32>| {
            let name = lowering.fresh(&format!("{name}.{what}"));
            lowering.builder.constant(&name, Arc::new(Tensor::of(shape, values))).map_err(bug)
        };
        let mut inputs = vec![Some(source), Some(parameter(self, "scale", &scale_shape, encoding.scale.to_vec())?)];
        let mut attrs = Attrs::new();
        let info = encoding.grid.info();
        let signs = info.about.name == "bipolar";
        let op = if signs {
            "BipolarQuant"
        } else if let Some(format) = encoding.grid.float_format() {
            let FloatFormat { exponent, mantissa, bias, infinities, nan } = format;
            #[expect(clippy::cast_possible_truncation, reason = "largest numbers of formats of up to 8 bits")]
            let numbers = [
                ("exponent_bits", exponent as f32),
                ("mantissa_bits", mantissa as f32),
                ("exponent_bias", bias as f32),
                ("largest", encoding.grid.range().1 as f32),
            ];
            for (what, value) in numbers {
                inputs.push(Some(parameter(self, what, &[], vec![value])?));
            }
            for (what, is) in [("has_inf", infinities), ("has_nan", nan), ("has_subnormal", true), ("saturation", true)]
            {
                attrs.insert(what.into(), Attr::Int(i64::from(is)));
            }
            "FloatQuant"
        } else if info.integer {
            let (low, high) = encoding.grid.range();
            let zero = encoding.zero_point.iter().map(|&zero| zero as f32).collect();
            inputs.push(Some(parameter(self, "zero_point", &scale_shape, zero)?));
            inputs.push(Some(parameter(self, "bits", &[], vec![info.bits as f32])?));
            attrs.insert("signed".into(), Attr::Int(i64::from(low < 0.0)));
            attrs.insert("narrow".into(), Attr::Int(i64::from(low < 0.0 && low + high == 0.0)));
            "Quant"
        } else {
            return Err(fail(&format!("`{}` has no operator in QONNX", info.about.name)));
        };
        if !signs {
            attrs.insert("rounding_mode".into(), Attr::String(b"ROUND".as_slice().into()));
        }
        let node = Node {
            name: format!("{name}.quantize").into(),
            op: OpKey { domain: DOMAIN.into(), name: op.into(), opset: 1 },
            inputs,
            outputs: vec![Some(result)],
            attrs,
            bodies: Vec::new(),
            notes: None,
        };
        self.builder.node(node).map_err(bug)?;
        Ok(result)
    }

    /// Whether `value` is only moved out of a tensor of the same `encoding`: rounding it again would change nothing.
    pub(super) fn is_moved(&self, value: ValueId, encoding: &Encoding) -> bool {
        let source = self.graph.producer(value).filter(|(_, node)| ops::only_moves(self.graph, node));
        let source = source.and_then(|(_, node)| node.input(0));
        source.and_then(|source| self.plan.encoding(Site::Value(source))).is_some_and(|before| before == encoding)
    }

    /// `node`, a copy of `original`, as readers of the dialect want it.
    pub(super) fn plain_for_qonnx(&mut self, node: &mut Node, original: &Node) -> Result<(), LowerError> {
        node.attrs = explicit(self.graph, original);
        if self.is_relu_before_quant(original) {
            node.op.name = "Relu".into();
            node.inputs.truncate(1);
            node.attrs = Attrs::new();
        }
        if node.op.is("Gemm") {
            // Whether it is there is asked, not what it says.
            node.attrs.retain(|name, attr| &**name != "transB" || *attr != Attr::Int(0));
            let outputs = original.output(0).and_then(|value| self.graph.value(value).ty.tensor()?.shape.clone());
            let outputs = outputs.and_then(|shape| shape.last()?.known());
            if let (None, Some(outputs)) = (original.input(2), outputs) {
                let name = self.fresh(&format!("{}.bias", original.name));
                let zeros = Arc::new(Tensor::of([outputs], vec![0.0_f32; outputs]));
                node.inputs.resize(2, None);
                node.inputs.push(Some(self.builder.constant(&name, zeros).map_err(bug)?));
            }
        }
        Ok(())
    }
}
