//! Operators: one row each with its shape rule and its algebraic laws. Passes ask laws, not names.

mod conv;
mod elementwise;
mod eval;
mod kept_rows;
mod layout;
mod linear;
mod matmul;
mod numbers;
mod reduce;
mod shape;
pub mod sizes;

pub use eval::{EvalError, MAX_FOLDED_BYTES, evaluate};
pub use kept_rows::{KeptRows, kept_rows};
pub use linear::{Linear, bias_site, linear, only_addition};
pub(crate) use shape::shape_range;

use crate::id::ValueId;
use crate::ir::{Dim, Graph, Node, OpKey, TensorType};
use crate::tensor::{DType, Tensor};

/// The highest rank that a shape rule speaks of: a declared length is no reason to allocate.
const MAX_RANK: usize = 64;

/// The domain of QONNX's operators, in version 1.
pub const QONNX_DOMAIN: &str = "qonnx.custom_op.general";

/// Whether elements of the result of `node` are elements of its first input, and what else it reads is constant.
pub fn only_moves(graph: &Graph, node: &Node) -> bool {
    let rest = node.inputs.iter().skip(1).flatten().all(|value| graph.constant(*value).is_some());
    laws(&node.op).contains(Laws::MOVES) && rest && node.outputs.iter().flatten().count() == 1
}

/// A set of algebraic laws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Laws(u32);

impl Laws {
    /// No law.
    pub const NONE: Self = Self(0);
    /// Every output element depends on the input elements at the same place.
    pub const ELEMENTWISE: Self = Self(1);
    /// Output elements are input elements, moved, repeated or dropped: ranges carry over.
    pub const MOVES: Self = Self(1 << 1);
    /// No output element is negative.
    pub const NON_NEGATIVE: Self = Self(1 << 2);
    /// Every output element lies in [0, 1].
    pub const UNIT_RANGE: Self = Self(1 << 3);
    /// A clamp: `min(max(x, low), high)`; a quantizer whose range lies inside [low, high] makes it redundant.
    pub const CLAMPS: Self = Self(1 << 4);
    /// A sum of products of an activation with a weight; see [`linear`].
    pub const LINEAR: Self = Self(1 << 5);
    /// The result is not a function of the inputs alone: never folded, merged or moved.
    pub const RANDOM: Self = Self(1 << 6);

    /// Both sets together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every law of `other` holds.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a shape rule may look at.
pub(crate) struct Call<'a> {
    /// The graph around, for constants.
    pub(crate) graph: &'a Graph,
    /// The node.
    pub(crate) node: &'a Node,
    /// What is known of its inputs.
    pub(crate) inputs: Vec<Option<TensorType>>,
    /// What is known of any value of the graph.
    pub(crate) types: Types<'a>,
}

/// Looks up what is known of a value.
pub(crate) type Types<'a> = &'a dyn Fn(ValueId) -> Option<TensorType>;

impl Call<'_> {
    pub(crate) fn input(&self, index: usize) -> TensorType {
        self.inputs.get(index).cloned().flatten().unwrap_or_default()
    }

    pub(crate) fn dtype(&self, index: usize) -> Option<DType> {
        self.input(index).dtype
    }

    pub(crate) fn shape(&self, index: usize) -> Option<Vec<Dim>> {
        self.input(index).shape
    }

    pub(crate) fn constant(&self, index: usize) -> Option<&Tensor> {
        self.graph.constant_input(self.node, index).map(AsRef::as_ref)
    }

    pub(crate) fn constant_ints(&self, index: usize) -> Option<Vec<i64>> {
        self.constant(index)?.integers()
    }

    /// Whether the node has an input there at all.
    pub(crate) fn has(&self, index: usize) -> bool {
        self.node.input(index).is_some()
    }
}

/// A shape rule: the types of the outputs, as far as they follow. An empty vector says nothing.
type Infer = fn(&Call<'_>) -> Vec<TensorType>;

/// Everything known about one operator.
pub struct OpSpec {
    /// Empty for ai.onnx.
    pub domain: &'static str,
    /// As in `NodeProto.op_type`.
    pub name: &'static str,
    /// What passes may ask.
    pub laws: Laws,
    infer: Infer,
}

impl std::fmt::Debug for OpSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpSpec({})", self.name)
    }
}

const fn op(name: &'static str, infer: Infer, laws: Laws) -> OpSpec {
    OpSpec { domain: "", name, laws, infer }
}

const EL: Laws = Laws::ELEMENTWISE;
const MV: Laws = Laws::MOVES;
const NO: Laws = Laws::NONE;
const POS: Laws = EL.and(Laws::NON_NEGATIVE);
const UNIT: Laws = POS.and(Laws::UNIT_RANGE);

