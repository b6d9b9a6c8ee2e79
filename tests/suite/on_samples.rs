//! Equalization that rests on what the samples brought: biases given to the layer behind, clamps relaxed, norms with one scale.

use onnx_quant::{exec, targets};
use passes::exec::{DataError, Dataset, Executor};
use passes::id::ValueId;
use passes::model::{Model, Plan};
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::target::Scheme;
use passes::tensor::Tensor;

use super::equalize::{Rows, matrix, same_within};

/// Four channels of small noise, with a low number here and there.
struct Pictures {
    /// The low number.
    spike: f32,
}

impl Dataset for Pictures {
    fn len(&self) -> usize {
        4
    }

    fn name(&self, index: usize) -> String {
        format!("picture {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| {
            let noise = ((i * 7919 + index * 104_729) % 2003) as f32 / 10_015.0 - 0.1;
            if i % 64 == 5 + index { self.spike } else { noise }
        };
        Ok(vec![Tensor::of([1, 4, 16, 16], (0..1024).map(value).collect::<Vec<f32>>())])
    }
}

/// What a pipeline made of a model.
struct Made {
    before: Model,
    after: Model,
    counts: String,
    notes: String,
    executor: Box<dyn Executor>,
}

/// `text` over `source` for `target` in `scheme`, with every promise checked; the function stays for all samples of `data`.
fn made(source: &str, data: &dyn Dataset, text: &str, (target, scheme): (&str, &str), keep: &[&str]) -> Made {
    let before = passes::text::parse(source).unwrap();
    let executor = (exec::find("auto").unwrap().build)(&before.meta).unwrap();
    let kept = keep.iter().map(|name| ((*name).to_owned(), (*name).to_owned())).collect();
    let mut cx = PassContext {
        dataset: Some(data),
        scheme: Scheme::parse(scheme).unwrap(),
        keep_float: &kept,
        ..PassContext::new(targets::find(target).unwrap(), executor.as_ref())
    };
    let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, before.clone(), &mut cx).unwrap();
    let counts: Vec<String> = trace.steps.iter().map(|(name, step)| format!("{name} {:?}", step.counts)).collect();
    let notes: Vec<&str> = trace.notes.iter().map(|note| &*note.message).collect();
    let (counts, notes) = (counts.join("; "), notes.join("\n"));
    Made { before, after, counts, notes, executor }
}

impl Made {
    /// The function is the same for all of `data`.
    fn same(self, data: &dyn Dataset, what: &str) -> Self {
        for index in 0..data.len() {
            let feeds = data.sample(index).unwrap();
            same_within(&self.before, &self.after, self.executor.as_ref(), &feeds, 1e-5, what);
        }
        self
    }

    /// The constants at `input` of all nodes `op`, in order.
    fn constants(&self, op: &str, input: usize) -> Vec<Vec<f32>> {
        let graph = self.after.graph();
        let nodes = graph.nodes().filter(|(_, node)| node.op.is(op));
        nodes.filter_map(|(_, node)| Some(graph.constant_input(node, input)?.floats()?.into_owned())).collect()
    }

    fn count(&self, op: &str) -> usize {
        self.after.graph().nodes().filter(|(_, node)| node.op.is(op)).count()
    }
}

const PLAIN: (&str, &str) = ("onnx-qdq", "w8a8");

/// A convolution that returns its input plus `bias`, `middle`, and what reads `%r`.
fn pair(outputs: &str, bias: &str, middle: &str, reader: &str) -> String {
    let one = |i: usize| if i.is_multiple_of(5) { "1" } else { "0" };
    let numbers =
        |n: usize| (0..n).map(|i| format!("{:.3}", (i * 37 % 29) as f32 / 28.0)).collect::<Vec<_>>().join(", ");
    format!(
        "opset 21\ngraph (%x: f32[1,4,16,16]) -> ({outputs}) {{\n  %wa = const f32[4,4,1,1] [{}]\n  %bias = const f32[4] [{bias}]\n  \
         %low = const f32[] [0]\n  %high = const f32[] [6]\n  %w1 = const f32[3,4,1,1] [{}]\n  %w3 = const f32[3,4,3,3] [{}]\n  \
         %w2 = const f32[4,2,3,3] [{}]\n  %wd = const f32[8,1,3,3] [{}]\n  %wg = const f32[4,3] [{}]\n  %b3 = const f32[3] [1, -2, 3]\n  \
         %a = Conv(%x, %wa, %bias) @first\n{middle}{reader}}}\n",
        (0..16).map(one).collect::<Vec<_>>().join(", "),
        numbers(12),
        numbers(108),
        numbers(72),
        numbers(72),
        numbers(12),
    )
}

