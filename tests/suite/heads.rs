//! What attention heads hand on, in another basis or in other units.

use onnx_quant::{exec, targets};
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::tensor::Tensor;

use super::attention::Tokens;
use super::equalize::{divided, matrix, same_within};

/// The same numbers every time, of any shape.
fn numbers(shape: &[usize]) -> Tensor {
    Tensor::of(shape, (0..shape.iter().product()).map(|i| (i * 7919 % 2003) as f32 / 1001.5 - 1.0).collect())
}

/// [`matrix`] with a column that is 40 times as loud as the others.
pub(super) fn loud(name: &str, rows: usize, columns: usize) -> String {
    let value = |i: usize| f64::from(u32::try_from((i * 31) % 41).unwrap()) / 20.0 - 1.0;
    let of = |i: usize| format!("{:.3}", if i % columns == 3 { 40.0 * value(i) } else { value(i) });
    let values: Vec<String> = (0..rows * columns).map(of).collect();
    format!("  %{name} = const f32[{rows},{columns}] [{}]\n", values.join(", "))
}

/// Two heads of 8, with a bias behind the values; `back` brings them back, `open` has shapes computed from the input's, as exporters do.
fn attention(values: &str, back: &str, end: &str, outputs: &str, open: bool) -> String {
    let shapes = if open {
        "  %lead = Shape(%x) {end=2}\n  %heads = const i64[2] [2, 8]\n  %all = const i64[1] [16]\n  \
         %split = Concat(%lead, %heads) {axis=0}\n  %join = Concat(%lead, %all) {axis=0}\n"
    } else {
        "  %split = const i64[4] [0, 0, 2, 8]\n  %join = const i64[3] [-1, 512, 16]\n"
    };
    format!(
        "opset 21\ngraph (%x: f32[{}]) -> ({outputs}) {{\n{}{}{values}{}  %bias = const f32[16] [{}]\n{shapes}  \
         %qs = MatMul(%x, %wq)\n  %qr = Reshape(%qs, %split)\n  %q = Transpose(%qr) {{perm=[0, 2, 1, 3]}}\n  \
         %ks = MatMul(%x, %wkk)\n  %kr = Reshape(%ks, %split)\n  %k = Transpose(%kr) {{perm=[0, 2, 3, 1]}}\n  \
         %vs = MatMul(%x, %wvvv)\n  %vb = Add(%vs, %bias)\n  %vr = Reshape(%vb, %split)\n  %v = Transpose(%vr) {{perm=[0, 2, 1, 3]}}\n  \
         %s = MatMul(%q, %k)\n  %p = Softmax(%s) {{axis=-1}}\n  %o = MatMul(%p, %v)\n  \
         %ot = Transpose(%o) {{perm={back}}}\n  %oj = Reshape(%ot, %join)\n{end}}}\n",
        if open { "batch,seq,16" } else { "2,512,16" },
        matrix("wq", 16, 16),
        matrix("wkk", 16, 16),
        matrix("woooo", 16, 24),
        (0..16).map(|i| format!("{}", f64::from(i) * 0.1)).collect::<Vec<_>>().join(", "),
    )
}

const HOME: &str = "[0, 2, 1, 3]";
const READ: &str = "  %y = MatMul(%oj, %woooo)\n";

/// Two heads of queries that share the values of one.
fn grouped(values: &str, end: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[2,512,16]) -> (%y) {{\n{}{values}{}  %q2 = const i64[4] [0, 0, 2, 8]\n  %v1 = const i64[4] [0, 0, 1, 8]\n  \
         %two = const i64[1] [2]\n  %copies = const i64[5] [2, 1, 2, 512, 8]\n  %all = const i64[4] [2, 2, 512, 8]\n  \
         %join = const i64[3] [0, 0, 16]\n  %qs = MatMul(%x, %wq)\n  %qr = Reshape(%qs, %q2)\n  \
         %q = Transpose(%qr) {{perm=[0, 2, 1, 3]}}\n  %k = Transpose(%qr) {{perm=[0, 2, 3, 1]}}\n  %s = MatMul(%q, %k)\n  \
         %p = Softmax(%s) {{axis=-1}}\n  %vs = MatMul(%x, %wvvv)\n  %vr = Reshape(%vs, %v1)\n  \
         %vt = Transpose(%vr) {{perm=[0, 2, 1, 3]}}\n  %vu = Unsqueeze(%vt, %two)\n  %ve = Expand(%vu, %copies)\n  \
         %v = Reshape(%ve, %all)\n  %o = MatMul(%p, %v)\n  %ot = Transpose(%o) {{perm=[0, 2, 1, 3]}}\n  \
         %oj = Reshape(%ot, %join)\n{end}}}\n",
        matrix("wq", 16, 16),
        matrix("woooo", 16, 6)
    )
}

