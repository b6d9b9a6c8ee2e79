//! The float model and the model as planned, run side by side, stage by stage.
//!
//! A stage ends where the next nodes to be decided about begin: when stage s has run, everything that those nodes read is there in
//! both versions, for every sample. What later stages need is kept between stages, so that the whole walk costs two runs of
//! the model. Samples whose tensors do not fit the budget are run again from their inputs at every stage instead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use crate::exec::Dataset;
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::judges;
use crate::model::Plan;
use crate::ops::sizes;
use crate::padding::{self, Mask};
use crate::parallel;
use crate::pass::{PassContext, PassError};
use crate::seed;
use crate::simulate::{self, Crossing, Cutter, Known, Part, Version};
use crate::tensor::Tensor;

/// Both versions of one sample's tensors, as far as later stages read them.
pub(crate) struct Pair {
    /// The number of the sample.
    pub(crate) index: usize,
    /// One of two halves of the samples: by what the sample is, or that which it is a variant of, and not by where it stands.
    pub(crate) half: usize,
    /// The sample that it is a variant of; its own number where it is none.
    pub(crate) origin: usize,
    float: Known,
    planned: Known,
    mask: Option<Mask>,
}

impl Pair {
    /// `value` of the float model; padding left out.
    pub(crate) fn float(&self, value: ValueId) -> Option<Tensor> {
        Some(self.unpadded(self.float.get(&(value, None))?.clone()))
    }

    /// `value` of the float model, or of the model as planned, with its padding.
    pub(crate) fn whole(&self, value: ValueId, planned: bool) -> Option<&Tensor> {
        if planned { &self.planned } else { &self.float }.get(&(value, None))
    }

    /// Which rows of a tensor of `shape` are words, where some are padding.
    pub(crate) fn words(&self, shape: &[usize]) -> Option<&[bool]> {
        self.mask.as_ref()?.words(shape)
    }

    /// A version of a value of the model as planned; padding left out.
    pub(crate) fn planned(&mut self, version: Version, crossing: &Crossing) -> Result<Tensor, PassError> {
        let tensor = crossing.version(&mut self.planned, version)?;
        Ok(self.unpadded(tensor))
    }

    /// Of one number per row of a tensor with a row per position, those of words; all of them where there is no padding.
    pub(crate) fn unpadded_rows(&self, rows: &[f32]) -> Vec<f32> {
        let words = self.mask.as_ref().and_then(|mask| mask.of_rows(rows.len()));
        match words {
            Some(words) => rows.iter().zip(words).filter(|(_, word)| **word).map(|(row, _)| *row).collect(),
            None => rows.to_vec(),
        }
    }

    fn unpadded(&self, tensor: Tensor) -> Tensor {
        padding::without(self.mask.as_ref(), tensor)
    }
}

/// What runs in one stage.
struct Stage {
    float: Part,
    planned: Vec<Part>,
    /// Values that are the same in both.
    shared: BTreeSet<ValueId>,
    crossing: Crossing,
}

/// Stages that may be run again, and what is to be there when the last one begins.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) last: usize,
    pub(crate) reads: Vec<ValueId>,
}

/// The walk.
pub(crate) struct Lockstep<'a> {
    graph: &'a Graph,
    cx: &'a PassContext<'a>,
    dataset: &'a dyn Dataset,
    stage_of: BTreeMap<NodeId, usize>,
    /// The last stage that reads a value.
    last_reader: BTreeMap<ValueId, usize>,
    /// Whether what is fitted to samples leaves out those that learning holds out.
    spares: bool,
    /// First and last stages of what may be run again.
    spans: Vec<(usize, usize)>,
    read_by_spans: BTreeSet<ValueId>,
    /// Values that the plan changes.
    touched: BTreeSet<ValueId>,
    /// One per sample; `None` for those that are run again at every stage.
    kept: Vec<Mutex<Option<Pair>>>,
    /// How many samples are kept, from the first on.
    n_kept: usize,
    /// The most bytes that the tensors of one sample take between stages.
    largest: u64,
    /// What ran so far, where a sample has to run it again.
    stages: Vec<Ran>,
    /// Whether memory holds those ready.
    ready: bool,
    ran: usize,
}

