//! Reading back what was written: is it what was planned, and does it compute what was simulated?

use std::collections::BTreeMap;
use std::path::Path;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::exec::{DataError, Dataset, Executor};
use passes::id::{NodeId, Site, ValueId};
use passes::ir::{Graph, Node};
use passes::model::{Model, Plan};
use passes::pass::{PassManager, Pipeline};
use passes::returned::{Returned, returned};
use passes::sensitivity::kl_top;
use passes::simulate::{SimulateError, Simulation};
use passes::slices;
use passes::target::Container;
use passes::tensor::{DType, Tensor};

use crate::import;
use crate::memory::PREPACK_LIMIT;

/// What verification found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Whether the file is what was planned and computes what was simulated.
    pub passed: bool,
    /// The largest difference from the simulation, in steps of the tensor's own scale (in units of the largest magnitude
    /// times 2⁻¹⁶ for float tensors); `None` where nothing was run.
    pub max_steps: Option<f64>,
    /// What is wrong.
    pub findings: Vec<Diagnostic>,
}

/// How near the quantized model is to the float model.
#[derive(Clone, Debug, Default)]
pub struct Fidelity {
    /// Of all float outputs together; infinite where they are equal.
    pub sqnr_db: f64,
    /// The mean cosine between outputs.
    pub cosine: f64,
    /// Of outputs that are logits or probabilities: how far they diverge from the float model's, in nats per row, over the likeliest classes
    /// and all others as one; `None` where there are no such outputs.
    pub kl_top: Option<f64>,
    /// Per node: signal to noise of its result, errors of everything before it included.
    pub by_node: BTreeMap<NodeId, f64>,
    /// How many samples were compared.
    pub samples: usize,
}

/// Why verification could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A sample cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model does not run.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// Absorbing the file's quantization failed.
    #[error(transparent)]
    Passes(#[from] passes::pass::RunError),
}

/// Samples to compare on, spread over the data that a model was fitted to.
pub(crate) const SAMPLES: usize = 4;

/// The same where they were held out.
pub(crate) const HELD_OUT: usize = 32;

/// The same for models with large weights.
const SAMPLES_OF_LARGE: usize = 2;

fn chosen(dataset: &dyn Dataset, most: usize) -> Vec<usize> {
    let n = most.min(dataset.len());
    (0..n).map(|i| i * dataset.len() / n.max(1)).collect()
}

/// Signal and noise of one tensor, summed over samples.
#[derive(Clone, Copy, Debug, Default)]
pub struct Noise {
    signal: f64,
    error: f64,
    dot: f64,
    other: f64,
}

impl Noise {
    /// Adds one pair of tensors; positions where either is not finite are left out.
    pub fn add(&mut self, float: &[f32], quantized: &[f32]) {
        for (a, b) in float.iter().zip(quantized).filter(|(a, b)| a.is_finite() && b.is_finite()) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            self.signal += a * a;
            self.error += (a - b) * (a - b);
            self.dot += a * b;
            self.other += b * b;
        }
    }

    /// 10 log10(signal / noise); infinite without noise.
    pub fn decibels(self) -> f64 {
        if self.error <= 0.0 { f64::INFINITY } else { 10.0 * (self.signal.max(1e-300) / self.error).log10() }
    }

    /// The cosine between both.
    pub fn cosine(self) -> f64 {
        let norm = (self.signal * self.other).sqrt();
        if norm > 0.0 { self.dot / norm } else { 1.0 }
    }
}

/// What became of one tensor, summed over samples.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    noise: Noise,
    /// The divergence of its rows, where they are logits or probabilities.
    divergence: f64,
    rows: usize,
}

impl Tally {
    /// Adds what became of `reference`, which is let go, as the model `returned` it.
    fn add(&mut self, reference: Option<Tensor>, tensor: &Tensor, returned: Returned) {
        let Some(reference) = reference else { return };
        let (Some(a), Some(b)) = (reference.values::<f32>(), tensor.values::<f32>()) else { return };
        self.noise.add(&a, &b);
        // Of more dimensions it is not known which one classes lie along.
        let classes = match reference.shape() {
            [.., classes] if matches!(reference.shape().len(), 2 | 3) && *classes > 1 => *classes,
            _ => return,
        };
        if matches!(returned, Returned::Logits | Returned::Probabilities) {
            let (divergence, rows) = kl_top(&a, &b, classes, returned == Returned::Probabilities);
            self.divergence += divergence;
            self.rows += rows;
        }
    }
}

