//! Running a plan: the float graph with every encoded tensor rounded by our own arithmetic.
//!
//! No executor is ever shown a quantize or dequantize node. The graph is cut wherever an encoded activation is read; the
//! float parts between the cuts run on the executor, and [`crate::encoding::Encoding::simulate`] rounds what crosses.
//! Encoded constants enter the parts already rounded. With an empty plan there is one part: the float model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::exec::{ExecError, Executor, Session};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Body, BuildError, Builder, Def, Graph, Node, Type};
use crate::model::Plan;
use crate::tensor::{DType, Tensor};

/// Why a plan cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimulateError {
    /// A float part does not run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// An encoding does not fit the tensor it is for.
    #[error("tensor `{tensor}`: {problem}")]
    Encoding {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        problem: String,
    },
    /// A part cannot be cut out.
    #[error("a bug in onnx-quant: cutting the graph failed: {0}")]
    Cut(#[from] BuildError),
}

/// A tensor as someone reads it: as computed, or through the encoding at a site.
pub(crate) type Version = (ValueId, Option<Site>);

/// A plan, ready to run from several threads.
pub struct Simulation {
    parts: Vec<Part>,
    crossing: Crossing,
    inputs: Vec<ValueId>,
    constants: BTreeMap<ValueId, Arc<Tensor>>,
    wanted: Vec<Version>,
    /// Where each wanted value stands among the wanted.
    places: BTreeMap<ValueId, Vec<usize>>,
}

/// Some nodes of the graph, ready to run.
pub(crate) struct Part {
    session: Box<dyn Session>,
    feeds: Vec<Version>,
    outputs: Vec<ValueId>,
}

impl Part {
    /// Runs on what is `known`, and adds what it computes.
    pub(crate) fn run(&self, known: &mut Known, crossing: &Crossing) -> Result<&[ValueId], SimulateError> {
        if self.outputs.is_empty() {
            return Ok(&[]); // nobody reads anything of it
        }
        let feeds = self.feeds.iter().map(|v| crossing.version(known, *v)).collect::<Result<Vec<_>, _>>()?;
        let outputs = self.session.run(&feeds)?;
        known.extend(self.outputs.iter().zip(outputs).map(|(&value, tensor)| ((value, None), tensor)));
        Ok(&self.outputs)
    }
}

/// The tensors of one sample that are there, as computed and as read.
pub(crate) type Known = BTreeMap<Version, Tensor>;

/// How tensors are rounded where they cross from one part to another.
#[derive(Clone)]
pub(crate) struct Crossing {
    encodings: BTreeMap<Site, crate::encoding::Encoding>,
    names: Arc<BTreeMap<ValueId, String>>,
}

impl Crossing {
    /// For the encodings that `plan` has now.
    pub(crate) fn of(graph: &Graph, plan: &Plan) -> Self {
        Self {
            encodings: plan.encodings().map(|(site, encoding)| (site, encoding.clone())).collect(),
            names: Arc::new(graph.value_ids().map(|id| (id, graph.value(id).name.to_string())).collect()),
        }
    }

    /// The same with what is read at `site` rounded by `encoding`.
    pub(crate) fn with(&self, site: Site, encoding: crate::encoding::Encoding) -> Self {
        let mut other = self.clone();
        other.encodings.insert(site, encoding);
        other
    }

    /// The tensor `at`, rounded where it is read in codes.
    pub(crate) fn version(&self, known: &mut Known, at: Version) -> Result<Tensor, SimulateError> {
        let (value, site) = at;
        let problem = |problem: String| SimulateError::Encoding { tensor: self.names[&value].clone(), problem };
        if let Some(tensor) = known.get(&at) {
            return Ok(tensor.clone());
        }
        let raw = known.get(&(value, None)).ok_or_else(|| problem("was not computed before it is read".into()))?;
        let Some(encoding) = site.and_then(|site| self.encodings.get(&site)) else {
            return Ok(raw.clone());
        };
        let mut values = raw.values::<f32>().ok_or_else(|| problem(format!("is {}", raw.dtype().name())))?.into_owned();
        encoding.simulate(&mut values, raw.shape()).map_err(|e| problem(e.to_string()))?;
        let rounded = Tensor::of(raw.shape(), values);
        known.insert(at, rounded.clone());
        Ok(rounded)
    }
}