/// How many products `rotate-heads` turns in `source`, which must compute the same from `feeds` before and after; and what comes of it.
fn turned(source: &str, feeds: &[Tensor]) -> (u64, Model) {
    let parsed = passes::text::parse(source).unwrap();
    let executor = (exec::find("auto").unwrap().build)(&parsed.meta).unwrap();
    let mut cx = PassContext::new(targets::find("onnx-qdq").unwrap(), executor.as_ref());
    let pipeline = Pipeline::parse("infer-shapes, rotate-heads, drop-dead", &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, parsed.clone(), &mut cx).unwrap();
    let counts = &trace.steps.iter().find(|(name, _)| *name == "rotate-heads").unwrap().1.counts;
    same_within(&parsed, &after, executor.as_ref(), feeds, 1e-5, source);
    (counts.get("heads").copied().unwrap_or(0), after)
}

#[test]
fn turned_heads_keep_the_function() {
    let heads = |end: &str, outputs: &str, open: bool| {
        turned(&attention(&matrix("wvvv", 16, 16), HOME, end, outputs, open), &[numbers(&[2, 512, 16])])
    };
    let (count, after) = heads(READ, "%y", false);
    assert_eq!(count, 1);
    assert_eq!(heads(READ, "%y", true).0, 1);
    let names: Vec<String> = after.graph().value_ids().map(|v| after.graph().value(v).name.to_string()).collect();
    assert!(names.iter().any(|name| name == "wvvv.turned") && names.iter().any(|name| name == "woooo.turned"));
    // Something else reads what attention made of the values, or the values themselves.
    assert_eq!(heads(&format!("{READ}  %z = Relu(%oj)\n"), "%y, %z", false).0, 0);
    assert_eq!(heads(&format!("{READ}  %z = Relu(%vb)\n"), "%y, %z", false).0, 0);
    assert_eq!(heads("  %r = Relu(%oj)\n  %y = MatMul(%r, %woooo)\n", "%y", false).0, 0);
}

/// Copies are turned as what they are copies of is, in runs of a head.
#[test]
fn heads_that_share_values_are_turned_together() {
    let feeds = [numbers(&[2, 512, 16])];
    let values = matrix("wvvv", 16, 8);
    let (count, after) = turned(&grouped(&values, READ), &feeds);
    assert_eq!(count, 1);
    let name = |node: &passes::ir::Node| node.output(0).map(|v| after.graph().value(v).name.to_string());
    let copies: Vec<_> = after.graph().nodes().filter(|(_, node)| node.op.is("Expand")).map(|(_, n)| name(n)).collect();
    assert_eq!(copies, [Some("ve.turned".to_owned())]);
    // A bias behind the join is added to what is turned back.
    assert_eq!(turned(&grouped(&values, "  %z = MatMul(%oj, %woooo)\n  %y = Relu(%z)\n"), &feeds).0, 1);
}

/// What looks like values of heads and is not: each would compute something else.
#[test]
fn rows_that_are_summed_over_or_cut_are_not_turned() {
    let feeds = |shapes: &[&[usize]]| -> Vec<Tensor> { shapes.iter().map(|shape| numbers(shape)).collect() };
    let of = |inputs: &str, body: &str| {
        format!(
            "opset 21\ngraph ({inputs}) -> (%y) {{\n{}{}{}{body}}}\n",
            matrix("wq", 16, 16),
            matrix("wvvv", 16, 16),
            matrix("woooo", 16, 3)
        )
    };
    // A row alone is summed over itself; as a column of rows it is not.
    let row = "  %p = MatMul(%x, %wq)\n  %v = MatMul(%u, %wvvv)\n  %o = MatMul(%p, %v)\n  %y = MatMul(%o, %woooo)\n";
    let inputs = |u: &str| format!("%x: f32[16,16], %u: f32[{u}]");
    assert_eq!(turned(&of(&inputs("16"), row), &feeds(&[&[16, 16], &[16]])).0, 0);
    assert_eq!(turned(&of(&inputs("16,16"), row), &feeds(&[&[16, 16], &[16, 16]])).0, 1);
    // Values on the left are summed over their channels.
    let left = "  %p = MatMul(%x, %wq)\n  %v = MatMul(%u, %wvvv)\n  %o = MatMul(%v, %p)\n  %y = MatMul(%o, %woooo)\n";
    let (_, after) = turned(&of(&inputs("16,16"), left), &feeds(&[&[16, 16], &[16, 16]]));
    let all = after.graph().value_ids().map(|v| after.graph().value(v).name.to_string());
    let turned_names: Vec<String> = all.filter(|name| name.ends_with(".turned")).collect();
    assert!(!turned_names.contains(&"wvvv.turned".to_owned()), "{turned_names:?}");
    assert!(turned_names.contains(&"wq.turned".to_owned()), "the other operand is what is handed on: {turned_names:?}");
    // A transposition before the product makes rows of channels.
    let flat = "  %p = MatMul(%x, %wq)\n  %v = MatMul(%u, %wvvv)\n  %t = Transpose(%v) {perm=[1, 0]}\n  %o = MatMul(%p, %t)\n  \
                %y = MatMul(%o, %woooo)\n";
    assert_eq!(turned(&of(&inputs("16,16"), flat), &feeds(&[&[16, 16], &[16, 16]])).0, 0);
    // So does a reshape that cuts what a head hands on.
    let cut = "  %p = MatMul(%x, %wq)\n  %v = MatMul(%u, %wvvv)\n  %o = MatMul(%p, %v)\n  %to = const i64[2] [32, 8]\n  \
               %back = const i64[2] [16, 16]\n  %c = Reshape(%o, %to)\n  %s = Softmax(%c)\n  %d = Reshape(%s, %back)\n  \
               %y = MatMul(%d, %woooo)\n";
    assert_eq!(turned(&of(&inputs("16,16"), cut), &feeds(&[&[16, 16], &[16, 16]])).0, 0);
}