const ABSORB: &str = "infer-shapes, calibrate, absorb-high-bias";

#[test]
fn high_biases_go_to_whatever_reads_them() {
    let data = Pictures { spike: -0.4 };
    for middle in ["  %r = Relu(%a)\n", "  %r = Clip(%a, %low, %high)\n", "  %r = Clip(%a, %low)\n"] {
        for reader in [
            "  %y = Conv(%r, %w1)\n",
            "  %y = Conv(%r, %w3, %b3)\n",
            "  %y = Conv(%r, %w3, %b3) {pads=[0, 0, 0, 0], strides=[2, 2]}\n",
            "  %y = Conv(%r, %w3) {auto_pad=\"VALID\"}\n",
            "  %y = Conv(%r, %w2) {group=2}\n",
            "  %y = Conv(%r, %wd) {group=4}\n",
            "  %p = GlobalAveragePool(%r)\n  %f = Flatten(%p)\n  %y = Gemm(%f, %wg, %b3)\n",
            "  %p = GlobalMaxPool(%r)\n  %f = Flatten(%p)\n  %y = Gemm(%f, %wg)\n",
            "  %s = Conv(%r, %w1, %b3)\n  %t = Conv(%r, %w1)\n  %y = Add(%s, %t)\n",
        ] {
            // Two channels stay above zero; one never is, one is around it.
            let source = pair("%y", "3, -5, 0, 1.5", middle, reader);
            let made = made(&source, &data, ABSORB, PLAIN, &[]).same(&data, &source);
            assert!(made.counts.contains("\"channels\": 2"), "{source}: {}", made.counts);
            let bias = &made.constants("Conv", 2)[0];
            let want = [0.4, -5.0, 0.0, 0.4];
            assert!(bias.iter().zip(want).all(|(b, want)| (b - want).abs() < 1e-6), "{bias:?}");
        }
    }
}

#[test]
fn products_hand_their_biases_on_and_a_pair_behind_a_pair_does_too() {
    let data = Rows { channels: 8, samples: 3 };
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}{}{}  %b1 = const f32[6] [400, -5, 300, 250, 2, 0]\n  %b2 = const f32[1,4] [900, 0, -900, 5]\n  \
         %a = Gemm(%x, %wa, %b1)\n  %r = Relu(%a)\n  %c = Gemm(%r, %wbb, %b2) {{transB=1}}\n  %s = Relu(%c)\n  %y = Gemm(%s, %wccc)\n}}\n",
        matrix("wa", 8, 6),
        matrix("wbb", 4, 6),
        matrix("wccc", 4, 3)
    );
    let made = made(&source, &data, ABSORB, PLAIN, &[]).same(&data, &source);
    assert!(made.counts.contains("\"pairs\": "), "{}", made.counts);
    assert!(made.constants("Gemm", 2)[0][0] < 200.0, "{:?}", made.constants("Gemm", 2));
}

