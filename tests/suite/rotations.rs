//! Rotations of residual streams: the function stays, and rounding loses less.

use onnx_quant::{exec, targets};
use passes::exec::{DataError, Dataset};
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::tensor::Tensor;

use super::equalize::{check_same, matrix};

/// A decoder of two layers with RMS norms written out both ways, biases, a scaled embedding and a head that is tied to it. 12 channels
/// need a Hadamard matrix that is no power of two.
fn decoder(extra: &str) -> String {
    let norm = |x: &str, n: &str| {
        format!(
            "  %{n}p = Pow({x}, %two)\n  %{n}m = ReduceMean(%{n}p, %last)\n  %{n}e = Add(%{n}m, %eps)\n  %{n}s = Sqrt(%{n}e)\n"
        )
    };
    format!(
        "opset 21\ngraph (%i: i64[7]) -> (%y) {{\n{}{}{}{}{}{}  %two = const f32[] [2]\n  %eps = const f32[] [0.001]\n  %last = const i64[1] [-1]\n  \
         %half = const f32[] [0.5]\n  %g = const f32[12] [1, 2, 3, 4, -5, 6, 0, 8, 9, 1, 2, 30]\n  %b = const f32[12] [1, 0, 0, 0, 9, 0, 0, 0, 0, 2, 0, 0]\n  \
         %t = Gather(%e, %i)\n  %x = Mul(%t, %half)\n{}  %ar = Reciprocal(%as)\n  %an = Mul(%x, %ar)\n  %ag = Mul(%g, %an)\n  %q = MatMul(%ag, %wq)\n  \
         %v = MatMul(%ag, %wv)\n  %f = Sigmoid(%q)\n  %h = Mul(%f, %v)\n  %o = MatMul(%h, %wo)\n  %ob = Add(%o, %b)\n  %x2 = Add(%x, %ob)\n{}  \
         %bn = Div(%x2, %bs)\n  %u = MatMul(%bn, %wu)\n  %r = Relu(%u)\n  %d = MatMul(%r, %wd)\n  %x3 = Add(%d, %x2)\n{}  %cn = Div(%x3, %cs)\n  \
         %cg = Mul(%cn, %g)\n  %et = Transpose(%e) {{perm=[1, 0]}}\n{extra}}}\n",
        matrix("e", 20, 12),
        matrix("wq", 12, 8),
        matrix("wv", 12, 8),
        matrix("wo", 8, 12),
        matrix("wu", 12, 16),
        matrix("wd", 16, 12),
        norm("%x", "a"),
        norm("%x2", "b"),
        norm("%x3", "c"),
    )
}

#[test]
fn a_rotated_decoder_keeps_its_function_and_loses_its_gains() {
    let plain = passes::text::parse(&decoder("  %y = MatMul(%cg, %et)\n")).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let rotated = |text: &str| {
        let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let counts = trace.steps.iter().find(|(name, _)| *name == "rotate").unwrap().1.counts.clone();
        (after, format!("{counts:?}{:?}", trace.notes))
    };
    let feeds = [Tensor::of([7], vec![0_i64, 3, 19, 7, 7, 12, 1])];
    let mut tables = Vec::new();
    for seed in ["rotate", "rotate{seed=3}"] {
        let (after, said) = rotated(&format!("infer-shapes, {seed}, drop-dead"));
        assert!(said.contains("\"readers\": 4") && said.contains("\"streams\": 1"), "{said}");
        check_same(&plain, &after, executor.as_ref(), &feeds, seed);
        let graph = after.graph();
        let count = |op: &str| graph.nodes().filter(|(_, node)| node.op.is(op)).count();
        assert_eq!((count("Transpose"), count("MatMul"), count("Add")), (0, 6, 6), "nothing is left of the old stream");
        let gather = graph.nodes().find(|(_, node)| node.op.is("Gather")).unwrap().1;
        tables.push(graph.constant_input(gather, 0).unwrap().floats().unwrap().into_owned());
        let read = graph.nodes().flat_map(|(_, node)| node.inputs.iter().flatten());
        let gains = read.filter(|id| graph.constant(**id).is_some_and(|t| t.len() == 12)).count();
        assert_eq!(gains, 1, "the rotated bias alone is a row");
    }
    assert_ne!(tables[0], tables[1], "another seed, another basis");
}