/// Those for [`attention`] and [`grouped`].
const TOKENS: Tokens = Tokens(&[2, 512, 16]);

/// The factors of the rows of what reads attention, as `after` has them beside `before`.
fn factors(before: &Model, after: &Model) -> Vec<f32> {
    let weight = |model: &Model, name: &str| {
        let graph = model.graph();
        let value = graph.value_ids().find(|v| *graph.value(*v).name == *name)?;
        let tensor = graph.constant(value)?;
        let sizes = |row: &[f32]| row.iter().map(|w| w.abs()).sum();
        Some(tensor.floats()?.chunks(tensor.shape()[1]).map(sizes).collect::<Vec<f32>>())
    };
    let (before, after) = (weight(before, "woooo").unwrap(), weight(after, "woooo.smoothed").unwrap());
    before.iter().zip(&after).map(|(b, a)| a / b).collect()
}

/// What attention makes of a loud channel of values is divided by dividing the values, and no node is added.
#[test]
fn values_take_the_division_of_what_attention_makes_of_them() {
    for (pass, scheme) in
        [("smooth", "w8a8"), ("awq", "w4a16g8"), ("learn-scaling", "w4a4"), ("learn-scaling", "w4a16g8")]
    {
        let of = |open: bool| attention(&loud("wvvv", 16, 16), HOME, READ, "%y", open);
        // What a sign is taken of is known to no one.
        let unknown = of(true)
            .replace(
                "%split = Concat(%lead, %heads) {axis=0}\n",
                "%splits = Concat(%lead, %heads) {axis=0}\n  %split = Abs(%splits)\n",
            )
            .replace(
                "%join = Concat(%lead, %all) {axis=0}\n",
                "%joins = Concat(%lead, %all) {axis=0}\n  %join = Abs(%joins)\n",
            );
        for source in [of(false), of(true)] {
            let (before, after, counts) = divided(&source, &TOKENS, pass, scheme);
            assert!(counts.contains("\"folded\": 1") && !counts.contains("inserted"), "{pass} {scheme}: {counts}");
            assert_eq!(after.graph().nodes().count(), before.graph().nodes().count(), "{pass}");
            let factors = factors(&before, &after);
            assert!(factors[3] > 1.5 * factors[4], "{pass} {scheme}: {factors:?}");
            // Heads in their order have factors of their own.
            let apart = factors[..8].iter().zip(&factors[8..16]).any(|(a, b)| (a / b - 1.0).abs() > 1e-3);
            assert!(apart, "{pass} {scheme}: {factors:?}");
        }
        let (.., counts) = divided(&unknown, &TOKENS, pass, scheme);
        assert!(!counts.contains("folded"), "{pass} {scheme}: {counts}");
    }
}

#[test]
fn heads_that_share_values_or_change_places_share_factors() {
    // Two pictures of a batch change places with two heads: what is read are the same channels of both.
    let mixed = attention(&loud("wvvv", 16, 16), "[1, 2, 0, 3]", READ, "%y", false);
    for source in [grouped(&loud("wvvv", 16, 8), READ), mixed] {
        for (pass, scheme) in [("smooth", "w8a8"), ("awq", "w4a16g8"), ("learn-scaling", "w4a4")] {
            let (before, after, counts) = divided(&source, &TOKENS, pass, scheme);
            assert!(counts.contains("\"folded\": 1"), "{pass}: {counts}");
            let factors = factors(&before, &after);
            assert!((0..8).all(|j| (factors[j + 8] / factors[j] - 1.0).abs() < 1e-3), "{pass}: {factors:?}");
            assert!(factors[3] > 1.5 * factors[4], "{pass}: {factors:?}");
        }
    }
}