/// Every operator that has a row, in the order of the manual.
pub static OPS: &[OpSpec] = &[
    // Sums of products.
    op("Conv", conv::conv, Laws::LINEAR),
    op("ConvTranspose", conv::conv_transpose, Laws::LINEAR),
    op("MatMul", matmul::matmul, Laws::LINEAR),
    op("Gemm", matmul::gemm, Laws::LINEAR),
    // Arithmetic with broadcasting.
    op("Add", elementwise::broadcast, EL),
    op("Sub", elementwise::broadcast, EL),
    op("Mul", elementwise::broadcast, EL),
    op("Div", elementwise::broadcast, EL),
    op("Mod", elementwise::broadcast, EL),
    op("Pow", elementwise::broadcast_first, EL),
    op("Min", elementwise::broadcast, EL),
    op("Max", elementwise::broadcast, EL),
    op("Sum", elementwise::broadcast, EL),
    op("Mean", elementwise::broadcast, EL),
    op("PRelu", elementwise::same, EL),
    op("BitShift", elementwise::broadcast, EL),
    op("BitwiseAnd", elementwise::broadcast, EL),
    op("BitwiseOr", elementwise::broadcast, EL),
    op("BitwiseXor", elementwise::broadcast, EL),
    op("Where", elementwise::select, EL),
    op("Equal", elementwise::compare, EL),
    op("Greater", elementwise::compare, EL),
    op("GreaterOrEqual", elementwise::compare, EL),
    op("Less", elementwise::compare, EL),
    op("LessOrEqual", elementwise::compare, EL),
    op("And", elementwise::compare, EL),
    op("Or", elementwise::compare, EL),
    op("Xor", elementwise::compare, EL),
    op("Not", elementwise::predicate, EL),
    op("IsNaN", elementwise::predicate, EL),
    op("IsInf", elementwise::predicate, EL),
    // One input, element by element.
    op("Identity", elementwise::same, EL.and(MV)),
    op("Dropout", elementwise::dropout, EL),
    op("Cast", elementwise::cast, EL),
    op("CastLike", elementwise::cast_like, EL),
    op("Relu", elementwise::same, POS.and(Laws::CLAMPS)),
    op("Clip", elementwise::same, EL.and(Laws::CLAMPS)),
    op("LeakyRelu", elementwise::same, EL),
    op("Elu", elementwise::same, EL),
    op("Selu", elementwise::same, EL),
    op("Celu", elementwise::same, EL),
    op("Gelu", elementwise::same, EL),
    op("Mish", elementwise::same, EL),
    op("HardSwish", elementwise::same, EL),
    op("Swish", elementwise::same, EL),
    op("ThresholdedRelu", elementwise::same, EL),
    op("Shrink", elementwise::same, EL),
    op("Softplus", elementwise::same, POS),
    op("Softsign", elementwise::same, EL),
    op("Sigmoid", elementwise::same, UNIT),
    op("HardSigmoid", elementwise::same, UNIT),
    op("Tanh", elementwise::same, EL),
    op("Erf", elementwise::same, EL),
    op("Exp", elementwise::same, POS),
    op("Log", elementwise::same, EL),
    op("Sqrt", elementwise::same, POS),
    op("Reciprocal", elementwise::same, EL),
    op("Abs", elementwise::same, POS),
    op("Neg", elementwise::same, EL),
    op("Sign", elementwise::same, EL),
    op("Floor", elementwise::same, EL),
    op("Ceil", elementwise::same, EL),
    op("Round", elementwise::same, EL),
    op("Sin", elementwise::same, EL),
    op("Cos", elementwise::same, EL),
    op("Tan", elementwise::same, EL),
    op("Asin", elementwise::same, EL),
    op("Acos", elementwise::same, EL),
    op("Atan", elementwise::same, EL),
    op("Sinh", elementwise::same, EL),
    op("Cosh", elementwise::same, EL),
    op("Asinh", elementwise::same, EL),
    op("Acosh", elementwise::same, EL),
    op("Atanh", elementwise::same, EL),
    op("BitwiseNot", elementwise::same, EL),
    op("CumSum", elementwise::same, NO),
    op("Trilu", elementwise::same, NO),
    // Normalizations and softmax.
    op("BatchNormalization", elementwise::same, NO),
    op("InstanceNormalization", elementwise::same, NO),
    op("GroupNormalization", elementwise::same, NO),
    op("LayerNormalization", elementwise::same, NO),
    op("RMSNormalization", elementwise::same, NO),
    op("SimplifiedLayerNormalization", elementwise::same, NO),
    op("LpNormalization", elementwise::same, NO),
    op("MeanVarianceNormalization", elementwise::same, NO),
    op("LRN", elementwise::same, NO),
    op("Softmax", elementwise::same, Laws::NON_NEGATIVE.and(Laws::UNIT_RANGE)),
    op("LogSoftmax", elementwise::same, NO),
    op("Hardmax", elementwise::same, Laws::NON_NEGATIVE.and(Laws::UNIT_RANGE)),
    // Pooling.
    op("MaxPool", conv::pool, NO),
    op("AveragePool", conv::pool, NO),
    op("LpPool", conv::pool, NO),
    op("GlobalAveragePool", conv::global_pool, NO),
    op("GlobalMaxPool", conv::global_pool, NO),
    op("GlobalLpPool", conv::global_pool, NO),
    // Reductions.
    op("ReduceSum", reduce::reduce, NO),
    op("ReduceMean", reduce::reduce, NO),
    op("ReduceMax", reduce::reduce, NO),
    op("ReduceMin", reduce::reduce, NO),
    op("ReduceProd", reduce::reduce, NO),
    op("ReduceL1", reduce::reduce, Laws::NON_NEGATIVE),
    op("ReduceL2", reduce::reduce, Laws::NON_NEGATIVE),
    op("ReduceSumSquare", reduce::reduce, Laws::NON_NEGATIVE),
    op("ReduceLogSum", reduce::reduce, NO),
    op("ReduceLogSumExp", reduce::reduce, NO),
    op("ArgMax", reduce::arg, NO),
    op("ArgMin", reduce::arg, NO),
    op("TopK", reduce::top_k, NO),
    // Layout.
    op("Reshape", layout::reshape, MV),
    op("Flatten", layout::flatten, MV),
    op("Squeeze", layout::squeeze, MV),
    op("Unsqueeze", layout::unsqueeze, MV),
    op("Transpose", layout::transpose, MV),
    op("Concat", layout::concat, NO),
    op("Split", layout::split, MV),
    op("Slice", layout::slice, MV),
    op("Gather", layout::gather, MV),
    op("GatherElements", layout::gather_elements, MV),
    op("GatherND", layout::gather_nd, MV),
    op("ScatterElements", elementwise::same, NO),
    op("ScatterND", elementwise::same, NO),
    op("Expand", layout::expand, MV),
    op("Tile", layout::tile, MV),
    op("Pad", layout::pad, NO),
    op("Resize", layout::resize, NO),
    op("DepthToSpace", layout::depth_to_space, MV),
    op("SpaceToDepth", layout::space_to_depth, MV),
    op("ReverseSequence", elementwise::same, MV),
    // Shapes and generators.
    op("Shape", shape::shape, NO),
    op("Size", shape::size, NO),
    op("ConstantOfShape", shape::constant_of_shape, NO),
    op("Range", shape::range, NO),
    op("OneHot", shape::one_hot, NO),
    op("NonZero", shape::non_zero, NO),
    op("EyeLike", elementwise::same_shape, NO),
    op("RandomNormal", shape::nothing, Laws::RANDOM),
    op("RandomNormalLike", elementwise::same_shape, Laws::RANDOM),
    op("RandomUniform", shape::nothing, Laws::RANDOM),
    op("RandomUniformLike", elementwise::same_shape, Laws::RANDOM),
    op("Bernoulli", elementwise::same_shape, Laws::RANDOM),
    op("Multinomial", shape::nothing, Laws::RANDOM),
    // Quantization.
    op("QuantizeLinear", elementwise::quantize, EL),
    op("DequantizeLinear", elementwise::dequantize, EL),
    op("DynamicQuantizeLinear", elementwise::dynamic_quantize, NO),
    op("MatMulInteger", matmul::matmul_integer, NO),
    op("ConvInteger", conv::conv_integer, NO),
    op("QLinearConv", shape::nothing, NO),
    op("QLinearMatMul", shape::nothing, NO),
    // Recurrences and control flow: types come from the file, the executor or nowhere.
    op("LSTM", shape::nothing, NO),
    op("GRU", shape::nothing, NO),
    op("RNN", shape::nothing, NO),
    op("If", shape::nothing, NO),
    op("Loop", shape::nothing, NO),
    op("Scan", shape::nothing, NO),
    op("Einsum", shape::nothing, NO),
    op("NonMaxSuppression", shape::nothing, NO),
];

