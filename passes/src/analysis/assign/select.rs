//! Which nodes run on codes.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::model::Model;
use crate::ops::{self, Laws};
use crate::pass::PassContext;
use crate::simulate::is_float_activation;
use crate::target::{KeepFloat, Outcome, Rule, Target, When};
use crate::tensor::{DType, Tensor};

/// What was decided about a node.
#[derive(Clone, Debug)]
pub(super) enum Choice {
    /// It runs on codes.
    Quantized {
        /// Why.
        reason: &'static str,
    },
    /// It disappears into the quantizer of the node before it.
    Absorbed,
    /// It stays in float.
    Float {
        /// Why.
        reason: String,
        /// Whether the user would have expected otherwise.
        notable: bool,
    },
}

impl Choice {
    pub(super) fn is_quantized(&self) -> bool {
        !matches!(self, Self::Float { .. })
    }

    pub(super) fn reason(&self) -> String {
        match self {
            Self::Quantized { reason } => (*reason).to_owned(),
            Self::Absorbed => "absorbed by the quantizer of the node before it".into(),
            Self::Float { reason, .. } => reason.clone(),
        }
    }
}

/// The decisions, and where codes are written.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pub(super) choices: BTreeMap<NodeId, Choice>,
    /// Tensors written as codes by their producer, in graph order, with the tensor whose encoding they must share.
    pub(super) written: Vec<(ValueId, Option<ValueId>)>,
    /// Activation reads by quantized nodes.
    pub(super) reads: Vec<(NodeId, u16)>,
}

/// Every tensor whose distribution the decisions need: what would be written or read as codes if all were measured.
pub(super) fn wishes(model: &Model, target: &dyn Target, keep_float: &KeepFloat) -> BTreeSet<ValueId> {
    let graph = model.graph();
    let selection = selection(model, target, keep_float, Ranges::Hoped, &BTreeMap::new());
    let read = selection.reads.iter().filter_map(|(node, input)| graph.node(*node)?.input((*input).into()));
    let written = selection.written.iter().map(|(value, _)| *value);
    read.chain(written).filter(|value| is_float_activation(graph, *value)).collect()
}

/// Which nodes have their weights in codes where no ranges of activations are fixed: matrix products with a constant matrix on the
/// right, but those that read one of `coarse`. Others gain nothing: runtimes dequantize the weights of convolutions anew on every
/// run, and have no fast convolution of activations whose range that run chose.
pub(super) fn products(model: &Model, cx: &PassContext<'_>, coarse: &Coarse) -> Selection {
    let (target, keep_float) = (cx.target, cx.keep_float);
    let reason = if cx.scheme.activation_block().is_some() {
        "its weight and its activation are in blocks, the latter with the scales of each run"
    } else if cx.scheme.dynamic.is_some() {
        "its weight is in codes, its activation in those of each run's range"
    } else {
        "its weight is in codes, its activation in float"
    };
    let users = Users::of(model.graph());
    let selector = Selector { model, target, users, keep_float, ranges: Ranges::Hoped, coarse };
    let mut selection = Selection::default();
    for (id, node) in model.graph().nodes() {
        let choice = match target.rule(&node.op).filter(|_| node.op.is("MatMul") || node.op.is("Gemm")) {
            None => {
                let reason = format!("the scheme leaves {} in float", node.op.display());
                Choice::Float { reason, notable: false }
            }
            Some(rule) => {
                let two_activations = activations(model.graph(), id, node).len() == 2;
                match selector.obstacle(id, node, rule).or_else(|| ragged(model.graph(), cx, id)) {
                    Some(reason) => Choice::Float { reason, notable: true },
                    None if two_activations => Choice::Float { reason: "it has no weight".into(), notable: false },
                    None => {
                        selection.reads.extend(ops::linear(model.graph(), id).map(|roles| (id, roles.activation)));
                        Choice::Quantized { reason }
                    }
                }
            }
        };
        selection.choices.insert(id, choice);
    }
    selection
}