/// Compares the plan's simulation with the float model, at every node that the plan decided about and end to end, on at most
/// `most` samples. End to end it is compared with `given`, the graph before anything was moved between its weights, where there is one.
///
/// # Errors
/// [`VerifyError`].
pub fn fidelity(
    model: &Model,
    given: Option<&Graph>,
    executor: &dyn Executor,
    dataset: &dyn Dataset,
    most: usize,
) -> Result<Fidelity, VerifyError> {
    let how = Comparison { executor, most, large: is_large(model.graph()) };
    compared(model, given, dataset, &how)
}

/// How a plan is compared.
struct Comparison<'a> {
    executor: &'a dyn Executor,
    most: usize,
    /// Whether the model runs in slices, on few samples.
    large: bool,
}

fn compared(
    model: &Model,
    given: Option<&Graph>,
    dataset: &dyn Dataset,
    &Comparison { executor, most, large }: &Comparison<'_>,
) -> Result<Fidelity, VerifyError> {
    let graph = model.graph();
    let nodes: Vec<(NodeId, ValueId)> = model
        .plan()
        .decisions()
        .filter(|(_, decision)| decision.quantized)
        .filter_map(|(id, _)| Some((id, graph.node(id)?.output(0)?)))
        .collect();
    let mut taps: Vec<ValueId> = nodes.iter().map(|(_, value)| *value).chain(graph.outputs().iter().copied()).collect();
    taps.sort_unstable();
    taps.dedup();
    let feeds: Vec<Vec<Tensor>> =
        chosen(dataset, most).into_iter().map(|sample| dataset.sample(sample)).collect::<Result<_, _>>()?;
    let feeds = if large { &feeds[..feeds.len().min(SAMPLES_OF_LARGE)] } else { &feeds };
    let kinds: Vec<Returned> = taps.iter().map(|value| returned(graph, *value)).collect();
    let mut tallies = vec![Tally::default(); taps.len()];
    let mut ends = Ends::of(graph, given.filter(|given| differ(given, graph)), executor, feeds, large)?;
    if large {
        // In slices: the weights of two such models would take more memory than the tensors of a sample, which come one at a time.
        for (sample, feed) in feeds.iter().enumerate() {
            let (mut references, feed) = (vec![None; taps.len()], std::slice::from_ref(feed));
            slices::run(graph, &Plan::default(), executor, &taps, feed, &mut |_, at, tensor| {
                references[at] = Some(tensor);
            })?;
            slices::run(graph, model.plan(), executor, &taps, feed, &mut |_, at, tensor| {
                ends.add(sample, taps[at], &tensor, kinds[at]);
                tallies[at].add(references[at].take(), &tensor, kinds[at]);
            })?;
        }
    } else {
        let prepare = |plan: &Plan| Simulation::prepare(graph, plan, executor, &taps);
        let (float, quantized) = (prepare(&Plan::default())?, prepare(model.plan())?);
        for (sample, feed) in feeds.iter().enumerate() {
            let mut reference: Vec<Option<Tensor>> = float.run(feed)?.into_iter().map(Some).collect();
            quantized.run_with(feed, &mut |at, tensor| {
                ends.add(sample, taps[at], &tensor, kinds[at]);
                tallies[at].add(reference[at].take(), &tensor, kinds[at]);
            })?;
        }
    }
    let of = |value: &ValueId| taps.binary_search(value).map(|at| tallies[at]).unwrap_or_default();
    let end = |value: &ValueId| ends.tallies.get(value).copied().unwrap_or_else(|| of(value));
    // What smoothed caches hold is in a basis of their own.
    let caches = passes::caches::find(graph).0;
    let is_own = |value: &ValueId| {
        let before = given.and_then(|given| given.find(&graph.value(*value).name));
        before.is_some_and(|before| before != *value) && caches.iter().any(|cache| cache.present == *value)
    };
    let compared = graph.outputs().iter().filter(|value| is_f32(graph, **value) && !is_own(value));
    let outputs: Vec<Tally> = compared.map(end).collect();
    let mut total = Tally::default();
    for output in &outputs {
        total.noise.signal += output.noise.signal;
        total.noise.error += output.noise.error;
        total.divergence += output.divergence;
        total.rows += output.rows;
    }
    Ok(Fidelity {
        sqnr_db: total.noise.decibels(),
        cosine: outputs.iter().map(|output| output.noise.cosine()).sum::<f64>() / outputs.len().max(1) as f64,
        kl_top: (total.rows > 0).then(|| total.divergence / total.rows as f64),
        by_node: nodes.iter().map(|(id, value)| (*id, of(value).noise.decibels())).collect(),
        samples: feeds.len(),
    })
}

