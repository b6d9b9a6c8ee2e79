//! High biases given to the layer behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::region::clamp_end;
use super::shifted;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Dataset;
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{User, Users};
use crate::model::{Model, Patch, Plan};
use crate::ops;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::simulate::Simulation;
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Takes what a channel never falls below from the bias in front of a `Relu`, and gives it to the biases behind it.
    ///
    /// ```text
    /// c[j] = max(0, least x[j]),   b'[j] = b[j] − c[j],   b2'[o] = b2[o] + Σ_{j,k} W2[o, j, k] · c[j]
    /// ```
    ///
    /// relu(x) = relu(x − c) + c wherever x ≥ c: exact for the samples, as c is the least value that they brought. A clamp from 0 to a
    /// number is treated alike where the samples do not reach its end. With `sigmas=K`, c goes up to the mean less K standard
    /// deviations, as in the source; the few values below it are lost, and where the outputs of the model would then keep less than
    /// 50 dB, the least value is used and a note says so. The nodes are `Conv` and `Gemm`, with global pools and `Flatten` between
    /// them; one without a bias gets one. A convolution that pads with zeros would have to pad with −c: it is left alone and named, and
    /// so is a tensor with other readers.
    INFO {
        name: "absorb-high-bias",
        source: "Nagel et al. 2019, arXiv:1906.04721, section 4.1.3; the least value instead of three sigmas and the refusal of padding ours",
        cost: "One forward pass for the ends of channels; one walk over the nodes. With `sigmas` the float model runs twice more per sample.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: OnSamples,
        options: &[OptionInfo {
            name: "sigmas",
            doc: "c goes up to the mean less so many standard deviations, where the outputs keep 50 dB; by default only to the least value",
        }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(AbsorbHighBias::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct AbsorbHighBias {
    sigmas: Option<f64>,
}

/// The least ratio of the power of the outputs to that of their error where values are lost: 50 dB.
const LEAST_RATIO: f64 = 1e5;

impl AbsorbHighBias {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let sigmas = options.number("sigmas")?;
        match sigmas.filter(|sigmas| *sigmas < 0.0) {
            Some(given) => Err(OptionError { option: "sigmas".into(), problem: format!("`{given}` is less than 0") }),
            None => Ok(Self { sigmas }),
        }
    }
}

impl Pass for AbsorbHighBias {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        let powers = self.sigmas.map(|_| Wish::Peaks { axis: 1 });
        let of = |pair: &Pair| {
            let value = pair.value;
            [Some(Wish::Ends { axis: 1 }), powers].into_iter().flatten().map(move |wish| (value, wish))
        };
        pairs(model, cx).0.iter().flat_map(of).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let (pairs, declined) = pairs(model, cx);
        let mut patch = absorbed(model, &pairs, self.sigmas);
        if self.sigmas.is_some() && !patch.is_empty() && loses(model, &pairs, self.sigmas, cx)? {
            patch = absorbed(model, &pairs, None);
            let message = "absorb-high-bias: with the values below `sigmas` lost, the outputs would keep less than 50 dB: the least \
                           values were used instead";
            patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, Place::Model, message));
        }
        declined.into_iter().for_each(|note| patch.note(note));
        Ok(patch)
    }
}

/// A linear node, a clamp from 0 on that alone reads it, and the linear nodes that read that.
struct Pair {
    source: NodeId,
    /// What is clamped.
    value: ValueId,
    /// Where the clamp ends.
    high: f64,
    /// The clamp, and what lies between it and the readers.
    inside: Vec<NodeId>,
    sinks: Vec<NodeId>,
}

/// Every pair of `model`, and why others are none.
fn pairs(model: &Model, cx: &PassContext<'_>) -> (Vec<Pair>, Vec<Diagnostic>) {
    let (mut pairs, mut declined) = (Vec::new(), Vec::new());
    let users = Users::of(model.graph());
    for (id, node) in model.graph().nodes() {
        match Pair::at(model, &users, cx, id) {
            Some(Ok(pair)) => pairs.push(pair),
            Some(Err(why)) => {
                let place = Place::Node(Arc::clone(&node.name));
                let message = format!("absorb-high-bias: its bias stays, as {why}");
                declined.push(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Note, place, message));
            }
            None => {}
        }
    }
    (pairs, declined)
}