/// So many times its weights take stages that stay ready, at most: both versions, each prepared for kernels as well where it is small.
const READY: u64 = 4;

/// A stage that ran.
enum Ran {
    Ready(Box<Stage>),
    /// Made ready anew by the plan that it ran under: what came later is not behind it.
    By(Box<Plan>),
}

impl<'a> Lockstep<'a> {
    /// Ready to run stage 0 of `graph` on the samples of `cx`, with [`stages`], of which those in `spans` may be run
    /// [again](Self::again).
    ///
    /// # Errors
    /// [`PassError::NoData`] without samples; what reading the first one says.
    pub(crate) fn new(
        graph: &'a Graph,
        plan: &Plan,
        cx: &'a PassContext<'a>,
        stage_of: BTreeMap<NodeId, usize>,
        spans: &[Span],
    ) -> Result<Self, PassError> {
        let dataset = cx.dataset.filter(|d| !d.is_empty()).ok_or(PassError::NoData)?;
        let mut last_reader = BTreeMap::new();
        for (id, node) in graph.nodes() {
            for value in crate::ir::walk::reads(node) {
                let last = last_reader.entry(value).or_insert(0);
                *last = stage_of[&id].max(*last);
            }
        }
        for span in spans {
            for value in &span.reads {
                let last = last_reader.entry(*value).or_insert(0);
                *last = span.last.max(*last);
            }
        }
        let touched = touched(graph, plan);
        let mut walk = Self {
            graph,
            cx,
            dataset,
            stage_of,
            last_reader,
            spares: false,
            spans: spans.iter().map(|span| (span.first, span.last)).collect(),
            read_by_spans: spans.iter().flat_map(|span| span.reads.iter().copied()).collect(),
            touched,
            kept: (0..dataset.len()).map(|_| Mutex::new(None)).collect(),
            n_kept: 0,
            largest: 1,
            stages: Vec::new(),
            ready: true,
            ran: 0,
        };
        walk.largest = walk.largest_pair(&dataset.sample(0)?).max(1);
        Ok(walk.beside(0).holding(0))
    }

    /// The same where so many `bytes` of what waiting samples may take are needed for something else.
    #[must_use]
    pub(crate) fn beside(mut self, bytes: u64) -> Self {
        let n_kept = self.cx.pair_budget.saturating_sub(bytes) / self.largest;
        self.n_kept = usize::try_from(n_kept).unwrap_or(usize::MAX).min(self.dataset.len());
        self
    }

    /// The same where so many `bytes` of what is kept of all weights are taken: stages that ran, in both versions, stay ready where what is
    /// left holds them.
    #[must_use]
    pub(crate) fn holding(mut self, bytes: u64) -> Self {
        let sessions = (self.graph.constant_bytes() as u64).saturating_mul(READY);
        self.ready = sessions <= self.cx.state_budget.saturating_sub(bytes);
        self
    }

    /// The same with samples that judge what is learned left out of what is fitted, where `spares`.
    #[must_use]
    pub(crate) fn sparing(self, spares: bool) -> Self {
        Self { spares, ..self }
    }

    /// Whether sample `index` is a judge that is spared.
    pub(crate) fn is_spared(&self, index: usize) -> bool {
        self.spares && judges::is_judge(self.dataset.origin(index))
    }

    /// The most bytes that the samples which are kept take between stages.
    pub(crate) fn held(&self) -> u64 {
        self.largest.saturating_mul(self.n_kept as u64)
    }

    /// The stage that node `id` begins or is in.
    pub(crate) fn stage_of(&self, id: NodeId) -> usize {
        self.stage_of.get(&id).copied().unwrap_or(0)
    }

    /// The bytes that stages which stay ready hold of weights.
    pub(crate) fn sessions(&self) -> u64 {
        let all = (self.graph.constant_bytes() as u64).saturating_mul(READY);
        if self.ready && self.n_kept < self.kept.len() { all } else { 0 }
    }

    /// Whether `value` is another one as planned than in the float model.
    pub(crate) fn touches(&self, value: ValueId) -> bool {
        self.touched.contains(&value)
    }