/// Why the weight of the product `id` is not cut into blocks, for a target that takes whole ones only.
fn ragged(graph: &Graph, cx: &PassContext<'_>, id: NodeId) -> Option<String> {
    let block = cx.scheme.block_format().map(|format| format.size).or(cx.scheme.block);
    let block = block.filter(|_| cx.target.accepts().whole_blocks)?;
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(graph.node(id)?, roles.weight.into())?;
    let (inputs, outputs) = (*weight.shape().get(1 - roles.out_axis)?, *weight.shape().get(roles.out_axis)?);
    if !inputs.is_multiple_of(block) {
        return Some(format!("its {inputs} inputs are no whole blocks of {block}"));
    }
    (!outputs.is_multiple_of(2) && cx.scheme.weight_bits < 8)
        .then(|| format!("its {outputs} outputs are an odd number"))
}

/// The inputs of `node` that carry activations: all that are not constant, but for weights and biases.
pub(super) fn activations(graph: &Graph, id: NodeId, node: &Node) -> Vec<u16> {
    if let Some(linear) = ops::linear(graph, id) {
        return vec![linear.activation];
    }
    let data_inputs = match &*node.op.name {
        "Add" | "Mul" | "MatMul" | "Sub" | "Div" => 2,
        "Concat" | "Sum" | "Min" | "Max" => node.inputs.len(),
        _ => 1,
    };
    let is_activation = |&input: &u16| node.input(input.into()).is_some_and(|value| graph.constant(value).is_none());
    (0..u16::try_from(data_inputs).unwrap_or(u16::MAX)).filter(is_activation).collect()
}

/// Where the result of a quantized node is quantized: after the clamp that alone reads it, if the rule absorbs one.
pub(super) fn end_of_group(
    graph: &Graph,
    users: &Users,
    keep_float: &KeepFloat,
    rule: &Rule,
    output: ValueId,
) -> ValueId {
    absorbed_clamp(graph, users, keep_float, rule, output).map_or(output, |(_, end)| end)
}

fn absorbed_clamp(
    graph: &Graph,
    users: &Users,
    keep_float: &KeepFloat,
    rule: &Rule,
    output: ValueId,
) -> Option<(NodeId, ValueId)> {
    if !rule.absorbs_clamp {
        return None;
    }
    let (reader, 0) = users.only_input(output)? else { return None };
    let clamp = graph.node(reader)?;
    let constant_bounds = clamp.inputs.iter().skip(1).flatten().all(|v| graph.constant(*v).is_some());
    let kept = |name: &str| keep_float.contains_key(name);
    let kept = kept(&clamp.name) || clamp.output(0).is_some_and(|v| kept(&graph.value(v).name));
    (ops::laws(&clamp.op).contains(Laws::CLAMPS) && constant_bounds && !kept)
        .then(|| Some((reader, clamp.output(0)?)))?
}

/// Whether ranges are known, or only hoped for because nothing was measured yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranges {
    Measured,
    Hoped,
}

struct Selector<'a> {
    model: &'a Model,
    target: &'a dyn Target,
    users: Users,
    keep_float: &'a KeepFloat,
    ranges: Ranges,
    coarse: &'a Coarse,
}

/// Tensors that lose too much in codes, with the decibels that they keep.
pub(super) type Coarse = BTreeMap<ValueId, f64>;

/// Decides about every node that the target has a rule for; linear nodes that read one of `coarse` stay in float.
pub(super) fn select(model: &Model, target: &dyn Target, keep_float: &KeepFloat, coarse: &Coarse) -> Selection {
    selection(model, target, keep_float, Ranges::Measured, coarse)
}

fn selection(model: &Model, target: &dyn Target, keep_float: &KeepFloat, ranges: Ranges, coarse: &Coarse) -> Selection {
    let selector = Selector { model, target, users: Users::of(model.graph()), keep_float, ranges, coarse };
    let mut quantized = selector.grow();
    selector.prune(&mut quantized);
    selector.describe(&quantized)
}