/// The row of `op`, where there is one.
pub fn spec(op: &OpKey) -> Option<&'static OpSpec> {
    OPS.iter().find(|row| *row.name == *op.name && *row.domain == *op.domain)
}

/// The laws of `op`; none for an operator without a row.
pub fn laws(op: &OpKey) -> Laws {
    spec(op).map_or(Laws::NONE, |row| row.laws)
}

/// The types of the outputs of `node`, as far as they follow from the `types` of what is computed before it.
pub(crate) fn infer(graph: &Graph, node: &Node, types: Types<'_>) -> Vec<TensorType> {
    let inputs = node.inputs.iter().map(|value| value.and_then(types)).collect();
    spec(&node.op).map_or_else(Vec::new, |row| (row.infer)(&Call { graph, node, inputs, types }))
}

/// `axis` counted from the front, if it lies in a tensor of rank `rank`.
pub fn positive_axis(axis: i64, rank: usize) -> Option<usize> {
    let rank = i64::try_from(rank).ok()?;
    let axis = if axis < 0 { axis.checked_add(rank)? } else { axis };
    if (0..rank).contains(&axis) { usize::try_from(axis).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_unique() {
        let mut names: Vec<_> = OPS.iter().map(|row| (row.domain, row.name)).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn axes_count_from_either_end() {
        assert_eq!(positive_axis(-1, 3), Some(2));
        assert_eq!(positive_axis(3, 3), None);
        assert_eq!(positive_axis(-4, 3), None);
        assert_eq!(positive_axis(i64::MIN, 3), None);
    }
}
