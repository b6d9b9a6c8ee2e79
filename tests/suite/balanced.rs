//! Cross-layer equalization by ranges of weights: both sides of a channel come to one range, and nothing else changes.

use onnx_quant::{exec, targets};
use passes::exec::Dataset;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};

use super::attention::Tokens;
use super::equalize::{check_same, check_unseen, divided, matrix};
use super::heads::loud;

const PASS: &str = "equalize-layers{from=weights}";

/// The largest weight of the `nth` node `op`, index by index of `axis`.
fn tops(model: &Model, op: &str, nth: usize, axis: usize) -> Vec<f32> {
    let graph = model.graph();
    let (_, node) = graph.nodes().filter(|(_, node)| node.op.is(op)).nth(nth).unwrap();
    let weight = graph.constant_input(node, 1).unwrap();
    let (n, inner) = (weight.shape()[axis], weight.shape()[axis + 1..].iter().product::<usize>());
    let mut tops = vec![0.0_f32; n];
    let values = weight.floats().unwrap();
    values.iter().enumerate().for_each(|(i, w)| tops[i / inner % n] = tops[i / inner % n].max(w.abs()));
    tops
}

fn alike(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a / b - 1.0).abs() < 2e-4)
}

/// A kernel of `shape` whose outputs are of very different sizes.
fn kernel(name: &str, shape: [usize; 4]) -> String {
    let inner: usize = shape[1..].iter().product();
    let size = |o: usize| [1.0, 8.0, 0.25, 30.0, 0.05, 2.0][o % 6];
    let value = |i: usize| size(i / inner) * ((i * 31 + name.len() * 17) % 41) as f32 / 20.0 - 0.7 * size(i / inner);
    let values: Vec<String> = (0..shape.iter().product()).map(|i| format!("{:.4}", value(i))).collect();
    let [a, b, c, d] = shape;
    format!("  %{name} = const f32[{a},{b},{c},{d}] [{}]\n", values.join(", "))
}

#[test]
fn products_of_a_chain_come_to_one_range_on_both_sides() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}{}{}  %b = const f32[6] [0.1, 0.2, -0.1, 0, 0.3, 0.05]\n  \
         %s = const f32[4] [0.1, 0.2, 0.3, 0.4]\n  %c = const f32[4] [0.01, 0, -0.02, 0.03]\n  %g = Gemm(%x, %w, %b)\n  \
         %r = Relu(%g)\n  %m = MatMul(%r, %v)\n  %a = Add(%m, %c)\n  %p = PRelu(%a, %s)\n  %y = Gemm(%p, %u) {{transB=1}}\n}}\n",
        loud("w", 8, 6),
        loud("v", 6, 4),
        matrix("u", 3, 4),
    );
    let (before, after, counts) = divided(&source, &Tokens(&[512, 8]), PASS, "w8a8");
    assert!(counts.contains("\"channels\": 10"), "{counts}");
    assert!(!alike(&tops(&before, "Gemm", 0, 1), &tops(&before, "MatMul", 0, 0)));
    assert!(alike(&tops(&after, "Gemm", 0, 1), &tops(&after, "MatMul", 0, 0)));
    assert!(alike(&tops(&after, "MatMul", 0, 1), &tops(&after, "Gemm", 1, 1)));
    // Slopes are no numbers of a channel's size.
    let graph = after.graph();
    let (_, prelu) = graph.nodes().find(|(_, node)| node.op.is("PRelu")).unwrap();
    assert_eq!(graph.constant_input(prelu, 1).unwrap().floats().unwrap()[..], [0.1, 0.2, 0.3, 0.4]);
}

/// What both ranges of a channel multiply to stays, where there are two layers.
#[test]
fn ranges_of_two_layers_meet_at_their_geometric_mean() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}{}  %h = MatMul(%x, %w)\n  %r = Relu(%h)\n  %y = MatMul(%r, %v)\n}}\n",
        loud("w", 8, 6),
        matrix("v", 6, 4),
    );
    let (before, after, _) = divided(&source, &Tokens(&[512, 8]), PASS, "w4a16");
    let both = |model: &Model| [tops(model, "MatMul", 0, 1), tops(model, "MatMul", 1, 0)];
    let ([old_1, old_2], [new_1, new_2]) = (both(&before), both(&after));
    for (c, (old, new)) in old_1.iter().zip(&old_2).zip(new_1.iter().zip(&new_2)).enumerate() {
        let want = (old.0 * old.1).sqrt();
        assert!((new.0 / want - 1.0).abs() < 1e-4 && (new.1 / want - 1.0).abs() < 1e-4, "{c}: {old:?} {new:?}");
    }
}

