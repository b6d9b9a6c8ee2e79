//! Verification finds what is wrong with a file.

use onnx_quant::{dataset, exec, targets, verify};
use passes::exec::Dataset;
use passes::model::Statistic;
use passes::pass::{PassContext, PassManager, Pipeline, Wish};
use passes::target::{Goal, Scheme};

use super::fixture;

/// A file that differs from the plan in one code, one scale or one name does not pass.
#[test]
fn a_changed_file_does_not_pass() {
    let imported = onnx_quant::import::file(&fixture("models/digits-mobilenet.onnx")).unwrap();
    let slots = dataset::Slot::of(imported.model.graph());
    let data = dataset::Files::open(&fixture("data/digits"), slots, None, Some(8)).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&imported.model.meta).unwrap();
    let target = targets::find("ort-cpu").unwrap();
    let mut cx =
        PassContext { dataset: Some(&data as &dyn Dataset), threads: 2, ..PassContext::new(target, executor.as_ref()) };
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse(&target.pipeline(Goal::Balanced, &Scheme::W8A8), &catalogue).unwrap();
    let (model, _) = PassManager::default().run(&pipeline, imported.model, &mut cx).unwrap();
    let lowered = target.lower(&model).unwrap();
    let wire =
        onnx_quant::emit::model(&lowered.graph, &lowered.meta, &onnx_quant::emit::Emit::default(), "m.onnx").model;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    let mut judge = |change: &dyn Fn(&mut proto::onnx::GraphProto)| {
        let mut changed = wire.clone();
        change(changed.graph.as_mut().unwrap());
        std::fs::write(&path, proto::encode(&changed)).unwrap();
        verify::artifact(&path, &model, &mut cx).unwrap()
    };
    let good = judge(&|_| {});
    assert!(good.passed && good.max_steps.is_some_and(|steps| steps < 1e-9), "{:?}", good.findings);
    let raw = |graph: &mut proto::onnx::GraphProto, name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let tensor = graph.initializer.iter_mut().find(|t| t.name().ends_with(name)).expect("there is such a tensor");
        let mut bytes = tensor.raw_data.as_ref().unwrap().to_vec();
        change(&mut bytes);
        tensor.raw_data = Some(bytes.into());
    };
    let one_code = judge(&|graph| raw(graph, ".codes", &|bytes| bytes[0] ^= 1));
    assert!(!one_code.passed && one_code.findings[0].message.contains("codes"), "{:?}", one_code.findings);
    let one_scale = judge(&|graph| raw(graph, ".scale", &|bytes| bytes[2] ^= 1));
    assert!(!one_scale.passed, "{:?}", one_scale.findings);
    let no_scale = judge(&|graph| raw(graph, ".scale", &|bytes| bytes.fill(0)));
    assert!(!no_scale.passed, "{:?}", no_scale.findings);
    let renamed = judge(&|graph| graph.output[0].name = Some("other".into()));
    assert!(!renamed.passed, "{:?}", renamed.findings);
}

/// Both embedded executors give the same statistics within float tolerance.
#[test]
fn executors_agree() {
    let imported = onnx_quant::import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let graph = imported.model.graph();
    let data = dataset::Files::open(&fixture("data/digits"), dataset::Slot::of(graph), None, Some(16)).unwrap();
    let wanted: Vec<_> = graph
        .nodes()
        .flat_map(|(_, node)| node.outputs.iter().flatten().copied())
        .map(|v| (v, Wish::Distribution))
        .collect();
    let measured: Vec<_> = ["rten", "tract", "auto"]
        .iter()
        .map(|name| {
            let executor = (exec::find(name).unwrap().build)(&imported.model.meta).unwrap();
            let target = targets::TARGETS[0];
            let cx = PassContext { dataset: Some(&data), threads: 2, ..PassContext::new(target, executor.as_ref()) };
            passes::calibrate::collect(graph, &wanted, &cx).unwrap()
        })
        .collect();
    for other in &measured[1..] {
        for (a, b) in measured[0].iter().zip(other) {
            let ((_, Statistic::Distribution(a)), (_, Statistic::Distribution(b))) = (a, b) else {
                panic!("distributions")
            };
            let size = a.max().abs().max(a.min().abs());
            assert!((a.max() - b.max()).abs() <= 1e-4 * size, "{a:?} {b:?}");
            assert!((a.min() - b.min()).abs() <= 1e-4 * size, "{a:?} {b:?}");
            assert_eq!(a.finite(), b.finite());
        }
    }
}