/// The outputs of the model as it was given, and how far those of the plan are from them.
#[derive(Default)]
struct Ends {
    /// By sample, then by output of the graph with the plan.
    wanted: Vec<BTreeMap<ValueId, Tensor>>,
    tallies: BTreeMap<ValueId, Tally>,
}

impl Ends {
    /// What `given` returns for `feeds`, under the ids that `graph` has for its outputs; nothing without `given`.
    fn of(
        graph: &Graph,
        given: Option<&Graph>,
        executor: &dyn Executor,
        feeds: &[Vec<Tensor>],
        large: bool,
    ) -> Result<Self, VerifyError> {
        let Some(given) = given else { return Ok(Self::default()) };
        let pair = |mine: &ValueId| Some((given.find(&graph.value(*mine).name)?, *mine));
        let mut pairs: Vec<(ValueId, ValueId)> = graph.outputs().iter().filter_map(pair).collect();
        pairs.sort_unstable();
        pairs.dedup_by_key(|pair| pair.0);
        let taps: Vec<ValueId> = pairs.iter().map(|pair| pair.0).collect();
        let mut wanted = vec![BTreeMap::new(); feeds.len()];
        let mut keep = |sample: usize, at: usize, tensor: Tensor| drop(wanted[sample].insert(pairs[at].1, tensor));
        if large {
            slices::run(given, &Plan::default(), executor, &taps, feeds, &mut keep)?;
        } else {
            let float = Simulation::prepare(given, &Plan::default(), executor, &taps)?;
            for (sample, feed) in feeds.iter().enumerate() {
                float.run(feed)?.into_iter().enumerate().for_each(|(at, tensor)| keep(sample, at, tensor));
            }
        }
        Ok(Self { wanted, tallies: BTreeMap::new() })
    }

    fn add(&mut self, sample: usize, value: ValueId, tensor: &Tensor, returned: Returned) {
        if let Some(wanted) = self.wanted.get_mut(sample).and_then(|wanted| wanted.remove(&value)) {
            self.tallies.entry(value).or_default().add(Some(wanted), tensor, returned);
        }
    }
}

/// Whether two graphs, one made from the other, may compute different numbers.
fn differ(a: &Graph, b: &Graph) -> bool {
    let same_constant = |id: ValueId| match (a.constant(id), b.constant(id)) {
        (Some(x), Some(y)) => std::sync::Arc::ptr_eq(x, y),
        (x, y) => x.is_none() && y.is_none(),
    };
    a.n_values() != b.n_values() || a.n_nodes() != b.n_nodes() || !a.value_ids().all(same_constant)
}

/// Whether the weights of `graph` are too large to be held in several copies.
fn is_large(graph: &Graph) -> bool {
    let weights: u64 = graph.value_ids().filter_map(|id| graph.constant(id)).map(|t| t.bytes().len() as u64).sum();
    weights > PREPACK_LIMIT
}

fn is_f32(graph: &Graph, value: ValueId) -> bool {
    graph.value(value).ty.dtype().is_none_or(|dtype| dtype == DType::F32)
}

