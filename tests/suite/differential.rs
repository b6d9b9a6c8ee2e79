//! ONNX Runtime, graph optimization off, against our simulation: the consumer is the judge.

use std::collections::{BTreeMap, BTreeSet};

use onnx_quant::{dataset, exec, targets};
use passes::encoding::Encoding;
use passes::exec::Dataset;
use passes::grid::Grid;
use passes::id::{Site, ValueId};
use passes::ir::{Graph, walk};
use passes::model::{Model, Plan, Statistic};
use passes::pass::{PassContext, PassManager, Pipeline, Wish};
use passes::simulate::Simulation;
use passes::target::{Goal, Scheme, Target};
use passes::tensor::Tensor;

use super::fixture;

fn quantized(name: &str, target: &'static dyn Target, scheme: &str) -> (Model, dataset::Files) {
    let imported = onnx_quant::import::file(&fixture(name)).unwrap();
    let slots = dataset::Slot::of(imported.model.graph());
    let data = dataset::Files::open(&fixture("data/digits"), slots, None, None).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&imported.model.meta).unwrap();
    let scheme = Scheme::parse(scheme).unwrap();
    let mut cx = PassContext {
        scheme,
        dataset: Some(&data as &dyn Dataset),
        threads: 2,
        ..PassContext::new(target, executor.as_ref())
    };
    let pipeline = Pipeline::parse(&target.pipeline(Goal::Balanced, &scheme), &passes::catalogue::passes()).unwrap();
    let (model, _) = PassManager::default().run(&pipeline, imported.model, &mut cx).unwrap();
    (model, data)
}

/// The distance between the points of `grid` around `point`, the wider one.
fn spacing(grid: &dyn Grid, point: f64) -> f64 {
    let nudge = 1e-6 * point.abs().max(1e-6);
    (grid.above(point + nudge) - point).max(point - grid.below(point - nudge))
}

/// Whether every run computes the scales of what stands at `site`.
fn is_dynamic(plan: &Plan, site: Site) -> bool {
    plan.encoding(site).is_some_and(|encoding| encoding.granularity.is_dynamic())
}

/// What is compared, in order: tensors in codes of fixed scales, those that are read by scales of each run, as they were before, and
/// what comes of nodes that read codes.
fn judged(graph: &Graph, plan: &Plan) -> Vec<ValueId> {
    let in_codes = |value: ValueId| plan.encoding(Site::Value(value)).is_some();
    let site = |node, input| u16::try_from(input).map(|input| Site::Use { node, input }).unwrap();
    let mut judged = Vec::new();
    for (id, node) in graph.nodes() {
        let reads = node.inputs.iter().enumerate().filter_map(|(at, value)| Some((site(id, at), (*value)?)));
        let (mut any, mut raw) = (false, Vec::new());
        for (site, value) in reads {
            any |= plan.encoding(site).is_some() || in_codes(value);
            let dynamic = is_dynamic(plan, site) || is_dynamic(plan, Site::Value(value));
            raw.extend(Some(value).filter(|value| dynamic && graph.producer(*value).is_some()));
        }
        let results = node.outputs.iter().flatten().copied();
        judged.extend(raw.into_iter().chain(results.filter(|value| any || in_codes(*value))));
    }
    let mut seen = BTreeSet::new();
    judged.retain(|value| seen.insert(*value));
    judged
}

/// How far `got` may be from `want`, element by element: a step of `encoding` where there is one, or else what float sums differ by.
fn bounds(encoding: Option<&Encoding>, want: &Tensor) -> Vec<f64> {
    let values = want.floats().unwrap();
    let Some(encoding) = encoding else {
        let most = values.iter().fold(0.0_f64, |most, v| most.max(f64::from(v.abs())));
        return vec![1e-4 * most.max(1e-6); values.len()];
    };
    let (scales, zeros) = encoding.per_element(want.shape()).unwrap();
    let step = |((v, scale), zero): ((&f32, &f32), &f32)| {
        let point = f64::from(v / scale) + f64::from(*zero);
        let point = if encoding.grid.info().integer { point.round() } else { encoding.grid.nearest(point) };
        spacing(encoding.grid, point) * f64::from(scale.abs())
    };
    values.iter().zip(&scales).zip(&zeros).map(step).collect()
}

