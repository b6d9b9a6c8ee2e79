//! tract.

use passes::diag::Place;
use passes::tensor::DType;

use super::{Lint, error, warning};

const SOURCE: &str = "tract-onnx, source of 2026-08";

pub(super) static LINTS: &[Lint] = &[
    error(
        "OQ8501",
        "a type that it does not load",
        "use 8-bit codes, or 4-bit MatMulNBits",
        "\"Unknown DatumType\"",
        |s, found| {
            let known = |dtype: DType| {
                use DType::{Bool, F16, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
                matches!(dtype, Bool | U8 | U16 | U32 | U64 | I8 | I16 | I32 | I64 | F16 | F32 | F64 | String)
            };
            for id in s.graph.value_ids().filter(|id| !s.users.of_value(*id).is_empty()) {
                let value = s.graph.value(id);
                if let Some(dtype) = value.ty.dtype().filter(|dtype| !known(*dtype)) {
                    found.at(Place::Value(value.name.clone()), format!("it is {}", dtype.name()));
                }
            }
        },
    ),
    error(
        "OQ8502",
        "more than one scale",
        "quantize with --target tract, which has one per tensor",
        "it reads the first one and applies it to all, silently",
        |s, found| {
            for q in s.quantizers().filter(|q| !q.per_tensor()) {
                found.node(q.node, format!("of {} scales it uses the first", q.scales().len()));
            }
        },
    ),
    error("OQ8503", "a scale that is not f32", "store scales as f32", SOURCE, |s, found| {
        for q in s.quantizers() {
            if let Some(scale) = q.scale.filter(|scale| scale.dtype() != DType::F32) {
                found.node(q.node, format!("it is {}", scale.dtype().name()));
            }
        }
    }),
    error("OQ8504", "16-bit codes", "use 8 bits", SOURCE, |s, found| {
        for q in s.quantizers().filter(|q| matches!(q.storage, Some(DType::I16 | DType::U16))) {
            found.node(q.node, "they are read as 8-bit ones");
        }
    }),
    error("OQ8505", "MatMulNBits of other than 4 bits", "use 4 bits in blocks of 32", SOURCE, |s, found| {
        for (_, node) in s.nodes().filter(|(_, node)| &*node.op.name == "MatMulNBits" && node.int("bits", 4) != 4) {
            found.node(node, format!("it has {}", node.int("bits", 4)));
        }
    }),
    warning(
        "OQ8506",
        "MatMulNBits that becomes float in memory",
        "use blocks of 32 without zero points, and whole ones",
        "only Q4_0's layout stays in 4 bits",
        |s, found| {
            for (_, node) in s.nodes().filter(|(_, node)| &*node.op.name == "MatMulNBits" && node.int("bits", 4) == 4) {
                if node.int("block_size", 32) != 32 || node.int("K", 0) % 32 != 0 || node.input(3).is_some() {
                    found.node(node, "its weight is expanded when it is loaded");
                }
            }
        },
    ),
    error(
        "OQ8507",
        "an operator of ONNX Runtime that it does not have",
        "write it with standard operators: `onnx-quant convert --target tract`",
        SOURCE,
        |s, found| {
            for (_, node) in
                s.nodes().filter(|(_, node)| &*node.op.domain == "com.microsoft" && &*node.op.name != "MatMulNBits")
            {
                found.node(node, format!("there is no {}", node.op.name));
            }
        },
    ),
    error(
        "OQ8508",
        "a quantizer behind a Softmax",
        "keep what reads it in float: --keep-float",
        "its optimizer fuses the nodes around Softmax into wrong numbers (0.23)",
        |s, found| {
            for (_, node) in s.called(&["Softmax"]) {
                if !s.quantized_by(node).is_empty() {
                    found.node(node, "its results would be wrong");
                }
            }
        },
    ),
];