    /// The most bytes that the tensors of a sample like `sample` take between stages, both versions together.
    fn largest_pair(&self, sample: &[Tensor]) -> u64 {
        let mut bytes = sizes::of(self.graph, sample);
        bytes.extend(&self.cx.sizes);
        let all: Vec<ValueId> = self.last_reader.keys().copied().collect();
        sizes::by_likeness(self.graph, &all, &mut bytes);
        let n_stages = self.stage_of.values().max().map_or(0, |last| last + 1);
        let mut changes = vec![0_i128; n_stages + 1];
        for (&value, &last) in &self.last_reader {
            let Some((producer, _)) = self.graph.producer(value) else { continue };
            let versions = if self.touched.contains(&value) { 2 } else { 1 };
            let size = i128::from(bytes.get(&value).copied().unwrap_or(0)) * versions;
            let first = self.stage_of(producer);
            // What a span reads is kept to its end.
            let spans = self.spans.iter().filter(|span| span.0 <= last && last <= span.1 && first < span.0);
            let last = spans.map(|span| span.1).max().unwrap_or(last);
            if last > first {
                changes[first] += size;
                changes[last] -= size;
            }
        }
        let mut alive = 0;
        let most = changes.iter().map(|change| {
            alive += change;
            alive
        });
        u64::try_from(most.max().unwrap_or(0)).unwrap_or(u64::MAX)
    }

    /// Runs the next stage as `plan` says now.
    ///
    /// # Errors
    /// [`PassError`] when a part does not run, a sample cannot be read, or the user interrupts.
    pub(crate) fn advance(&mut self, plan: &Plan) -> Result<(), PassError> {
        self.run_stage(self.ran, plan)?;
        self.ran += 1;
        Ok(())
    }

    /// Runs the stages from `first`, which begins a span, to the last one that was run again, as `plan` says now.
    ///
    /// # Errors
    /// [`PassError`], as for [`Self::advance`].
    pub(crate) fn again(&mut self, first: usize, plan: &Plan) -> Result<(), PassError> {
        self.stages.truncate(first);
        (first..self.ran).try_for_each(|number| self.run_stage(number, plan))
    }

    fn run_stage(&mut self, number: usize, plan: &Plan) -> Result<(), PassError> {
        let stage = self.prepare(number, plan)?;
        let first = number == 0;
        parallel::workers(
            self.cx.threads,
            self.n_kept,
            || (),
            |(), index| {
                self.interrupted()?;
                let mut slot = self.kept[index].lock().unwrap_or_else(PoisonError::into_inner);
                let mut pair = if first { self.start(index)? } else { slot.take().ok_or_else(lost)? };
                // What was rounded to measure by may be computed anew now.
                pair.planned.retain(|(_, site), _| site.is_none());
                run(&stage, &mut pair)?;
                self.forget(number, &mut pair);
                *slot = Some(pair);
                Ok::<(), PassError>(())
            },
        )?;
        if self.n_kept < self.kept.len() {
            self.stages.push(if self.ready { Ran::Ready(Box::new(stage)) } else { Ran::By(Box::new(plan.to_run())) });
        }
        Ok(())
    }

    /// The bytes that sums over samples may take.
    pub(crate) fn sums_budget(&self) -> u64 {
        self.cx.tap_budget
    }

    /// Shows both versions of every sample to `see`, in any order, with a state of the worker.
    ///
    /// # Errors
    /// [`PassError`], as [`Self::advance`] and from `see`.
    pub(crate) fn each<S: Send>(
        &self,
        start: impl Fn() -> S + Sync,
        see: impl Fn(&mut S, &mut Pair) -> Result<(), PassError> + Sync,
    ) -> Result<Vec<S>, PassError> {
        self.each_on(self.cx.threads, start, see)
    }

    /// The same on at most so many `workers`, and on one at least.
    ///
    /// # Errors
    /// [`PassError`], as [`Self::advance`] and from `see`.
    pub(crate) fn each_on<S: Send>(
        &self,
        workers: usize,
        start: impl Fn() -> S + Sync,
        see: impl Fn(&mut S, &mut Pair) -> Result<(), PassError> + Sync,
    ) -> Result<Vec<S>, PassError> {
        self.each_where(workers, |_| true, start, see)
    }

