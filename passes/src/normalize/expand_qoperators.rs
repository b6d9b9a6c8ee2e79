//! Operators on codes as float operators between quantize and dequantize nodes.

use std::sync::Arc;

use crate::id::{Name, NodeId, ValueId};
use crate::ir::{Attr, Attrs, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Model, Patch};
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns `QLinearConv`, `QLinearMatMul` and their like into float operators between dequantize and quantize nodes.
    ///
    /// What such an operator computes is, by its definition, the quantized result of the float operator on dequantized inputs. ONNX
    /// Runtime's `QGemm`, `QLinearAdd`, `QLinearMul`, `QLinearConcat`, `QLinearSigmoid`, `QLinearLeakyRelu`, `QLinearAveragePool` and
    /// `QLinearGlobalAveragePool` are read as well. Data movement and `MaxPool` on codes move in front of the quantize node that made
    /// them: elements are the same either way. `Trunc` of QONNX
    /// becomes the arithmetic that it stands for. Parameters must be constants; a node that cannot be read stays as it is.
    INFO {
        name: "expand-qoperators",
        source: "ONNX operator specification, QLinearConv-10 and QLinearMatMul-21; ONNX Runtime's contrib operators",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(ExpandQOperators)) };

/// See [`INFO`].
#[derive(Debug)]
struct ExpandQOperators;

impl Pass for ExpandQOperators {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let graph = model.graph();
        let mut cut = super::expand_trunc::Cut::new();
        for (id, node) in graph.nodes() {
            let mark = patch.mark();
            let mut expansion =
                Expansion { graph, opset: model.meta.opset(), id, node, cut: &mut cut, patch: &mut patch };
            if expansion.expand().or_else(|| expansion.move_in_front()).is_some() {
                patch.count("expanded", 1);
            } else {
                patch.roll_back(&mark);
            }
        }
        Ok(patch)
    }
}

/// A node that is being written anew.
struct Expansion<'a> {
    graph: &'a Graph,
    opset: u32,
    id: NodeId,
    node: &'a Node,
    /// Means that were found to be cut off.
    cut: &'a mut super::expand_trunc::Cut,
    patch: &'a mut Patch,
}

