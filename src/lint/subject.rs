//! A model as rules look at it: as it stands in the file, with its quantizers read.

use std::collections::BTreeMap;

use passes::id::{NodeId, ValueId};
use passes::ir::walk::{User, Users};
use passes::ir::{Graph, Node};
use passes::model::Model;
use passes::tensor::{DType, Tensor};

/// A `QuantizeLinear` or `DequantizeLinear`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantizer<'a> {
    pub(super) node: &'a Node,
    /// Whether it returns codes.
    pub(super) quantizes: bool,
    /// Where it is a constant.
    pub(super) scale: Option<&'a Tensor>,
    /// Where it is a constant.
    pub(super) zero: Option<&'a Tensor>,
    /// The type of codes.
    pub(super) storage: Option<DType>,
    /// The codes, where they are constant.
    pub(super) codes: Option<&'a Tensor>,
}

impl Quantizer<'_> {
    /// The codes that stand for 0, as numbers.
    pub(super) fn zeros(&self) -> Vec<i64> {
        self.zero.and_then(whole).unwrap_or_default()
    }

    pub(super) fn scales(&self) -> Vec<f32> {
        self.scale.and_then(|scale| Some(scale.floats()?.into_owned())).unwrap_or_default()
    }

    pub(super) fn block(&self) -> i64 {
        self.node.int("block_size", 0)
    }

    /// Whether all elements share its scale.
    pub(super) fn per_tensor(&self) -> bool {
        self.scale.is_none_or(|scale| scale.len() == 1)
    }

    /// The lowest code of its type.
    pub(super) fn lowest(&self) -> i64 {
        match self.storage {
            Some(DType::I8) => -128,
            Some(DType::I16) => -32768,
            Some(DType::I4) => -8,
            _ => 0,
        }
    }

    pub(super) fn is_float8(&self) -> bool {
        self.storage.is_some_and(is_small_float)
    }
}

fn is_small_float(dtype: DType) -> bool {
    use DType::{F4E2M1, F8E4M3Fn, F8E4M3FnUz, F8E5M2, F8E5M2FnUz};
    matches!(dtype, F8E4M3Fn | F8E4M3FnUz | F8E5M2 | F8E5M2FnUz | F4E2M1)
}

/// Whole numbers of any width.
fn whole(tensor: &Tensor) -> Option<Vec<i64>> {
    if let Some(values) = tensor.integers() {
        return Some(values);
    }
    let bits = tensor.dtype().bits();
    let signed = matches!(tensor.dtype(), DType::I4 | DType::I2 | DType::I8);
    let value = |code: u32| {
        let code = i64::from(code);
        if signed && code >= 1 << (bits - 1) { code - (1 << bits) } else { code }
    };
    let float = is_small_float(tensor.dtype());
    (bits <= 16).then(|| {
        let codes = passes::encoding::unpack(tensor);
        // The sign bit alone is still zero for floats.
        codes
            .into_iter()
            .map(|code| if float { i64::from(code & ((1 << (bits - 1)) - 1)) } else { value(code) })
            .collect()
    })
}

/// See the module.
pub(super) struct Subject<'a> {
    pub(super) graph: &'a Graph,
    pub(super) users: Users,
    /// The ai.onnx version of the file.
    pub(super) opset: u32,
    quantizers: BTreeMap<NodeId, Quantizer<'a>>,
}

impl<'a> Subject<'a> {
    pub(super) fn of(model: &'a Model, opset: u32) -> Self {
        let graph = model.graph();
        let quantizers = graph.nodes().filter_map(|(id, node)| Some((id, read(graph, node)?))).collect();
        Self { graph, users: Users::of(graph), opset, quantizers }
    }

