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
    let plain = passes::text::parse(&decoder("  %y = MatMul(%cg, %et)\n")).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: data,
        scheme: passes::target::Scheme::parse(scheme).unwrap(),
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let calibrate = if data.is_some() { "calibrate, " } else { "" };
    let text = format!("infer-shapes, {calibrate}learn-rotation{options}, drop-dead");
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
        (
            "  %k = Tanh(%x2)\n  %z = MatMul(%cg, %et)\n  %s = ReduceMean(%k)\n  %y = Add(%z, %s)\n",
            "without a root mean square norm",
        ),
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