impl Selector<'_> {
    fn graph(&self) -> &Graph {
        self.model.graph()
    }

    /// Why `node` cannot run on codes, whatever stands around it.
    fn obstacle(&self, id: NodeId, node: &Node, rule: &Rule) -> Option<String> {
        let graph = self.graph();
        if let Some(option) = self.keep_float.get(&*node.name) {
            return Some(format!("kept in float by `{option}`"));
        }
        let past = |input: usize| {
            let input = u16::try_from(input).unwrap_or(u16::MAX);
            self.model.plan().encoding(Site::Use { node: id, input }).is_some()
        };
        if (0..node.inputs.len()).any(past) {
            return Some("it reads a cache in codes".into());
        }
        for &value in node.inputs.iter().chain(&node.outputs).flatten() {
            if let Some(option) = self.keep_float.get(&*graph.value(value).name) {
                return Some(format!("kept in float by `{option}`, which names one of its tensors"));
            }
        }
        let inputs = activations(graph, id, node);
        let values: Vec<ValueId> = inputs.iter().filter_map(|&input| node.input(input.into())).collect();
        if values.is_empty() {
            return Some("it reads no activation".into());
        }
        if let Some(other) = values.iter().find(|value| !is_float_activation(graph, **value)) {
            let ty = graph.value(*other).ty.dtype().map_or("of unknown type", DType::name);
            return Some(format!("its input `{}` is {ty}, not f32", graph.value(*other).name));
        }
        if rule.when == When::Skip && self.skipping(node).is_none() {
            return Some("no heavy operator stands before it".into());
        }
        if rule.when == When::Always {
            if let Some((value, kept)) = values.iter().find_map(|value| Some((value, self.coarse.get(value)?))) {
                let name = &graph.value(*value).name;
                return Some(format!("in codes its input `{name}` keeps only {kept:.1} dB of its usual values"));
            }
            self.linear_obstacle(id, node, rule.least).or_else(|| {
                let unseen = values.iter().find(|value| !self.is_measured(**value));
                unseen.map(|value| format!("its input `{}` was never seen in calibration", graph.value(*value).name))
            })
        } else {
            let constants =
                node.inputs.iter().flatten().any(|v| graph.constant(*v).is_some_and(|c| c.dtype() == DType::F32));
            (constants && matches!(&*node.op.name, "Add" | "Mul" | "Sub" | "Div" | "Concat"))
                .then(|| "one operand is a constant: it is as cheap in float and loses nothing".into())
        }
    }

    /// Why the weight or bias of a linear node does not fit the rule.
    fn linear_obstacle(&self, id: NodeId, node: &Node, least: usize) -> Option<String> {
        let graph = self.graph();
        let Some(roles) = ops::linear(graph, id) else {
            return match &*node.op.name {
                "MatMul" if activations(graph, id, node).len() == 2 => {
                    let runs = self.target.accepts().products_of_activations;
                    (!runs).then(|| "the target does not run products of two activations on codes".to_owned())
                }
                _ => Some("its weight is not constant".into()),
            };
        };
        let weight = graph.constant_input(node, roles.weight.into())?;
        if weight.dtype() != DType::F32 {
            return Some(format!("its weight is {}, not f32", weight.dtype().name()));
        }
        if weight.is_empty() {
            return Some("its weight is empty".into());
        }
        if !is_finite(weight) {
            let name = graph.value(node.input(roles.weight.into())?).name.escape_debug().to_string();
            return Some(format!("its weight `{name}` has NaN or infinite values"));
        }
        if let Some(small) = weight.shape().iter().find(|size| weight.shape().len() == 2 && **size < least) {
            return Some(format!("with {small} inputs or outputs it is faster in float"));
        }
        if node.op.is("MatMul") && weight.shape().len() != 2 {
            return Some("its weight is a batch of matrices".into());
        }
        if node.op.is("Gemm") && node.int("transA", 0) != 0 {
            return Some("its activation is transposed".into());
        }
        if roles.weight == 0 {
            return Some("its weight stands on the left".into());
        }
        let one = |name: &str| (node.float(name, 1.0) - 1.0).abs() < f32::EPSILON;
        if node.op.is("Gemm") && !(one("alpha") && one("beta")) {
            return Some("its alpha or beta is not 1".into());
        }
        let bias = roles.bias?;
        let channels = weight.shape()[roles.out_axis];
        match graph.constant_input(node, bias.into()) {
            Some(bias)
                if bias.dtype() == DType::F32 && bias.len() == channels && bias.shape().last() == Some(&channels) =>
            {
                (!is_finite(bias)).then(|| "its bias has NaN or infinite values".to_owned())
            }
            Some(_) => Some("its bias is not one number per output channel".into()),
            None => Some("its bias is not constant".into()),
        }
    }

    fn is_measured(&self, value: ValueId) -> bool {
        let measured = || self.model.stats().distribution(value).is_some_and(|sketch| sketch.finite() > 0);
        self.ranges == Ranges::Hoped || measured()
    }

    /// The nodes that could run on codes, in graph order, with what they write.
    fn grow(&self) -> BTreeMap<NodeId, Result<Rule, (String, bool)>> {
        let graph = self.graph();
        let mut verdicts = BTreeMap::new();
        let mut codes: BTreeSet<ValueId> = BTreeSet::new();
        for (id, node) in graph.nodes() {
            let Some(rule) = self.target.rule(&node.op) else { continue };
            let verdict = match self.obstacle(id, node, rule) {
                Some(reason) => Err((reason, rule.when == When::Always)),
                None if rule.when == When::OnCodes && !self.reads_codes(id, node, &codes) => {
                    Err(("its inputs are float: quantizing it would cost more than it saves".into(), false))
                }
                None => self.result_obstacle(node, rule).map_or(Ok(*rule), |reason| Err((reason, true))),
            };
            if verdict.is_ok() && rule.result != Outcome::Float {
                codes.extend(
                    node.output(0).map(|output| end_of_group(graph, &self.users, self.keep_float, rule, output)),
                );
            }
            verdicts.insert(id, verdict);
        }
        verdicts
    }

    fn reads_codes(&self, id: NodeId, node: &Node, codes: &BTreeSet<ValueId>) -> bool {
        activations(self.graph(), id, node).iter().all(|&i| node.input(i.into()).is_some_and(|v| codes.contains(&v)))
    }

    fn result_obstacle(&self, node: &Node, rule: &Rule) -> Option<String> {
        let end = end_of_group(self.graph(), &self.users, self.keep_float, rule, node.output(0)?);
        if node.outputs.iter().skip(1).flatten().any(|v| !self.users.of_value(*v).is_empty()) {
            return Some("it has a second result that is read".into());
        }
        let needs_range = rule.result == Outcome::Codes;
        (needs_range && !self.is_measured(end))
            .then(|| format!("its result `{}` was never seen in calibration", self.graph().value(end).name))
    }

    /// Cheap nodes whose codes nobody quantized reads go back to float, until nothing changes.
    fn prune(&self, verdicts: &mut BTreeMap<NodeId, Result<Rule, (String, bool)>>) {
        loop {
            let idle: Vec<NodeId> = verdicts
                .iter()
                .filter_map(|(id, verdict)| Some((*id, verdict.as_ref().ok()?)))
                .filter(|(_, rule)| rule.when == When::OnCodes)
                .filter(|(id, rule)| !self.feeds_quantized(*id, rule, verdicts))
                .map(|(id, _)| id)
                .collect();
            // What read their codes must fall with them.
            let mut fell = !idle.is_empty();
            for id in idle {
                verdicts.insert(id, Err(("no quantized node reads its result".into(), false)));
            }
            let written = self.written(verdicts);
            for (id, node) in self.graph().nodes() {
                let on_codes = verdicts.get(&id).is_some_and(|v| v.as_ref().is_ok_and(|r| r.when == When::OnCodes));
                if on_codes && !self.reads_codes(id, node, &written) {
                    verdicts.insert(
                        id,
                        Err(("its inputs are float: quantizing it would cost more than it saves".into(), false)),
                    );
                    fell = true;
                }
            }
            if !fell {
                break;
            }
        }
    }

    fn written(&self, verdicts: &BTreeMap<NodeId, Result<Rule, (String, bool)>>) -> BTreeSet<ValueId> {
        let ok = verdicts.iter().filter_map(|(id, verdict)| Some((*id, verdict.as_ref().ok()?)));
        ok.filter(|(_, rule)| rule.result != Outcome::Float)
            .filter_map(|(id, rule)| {
                let output = self.graph().node(id)?.output(0)?;
                Some(end_of_group(self.graph(), &self.users, self.keep_float, rule, output))
            })
            .collect()
    }

    fn feeds_quantized(
        &self,
        id: NodeId,
        rule: &Rule,
        verdicts: &BTreeMap<NodeId, Result<Rule, (String, bool)>>,
    ) -> bool {
        let Some(output) = self.graph().node(id).and_then(|node| node.output(0)) else { return false };
        let end = end_of_group(self.graph(), &self.users, self.keep_float, rule, output);
        self.users.of_value(end).iter().any(|user| match user {
            User::Input { node, .. } => verdicts.get(node).is_some_and(Result::is_ok),
            User::Capture { .. } | User::Output => false,
        })
    }

    fn describe(&self, verdicts: &BTreeMap<NodeId, Result<Rule, (String, bool)>>) -> Selection {
        let graph = self.graph();
        let mut selection = Selection::default();
        for (id, node) in graph.nodes() {
            match verdicts.get(&id) {
                Some(Ok(rule)) => self.describe_quantized(id, node, rule, verdicts, &mut selection),
                Some(Err((reason, notable))) => {
                    let choice = Choice::Float { reason: reason.clone(), notable: *notable };
                    selection.choices.entry(id).or_insert(choice);
                }
                None => {
                    let reason = format!("the target does not run {} on codes", node.op.display());
                    selection.choices.entry(id).or_insert(Choice::Float { reason, notable: false });
                }
            }
        }
        selection
    }

    fn describe_quantized(
        &self,
        id: NodeId,
        node: &Node,
        rule: &Rule,
        verdicts: &BTreeMap<NodeId, Result<Rule, (String, bool)>>,
        selection: &mut Selection,
    ) {
        let graph = self.graph();
        let reason = match rule.when {
            When::Always => "the target runs it on codes",
            When::OnCodes => "its inputs are codes already",
            When::Skip => "it fuses into the operator before it, and reads the other input as codes",
        };
        selection.choices.insert(id, Choice::Quantized { reason });
        selection.reads.extend(self.read_as_codes(id, node, rule).into_iter().map(|input| (id, input)));
        let Some(output) = node.output(0) else { return };
        let clamp = absorbed_clamp(graph, &self.users, self.keep_float, rule, output);
        let end = clamp.map_or(output, |(_, end)| end);
        let writes = match rule.result {
            Outcome::Codes | Outcome::Same => true,
            // Everyone would round it on reading anyway: rounding once, as it is written, is the same and cheaper.
            Outcome::Float => self.is_measured(end) && self.only_read_as_codes(end, verdicts),
        };
        if !writes {
            return;
        }
        if let Some((clamp, _)) = clamp {
            selection.choices.insert(clamp, Choice::Absorbed);
        }
        let shares = (rule.result == Outcome::Same).then(|| node.input(0)).flatten();
        selection.written.push((end, shares));
    }

    fn only_read_as_codes(&self, value: ValueId, verdicts: &BTreeMap<NodeId, Result<Rule, (String, bool)>>) -> bool {
        let readers = self.users.of_value(value);
        !readers.is_empty()
            && readers.iter().all(|user| match user {
                User::Input { node, input } => match (verdicts.get(node), self.graph().node(*node)) {
                    (Some(Ok(rule)), Some(reader)) => self.read_as_codes(*node, reader, rule).contains(input),
                    _ => false,
                },
                User::Capture { .. } | User::Output => false,
            })
    }

    /// The inputs of `node` that `rule` has read as codes.
    fn read_as_codes(&self, id: NodeId, node: &Node, rule: &Rule) -> Vec<u16> {
        let inputs = activations(self.graph(), id, node);
        match rule.when {
            When::Skip => self.skipping(node).into_iter().filter(|input| inputs.contains(input)).collect(),
            When::Always | When::OnCodes => inputs,
        }
    }

    /// The input of the addition `node` that does not come from the heavy operator which it fuses into: of two such operators that is
    /// the later one.
    fn skipping(&self, node: &Node) -> Option<u16> {
        let heavy = |input: u16| {
            let (id, producer) = self.graph().producer(node.input(input.into())?)?;
            let rule = self.target.rule(&producer.op).filter(|rule| rule.when == When::Always)?;
            (self.obstacle(id, producer, rule).is_none() && self.users.only_input(producer.output(0)?).is_some())
                .then(|| self.graph().nodes().position(|(other, _)| other == id))
                .flatten()
        };
        match (heavy(0), heavy(1)) {
            (None, None) => None,
            (left, right) => Some(u16::from(left > right)),
        }
    }
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.floats().is_some_and(|values| values.iter().all(|v| v.is_finite()))
}