impl std::fmt::Debug for Simulation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulation({} parts)", self.parts.len())
    }
}

/// Tells which version of a value each reader sees.
pub(crate) struct Cutter<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) plan: &'a Plan,
}

impl Cutter<'_> {
    pub(crate) fn of_use(&self, node: NodeId, input: usize, value: ValueId) -> Version {
        let by_use = u16::try_from(input).ok().map(|input| Site::Use { node, input });
        let by_use = by_use.filter(|site| self.plan.encoding(*site).is_some() || self.plan.substitute(*site).is_some());
        (value, by_use.or_else(|| self.of_value(value).1))
    }

    pub(crate) fn of_value(&self, value: ValueId) -> Version {
        let site = Site::Value(value);
        (value, self.plan.encoding(site).is_some().then_some(site))
    }

    /// Everything `node` reads, captures included.
    pub(crate) fn reads(&self, id: NodeId, node: &Node) -> Vec<Version> {
        let inputs = node.inputs.iter().enumerate().filter_map(|(i, v)| Some(self.of_use(id, i, (*v)?)));
        inputs.chain(crate::ir::walk::captures(node).into_iter().map(|v| self.of_value(v))).collect()
    }

    pub(crate) fn is_constant(&self, value: ValueId) -> bool {
        self.graph.constant(value).is_some()
    }

    /// For every node, how many cuts lie on the longest way to it.
    pub(crate) fn depths(&self) -> BTreeMap<NodeId, usize> {
        let mut depths = BTreeMap::new();
        for (id, node) in self.graph.nodes() {
            let depth = self.reads(id, node).into_iter().filter(|(value, _)| !self.is_constant(*value));
            let depth = depth.map(|(value, site)| {
                let producer = self.graph.producer(value).and_then(|(node, _)| depths.get(&node).copied());
                producer.unwrap_or(0) + usize::from(site.is_some())
            });
            depths.insert(id, depth.max().unwrap_or(0));
        }
        depths
    }
}

impl Simulation {
    /// Makes `graph` under `plan` ready to run; [`Self::run`] will return `wanted`, each as its readers see it at
    /// [`Site::Value`].
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn prepare(
        graph: &Graph,
        plan: &Plan,
        executor: &dyn Executor,
        wanted: &[ValueId],
    ) -> Result<Self, SimulateError> {
        let cutter = Cutter { graph, plan };
        let depths = cutter.depths();
        let wanted: Vec<Version> = wanted.iter().map(|&value| cutter.of_value(value)).collect();
        let needed = crate::ir::walk::needed(graph, &BTreeSet::new(), &wanted.iter().map(|w| w.0).collect::<Vec<_>>());
        let needed: BTreeSet<NodeId> = needed.0.into_iter().collect();
        let mut by_depth: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
        for (id, _) in graph.nodes().filter(|(id, _)| needed.contains(id)) {
            by_depth.entry(depths[&id]).or_default().push(id);
        }
        // What a part must hand on: everything read elsewhere.
        let in_order: Vec<NodeId> = by_depth.values().flatten().copied().collect();
        let mut exported = exported(&cutter, &in_order, |id| depths[&id]);
        exported.extend(wanted.iter().map(|w| w.0));
        let parts =
            by_depth.values().map(|nodes| cut(&cutter, nodes, &exported, executor)).collect::<Result<_, _>>()?;
        Ok(Self {
            parts,
            crossing: Crossing::of(graph, plan),
            inputs: graph.inputs().to_vec(),
            constants: wanted
                .iter()
                .filter_map(|(value, _)| Some((*value, Arc::clone(graph.constant(*value)?))))
                .collect(),
            places: places(&wanted),
            wanted,
        })
    }

    /// Runs one sample: `feeds` are the graph inputs in order; returns the wanted tensors in order.
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, SimulateError> {
        self.run_as(&self.crossing, feeds)
    }

    /// How tensors are rounded where they are read.
    pub(crate) fn crossing(&self) -> &Crossing {
        &self.crossing
    }