impl Pair {
    /// The pair that begins with `source`; or why it is none, where the pattern is there and channels are high enough to matter.
    fn at(model: &Model, users: &Users, cx: &PassContext<'_>, source: NodeId) -> Option<Result<Self, String>> {
        let graph = model.graph();
        let value = graph.node(source)?.output(0)?;
        shifted::bias(graph, source)?;
        let (clamp, 0) = users.only_input(value)? else { return None };
        let node = graph.node(clamp)?;
        let high = if node.op.is("Relu") { f64::INFINITY } else { clamp_end(graph, node)? };
        let free = |id: &NodeId| is_free(model, cx, *id);
        match readers(graph, users, clamp) {
            Ok((inside, sinks)) => {
                let is_free = [source].iter().chain(&inside).chain(&sinks).all(free);
                is_free.then_some(Ok(Self { source, value, high, inside, sinks }))
            }
            Err(why) => {
                let ranges = model.stats().ends(value, 1)?.ranges()?;
                ranges.iter().any(|(low, top)| *low > 0.0 && *top <= high).then_some(Err(why))
            }
        }
    }

    /// c: what is taken from every channel; `None` where nothing is, or nothing was measured.
    fn taken(&self, model: &Model, sigmas: Option<f64>) -> Option<Vec<f64>> {
        let ends = model.stats().ends(self.value, 1)?;
        let ranges = ends.ranges()?;
        let mut taken: Vec<f64> = ranges.iter().map(|(low, _)| low.max(0.0)).collect();
        if let Some(sigmas) = sigmas {
            let powers = model.stats().peaks(self.value, 1)?.powers();
            for ((c, mean), power) in taken.iter_mut().zip(ends.means()?).zip(powers) {
                let deviation = (power - mean * mean).max(0.0).sqrt();
                *c = c.max(mean - sigmas * deviation);
            }
        }
        let reached = taken.iter_mut().zip(&ranges).filter(|(_, (_, top))| *top > self.high);
        reached.for_each(|(c, _)| *c = 0.0);
        (taken.iter().all(|c| c.is_finite()) && taken.iter().any(|c| *c > 0.0)).then_some(taken)
    }
}

/// What lies between the clamp `first` and linear nodes, itself included, and these; or why they do not take a constant.
fn readers(graph: &Graph, users: &Users, first: NodeId) -> Result<(Vec<NodeId>, Vec<NodeId>), String> {
    let (mut inside, mut sinks, mut reached) = (Vec::new(), Vec::new(), vec![first]);
    while let Some(id) = reached.pop() {
        inside.push(id);
        let Some(value) = graph.node(id).and_then(|node| node.output(0)) else { continue };
        let named = || format!("`{}`", graph.value(value).name.escape_debug());
        for user in users.of_value(value) {
            let User::Input { node: reader, input: 0 } = *user else {
                return Err(format!("{} has readers other than convolutions and Gemm", named()));
            };
            let Some(node) = graph.node(reader) else { continue };
            if ["GlobalAveragePool", "GlobalMaxPool", "Flatten", "Identity"].iter().any(|op| node.op.is(op)) {
                reached.push(reader);
            } else if shifted::bias(graph, reader).is_none() {
                return Err(format!("{} has readers other than convolutions and Gemm", named()));
            } else if node.op.is("Conv") && !shifted::is_unpadded(graph, reader) {
                return Err(format!(
                    "`{}` pads with zeros, where the constant would be missing",
                    node.name.escape_debug()
                ));
            } else {
                sinks.push(reader);
            }
        }
    }
    Ok((inside, sinks))
}

/// Whether node `id` is neither in codes nor wanted in float, by its name or that of what it reads or returns.
fn is_free(model: &Model, cx: &PassContext<'_>, id: NodeId) -> bool {
    let graph = model.graph();
    graph.node(id).is_some_and(|node| {
        let kept = |name: &str| cx.keep_float.contains_key(name);
        let values = node.inputs.iter().chain(&node.outputs).flatten();
        let named = kept(&node.name) || values.into_iter().any(|value| kept(&graph.value(*value).name));
        !named && !model.plan().encodes_any_of(graph, id)
    })
}

