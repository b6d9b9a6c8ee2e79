//! ONNX Runtime on a CPU.

use passes::tensor::DType;

use super::subject::{Quantizer, Subject};
use super::{Lint, error, warning};

const FUSED: &str = "optimized graphs of ONNX Runtime 1.31.1 and 1.22.1, read back";
const HEAVY: &[&str] = &["Conv", "MatMul", "Gemm"];

fn is_packed(node: &passes::ir::Node) -> bool {
    &*node.op.domain == "com.microsoft" && &*node.op.name == "MatMulNBits"
}

/// Heavy nodes that read codes and a constant in codes: with the quantizers of both.
fn on_codes<'s, 'a>(
    subject: &'s Subject<'a>,
) -> impl Iterator<Item = (&'a passes::ir::Node, &'s Quantizer<'a>, &'s Quantizer<'a>)> {
    let both = |node| Some((node, subject.activation(node, 0)?, subject.weight(node, 1)?));
    subject.called(HEAVY).filter_map(move |(_, node)| both(node))
}

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8101",
        "the opset is newer than the runtime loads",
        "export for opset 21",
        "load errors of 1.31.1",
        |s, found| {
            if s.opset > 26 {
                found.model(format!("opset {} is newer than 26", s.opset));
            }
        },
    ),
    error(
        "OQ8102",
        "4-bit floats have no quantize and dequantize kernels",
        "use --target tensorrt for them, or leave the weights in integers",
        "NOT_IMPLEMENTED from 1.31.1",
        |s, found| {
            for q in s.quantizers().filter(|q| q.storage == Some(DType::F4E2M1)) {
                found.node(q.node, "codes are float4e2m1");
            }
        },
    ),
    error(
        "OQ8103",
        "MatMulNBits has bits that no kernel computes",
        "use 2, 4 or 8 bits",
        "initialization errors of 1.31.1",
        |s, found| {
            for (_, node) in s.nodes().filter(|(_, node)| is_packed(node)) {
                let bits = node.int("bits", 4);
                if ![2, 4, 8].contains(&bits) {
                    found.node(node, format!("it has {bits} bits"));
                }
            }
        },
    ),
    error(
        "OQ8104",
        "the blocks of MatMulNBits are no power of two from 16 on",
        "use blocks of 16, 32, 64, 128 or 256",
        "initialization errors of 1.31.1",
        |s, found| {
            for (_, node) in s.nodes().filter(|(_, node)| is_packed(node)) {
                let block = node.int("block_size", 0);
                if ![16, 32, 64, 128, 256].contains(&block) {
                    found.node(node, format!("its blocks are of {block}"));
                }
            }
        },
    ),
    error(
        "OQ8105",
        "codes of fewer than 8 bits right behind a Clip",
        "write them as bytes, with a Clip of the codes, as `onnx-quant quantize` does",
        "initialization errors of 1.31.1 (clip_quantizelinear.cc)",
        |s, found| {
            for (_, clamp) in s.called(&["Clip"]) {
                for q in s.quantized_by(clamp) {
                    if let Some(storage) = q.storage.filter(|storage| storage.bits() < 8) {
                        found.node(
                            clamp,
                            format!("what it gives is quantized to {}: the optimizer fails on that", storage.name()),
                        );
                    }
                }
            }
        },
    ),
    warning(
        "OQ8110",
        "a clamp before a quantizer whose zero point is not the lowest code",
        "give it the lowest code as zero point: the clamp then disappears",
        "four convolutions: 8.1 ms instead of 0.72 ms, float 3.9 ms",
        |s, found| {
            for (_, clamp) in s.called(&["Relu", "Clip"]) {
                let heavy = s.producer(clamp, 0).is_some_and(|(_, n)| HEAVY.iter().any(|op| n.op.is(op)));
                for q in s.quantized_by(clamp).into_iter().filter(|_| heavy) {
                    let zero = q.zeros().first().copied().unwrap_or(0);
                    if zero != q.lowest() {
                        found.node(clamp, format!("the quantizer behind it has zero point {zero}, the lowest code is {}: all of it stays in float", q.lowest()));
                    }
                }
            }
        },
    ),
    warning(
        "OQ8111",
        "weights in unsigned codes",
        "use signed codes with zero point 0",
        "four convolutions: 6.6 ms instead of 0.72 ms",
        |s, found| {
            for (node, _, weight) in on_codes(s).filter(|(_, _, weight)| weight.storage == Some(DType::U8)) {
                let _ = weight;
                found.node(node, "its weight is uint8: the kernels for it are about ten times slower");
            }
        },
    ),
    warning(
        "OQ8112",
        "a convolution on codes returns float",
        "quantize its result, or leave the convolution in float",
        FUSED,
        |s, found| {
            for (node, _, _) in on_codes(s).filter(|(node, _, _)| node.op.is("Conv")) {
                let behind = s.readers(node);
                let clamped =
                    behind.iter().any(|n| (n.op.is("Relu") || n.op.is("Clip")) && !s.quantized_by(n).is_empty());
                if s.is_output(node) || s.quantized_by(node).is_empty() && !clamped {
                    found.node(
                        node,
                        "nothing quantizes its result: its weight is dequantized and it runs in float on every run",
                    );
                }
            }
        },
    ),
    warning(
        "OQ8113",
        "a convolution with weights in codes reads float",
        "quantize what it reads as well, or leave its weight in float",
        "four convolutions with 8-bit weights alone: 7.9 ms instead of 2.2 to 3.9 ms in float",
        |s, found| {
            for (_, node) in s.called(&["Conv", "ConvTranspose"]) {
                if s.weight(node, 1).is_some() && s.dequantizer(node, 0).is_none() {
                    found.node(node, "its weight is dequantized on every run");
                }
            }
        },
    ),
    warning(
        "OQ8114",
        "a bias in float beside codes",
        "store it as int32 at input scale times weight scale",
        "1.22.1 leaves such convolutions in float; 1.31.1 fuses them",
        |s, found| {
            for (node, _, _) in on_codes(s).filter(|(node, _, _)| node.op.is("Conv")) {
                if s.constant(node, 2).is_some_and(|bias| bias.dtype() == DType::F32) {
                    found.node(node, "its bias is float");
                }
            }
        },
    ),
    error(
        "OQ8115",
        "the scale of a bias is not input scale times weight scale",
        "round the bias again at that product",
        "1.22.1 fuses such a convolution and ignores the scale: wrong numbers; 1.31.1 does not fuse it",
        |s, found| {
            for (node, activation, weight) in on_codes(s) {
                let Some(bias) = s.weight(node, 2) else { continue };
                let (x, w, b) = (activation.scales(), weight.scales(), bias.scales());
                let Some(&x) = x.first() else { continue };
                let of = |list: &[f32], at: usize| if list.len() == 1 { list[0] } else { list[at] };
                let channels = w.len().max(b.len());
                let whole = |list: &[f32]| list.len() == 1 || list.len() == channels;
                let off = |at: &usize| (of(&b, *at) - x * of(&w, *at)).abs() > 1e-5 * (x * of(&w, *at)).abs();
                if whole(&w) && whole(&b) && (0..channels).any(|at| off(&at)) {
                    found.node(node, "its bias has another scale");
                }
            }
        },
    ),
    warning(
        "OQ8116",
        "one operand of an addition or product is float",
        "quantize both, a constant as well",
        FUSED,
        |s, found| {
            for (_, node) in s.called(&["Add", "Mul"]) {
                let sides = [s.dequantizer(node, 0).is_some(), s.dequantizer(node, 1).is_some()];
                if sides[0] != sides[1] && !s.quantized_by(node).is_empty() {
                    found.node(node, "it runs in float between dequantize and quantize");
                }
            }
        },
    ),
    warning(
        "OQ8117",
        "a table is dequantized whole for every lookup",
        "quantize with --embeddings, which writes GatherBlockQuantized",
        FUSED,
        |s, found| {
            for (_, node) in s.called(&["Gather"]) {
                if s.weight(node, 0).is_some() {
                    found.node(node, "its table is dequantized whole on every run");
                }
            }
        },
    ),
    warning(
        "OQ8118",
        "blocks of a weight run along its outputs",
        "cut [K, N] weights along axis 0",
        "four products of 1024x1024: 40 ms instead of 0.19 ms",
        |s, found| {
            for (_, node) in s.called(&["MatMul", "Gemm"]) {
                let Some(weight) = s.weight(node, 1).filter(|w| w.block() > 0) else { continue };
                if weight.node.int("axis", 1) != 0 {
                    found.node(node, "its weight is dequantized on every run instead of being packed");
                }
            }
        },
    ),
    warning(
        "OQ8119",
        "blocks of a weight are no power of two from 16 on",
        "use blocks of 16, 32, 64, 128 or 256",
        FUSED,
        |s, found| {
            for (_, node) in s.called(&["MatMul", "Gemm"]) {
                let Some(weight) = s.weight(node, 1).filter(|w| w.block() > 0) else { continue };
                if ![16, 32, 64, 128, 256].contains(&weight.block()) {
                    found.node(
                        node,
                        format!("blocks of {} are not packed: they are dequantized on every run", weight.block()),
                    );
                }
            }
        },
    ),
    warning(
        "OQ8120",
        "a Gemm reads a transposed weight in blocks",
        "store the weight as [K, N] and leave transB out",
        FUSED,
        |s, found| {
            for (_, node) in s.called(&["Gemm"]).filter(|(_, node)| node.int("transB", 0) != 0) {
                if s.weight(node, 1).is_some_and(|w| w.block() > 0) {
                    found.node(node, "its weight is dequantized on every run");
                }
            }
        },
    ),
    warning(
        "OQ8121",
        "codes around an operator that computes in float",
        "leave it in float: only what is quantized behind it needs a pair",
        FUSED,
        |s, found| {
            const FLOAT: &[&str] = &[
                "Sub",
                "Div",
                "Pow",
                "Min",
                "Max",
                "HardSigmoid",
                "HardSwish",
                "Tanh",
                "Elu",
                "Gelu",
                "Erf",
                "Exp",
                "Softplus",
                "Mish",
                "LayerNormalization",
                "ReduceMean",
                "Pad",
                "ConvTranspose",
                "BatchNormalization",
            ];
            for (_, node) in s.called(FLOAT) {
                if s.activation(node, 0).is_some() && !s.quantized_by(node).is_empty() {
                    found.node(
                        node,
                        format!("{} has no integer kernel: the pairs around it only cost time", node.op.name),
                    );
                }
            }
        },
    ),
    warning(
        "OQ8122",
        "16-bit codes of activations",
        "use 8 bits: 16 are computed in float",
        "four convolutions: 8.0 ms instead of 0.72 ms",
        |s, found| {
            for q in s.quantizers().filter(|q| q.quantizes) {
                if matches!(q.storage, Some(DType::U16 | DType::I16)) {
                    found.node(q.node, "what reads it runs in float");
                }
            }
        },
    ),
    warning(
        "OQ8123",
        "data movement between two scales",
        "give input and result one scale and zero point",
        FUSED,
        |s, found| {
            for (_, node) in s.called(&["MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice"])
            {
                for (before, after) in s
                    .activation(node, 0)
                    .into_iter()
                    .flat_map(|q| s.quantized_by(node).into_iter().map(move |r| (q, r)))
                {
                    if before.scales() != after.scales() || before.zeros() != after.zeros() {
                        found.node(node, "it runs in float to change the scale");
                    }
                }
            }
        },
    ),
    warning(
        "OQ8124",
        "a batch normalization behind a convolution on codes",
        "fold it before quantizing, as `onnx-quant quantize` does",
        FUSED,
        |s, found| {
            for (node, _, _) in on_codes(s).filter(|(node, _, _)| node.op.is("Conv")) {
                if s.readers(node).iter().any(|reader| reader.op.is("BatchNormalization")) {
                    found.node(node, "the normalization behind it keeps it in float");
                }
            }
        },
    ),
    warning(
        "OQ8125",
        "a convolution with the range of each run",
        "calibrate (w8a8), or leave convolutions in float",
        "ConvInteger is not fused and slow in 1.31.1",
        |s, found| {
            for (_, node) in s.called(&["ConvInteger"]) {
                found.node(node, "it is slower than in float");
            }
        },
    ),
    warning(
        "OQ8126",
        "weights of fewer than 8 bits beside activations in codes",
        "use 8-bit weights, or leave activations in float (w4a16g32)",
        FUSED,
        |s, found| {
            for (node, _, weight) in on_codes(s) {
                if matches!(weight.storage, Some(DType::I4 | DType::U4 | DType::I2 | DType::U2)) {
                    found.node(node, "its weight is dequantized and it runs in float");
                }
            }
        },
    ),
];
