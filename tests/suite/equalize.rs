//! Equalization keeps the function.

use onnx_quant::{exec, targets};
use passes::exec::{DataError, Dataset, Executor};
use passes::model::{Model, Plan};
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::tensor::Tensor;

/// Rows with a few channels much larger than the others.
pub(super) struct Rows {
    pub(super) channels: usize,
    pub(super) samples: usize,
}

impl Dataset for Rows {
    fn len(&self) -> usize {
        self.samples
    }

    fn name(&self, index: usize) -> String {
        format!("rows {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| {
            let noise = ((i * 7919 + index * 104_729) % 2003) as f32 / 1001.5 - 1.0;
            if i % self.channels == 3 { 60.0 * noise } else { noise }
        };
        Ok(vec![Tensor::of([512, self.channels], (0..512 * self.channels).map(value).collect())])
    }
}

/// A matrix as it stands in the text form.
pub(super) fn matrix(name: &str, rows: usize, columns: usize) -> String {
    let value = |i: usize| format!("{:.3}", ((i * 31 + name.len() * 17) % 41) as f32 / 20.0 - 1.0);
    let values: Vec<String> = (0..rows * columns).map(value).collect();
    format!("  %{name} = const f32[{rows},{columns}] [{}]\n", values.join(", "))
}

fn smoothed(source: &str, data: &Rows) -> (Model, Model, String) {
    divided(source, data, "smooth", "w8a8")
}

/// Both float models compute the same outputs from `feeds`, each to `tolerance` of its largest value.
pub(super) fn same_within(
    before: &Model,
    after: &Model,
    executor: &dyn Executor,
    feeds: &[Tensor],
    tolerance: f32,
    what: &str,
) {
    let [before, after] = [before, after].map(|model| {
        let graph = model.graph();
        let run = Simulation::prepare(graph, &Plan::default(), executor, graph.outputs()).unwrap();
        run.run(feeds).unwrap()
    });
    assert_eq!(before.len(), after.len(), "{what}: other outputs");
    for (a, b) in before.iter().zip(&after) {
        assert_eq!(a.shape(), b.shape(), "{what}: another shape");
        let (a, b) = (a.floats().unwrap(), b.floats().unwrap());
        let top = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(a.iter().zip(b.iter()).all(|(x, y)| (x - y).abs() <= tolerance * top), "{what}: the function changed");
    }
}

fn check_same(before: &Model, after: &Model, executor: &dyn Executor, feeds: &[Tensor], what: &str) {
    same_within(before, after, executor, feeds, 1e-5, what);
}

/// The same where calibration never looked: at zeros, at a hundred times `sample`, and at other numbers.
fn check_unseen(before: &Model, after: &Model, executor: &dyn Executor, sample: &[Tensor], what: &str) {
    let others: [fn(usize, f32) -> f32; 3] =
        [|_, _| 0.0, |_, value| 100.0 * value, |i, _| ((i * 6427 + 11) % 1999) as f32 / 999.5 - 1.0];
    for other in others {
        let mut feeds = Vec::new();
        for tensor in sample {
            let values = tensor.floats().unwrap();
            let values: Vec<f32> = values.iter().enumerate().map(|(i, value)| other(i, *value)).collect();
            feeds.push(Tensor::of(tensor.shape(), values));
        }
        same_within(before, after, executor, &feeds, 1e-4, what);
    }
}

/// The model before and after `pass`, which must keep its function, and what the pass counted.
fn divided(source: &str, data: &dyn Dataset, pass: &str, scheme: &str) -> (Model, Model, String) {
    let catalogue = passes::catalogue::passes();
    let plain = passes::text::parse(source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: Some(data),
        scheme: passes::target::Scheme::parse(scheme).unwrap(),
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let text = format!("infer-shapes, calibrate, {pass}, drop-dead");
    let pipeline = Pipeline::parse(&text, &catalogue).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    let counts = trace.steps.iter().find(|(name, _)| *name == pass).unwrap().1.counts.clone();
    for index in 0..data.len() {
        check_same(&plain, &after, executor.as_ref(), &data.sample(index).unwrap(), pass);
    }
    check_unseen(&plain, &after, executor.as_ref(), &data.sample(0).unwrap(), pass);
    (plain, after, format!("{counts:?}"))
}

#[test]
fn a_division_folds_through_a_product_into_the_linear_before_it() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}{}{}  %g = MatMul(%x, %wg)\n  %s = Sigmoid(%g)\n  %u = MatMul(%x, %wu)\n  %t = Mul(%s, %u)\n  %y = MatMul(%t, %wd)\n}}\n",
        matrix("wg", 8, 6),
        matrix("wu", 8, 6),
        matrix("wd", 6, 4)
    );
    let (_, after, counts) = smoothed(&source, &Rows { channels: 8, samples: 4 });
    assert!(counts.contains("weights"), "{counts}");
    // The input itself can only be divided by a node of its own.
    assert!(after.graph().nodes().filter(|(_, node)| node.op.is("Mul")).count() <= 2);
}