/// Imports the file at `path` again and compares it with `model`, which it was written from: first the structure (names of
/// inputs and outputs, every encoding and every code), then, where there are samples, every quantized tensor and output
/// of a run against the simulation.
///
/// # Errors
/// [`VerifyError`] when the comparison itself cannot be made.
pub fn artifact(path: &Path, model: &Model, cx: &mut passes::pass::PassContext<'_>) -> Result<Verdict, VerifyError> {
    let mut verdict = Verdict::default();
    if cx.target.container() == Container::CompressedTensors {
        let problem = crate::emit::check_compressed(path, model).err();
        verdict.findings.extend(problem.map(|problem| structure(Place::Model, problem)));
        verdict.passed = verdict.findings.is_empty();
        return Ok(verdict);
    }
    let imported = match import::in_f32(path) {
        Ok(imported) => imported,
        Err(error) => {
            verdict.findings.push(structure(Place::Model, format!("it does not read back: {error}")));
            return Ok(verdict);
        }
    };
    verdict.findings.extend(check_quantizers(imported.model.graph()));
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse("infer-shapes, expand-qoperators, absorb-qdq", &catalogue)
        .unwrap_or_else(|e| unreachable!("the catalogue has absorb-qdq: {e}"));
    let (read_back, _) = PassManager::default().run(&pipeline, imported.model, cx)?;
    verdict.findings.extend(compare_interface(model, &read_back));
    verdict.findings.extend(compare_plans(model, &read_back));
    verdict.findings.extend(compare_constants(model, &read_back));
    if let (Some(dataset), true) = (cx.dataset, verdict.findings.is_empty()) {
        compare_runs(model, &read_back, cx.executor, dataset, &mut verdict)?;
    }
    verdict.passed = verdict.findings.is_empty();
    Ok(verdict)
}

fn structure(place: Place, message: String) -> Diagnostic {
    Diagnostic::new(diag::VERIFY_STRUCTURE, Severity::Error, place, message)
}

/// What onnx.checker does not know: shapes of scales and zero points, axes, and scales that are no scales.
fn check_quantizers(graph: &Graph) -> Vec<Diagnostic> {
    let quantizes = |node: &Node| node.op.is("QuantizeLinear") || node.op.is("DequantizeLinear");
    let problem = |node: &Node| -> Option<String> {
        let scale = graph.constant_input(node, 1)?;
        let values = scale.floats()?;
        // The sign of a weight's scale says which end of its codes reaches further; an activation has no use for one.
        let signed = node.op.is("DequantizeLinear") && graph.constant_input(node, 0).is_some();
        if values.iter().any(|s| !s.is_finite() || *s == 0.0 || (*s < 0.0 && !signed)) {
            return Some("a scale is 0, not finite, or negative for an activation".into());
        }
        if let Some(zero_point) = graph.constant_input(node, 2)
            && zero_point.shape() != scale.shape()
        {
            return Some(format!("scale {:?} and zero point {:?} have two shapes", scale.shape(), zero_point.shape()));
        }
        let data = graph.constant_input(node, 0)?;
        if let [groups] = scale.shape()
            && node.int("block_size", 0) == 0
        {
            let axis = passes::ops::positive_axis(node.int("axis", 1), data.shape().len());
            if axis.map(|axis| data.shape()[axis]) != Some(*groups) {
                return Some(format!("{groups} scales do not fit axis {} of {:?}", node.int("axis", 1), data.shape()));
            }
        }
        None
    };
    let finding = |node: &Node| Some(structure(Place::Node(node.name.clone()), problem(node)?));
    graph.nodes().filter(|(_, node)| quantizes(node)).filter_map(|(_, node)| finding(node)).collect()
}

fn compare_interface(model: &Model, read_back: &Model) -> Vec<Diagnostic> {
    let names =
        |graph: &Graph, ids: &[ValueId]| ids.iter().map(|&id| graph.value(id).name.to_string()).collect::<Vec<_>>();
    let (a, b) = (model.graph(), read_back.graph());
    let mut findings = Vec::new();
    for (what, mine, theirs) in [
        ("inputs", names(a, a.inputs()), names(b, b.inputs())),
        ("outputs", names(a, a.outputs()), names(b, b.outputs())),
    ] {
        if mine != theirs {
            findings.push(structure(Place::Model, format!("its {what} are {theirs:?} instead of {mine:?}")));
        }
    }
    findings
}

/// Whether constants so encoded may be written as the float numbers that they stand for: formats without an operator, and biases.
fn may_be_float(encoding: &passes::encoding::Encoding) -> bool {
    !encoding.grid.info().integer || encoding.grid.info().storage == DType::I32
}

