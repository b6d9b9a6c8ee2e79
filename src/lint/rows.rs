//! Rows whose scales are no constants: those of tokens that every run computes (`tok`), and those of caches.

use super::subject::{Quantizer, Subject};
use super::{Lint, error, warning};

/// Where they can be written.
pub(super) static COMPUTED: &[Lint] = &[warning(
    "OQ8009",
    "rows get their scales from each run",
    "nothing is wrong: such ranges are for accuracy; for speed quantize the float model with ranges that are measured (w8a8)",
    "selectors of ONNX Runtime 1.31 fuse constant parameters only",
    |subject, found| {
        for q in rows(subject) {
            found.node(q.node, format!("nobody fuses the pair of tensor `{}`", read(subject, q)));
        }
    },
)];

/// Where they cannot.
pub(super) static REJECTED: &[Lint] = &[error(
    "OQ8010",
    "rows get their scales from each run, where scales are constants",
    "convert to --target ort-cpu or onnx-qdq, or quantize the float model again with ranges that are measured (w8a8)",
    "TensorRT's parser, the QNN and Vitis AI providers and readers of QONNX take constants; tract has one scale per tensor; operators on codes \
     have no blocks, and for OpenVINO none were tried",
    |subject, found| {
        for q in rows(subject) {
            found.node(q.node, format!("it rounds tensor `{}` so", read(subject, q)));
        }
    },
)];

/// What quantizes in blocks by parameters that are no constants; blocks of one are zero points of others.
fn rows<'a, 'b>(subject: &'b Subject<'a>) -> impl Iterator<Item = &'b Quantizer<'a>> {
    subject.quantizers().filter(|q| q.quantizes && q.block() > 1 && subject.is_computed(q))
}

/// The name of what `q` reads.
fn read(subject: &Subject<'_>, q: &Quantizer<'_>) -> String {
    q.node.input(0).map_or_else(String::new, |value| subject.name(value))
}