/// Sentences for [`decoder`].
struct Words;

impl Dataset for Words {
    fn len(&self) -> usize {
        6
    }

    fn name(&self, index: usize) -> String {
        format!("words {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let word = |i: usize| i64::try_from((i * 7 + index * 5 + i * index) % 20).unwrap();
        Ok(vec![Tensor::of([7], (0..7).map(word).collect())])
    }
}

/// The decoder after `learn-rotation` with `options`, which must keep its function, and what was said.
fn learned(options: &str, data: Option<&dyn Dataset>, scheme: &str) -> (Model, Vec<passes::diag::Diagnostic>) {
    learned_from(&decoder("  %y = MatMul(%cg, %et)\n"), options, data, scheme)
}

fn learned_from(
    source: &str,
    options: &str,
    data: Option<&dyn Dataset>,
    scheme: &str,
) -> (Model, Vec<passes::diag::Diagnostic>) {
    let plain = passes::text::parse(source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: data,
        scheme: passes::target::Scheme::parse(scheme).unwrap(),
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let calibrate = if data.is_some() { "calibrate, " } else { "" };
    let text = format!("infer-shapes, split-gemm, infer-shapes, {calibrate}learn-rotation{options}, drop-dead");
    let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let counts = &trace.steps.iter().find(|(name, _)| *name == "learn-rotation").unwrap().1.counts;
    assert!(format!("{counts:?}").contains("\"readers\": 4"), "{counts:?}");
    check_same(&plain, &after, executor.as_ref(), &[Tensor::of([7], vec![0_i64, 3, 19, 7, 7, 12, 1])], options);
    (after, trace.notes)
}

/// What rounding loses before and after, as the note of the model has it.
fn losses(notes: &[passes::diag::Diagnostic]) -> (f64, f64) {
    let note = notes.iter().find_map(|note| note.message.strip_prefix("what rounding loses came from ")).unwrap();
    let (before, after) = note.split_once(" to ").unwrap();
    (before.parse().unwrap(), after.parse().unwrap())
}

#[test]
fn a_learned_basis_keeps_the_function_and_rounding_loses_less_in_it() {
    for (scheme, options) in
        [("w3a16g4", ""), ("w2a16g4", "{errors=stay, seed=3}"), ("w4a4", "{sweeps=12}"), ("wfp4a16", "")]
    {
        let (_, notes) = learned(options, Some(&Words), scheme);
        let (before, after) = losses(&notes);
        assert!(after < before, "{scheme}: {before} to {after}");
        let rates = notes.iter().filter(|note| note.message.contains("utilization rate")).count();
        assert_eq!(rates, 3, "one for every norm: {notes:?}");
        let (_, notes) = learned(options, None, scheme);
        let (before, after) = losses(&notes);
        assert!(after < before, "{scheme} without samples: {before} to {after}");
        assert!(notes.iter().all(|note| !note.message.contains("utilization rate")), "{notes:?}");
    }
}

#[test]
fn a_learned_basis_is_the_same_on_any_threads() {
    let text = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| passes::text::graph(&learned("{sweeps=3}", Some(&Words), "w3a16g4").0))
    };
    assert_eq!(text(1), text(3));
}