/// The loud channel's weights grow, so that they are rounded in finer steps of the block that they share.
#[test]
fn weights_of_loud_channels_grow_where_activations_stay_in_float() {
    let source =
        format!("opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}  %y = MatMul(%x, %w)\n}}\n", matrix("w", 8, 16));
    let data = Rows { channels: 8, samples: 4 };
    let (before, after, counts) = divided(&source, &data, "awq", "w3a16");
    assert!(counts.contains("inserted") && counts.contains("weights\": 1"), "{counts}");
    let [old, new] = [&before, &after].map(|model| {
        let graph = model.graph();
        let product = graph.nodes().find(|(_, node)| node.op.is("MatMul")).unwrap().1;
        graph.constant_input(product, 1).unwrap().floats().unwrap().into_owned()
    });
    let grown = |row: usize| f64::from(new[row * 16].abs()) / f64::from(old[row * 16].abs());
    assert!((0..8).filter(|&row| row != 3).all(|row| grown(3) > 1.5 * grown(row)), "{:?}", (grown(3), grown(0)));
    // Nothing to do where activations are rounded too.
    let (_, _, counts) = divided(&source, &data, "awq", "w3a8");
    assert_eq!(counts, "{}");
}

#[test]
fn an_input_with_outliers_gets_a_node_and_its_other_readers_do_not() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y) {{\n{}  %h = MatMul(%x, %w)\n  %y = Add(%h, %x)\n}}\n",
        matrix("w", 8, 8)
    );
    let (_, after, counts) = smoothed(&source, &Rows { channels: 8, samples: 4 });
    assert!(counts.contains("inserted"), "{counts}");
    let graph = after.graph();
    let add = graph.nodes().find(|(_, node)| node.op.is("Add")).unwrap().1;
    assert_eq!(add.input(1), Some(graph.inputs()[0]), "the residual reads what it read");
}

/// Cross-layer equalization of real networks: `Relu` and residual sums in one, clamps and depthwise convolutions in the other.
#[test]
fn equalized_layers_keep_the_function() {
    for (name, at_least) in [("digits-resnet", 3), ("digits-mobilenet", 0)] {
        let plain = onnx_quant::import::file(&super::fixture(&format!("models/{name}.onnx"))).unwrap().model;
        let slots = onnx_quant::dataset::Slot::of(plain.graph());
        let data = onnx_quant::dataset::Files::open(&super::fixture("data/digits"), slots, None, Some(12)).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let mut cx = PassContext {
            dataset: Some(&data as &dyn Dataset),
            scheme: passes::target::Scheme::parse("w4a8").unwrap(),
            ..PassContext::new(targets::TARGETS[0], executor.as_ref())
        };
        let text =
            "infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes, calibrate, equalize-layers";
        let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).unwrap();
        let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let counts = &trace.steps.iter().find(|(name, _)| *name == "equalize-layers").unwrap().1.counts;
        assert!(counts.get("regions").copied().unwrap_or(0) >= at_least, "{name}: {counts:?}");
        for index in 0..3 {
            check_same(&plain, &after, executor.as_ref(), &data.sample(index).unwrap(), name);
        }
        check_unseen(&plain, &after, executor.as_ref(), &data.sample(0).unwrap(), name);
    }
}

