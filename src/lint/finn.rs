//! FINN.

use std::collections::BTreeMap;

use super::qonnx::{is_weight, numbers, quants};
use super::{Lint, error, warning};

const SOURCE: &str = "FINN's ConvertQONNXtoFINN, source of 2026-04";

pub(super) static LINTS: &[Lint] = &[
    error("OQ8451", "a weight has a zero point", "use zero points of 0", SOURCE, |s, found| {
        for node in quants(s).filter(|node| is_weight(s, node) && numbers(s, node, 2).iter().any(|zero| *zero != 0.0)) {
            found.node(node, "FoldQuantWeights takes 0 only");
        }
    }),
    warning(
        "OQ8452",
        "an activation of more than 8 bits",
        "use 8 bits or fewer: thresholds number 2^bits - 1 per channel",
        SOURCE,
        |s, found| {
            for node in quants(s).filter(|node| !is_weight(s, node)) {
                if let Some(bits) = numbers(s, node, 3).first().filter(|bits| **bits > 8.0) {
                    found.node(node, format!("{bits} bits stay unconverted"));
                }
            }
        },
    ),
    error("OQ8453", "two Quant nodes round one constant", "give each its own", SOURCE, |s, found| {
        let mut seen: BTreeMap<passes::id::ValueId, usize> = BTreeMap::new();
        for node in quants(s).filter(|node| is_weight(s, node)) {
            let Some(value) = node.input(0) else { continue };
            *seen.entry(value).or_default() += 1;
            if seen[&value] == 2 {
                found.node(node, format!("another reads `{}` as well", s.name(value)));
            }
        }
    }),
    error(
        "OQ8454",
        "a matrix product has a scale per output",
        "use one scale: only convolutions take several",
        SOURCE,
        |s, found| {
            for node in quants(s).filter(|node| is_weight(s, node) && numbers(s, node, 1).len() > 1) {
                if s.readers(node).iter().any(|reader| reader.op.is("MatMul") || reader.op.is("Gemm")) {
                    found.node(node, format!("it has {}", numbers(s, node, 1).len()));
                }
            }
        },
    ),
    error("OQ8455", "signed codes behind a Relu", "use signed=0 and narrow=0 there", SOURCE, |s, found| {
        for node in quants(s).filter(|node| node.int("signed", 1) != 0) {
            if s.producer(node, 0).is_some_and(|(_, source)| source.op.is("Relu")) {
                found.node(node, "QuantReluHandler takes unsigned codes only");
            }
        }
    }),
    warning(
        "OQ8456",
        "an operator without hardware",
        "cut the model there: it runs on the host",
        "FINN has layers for convolutions, products, thresholds and pools",
        |s, found| {
            for (_, node) in s.called(&["Softmax", "Sigmoid", "LayerNormalization", "Gelu", "Erf", "Tanh", "Exp"]) {
                found.node(node, format!("{} stays in software", node.op.name));
            }
        },
    ),
];