#[test]
fn a_basis_that_cannot_be_learned_is_that_of_the_hadamard_matrix_and_says_so() {
    let plain = passes::text::parse(&decoder("  %y = MatMul(%cg, %et)\n")).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let run = |text: &str, state_budget: u64| {
        let mut cx = PassContext { state_budget, ..PassContext::new(targets::TARGETS[0], executor.as_ref()) };
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let gather = after.graph().nodes().find(|(_, node)| node.op.is("Gather")).unwrap().1;
        let table = after.graph().constant_input(gather, 0).unwrap().floats().unwrap().into_owned();
        (table, format!("{:?}", trace.notes))
    };
    let (table, notes) = run("infer-shapes, learn-rotation, drop-dead", 1000);
    assert!(notes.contains("are left; the stream is turned by the Hadamard matrix"), "{notes}");
    let (hadamard, _) = run("infer-shapes, rotate, drop-dead", 1000);
    assert!(table.iter().zip(&hadamard).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_ne!(run("infer-shapes, learn-rotation, drop-dead", u64::MAX).0, table);
}

#[test]
fn a_stream_with_another_reader_is_left_alone_and_named() {
    let both = matrix("sq", 12, 12) + "  %ww = MatMul(%bn, %sq)\n  %x4 = Add(%x3, %ww)\n  %y = MatMul(%cg, %et)\n";
    for (extra, says) in [
        ("  %k = Tanh(%x2)\n  %z = MatMul(%cg, %et)\n  %s = ReduceMean(%k)\n  %y = Add(%z, %s)\n", "without a norm"),
        (
            "  %z = MatMul(%cg, %et)\n  %k = Softmax(%cg)\n  %s = ReduceMean(%k)\n  %y = Add(%z, %s)\n",
            "something other than products",
        ),
        (both.as_str(), "writes to it at once"),
    ] {
        let plain = passes::text::parse(&decoder(extra)).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
        let pipeline = Pipeline::parse("infer-shapes, rotate", &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        assert_eq!(after.graph().nodes().count(), plain.graph().nodes().count(), "{says}");
        assert!(trace.notes.iter().any(|note| note.message.contains(says)), "{says}: {:?}", trace.notes);
    }
}

/// A decoder of one layer with layer norms as one operator each or written out: tables for tokens and positions, `Gemm`s behind reshapes as GPT-2
/// has them, products with a bias and without, and a head that is tied to the embedding.
fn layer_normed(whole: bool, middle: &str, last: &str) -> String {
    let norm = |x: &str, n: &str| {
        if whole {
            return format!("  %{n}n = LayerNormalization({x}, %g, %s) {{axis=-1, epsilon=0.001}}\n");
        }
        format!(
            "  %{n}m = ReduceMean({x}, %last)\n  %{n}d = Sub({x}, %{n}m)\n  %{n}p = Pow(%{n}d, %two)\n  %{n}v = ReduceMean(%{n}p, %last)\n  \
             %{n}e = Add(%{n}v, %eps)\n  %{n}r = Sqrt(%{n}e)\n  %{n}z = Div(%{n}d, %{n}r)\n  %{n}g = Mul(%{n}z, %g)\n  %{n}n = Add(%{n}g, %s)\n"
        )
    };
    format!(
        "opset 21\ngraph (%i: i64[7]) -> (%y) {{\n{}{}{}{}{}{}{}  %two = const f32[] [2]\n  %zero = const i64[1] [0]\n  %one = const i64[1] [1]\n  %eps = const f32[] [0.001]\n  %last = const i64[1] [-1]\n  \
         %j = const i64[7] [0, 1, 2, 3, 4, 5, 6]\n  %flat = const i64[2] [-1, 12]\n  \
         %g = const f32[12] [1, 2, 3, 4, -5, 6, 0, 8, 9, 1, 2, 30]\n  %s = const f32[12] [1, 0, -2, 0, 0.5, 0, 3, 0, 0, 2, 0, 0]\n  \
         %b = const f32[12] [1, 0, 0, 0, 9, 0, 0, 0, 0, 2, 0, 0]\n  %bq = const f32[8] [1, 2, 0, 0, -1, 0, 0, 3]\n  \
         %bu = const f32[16] [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -2]\n  \
         %t = Gather(%e, %i)\n  %p = Gather(%pos, %j)\n  %x = Add(%t, %p)\n{}  %q = MatMul(%an, %wq)\n  %qb = Add(%q, %bq)\n  %v = MatMul(%an, %wv)\n  \
         %f = Sigmoid(%qb)\n  %h = Mul(%f, %v)\n  %o = MatMul(%h, %wo)\n  %ob = Add(%o, %b)\n{middle}{}  %sa = Shape(%bn)\n  %sb = Slice(%sa, %zero, %one)\n  %sw = const i64[1] [12]\n  %sh = Concat(%sb, %sw) {{axis=0}}\n  %bf = Reshape(%bn, %flat)\n  \
         %u = Gemm(%bf, %wu, %bu) {{transB=1}}\n  %r = Relu(%u)\n  %d = Gemm(%r, %wd, %b)\n  %df = Reshape(%d, %sh)\n  %x3 = Add(%df, %x2)\n{}  \
         %et = Transpose(%e) {{perm=[1, 0]}}\n{last}}}\n",
        matrix("e", 20, 12),
        matrix("pos", 7, 12),
        matrix("wq", 12, 8),
        matrix("wv", 12, 8),
        matrix("wo", 8, 12),
        matrix("wu", 16, 12),
        matrix("wd", 16, 12),
        norm("%x", "a"),
        norm("%x2", "b"),
        norm("%x3", "c"),
    )
}
const SUM: &str = "  %x2 = Add(%x, %ob)\n";
const HEAD: &str = "  %y = MatMul(%cn, %et)\n";

/// `source` before and after `text`, the latter with what was counted and noted.
fn ran(source: &str, text: &str) -> (Model, Model, String) {
    let plain = passes::text::parse(source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
    let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let steps: Vec<_> = trace.steps.iter().map(|(name, step)| (name, &step.counts)).collect();
    (plain, after, format!("{steps:?}{:?}", trace.notes))
}

#[test]
fn a_decoder_with_layer_norms_keeps_its_function_and_loses_gains_and_shifts() {
    // The last norm as a root mean square one: a basis that keeps means serves both.
    let mean_square = "  %cp = Pow(%x3, %two)\n  %cv = ReduceMean(%cp, %last)\n  %ce = Add(%cv, %eps)\n  %cr = Sqrt(%ce)\n  \
                       %cq = Div(%x3, %cr)\n  %cn = Mul(%cq, %g)\n";
    let (one, several) = (layer_normed(true, SUM, HEAD), layer_normed(false, SUM, HEAD));
    let layer = "  %cn = LayerNormalization(%x3, %g, %s) {axis=-1, epsilon=0.001}\n";
    let mixed = one.replace(layer, mean_square);
    assert_ne!(one, mixed);
    // Positions that were folded into rows.
    let rows = one.replace("  %p = Gather(%pos, %j)\n", "").replace("%x = Add(%t, %p)", "%x = Add(%pos, %t)");
    let last = one.replace(
        HEAD,
        "  %k = const i64[] [-1]\n  %ck = Gather(%cn, %k)\n  %cu = Unsqueeze(%ck, %zero)\n  %y = MatMul(%cu, %et)\n",
    );
    // A square as a product, a shift behind a root mean square, and the last token taken before its norm.
    let product = mixed
        .replace("%cp = Pow(%x3, %two)", "%cp = Mul(%x3, %x3)")
        .replace("%cn = Mul(%cq, %g)\n", "%cg = Mul(%cq, %g)\n  %cn = Add(%cg, %s)\n");
    let before = one.replace(
        layer,
        &format!(
            "  %k = const i64[] [-1]\n  %xk = Gather(%x3, %k)\n  %xu = Unsqueeze(%xk, %zero)\n{}",
            layer.replace("%x3", "%xu")
        ),
    );
    assert!(product != mixed && before != one);
    let all = [(&one, 9), (&several, 12), (&mixed, 9), (&rows, 9), (&last, 9), (&product, 10), (&before, 9)];
    for (source, adds) in all {
        let text = "infer-shapes, split-gemm, infer-shapes, rotate, infer-shapes, drop-dead";
        let (plain, after, said) = ran(source, text);
        assert!(said.contains("\"readers\": 4, \"streams\": 1"), "{said}");
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        check_same(
            &plain,
            &after,
            executor.as_ref(),
            &[Tensor::of([7], vec![0_i64, 3, 19, 7, 7, 12, 1])],
            "layer norms",
        );
        let graph = after.graph();
        let count = |op: &str| graph.nodes().filter(|(_, node)| node.op.is(op)).count();
        // Sums, biases, of which two are new where the last norm has a shift, and one of ε for every norm that is written out.
        assert_eq!((count("Transpose"), count("MatMul"), count("Add")), (0, 6, adds), "{source}");
        let bare = |node: &passes::ir::Node| {
            let ones = graph.constant_input(node, 1).unwrap().floats().unwrap();
            node.inputs.len() == 2 && ones.iter().all(|v| (v - 1.0).abs() < 1e-9)
        };
        assert!(graph.nodes().all(|(_, node)| !node.op.is("LayerNormalization") || bare(node)));
        let sums = |model: &Model| {
            let graph = model.graph();
            let gather = graph.nodes().find(|(_, node)| node.op.is("Gather")).unwrap().1;
            let table = graph.constant_input(gather, 0).unwrap().floats().unwrap().into_owned();
            (table.chunks(12).map(|row| row.iter().sum::<f32>()).collect::<Vec<f32>>(), table)
        };
        let ((before, table), (after_sums, turned)) = (sums(&plain), sums(&after));
        assert!(before.iter().zip(&after_sums).all(|(a, b)| (a - b).abs() < 1e-5), "means of rows stay");
        assert_ne!(table, turned);
        let executor = (exec::find("rten").unwrap().build)(&after.meta).unwrap();
        let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
        let again = Pipeline::parse("rotate", &passes::catalogue::passes()).unwrap();
        let (twice, _) = PassManager::new(Vec::new(), true).run(&again, after.clone(), &mut cx).unwrap();
        assert_eq!(passes::text::graph(&twice), passes::text::graph(&after), "once is enough");
    }
}

#[test]
fn a_basis_learned_for_layer_norms_keeps_the_function_and_rounding_loses_less_in_it() {
    for whole in [true, false] {
        for data in [Some(&Words as &dyn Dataset), None] {
            let source = layer_normed(whole, SUM, HEAD);
            let (after, notes) = learned_from(&source, "{sweeps=8}", data, "w3a16g4");
            let (before, last) = losses(&notes);
            assert!(last < before, "{whole}: {before} to {last}");
            let rates = notes.iter().filter(|note| note.message.contains("utilization rate")).count();
            assert_eq!(rates, if data.is_some() { 3 } else { 0 }, "{notes:?}");
            drop(after);
        }
    }
}

#[test]
fn moments_of_a_layer_norm_are_those_behind_its_gain_and_shift_taken_away() {
    // Whole or written out, the same moments: the same basis, to what f32 leaves of it.
    let table = |whole: bool| {
        let (after, notes) = learned_from(
            &layer_normed(whole, SUM, HEAD).replace("6, 0, 8", "6, 0.5, 8"),
            "{sweeps=1}",
            Some(&Words),
            "w3a16g4",
        );
        (losses(&notes), after)
    };
    let ((whole, written), (other, _)) = (table(true).0, table(false));
    assert!(
        (whole - other.0).abs() < 1e-4 * whole && (written - other.1).abs() < 1e-3 * written,
        "{whole} {written} {other:?}"
    );
}

#[test]
fn layer_norms_that_cannot_be_turned_are_named() {
    let softmax = "  %z = MatMul(%cn, %et)\n  %k = Softmax(%cn)\n  %m = ReduceMean(%k)\n  %y = Add(%z, %m)\n";
    let beside = "  %k = Tanh(%x3)\n  %n = ReduceMean(%k)\n  %z = MatMul(%cn, %et)\n  %y = Add(%z, %n)\n";
    let computed = "  %w = Add(%et, %q0)\n  %y = MatMul(%cn, %w)\n";
    for (middle, last, says) in [
        (SUM, softmax, "something other than products"),
        ("  %x2 = Add(%an, %ob)\n", HEAD, "hands what it norms on to a sum"),
        (SUM, computed, "a weight that is no constant matrix"),
        (SUM, beside, "without a norm"),
    ] {
        for whole in [true, false] {
            let source = layer_normed(whole, middle, last)
                .replace("%q0", "%f0")
                .replace("  %h = Mul", "  %f0 = ReduceMean(%f)\n  %h = Mul");
            let (plain, after, said) = ran(&source, "infer-shapes, split-gemm, infer-shapes, rotate");
            assert!(said.contains(says), "{says}: {said}");
            let gains = |model: &Model| {
                model
                    .graph()
                    .nodes()
                    .filter(|(_, node)| node.op.is("LayerNormalization") && node.inputs.len() == 3)
                    .count()
            };
            assert_eq!(gains(&plain), gains(&after));
        }
    }
}

/// Two inverted residuals without their activations in front of a head: one bottleneck of 12 channels, one of 4 behind an average.
fn bottlenecks(between: &str, groups: usize) -> String {
    let tensor = |name: &str, shape: [usize; 4]| {
        let [o, i, kh, kw] = shape;
        format!("  %{name} = const f32[{o},{i},{kh},{kw}] rand(seed={}, std=0.4)\n", o + 7 * i + kh)
    };
    let rows = |name: &str, n: usize| format!("  %{name} = const f32[{n}] rand(seed={n}, std=1.0)\n");
    format!(
        "opset 21\ngraph (%i: f32[2,3,6,6]) -> (%y) {{\n{}{}{}{}{}{}{}  %a = Conv(%i, %wa, %ba)\n  %r = Relu(%a)\n  %x = Conv(%r, %wx, %bx)\n  \
         %b = Conv(%x, %wb) {{pads=[1, 1, 1, 1]}}\n  %s = Relu(%b)\n  %c = Conv(%s, %wc) {{group={groups}}}\n  %z = {between}\n  \
         %p = AveragePool(%z) {{kernel_shape=[2, 2], strides=[2, 2]}}\n  %d = Conv(%p, %wd)\n  %y = Conv(%d, %we)\n}}\n",
        tensor("wa", [8, 3, 1, 1]),
        rows("ba", 8),
        tensor("wx", [12, 8, 1, 1]),
        rows("bx", 12),
        tensor("wb", [16, 12, 3, 3]),
        tensor("wc", [12, 16 / groups, 1, 1]),
        tensor("wd", [4, 12, 1, 1]) + &tensor("we", [5, 4, 1, 1]),
    )
}

#[test]
fn linear_bottlenecks_turn_and_others_stay() {
    let feeds =
        [Tensor::of([2, 3, 6, 6], (0..216_u16).map(|i| f32::from(i * 37 % 101) / 50.0 - 1.0).collect::<Vec<f32>>())];
    let cases = [
        ("Add(%x, %c)", 1, 2, "one basis for a sum"),
        ("Relu(%c)", 1, 2, "not what a Relu looks at"),
        ("Add(%x, %c)", 4, 1, "not what groups write"),
    ];
    for (between, groups, turned, why) in cases {
        let plain = passes::text::parse(&bottlenecks(between, groups)).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
        let text = "infer-shapes, rotate-bottlenecks{seed=5}, infer-shapes, drop-dead";
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let counts = &trace.steps.iter().find(|(name, _)| *name == "rotate-bottlenecks").unwrap().1.counts;
        assert_eq!(counts.get("bottlenecks"), Some(&turned), "{why}: {counts:?}");
        check_same(&plain, &after, executor.as_ref(), &feeds, why);
        let weights = |model: &Model| {
            let graph = model.graph();
            let convolutions = graph.nodes().filter(|(_, node)| node.op.is("Conv"));
            convolutions.map(|(_, node)| graph.constant_input(node, 1).unwrap().digest()).collect::<Vec<u32>>()
        };
        let kept = |name: &str| {
            let names = [(name.to_owned(), "--keep-float".to_owned())].into_iter().collect();
            let mut cx = PassContext { keep_float: &names, ..PassContext::new(targets::TARGETS[0], executor.as_ref()) };
            weights(&PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap().0)
        };
        assert_eq!(kept("wd")[4..], weights(&plain)[4..], "{why}: what stays in float keeps its name, and its numbers");
        let (before, after) = (weights(&plain), weights(&after));
        let same = |at: usize| before[at] == after[at];
        assert!(same(0) && !same(5), "{why}: what reads inputs stays, what reads %d does not");
        assert_eq!(same(3), between.starts_with("Relu") || groups > 1, "{why}");
    }
}
