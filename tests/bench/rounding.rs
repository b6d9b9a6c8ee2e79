//! Second moments and what solves by them, beside what the machine's matrix product reaches: `cargo bench --bench rounding`.
//!
//! Texts of 256 words of 1,536 channels, one on each core, as calibration sees them; GPTQ and refitting scales of a weight of 1,536 by 576 in
//! four bits and blocks of 128, on all cores. Floating-point operations by definition per second, over those of faer's product of two 1024 by
//! 1024 matrices on each core at once; medians of rounds in turn.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

use onnx_quant::{exec, targets};
use passes::exec::{DataError, Dataset};
use passes::model::Model;
use passes::observe::{GramSums, Rows};
use passes::pass::{Instrument, PassContext, PassInfo, PassManager, Pipeline, StepRecord};
use passes::seed;
use passes::target::Scheme;
use passes::tensor::Tensor;

const ROUNDS: usize = 7;
const WORDS: usize = 256;
const COLUMNS: usize = 1536;

const LAYER: &str = "opset 21
graph (%x: f32[1,256,1536]) -> (%y: f32[1,256,576]) {
  %w = const f32[1536,576] rand(seed=1, std=0.05)
  %y = MatMul(%x, %w)
}
";

/// What is timed, pass by pass.
const PIPELINE: &str = "infer-shapes, calibrate, assign-encodings{weights=min-max}, round{method=gptq}, refit-scales";

/// Correlated rows: every channel has something in common with all others.
struct Texts(usize);

#[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
fn text(index: usize) -> Vec<f32> {
    let draw = |at: usize| 2.0 * seed::uniform(seed::mixed((index * WORDS * COLUMNS + at) as u64)) as f32 - 1.0;
    (0..WORDS * COLUMNS).map(|at| draw(at) + draw(at / COLUMNS * COLUMNS)).collect()
}

impl Dataset for Texts {
    fn len(&self) -> usize {
        self.0
    }

    fn name(&self, index: usize) -> String {
        format!("text {index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        Ok(vec![Tensor::of([1, WORDS, COLUMNS], text(index))])
    }
}

/// Seconds that every pass took.
struct Clock<'a> {
    began: Instant,
    passes: &'a RefCell<BTreeMap<&'static str, f64>>,
}

impl Instrument for Clock<'_> {
    fn before(&mut self, _: &PassInfo, _: &Model) {
        self.began = Instant::now();
    }

    fn after(&mut self, pass: &PassInfo, _: &Model, _: &StepRecord) {
        self.passes.borrow_mut().insert(pass.about.name, self.began.elapsed().as_secs_f64());
    }
}

/// Seconds that `f` takes so often on each of `threads` at once.
fn seconds(threads: usize, times: usize, f: impl Fn() + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..times).for_each(|_| f()));
        }
    });
    start.elapsed().as_secs_f64()
}

fn product() {
    let a = faer::Mat::<f32>::from_fn(1024, 1024, |i, j| ((i * 7 + j) % 13) as f32);
    let mut c = faer::Mat::<f32>::zeros(1024, 1024);
    faer::linalg::matmul::matmul(&mut c, faer::Accum::Replace, &a, &a, 1.0, faer::Par::Seq);
    std::hint::black_box(c[(3, 5)]);
}

/// Seconds that the passes of the pipeline took.
fn rounded(threads: usize) -> BTreeMap<&'static str, f64> {
    let model = passes::text::parse(LAYER).unwrap();
    let executor = (exec::find("auto").unwrap().build)(&model.meta).unwrap();
    let data = Texts(8);
    let target = targets::find("ort-cpu").unwrap();
    let scheme = Scheme::parse("w4a16g128").unwrap();
    let given = PassContext::new(target, executor.as_ref());
    let mut cx = PassContext { dataset: Some(&data), threads, scheme, ..given };
    let pipeline = Pipeline::parse(PIPELINE, &passes::catalogue::passes()).unwrap();
    let passes = RefCell::default();
    let clock = Clock { began: Instant::now(), passes: &passes };
    PassManager::new(vec![Box::new(clock)], false).run(&pipeline, model, &mut cx).unwrap();
    passes.into_inner()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let (d, m, rows) = (COLUMNS as f64, 576.0, WORDS as f64);
    let sample = text(0);
    let gram = || {
        let mut sums = GramSums::new(Rows::Last, &[2.0; COLUMNS], 64).unwrap();
        (0..4).for_each(|_| sums.see(&sample, &[1, WORDS, COLUMNS]));
        std::hint::black_box(&sums);
    };
    let mut rates: [Vec<f64>; 4] = Default::default();
    for _ in 0..ROUNDS {
        let on_each = |flops: f64, time: f64| flops * threads as f64 / time / 1e9;
        rates[0].push(on_each(2.0 * 2.0 * 1024_f64.powi(3), seconds(threads, 2, product)));
        // A symmetric product: half of it.
        rates[1].push(on_each(4.0 * rows * d * d, seconds(threads, 1, gram)));
        let took = rounded(threads);
        // The factor, and every row through half of it.
        rates[2].push((2.0 / 3.0 * d.powi(3) + m * d * d) / took["round"] / 1e9);
        // Three rounds of slopes and two sweeps.
        rates[3].push(3.0 * 3.0 * 2.0 * m * d * d / took["refit-scales"] / 1e9);
    }
    let [product, gram, gptq, refit] = rates.map(median);
    println!("{threads} cores: product {product:.0} GFLOP/s");
    for (name, rate) in [("second moments", gram), ("gptq", gptq), ("refit-scales", refit)] {
        println!("{name} {rate:.0} GFLOP/s, {:.0} % of it", 100.0 * rate / product);
    }
}
