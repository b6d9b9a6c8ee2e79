//! The reverse-mode engine beside what the machine's matrix product reaches: `cargo bench --bench engine`.
//!
//! A BERT layer (128 words, 384 channels) and a residual block of 64 channels (32 by 32 pixels), forward and backward with gradients of all
//! weights and of the input, one sample on each core as learning runs them; floating-point operations per second over those of faer's
//! product of two 1024 by 1024 matrices on each core at once, medians of rounds in turn.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::collections::BTreeMap;
use std::time::Instant;

use passes::grad::{self, Array, Slot, Tape, Value};
use passes::id::ValueId;

const ROUNDS: usize = 9;

/// As exporters write it, attention and all; every weight a constant.
const BERT: &str = "opset 21
graph (%x: f32[1,128,384]) -> (%y: f32[1,128,384]) {
  %wq = const f32[384,384] rand(seed=1, std=0.05)
  %wk = const f32[384,384] rand(seed=2, std=0.05)
  %wv = const f32[384,384] rand(seed=3, std=0.05)
  %wo = const f32[384,384] rand(seed=4, std=0.05)
  %w1 = const f32[384,1536] rand(seed=5, std=0.05)
  %w2 = const f32[1536,384] rand(seed=6, std=0.05)
  %g = const f32[384] rand(seed=7, std=1)
  %b = const f32[384] rand(seed=8, std=1)
  %heads = const i64[4] [1, 128, 12, 32]
  %flat = const i64[3] [1, 128, 384]
  %scale = const f32[] [0.1767767]
  %q0 = MatMul(%x, %wq)
  %q1 = Reshape(%q0, %heads)
  %q = Transpose(%q1) {perm=[0,2,1,3]}
  %k0 = MatMul(%x, %wk)
  %k1 = Reshape(%k0, %heads)
  %k = Transpose(%k1) {perm=[0,2,3,1]}
  %v0 = MatMul(%x, %wv)
  %v1 = Reshape(%v0, %heads)
  %v = Transpose(%v1) {perm=[0,2,1,3]}
  %s0 = MatMul(%q, %k)
  %s1 = Mul(%s0, %scale)
  %s = Softmax(%s1) {axis=-1}
  %c0 = MatMul(%s, %v)
  %c1 = Transpose(%c0) {perm=[0,2,1,3]}
  %c2 = Reshape(%c1, %flat)
  %c = MatMul(%c2, %wo)
  %r0 = Add(%c, %x)
  %r = LayerNormalization(%r0, %g, %b) {axis=-1}
  %h0 = MatMul(%r, %w1)
  %h = Gelu(%h0)
  %h1 = MatMul(%h, %w2)
  %y0 = Add(%h1, %r)
  %y = LayerNormalization(%y0, %g, %b) {axis=-1}
}
";

const CONVOLUTIONS: &str = "opset 21
graph (%x: f32[1,64,32,32]) -> (%y: f32[1,64,32,32]) {
  %w1 = const f32[64,64,3,3] rand(seed=1, std=0.05)
  %w2 = const f32[64,64,3,3] rand(seed=2, std=0.05)
  %b = const f32[64] rand(seed=3, std=0.1)
  %c1 = Conv(%x, %w1, %b) {kernel_shape=[3,3], pads=[1,1,1,1]}
  %r1 = Relu(%c1)
  %c2 = Conv(%r1, %w2, %b) {kernel_shape=[3,3], pads=[1,1,1,1]}
  %s = Add(%c2, %x)
  %y = Relu(%s)
}
";

struct Block {
    tape: Tape,
    leaves: Vec<(Slot, Value<f32>)>,
    output: Slot,
    wanted: Vec<Slot>,
    shape: Vec<usize>,
}

