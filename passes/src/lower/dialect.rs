//! How a plan can be spelled.

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
    /// Means that lose their lowest bits are written as `Trunc` of QONNX.
    pub trunc: bool,
    /// Open leading extents are written as 1, for consumers that compile for fixed shapes.
    pub one_sample: bool,
    /// Blocks of activations, and E8M0 scales, by the operators of `TensorRT`'s own domain: see [`crate::trt`].
    pub trt: bool,
    /// Rows that get their scales from each run, by nodes that compute those.
    pub rows: bool,
    /// 32-bit biases are written as the float numbers that they stand for.
    pub float_biases: bool,
}

impl Dialect {
    /// Quantize and dequantize nodes.
    pub const QDQ: Self = Self {
        qonnx: false,
        nbits: false,
        one_sample: false,
        trt: false,
        trunc: false,
        rows: false,
        float_biases: false,
    };
    /// The same for runtimes that take computed scales.
    pub const QDQ_AND_ROWS: Self = Self { rows: true, ..Self::QDQ };
    /// The same, with packed products.
    pub const QDQ_AND_NBITS: Self = Self { nbits: true, ..Self::QDQ_AND_ROWS };
    /// The same without those, for one sample.
    pub const QDQ_OF_ONE: Self = Self { one_sample: true, ..Self::QDQ };
    /// The same for any number, with biases in float and `TensorRT`'s operators for blocks.
    pub const TENSORRT: Self = Self { trt: true, float_biases: true, ..Self::QDQ };
    /// QONNX, see [`super::qonnx`].
    pub const QONNX: Self = Self { qonnx: true, one_sample: true, ..Self::QDQ };
    /// The same with `Trunc`.
    pub const QONNX_AND_TRUNC: Self = Self { trunc: true, ..Self::QONNX };
}
