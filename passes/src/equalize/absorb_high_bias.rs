//! High biases given to the layer behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::region::{clamp_end, is_kept_in_float};
use super::shifted;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{User, Users, reads};
use crate::model::{Edit, Model, Patch, Plan};
use crate::ops;
use crate::pass::{
    Facts, LEAST_RATIO, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish,
};
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
    /// deviations, as in the source; the few values below it are lost, and what was measured behind them is forgotten. Where an output of
    /// the model would then keep less than 50 dB on samples held out (on all, where none are), or all outputs are integers, which do not tell, the least values are used for all pairs
    /// and a note says so; what was measured of pairs that only `sigmas` would have changed is forgotten too, so that they are not tried
    /// again. The nodes are `Conv` and `Gemm`, with global pools and `Flatten` between them; one without a bias gets one. A convolution
    /// that pads with zeros would have to pad with −c: it is left alone and named, and so is a tensor with other readers.
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
        let (pairs, refused) = pairs(model, cx);
        let values = pairs.iter().map(|pair| pair.value).chain(refused.iter().map(|refused| refused.value));
        let ends = values.map(|value| (value, Wish::Ends { axis: 1 }));
        let lossy = pairs.iter().filter(|_| self.sigmas.is_some());
        ends.chain(lossy.map(|pair| (pair.value, Wish::Peaks { axis: 1 }))).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let (pairs, refused) = pairs(model, cx);
        let mut patch = absorbed(model, &pairs, self.sigmas);
        if self.sigmas.is_some() && !patch.is_empty() && loses(model, &pairs, self.sigmas, cx)? {
            patch = absorbed(model, &pairs, None);
            if !patch.is_empty() {
                // The next round would judge what is left by itself, against a model that has changed.
                let left = |pair: &&Pair| pair.taken(model, None).is_none() && pair.taken(model, self.sigmas).is_some();
                pairs.iter().filter(left).for_each(|pair| patch.edit(Edit::Forget(pair.value)));
            }
            let message = "absorb-high-bias: with the values below `sigmas` lost, an output would keep less than 50 dB, or all are integers, \
                           which do not tell: the least values were used instead";
            patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, Place::Model, message));
        }
        refused.iter().filter_map(|refused| refused.told(model)).for_each(|note| patch.note(note));
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

/// A linear node and a clamp that alone reads it, behind which something does not take a constant.
struct Refused {
    source: NodeId,
    /// What is clamped.
    value: ValueId,
    /// Where the clamp ends.
    high: f64,
    why: String,
}

impl Refused {
    /// What the user should know where channels are high enough to matter.
    fn told(&self, model: &Model) -> Option<Diagnostic> {
        let ranges = model.stats().ends(self.value, 1)?.ranges()?;
        ranges.iter().any(|(low, top)| *low > 0.0 && *top <= self.high).then_some(())?;
        let place = Place::Node(Arc::clone(&model.graph().node(self.source)?.name));
        let message = format!("absorb-high-bias: its bias stays, as {}", self.why);
        Some(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Note, place, message))
    }
}

/// Every pair of `model`, and what would be one but for what lies behind.
fn pairs(model: &Model, cx: &PassContext<'_>) -> (Vec<Pair>, Vec<Refused>) {
    let (mut pairs, mut refused) = (Vec::new(), Vec::new());
    let users = Users::of(model.graph());
    for (id, _) in model.graph().nodes() {
        match Pair::at(model, &users, cx, id) {
            Some(Ok(pair)) => pairs.push(pair),
            Some(Err(other)) => refused.push(other),
            None => {}
        }
    }
    (pairs, refused)
}

