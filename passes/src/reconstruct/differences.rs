//! What gradients tell of a model, beside central differences of it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{SALIENCIES, stakes};
use crate::encoding::Encoding;
use crate::exec::{DataError, Dataset, ExecError, Executor, Session};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::lockstep;
use crate::model::{Edit, Model, Patch};
use crate::pass::{PassContext, PassManager, Pipeline};
use crate::seed;
use crate::target::{Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};
use crate::tensor::Tensor;

/// Runs what the test's graph is made of.
#[derive(Debug)]
struct Plain;

impl Executor for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        Ok(Box::new(Prepared(graph.clone())))
    }
}

struct Prepared(Graph);

impl Session for Prepared {
    fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let graph = &self.0;
        let mut known: BTreeMap<ValueId, Tensor> = graph.inputs().iter().copied().zip(feeds.iter().cloned()).collect();
        for (_, node) in graph.nodes() {
            let read = |input: usize| {
                let value = node.input(input).unwrap();
                known.get(&value).unwrap_or_else(|| graph.constant(value).unwrap())
            };
            let made = if node.op.is("MatMul") { product(read(0), read(1)) } else { bent(read(0)) };
            known.insert(node.output(0).unwrap(), made);
        }
        Ok(graph.outputs().iter().map(|output| known[output].clone()).collect())
    }
}

fn product(x: &Tensor, w: &Tensor) -> Tensor {
    let (n, k, m) = (x.shape()[0], x.shape()[1], w.shape()[1]);
    let (x, w) = (x.values::<f32>().unwrap(), w.values::<f32>().unwrap());
    let at = |i: usize| (0..k).map(|j| x[i / m * k + j] * w[j * m + i % m]).sum::<f32>();
    Tensor::of([n, m], (0..n * m).map(at).collect())
}

fn bent(x: &Tensor) -> Tensor {
    Tensor::of(x.shape(), x.values::<f32>().unwrap().iter().map(|v| v.tanh()).collect())
}

/// So many samples of three rows, of which so many differ.
struct Samples {
    count: usize,
    distinct: usize,
}

impl Dataset for Samples {
    fn len(&self) -> usize {
        self.count
    }

    fn name(&self, index: usize) -> String {
        format!("{index}")
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        Ok(vec![input(index % self.distinct)])
    }
}

fn input(sample: usize) -> Tensor {
    Tensor::of([3, 4], numbers(sample as u64, 12))
}

#[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
fn numbers(seed: u64, n: u64) -> Vec<f32> {
    (0..n).map(|i| (2.0 * seed::uniform(seed << 32 | i) - 1.0) as f32).collect()
}

/// A place that nothing is asked of here.
#[derive(Debug)]
struct Nowhere;

impl Target for Nowhere {
    fn info(&self) -> &'static TargetInfo {
        unreachable!("gradients know no target")
    }

    fn rules(&self) -> &'static [Rule] {
        &[]
    }

    fn pipeline(&self, _: Goal, _: &Scheme) -> Cow<'static, str> {
        "".into()
    }

    fn refuses(&self, _: &Scheme) -> Option<String> {
        None
    }

    fn lower(&self, _: &Model) -> Result<Lowered, LowerError> {
        unreachable!("nothing is written")
    }
}

/// tanh(tanh(x A) B) with both weights in codes.
fn two_layers(cx: &mut PassContext<'_>) -> (Model, [NodeId; 2]) {
    let matrix = |name: &str, seed: u64, rows: u64, columns: u64| {
        let values: Vec<String> = numbers(seed, rows * columns).iter().map(|v| format!("{v:e}")).collect();
        format!("  %{name} = const f32[{rows},{columns}] [{}]\n", values.join(", "))
    };
    let source = format!(
        "opset 21\ngraph (%x: f32[3,4]) -> (%y) {{\n{}{}  %h = MatMul(%x, %a)\n  %t = Tanh(%h)\n  %u = MatMul(%t, %b)\n  \
         %y = Tanh(%u)\n}}\n",
        matrix("a", 11, 4, 3),
        matrix("b", 12, 3, 2)
    );
    let pipeline = Pipeline::parse("infer-shapes", &crate::catalogue::passes()).unwrap();
    let model = crate::text::parse(&source).unwrap();
    let (mut model, _) = PassManager::default().run(&pipeline, model, cx).unwrap();
    let nodes: Vec<NodeId> = model.graph().nodes().filter(|(_, node)| node.op.is("MatMul")).map(|(id, _)| id).collect();
    let mut patch = Patch::on(&model);
    for &node in &nodes {
        let encoding = Encoding::per_tensor(crate::grid::find("int8").unwrap(), 1.0 / 127.0, 0);
        patch.edit(Edit::Encode { site: Site::Use { node, input: 1 }, encoding });
    }
    model.apply(patch).unwrap();
    (model, [nodes[0], nodes[1]])
}