/// Of every convolution that a batch normalization followed it is known what training saw, before and after its channels were divided;
/// samples show about the same.
#[test]
fn statistics_of_training_follow_their_channels() {
    let plain = onnx_quant::import::file(&super::fixture("models/digits-resnet.onnx")).unwrap().model;
    let slots = onnx_quant::dataset::Slot::of(plain.graph());
    let data = onnx_quant::dataset::Files::open(&super::fixture("data/digits"), slots, None, Some(64)).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let mut cx = PassContext {
        dataset: Some(&data as &dyn Dataset),
        scheme: passes::target::Scheme::parse("w4a8").unwrap(),
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let fold = "infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes";
    for text in [fold.to_owned(), format!("{fold}, calibrate, equalize-layers")] {
        let pipeline = Pipeline::parse(&text, &passes::catalogue::passes()).unwrap();
        let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
        let graph = model.graph();
        let made = graph.nodes().filter_map(|(_, node)| node.output(0));
        let known: Vec<_> = made.filter(|value| model.stats().trained(*value).is_some()).collect();
        assert_eq!(known.len(), 9, "{text}");
        let part = passes::ir::walk::extract(graph, graph.inputs(), &known);
        let session = executor.prepare(&part).unwrap();
        let mut sums: Vec<Vec<[f64; 3]>> = known.iter().map(|_| Vec::new()).collect();
        for index in 0..data.len() {
            let results = session.run(&data.sample(index).unwrap()).unwrap();
            for (sums, result) in sums.iter_mut().zip(&results) {
                let channels = result.shape()[1];
                sums.resize(channels, [0.0; 3]);
                let values = result.floats().unwrap();
                for (at, value) in values.iter().enumerate() {
                    let sum = &mut sums[at / (values.len() / channels)];
                    let value = f64::from(*value);
                    *sum = [sum[0] + 1.0, sum[1] + value, sum[2] + value * value];
                }
            }
        }
        for (value, sums) in known.iter().zip(&sums) {
            let trained = model.stats().trained(*value).unwrap();
            let apart = |(c, [count, sum, squares]): (usize, &[f64; 3])| {
                let mean = sum / count;
                let deviation = (squares / count - mean * mean).sqrt();
                let (unit, wanted) = (f64::from(trained.deviation[c]).max(1e-3), f64::from(trained.mean[c]));
                ((mean - wanted) / unit).powi(2) + (deviation / unit - 1.0).powi(2)
            };
            let mean = sums.iter().enumerate().map(apart).sum::<f64>() / sums.len() as f64;
            assert!(mean < 0.3, "{}: {mean}, {text}", graph.value(*value).name);
        }
    }
}

/// The weight of a small convolution as it stands in the text form.
fn kernel(name: &str) -> String {
    let value = |i: usize| format!("{:.3}", ((i * 31 + name.len() * 17) % 41) as f32 / 20.0 - 1.0 + (i / 4) as f32);
    format!("  %{name} = const f32[4,4,1,1] [{}]\n", (0..16).map(value).collect::<Vec<_>>().join(", "))
}

/// Images with one loud channel.
struct Images;

impl Dataset for Images {
    fn len(&self) -> usize {
        4
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| {
            let noise = ((i * 7919 + index * 104_729) % 2003) as f32 / 1001.5 - 0.5;
            if i / 256 == 2 { 40.0 * noise } else { noise }
        };
        Ok(vec![Tensor::of([1, 4, 16, 16], (0..1024).map(value).collect::<Vec<f32>>())])
    }
}

fn regions_of(source: &str, keep: &[&str]) -> u64 {
    regions_at("w4a8", source, keep)
}

/// How many regions are equalized for `scheme`; the function stays.
fn regions_at(scheme: &str, source: &str, keep: &[&str]) -> u64 {
    let plain = passes::text::parse(source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let kept = keep.iter().map(|name| ((*name).to_owned(), (*name).to_owned())).collect();
    let mut cx = PassContext {
        dataset: Some(&Images as &dyn Dataset),
        scheme: passes::target::Scheme::parse(scheme).unwrap(),
        keep_float: &kept,
        ..PassContext::new(targets::TARGETS[0], executor.as_ref())
    };
    let pipeline = Pipeline::parse("infer-shapes, calibrate, equalize-layers", &passes::catalogue::passes()).unwrap();
    let (after, trace) = PassManager::new(Vec::new(), true).run(&pipeline, plain.clone(), &mut cx).unwrap();
    for index in 0..Images.len() {
        check_same(&plain, &after, executor.as_ref(), &Images.sample(index).unwrap(), source);
    }
    check_unseen(&plain, &after, executor.as_ref(), &Images.sample(0).unwrap(), source);
    trace.steps.last().unwrap().1.counts.get("regions").copied().unwrap_or(0)
}

#[test]
fn a_region_with_a_constant_or_with_something_kept_in_float_is_left_alone() {
    let constant = format!("  %c = const f32[1,4,16,16] [{}]\n", vec!["0.5"; 1024].join(", "));
    let model = |middle: &str| {
        format!(
            "opset 21\ngraph (%x: f32[1,4,16,16]) -> (%y) {{\n{}{}{constant}  %a = Conv(%x, %wa) @first\n{middle}  %y = Conv(%r, \
             %wab) @second\n}}\n",
            kernel("wa"),
            kernel("wab")
        )
    };
    let plain = model("  %r = Relu(%a)\n");
    assert_eq!(regions_of(&plain, &[]), 1);
    assert_eq!(regions_of(&plain, &["r"]), 0, "kept by name");
    let summed = model("  %k = Relu(%c)\n  %s = Add(%a, %k)\n  %r = Relu(%s)\n");
    assert_eq!(regions_of(&summed, &[]), 0, "a constant cannot be divided");
}

/// A convolution whose channels are of very different sizes, `middle`, and a convolution in `groups` that reads `%r`.
fn region(outputs: &str, middle: &str, groups: usize) -> String {
    let uneven = |name: &str| {
        let size = |i: usize| [1.0, 8.0, 0.25, 30.0][i / 4] * (((i * 31 + name.len() * 17) % 41) as f32 / 20.0 - 1.0);
        let values: Vec<String> = (0..16).map(|i| format!("{:.3}", size(i))).collect();
        format!("  %{name} = const f32[4,4,1,1] [{}]\n", values.join(", "))
    };
    let per = 4 / groups;
    let read: Vec<String> = (0..36 * per).map(|i| format!("{:.3}", ((i * 37 + 11) % 29) as f32 / 14.0 - 1.0)).collect();
    format!(
        "opset 21\ngraph (%x: f32[1,4,16,16]) -> ({outputs}) {{\n{}{}  %bias = const f32[4] [0.5, -3, 0.1, 2]\n  \
         %wr = const f32[4,{per},3,3] [{}]\n  %a = Conv(%x, %wa, %bias)\n{middle}  \
         %y = Conv(%r, %wr) {{pads=[1, 1, 1, 1], group={groups}}}\n}}\n",
        uneven("wa"),
        uneven("wbb"),
        read.join(", ")
    )
}

#[test]
fn regions_keep_the_function_through_whatever_connects_them() {
    for middle in [
        "  %r = Relu(%a)\n",
        "  %r = LeakyRelu(%a) {alpha=0.1}\n",
        "  %r = MaxPool(%a) {kernel_shape=[2, 2], strides=[2, 2]}\n",
        "  %r = AveragePool(%a) {kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]}\n",
        "  %r = GlobalAveragePool(%a)\n",
        "  %r = Identity(%a)\n",
        "  %b = Conv(%x, %wbb)\n  %r = Add(%a, %b)\n",
    ] {
        for groups in [1, 2, 4] {
            let source = region("%y", middle, groups);
            regions_of(&source, &[]);
            // Where activations have few bits, uneven channels are what costs most.
            assert_eq!(regions_at("w8a4", &source, &[]), 1, "{middle} in groups: {groups}");
        }
    }
}

#[test]
fn nothing_is_equalized_through_thresholds_or_under_other_readers() {
    for (outputs, middle) in [
        ("%y", "  %low = const f32[] [0]\n  %high = const f32[] [6]\n  %r = Clip(%a, %low, %high)\n"),
        ("%y", "  %r = Sigmoid(%a)\n"),
        ("%y", "  %r = HardSwish(%a)\n"),
        ("%y, %r", "  %r = Relu(%a)\n"),
        ("%y, %a", "  %r = Relu(%a)\n"),
        ("%y, %z", "  %r = Relu(%a)\n  %z = Sigmoid(%r)\n"),
    ] {
        for groups in [1, 2, 4] {
            assert_eq!(regions_at("w8a4", &region(outputs, middle, groups), &[]), 0, "{outputs}: {middle}");
        }
    }
}

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

/// Rows with a loud number here and there.
struct Spikes;

impl Dataset for Spikes {
    fn len(&self) -> usize {
        4
    }

    fn name(&self, index: usize) -> String {
        format!("spikes {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |i: usize| {
            let noise = ((i * 7919 + index * 104_729) % 2003) as f32 / 1001.5 - 1.0;
            if i.is_multiple_of(61) { 20.0 * noise } else { noise }
        };
        Ok(vec![Tensor::of([512, 12], (0..512 * 12).map(value).collect())])
    }
}

/// Loud numbers are spread over all of a token; what is never negative, and what was turned already, stays.
#[test]
fn inputs_are_turned_where_that_pays_and_only_once() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,12]) -> (%y) {{\n{}{}{}  %a = MatMul(%x, %wa)\n  %b = Gemm(%x, %wb) {{transB=1}}\n  %c = Relu(%a)\n  %d = MatMul(%c, %wd)\n  %y = Add(%d, %b)\n}}\n",
        matrix("wa", 12, 16),
        matrix("wb", 4, 12),
        matrix("wd", 16, 4)
    );
    let (_, after, counts) = divided(&source, &Spikes, "rotate-inputs", "w4a4");
    assert!(counts.contains("\"tensors\": 1") && counts.contains("\"weights\": 2"), "{counts}");
    let graph = after.graph();
    let products: Vec<_> = graph.nodes().filter(|(_, node)| node.op.is("MatMul") || node.op.is("Gemm")).collect();
    // 12 = 3 · 4 with no matrix of order 3: one of order 12 on the left.
    assert_eq!(products.len(), 4, "{counts}");
    let turned = products[1].1.input(0).unwrap();
    assert_eq!(graph.producer(turned).unwrap().1.op.name.as_ref(), "Reshape");
    assert!(products[2].1.input(0) == Some(turned), "one tensor, turned once");
}