#[test]
fn biases_stay_where_the_constant_would_be_missed() {
    let data = Pictures { spike: -0.4 };
    let relu = "  %r = Relu(%a)\n";
    let plain = "  %y = Conv(%r, %w1)\n";
    for (outputs, middle, reader, says) in [
        ("%y", relu, "  %y = Conv(%r, %w3) {pads=[1, 1, 1, 1]} @second\n", "`second` pads with zeros"),
        ("%y", relu, "  %y = Conv(%r, %w1) {pads=[0, 0, 0, 1]} @second\n", "`second` pads with zeros"),
        ("%y", relu, "  %y = Conv(%r, %w3) {auto_pad=\"SAME_UPPER\"} @second\n", "`second` pads with zeros"),
        (
            "%y",
            relu,
            "  %t = Conv(%r, %w1)\n  %s = Conv(%r, %w3) {pads=[1, 1, 1, 1]} @second\n  %y = Add(%s, %t)\n",
            "`second` pads",
        ),
        ("%y, %z", relu, "  %y = Conv(%r, %w1)\n  %z = Sigmoid(%r)\n", "`r` has readers other than"),
        ("%y, %r", relu, plain, "`r` has readers other than"),
        ("%y, %a", relu, plain, ""),
        ("%y, %z", "  %r = Relu(%a)\n  %z = Tanh(%a)\n", plain, ""),
        ("%y", "  %r = LeakyRelu(%a) {alpha=0.1}\n", plain, ""),
        ("%y", "  %r = Sigmoid(%a)\n", plain, ""),
        ("%y", "  %p = Relu(%a)\n  %r = AveragePool(%p) {kernel_shape=[3, 3]}\n", plain, "`p` has readers other than"),
    ] {
        let source = pair(outputs, "3, -5, 0, 1.5", middle, reader);
        let made = made(&source, &data, ABSORB, PLAIN, &[]);
        assert!(!made.counts.contains("pairs"), "{source}: {}", made.counts);
        assert!(made.notes.contains(says), "{source}: {}", made.notes);
        assert!(!says.is_empty() || made.notes.is_empty(), "{source}: {}", made.notes);
        assert_eq!(made.after.graph().nodes().count(), made.before.graph().nodes().count());
    }
}

#[test]
fn nothing_is_absorbed_without_statistics_or_under_a_name_or_where_biases_are_low() {
    let data = Pictures { spike: -0.4 };
    let of = |bias: &str| pair("%y", bias, "  %r = Relu(%a)\n", "  %y = Conv(%r, %w1) @second\n");
    let high = of("3, -5, 0, 1.5");
    for (source, text, keep) in [
        (&high, "infer-shapes, absorb-high-bias", &[][..]),
        (&high, ABSORB, &["first"]),
        (&high, ABSORB, &["second"]),
        (&high, ABSORB, &["r"]),
        (&of("0.3, -5, 0, 0.4"), ABSORB, &[]),
    ] {
        let made = made(source, &data, text, PLAIN, keep);
        assert!(!made.counts.contains("pairs"), "{source}: {}", made.counts);
    }
    // A channel that reaches the end of its clamp loses what is above it, not below.
    let clamped = pair("%y", "5.95, -5, 0, 1.5", "  %r = Clip(%a, %low, %high)\n", "  %y = Conv(%r, %w1)\n");
    let made = made(&clamped, &data, ABSORB, PLAIN, &[]).same(&data, &clamped);
    assert!(made.counts.contains("\"channels\": 1"), "{}", made.counts);
}

#[test]
fn sigmas_lose_a_few_values_and_only_where_the_outputs_hardly_notice() {
    let data = Pictures { spike: -0.4 };
    let of = |bias: &str| pair("%y", bias, "  %r = Relu(%a)\n", "  %y = Conv(%r, %w1)\n");
    let first = |made: &Made| made.constants("Conv", 2)[0][0];
    let lossy = ABSORB.to_owned() + "{sigmas=3}";
    let made_lossy = made(&of("40, 40, 40, 40"), &data, &lossy, PLAIN, &[]);
    assert!(first(&made_lossy) < 0.35 && first(&made_lossy) > 0.1, "{}", first(&made_lossy));
    assert!(made_lossy.notes.is_empty(), "{}", made_lossy.notes);
    let source = of("1, 1, 1, 1");
    let gated = made(&source, &data, &(ABSORB.to_owned() + "{sigmas=0}"), PLAIN, &[]).same(&data, &source);
    assert!((first(&gated) - 0.4).abs() < 1e-6, "{}", first(&gated));
    assert!(gated.notes.contains("less than 50 dB"), "{}", gated.notes);
    let error = Pipeline::parse("absorb-high-bias{sigmas=-1}", &passes::catalogue::passes()).unwrap_err().to_string();
    assert!(error.contains("less than 0"), "{error}");
}

/// `source` with more constants.
fn with(source: &str, constants: &str) -> String {
    source.replace("  %a = Conv", &format!("{constants}  %a = Conv"))
}

