//! Inputs of products that are kept in float, beside codes of the rest.

use onnx_quant::{exec, targets};
use passes::exec::Dataset;
use passes::id::Site;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::sensitivity::{Metric, Probe};
use passes::target::Scheme;
use passes::tensor::Tensor;

use super::equalize::{Rows, matrix, same_within};

const ALONE: &str = "  %y = MatMul(%x, %w)\n";
const BIASED: &str = "  %p = MatMul(%x, %w)\n  %y = Add(%p, %b)\n";
const RESIDUAL: &str = "  %p = MatMul(%x, %w)\n  %q = Add(%b, %p)\n  %y = Add(%q, %x)\n";
const GEMM: &str = "  %y = Gemm(%x, %w, %b) {transB=1}\n";

fn source(body: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}  %b = const f32[8] [1, 0, 2, 0, -1, 0, 0, 3]\n{body}}}\n",
        matrix("w", 8, 8)
    )
}

/// `text` after `pipeline`, both models with what was counted and noted.
fn ran(text: &str, scheme: &str, pipeline: &str, threads: usize) -> (Model, Model, String) {
    let plain = passes::text::parse(text).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let data = Rows { channels: 8, samples: 4 };
    let mut cx = PassContext {
        dataset: Some(&data as &dyn Dataset),
        scheme: Scheme::parse(scheme).unwrap(),
        threads,
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let pipeline =
        Pipeline::parse(&format!("infer-shapes, calibrate, {pipeline}"), &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let counts = trace.steps.iter().find(|(name, _)| *name == "keep-columns").map(|(_, step)| step.counts.clone());
    (plain, after, format!("{:?} {:?}", counts.unwrap_or_default(), trace.notes))
}

/// The product in codes, the inputs that stand in its place as numbers, and what is kept of the weight.
fn kept(model: &Model) -> Option<(Site, Vec<usize>, Tensor)> {
    let graph = model.graph();
    graph.nodes().find_map(|(id, _)| {
        let found = passes::ops::kept_rows(graph, id)?;
        let side = graph.constant_input(graph.node(found.side)?, 1)?;
        Some((Site::Use { node: id, input: 1 }, found.rows, Tensor::clone(side)))
    })
}

#[test]
fn what_is_kept_is_the_loud_input_and_the_function_stays() {
    for body in [ALONE, BIASED, RESIDUAL, GEMM] {
        let (plain, after, said) = ran(&source(body), "w3a16", "assign-encodings, keep-columns{share=0.13}", 1);
        assert!(said.contains("\"inputs kept\": 1") && said.contains("bits each"), "{body}: {said}");
        let (site, rows, side) = kept(&after).unwrap();
        assert_eq!(rows, [3], "{body}");
        let graph = after.graph();
        assert!(after.plan().encoding(site).is_some(), "{body}");
        let encoded = after.plan().encodings().filter(|(site, _)| matches!(site, Site::Use { input: 1, .. })).count();
        assert_eq!(encoded, 1, "{body}: what is kept has no codes");
        let weight = plain.graph().constant(plain.graph().find("w").unwrap()).unwrap().floats().unwrap().into_owned();
        let of_input: Vec<f32> =
            (0..8).map(|n| if body == GEMM { weight[n * 8 + 3] } else { weight[3 * 8 + n] }).collect();
        assert_eq!(side.floats().unwrap().as_ref(), of_input, "{body}");
        if body != ALONE && body != GEMM {
            let Site::Use { node, .. } = site else { unreachable!() };
            assert!(passes::ops::bias_site(graph, &passes::ir::walk::Users::of(graph), node).is_some(), "{body}");
        }
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let feeds = Rows { channels: 8, samples: 4 }.sample(2).unwrap();
        same_within(&plain, &after, executor.as_ref(), &feeds, 2e-6, body);
    }
}

#[test]
fn zeros_stay_zeros_whatever_rounds_and_less_is_lost() {
    for (scheme, rounding) in [
        ("w3a16", "round"),
        ("w3a16", "round{method=gptq}, descend, refit-scales"),
        ("w3a16", "round-in-order{refit=3}"),
        ("w3a16g4", "round-in-order{sweeps=2, target=output}"),
        ("w2a16g4asym", "round-in-order"),
        ("w4a8tok", "round-in-order"),
    ] {
        for body in [BIASED, GEMM] {
            let text = source(body);
            let (plain, with, said) =
                ran(&text, scheme, &format!("assign-encodings, keep-columns{{share=0.13}}, {rounding}"), 2);
            let (_, without, _) = ran(&text, scheme, &format!("assign-encodings, {rounding}"), 2);
            let (site, rows, _) = kept(&with).unwrap_or_else(|| panic!("{scheme} {rounding} {body}: {said}"));
            let decoded = with.plan().encoding(site).unwrap().decode(with.plan().codes(site).unwrap()).unwrap();
            let at = |row: usize, n: usize| decoded[if body == GEMM { n * 8 + row } else { row * 8 + n }];
            assert!(rows.iter().all(|row| (0..8).all(|n| at(*row, n) == 0.0)), "{scheme} {rounding} {body}");
            let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
            let data = Rows { channels: 8, samples: 4 };
            let cx = PassContext {
                dataset: Some(&data as &dyn Dataset),
                ..PassContext::new(targets::TARGETS[0], executor.as_ref())
            };
            let loss =
                |model: &Model| Probe::new(model.graph(), &cx, 4, Metric::Error).unwrap().loss(model.plan()).unwrap();
            let (with, without) = (loss(&with), loss(&without));
            assert!(with < without, "{scheme} {rounding} {body}: {with} is not below {without}");
        }
    }
}

#[test]
fn nothing_changes_where_nothing_is_kept_or_can_be() {
    let text = source(BIASED);
    let plan =
        |scheme: &str, pipeline: &str, threads: usize| passes::text::plan(&ran(&text, scheme, pipeline, threads).1);
    assert_eq!(
        plan("w3a16", "assign-encodings, keep-columns{share=0}, round", 1),
        plan("w3a16", "assign-encodings, round", 1)
    );
    assert_eq!(
        plan("w8a8", "assign-encodings, keep-columns{share=0.25}, round", 1),
        plan("w8a8", "assign-encodings, round", 1)
    );
    let twice = "assign-encodings, keep-columns{share=0.13}, keep-columns{share=0.2}, round";
    let once = "assign-encodings, keep-columns{share=0.13}, round";
    assert_eq!(plan("w3a16", twice, 1), plan("w3a16", once, 3));
    let shared = source("  %p = MatMul(%x, %w)\n  %q = MatMul(%p, %w)\n  %y = Add(%q, %b)\n");
    let (.., said) = ran(&shared, "w3a16", "assign-encodings, keep-columns{share=0.25}", 1);
    assert!(!said.contains("inputs kept"), "{said}");
}

#[test]
fn gradients_tell_which_inputs_to_keep_over_all_products() {
    let two = source("  %p = MatMul(%x, %w)\n  %r = Relu(%p)\n")
        .replace("}\n", &format!("{}  %q = MatMul(%r, %v)\n  %y = Add(%q, %b)\n}}\n", matrix("v", 8, 8)));
    for by in ["tacq", "fisher", "gradient-l1", "moments"] {
        let (plain, after, said) =
            ran(&two, "w3a16", &format!("assign-encodings, keep-columns{{share=0.13, by={by}}}"), 2);
        let n = after.graph().nodes().filter(|(id, _)| passes::ops::kept_rows(after.graph(), *id).is_some()).count();
        assert!(n > 0 && said.contains("\"inputs kept\": 2"), "{by}: {said}");
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let feeds = Rows { channels: 8, samples: 4 }.sample(1).unwrap();
        same_within(&plain, &after, executor.as_ref(), &feeds, 2e-6, by);
    }
}