#[test]
fn around_a_depthwise_convolution_three_ranges_meet() {
    for (middle, group) in [("6,1", 6), ("6,3", 2)] {
        let [outer, inner]: [usize; 2] = [6, middle[2..].parse().unwrap()];
        let source = format!(
            "opset 21\ngraph (%x: f32[2,6,16,16]) -> (%y) {{\n{}{}{}  %a = Conv(%x, %k)\n  %r = Relu(%a)\n  \
             %d = Conv(%r, %kd) {{group={group}, pads=[1, 1, 1, 1]}}\n  %s = Relu(%d)\n  %y = Conv(%s, %kpp)\n}}\n",
            kernel("k", [6, 6, 1, 1]),
            kernel("kd", [outer, inner, 3, 3]),
            kernel("kpp", [6, 6, 1, 1]),
        );
        let (_, after, counts) = divided(&source, &Tokens(&[2, 6, 16, 16]), PASS, "w8a8");
        assert!(counts.contains("\"channels\""), "{counts}");
        if group == 6 {
            let [a, b, c] = [tops(&after, "Conv", 0, 0), tops(&after, "Conv", 1, 0), tops(&after, "Conv", 2, 1)];
            assert!(alike(&a, &b) && alike(&b, &c), "{a:?} {b:?} {c:?}");
        }
    }
}

/// Flattened, a channel is a run of rows of the weight that reads it, and they keep one factor.
#[test]
fn runs_of_a_channel_share_its_factor() {
    let source = format!(
        "opset 21\ngraph (%x: f32[2,6,8,8]) -> (%y) {{\n{}{}  %c = Conv(%x, %k)\n  %r = Relu(%c)\n  \
         %p = MaxPool(%r) {{kernel_shape=[4, 4], strides=[4, 4]}}\n  %f = Flatten(%p)\n  %y = Gemm(%f, %w)\n}}\n",
        kernel("k", [6, 6, 1, 1]),
        matrix("w", 24, 5),
    );
    let (before, after, counts) = divided(&source, &Tokens(&[2, 6, 8, 8]), PASS, "w8a8");
    assert!(counts.contains("\"channels\""), "{counts}");
    let [old, new] = [&before, &after].map(|model| tops(model, "Gemm", 0, 0));
    let grown: Vec<f32> = old.iter().zip(&new).map(|(old, new)| new / old).collect();
    for run in grown.chunks(4) {
        assert!(run.iter().all(|g| (g / run[0] - 1.0).abs() < 1e-5), "{grown:?}");
    }
    assert!(grown.chunks(4).any(|run| (run[0] / grown[0] - 1.0).abs() > 0.1), "{grown:?}");
}

/// What comes from outside keeps its channels, and its neighbors do not.
#[test]
fn of_what_is_joined_only_what_layers_write_is_divided() {
    let source = format!(
        "opset 21\ngraph (%x: f32[2,6,8,8]) -> (%y) {{\n{}{}{}  %a = Conv(%x, %k)\n  %b = Conv(%x, %kb)\n  \
         %c = Concat(%a, %x, %b) {{axis=1}}\n  %y = Conv(%c, %kcc)\n}}\n",
        kernel("k", [4, 6, 1, 1]),
        kernel("kb", [2, 6, 1, 1]),
        kernel("kcc", [3, 12, 1, 1]),
    );
    let (before, after, counts) = divided(&source, &Tokens(&[2, 6, 8, 8]), PASS, "w8a8");
    assert!(counts.contains("\"channels\": 6"), "{counts}");
    let [old, new] = [&before, &after].map(|model| tops(model, "Conv", 2, 1));
    assert!((4..10).all(|c| old[c].to_bits() == new[c].to_bits()), "{old:?} {new:?}");
    assert!((0..4).chain(10..12).all(|c| (old[c] / new[c] - 1.0).abs() > 1e-3), "{old:?} {new:?}");
}