#[test]
fn a_refusal_of_sigmas_holds_for_all_pairs() {
    let data = Pictures { spike: -0.4 };
    // A loud pair, and a soft one of which only `sigmas` takes something, and which alone nobody would hear.
    let middle = "  %r = Relu(%a)\n  %b = Conv(%x, %wa, %soft)\n  %s = Relu(%b)\n";
    let reader = "  %t = Conv(%r, %w1)\n  %u = Conv(%s, %tiny)\n  %y = Add(%t, %u)\n";
    let constants = format!(
        "  %soft = const f32[4] [0.3, 0.3, 0.3, 0.3]\n  %tiny = const f32[3,4,1,1] [{}]\n",
        ["0.000001"; 12].join(", ")
    );
    let source = with(&pair("%y", "1, 1, 1, 1", middle, reader), &constants);
    let gated = made(&source, &data, &(ABSORB.to_owned() + "{sigmas=0}"), PLAIN, &[]).same(&data, &source);
    assert!(gated.notes.contains("less than 50 dB"), "{}", gated.notes);
    assert!(gated.counts.contains("\"pairs\": 1"), "{}", gated.counts);
    assert!(gated.constants("Conv", 2).contains(&vec![0.3; 4]), "{:?}", gated.constants("Conv", 2));
}

#[test]
fn sigmas_are_refused_by_one_output_that_loses_and_where_no_output_tells() {
    let data = Pictures { spike: -0.4 };
    for (outputs, reader) in [
        ("%y", "  %t = Conv(%r, %w1)\n  %y = Cast(%t) {to=7}\n"),
        ("%y, %z", "  %y = Conv(%r, %w1)\n  %z = Mul(%x, %loud)\n"),
    ] {
        let plain = pair(outputs, "1, 1, 1, 1", "  %r = Relu(%a)\n", reader);
        let source = with(&plain, "  %loud = const f32[] [100000]\n");
        let gated = made(&source, &data, &(ABSORB.to_owned() + "{sigmas=0}"), PLAIN, &[]);
        assert!(gated.notes.contains("less than 50 dB"), "{source}: {}", gated.notes);
        let first = gated.constants("Conv", 2)[0][0];
        assert!((first - 0.4).abs() < 1e-6, "{source}: {first}");
    }
}

#[test]
fn what_was_measured_behind_lost_values_is_forgotten() {
    let data = Pictures { spike: -0.4 };
    let reader = "  %t = Conv(%r, %w1)\n  %y = Clip(%t, %low, %far)\n";
    let plain = pair("%y", "40, 40, 40, 40", "  %r = Relu(%a)\n", reader);
    let source = with(&plain, "  %far = const f32[] [6000]\n");
    for (options, clamps) in [("", 0), ("{sigmas=3}", 1)] {
        let text = format!("{ABSORB}{options}, relax-clamps");
        let made = made(&source, &data, &text, PLAIN, &[]);
        assert!(made.counts.contains("\"pairs\": 1"), "{}", made.counts);
        // Clamps are relaxed where it is known that nothing reaches their end.
        assert_eq!(made.count("Clip"), clamps, "{options}: {}", made.notes);
    }
}

#[test]
fn clamps_that_no_sample_reaches_become_relu() {
    let data = Pictures { spike: -0.4 };
    let of = |bias: &str| {
        pair("%y", bias, "  %r = Clip(%a, %low, %high) @clamp\n", "  %y = Conv(%r, %w3) {pads=[1, 1, 1, 1]}\n")
    };
    let relax = "infer-shapes, calibrate, relax-clamps";
    let source = of("5.8, -5, 0, 1.5");
    let relaxed = made(&source, &data, relax, PLAIN, &[]).same(&data, &source);
    assert_eq!((relaxed.count("Relu"), relaxed.count("Clip")), (1, 0), "{}", relaxed.counts);
    assert!(relaxed.notes.contains("1 of 1 clamps"), "{}", relaxed.notes);
    for (source, text, keep) in [
        (of("5.95, -5, 0, 1.5"), relax, &[][..]),
        (source.clone(), "infer-shapes, relax-clamps", &[]),
        (source.clone(), relax, &["clamp"]),
        (source.clone(), relax, &["a"]),
        (source.clone(), relax, &["r"]),
        (source.replace("%low = const f32[] [0]", "%low = const f32[] [-1]"), relax, &[]),
    ] {
        let made = made(&source, &data, text, PLAIN, keep);
        assert_eq!((made.count("Relu"), made.count("Clip")), (0, 1), "{source}: {}", made.notes);
        assert!(made.notes.is_empty(), "{}", made.notes);
    }
}