/// A pass for fixed-point hardware over `source`, with what it counted.
fn for_hardware(source: &str, pass: &str) -> (Model, Model, String) {
    let catalogue = passes::catalogue::passes();
    let plain = passes::text::parse(source).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&plain.meta).unwrap();
    let target = targets::find("hls4ml").unwrap();
    let scheme = target.accepts().completed(passes::target::Scheme::W8A8);
    let mut cx = PassContext { scheme, ..PassContext::new(target, executor.as_ref()) };
    let run = |text: &str, model: Model, cx: &mut PassContext<'_>| {
        let pipeline = Pipeline::parse(text, &catalogue).unwrap();
        PassManager::new(Vec::new(), true).run(&pipeline, model, cx).unwrap()
    };
    let (before, _) = run("infer-shapes", plain, &mut cx);
    let (after, trace) = run(&format!("infer-shapes, {pass}"), before.clone(), &mut cx);
    let counts = trace.steps.last().map(|(_, step)| format!("{:?}", step.counts)).unwrap_or_default();
    let feed = Tensor::of([1, 2, 3, 3], (0..18).map(|i| (i as f32 - 7.0) * 0.9).collect::<Vec<f32>>());
    let feeds = [feed];
    check_same(&before, &after, executor.as_ref(), &feeds, pass);
    check_unseen(&before, &after, executor.as_ref(), &feeds, pass);
    (before, after, counts)
}

