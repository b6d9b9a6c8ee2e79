//! Norms that are fitted to what the products that read them compute.

use onnx_quant::{exec, targets};
use passes::exec::Dataset;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::sensitivity::{Metric, Probe};
use passes::target::Scheme;

use super::equalize::{Rows, matrix};

/// A product, a norm, and two products that read it, one of them with a bias; `%n` is the norm, `rest` makes `%y` of both products.
fn model(norm: &str, rest: &str) -> Model {
    let row = |name: &str, shift: f32| {
        let values: Vec<String> = (0..8).map(|i| format!("{:.2}", shift + (i % 3) as f32 / 4.0)).collect();
        format!("  %{name} = const f32[8] [{}]\n", values.join(", "))
    };
    let source = format!(
        "opset 17\ngraph (%x: f32[512,8]) -> (%y) {{\n{}{}{}{}{}{}  %two = const f32[] [2]\n  %eps = const f32[] [0.00001]\n  \
         %h = MatMul(%x, %wa)\n{norm}  %p = MatMul(%n, %wb)\n  %o = MatMul(%n, %wc)\n  %ob = Add(%o, %bias)\n{rest}}}\n",
        matrix("wa", 8, 8),
        matrix("wb", 8, 8),
        matrix("wccc", 8, 8).replace("%wccc", "%wc"),
        row("g", 0.5),
        row("b", -0.2),
        row("bias", 0.1),
    );
    passes::text::parse(&source).unwrap()
}

const WHOLE: &str = "  %n = LayerNormalization(%h, %g, %b)\n";
const WRITTEN: &str = "  %q = Pow(%h, %two)\n  %m = ReduceMean(%q) {axes = [-1]}\n  %e = Add(%m, %eps)\n  %s = Sqrt(%e)\n  %d = Div(%h, %s)\n  \
                       %n = Mul(%g, %d)\n";
const SHIFTED: &str = "  %q = Pow(%h, %two)\n  %m = ReduceMean(%q) {axes = [-1]}\n  %e = Add(%m, %eps)\n  %s = Sqrt(%e)\n  %d = Div(%h, %s)\n  \
                       %t = Mul(%g, %d)\n  %n = Add(%t, %b)\n";
const SUM: &str = "  %y = Add(%p, %ob)\n";

/// Rows of norms that `round-in-order` with `options` substitutes, what the plan loses, and its text; stages keep so many bytes of samples.
fn rounded(plain: &Model, scheme: &str, options: &str, (threads, pair_budget): (usize, u64)) -> (usize, f64, String) {
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let data = Rows { channels: 8, samples: 4 };
    let mut cx = PassContext {
        dataset: Some(&data as &dyn Dataset),
        scheme: Scheme::parse(scheme).unwrap(),
        threads,
        pair_budget,
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let text = format!("infer-shapes, calibrate, assign-encodings, round-in-order{{{options}}}");
    let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
    let (after, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let probe = Probe::new(plain.graph(), &cx, 4, Metric::Error).unwrap();
    let graph = after.graph();
    let of_norms = after.plan().substitutes().filter(|(site, _)| {
        let passes::id::Site::Use { node, .. } = site else { return false };
        let node = graph.node(*node).unwrap();
        node.op.is("LayerNormalization")
            || graph.value(node.output(0).unwrap()).name.as_ref() == "n"
            || graph.value(node.output(0).unwrap()).name.as_ref() == "t"
    });
    (of_norms.count(), probe.loss(after.plan()).unwrap(), passes::text::plan(&after))
}

const PLENTY: (usize, u64) = (2, 1 << 30);

#[test]
fn a_norm_makes_up_for_all_products_that_read_it() {
    for (norm, rows) in [(WHOLE, 2), (WRITTEN, 1), (SHIFTED, 2)] {
        for scheme in ["w2a16", "w2a8"] {
            let plain = model(norm, SUM);
            let (none, without, _) = rounded(&plain, scheme, "readers=0", PLENTY);
            let (fitted, with, _) = rounded(&plain, scheme, "readers=1", PLENTY);
            assert_eq!((none, fitted), (0, rows), "{norm} {scheme}");
            assert!(with < without, "{norm} {scheme}: {with} is not below {without}");
        }
    }
    // A sum that reads the norm is one of its readers.
    let behind = model(WHOLE, "  %z = Add(%p, %ob)\n  %y = Add(%n, %z)\n");
    let [without, with] = ["readers=0", "readers=1"].map(|options| rounded(&behind, "w2a16", options, PLENTY));
    assert!(with.0 == 2 && with.1 < without.1, "{} is not below {}", with.1, without.1);
}

/// Norms run again with what reads them: whichever samples wait in memory, and on any threads, the same plan.
#[test]
fn what_runs_again_is_the_same_whatever_memory_holds() {
    for norm in [WHOLE, SHIFTED] {
        let deeper = "  %z = Add(%p, %ob)\n  %k = LayerNormalization(%z, %g, %b)\n  %y = MatMul(%k, %wb)\n";
        let plain = model(norm, deeper);
        for scheme in ["w2a16", "w2a8"] {
            let plan = |how| rounded(&plain, scheme, "readers=1, norms=1, sweeps=1", how).2;
            let first = plan(PLENTY);
            assert!([(1, 1 << 30), (1, 0), (2, 0)].iter().all(|how| plan(*how) == first), "{norm} {scheme}");
        }
    }
}

#[test]
fn norms_that_something_else_reads_stay() {
    let softmax = "  %z = Softmax(%n)\n  %a = Add(%p, %ob)\n  %y = Add(%a, %z)\n";
    let product = "  %z = Mul(%n, %p)\n  %y = Add(%z, %ob)\n";
    for rest in [softmax, product] {
        let plain = model(WHOLE, rest);
        let [without, with] = ["readers=0", "readers=1"].map(|options| rounded(&plain, "w2a16", options, PLENTY));
        assert_eq!((with.0, &with.2), (0, &without.2), "{rest}");
    }
}