/// Channels of very different sizes in front of a clamp that ends at `high`.
fn uneven(high: f32) -> String {
    let size = |i: usize| [1.0, 8.0, 0.25, 30.0][i / 4] * (((i * 31 + 17) % 41) as f32 / 20.0 - 1.0);
    let numbers =
        |n: usize, of: &dyn Fn(usize) -> f32| (0..n).map(|i| format!("{:.3}", of(i))).collect::<Vec<_>>().join(", ");
    format!(
        "opset 21\ngraph (%x: f32[1,4,16,16]) -> (%y) {{\n  %wa = const f32[4,4,1,1] [{}]\n  %low = const f32[] [0]\n  \
         %high = const f32[] [{high}]\n  %wr = const f32[4,4,3,3] [{}]\n  %a = Conv(%x, %wa)\n  %r = Clip(%a, %low, %high)\n  \
         %y = Conv(%r, %wr) {{pads=[1, 1, 1, 1]}}\n}}\n",
        numbers(16, &size),
        numbers(144, &|i| ((i * 37 + 11) % 29) as f32 / 14.0 - 1.0)
    )
}

#[test]
fn layers_are_equalized_through_clamps_when_that_is_asked_for() {
    let data = Pictures { spike: -2.0 };
    for high in [0.5, 6.0, 60.0, 6000.0] {
        let source = uneven(high);
        let scheme = ("onnx-qdq", "w8a4");
        for margin in ["1", "4"] {
            let text = format!("infer-shapes, calibrate, equalize-layers{{clamps={margin}}}");
            let made = made(&source, &data, &text, scheme, &[]).same(&data, &source);
            // Where the end is far away, it is as if there was none.
            assert!(high < 6000.0 || made.counts.contains("\"regions\": 1"), "{}", made.counts);
            let ends: Vec<f32> = made.constants("Clip", 2).into_iter().flatten().collect();
            assert_eq!(ends, [high], "the clamp stays");
            let said = format!("for what is neither {margin} times larger than the peak of its channel nor beyond");
            assert_eq!(made.notes.contains(&said), made.counts.contains("\"regions\": 1"), "{}", made.notes);
        }
        let made = made(&source, &data, "infer-shapes, calibrate, equalize-layers", scheme, &[]);
        assert!(!made.counts.contains("regions"), "only when asked for: {}", made.counts);
    }
    let endless = uneven(6.0).replace(", %high)", ")");
    let made = made(&endless, &data, "infer-shapes, calibrate, equalize-layers", ("onnx-qdq", "w8a4"), &[]);
    let made = made.same(&data, &endless);
    assert!(made.counts.contains("\"regions\": 1"), "a clamp without an end is a Relu");
    assert!(made.notes.is_empty(), "{}", made.notes);
    let error = Pipeline::parse("equalize-layers{clamps=0.5}", &passes::catalogue::passes()).unwrap_err().to_string();
    assert!(error.contains("less than 1"), "{error}");
}

/// Every channel ends where it did, for whatever is read.
#[test]
fn from_weights_clamps_end_channel_by_channel() {
    let data = Pictures { spike: -2.0 };
    for high in [0.5, 6.0, 60.0] {
        let source = uneven(high);
        let text = "infer-shapes, equalize-layers{from=weights, clamps=exact}";
        let made = made(&source, &data, text, ("onnx-qdq", "w8a4"), &[]).same(&data, &source);
        assert!(made.counts.contains("\"channels\": 4") && made.notes.is_empty(), "{} {}", made.counts, made.notes);
        assert_eq!((made.count("Clip"), made.count("Min")), (1, 1), "{}", made.counts);
        let ends = made.constants("Min", 1).concat();
        assert_eq!(made.constants("Clip", 2).concat(), [ends.iter().copied().fold(0.0, f32::max)]);
        assert!(ends.iter().any(|end| (end / ends[0] - 1.0).abs() > 0.1), "{ends:?}");
    }
}