/// A convolution, a clamp, what comes after it, and a product.
fn clamped(between: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[1,2,3,3]) -> (%y) {{\n  %w = const f32[2,2,1,1] [1, -0.5, 2, 0.75]\n  %b = const f32[2] [0.5, -1]\n  \
         %low = const f32[] [0]\n  %high = const f32[] [6]\n  %c = Conv(%x, %w, %b)\n  %r = Clip(%c, %low, %high)\n{between}  \
         %f = Flatten(%p)\n{}  %v = const f32[3] [1, 2, 3]\n  %y = Gemm(%f, %g, %v)\n}}",
        matrix("g", 2, 3)
    )
}

#[test]
fn clamps_end_where_codes_at_a_power_of_two_end() {
    let (_, after, counts) = for_hardware(&clamped("  %p = GlobalAveragePool(%r)\n"), "fit-clamps");
    assert!(counts.contains('1'), "{counts}");
    let (_, clip) = after.graph().nodes().find(|(_, node)| node.op.is("Clip")).unwrap();
    let high = after.graph().constant_input(clip, 2).unwrap().floats().unwrap()[0];
    // 255 / 32 lies farther from 6 than 255 / 64 does, in octaves: 7.97 / 6 = 1.33 and 6 / 3.98 = 1.5.
    assert!((high - 255.0 / 32.0).abs() < 1e-6, "{high}");
    // Another reader would see the scaled tensor.
    let (_, _, counts) = for_hardware(&clamped("  %q = GlobalAveragePool(%r)\n  %p = Sigmoid(%q)\n"), "fit-clamps");
    assert!(!counts.contains('1'), "{counts}");
}