impl Block {
    fn of(text: &str) -> Self {
        let model = passes::text::parse(text).unwrap();
        let graph = model.graph();
        let mut tape = Tape::default();
        let mut slots: BTreeMap<ValueId, Slot> = BTreeMap::new();
        let (mut leaves, mut wanted) = (Vec::new(), Vec::new());
        let shape: Vec<usize> = {
            let ty = graph.value(graph.inputs()[0]).ty.tensor().unwrap().shape.clone().unwrap();
            ty.iter().map(|dim| dim.known().unwrap()).collect()
        };
        let n: usize = shape.iter().product();
        let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let input = tape.leaf(true);
        slots.insert(graph.inputs()[0], input);
        leaves.push((input, Value::Real(Array::from_shape_vec(shape.clone(), x).unwrap())));
        wanted.push(input);
        for (_, node) in graph.nodes() {
            let mut inputs = Vec::new();
            for value in node.inputs.iter().flatten() {
                let slot = *slots.entry(*value).or_insert_with(|| {
                    let filled = grad::value_of(graph.constant(*value).unwrap()).unwrap();
                    let learned = matches!(filled, Value::Real(_));
                    let slot = tape.leaf(learned);
                    wanted.extend(learned.then_some(slot));
                    leaves.push((slot, filled));
                    slot
                });
                inputs.push(Some(slot));
            }
            let outputs = tape.push(&node.name, grad::rule(node).unwrap(), inputs, node.outputs.len());
            slots.insert(node.output(0).unwrap(), outputs[0]);
        }
        Self { tape, leaves, output: slots[&graph.outputs()[0]], wanted, shape }
    }

    fn run(&self) -> f32 {
        let values = self.tape.forward(self.leaves.iter().cloned()).unwrap();
        let ones = Array::from_elem(self.shape.clone(), 1.0);
        let grads = self.tape.backward(&values, [(self.output, ones)], &self.wanted).unwrap();
        grads.iter().flatten().filter_map(|grad| grad.iter().next()).sum()
    }
}

/// Seconds that `f` takes so often on each of `threads` at once.
fn seconds(threads: usize, times: usize, f: impl Fn() -> f32 + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..times {
                    std::hint::black_box(f());
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn product() -> f32 {
    let a = faer::Mat::<f32>::from_fn(1024, 1024, |i, j| ((i * 7 + j) % 13) as f32);
    let mut c = faer::Mat::<f32>::zeros(1024, 1024);
    faer::linalg::matmul::matmul(&mut c, faer::Accum::Replace, &a, &a, 1.0, faer::Par::Seq);
    c[(3, 5)]
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let (bert, convolutions) = (Block::of(BERT), Block::of(CONVOLUTIONS));
    // Multiplications and additions forward; the gradients of both factors cost as much again each.
    let bert_flops = 3.0 * 2.0 * 128.0 * (4.0 * 384.0 * 384.0 + 2.0 * 384.0 * 1536.0 + 2.0 * 128.0 * 384.0);
    let conv_flops = 3.0 * 2.0 * 2.0 * 64.0 * 64.0 * 9.0 * 1024.0;
    let mut rates: [Vec<f64>; 3] = Default::default();
    for _ in 0..ROUNDS {
        let rate = |flops: f64, times: usize, time: f64| flops * (times * threads) as f64 / time / 1e9;
        rates[0].push(rate(2.0 * 1024_f64.powi(3), 2, seconds(threads, 2, product)));
        rates[1].push(rate(bert_flops, 3, seconds(threads, 3, || bert.run())));
        rates[2].push(rate(conv_flops, 6, seconds(threads, 6, || convolutions.run())));
    }
    let [product, bert, convolutions] = rates.map(median);
    println!("{threads} cores: product {product:.0} GFLOP/s");
    println!("BERT layer forward and backward {bert:.0} GFLOP/s, {:.0} % of it", 100.0 * bert / product);
    println!(
        "convolutions forward and backward {convolutions:.0} GFLOP/s, {:.0} % of it",
        100.0 * convolutions / product
    );
}