/// The float function, as small changes see it.
struct Function {
    a: Tensor,
    b: Tensor,
    /// What an error of 1 in one number of the outputs is worth.
    unit: f64,
}

impl Function {
    fn of(model: &Model, data: &Samples) -> Self {
        let constant = |name: &str| {
            let graph = model.graph();
            let value = graph.value_ids().find(|id| &*graph.value(*id).name == name).unwrap();
            graph.constant(value).unwrap().as_ref().clone()
        };
        let (a, b) = (constant("a"), constant("b"));
        // Square errors over the mean square of the outputs of one sample, whichever their order, and their mean.
        let one = (0..data.distinct).map(input).min_by_key(|one| lockstep::key(std::slice::from_ref(one))).unwrap();
        let usual = values_of(&bent(&product(&bent(&product(&one, &a)), &b)));
        let unit = 1.0 / usual.iter().map(|v| v * v).sum::<f64>();
        Self { a, b, unit }
    }

    fn first(&self, sample: usize) -> Tensor {
        product(&input(sample), &self.a)
    }

    fn second(&self, h: &Tensor) -> Tensor {
        product(&bent(h), &self.b)
    }

    /// Of every number of `from`, Σ over outputs of the squared slope of what `then` makes of it, by central differences.
    fn slopes(&self, from: &Tensor, then: impl Fn(&Tensor) -> Tensor) -> Vec<f64> {
        let slope = |at: usize| {
            let moved = |by: f32| {
                let mut values = from.values::<f32>().unwrap().into_owned();
                values[at] += by;
                values_of(&then(&Tensor::of(from.shape(), values)))
            };
            let slopes = moved(0.01).into_iter().zip(moved(-0.01)).map(|(p, q)| (p - q) / 0.02);
            slopes.map(|slope| slope * slope).sum::<f64>() * self.unit
        };
        (0..from.len()).map(slope).collect()
    }
}

fn values_of(tensor: &Tensor) -> Vec<f64> {
    tensor.values::<f32>().unwrap().iter().map(|v| f64::from(*v)).collect()
}

fn assert_near(got: &[f64], want: &[f64], tolerance: f64) {
    let near = got.iter().zip(want).all(|(got, want)| (got / want - 1.0).abs() < tolerance);
    assert!(got.len() == want.len() && near, "{got:?} {want:?}");
}

/// What gradients tell of a row is what small changes of that row do to the outputs: for the last layer in every draw, for the one before
/// in the mean over draws.
#[test]
fn stakes_are_what_small_changes_of_rows_do() {
    let data = Samples { count: 2, distinct: 2 };
    let mut cx = PassContext { dataset: Some(&data), threads: 2, ..PassContext::new(&Nowhere, &Plain) };
    let (model, layers) = two_layers(&mut cx);
    let function = Function::of(&model, &data);
    let draws = 600;
    let found = stakes::stakes(&model, &cx, draws, "stakes").unwrap().unwrap();
    for sample in [0, 1] {
        let h = function.first(sample);
        let u = function.second(&h);
        let of_rows = |slopes: Vec<f64>, channels: usize| slopes.chunks(channels).map(|row| row.iter().sum()).collect();
        let of_first: Vec<f64> = of_rows(function.slopes(&h, |h| bent(&function.second(h))), 3);
        let of_second: Vec<f64> = of_rows(function.slopes(&u, bent), 2);
        for (layer, want, tolerance) in [(layers[0], of_first, 0.1), (layers[1], of_second, 0.01)] {
            let got: Vec<f64> = found[&layer][sample].iter().map(|s| f64::from(*s) / draws as f64).collect();
            assert_near(&got, &want, tolerance);
        }
    }
}

/// The same of every weight, in the mean over samples, of which each draws once.
#[test]
fn sensitivities_are_what_small_changes_of_weights_do() {
    let data = Samples { count: 2000, distinct: 1 };
    let mut cx = PassContext { dataset: Some(&data), threads: 2, ..PassContext::new(&Nowhere, &Plain) };
    let (model, layers) = two_layers(&mut cx);
    let function = Function::of(&model, &data);
    let fisher = SALIENCIES.iter().find(|saliency| saliency.about.name == "fisher").unwrap();
    let found = fisher.gradient(&model, &cx, 2000, "fisher").unwrap().unwrap();
    let (x, t) = (input(0), bent(&function.first(0)));
    let of_first = function.slopes(&function.a, |a| bent(&function.second(&product(&x, a))));
    let of_second = function.slopes(&function.b, |b| bent(&product(&t, b)));
    for (node, want) in layers.into_iter().zip([of_first, of_second]) {
        let got: Vec<f64> = found[&Site::Use { node, input: 1 }].iter().map(|f| f64::from(*f)).collect();
        assert_near(&got, &want, 0.15);
    }
}