#[test]
fn pools_become_convolutions_by_powers_of_two() {
    let (_, after, _) = for_hardware(&clamped("  %p = GlobalAveragePool(%r)\n"), "pool-to-conv");
    let taps = |model: &Model| {
        let pool = model.graph().nodes().find(|(_, node)| node.op.is("Conv") && node.int("group", 1) == 2);
        model.graph().constant_input(pool.unwrap().1, 1).unwrap().floats().unwrap()[0]
    };
    assert!((taps(&after) - 0.125).abs() < f32::EPSILON, "the nearest to 1/9");
    let (_, after, _) = for_hardware(&clamped("  %q = GlobalAveragePool(%r)\n  %p = Sigmoid(%q)\n"), "pool-to-conv");
    assert!((taps(&after) - 1.0 / 9.0).abs() < f32::EPSILON, "nothing behind it makes up for another");
}

/// Every pool has a factor of its own: the second is not one over what the first left.
#[test]
fn a_pool_behind_a_pool_keeps_the_function() {
    let (_, after, _) =
        for_hardware(&clamped("  %q = GlobalAveragePool(%r)\n  %p = GlobalAveragePool(%q)\n"), "pool-to-conv");
    assert!(!after.graph().nodes().any(|(_, node)| node.op.is("GlobalAveragePool")));
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
    let shapes = |open: bool| {
        if open {
            "  %lead = Shape(%x) {end=2}\n  %heads = const i64[2] [2, 8]\n  %all = const i64[1] [16]\n  \
             %split = Concat(%lead, %heads) {axis=0}\n  %join = Concat(%lead, %all) {axis=0}\n"
        } else {
            "  %split = const i64[4] [0, 0, 2, 8]\n  %join = const i64[3] [0, 0, 16]\n"
        }
    };
    let of = |reader: &str, outputs: &str, open: bool| {
        format!(
            "opset 21\ngraph (%x: f32[{}]) -> ({outputs}) {{\n{}{}{}{}  %bias = const f32[16] [{}]\n{}  \
             %qs = MatMul(%x, %wq)\n  %qr = Reshape(%qs, %split)\n  %q = Transpose(%qr) {{perm=[0, 2, 1, 3]}}\n  \
             %ks = MatMul(%x, %wkk)\n  %kr = Reshape(%ks, %split)\n  %k = Transpose(%kr) {{perm=[0, 2, 3, 1]}}\n  \
             %vs = MatMul(%x, %wvvv)\n  %vb = Add(%vs, %bias)\n  %vr = Reshape(%vb, %split)\n  %v = Transpose(%vr) {{perm=[0, 2, 1, 3]}}\n  \
             %s = MatMul(%q, %k)\n  %p = Softmax(%s) {{axis=-1}}\n  %o = MatMul(%p, %v)\n  \
             %ot = Transpose(%o) {{perm=[0, 2, 1, 3]}}\n  %oj = Reshape(%ot, %join)\n{reader}}}\n",
            if open { "batch,seq,16" } else { "4,512,16" },
            matrix("wq", 16, 16),
            matrix("wkk", 16, 16),
            matrix("wvvv", 16, 16),
            matrix("woooo", 16, 24),
            (0..16).map(|i| format!("{}", f64::from(i) * 0.1)).collect::<Vec<_>>().join(", "),
            shapes(open)
        )
    };
    let attention = |reader: &str, outputs: &str| of(reader, outputs, false);
    let heads = |source: &str| {
        let values = (0..4 * 512 * 16).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect::<Vec<f32>>();
        turned(source, &[Tensor::of([4, 512, 16], values)])
    };
    let (count, after) = heads(&attention("  %y = MatMul(%oj, %woooo)\n", "%y"));
    assert_eq!(count, 1);
    // Exporters compute the shapes of reshapes from the input's.
    assert_eq!(heads(&of("  %y = MatMul(%oj, %woooo)\n", "%y", true)).0, 1);
    let names: Vec<String> = after.graph().value_ids().map(|v| after.graph().value(v).name.to_string()).collect();
    assert!(names.iter().any(|name| name == "wvvv.turned") && names.iter().any(|name| name == "woooo.turned"));
    // Something else reads what attention made of the values, or the values themselves.
    assert_eq!(heads(&attention("  %y = MatMul(%oj, %woooo)\n  %z = Relu(%oj)\n", "%y, %z")).0, 0);
    assert_eq!(heads(&attention("  %y = MatMul(%oj, %woooo)\n  %z = Relu(%vb)\n", "%y, %z")).0, 0);
    assert_eq!(heads(&attention("  %r = Relu(%oj)\n  %y = MatMul(%r, %woooo)\n", "%y")).0, 0);
}

