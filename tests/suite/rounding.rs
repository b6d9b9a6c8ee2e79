//! Rounding in order, on the small residual network and on layers made up.

use onnx_quant::dataset::{Files, Slot};
use onnx_quant::{exec, import, targets};
use passes::exec::Dataset;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::sensitivity::{Metric, Probe};
use passes::target::Scheme;

use super::equalize::{Rows, matrix};
use super::{fixture, text, tool_ok};

fn plain(model: &str) -> Model {
    import::file(&fixture(&format!("models/{model}.onnx"))).unwrap().model
}

/// `model` after the passes of `tail`, at `scheme`, with so many bytes for tensors between stages.
fn rounded(model: &Model, tail: &str, scheme: &str, pair_budget: u64) -> Model {
    rounded_by(&digits(model, 24), model, tail, scheme, pair_budget)
}

fn digits(model: &Model, samples: usize) -> Files {
    Files::open(&fixture("data/digits"), Slot::of(model.graph()), None, Some(samples)).unwrap()
}

/// The same on the samples of `data`.
fn rounded_by(data: &dyn Dataset, model: &Model, tail: &str, scheme: &str, pair_budget: u64) -> Model {
    let executor = (exec::find("rten").unwrap().build)(&model.meta).unwrap();
    let mut cx = PassContext {
        dataset: Some(data),
        scheme: Scheme::parse(scheme).unwrap(),
        threads: 2,
        pair_budget,
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let text = format!("infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes, calibrate, {tail}");
    let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
    PassManager::new(Vec::new(), true).run(&pipeline, model.clone(), &mut cx).unwrap().0
}

/// Samples whose tensors do not fit are run again from their inputs, which changes nothing.
#[test]
fn memory_between_stages_does_not_matter() {
    for (name, scheme) in [("digits-resnet", "w4a8"), ("digits-mobilenet", "w8a8")] {
        let model = plain(name);
        let tail = "assign-encodings, round-in-order{refit=2}";
        let [all, few, none] =
            [1 << 30, 3 << 20, 0].map(|budget| passes::text::plan(&rounded(&model, tail, scheme, budget)));
        assert!(all == few && few == none, "{name}");
    }
}

/// Learning goes on with as many samples as memory holds, one at least; those that were not kept are run again from their inputs.
#[test]
fn codes_are_learned_from_as_many_samples_as_memory_holds() {
    let model = plain("digits-resnet");
    for budget in [1 << 30, 3 << 20, 0] {
        let tail = "assign-encodings, round-in-order{learn=brecq, iterations=5, layers=3}";
        let after = rounded(&model, tail, "w3a8", budget);
        let encoded = after.plan().encodings().filter(|(site, _)| after.plan().codes(*site).is_some()).count();
        assert!(encoded >= 10, "{encoded}");
    }
}

/// Twelve digits, and for each another one that passes for a variant of it; of those only the ones in `kept`.
struct Varied {
    files: Files,
    kept: Vec<usize>,
}

impl Varied {
    fn of(model: &Model, keep: impl Fn(usize) -> bool) -> Self {
        Self { files: digits(model, 24), kept: (0..24).filter(|at| keep(at % 12)).collect() }
    }
}

impl Dataset for Varied {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn name(&self, index: usize) -> String {
        self.files.name(self.kept[index])
    }

    fn sample(&self, index: usize) -> Result<Vec<passes::tensor::Tensor>, passes::exec::DataError> {
        self.files.sample(self.kept[index])
    }

    fn origin(&self, index: usize) -> usize {
        self.kept.iter().position(|at| *at == self.kept[index] % 12).unwrap()
    }
}

/// What judges has no part in what it judges, nor has its variant, whether tensors between stages are kept or not.
#[test]
fn weights_are_not_rounded_by_samples_that_are_spared() {
    let model = plain("digits-resnet");
    let (all, rest) = (Varied::of(&model, |_| true), Varied::of(&model, |origin| origin != 4));
    for budget in [1 << 30, 0] {
        let plan = |data: &Varied, options: &str| {
            let tail = format!("assign-encodings, round-in-order{{refit=1, {options}}}");
            passes::text::plan(&rounded_by(data, &model, &tail, "w3a16", budget))
        };
        let spared = plan(&all, "spare=1");
        assert!(spared == plan(&rest, "spare=0"), "the fifth of twelve had a part in it");
        assert!(spared != plan(&all, "spare=0"));
    }
}

/// The bias takes back what weights and earlier layers shifted: the mean output is the float model's.
#[test]
fn biases_are_corrected_where_weights_alone_are_rounded() {
    let model = plain("digits-resnet");
    let after = rounded(&model, "assign-encodings, round-in-order", "w3a16", 1 << 30);
    // The last layer is a Gemm whose bias stays in float: the plan holds a corrected one.
    assert_eq!(after.plan().substitutes().count(), 1);
    let (_, tensor) = after.plan().substitutes().next().unwrap();
    assert_eq!(tensor.shape(), [10]);
}

#[test]
fn every_method_rounds_every_layer() {
    let model = plain("digits-mobilenet");
    for method in passes::rounding::ROUNDINGS {
        let name = method.about().name;
        for pass in ["round", "round-in-order"] {
            let after = rounded(&model, &format!("assign-encodings, {pass}{{method={name}}}"), "w4a8", 1 << 30);
            let open = after.plan().encodings().filter(|(site, _)| {
                let passes::id::Site::Use { node, input } = *site else { return false };
                let graph = after.graph();
                let constant = graph.node(node).and_then(|node| graph.constant_input(node, input.into()));
                constant.is_some() && after.plan().codes(*site).is_none()
            });
            assert_eq!(open.count(), 0, "{pass} {name}");
        }
    }
}

/// A layer that reads a constant through a node which nothing folds: what it reads is there when its stage begins.
#[test]
fn a_layer_that_no_sample_feeds_is_rounded_too() {
    let (table, weight, other) = (matrix("c", 512, 8), matrix("wa", 8, 8), matrix("wb", 8, 8));
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{table}{weight}{other}  %r = Relu(%c)\n  %p = MatMul(%r, %wa)\n  \
         %h = MatMul(%x, %wb)\n  %y = Add(%h, %p)\n}}\n"
    );
    let plain = passes::text::parse(&source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let data = Rows { channels: 8, samples: 3 };
    for scheme in ["w8a8", "w4a16"] {
        let mut cx = PassContext {
            dataset: Some(&data as &dyn Dataset),
            scheme: Scheme::parse(scheme).unwrap(),
            ..PassContext::new(targets::TARGETS[0], executor.as_ref())
        };
        let text = "infer-shapes, calibrate, assign-encodings, round-in-order";
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        assert!(!after.plan().is_empty());
        let counts = &trace.steps.last().unwrap().1.counts;
        assert_eq!(counts.get("rounded in order").copied(), Some(2), "{scheme}: {counts:?}");
    }
}