const FORCED: &str = "infer-shapes, calibrate, reparameterize-norms{strength=1}, drop-dead";

/// A norm as `norm` writes it, whose result `%n` is read by `readers`.
fn normed(outputs: &str, norm: &str, readers: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[512,8]) -> ({outputs}) {{\n{}{}  %g = const f32[8] [1, 20, 0.1, -3, 0, 5, 1, 0.01]\n  \
         %b = const f32[8] [0, 30, -0.2, 1, 2, 0, -50, 0]\n  %bias = const f32[6] [1, 2, 3, 4, 5, 6]\n  %last = const i64[1] [-1]\n  \
         %eps = const f32[] [0.001]\n  %two = const f32[] [2]\n{norm}{readers}}}\n",
        matrix("w", 8, 6),
        matrix("ww", 6, 8),
    )
}

const WHOLE: &str = "  %n = LayerNormalization(%x, %g, %b) {axis=-1}\n";
const WITHOUT_SHIFT: &str = "  %n = LayerNormalization(%x, %g)\n";
const WRITTEN: &str = "  %m = ReduceMean(%x, %last)\n  %c = Sub(%x, %m)\n  %q = Pow(%c, %two)\n  %v = ReduceMean(%q, %last)\n  \
                       %e = Add(%v, %eps)\n  %s = Sqrt(%e)\n  %d = Div(%c, %s)\n  %f = Mul(%d, %g)\n  %n = Add(%b, %f)\n";
const ROOT: &str = "  %q = Pow(%x, %two)\n  %v = ReduceMean(%q, %last)\n  %e = Add(%v, %eps)\n  %s = Sqrt(%e)\n  %d = Div(%x, %s)\n  \
                    %n = Mul(%g, %d)\n";

/// The ranges of the channels of what the first product of `model` reads, over the samples of `data`.
fn ranges(made: &Made, data: &dyn Dataset) -> Vec<(f32, f32)> {
    let graph = made.after.graph();
    let is_product = |op: &passes::ir::OpKey| op.is("MatMul") || op.is("Gemm");
    let read: ValueId = graph.nodes().find(|(_, node)| is_product(&node.op)).unwrap().1.input(0).unwrap();
    let run = Simulation::prepare(graph, &Plan::default(), made.executor.as_ref(), &[read]).unwrap();
    let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); 8];
    for index in 0..data.len() {
        let outputs = run.run(&data.sample(index).unwrap()).unwrap();
        for (i, v) in outputs[0].floats().unwrap().iter().enumerate() {
            let range = &mut ranges[i % 8];
            *range = (range.0.min(*v), range.1.max(*v));
        }
    }
    ranges
}

#[test]
fn channels_of_norms_come_to_have_one_range() {
    let data = Rows { channels: 8, samples: 3 };
    for (norm, shifts) in [(WHOLE, true), (WITHOUT_SHIFT, true), (WRITTEN, true), (ROOT, false)] {
        for readers in [
            "  %y = MatMul(%n, %w)\n",
            "  %p = MatMul(%n, %w)\n  %y = Add(%bias, %p)\n",
            "  %y = Gemm(%n, %w, %bias)\n",
            "  %y = Gemm(%n, %ww) {transB=1}\n",
            "  %p = MatMul(%n, %w)\n  %q1 = Add(%p, %bias)\n  %q2 = MatMul(%n, %w)\n  %q3 = Gemm(%n, %w, %bias)\n  \
             %t = Add(%q1, %q2)\n  %y = Add(%t, %q3)\n",
        ] {
            let source = normed("%y", norm, readers);
            let made = made(&source, &data, FORCED, PLAIN, &[]).same(&data, &source);
            assert!(made.counts.contains("\"norms\": 1"), "{source}: {}", made.counts);
            let ranges = ranges(&made, &data);
            let widths: Vec<f32> = ranges.iter().map(|(low, high)| high - low).filter(|width| *width > 1e-3).collect();
            let (least, most) = widths.iter().fold((f32::MAX, 0.0_f32), |all, w| (all.0.min(*w), all.1.max(*w)));
            // Scales that lie too far apart are brought nearer only; where nothing shifts, zero stays where it was.
            let allowed = if shifts { 10.0 } else { 20.0 };
            assert!(widths.len() >= 7 && most < allowed * least, "{source}: {ranges:?}");
        }
    }
}