/// A bias of a head's size behind the split is divided too, by factors that heads share.
#[test]
fn a_bias_of_one_head_keeps_heads_from_factors_of_their_own() {
    let source = attention(&loud("wvvv", 16, 16), HOME, READ, "%y", false)
        .replace(
            "  %vb = Add(%vs, %bias)\n  %vr = Reshape(%vb, %split)\n",
            "  %vh = Reshape(%vs, %split)\n  %vr = Add(%vh, %of)\n",
        )
        .replace("  %split =", "  %of = const f32[8] [1, 2, 3, 4, 5, 6, 7, 8]\n  %split =");
    let (before, after, counts) = divided(&source, &TOKENS, "smooth", "w8a8");
    assert!(counts.contains("\"folded\": 1"), "{counts}");
    let factors = factors(&before, &after);
    assert!((0..8).all(|j| (factors[j + 8] / factors[j] - 1.0).abs() < 1e-3), "{factors:?}");
}

/// Behind a norm both tensors of attention are divided, in as many rounds as that takes, and no node is added.
#[test]
fn what_waits_for_a_round_gets_no_node() {
    let norm = "  %g = const f32[16] [1, 1, 1, 30, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n  %n = LayerNormalization(%x, %g) {axis=-1}\n";
    let source = attention(&loud("wvvv", 16, 16), HOME, READ, "%y", false);
    let (head, body) = source.split_once("  %qs = ").unwrap();
    let source = format!("{head}{norm}  %qs = {}", body.replace("MatMul(%x,", "MatMul(%n,"));
    for (pass, scheme) in [("smooth", "w8a8"), ("learn-scaling", "w4a4")] {
        let (before, after, counts) = divided(&source, &TOKENS, pass, scheme);
        assert!(!counts.contains("inserted") && counts.contains("\"folded\": 2"), "{pass}: {counts}");
        assert_eq!(after.graph().nodes().count(), before.graph().nodes().count(), "{pass}");
    }
}

/// Products that do not fit what they read are left as they are.
#[test]
fn a_weight_of_another_width_is_left_alone() {
    let source = format!(
        "opset 21\ngraph (%x: f32[2,512,16]) -> (%y, %z) {{\n{}{}  %y = MatMul(%x, %wgood)\n  %z = MatMul(%x, %wbadd)\n}}\n",
        matrix("wgood", 16, 8),
        matrix("wbadd", 17, 8)
    );
    for (pass, scheme) in
        [("smooth", "w8a8"), ("awq", "w4a16g8"), ("learn-scaling", "w4a16g8"), ("learn-scaling{errors=stay}", "w4a4")]
    {
        let plain = passes::text::parse(&source).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext {
            dataset: Some(&TOKENS),
            scheme: passes::target::Scheme::parse(scheme).unwrap(),
            ..PassContext::new(targets::TARGETS[0], executor.as_ref())
        };
        let pipeline = Pipeline::parse(&format!("calibrate, {pass}"), &passes::catalogue::passes()).unwrap();
        // Whoever runs the product may refuse it; nobody may panic, or scale half of a group.
        let ran = PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx);
        let is_new = |model: &Model, value| model.graph().value(value).name.ends_with(".smoothed");
        assert!(
            ran.is_err() || ran.is_ok_and(|(after, _)| !after.graph().value_ids().any(|v| is_new(&after, v))),
            "{pass}"
        );
    }
}

#[test]
fn learned_factors_are_the_same_on_any_threads() {
    let source = attention(&loud("wvvv", 16, 16), HOME, READ, "%y", false);
    let text = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| passes::text::graph(&divided(&source, &TOKENS, "learn-scaling", "w3a8").1))
    };
    assert_eq!(text(1), text(3));
}

#[test]
fn factors_that_memory_does_not_hold_are_named() {
    let plain = passes::text::parse(&attention(&loud("wvvv", 16, 16), HOME, READ, "%y", false)).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: Some(&TOKENS),
        scheme: passes::target::Scheme::parse("w4a4").unwrap(),
        state_budget: 10_000,
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let pipeline = Pipeline::parse("infer-shapes, calibrate, learn-scaling", &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let is_new = |value| after.graph().value(value).name.ends_with(".smoothed");
    assert!(!after.graph().value_ids().any(is_new));
    assert!(trace.notes.iter().any(|note| note.message.contains("MB are left")), "{:?}", trace.notes);
}
