//! ONNX Runtime, graph optimization off, against our simulation: the consumer is the judge.

use std::collections::BTreeMap;

use onnx_quant::{dataset, exec, targets};
use passes::exec::Dataset;
use passes::id::{Site, ValueId};
use passes::ir::walk;
use passes::model::{Model, Statistic};
use passes::pass::{PassContext, PassManager, Pipeline, Wish};
use passes::simulate::Simulation;
use passes::target::{Goal, Scheme};

use super::fixture;

fn quantized(name: &str) -> (Model, dataset::Files) {
    let imported = onnx_quant::import::file(&fixture(name)).unwrap();
    let slots = dataset::Slot::of(imported.model.graph());
    let data = dataset::Files::open(&fixture("data/digits"), slots, None, None).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&imported.model.meta).unwrap();
    let target = targets::find("ort-cpu").unwrap();
    let mut cx =
        PassContext { dataset: Some(&data as &dyn Dataset), threads: 2, ..PassContext::new(target, executor.as_ref()) };
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(&target.pipeline(Goal::Balanced, &Scheme::W8A8), &catalogue).unwrap();
    let (model, _) = PassManager::default().run(&pipeline, imported.model, &mut cx).unwrap();
    (model, data)
}

/// Node by node: every tensor that the plan encodes is fed to ONNX Runtime as the simulation computed it before it, so that
/// one flipped rounding does not travel. A tensor may then differ by one step where the float sum lies on the edge between
/// two codes: in at most one element of ten thousand, and never by more.
#[test]
fn onnx_runtime_computes_what_we_simulate() {
    for name in ["models/digits-resnet.onnx", "models/digits-mobilenet.onnx"] {
        let (model, data) = quantized(name);
        let graph = model.graph();
        let rten = (exec::find("rten").unwrap().build)(&model.meta).unwrap();
        let ort =
            (exec::find("ort").unwrap().build)(&model.meta).expect("the feature is built only where ONNX Runtime is");
        let encoded: Vec<(ValueId, f32)> = model
            .plan()
            .encodings()
            .filter_map(|(site, e)| if let Site::Value(value) = site { Some((value, e.scale[0])) } else { None })
            .collect();
        let taps: Vec<ValueId> = encoded.iter().map(|(value, _)| *value).collect();
        let simulation = Simulation::prepare(graph, model.plan(), rten.as_ref(), &taps).unwrap();
        let lowered = targets::find("ort-cpu").unwrap().lower(&model).unwrap().graph;
        let feeds = data.sample(3).unwrap();
        let simulated: BTreeMap<ValueId, passes::tensor::Tensor> =
            taps.iter().copied().zip(simulation.run(&feeds).unwrap()).collect();
        let result_of = |value: ValueId| {
            let name = &graph.value(value).name;
            lowered.find(&format!("{name}.dequantized")).or_else(|| lowered.find(name)).expect("it is lowered")
        };
        let (mut elements, mut flips) = (0_usize, 0_usize);
        for (index, (value, scale)) in encoded.iter().enumerate() {
            // Everything before this tensor comes from the simulation.
            let given: Vec<ValueId> = encoded[..index].iter().map(|(v, _)| *v).filter(|v| v < value).collect();
            let inside: Vec<ValueId> = given.iter().map(|v| result_of(*v)).collect();
            let part = walk::extract(&lowered, &inside, &[result_of(*value)]);
            let mut part_feeds: Vec<_> = given.iter().map(|v| simulated[v].clone()).collect();
            part_feeds.extend(feeds.iter().take(part.inputs().len() - part_feeds.len()).cloned());
            let session = ort.prepare(&part).unwrap();
            let got = session.run(&part_feeds).unwrap().remove(0);
            let (got, want) = (got.floats().unwrap(), simulated[value].floats().unwrap());
            assert_eq!(got.len(), want.len());
            for (a, b) in got.iter().zip(want.iter()) {
                let steps = ((a - b) / scale).abs();
                assert!(steps < 1.01, "{name} {}: {steps} steps", graph.value(*value).name);
                flips += usize::from(steps > 0.5);
                elements += 1;
            }
        }
        assert!(elements > 1000 && flips * 10_000 <= elements, "{name}: {flips} of {elements} differ by a step");
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