#[test]
fn other_readers_keep_the_norm_and_products_get_their_own() {
    let data = Rows { channels: 8, samples: 3 };
    for norm in [WHOLE, WITHOUT_SHIFT, WRITTEN, ROOT] {
        for (outputs, readers) in [
            ("%y, %z", "  %p = MatMul(%n, %w)\n  %y = Add(%bias, %p)\n  %z = Add(%n, %x)\n"),
            ("%y, %n", "  %y = MatMul(%n, %w)\n"),
            ("%y, %z", "  %y = Gemm(%n, %w, %bias)\n  %z = Sigmoid(%n)\n"),
        ] {
            let source = normed(outputs, norm, readers);
            let made = made(&source, &data, FORCED, PLAIN, &[]).same(&data, &source);
            assert!(made.counts.contains("\"copied\": 1"), "{source}: {}", made.counts);
        }
    }
}

/// Before scale and shift every row of a norm has the same length; what else reads it keeps the norm as it was.
#[test]
fn products_read_norms_bare() {
    let data = Rows { channels: 8, samples: 3 };
    let bare = "infer-shapes, calibrate, reparameterize-norms{to=bare}, drop-dead";
    for (norm, whole) in [(WHOLE, true), (WITHOUT_SHIFT, true), (WRITTEN, false), (ROOT, false)] {
        for (outputs, readers, count) in [
            ("%y", "  %y = Gemm(%n, %w, %bias)\n", "\"norms\": 1"),
            ("%y, %z", "  %p = MatMul(%n, %w)\n  %y = Add(%bias, %p)\n  %z = Add(%n, %x)\n", "\"copied\": 1"),
        ] {
            let source = normed(outputs, norm, readers);
            let made = made(&source, &data, bare, PLAIN, &[]).same(&data, &source);
            assert!(made.counts.contains(count), "{source}: {}", made.counts);
            let scales = made.constants(if whole { "LayerNormalization" } else { "Mul" }, 1);
            let is_bare = |scale: &Vec<f32>| scale.iter().all(|s| (s - 1.0).abs() < 1e-6 || *s == 0.0);
            assert!(!whole || scales.iter().any(is_bare), "{source}: {scales:?}");
        }
    }
    let error = Pipeline::parse("calibrate, reparameterize-norms{to=bear}", &passes::catalogue::passes()).unwrap_err();
    assert!(error.to_string().contains("neither even nor bare"), "{error}");
}

#[test]
fn norms_stay_as_they_are_without_statistics_or_ranges_or_products() {
    let data = Rows { channels: 8, samples: 3 };
    let product = "  %y = MatMul(%n, %w) @product\n";
    let source = normed("%y", WHOLE, product);
    for (source, text, scheme, keep) in [
        (&source, FORCED, "w8a16", &[][..]),
        (&source, FORCED, "w8a8dyn", &[]),
        (&source, FORCED, "wfp8afp8", &[]),
        (&source, FORCED, "w8a8", &["product"]),
        (&normed("%y", WHOLE, "  %y = Sigmoid(%n)\n"), FORCED, "w8a8", &[]),
        (
            &normed("%y", WHOLE, "  %t = MatMul(%n, %w)\n  %y = MatMul(%t, %ww)\n")
                .replace("(%x, %g, %b)", "(%x, %x, %b)"),
            FORCED,
            "w8a8",
            &[],
        ),
    ] {
        let made = made(source, &data, text, ("onnx-qdq", scheme), keep);
        assert!(!made.counts.contains("norms\": ") && !made.counts.contains("copied"), "{source}: {}", made.counts);
    }
    // Peaks of few rows are chance.
    let few = Rows { channels: 8, samples: 1 };
    let made = made(&source, &few, FORCED, PLAIN, &[]);
    assert!(!made.counts.contains("norms\": "), "{}", made.counts);
}