/// Two heads of queries share the values of one: copies are turned as what they are copies of is, in runs of a head.
#[test]
fn heads_that_share_values_are_turned_together() {
    let grouped = |end: &str| {
        format!(
            "opset 21\ngraph (%x: f32[2,5,16]) -> (%y) {{\n{}{}{}  %q2 = const i64[4] [0, 0, 2, 8]\n  %v1 = const i64[4] [0, 0, 1, 8]\n  \
             %two = const i64[1] [2]\n  %copies = const i64[5] [2, 1, 2, 5, 8]\n  %all = const i64[4] [2, 2, 5, 8]\n  \
             %join = const i64[3] [0, 0, 16]\n  %qs = MatMul(%x, %wq)\n  %qr = Reshape(%qs, %q2)\n  \
             %q = Transpose(%qr) {{perm=[0, 2, 1, 3]}}\n  %k = Transpose(%qr) {{perm=[0, 2, 3, 1]}}\n  %s = MatMul(%q, %k)\n  \
             %p = Softmax(%s) {{axis=-1}}\n  %vs = MatMul(%x, %wvvv)\n  %vr = Reshape(%vs, %v1)\n  \
             %vt = Transpose(%vr) {{perm=[0, 2, 1, 3]}}\n  %vu = Unsqueeze(%vt, %two)\n  %ve = Expand(%vu, %copies)\n  \
             %v = Reshape(%ve, %all)\n  %o = MatMul(%p, %v)\n  %ot = Transpose(%o) {{perm=[0, 2, 1, 3]}}\n  \
             %oj = Reshape(%ot, %join)\n{end}}}\n",
            matrix("wq", 16, 16),
            matrix("wvvv", 16, 8),
            matrix("woooo", 16, 6)
        )
    };
    let feeds = [Tensor::of([2, 5, 16], (0..160).map(|i| (i * 7919 % 2003) as f32 / 1001.5 - 1.0).collect())];
    let (count, after) = turned(&grouped("  %y = MatMul(%oj, %woooo)\n"), &feeds);
    assert_eq!(count, 1);
    let name = |node: &passes::ir::Node| node.output(0).map(|v| after.graph().value(v).name.to_string());
    let copies: Vec<_> = after.graph().nodes().filter(|(_, node)| node.op.is("Expand")).map(|(_, n)| name(n)).collect();
    assert_eq!(copies, [Some("ve.turned".to_owned())]);
    // A bias behind the join is added to what is turned back.
    assert_eq!(turned(&grouped("  %z = MatMul(%oj, %woooo)\n  %y = Relu(%z)\n"), &feeds).0, 1);
}

/// What looks like values of heads and is not: each would compute something else.
#[test]
fn rows_that_are_summed_over_or_cut_are_not_turned() {
    let feeds = |shapes: &[&[usize]]| -> Vec<Tensor> {
        let value = |i: usize| (i * 7919 % 2003) as f32 / 1001.5 - 1.0;
        shapes.iter().map(|shape| Tensor::of(*shape, (0..shape.iter().product()).map(value).collect())).collect()
    };
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

/// Other readers see the very tensor that they saw before a node divided it for the products.
#[test]
fn what_is_divided_by_a_node_stays_for_others_to_the_bit() {
    let source = format!(
        "opset 21\ngraph (%x: f32[512,8]) -> (%y, %z) {{\n{}  %h = Neg(%x)\n  %y = MatMul(%h, %ww)\n  %z = Abs(%h)\n}}\n",
        matrix("ww", 8, 16)
    );
    let data = Rows { channels: 8, samples: 4 };
    let (before, after, counts) = smoothed(&source, &data);
    assert!(counts.contains("inserted"), "{counts}");
    let executor = (exec::find("rten").unwrap().build)(&before.meta).unwrap();
    let feeds = data.sample(1).unwrap();
    let [old, new] = [&before, &after].map(|model| {
        let graph = model.graph();
        let run = Simulation::prepare(graph, &Plan::default(), executor.as_ref(), graph.outputs()).unwrap();
        run.run(&feeds).unwrap().remove(1)
    });
    assert_eq!(old, new);
}