/// Scales and shifts of norms behind two-bit weights are fitted: written-out and whole norms, and the output comes nearer.
#[test]
fn norms_take_part_of_the_loss_back() {
    let row = |name: &str| {
        let values: Vec<String> = (0..8).map(|i| format!("{:.2}", 0.5 + (i % 3) as f32 / 4.0)).collect();
        format!("  %{name} = const f32[8] [{}]\n", values.join(", "))
    };
    let head = format!(
        "{}{}{}  %two = const f32[] [2]\n  %eps = const f32[] [0.00001]\n",
        matrix("wa", 8, 8),
        row("g"),
        row("b")
    );
    let whole = "  %y = LayerNormalization(%h, %g, %b)\n";
    let written = "  %q = Pow(%h, %two)\n  %m = ReduceMean(%q) {axes = [-1]}\n  %e = Add(%m, %eps)\n  %s = Sqrt(%e)\n  \
                   %d = Div(%h, %s)\n  %y = Mul(%g, %d)\n";
    for (norm, rows) in [(whole, 2), (written, 1)] {
        // ReduceMean takes its axes as an attribute up to opset 17.
        let source = format!("opset 17\ngraph (%x: f32[512,8]) -> (%y) {{\n{head}  %h = MatMul(%x, %wa)\n{norm}}}\n");
        let plain = passes::text::parse(&source).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let data = Rows { channels: 8, samples: 4 };
        let [without, with] = [0, 1].map(|norms| {
            let mut cx = PassContext {
                dataset: Some(&data as &dyn Dataset),
                scheme: Scheme::parse("w2a16").unwrap(),
                threads: 2,
                ..PassContext::new(targets::TARGETS[0], executor.as_ref())
            };
            let text = format!("infer-shapes, calibrate, assign-encodings, round-in-order{{norms={norms}}}");
            let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
            let (after, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
            let probe = Probe::new(plain.graph(), &cx, 4, Metric::Error).unwrap();
            (after.plan().substitutes().count(), probe.loss(after.plan()).unwrap())
        });
        assert_eq!((without.0, with.0), (0, rows));
        assert!(with.1 < without.1, "{} is not below {}", with.1, without.1);
    }
}

/// Rows weigh what is at stake: other codes than without, the same on any number of threads.
#[test]
fn stakes_change_codes_and_depend_on_no_threads() {
    let folder = tempfile::tempdir().unwrap();
    let quantized = |stakes: &str, threads: &str| {
        let out = folder.path().join(format!("{stakes}-{threads}.onnx"));
        let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
        let pipeline = format!(
            "infer-shapes, fold-constants, *(eliminate-identity, fold-batch-norm, fold-affine, fold-constants, infer-shapes, drop-dead), \
             calibrate, assign-encodings, round-in-order{{stakes={stakes}, refit=1}}"
        );
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "w3a8", "--samples", "24"];
        let more = ["--pipeline", &pipeline, "--threads", threads, "--progress", "none", "--json"];
        let json: serde_json::Value = serde_json::from_str(&tool_ok(&[&args[..], &more].concat())).unwrap();
        assert_eq!(json["verify"]["passed"], true, "{json:#}");
        std::fs::read(out).unwrap()
    };
    let weighed = quantized("1", "1");
    assert!(weighed == quantized("1", "2"), "other bytes on two threads");
    assert!(weighed != quantized("0", "1"), "weights change nothing");
}