    /// As [`Self::each_on`], without the samples that are [spared](Self::sparing).
    ///
    /// # Errors
    /// [`PassError`], as [`Self::advance`] and from `see`.
    pub(crate) fn each_fitted<S: Send>(
        &self,
        workers: usize,
        start: impl Fn() -> S + Sync,
        see: impl Fn(&mut S, &mut Pair) -> Result<(), PassError> + Sync,
    ) -> Result<Vec<S>, PassError> {
        self.each_where(workers, |index| !self.is_spared(index), start, see)
    }

    /// As [`Self::each_on`], of the samples with the numbers that are `wanted`.
    ///
    /// # Errors
    /// [`PassError`], as [`Self::advance`] and from `see`.
    pub(crate) fn each_where<S: Send>(
        &self,
        workers: usize,
        wanted: impl Fn(usize) -> bool + Sync,
        start: impl Fn() -> S + Sync,
        see: impl Fn(&mut S, &mut Pair) -> Result<(), PassError> + Sync,
    ) -> Result<Vec<S>, PassError> {
        // Stages that are made ready anew are so one at a time.
        let most = if self.ready || self.n_kept == self.kept.len() { self.cx.threads.max(1) } else { 1 };
        parallel::workers(workers.clamp(1, most), self.kept.len(), start, |state, index| {
            self.interrupted()?;
            if !wanted(index) {
                return Ok(());
            }
            if index < self.n_kept {
                let mut slot = self.kept[index].lock().unwrap_or_else(PoisonError::into_inner);
                return see(state, slot.as_mut().ok_or_else(lost)?);
            }
            see(state, &mut self.run_from_the_start(index)?)
        })
    }

    /// Sample `index`, run from its inputs through all stages that ran.
    fn run_from_the_start(&self, index: usize) -> Result<Pair, PassError> {
        let mut pair = self.start(index)?;
        for (at, stage) in self.stages.iter().enumerate() {
            match stage {
                Ran::Ready(stage) => run(stage, &mut pair)?,
                Ran::By(plan) => run(&self.prepare(at, plan)?, &mut pair)?,
            }
            self.forget(at, &mut pair);
        }
        Ok(pair)
    }

    fn interrupted(&self) -> Result<(), PassError> {
        if self.cx.progress.cancelled() { Err(PassError::Interrupted) } else { Ok(()) }
    }

    fn half(&self, index: usize, feeds: &[Tensor]) -> Result<usize, PassError> {
        let origin = self.dataset.origin(index);
        let hash = if origin == index { key(feeds) } else { key(&self.dataset.sample(origin)?) };
        Ok(usize::from(hash % 2 == 1))
    }

    fn start(&self, index: usize) -> Result<Pair, PassError> {
        let feeds = self.dataset.sample(index)?;
        let mask = Mask::of(self.graph, &feeds);
        let inputs = self.graph.inputs().iter().zip(&feeds);
        let known: Known = inputs.map(|(&value, tensor)| ((value, None), tensor.clone())).collect();
        let (half, origin) = (self.half(index, &feeds)?, self.dataset.origin(index));
        Ok(Pair { index, half, origin, float: known.clone(), planned: known, mask })
    }

    /// Lets go of what nobody reads after `stage`, or when its span is run again, and of rounded versions.
    fn forget(&self, stage: usize, pair: &mut Pair) {
        let next = stage + 1;
        let spans = || self.spans.iter().filter(|(first, last)| (*first..=*last).contains(&next));
        let made_before = |value: ValueId, first: usize| {
            self.graph.producer(value).is_none_or(|(producer, _)| self.stage_of(producer) < first)
        };
        let needed = |(value, site): &Version| {
            let last = self.last_reader.get(value).copied().filter(|_| site.is_none());
            last.is_some_and(|last| {
                last > stage || spans().any(|&(first, _)| last >= first && made_before(*value, first))
            })
        };
        pair.float.retain(|version, _| needed(version));
        pair.planned.retain(|version, _| needed(version));
    }