impl Expansion<'_> {
    /// The node as a float operator.
    fn expand(&mut self) -> Option<()> {
        let node = self.node;
        if super::absorb_qonnx::DOMAINS.contains(&&*node.op.domain) && &*node.op.name == "Trunc" {
            return super::expand_trunc::expand(self.graph, self.opset, (self.id, node), self.cut, self.patch);
        }
        let contrib = &*node.op.domain == "com.microsoft";
        if !contrib && !node.op.domain.is_empty() {
            return None;
        }
        match (&*node.op.name, contrib) {
            ("QuantizeLinear" | "DequantizeLinear", true) => {
                let op = OpKey { domain: "".into(), name: Arc::clone(&node.op.name), opset: self.opset };
                self.patch.replace(self.id, Node { op, ..node.clone() });
                Some(())
            }
            ("QLinearConv", false) => {
                let weight_axis = Some(0);
                let mut inputs = vec![Some(self.float(0, None)?), Some(self.float(3, weight_axis)?)];
                self.push_bias(&mut inputs, 8)?;
                self.finish("Conv", inputs, node.attrs.clone(), 6)
            }
            ("QLinearMatMul", _) => {
                let rank = self.graph.value(node.input(3)?).ty.rank()?;
                let inputs = vec![Some(self.float(0, None)?), Some(self.float(3, rank.checked_sub(1))?)];
                self.finish("MatMul", inputs, Attrs::new(), 6)
            }
            ("QGemm", true) => {
                let transposed = node.int("transB", 0) != 0;
                let weight_axis = Some(usize::from(!transposed));
                let mut inputs = vec![Some(self.float(0, None)?), Some(self.float(3, weight_axis)?)];
                self.push_bias(&mut inputs, 6)?;
                node.input(7).and_then(|_| self.finish("Gemm", inputs, node.attrs.clone(), 7))
            }
            ("QLinearAdd" | "QLinearMul", true) => {
                let inputs = vec![Some(self.float(0, None)?), Some(self.float(3, None)?)];
                self.finish(&node.op.name["QLinear".len()..], inputs, Attrs::new(), 6)
            }
            ("QLinearSigmoid" | "QLinearLeakyRelu" | "QLinearAveragePool" | "QLinearGlobalAveragePool", true) => {
                (node.int("channels_last", 0) == 0).then_some(())?;
                let mut attrs = node.attrs.clone();
                attrs.remove("channels_last");
                let inputs = vec![Some(self.float(0, None)?)];
                self.finish(&node.op.name["QLinear".len()..], inputs, attrs, 3)
            }
            ("QLinearConcat", true) => {
                let groups = node.inputs.len().checked_sub(2).filter(|n| n.is_multiple_of(3))? / 3;
                let inputs = (0..groups).map(|at| Some(Some(self.float(2 + 3 * at, None)?))).collect::<Option<_>>()?;
                self.finish("Concat", inputs, node.attrs.clone(), 0)
            }
            _ => None,
        }
    }

    /// A movement of codes that a quantize node made, in front of that node.
    fn move_in_front(&mut self) -> Option<()> {
        let node = self.node;
        let moves = node.op.is("MaxPool") || ops::only_moves(self.graph, node);
        let plain = node.outputs.iter().flatten().count() == 1;
        (moves && plain).then_some(())?;
        let (made, quantize) = self.graph.producer(node.input(0)?)?;
        (quantize.op.is("QuantizeLinear") && !self.patch.touches(made)).then_some(())?;
        // The largest code is that of the largest value only for positive scales.
        let scale = self.graph.constant_input(quantize, 1).and_then(|scale| scale.floats());
        let per_tensor = scale.is_some_and(|scale| scale.len() == 1 && scale[0] > 0.0);
        per_tensor.then_some(())?;
        let mut inputs = node.inputs.clone();
        inputs[0] = quantize.input(0);
        let moved = self.made(node.op.clone(), inputs, node.attrs.clone(), &format!("{}.moved", node.name))?;
        let again = Node {
            inputs: [&[Some(moved)], &quantize.inputs[1..]].concat(),
            outputs: node.outputs.clone(),
            name: quantizer_name(node),
            ..quantize.clone()
        };
        self.patch.replace(self.id, again);
        Some(())
    }

    /// What the codes at `input` stand for, with the scale and zero point that follow them; several scales run along `axis`.
    fn float(&mut self, input: usize, axis: Option<usize>) -> Option<ValueId> {
        let scale = self.graph.constant_input(self.node, input + 1)?;
        let inputs = vec![self.node.input(input), self.node.input(input + 1), self.node.input(input + 2)];
        let mut attrs = Attrs::new();
        if scale.len() > 1 {
            attrs.insert("axis".into(), Attr::Int(i64::try_from(axis?).ok()?));
        }
        self.dequantized(inputs, attrs, input)
    }

    /// Adds the bias at `input`, where there is one: 32-bit codes at the product of the scales of both operands.
    fn push_bias(&mut self, inputs: &mut Vec<Option<ValueId>>, input: usize) -> Option<()> {
        let Some(codes) = self.node.input(input) else { return Some(()) };
        let scales = self.graph.constant_input(self.node, 4)?.floats()?.into_owned();
        let x = *self.graph.constant_input(self.node, 1)?.floats()?.first()?;
        // What QGemm adds to is multiplied by alpha already.
        let alpha = self.node.float("alpha", 1.0);
        let products: Vec<f32> = scales.iter().map(|w| alpha * (x * w)).collect();
        let shape = if products.len() == 1 { Vec::new() } else { vec![products.len()] };
        let attrs = if products.len() == 1 { Attrs::new() } else { [("axis".into(), Attr::Int(0))].into() };
        let scale = self.patch.constant(&format!("{}.bias_scale", self.node.name), Tensor::of(shape, products));
        inputs.push(Some(self.dequantized(vec![Some(codes), Some(scale)], attrs, input)?));
        Some(())
    }

    fn dequantized(&mut self, inputs: Vec<Option<ValueId>>, attrs: Attrs, of: usize) -> Option<ValueId> {
        let shape = self.graph.value(self.node.input(of)?).ty.tensor().and_then(|ty| ty.shape.clone());
        let op = OpKey { domain: "".into(), name: "DequantizeLinear".into(), opset: self.opset };
        let name = format!("{}.input_{of}", self.node.name);
        let node = Node { name: name.as_str().into(), op, inputs, attrs, ..bare(self.node) };
        Some(self.patch.node(node, &name, Type::Tensor(TensorType::new(Some(DType::F32), shape)), Some(self.id)))
    }

    /// The result of a new float node, of the shape of what the old one returned.
    fn made(&mut self, op: OpKey, inputs: Vec<Option<ValueId>>, attrs: Attrs, name: &str) -> Option<ValueId> {
        let shape = self.graph.value(self.node.output(0)?).ty.tensor().and_then(|ty| ty.shape.clone());
        // The node keeps its name; the quantizer behind it gets another.
        let node = Node { name: Arc::clone(&self.node.name), op, inputs, attrs, ..bare(self.node) };
        Some(self.patch.node(node, name, Type::Tensor(TensorType::new(Some(DType::F32), shape)), Some(self.id)))
    }

    /// Puts the float operator `op` and a quantize node, whose scale is the input `scale`, where the node stood.
    fn finish(&mut self, op: &str, inputs: Vec<Option<ValueId>>, attrs: Attrs, scale: usize) -> Option<()> {
        let key = |name: &str| OpKey { domain: "".into(), name: name.into(), opset: self.opset };
        let (float, quantize) = (key(op), key("QuantizeLinear"));
        let result = self.made(float, inputs, attrs, &format!("{}.float", self.node.name))?;
        let inputs = vec![Some(result), self.node.input(scale), self.node.input(scale + 1)];
        let node =
            Node { op: quantize, inputs, attrs: Attrs::new(), name: quantizer_name(self.node), ..self.node.clone() };
        self.patch.replace(self.id, node);
        Some(())
    }
}

fn quantizer_name(node: &Node) -> Name {
    format!("{}.quantize", node.name).into()
}

/// A node with the notes of `node` and nothing else of it.
fn bare(node: &Node) -> Node {
    Node { inputs: Vec::new(), outputs: Vec::new(), attrs: Attrs::new(), bodies: Vec::new(), ..node.clone() }
}