impl Pair {
    /// The pair that begins with `source`; or why it is none, where the pattern is there.
    fn at(model: &Model, users: &Users, cx: &PassContext<'_>, source: NodeId) -> Option<Result<Self, Refused>> {
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
            Err(why) => free(&source).then_some(Err(Refused { source, value, high, why })),
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
    !is_kept_in_float(graph, cx, id) && !model.plan().encodes_any_of(graph, id)
}

/// The patch that moves constants from the biases in front of `pairs` to those behind them.
fn absorbed(model: &Model, pairs: &[Pair], sigmas: Option<f64>) -> Patch {
    let mut patch = Patch::on(model);
    let graph = model.graph();
    // What is added to biases, and what then returns something else.
    let mut terms: BTreeMap<NodeId, Vec<f64>> = BTreeMap::new();
    let mut moved = BTreeSet::new();
    // What returns something else on the samples too.
    let mut lossy = BTreeSet::new();
    for pair in pairs {
        let Some(taken) = pair.taken(model, sigmas) else { continue };
        let given: Option<Vec<Vec<f64>>> = pair.sinks.iter().map(|&id| shifted::through(graph, id, &taken)).collect();
        let fits = shifted::bias(graph, pair.source).is_some_and(|bias| bias.len() == taken.len());
        let Some(given) = given.filter(|given| fits && given.iter().flatten().all(|v| v.is_finite())) else {
            continue;
        };
        if sigmas.is_some() && pair.taken(model, None).as_ref() != Some(&taken) {
            lossy.extend(pair.sinks.iter().copied());
        }
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
    behind(graph, &lossy).into_iter().for_each(|value| patch.edit(Edit::Forget(value)));
    patch
}

/// What the nodes `first` return, and all nodes behind them.
fn behind(graph: &Graph, first: &BTreeSet<NodeId>) -> BTreeSet<ValueId> {
    let mut values: BTreeSet<ValueId> = BTreeSet::new();
    for (id, node) in graph.nodes() {
        if first.contains(&id) || reads(node).any(|value| values.contains(&value)) {
            values.extend(node.outputs.iter().flatten());
        }
    }
    values
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
            // On the samples, which all that was measured comes from, its output is the same; where it is not, that is forgotten.
            None => patch.replace(id, copy),
        }
    }
}

/// Whether some output keeps less than [`LEAST_RATIO`] when values below `sigmas` are lost, on samples held out or, where there are none, on
/// all; or none tells.
fn loses(model: &Model, pairs: &[Pair], sigmas: Option<f64>, cx: &PassContext<'_>) -> Result<bool, PassError> {
    let Some(dataset) = cx.held_out.or(cx.dataset).filter(|data| !data.is_empty()) else { return Ok(true) };
    let mut other = model.clone();
    let bug = |error| PassError::Model(format!("a bug in onnx-quant: {error}"));
    other.apply(absorbed(model, pairs, sigmas)).map_err(bug)?;
    let prepared =
        |model: &Model| Simulation::prepare(model.graph(), &Plan::default(), cx.executor, model.graph().outputs());
    let runs = [prepared(model)?, prepared(&other)?];
    let mut outputs = vec![Compared::default(); model.graph().outputs().len()];
    cx.progress.begin(INFO.about.name, dataset.len() as u64);
    for index in 0..dataset.len() {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        let feeds = dataset.sample(index)?;
        let (before, after) = (runs[0].run(&feeds)?, runs[1].run(&feeds)?);
        for ((output, before), after) in outputs.iter_mut().zip(&before).zip(&after) {
            output.see(before, after);
        }
        cx.progress.step();
    }
    cx.progress.end();
    Ok(outputs.iter().all(|output| !output.any) || outputs.iter().any(Compared::loses))
}

/// An output of two models, over samples.
#[derive(Clone, Default)]
struct Compared {
    /// Whether there was any finite float.
    any: bool,
    signal: f64,
    noise: f64,
}

impl Compared {
    /// Adds the numbers of a sample; what was finite and is not any more is lost altogether.
    fn see(&mut self, before: &Tensor, after: &Tensor) {
        let Some((before, after)) = before.values::<f32>().zip(after.values::<f32>()) else { return };
        for (a, b) in before.iter().zip(after.iter()).filter(|(a, _)| a.is_finite()) {
            self.any = true;
            self.signal += f64::from(*a).powi(2);
            self.noise += if b.is_finite() { (f64::from(*a) - f64::from(*b)).powi(2) } else { f64::INFINITY };
        }
    }

    fn loses(&self) -> bool {
        self.noise * LEAST_RATIO > self.signal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_tell_nothing_and_numbers_that_are_finite_no_more_are_lost() {
        let of = |before: &[f32], after: &[f32]| {
            let mut compared = Compared::default();
            compared.see(&Tensor::of([before.len()], before.to_vec()), &Tensor::of([after.len()], after.to_vec()));
            compared
        };
        let mut integers = Compared::default();
        integers.see(&Tensor::of([1], vec![1_i64]), &Tensor::of([1], vec![2_i64]));
        assert!(!integers.any && !of(&[f32::NAN], &[1.0]).any);
        // By hand: of a power of 2, an error of 0.004² leaves 50.97 dB, and one of 0.005² leaves 49.03 dB.
        assert!(!of(&[1.0, -1.0], &[1.004, -1.0]).loses() && of(&[1.0, -1.0], &[1.005, -1.0]).loses());
        assert!(of(&[1e6, 1.0], &[1e6, f32::INFINITY]).loses() && of(&[1e6, 1.0], &[1e6, f32::NAN]).loses());
        assert!(!of(&[1.0, f32::INFINITY], &[1.0, f32::INFINITY]).loses());
    }
}