/// Ranges that the layer's output asks for: of a single layer it comes nearer to the float one, with nearest points and in order.
#[test]
fn ranges_by_the_layers_output_come_nearer_to_it() {
    let source =
        format!("opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}  %y = MatMul(%x, %wa)\n}}\n", matrix("wa", 8, 8));
    let plain = passes::text::parse(&source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let data = Rows { channels: 8, samples: 4 };
    let after = |tail: &str| {
        let mut cx = PassContext {
            dataset: Some(&data as &dyn Dataset),
            scheme: Scheme::parse("w2a16").unwrap(),
            threads: 2,
            ..PassContext::new(targets::TARGETS[0], executor.as_ref())
        };
        let text = format!("infer-shapes, calibrate, assign-encodings, {tail}");
        let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
        let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let scales = model.plan().encodings().next().unwrap().1.scale.clone();
        (scales, Probe::new(plain.graph(), &cx, 4, Metric::Error).unwrap().loss(model.plan()).unwrap())
    };
    for (with, without) in [
        ("clip-weights{form=block}, round", "round"),
        ("round-in-order{method=nearest, clip=1}", "round-in-order{method=nearest}"),
    ] {
        let ((scales, loss), (assigned, before)) = (after(with), after(without));
        assert!(scales != assigned && loss < before, "{with}: {loss} is not below {before}");
    }
}

/// Rows that learn together, and ranges chosen before: the same bytes on any number of threads.
#[test]
fn what_learns_on_the_gram_matrix_depends_on_no_threads() {
    let folder = tempfile::tempdir().unwrap();
    for method in ["flexround", "lrq"] {
        let quantized = |threads: &str| {
            let out = folder.path().join(format!("{method}-{threads}.onnx"));
            let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
            let pipeline = format!(
                "infer-shapes, fold-constants, *(eliminate-identity, fold-batch-norm, fold-affine, fold-constants, infer-shapes, \
                 drop-dead), calibrate, assign-encodings, clip-weights, round{{method={method}}}, refit-scales"
            );
            let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--samples", "24"];
            let more =
                ["--scheme", "w3a8", "--pipeline", &pipeline, "--threads", threads, "--progress", "none", "--json"];
            let json: serde_json::Value = serde_json::from_str(&tool_ok(&[&args[..], &more].concat())).unwrap();
            assert_eq!(json["verify"]["passed"], true, "{json:#}");
            std::fs::read(out).unwrap()
        };
        assert!(quantized("1") == quantized("2"), "{method}: other bytes on two threads");
    }
}