#[test]
fn sums_and_factors_are_passed_and_whatever_else_reads_a_channel_holds_it() {
    let model = |outputs: &str, middle: &str| {
        format!(
            "opset 21\ngraph (%x: f32[2,6,8,8]) -> ({outputs}) {{\n{}{}{}{}  %a = Conv(%x, %k)\n{middle}  %y = Conv(%r, %kr)\n}}\n",
            kernel("k", [6, 6, 1, 1]),
            kernel("kr", [3, 6, 1, 1]),
            kernel("km", [6, 6, 1, 1]),
            kernel("kse", [6, 6, 1, 1]),
        )
    };
    let excited = "  %p = GlobalAveragePool(%a)\n  %q = Conv(%p, %kse)\n  %g = Sigmoid(%q)\n  %r = Mul(%a, %g)\n";
    let residual = "  %h = Relu(%a)\n  %m = Conv(%h, %km)\n  %r = Add(%h, %m)\n";
    for (name, outputs, middle, fires) in [
        ("a residual sum", "%y", residual, true),
        ("squeeze and excite", "%y", excited, true),
        ("an output of the graph", "%y, %r", "  %r = Relu(%a)\n", false),
        ("a curve", "%y", "  %r = Sigmoid(%a)\n", false),
        ("another reader", "%y, %z", "  %r = Relu(%a)\n  %z = HardSwish(%a)\n", false),
        ("a clamp", "%y", "  %low = const f32[] [0]\n  %high = const f32[] [6]\n  %r = Clip(%a, %low, %high)\n", false),
        ("a softmax over channels", "%y", "  %r = Softmax(%a) {axis=1}\n", false),
    ] {
        let (_, _, counts) = divided(&model(outputs, middle), &Tokens(&[2, 6, 8, 8]), PASS, "w8a8");
        assert_eq!(counts.contains("channels"), fires, "{name}: {counts}");
    }
    // One weight that two nodes read.
    let shared = model("%y, %z", "  %r = Relu(%a)\n  %z = Conv(%x, %k)\n");
    let (_, _, counts) = divided(&shared, &Tokens(&[2, 6, 8, 8]), PASS, "w8a8");
    assert_eq!(counts, "{}");
}

/// A long chain of thin layers comes to rest, and its last layers know of the first.
#[test]
fn long_chains_settle() {
    let layers = 150;
    let size = |at: usize| (((at * 37 % 19) as f32) / 4.0 - 2.0).exp();
    let weight = |at: usize| format!("  %k{at} = const f32[1,1,1,1] [{:.4}]\n", size(at));
    let node = |at: usize| format!("  %c{at} = Conv(%r{at}, %k{at})\n  %r{} = Relu(%c{at})\n", at + 1);
    let [weights, nodes] =
        [&weight as &dyn Fn(usize) -> String, &node].map(|of| (0..layers).map(of).collect::<String>());
    let source = format!(
        "opset 21\ngraph (%x: f32[1,1,4,4]) -> (%y) {{\n{weights}  %one = const f32[1,1,1,1] [1]\n  %last = const f32[1,1,1,1] [3]\n  \
         %r0 = Conv(%x, %one)\n{nodes}  %y = Conv(%r{layers}, %last)\n}}\n"
    );
    let plain = passes::text::parse(&source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
    let pipeline = Pipeline::parse(&format!("infer-shapes, {PASS}"), &passes::catalogue::passes()).unwrap();
    let (after, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx).unwrap();
    let all: Vec<f32> = (0..layers + 2).map(|at| tops(&after, "Conv", at, 0)[0]).collect();
    assert!(all.iter().all(|w| (w / all[0] - 1.0).abs() < 0.05), "{all:?}");
}

#[test]
fn options_are_checked() {
    let catalogue = passes::catalogue::passes();
    let refused =
        |options: &str| Pipeline::parse(&format!("equalize-layers{{{options}}}"), &catalogue).unwrap_err().to_string();
    assert!(refused("from=samples").contains("neither peaks nor weights"));
    assert!(refused("from=weights, clamps=2").contains("exact, or left out"));
    assert!(refused("clamps=exact").contains("goes with from=weights"));
}

/// Real networks, from weights alone: every region at once, with clamps that end channel by channel.
#[test]
fn real_networks_keep_their_function() {
    for (name, pass, fires) in [
        ("digits-resnet", PASS, true),
        // All its clamps end at 6.
        ("digits-mobilenet", PASS, false),
        ("digits-mobilenet", "equalize-layers{from=weights, clamps=exact}", true),
    ] {
        let plain = onnx_quant::import::file(&super::fixture(&format!("models/{name}.onnx"))).unwrap().model;
        let slots = onnx_quant::dataset::Slot::of(plain.graph());
        let data = onnx_quant::dataset::Files::open(&super::fixture("data/digits"), slots, None, Some(12)).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext {
            dataset: Some(&data as &dyn Dataset),
            ..PassContext::new(targets::TARGETS[0], executor.as_ref())
        };
        let text =
            format!("infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes, {pass}, drop-dead");
        let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let counts = &trace.steps.iter().find(|(name, _)| *name == "equalize-layers").unwrap().1.counts;
        assert_eq!(counts.contains_key("channels"), fires, "{name} {pass}: {counts:?}");
        let count = |op: &str| after.graph().nodes().filter(|(_, node)| node.op.is(op)).count();
        assert!(!pass.contains("exact") || count("Min") == count("Clip"), "one is enough: {}", count("Min"));
        for index in 0..3 {
            check_same(&plain, &after, executor.as_ref(), &data.sample(index).unwrap(), name);
        }
        check_unseen(&plain, &after, executor.as_ref(), &data.sample(0).unwrap(), name);
    }
}
