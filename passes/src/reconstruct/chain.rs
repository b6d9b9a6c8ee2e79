//! All blocks of a graph, one behind the other: the whole model forward and backward.
//!
//! Only what lies between two blocks is kept while a batch goes forward; on the way back every block is run once more, so that memory holds
//! the tape of one block at a time, whatever the depth of the model. What the float model returns is computed anew from what its last
//! block reads where it is too large to be kept for all samples.
//!
//! Source: Chen et al. 2016, arXiv:1604.06174, section 4, with segments that are the blocks.

mod back;
mod bounds;

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::block::{Also, Program};
use super::blocks::{self, Block};
use super::given::{Given, Giver};
use super::measure::{Kind, Measure, Wish};
use super::objective::{DISAGREEMENT, shares};
use super::run::Leaves;
use super::samples::Sample;
use super::teacher::Teacher;
use crate::exec::Dataset;
use crate::grad::{GradError, Slot};
use crate::id::{Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::Users;
use crate::judges;
use crate::lockstep;
use crate::model::{Model, Plan};
use crate::parallel;
use crate::pass::{PassContext, PassError};
use crate::returned::returned;
use crate::rounding;

use back::Carried;
pub(crate) use back::Moment;
pub(super) use back::{Arrived, FLOAT, Pull};
pub(super) use bounds::Budget;

/// One block of the chain.
pub(super) struct Link {
    pub(super) block: Block,
    pub(super) program: Program,
    /// What it reads of blocks before it.
    carried: Vec<(Slot, ValueId)>,
}

/// What the float model says of a sample.
type Targets<'a> = &'a (dyn Fn(usize) -> Result<Cow<'a, Sample>, GradError> + Sync);

/// Errors of outputs, by their places: sums, and how many there are.
type Errors = Vec<(usize, (f64, usize))>;

/// A model as a chain of blocks, with its samples.
pub(super) struct Chain {
    pub(super) links: Vec<Link>,
    teacher: Teacher,
    given: Vec<Given>,
    /// Which samples of the dataset these are.
    pub(super) numbers: Vec<usize>,
    /// What blocks read of blocks before them, with the last link that does.
    carried: BTreeMap<ValueId, usize>,
    /// How errors of what the graph returns are measured, output by output.
    measures: Vec<Measure>,
    /// Of every output, one over how many errors a sample has: each counts as much as any other.
    shares: Vec<f32>,
    /// The samples to learn from.
    pub(super) fitted: Vec<usize>,
    held_out: Vec<usize>,
    /// Whether draws go by what samples are, not by their numbers.
    is_keyed: bool,
    /// The bytes of samples that gradients are drawn at.
    waiting: u64,
}

impl Chain {
    /// The chain of `graph` under `plan` with at most so many `samples` to [draw](Pull::Drawn) at, or why gradients do not pass it.
    pub(super) fn for_draws(
        graph: &Graph,
        plan: &Plan,
        cx: &PassContext<'_>,
        (layers, samples): (usize, usize),
        also: Also,
        wish: Wish,
    ) -> Result<Result<Self, String>, PassError> {
        match Self::linked(graph, plan, cx, layers, also)? {
            Ok(chain) => chain.drawing(graph, cx, samples, wish),
            Err(reason) => Ok(Err(reason)),
        }
    }

    /// The same of `model` with its weights rounded to nearest, for draws at all samples: what rounds is what gradients are asked about.
    pub(super) fn of_nearest(
        model: &Model,
        cx: &PassContext<'_>,
        layers: usize,
    ) -> Result<Result<Self, String>, PassError> {
        let also = Also { steps: false, norms: false, inputs: true, rest: 0 };
        let rounded = rounding::in_nearest(model)?;
        let samples = cx.dataset.map_or(0, Dataset::len);
        Self::for_draws(model.graph(), rounded.plan(), cx, (layers, samples), also, Wish::Fitting)
    }

    /// The same before there are samples.
    pub(super) fn linked(
        graph: &Graph,
        plan: &Plan,
        cx: &PassContext<'_>,
        layers: usize,
        also: Also,
    ) -> Result<Result<Self, String>, PassError> {
        // What several nodes read is one tensor, and stays so.
        let users = Users::of(graph);
        let constant = |node, input: u16| graph.node(node)?.input(input.into());
        let is_shared = |site: &Site| match site {
            Site::Use { node, input } => constant(*node, *input).is_none_or(|value| users.only_input(value).is_none()),
            Site::Value(_) => true,
        };
        let kept = plan.only(is_shared);
        let also = Also { inputs: true, ..also };
        let program = |block: Block| Ok((Program::of(graph, plan, &kept, &block, also)?, block));
        let made: Result<Vec<(Program, Block)>, String> =
            blocks::blocks(graph, plan, layers, None).into_iter().map(program).collect();
        let made = match made {
            Ok(made) => made,
            Err(reason) => return Ok(Err(reason)),
        };
        let touched = lockstep::touched(graph, plan);
        let link = |(program, block): (Program, Block)| {
            let reads = program.feeds.iter().copied();
            let carried = reads.filter(|(_, v)| touched.contains(v) && !program.inner.contains(v)).collect();
            Link { block, program, carried }
        };
        let links: Vec<Link> = made.into_iter().map(link).collect();
        let returned: Vec<ValueId> = links
            .iter()
            .flat_map(|link| &link.program.outputs)
            .map(|(_, v)| *v)
            .filter(|v| graph.outputs().contains(v))
            .collect();
        if returned.is_empty() {
            return Ok(Err("nothing that rounding changes is returned as numbers".into()));
        }
        let reads = links.iter().enumerate().flat_map(|(at, link)| link.carried.iter().map(move |(_, v)| (*v, at)));
        let carried = reads.collect(); // the last one of each counts
        let last = links.last().map(|link| &*link.block.nodes).unwrap_or_default();
        let teacher = Teacher::of(graph, cx, last, returned)?;
        Ok(Ok(Self {
            links,
            teacher,
            given: Vec::new(),
            numbers: Vec::new(),
            carried,
            measures: Vec::new(),
            shares: Vec::new(),
            fitted: Vec::new(),
            held_out: Vec::new(),
            is_keyed: false,
            waiting: 0,
        }))
    }

    /// With all samples, or as many, spread over all, as the `budget` holds beside the tapes of a few; or why gradients do not pass the chain.
    ///
    /// # Errors
    /// [`PassError`] where the model does not run, and where memory does not hold the tapes of one sample.
    pub(super) fn with_samples(
        mut self,
        graph: &Graph,
        cx: &PassContext<'_>,
        budget: Budget,
        wish: Wish,
    ) -> Result<Result<Self, String>, PassError> {
        let giver = self.giver(graph, cx, &self.teacher.reads)?;
        let mut first = giver.sample(0)?;
        let targets = self.teacher.says(&first.reads, first.mask.as_ref())?;
        let own = giver.bytes(&first);
        let of_targets: u64 = targets.targets.iter().map(|target| 4 * target.len() as u64).sum();
        first.reads.clear();
        self.given.push(first);
        let takes = match self.takes(0) {
            Ok(takes) => takes,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let all = budget.all.saturating_sub(giver.shared_bytes());
        let most = giver.samples();
        let reserved = self.reserve(&takes, &Budget { all, batch: budget.batch.min(most), ..budget });
        let room = budget.samples.min(all.saturating_sub(reserved));
        let keeps = most as u64 * (own + of_targets) <= room;
        tracing::debug!(most, kept_targets = keeps, own, of_targets, "chain");
        let fitting = usize::try_from(room / own.max(1)).unwrap_or(usize::MAX);
        self.take_samples(cx, &giver, most.min(fitting), keeps)?;
        // Others may be larger than the first.
        if self.held(&giver) > room && self.given.len() > 1 {
            let share = room as f64 / self.held(&giver) as f64;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "fewer than there are")]
            let fewer = (self.given.len() as f64 * share) as usize;
            self.take_samples(cx, &giver, fewer.max(1), keeps)?;
        }
        let longest = (0..self.given.len()).max_by_key(|at| giver.bytes(&self.given[*at])).unwrap_or(0);
        let takes = match self.takes(longest) {
            Ok(takes) => takes,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let left = all.saturating_sub(self.held(&giver));
        self.fit(&takes, left, budget.batch.min(self.fitted.len()))?;
        self.measure(graph, wish, &targets);
        let agrees = self.agrees(0, &targets).map_err(|error| error.to_string());
        Ok(agrees.map(|()| self))
    }

    /// The bytes that samples take, with what the float model says of them where that is kept.
    fn held(&self, giver: &Giver<'_>) -> u64 {
        let targets = |given: &Given| {
            given.targets.iter().flat_map(|said| &said.targets).map(|t| 4 * t.len() as u64).sum::<u64>()
        };
        self.given.iter().map(|given| giver.bytes(given) + targets(given)).sum()
    }

    /// With at most so many samples as [`Self::with_samples`], only for what is [drawn](Pull::Drawn): that is drawn at what the chain itself
    /// gives, and the float model is asked about one sample alone, whichever their order.
    fn drawing(
        mut self,
        graph: &Graph,
        cx: &PassContext<'_>,
        most: usize,
        wish: Wish,
    ) -> Result<Result<Self, String>, PassError> {
        let giver = self.giver(graph, cx, &[])?;
        let own = giver.bytes(&giver.sample(0)?);
        let fitting = usize::try_from(cx.pair_budget / own.max(1)).unwrap_or(usize::MAX);
        self.take_samples(cx, &giver, most.min(fitting), false)?;
        self.waiting = self.held(&giver);
        drop(giver);
        let judge = (0..self.given.len()).min_by_key(|at| self.given[*at].key).unwrap_or_default();
        let asked = self.giver(graph, cx, &self.teacher.reads)?.sample(self.numbers[judge])?;
        let says = self.teacher.says(&asked.reads, asked.mask.as_ref())?;
        self.teacher.dismiss();
        self.measure(graph, wish, &says);
        let agrees = self.agrees(judge, &says).map_err(|error| error.to_string());
        Ok(agrees.map(|()| self))
    }

    /// What computes what samples bring to blocks, and to a teacher that reads `reads`.
    fn giver<'a>(&self, graph: &'a Graph, cx: &PassContext<'a>, reads: &[ValueId]) -> Result<Giver<'a>, PassError> {
        let feeds = self.links.iter().flat_map(|link| &link.program.feeds).map(|(_, v)| *v);
        Giver::new(graph, cx, feeds.filter(|v| !self.carried.contains_key(v)).collect(), reads)
    }

    /// Takes at most so many samples, spread over all; with what the float model says of them where it `keeps` that.
    fn take_samples(
        &mut self,
        cx: &PassContext<'_>,
        giver: &Giver<'_>,
        most: usize,
        keeps: bool,
    ) -> Result<(), PassError> {
        let dataset = cx.dataset.filter(|data| !data.is_empty()).ok_or(PassError::NoData)?;
        let all: Vec<usize> = (0..dataset.len()).map(|index| dataset.origin(index)).collect();
        let indices = judges::chosen(&all, most.clamp(1, dataset.len()));
        let given = parallel::workers(cx.threads, indices.len(), Vec::new, |kept, at| {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            let mut given = giver.sample(indices[at])?;
            if keeps {
                given.targets = Some(self.teacher.says(&given.reads, given.mask.as_ref())?);
                given.reads.clear();
            }
            kept.push((at, given));
            Ok(())
        })?;
        let mut given: Vec<(usize, Given)> = given.into_iter().flatten().collect();
        given.sort_by_key(|(at, _)| *at);
        self.given = given.into_iter().map(|(_, given)| given).collect();
        // Variants of a sample go where it goes.
        let origins: Vec<usize> = indices.iter().map(|&index| all[index]).collect();
        (self.held_out, self.fitted) = judges::split(&origins);
        self.numbers = indices;
        if self.held_out.is_empty() {
            self.held_out.clone_from(&self.fitted);
        }
        Ok(())
    }

    /// Measures errors by what the float model `says` of a sample.
    fn measure(&mut self, graph: &Graph, wish: Wish, says: &Sample) {
        let seen = std::slice::from_ref(says);
        let of = self.teacher.returned.iter().enumerate();
        self.measures = of.map(|(at, value)| Measure::of(wish, seen, at, wish.kind(returned(graph, *value)))).collect();
        self.shares = shares(&self.measures, seen);
    }

    /// The same chain, in which all that is drawn is so by what samples are, whatever their order; and all samples in an order of that kind.
    pub(super) fn in_any_order(mut self) -> (Self, Vec<usize>) {
        let mut order: Vec<usize> = (0..self.given.len()).collect();
        order.sort_by_key(|at| self.given[*at].key);
        self.is_keyed = true;
        (self, order)
    }

    /// How many samples there are.
    pub(super) fn samples(&self) -> usize {
        self.given.len()
    }

    /// What the float model returns for sample `i`.
    fn targets(&self, i: usize) -> Result<Cow<'_, Sample>, GradError> {
        let given = &self.given[i];
        if let Some(targets) = &given.targets {
            return Ok(Cow::Borrowed(targets));
        }
        let said = self.teacher.says(&given.reads, given.mask.as_ref());
        said.map(Cow::Owned).map_err(|error| GradError(error.to_string()))
    }

    /// The mean error of what the graph returns for `samples` to their `targets`, with the leaves of every link.
    fn error_on(
        &self,
        samples: &[usize],
        drop: i64,
        measures: &[Measure],
        leaves: &mut dyn FnMut(usize) -> Result<Leaves, GradError>,
        targets: Targets<'_>,
    ) -> Result<f64, GradError> {
        let mut states: Vec<Carried> = samples.iter().map(|_| Carried::default()).collect();
        let mut sums = vec![(0.0, 0); measures.len()];
        for (at, link) in self.links.iter().enumerate() {
            let leaves = leaves(at)?;
            let run = |(state, i): (&mut Carried, &usize)| {
                let values = self.run(link, &leaves, *i, state, (drop, 0))?;
                self.hand_on(link, &values, state);
                state.values.retain(|value, _| self.carried.get(value).is_some_and(|&last| last > at));
                let error = |(slot, place): (Slot, usize)| {
                    Ok((place, measures[place].error(&*targets(*i)?, place, values.real(slot))?))
                };
                self.returned(link).map(error).collect::<Result<Errors, GradError>>()
            };
            for errors in parallel::few_of(link.program.room.forward(), states.iter_mut().zip(samples), run) {
                for (place, (error, count)) in errors? {
                    sums[place] = (sums[place].0 + error, sums[place].1 + count);
                }
            }
        }
        Ok(sums.into_iter().map(|(sum, count)| sum / count.max(1) as f64).sum())
    }

    /// The mean error of what the graph returns for the samples that were held out.
    pub(super) fn held_out_loss(
        &self,
        leaves: &mut dyn FnMut(usize) -> Result<Leaves, GradError>,
    ) -> Result<f64, GradError> {
        self.error_on(&self.held_out, 0, &self.measures, leaves, &|i| self.targets(i))
    }

    /// Whether the tapes of all blocks give what the float model `says` of sample `i`, with float weights and nothing rounded.
    fn agrees(&self, i: usize, says: &Sample) -> Result<(), GradError> {
        let seen = std::slice::from_ref(says);
        let all = 0..self.teacher.returned.len();
        let squares: Vec<Measure> = all.map(|at| Measure::of(Wish::Square, seen, at, Kind::Numbers)).collect();
        let float = |at: usize| Ok(self.links[at].program.float_leaves());
        let error = self.error_on(&[i], 1000, &squares, &mut { float }, &|_| Ok(Cow::Borrowed(says)))?;
        if error < DISAGREEMENT {
            Ok(())
        } else {
            Err(GradError(format!("the tapes are {error:.1e} off the float model")))
        }
    }
}