    /// As [`Self::run`], with tensors rounded as `crossing` says where the plan rounds them.
    pub(crate) fn run_as(&self, crossing: &Crossing, feeds: &[Tensor]) -> Result<Vec<Tensor>, SimulateError> {
        let mut results: Vec<Option<Tensor>> = vec![None; self.wanted.len()];
        self.through(crossing, feeds, &mut |at, tensor| results[at] = Some(tensor))?;
        Ok(results.into_iter().flatten().collect())
    }

    /// Runs one sample and hands every wanted tensor to `see`, with its place among the wanted, as soon as it is computed;
    /// what nobody needs any more is let go.
    ///
    /// # Errors
    /// [`SimulateError`].
    pub fn run_with(&self, feeds: &[Tensor], see: &mut dyn FnMut(usize, Tensor)) -> Result<(), SimulateError> {
        self.through(&self.crossing, feeds, see)
    }

    fn through(
        &self,
        crossing: &Crossing,
        feeds: &[Tensor],
        see: &mut dyn FnMut(usize, Tensor),
    ) -> Result<(), SimulateError> {
        let mut known: Known =
            self.inputs.iter().zip(feeds).map(|(&value, tensor)| ((value, None), tensor.clone())).collect();
        known.extend(self.constants.iter().map(|(&value, tensor)| ((value, None), tensor.as_ref().clone())));
        let mut last_reader: BTreeMap<ValueId, usize> = BTreeMap::new();
        for (index, part) in self.parts.iter().enumerate() {
            last_reader.extend(part.feeds.iter().map(|(value, _)| (*value, index)));
        }
        self.hand_over((&mut known, crossing), &self.inputs, see)?;
        let constants: Vec<ValueId> = self.constants.keys().copied().collect();
        self.hand_over((&mut known, crossing), &constants, see)?;
        for (index, part) in self.parts.iter().enumerate() {
            let computed = part.run(&mut known, crossing)?;
            self.hand_over((&mut known, crossing), computed, see)?;
            known.retain(|(value, _), _| last_reader.get(value).is_some_and(|&last| last > index));
        }
        Ok(())
    }

    /// Shows those of `values` that are wanted.
    fn hand_over(
        &self,
        (known, crossing): (&mut Known, &Crossing),
        values: &[ValueId],
        see: &mut dyn FnMut(usize, Tensor),
    ) -> Result<(), SimulateError> {
        for value in values {
            for at in self.places.get(value).into_iter().flatten() {
                see(*at, crossing.version(known, self.wanted[*at])?);
            }
        }
        Ok(())
    }
}

/// What parts must hand on, when nodes of the same `place` make up a part: everything read in another one, or rounded on the way.
pub(crate) fn exported<P: PartialEq>(
    cutter: &Cutter<'_>,
    nodes: &[NodeId],
    place: impl Fn(NodeId) -> P,
) -> BTreeSet<ValueId> {
    let mut exported = BTreeSet::new();
    for &id in nodes {
        for (value, site) in cutter.graph.node(id).into_iter().flat_map(|node| cutter.reads(id, node)) {
            let producer = cutter.graph.producer(value).map(|(producer, _)| producer);
            if producer.is_some_and(|producer| site.is_some() || place(producer) != place(id)) {
                exported.insert(value);
            }
        }
    }
    exported
}

fn places(wanted: &[Version]) -> BTreeMap<ValueId, Vec<usize>> {
    let mut places: BTreeMap<ValueId, Vec<usize>> = BTreeMap::new();
    for (at, (value, _)) in wanted.iter().enumerate() {
        places.entry(*value).or_default().push(at);
    }
    places
}

/// The part of the graph made of `nodes`, all of one depth.
pub(crate) fn cut(
    cutter: &Cutter<'_>,
    nodes: &[NodeId],
    exported: &BTreeSet<ValueId>,
    executor: &dyn Executor,
) -> Result<Part, SimulateError> {
    let inside: BTreeSet<ValueId> = nodes
        .iter()
        .filter_map(|&id| cutter.graph.node(id))
        .flat_map(|n| n.outputs.iter().flatten().copied())
        .collect();
    let mut part = PartBuilder {
        cutter,
        inside: &inside,
        builder: Builder::new(cutter.graph.name(), ""),
        versions: BTreeMap::new(),
        feeds: Vec::new(),
    };
    for &id in nodes {
        part.add(id)?;
    }
    let mut outputs: Vec<ValueId> = Vec::new();
    for &value in inside.iter().filter(|value| exported.contains(value)) {
        part.builder.output(&cutter.graph.value(value).name);
        outputs.push(value);
    }
    let PartBuilder { builder, feeds, .. } = part;
    let session = executor.prepare(&builder.finish()?)?;
    Ok(Part { session, feeds, outputs })
}

