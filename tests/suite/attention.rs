//! Attention in few codes: divided behind its product, and written by its logarithm.

use onnx_quant::{exec, targets};
use passes::exec::{DataError, Dataset};
use passes::model::Plan;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::tensor::Tensor;

use super::equalize::{divided, matrix};

/// Attention over 24 tokens; `%p` is what `softmax` makes of the scores, and `reader` goes on from it.
fn attention(softmax: &str, reader: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[24,12]) -> (%y) {{\n{}{}{}  %q = MatMul(%x, %wq)\n  %k = MatMul(%x, %wk)\n  %v = MatMul(%x, %wv)\n  \
         %kt = Transpose(%k) {{perm=[1, 0]}}\n  %s = MatMul(%q, %kt)\n  %p = Softmax(%s) {{{softmax}}}\n{reader}}}\n",
        matrix("wq", 12, 8),
        matrix("wk", 12, 8),
        matrix("wv", 12, 8),
    )
}

/// Some tokens, of this shape.
#[derive(Debug)]
pub(super) struct Tokens(pub(super) &'static [usize]);

/// Those for [`attention`].
const TOKENS: Tokens = Tokens(&[24, 12]);

impl Dataset for Tokens {
    fn len(&self) -> usize {
        3
    }

    fn name(&self, index: usize) -> String {
        format!("tokens {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| ((i * 7919 + index * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        Ok(vec![Tensor::of(self.0, (0..self.0.iter().product()).map(value).collect())])
    }
}

const READ: &str = "  %y = MatMul(%p, %v)\n";

#[test]
fn attention_is_divided_behind_its_product_where_only_that_reads_it() {
    for axis in ["axis=-1", "axis=1", ""] {
        let (_, after, counts) = divided(&attention(axis, READ), &TOKENS, "defer-softmax", "w4a4");
        let count = |op: &str| after.graph().nodes().filter(|(_, node)| node.op.is(op)).count();
        assert!(counts.contains("\"softmaxes\": 1"), "{counts}");
        assert_eq!(["Softmax", "Exp", "Div", "MatMul"].map(count), [0, 1, 1, 5]);
        assert!(
            after
                .graph()
                .nodes()
                .any(|(_, node)| node.op.is("Div") && node.output(0) == after.graph().outputs().first().copied())
        );
    }
    for (axis, reader) in [
        ("axis=0", READ),
        ("axis=-1", "  %t = MatMul(%p, %v)\n  %m = ReduceSum(%p) {keepdims=1}\n  %y = Add(%t, %m)\n"),
        (
            "axis=-1",
            "  %ones = const f32[8] [1, 1, 1, 1, 1, 1, 1, 1]\n  %vv = MatMul(%v, %ones)\n  %y = MatMul(%p, %vv)\n",
        ),
        ("axis=-1", "  %vt = Transpose(%v) {perm=[1, 0]}\n  %y = MatMul(%vt, %p)\n"),
    ] {
        let (_, after, counts) = divided(&attention(axis, reader), &TOKENS, "defer-softmax", "w4a4");
        assert!(after.graph().nodes().any(|(_, node)| node.op.is("Softmax")), "{reader}: {counts}");
    }
}

/// A token that is masked has no weight at all, however few the codes: other numbers in the future change no bit of the past.
#[test]
fn few_codes_of_attention_keep_masks() {
    let hidden: Vec<&str> = (0..24 * 24).map(|at| if at % 24 > at / 24 { "-10000" } else { "0" }).collect();
    let mask = format!("  %mask = const f32[24,24] [{}]\n", hidden.join(", "));
    let source = attention("axis=-1", READ)
        .replace("  %p = Softmax(%s)", &format!("{mask}  %h = Add(%s, %mask)\n  %p = Softmax(%h)"));
    let plain = passes::text::parse(&source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: Some(&TOKENS),
        scheme: passes::target::Scheme::parse("w4a4").unwrap(),
        ..PassContext::new(targets::find("onnx-qdq").unwrap(), executor.as_ref())
    };
    let text = "infer-shapes, defer-softmax, drop-dead, calibrate, assign-encodings, round";
    let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
    let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx).unwrap();
    let graph = model.graph();
    assert!(graph.nodes().any(|(id, node)| node.op.is("Exp") && model.plan().encoding_of_use(graph, id, 0).is_some()));
    let run = Simulation::prepare(graph, model.plan(), executor.as_ref(), graph.outputs()).unwrap();
    let sample = TOKENS.sample(0).unwrap().remove(0);
    let mut other = sample.floats().unwrap().into_owned();
    other[12 * 12..].iter_mut().for_each(|value| *value = -*value);
    let other = Tensor::of([24, 12], other);
    let [a, b] = [sample, other].map(|feed| run.run(&[feed]).unwrap().remove(0).floats().unwrap().into_owned());
    assert!(a[..12 * 8] == b[..12 * 8] && a[12 * 8..] != b[12 * 8..], "the past depends on the future");
}

/// In four bits exponentials are written by their logarithm, in front of `Exp`; in eight the product reads codes of themselves.
#[test]
fn few_codes_of_attention_are_even_in_the_logarithm() {
    let plain = passes::text::parse(&attention("axis=-1", READ)).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    // Only what reads the weights of attention is in codes.
    let kept = ["q", "k", "s"].map(|name| (name.to_owned(), name.to_owned())).into_iter().collect();
    let decibels = |scheme: &str, defer: &str| {
        let mut cx = PassContext {
            keep_float: &kept,
            dataset: Some(&TOKENS),
            scheme: passes::target::Scheme::parse(scheme).unwrap(),
            ..PassContext::new(targets::find("onnx-qdq").unwrap(), executor.as_ref())
        };
        let text = format!("infer-shapes, {defer}drop-dead, calibrate, assign-encodings, round");
        let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
        let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let graph = model.graph();
        let exp = graph.nodes().find(|(_, node)| node.op.is("Exp")).map(|(id, _)| id);
        let written = exp.is_some_and(|id| model.plan().encoding_of_use(graph, id, 0).is_some());
        let run = |plan: &Plan| Simulation::prepare(graph, plan, executor.as_ref(), graph.outputs()).unwrap();
        let (float, coded) = (run(&Plan::default()), run(model.plan()));
        let (mut signal, mut noise) = (0.0_f64, 0.0_f64);
        for index in 0..TOKENS.len() {
            let feeds = TOKENS.sample(index).unwrap();
            let [a, b] = [&float, &coded].map(|run| run.run(&feeds).unwrap().remove(0));
            for (a, b) in a.floats().unwrap().iter().zip(b.floats().unwrap().iter()) {
                signal += f64::from(*a).powi(2);
                noise += f64::from(a - b).powi(2);
            }
        }
        (10.0 * (signal / noise).log10(), written)
    };
    let (as_it_is, _) = decibels("w8a4", "");
    let (deferred, written) = decibels("w8a4", "defer-softmax, ");
    assert!(written && deferred > as_it_is + 1.0, "{as_it_is} and {deferred} dB");
    assert!(!decibels("w8a8", "defer-softmax, ").1);
}