#[test]
fn norms_are_changed_where_that_is_expected_to_pay_and_for_codes_without_zero_points_too() {
    let data = Rows { channels: 8, samples: 3 };
    let source = normed("%y", WHOLE, "  %y = Gemm(%n, %w, %bias)\n");
    let searched = "infer-shapes, calibrate, reparameterize-norms, drop-dead";
    for target in ["onnx-qdq", "tensorrt"] {
        let made = made(&source, &data, searched, (target, "w8a8"), &[]).same(&data, &source);
        assert!(made.counts.contains("\"norms\": 1"), "{target}: {}", made.counts);
    }
    let centered = made(&source, &data, FORCED, ("tensorrt", "w8a8"), &[]).same(&data, &source);
    let live = ranges(&centered, &data).into_iter().filter(|(low, high)| high - low > 1e-3);
    for (low, high) in live {
        assert!((low + high).abs() < 1e-3 * (high - low), "around zero: {low} {high}");
    }
    // Channels that are alike already.
    let even = source
        .replace("[1, 20, 0.1, -3, 0, 5, 1, 0.01]", "[1, 1, 1, 1, 1, 1, 1, 1]")
        .replace("[0, 30, -0.2, 1, 2, 0, -50, 0]", "[0, 0, 0, 0, 0, 0, 0, 0]");
    let made = made(&even, &Even, searched, PLAIN, &[]);
    assert!(!made.counts.contains("norms\": "), "{}", made.counts);
    for (option, says) in [("strength=2", "from 0 to 1"), ("sigmas=0", "more than 0")] {
        let text = format!("calibrate, reparameterize-norms{{{option}}}");
        let error = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// Rows of channels that are alike.
struct Even;

impl Dataset for Even {
    fn len(&self) -> usize {
        4
    }

    fn name(&self, index: usize) -> String {
        format!("even rows {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        // Every channel sees the same numbers, in another order.
        let value = |i: usize| ((i / 8 + i % 8 + index) % 8) as f32 - 3.5;
        Ok(vec![Tensor::of([512, 8], (0..512 * 8).map(value).collect::<Vec<f32>>())])
    }
}

/// Rows of which these samples bring outliers, many or few.
struct Outlying(&'static [usize], usize);

impl Dataset for Outlying {
    fn len(&self) -> usize {
        16
    }

    fn name(&self, index: usize) -> String {
        format!("rows {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| ((i * 7919 + index * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        let outlier = |i: usize| self.0.contains(&index) && i.is_multiple_of(self.1);
        let values = (0..4096).map(|i| if outlier(i) { 30.0 } else { value(i) });
        Ok(vec![Tensor::of([512, 8], values.collect())])
    }
}

/// `observer=cfp` cuts outliers off where those samples gain by it that it did not find them on.
#[test]
fn ranges_are_cut_where_samples_that_judge_bear_it_out() {
    let source =
        format!("opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}  %y = MatMul(%x, %w)\n}}\n", matrix("w", 8, 4));
    let range = |data: &dyn Dataset, held_out: Option<&dyn Dataset>| {
        let plain = passes::text::parse(&source).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext {
            dataset: Some(data),
            held_out,
            scheme: passes::target::Scheme::parse("w4a4").unwrap(),
            ..PassContext::new(targets::find("onnx-qdq").unwrap(), executor.as_ref())
        };
        let text = "infer-shapes, calibrate, assign-encodings{observer=cfp}";
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (model, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx).unwrap();
        let (node, _) = model.graph().nodes().next().unwrap();
        let encoding = model.plan().encoding_of_use(model.graph(), node, 0).unwrap();
        let notes: Vec<String> = trace.notes.iter().map(ToString::to_string).collect();
        (f64::from(encoding.scale[0]) * 15.0, notes.join("\n"))
    };
    // Samples 4 and 12 judge. A few outliers elsewhere are cut; many among the judges keep the range whole.
    let (cut, told) = range(&Outlying(&[0], 2048), None);
    assert!(
        cut < 3.0 && told.contains("1 of 1 ranges of activations leave outliers out; judged by every eighth"),
        "{cut} {told}"
    );
    let (whole, told) = range(&Outlying(&[0, 4, 12], 40), None);
    assert!(whole > 29.0 && told.contains("0 of 1 ranges"), "{whole} {told}");
    // Held-out samples judge instead, where there are any.
    let (whole, told) = range(&Outlying(&[0], 2048), Some(&Outlying(&[1, 2, 3, 5, 6], 20)));
    assert!(whole > 29.0 && told.contains("judged by samples that are held out"), "{whole} {told}");
}