struct PartBuilder<'a> {
    cutter: &'a Cutter<'a>,
    inside: &'a BTreeSet<ValueId>,
    builder: Builder,
    versions: BTreeMap<Version, ValueId>,
    feeds: Vec<Version>,
}

impl PartBuilder<'_> {
    fn add(&mut self, id: NodeId) -> Result<(), SimulateError> {
        let Some(node) = self.cutter.graph.node(id) else { return Ok(()) };
        let mut copy = node.clone();
        for (index, input) in copy.inputs.iter_mut().enumerate() {
            if let Some(value) = *input {
                *input = Some(self.read(self.cutter.of_use(id, index, value))?);
            }
        }
        for body in &mut copy.bodies {
            self.recapture(body)?;
        }
        for output in copy.outputs.iter_mut().flatten() {
            let value = self.cutter.graph.value(*output);
            *output = self.builder.value(&value.name);
            self.builder.set_type(*output, value.ty.clone());
        }
        self.builder.node(copy)?;
        Ok(())
    }

    fn recapture(&mut self, body: &mut Body) -> Result<(), SimulateError> {
        for value in &mut body.graph.values {
            if let Def::Capture(outer) = &mut value.def {
                *outer = self.read(self.cutter.of_value(*outer))?;
            }
        }
        Ok(())
    }

    /// The id, in the part, of a version of a value of the graph.
    fn read(&mut self, version: Version) -> Result<ValueId, SimulateError> {
        if let Some(&id) = self.versions.get(&version) {
            return Ok(id);
        }
        let (value, site) = version;
        let (graph, plan) = (self.cutter.graph, self.cutter.plan);
        let source = graph.value(value);
        let id = if let Some(tensor) = graph.constant(value) {
            let name = self.builder.fresh(&source.name);
            match site {
                Some(site) => self.builder.constant(&name, rounded_constant(plan, site, tensor, &source.name)?)?,
                None => self.builder.constant(&name, Arc::clone(tensor))?,
            }
        } else if site.is_none() && self.inside.contains(&value) {
            self.builder.value(&source.name)
        } else {
            let name = match site {
                Some(_) => self.builder.fresh(&format!("{}.quantized", source.name)),
                None => source.name.to_string(),
            };
            self.feeds.push(version);
            self.builder.input(&name, source.ty.clone())?
        };
        self.versions.insert(version, id);
        Ok(id)
    }
}

/// The constant at `site` as its codes say, rounded to nearest where none were chosen, or the float one that stands for it.
pub(crate) fn rounded_constant(
    plan: &Plan,
    site: Site,
    tensor: &Arc<Tensor>,
    name: &str,
) -> Result<Arc<Tensor>, SimulateError> {
    let problem = |problem: String| SimulateError::Encoding { tensor: name.to_owned(), problem };
    let Some(encoding) = plan.encoding(site) else {
        return Ok(Arc::clone(plan.substitute(site).unwrap_or(tensor)));
    };
    let values = if let Some(codes) = plan.codes(site) {
        encoding.decode(codes).map_err(|e| problem(e.to_string()))?
    } else {
        let mut values = tensor.floats().ok_or_else(|| problem("is no float tensor".into()))?.into_owned();
        encoding.simulate(&mut values, tensor.shape()).map_err(|e| problem(e.to_string()))?;
        values
    };
    Ok(Arc::new(Tensor::of(tensor.shape(), values)))
}

/// Whether a value can be measured and rounded at all: a float tensor that is not constant.
pub fn is_float_activation(graph: &Graph, value: ValueId) -> bool {
    let value = graph.value(value);
    let float = match &value.ty {
        Type::Tensor(ty) => ty.dtype == Some(DType::F32),
        Type::Opaque(_) => false,
    };
    float && !matches!(value.def, Def::Const(_))
}
