//! How much calibration adds to plain float inference of the same samples by the same executor.
//!
//! `cargo bench --bench calibrate`, with `ONNX_QUANT_BENCH=MODEL:DATA[,MODEL:DATA…]` for other models than the fixture. Prints the
//! medians of alternating runs and their ratio.

#![allow(missing_docs, clippy::print_stdout, clippy::expect_used, reason = "a benchmark prints its result")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use onnx_quant::{dataset, exec, import, targets};
use passes::exec::Dataset;
use passes::model::Plan;
use passes::parallel;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::target::{Goal, Scheme};

const ROUNDS: usize = 5;

fn main() {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let own = format!("{0}/models/digits-resnet.onnx:{0}/data/digits", fixtures.display());
    for pair in std::env::var("ONNX_QUANT_BENCH").unwrap_or(own).split(',') {
        let (model, data) = pair.split_once(':').expect("MODEL:DATA");
        bench(model, data);
    }
}

fn bench(path: &str, data: &str) {
    let imported = import::file(path.as_ref()).expect("the model imports");
    let slots = dataset::Slot::of(imported.model.graph());
    let data = dataset::Files::open(data.as_ref(), slots, None, None).expect("the samples fit");
    let executor = (exec::find("auto").expect("listed").build)(&imported.model.meta).expect("embedded");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let target = targets::TARGETS[0];
    let mut cx =
        PassContext { dataset: Some(&data as &dyn Dataset), threads, ..PassContext::new(target, executor.as_ref()) };
    let catalogue = passes::catalogue::passes();
    let text = target.pipeline(Goal::Balanced, &Scheme::W8A8);
    let (normalize, _) = text.split_once("calibrate").expect("every pipeline calibrates");
    let normalize = Pipeline::parse(normalize.trim_end().trim_end_matches(','), &catalogue).expect("it parses");
    let (model, _) = PassManager::default().run(&normalize, imported.model, &mut cx).expect("it runs");
    let calibrate =
        Pipeline::parse("infer-shapes, calibrate, assign-encodings, correct-bias", &catalogue).expect("it parses");
    let (mut plain, mut measured) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let outputs = model.graph().outputs();
        let float = Simulation::prepare(model.graph(), &Plan::default(), cx.executor, outputs).expect("it runs");
        let run = |(): &mut (), index: usize| float.run(&data.sample(index).expect("it reads")).map(|_| ());
        parallel::workers(threads, data.len(), || (), run).expect("it runs");
        plain.push(start.elapsed());
        let start = Instant::now();
        PassManager::default().run(&calibrate, model.clone(), &mut cx).expect("it runs");
        measured.push(start.elapsed());
    }
    let (plain, measured) = (median(plain), median(measured));
    let ratio = measured.as_secs_f64() / plain.as_secs_f64();
    println!("{path}: {} samples, plain {plain:.2?}, calibrate {measured:.2?}, ratio {ratio:.2}", data.len());
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