/// Every encoding of the plan must stand in the file at the node input that it is for, with the same codes.
fn compare_plans(model: &Model, read_back: &Model) -> Vec<Diagnostic> {
    let theirs = uses_by_name(read_back);
    let mut findings = Vec::new();
    for (key, (encoding, codes)) in uses_by_name(model) {
        let place = Place::Node(key.0.as_str().into());
        match theirs.get(&key) {
            None if codes.is_some() && may_be_float(&encoding) => {} // a float constant: compared below
            None => findings.push(structure(place, format!("input {} is not quantized in the file", key.1))),
            Some((other, _)) if !other.reads_like(&encoding) => {
                findings.push(structure(place, format!("input {} has another encoding in the file", key.1)));
            }
            Some((_, other)) if codes.is_some() && *other != codes => {
                findings.push(structure(place, format!("input {} has other codes in the file", key.1)));
            }
            Some(_) => {}
        }
    }
    findings
}

/// Every float constant that stands for another, or for codes that no operator reads, must stand in the file.
fn compare_constants(model: &Model, read_back: &Model) -> Vec<Diagnostic> {
    let plan = model.plan();
    let substitutes = plan.substitutes().map(|(site, tensor)| (site, tensor.floats().unwrap_or_default().into_owned()));
    let rounded = plan.encodings().filter(|(_, encoding)| may_be_float(encoding));
    let rounded = rounded.filter_map(|(site, encoding)| Some((site, encoding.decode(plan.codes(site)?).ok()?)));
    let in_codes = uses_by_name(read_back);
    let theirs: BTreeMap<&str, &Node> = read_back.graph().nodes().map(|(_, node)| (&*node.name, node)).collect();
    let mut findings = Vec::new();
    for (site, want) in substitutes.chain(rounded) {
        let Site::Use { node, input } = site else { continue };
        let Some(name) = model.graph().node(node).map(|node| node.name.clone()) else { continue };
        if in_codes.contains_key(&(name.to_string(), input)) {
            continue; // compared code by code
        }
        let found = theirs.get(&*name).and_then(|node| read_back.graph().constant_input(node, input.into()));
        let found = found.and_then(|tensor| tensor.floats());
        let same = found.is_some_and(|found| {
            found.len() == want.len() && found.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits())
        });
        if !same {
            let message = format!("input {input} is not the constant that was planned");
            findings.push(structure(Place::Node(name), message));
        }
    }
    findings
}

type UseKey = (String, u16);

/// The encoding and codes of every encoded node input.
fn uses_by_name(model: &Model) -> BTreeMap<UseKey, (passes::encoding::Encoding, Option<Tensor>)> {
    let graph = model.graph();
    let mut uses = BTreeMap::new();
    for (id, node) in graph.nodes() {
        for input in 0..u16::try_from(node.inputs.len()).unwrap_or(u16::MAX) {
            if let Some(encoding) = model.plan().encoding_of_use(graph, id, input) {
                let codes = model.plan().codes(Site::Use { node: id, input }).map(|codes| codes.as_ref().clone());
                uses.insert((node.name.to_string(), input), (encoding.clone(), codes));
            }
        }
    }
    uses
}

/// Every tensor that is written as codes, and every output, must be the same in both simulations.
fn compare_runs(
    model: &Model,
    read_back: &Model,
    executor: &dyn Executor,
    dataset: &dyn Dataset,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let graph = model.graph();
    let encoded = model.plan().encodings().filter_map(|(site, encoding)| match site {
        Site::Value(value) => Some((value, f64::from(encoding.scale[0]))),
        Site::Use { .. } => None,
    });
    let mut steps: BTreeMap<ValueId, f64> = encoded.collect();
    for &output in graph.outputs() {
        steps.entry(output).or_insert(0.0);
    }
    let theirs = read_back.graph();
    let pairs: Vec<(ValueId, ValueId)> =
        steps.keys().filter_map(|&mine| Some((mine, theirs.find(&graph.value(mine).name)?))).collect();
    let mine: Vec<ValueId> = pairs.iter().map(|pair| pair.0).collect();
    let others: Vec<ValueId> = pairs.iter().map(|pair| pair.1).collect();
    let feeds = dataset.sample(0)?;
    let mut judge = |at: usize, expected: &Option<Tensor>, tensor: &Tensor| {
        let difference = match expected {
            Some(expected) => max_difference(expected, tensor, steps[&mine[at]]),
            None => f64::INFINITY,
        };
        verdict.max_steps = Some(verdict.max_steps.unwrap_or(0.0).max(difference));
        if difference > 1.0 {
            let place = Place::Value(graph.value(mine[at]).name.clone());
            let message = format!("on {} it is {difference:.1} steps from the simulation", dataset.name(0));
            verdict.findings.push(Diagnostic::new(diag::VERIFY_NUMBERS, Severity::Error, place, message));
        }
    };
    let mut expected: Vec<Option<Tensor>> = vec![None; mine.len()];
    if is_large(graph) {
        let feeds = [feeds];
        slices::run(graph, model.plan(), executor, &mine, &feeds, &mut |_, at, tensor| expected[at] = Some(tensor))?;
        slices::run(theirs, read_back.plan(), executor, &others, &feeds, &mut |_, at, tensor| {
            judge(at, &expected[at].take(), &tensor);
        })?;
    } else {
        let simulation = Simulation::prepare(graph, model.plan(), executor, &mine)?;
        simulation.run_with(&feeds, &mut |at, tensor| expected[at] = Some(tensor))?;
        drop(simulation);
        let simulation = Simulation::prepare(theirs, read_back.plan(), executor, &others)?;
        simulation.run_with(&feeds, &mut |at, tensor| judge(at, &expected[at].take(), &tensor))?;
    }
    Ok(())
}

