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

pub(super) fn check_same(before: &Model, after: &Model, executor: &dyn Executor, feeds: &[Tensor], what: &str) {
    same_within(before, after, executor, feeds, 1e-5, what);
}

/// The same where calibration never looked: at zeros, at a hundred times `sample`, and at other numbers.
pub(super) fn check_unseen(before: &Model, after: &Model, executor: &dyn Executor, sample: &[Tensor], what: &str) {
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
pub(super) fn divided(source: &str, data: &dyn Dataset, pass: &str, scheme: &str) -> (Model, Model, String) {
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
    let counts = trace.steps.iter().find(|(name, _)| Some(*name) == pass.split('{').next()).unwrap().1.counts.clone();
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

/// The one channel that is an outlier is divided, and the weights that read the others stay what they are to the bit.
#[test]
fn an_outlier_among_channels_is_scaled_alone() {
    let source =
        format!("opset 21\ngraph (%x: f32[512,32]) -> (%y) {{\n{}  %y = MatMul(%x, %w)\n}}\n", matrix("w", 32, 16));
    let data = Rows { channels: 32, samples: 4 };
    let (before, after, counts) = divided(&source, &data, "scale-outliers", "w8a8");
    assert!(counts.contains("inserted") && counts.contains("weights\": 1"), "{counts}");
    let [old, new] = [&before, &after].map(|model| {
        let graph = model.graph();
        let product = graph.nodes().find(|(_, node)| node.op.is("MatMul")).unwrap().1;
        graph.constant_input(product, 1).unwrap().floats().unwrap().into_owned()
    });
    for (row, (old, new)) in old.chunks(16).zip(new.chunks(16)).enumerate() {
        let grown = new[0] / old[0];
        assert!(if row == 3 { (7.0..8.5).contains(&grown) } else { old == new }, "{row}: {grown}");
    }
    let (_, _, counts) = divided(&source, &data, "scale-outliers", "w8a16");
    assert_eq!(counts, "{}", "activations stay in float");
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