/// Node by node: every tensor that is compared is fed to ONNX Runtime as the simulation computed it before it, so that one
/// flipped rounding does not travel. A tensor may then differ by one step where the float sum lies on the edge between
/// two codes: in at most one element of ten thousand, and never by more.
fn agrees(name: &str, target: &'static dyn Target, scheme: &str) {
    let what = format!("{name} {scheme} for {}", target.info().about.name);
    let (model, data) = quantized(name, target, scheme);
    let (graph, plan) = (model.graph(), model.plan());
    let rten = (exec::find("rten").unwrap().build)(&model.meta).unwrap();
    let taps = judged(graph, plan);
    let lowered = target.lower(&model).unwrap();
    let ort =
        (exec::find("ort").unwrap().build)(&lowered.meta).expect("the feature is built only where ONNX Runtime is");
    let feeds = data.sample(3).unwrap();
    let simulated = |value: ValueId| {
        // As it is before every run encodes it, where that is what every run does.
        let plan =
            if is_dynamic(plan, Site::Value(value)) { &plan.only(|site| *site != Site::Value(value)) } else { plan };
        Simulation::prepare(graph, plan, rten.as_ref(), &[value]).unwrap().run(&feeds).unwrap().remove(0)
    };
    let simulated: BTreeMap<ValueId, Tensor> = taps.iter().map(|value| (*value, simulated(*value))).collect();
    let result_of = |value: &ValueId| {
        let name = &graph.value(*value).name;
        let fixed = plan.encoding(Site::Value(*value)).is_some() && !is_dynamic(plan, Site::Value(*value));
        let codes = Some(format!("{name}.dequantized")).filter(|_| fixed);
        codes.and_then(|codes| lowered.graph.find(&codes)).or_else(|| lowered.graph.find(name)).expect("it is lowered")
    };
    let (mut elements, mut flips) = (0_usize, 0_usize);
    for (index, value) in taps.iter().enumerate() {
        // Everything before this tensor comes from the simulation.
        let given: Vec<&ValueId> = taps[..index].iter().collect();
        let inside: Vec<ValueId> = given.iter().map(|v| result_of(v)).collect();
        let part = walk::extract(&lowered.graph, &inside, &[result_of(value)]);
        let mut part_feeds: Vec<_> = given.iter().map(|v| simulated[v].clone()).collect();
        part_feeds.extend(feeds.iter().take(part.inputs().len() - part_feeds.len()).cloned());
        let got = ort.prepare(&part).unwrap().run(&part_feeds).unwrap().remove(0);
        let (got, want) = (got.floats().unwrap(), &simulated[value]);
        let bounds = bounds(plan.encoding(Site::Value(*value)).filter(|e| !e.granularity.is_dynamic()), want);
        assert_eq!(got.len(), bounds.len());
        for ((a, b), step) in got.iter().zip(want.floats().unwrap().iter()).zip(bounds) {
            let steps = f64::from((a - b).abs()) / step;
            assert!(steps < 1.01, "{what}, {}: {steps} steps", graph.value(*value).name);
            flips += usize::from(steps > 0.5);
            elements += 1;
        }
    }
    assert!(elements > 0 && flips * 10_000 <= elements, "{what}: {flips} of {elements} differ by a step");
}

/// Beside codes of ranges that each run has, weights of 7 bits: `MatMulInteger` saturates on processors without VNNI where they have 8.
#[test]
fn onnx_runtime_computes_what_we_simulate() {
    let plain = [
        "w8a8",
        "w4a8asym",
        "w4a4",
        "w2a4",
        "w8a16",
        "w4a16g32asym",
        "w8a8pow2",
        "w7a8dyn",
        "w4a6tok",
        "wfp4ae3m2tok",
        "wfp8afp8",
        "wfp4a8",
    ];
    let packed = ["w8a8", "w4a8", "w4a16g32", "w3a16g64asym", "w7a8dyn", "wfp8a16"];
    for name in ["models/digits-resnet.onnx", "models/digits-mobilenet.onnx"] {
        for (target, schemes) in [("onnx-qdq", &plain[..]), ("ort-cpu", &packed[..])] {
            let target = targets::find(target).unwrap();
            schemes.iter().for_each(|scheme| agrees(name, target, scheme));
        }
    }
}

/// The third executor behind the trait gives the same statistics within float tolerance.
#[test]
fn onnx_runtime_measures_what_the_others_measure() {
    let imported = onnx_quant::import::file(&fixture("models/digits-mobilenet.onnx")).unwrap();
    let graph = imported.model.graph();
    let data = dataset::Files::open(&fixture("data/digits"), dataset::Slot::of(graph), None, Some(8)).unwrap();
    let wanted: Vec<_> = graph
        .nodes()
        .flat_map(|(_, node)| node.outputs.iter().flatten().copied())
        .map(|v| (v, Wish::Distribution))
        .collect();
    let [a, b] = ["rten", "ort"].map(|name| {
        let executor = (exec::find(name).unwrap().build)(&imported.model.meta).unwrap();
        let target = targets::TARGETS[0];
        let cx = PassContext { dataset: Some(&data), threads: 2, ..PassContext::new(target, executor.as_ref()) };
        passes::calibrate::collect(graph, &wanted, &cx).unwrap()
    });
    for (a, b) in a.iter().zip(&b) {
        let ((_, Statistic::Distribution(a)), (_, Statistic::Distribution(b))) = (a, b) else {
            panic!("distributions")
        };
        let size = a.max().abs().max(a.min().abs());
        assert!((a.max() - b.max()).abs() <= 1e-4 * size && (a.min() - b.min()).abs() <= 1e-4 * size, "{a:?} {b:?}");
    }
}