/// The largest difference in units of `step`; for tensors without one, of 2⁻¹⁶ of the largest magnitude.
fn max_difference(a: &Tensor, b: &Tensor, step: f64) -> f64 {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        return f64::INFINITY;
    }
    let (Some(x), Some(y)) = (a.floats(), b.floats()) else {
        return if a == b { 0.0 } else { f64::INFINITY };
    };
    let top = x.iter().map(|v| v.abs()).filter(|v| v.is_finite()).fold(0.0_f32, f32::max);
    let unit = if step > 0.0 { step } else { (f64::from(top) / 65536.0).max(1e-30) };
    let difference = |(p, q): (&f32, &f32)| match (p.is_finite(), q.is_finite()) {
        (true, true) => f64::from((p - q).abs()) / unit,
        _ if p.to_bits() == q.to_bits() || (p.is_nan() && q.is_nan()) => 0.0,
        _ => f64::INFINITY,
    };
    x.iter().zip(y.iter()).map(difference).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use passes::exec::DataError;
    use passes::pass::{PassContext, PassManager, Pipeline};

    use super::*;

    struct Drawn;

    impl Dataset for Drawn {
        fn len(&self) -> usize {
            2
        }

        fn name(&self, index: usize) -> String {
            format!("sample {index}")
        }

        fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
            let value = |at: usize| ((at * 37 + index * 11) % 29) as f32 / 14.5 - 1.0;
            Ok(vec![Tensor::of([4, 8], (0..32).map(value).collect::<Vec<f32>>())])
        }
    }

    /// In slices, sample by sample, or both models whole: the same numbers.
    #[test]
    fn a_large_model_is_compared_as_a_small_one_is() {
        let text = "opset 21\ngraph (%x: f32[4,8]) -> (%y) {\n  %w = const f32[8,8] rand(seed=1, std=0.5)\n  \
                    %v = const f32[8,3] rand(seed=2, std=0.5)\n  %h = MatMul(%x, %w)\n  %r = Relu(%h)\n  %y = MatMul(%r, %v)\n}\n";
        let plain = passes::text::parse(text).unwrap();
        let executor = (crate::exec::find("rten").unwrap().build)(&plain.meta).unwrap();
        let given = PassContext::new(crate::targets::TARGETS[0], executor.as_ref());
        let mut cx = PassContext { dataset: Some(&Drawn), ..given };
        let pipeline = "infer-shapes, calibrate, assign-encodings, round";
        let pipeline = Pipeline::parse(pipeline, &passes::catalogue::passes()).unwrap();
        let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx).unwrap();
        let told = |large: bool| {
            let how = Comparison { executor: executor.as_ref(), most: 2, large };
            compared(&model, None, &Drawn, &how).unwrap()
        };
        let (whole, sliced) = (told(false), told(true));
        assert!(whole.sqnr_db.is_finite() && whole.by_node.len() > 1, "{whole:?}");
        assert_eq!(format!("{whole:?}"), format!("{sliced:?}"));
    }
}