    fn prepare(&self, stage: usize, plan: &Plan) -> Result<Stage, PassError> {
        let graph = self.graph;
        let nothing = Plan::default();
        let (float, planned) = (Cutter { graph, plan: &nothing }, Cutter { graph, plan });
        let depths = planned.depths();
        let nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).filter(|&id| self.stage_of(id) == stage).collect();
        let changed = |id: &NodeId| {
            graph.node(*id).is_some_and(|node| node.outputs.iter().flatten().any(|v| self.touched.contains(v)))
        };
        let place = |id: NodeId| (self.stage_of(id), changed(&id), depths.get(&id).copied().unwrap_or(0));
        let all: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
        let mut exported = simulate::exported(&planned, &all, place);
        exported.extend(&self.read_by_spans);
        let mut by_depth: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
        for &id in nodes.iter().filter(|id| changed(id)) {
            by_depth.entry(depths[&id]).or_default().push(id);
        }
        let outputs = nodes.iter().filter_map(|id| graph.node(*id)).flat_map(|node| node.outputs.iter().flatten());
        let shared = outputs.copied().filter(|value| !self.touched.contains(value)).collect();
        let cut = |cutter: &Cutter<'_>, nodes: &[NodeId]| simulate::cut(cutter, nodes, &exported, self.cx.executor);
        Ok(Stage {
            float: cut(&float, &nodes)?,
            planned: by_depth.values().map(|nodes| cut(&planned, nodes)).collect::<Result<_, _>>()?,
            shared,
            crossing: Crossing::of(graph, plan),
        })
    }
}

/// Runs one stage on one sample.
fn run(stage: &Stage, pair: &mut Pair) -> Result<(), PassError> {
    let computed = stage.float.run(&mut pair.float, &stage.crossing)?;
    for &value in computed.iter().filter(|value| stage.shared.contains(value)) {
        pair.planned.insert((value, None), pair.float[&(value, None)].clone());
    }
    for part in &stage.planned {
        part.run(&mut pair.planned, &stage.crossing)?;
    }
    Ok(())
}

fn lost() -> PassError {
    PassError::Model("a bug in onnx-quant: a sample was lost between two stages".into())
}

/// For every node the stage that it is run in: how many of `stops` lie on the longest way to it, itself included. What no sample changes is computed where
/// it is first read: it would be kept once per sample otherwise.
pub(crate) fn stages(graph: &Graph, stops: &BTreeSet<NodeId>) -> BTreeMap<NodeId, usize> {
    let mut stages: BTreeMap<NodeId, usize> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let before = crate::ir::walk::reads(node).filter_map(|value| Some(stages[&graph.producer(value)?.0]));
        let stage = before.max().unwrap_or(0) + usize::from(stops.contains(&id));
        stages.insert(id, stage);
    }
    let mut first_reader: BTreeMap<ValueId, usize> = BTreeMap::new();
    let fed = fed_by_samples(graph);
    for (id, node) in graph.nodes().rev() {
        if !fed.contains(&id) {
            let readers = node.outputs.iter().flatten().filter_map(|value| first_reader.get(value).copied());
            if let Some(first) = readers.min() {
                stages.insert(id, first);
            }
        }
        // What a stop reads has to be there when its stage begins.
        let at = stages[&id] - usize::from(stops.contains(&id));
        for value in crate::ir::walk::reads(node) {
            let first = first_reader.entry(value).or_insert(usize::MAX);
            *first = at.min(*first);
        }
    }
    stages
}

/// The nodes whose results depend on a graph input.
fn fed_by_samples(graph: &Graph) -> BTreeSet<NodeId> {
    let mut fed = BTreeSet::new();
    let mut values: BTreeSet<ValueId> = graph.inputs().iter().copied().collect();
    for (id, node) in graph.nodes() {
        if crate::ir::walk::reads(node).any(|value| values.contains(&value)) {
            fed.insert(id);
            values.extend(node.outputs.iter().flatten());
        }
    }
    fed
}

/// Every value that is another one under `plan` than in the float model.
pub(crate) fn touched(graph: &Graph, plan: &Plan) -> BTreeSet<ValueId> {
    let cutter = Cutter { graph, plan };
    let mut touched: BTreeSet<ValueId> = BTreeSet::new();
    for (id, node) in graph.nodes() {
        if cutter.reads(id, node).iter().any(|(value, site)| site.is_some() || touched.contains(value)) {
            touched.extend(node.outputs.iter().flatten());
        }
    }
    touched
}

/// What tells a sample from others, whatever its number: a hash of its tensors.
pub(crate) fn key(feeds: &[Tensor]) -> u64 {
    feeds.iter().fold(0, |hash, tensor| seed::mixed(hash ^ u64::from(tensor.digest())))
}