    /// All nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (NodeId, &'a Node)> {
        self.graph.nodes()
    }

    /// Those of ai.onnx that are called one of `names`.
    pub(super) fn called(&self, names: &'static [&'static str]) -> impl Iterator<Item = (NodeId, &'a Node)> {
        self.graph.nodes().filter(move |(_, node)| names.iter().any(|name| node.op.is(name)))
    }

    /// `QuantizeLinear` and `DequantizeLinear` nodes, in graph order.
    pub(super) fn quantizers(&self) -> impl Iterator<Item = &Quantizer<'a>> {
        self.graph.nodes().filter_map(|(id, _)| self.quantizers.get(&id))
    }

    /// Whether the scale or the zero point of `q` is no constant.
    pub(super) fn is_computed(&self, q: &Quantizer<'_>) -> bool {
        [1, 2].into_iter().any(|input| q.node.input(input).is_some_and(|value| self.graph.constant(value).is_none()))
    }

    /// The node that computes `input` of `node`.
    pub(super) fn producer(&self, node: &Node, input: usize) -> Option<(NodeId, &'a Node)> {
        self.graph.producer(node.input(input)?)
    }

    /// The `DequantizeLinear` that `node` reads at `input`.
    pub(super) fn dequantizer(&self, node: &Node, input: usize) -> Option<&Quantizer<'a>> {
        let (id, _) = self.producer(node, input)?;
        self.quantizers.get(&id).filter(|q| !q.quantizes)
    }

    /// The same, where its codes are constant.
    pub(super) fn weight(&self, node: &Node, input: usize) -> Option<&Quantizer<'a>> {
        self.dequantizer(node, input).filter(|q| q.codes.is_some())
    }

    /// The same, where its codes are computed.
    pub(super) fn activation(&self, node: &Node, input: usize) -> Option<&Quantizer<'a>> {
        self.dequantizer(node, input).filter(|q| q.codes.is_none())
    }

    /// The constant at `input`.
    pub(super) fn constant(&self, node: &Node, input: usize) -> Option<&'a Tensor> {
        self.graph.constant_input(node, input).map(AsRef::as_ref)
    }

    /// Everyone who reads the first result of `node`.
    pub(super) fn readers(&self, node: &Node) -> Vec<&'a Node> {
        let readers = node.output(0).map_or(&[][..], |value| self.users.of_value(value));
        let reader = |user: &User| match user {
            User::Input { node, .. } => self.graph.node(*node),
            _ => None,
        };
        readers.iter().filter_map(reader).collect()
    }

    /// Whether the graph returns the first result of `node`.
    pub(super) fn is_output(&self, node: &Node) -> bool {
        node.output(0).is_some_and(|value| self.graph.outputs().contains(&value))
    }

    /// The `QuantizeLinear` nodes behind `node`.
    pub(super) fn quantized_by(&self, node: &Node) -> Vec<&Quantizer<'a>> {
        let readers = node.output(0).map_or(&[][..], |value| self.users.of_value(value));
        let quantizer = |user: &User| match user {
            User::Input { node, input: 0 } => self.quantizers.get(node).filter(|q| q.quantizes),
            _ => None,
        };
        readers.iter().filter_map(quantizer).collect()
    }

    /// What `value` is called.
    pub(super) fn name(&self, value: ValueId) -> String {
        self.graph.value(value).name.escape_debug().to_string()
    }
}

fn read<'a>(graph: &'a Graph, node: &'a Node) -> Option<Quantizer<'a>> {
    let quantizes = node.op.is("QuantizeLinear");
    if !quantizes && !node.op.is("DequantizeLinear") {
        return None;
    }
    let constant = |input: usize| graph.constant_input(node, input).map(AsRef::as_ref);
    let (zero, codes) = (constant(2), constant(0).filter(|_| !quantizes));
    let asked = DType::from_code(node.int("output_dtype", 0)).filter(|_| quantizes);
    let typed = || graph.value(node.input(0)?).ty.dtype();
    let storage = zero.map(Tensor::dtype).or(asked);
    let storage = storage.or(if quantizes { Some(DType::U8) } else { codes.map(Tensor::dtype).or_else(typed) });
    Some(Quantizer { node, quantizes, scale: constant(1), zero, storage, codes })
}