/// The patch that moves constants from the biases in front of `pairs` to those behind them.
fn absorbed(model: &Model, pairs: &[Pair], sigmas: Option<f64>) -> Patch {
    let mut patch = Patch::on(model);
    let graph = model.graph();
    // What is added to biases, and what then returns something else.
    let mut terms: BTreeMap<NodeId, Vec<f64>> = BTreeMap::new();
    let mut moved = BTreeSet::new();
    for pair in pairs {
        let Some(taken) = pair.taken(model, sigmas) else { continue };
        let given: Option<Vec<Vec<f64>>> = pair.sinks.iter().map(|&id| shifted::through(graph, id, &taken)).collect();
        let fits = shifted::bias(graph, pair.source).is_some_and(|bias| bias.len() == taken.len());
        let Some(given) = given.filter(|given| fits && given.iter().flatten().all(|v| v.is_finite())) else {
            continue;
        };
        let lost = taken.iter().map(|c| -c).collect();
        for (id, term) in pair.sinks.iter().copied().zip(given).chain([(pair.source, lost)]) {
            let all = terms.entry(id).or_insert_with(|| vec![0.0; term.len()]);
            all.iter_mut().zip(term).for_each(|(all, term)| *all += term);
        }
        moved.extend(pair.inside.iter().copied().chain([pair.source]));
        patch.count("channels", taken.iter().filter(|c| **c > 0.0).count() as u64);
        patch.count("pairs", 1);
    }
    renew(graph, &terms, &moved, &mut patch);
    patch
}

/// Writes the nodes anew that have other biases, or read what `moved` returns.
fn renew(graph: &Graph, terms: &BTreeMap<NodeId, Vec<f64>>, moved: &BTreeSet<NodeId>, patch: &mut Patch) {
    let mut renewed: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        if !moved.contains(&id) && !terms.contains_key(&id) {
            continue;
        }
        let mut copy = node.clone();
        for input in copy.inputs.iter_mut().flatten() {
            *input = renewed.get(input).copied().unwrap_or(*input);
        }
        if let Some((bias, term)) = shifted::bias(graph, id).zip(terms.get(&id)) {
            #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
            let sum: Vec<f32> = bias.iter().zip(term).map(|(b, t)| (b + t) as f32).collect();
            let own = ops::linear(graph, id).and_then(|roles| roles.bias).and_then(|input| node.input(input.into()));
            let name = own.map_or_else(|| format!("{}.bias", node.name), |bias| graph.value(bias).name.to_string());
            copy.inputs.resize(3, None);
            copy.inputs[2] = Some(patch.constant(&format!("{name}.absorbed"), Tensor::of([sum.len()], sum)));
        }
        match node.output(0).filter(|_| moved.contains(&id)) {
            Some(output) => {
                patch.erase(id);
                let value = graph.value(output);
                let new = patch.node(copy, &format!("{}.absorbed", value.name), value.ty.clone(), Some(id));
                renewed.insert(output, new);
            }
            None => patch.replace(id, copy),
        }
    }
}

/// Whether the outputs keep less than [`LEAST_RATIO`] on the samples when values below `sigmas` are lost.
fn loses(model: &Model, pairs: &[Pair], sigmas: Option<f64>, cx: &PassContext<'_>) -> Result<bool, PassError> {
    let Some(dataset) = cx.dataset.filter(|data| !data.is_empty()) else { return Ok(true) };
    let mut other = model.clone();
    let bug = |error| PassError::Model(format!("a bug in onnx-quant: {error}"));
    other.apply(absorbed(model, pairs, sigmas)).map_err(bug)?;
    let prepared =
        |model: &Model| Simulation::prepare(model.graph(), &Plan::default(), cx.executor, model.graph().outputs());
    let runs = [prepared(model)?, prepared(&other)?];
    let (mut signal, mut noise) = (0.0_f64, 0.0_f64);
    cx.progress.begin(INFO.about.name, dataset.len() as u64);
    for index in 0..dataset.len() {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        let (before, after) = (measured(&runs[0], dataset, index)?, measured(&runs[1], dataset, index)?);
        for (a, b) in before.iter().zip(&after).filter(|(a, b)| a.is_finite() && b.is_finite()) {
            signal += f64::from(*a).powi(2);
            noise += (f64::from(*a) - f64::from(*b)).powi(2);
        }
        cx.progress.step();
    }
    cx.progress.end();
    Ok(noise * LEAST_RATIO > signal)
}

/// All float numbers that `run` returns for a sample.
fn measured(run: &Simulation, dataset: &dyn Dataset, index: usize) -> Result<Vec<f32>, PassError> {
    let outputs = run.run(&dataset.sample(index)?)?;
    Ok(outputs.iter().filter_map(Tensor::values::<f32>).flat_map(std::borrow::Cow::into_owned).collect())
}
