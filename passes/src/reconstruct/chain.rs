//! All blocks of a graph, one behind the other: the whole model forward and backward.
//!
//! Only what lies between two blocks is kept while a batch goes forward; on the way back every block is run once more, so that memory holds
//! the tape of one block at a time, whatever the depth of the model. What the float model returns is computed anew from what its last
//! block reads where it is too large to be kept for all samples.
//!
//! Source: Chen et al. 2016, arXiv:1604.06174, section 4, with segments that are the blocks.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::block::{Also, Program};
use super::blocks::{self, Block};
use super::given::{Given, Giver};
use super::measure::{Measure, Wish};
use super::objective::{DISAGREEMENT, LANES, shares};
use super::run::{Gradients, Leaves, add};
use super::samples::Sample;
use super::teacher::Teacher;
use crate::grad::{Array, GradError, Slot, Value, Values};
use crate::id::{Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::Users;
use crate::judges;
use crate::lockstep;
use crate::model::Plan;
use crate::parallel;
use crate::pass::{PassContext, PassError};
use crate::seed;

/// One block of the chain.
pub(super) struct Link {
    pub(super) block: Block,
    pub(super) program: Program,
    /// What it reads of blocks before it.
    carried: Vec<(Slot, ValueId)>,
}

/// What blocks hand on for one sample, and the gradients that come back.
#[derive(Default)]
struct Carried {
    values: BTreeMap<ValueId, Array<f32>>,
    grads: BTreeMap<ValueId, Array<f32>>,
}

/// What goes back from what the graph returns.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pull {
    /// Gradients of its errors.
    Errors,
    /// Gradients [drawn](Measure::drawn) from this seed. [`Chain::sweep`] adds up this of them, sample by sample, of at most [`LANES`] at
    /// once.
    Drawn(u64, Moment),
}

/// What is added up of gradients, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Their squares.
    Square,
    /// Their sizes, signs left out.
    Size,
}

impl Moment {
    /// What is added up of the gradient `g`.
    pub(super) fn of(self, g: f32) -> f32 {
        match self {
            Self::Square => g * g,
            Self::Size => g.abs(),
        }
    }
}

/// All activations in float, in thousandths.
pub(super) const FLOAT: (i64, u64) = (1000, 0);

/// What is done with a link, a sample, the values of its tape, and what arrives.
pub(super) type See<'a, T = ()> = &'a (dyn Fn(&Link, usize, &Values<f32>, Arrived) -> T + Sync);

/// What arrives somewhere on the way back; `None` where nothing does.
pub(super) type Arrived = Vec<Option<Array<f32>>>;

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
}

impl Chain {
    /// The chain of `graph` under `plan` with at most so many `samples`, or why gradients do not pass it.
    pub(super) fn of(
        graph: &Graph,
        plan: &Plan,
        cx: &PassContext<'_>,
        (layers, samples): (usize, usize),
        also: Also,
        wish: Wish,
    ) -> Result<Result<Self, String>, PassError> {
        match Self::linked(graph, plan, cx, layers, also)? {
            Ok(chain) => chain.with_samples(graph, cx, (samples, cx.pair_budget), wish),
            Err(reason) => Ok(Err(reason)),
        }
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
            blocks::blocks(graph, plan, layers).into_iter().map(program).collect();
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
        }))
    }

    /// With all samples, or `most` of them, or as many, spread over all, as `room` bytes hold; or why gradients do not pass the chain.
    pub(super) fn with_samples(
        mut self,
        graph: &Graph,
        cx: &PassContext<'_>,
        (most, room): (usize, u64),
        wish: Wish,
    ) -> Result<Result<Self, String>, PassError> {
        self.take_samples(graph, cx, (most, room), wish)?;
        let agrees = self.agrees().map_err(|error| error.to_string());
        Ok(agrees.map(|()| self))
    }

    /// Reads the samples, and what the float model says of them where `room` holds it for all.
    fn take_samples(
        &mut self,
        graph: &Graph,
        cx: &PassContext<'_>,
        (most, room): (usize, u64),
        wish: Wish,
    ) -> Result<(), PassError> {
        let dataset = cx.dataset.filter(|data| !data.is_empty()).ok_or(PassError::NoData)?;
        let feeds = self.links.iter().flat_map(|link| &link.program.feeds).map(|(_, v)| *v);
        let fixed: BTreeSet<ValueId> = feeds.filter(|v| !self.carried.contains_key(v)).collect();
        let giver = Giver::new(graph, cx, fixed, &self.teacher.reads)?;
        let first = giver.sample(0)?;
        let targets = self.teacher.says(&first.reads, first.mask.as_ref())?;
        let own = giver.bytes(&first);
        let of_targets: u64 = targets.targets.iter().map(|target| 4 * target.len() as u64).sum();
        let most = most.clamp(1, dataset.len());
        let keeps = most as u64 * (own + of_targets) <= room;
        let room = usize::try_from(room / own.max(1)).unwrap_or(usize::MAX).clamp(1, most);
        let all: Vec<usize> = (0..dataset.len()).map(|index| dataset.origin(index)).collect();
        let indices = judges::chosen(&all, room);
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
        tracing::debug!(samples = room, kept_targets = keeps, own, of_targets, "chain");
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
        self.measure(graph, wish, &targets);
        Ok(())
    }

    /// Measures errors by what the float model `says` of a sample.
    fn measure(&mut self, graph: &Graph, wish: Wish, says: &Sample) {
        let seen = std::slice::from_ref(says);
        let of = self.teacher.returned.iter().enumerate();
        self.measures = of.map(|(at, value)| Measure::of(wish, seen, at, wish.is_of_logits(graph, *value))).collect();
        self.shares = shares(&self.measures, seen);
    }

    /// The same chain, in which all that is drawn or measured is so by what samples are, whatever their order; and all samples in an order of
    /// that kind. Only for what is [drawn](Pull::Drawn) at what the float model says: the teacher is dismissed.
    pub(super) fn in_any_order(mut self, graph: &Graph, wish: Wish) -> Result<(Self, Vec<usize>), GradError> {
        let mut order: Vec<usize> = (0..self.given.len()).collect();
        order.sort_by_key(|at| self.given[*at].key);
        if let Some(first) = order.first() {
            let says = self.targets(*first)?.into_owned();
            self.measure(graph, wish, &says);
        }
        self.is_keyed = true;
        self.teacher.dismiss();
        self.given.iter_mut().for_each(|given| given.reads.clear());
        Ok((self, order))
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

    /// What draws for sample `i` at `place` begin at.
    fn draw(&self, i: usize, place: usize) -> u64 {
        if self.is_keyed {
            seed::mixed(self.given[i].key ^ place as u64)
        } else {
            (i * self.measures.len() + place) as u64
        }
    }

    /// What the float model returns for sample `i` at `place`, where `got` is that already: it need not be computed again.
    fn said(&self, i: usize, place: usize, got: Option<&Array<f32>>) -> Sample {
        let mask = self.given[i].mask.as_ref();
        let words = got.and_then(|got| mask?.words(got.shape()).map(<[bool]>::to_vec));
        let mut said = Sample { feeds: Vec::new(), targets: Vec::new(), words: Vec::new(), weights: Vec::new() };
        said.targets.resize_with(place + 1, || got.cloned().unwrap_or_default());
        said.words.resize(place + 1, words);
        said
    }

    /// Runs link `link` on sample `i`.
    fn run(
        &self,
        link: &Link,
        leaves: &Leaves,
        i: usize,
        carried: &Carried,
        drop: (i64, u64),
    ) -> Result<Values<f32>, GradError> {
        let missing = || GradError("a bug in onnx-quant: a block reads what is not there".into());
        let feed = |(_, value): &(Slot, ValueId)| match carried.values.get(value) {
            Some(array) => Ok(Value::Real(array.clone())),
            None => self.given[i].values.get(value).cloned().ok_or_else(missing),
        };
        let feeds = link.program.feeds.iter().map(feed).collect::<Result<Vec<_>, _>>()?;
        link.program.run(leaves, &feeds, drop)
    }

    /// Keeps what `link` hands on.
    fn hand_on(&self, link: &Link, values: &Values<f32>, state: &mut Carried) {
        let outputs = link.program.outputs.iter().filter(|(_, value)| self.carried.contains_key(value));
        state.values.extend(outputs.filter_map(|(slot, value)| Some((*value, values.real(*slot)?.clone()))));
    }

    /// What the graph returns out of `link`, with its place among all that it returns.
    fn returned<'a>(&'a self, link: &'a Link) -> impl Iterator<Item = (Slot, usize)> + 'a {
        link.program
            .outputs
            .iter()
            .filter_map(|(slot, value)| Some((*slot, self.teacher.returned.iter().position(|other| other == value)?)))
    }

    /// The mean error of what the graph returns for `samples`, with the leaves of every link.
    fn error_on(
        &self,
        samples: &[usize],
        drop: i64,
        measures: &[Measure],
        leaves: &mut dyn FnMut(usize) -> Result<Leaves, GradError>,
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
                    Ok((place, measures[place].error(&*self.targets(*i)?, place, values.real(slot))?))
                };
                self.returned(link).map(error).collect()
            };
            let errors: Vec<Result<Errors, GradError>> = states.par_iter_mut().zip(samples).map(run).collect();
            for errors in errors {
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
        self.error_on(&self.held_out, 0, &self.measures, leaves)
    }

    /// Whether the tapes of all blocks give what the float model gives, with float weights and nothing rounded.
    fn agrees(&self) -> Result<(), GradError> {
        let targets = self.targets(0)?;
        let seen = std::slice::from_ref(&*targets);
        let all = 0..self.teacher.returned.len();
        let squares: Vec<Measure> = all.map(|at| Measure::of(Wish::Square, seen, at, false)).collect();
        let error = self.error_on(&[0], 1000, &squares, &mut |at| Ok(self.links[at].program.float_leaves()))?;
        if error < DISAGREEMENT {
            Ok(())
        } else {
            Err(GradError(format!("the tapes are {error:.1e} off the float model")))
        }
    }

    /// Takes `batch` forward and back, by gradients of the errors or those that are drawn; `leaves` is told whether a link is on its way
    /// back, and `see` gets the gradients of one link after the other, from the last to the first.
    pub(super) fn sweep(
        &self,
        batch: &[usize],
        drop: (i64, u64),
        pull: Pull,
        leaves: &mut dyn FnMut(usize, bool) -> Result<Leaves, GradError>,
        see: &mut dyn FnMut(usize, Gradients) -> Result<(), GradError>,
    ) -> Result<(), GradError> {
        debug_assert!(
            matches!(pull, Pull::Errors) || batch.len() <= LANES,
            "a lane of several samples would square their sum"
        );
        debug_assert!(
            matches!(pull, Pull::Errors) || drop == FLOAT,
            "what is drawn is drawn at what the float model says"
        );
        let mut states = self.forward(batch, drop, &mut |at| leaves(at, false))?;
        for (at, link) in self.links.iter().enumerate().rev() {
            let leaves = leaves(at, true)?;
            let lane = batch.len().div_ceil(LANES).max(1);
            let back = |(states, samples): (&mut [Carried], &[usize])| {
                let mut sums: Vec<Vec<f32>> = vec![Vec::new(); link.program.learned().len()];
                for (state, i) in states.iter_mut().zip(samples) {
                    let values = self.run(link, &leaves, *i, state, seeded(drop, at, *i))?;
                    let grads = self.back((link, pull), &values, *i, state, &link.program.learned())?;
                    for (sum, grad) in sums.iter_mut().zip(grads) {
                        if let Some(grad) = grad {
                            add(sum, grad.iter().copied());
                        }
                    }
                }
                Ok::<_, GradError>(sums)
            };
            let lanes: Vec<Result<Vec<Vec<f32>>, GradError>> =
                states.par_chunks_mut(lane).zip(batch.par_chunks(lane)).map(back).collect();
            let mut total: Vec<Vec<f32>> = vec![Vec::new(); link.program.learned().len()];
            for lane in lanes {
                let sums = total.iter_mut().zip(lane?).filter(|(_, sum)| !sum.is_empty());
                match pull {
                    Pull::Errors => sums.for_each(|(total, sum)| add(total, sum.into_iter())),
                    Pull::Drawn(_, moment) => {
                        sums.for_each(|(total, sum)| add(total, sum.into_iter().map(|g| moment.of(g))));
                    }
                }
            }
            see(at, link.program.gradients(total))?;
        }
        Ok(())
    }

    /// What the last link reads for `batch`, everything before it having run; `leaves` are those of every link.
    fn forward(
        &self,
        batch: &[usize],
        drop: (i64, u64),
        leaves: &mut dyn FnMut(usize) -> Result<Leaves, GradError>,
    ) -> Result<Vec<Carried>, GradError> {
        let mut states: Vec<Carried> = batch.iter().map(|_| Carried::default()).collect();
        let (_, before) =
            self.links.split_last().ok_or_else(|| GradError("a bug in onnx-quant: a chain without links".into()))?;
        for (at, link) in before.iter().enumerate() {
            let leaves = leaves(at)?;
            let run = |(state, i): (&mut Carried, &usize)| {
                self.hand_on(link, &self.run(link, &leaves, *i, state, seeded(drop, at, *i))?, state);
                Ok(())
            };
            states.par_iter_mut().zip(batch).map(run).collect::<Result<(), GradError>>()?;
        }
        Ok(states)
    }

    /// Takes gradients [drawn](Measure::drawn) from the seed `drawn` back through the float model for every sample of `batch`; `see` gets,
    /// link after link, what the tape of a sample holds, and what arrives in those slots that `wanted` says, in their order.
    pub(super) fn trace(
        &self,
        batch: &[usize],
        drawn: u64,
        wanted: &(dyn Fn(&Link) -> Vec<Slot> + Sync),
        see: See<'_>,
    ) -> Result<(), GradError> {
        self.arrivals(batch, drawn, wanted, see, &mut |_, _| ())
    }

    /// The same, where `see` leaves something of every sample; `done` gets that for all samples of `batch`, in their order.
    pub(super) fn arrivals<T: Send>(
        &self,
        batch: &[usize],
        drawn: u64,
        wanted: &(dyn Fn(&Link) -> Vec<Slot> + Sync),
        see: See<'_, T>,
        done: &mut dyn FnMut(&Link, Vec<T>),
    ) -> Result<(), GradError> {
        let mut states = self.forward(batch, FLOAT, &mut |at| Ok(self.links[at].program.float_leaves()))?;
        for link in self.links.iter().rev() {
            let (leaves, wanted) = (link.program.float_leaves(), wanted(link));
            let back = |(state, i): (&mut Carried, &usize)| {
                let values = self.run(link, &leaves, *i, state, FLOAT)?;
                let grads = self.back((link, Pull::Drawn(drawn, Moment::Square)), &values, *i, state, &wanted)?;
                Ok(see(link, *i, &values, grads))
            };
            let left = states.par_iter_mut().zip(batch).map(back).collect::<Result<Vec<T>, GradError>>()?;
            done(link, left);
        }
        Ok(())
    }

    /// Takes the gradients of sample `i` back through `link`, whose tape holds `values`; returns those of `wanted`.
    fn back(
        &self,
        (link, pull): (&Link, Pull),
        values: &Values<f32>,
        i: usize,
        state: &mut Carried,
        wanted: &[Slot],
    ) -> Result<Arrived, GradError> {
        let mut seeds: Vec<(Slot, Array<f32>)> = Vec::new();
        for (slot, value) in &link.program.outputs {
            seeds.extend(state.grads.remove(value).map(|grad| (*slot, grad)));
        }
        for (slot, place) in self.returned(link) {
            let (measure, got) = (self.measures[place], values.real(slot));
            let grad = match pull {
                Pull::Drawn(seed, _) => {
                    let said = self.said(i, place, got);
                    measure.drawn(&said, place, got, seed::mixed(seed ^ self.draw(i, place)))?
                }
                Pull::Errors => {
                    let mut grad = measure.gradient(&*self.targets(i)?, place, got)?;
                    if self.shares.len() > 1 {
                        grad *= self.shares[place];
                    }
                    grad
                }
            };
            seeds.push((slot, grad));
        }
        let mut wanted = wanted.to_vec();
        let own = wanted.len();
        wanted.extend(link.carried.iter().map(|(slot, _)| *slot));
        let mut grads = link.program.tape.backward(values, seeds, &wanted)?;
        let through = grads.split_off(own);
        for ((_, value), grad) in link.carried.iter().zip(through) {
            let Some(grad) = grad else { continue };
            match state.grads.get_mut(value) {
                Some(sum) => *sum += &grad,
                None => {
                    state.grads.insert(*value, grad);
                }
            }
        }
        Ok(grads)
    }
}

/// What is drawn for sample `i` at link `at`.
fn seeded(drop: (i64, u64), at: usize, i: usize) -> (i64, u64) {
    (drop.0, seed::mixed(drop.1 ^ at as u64) ^ i as u64)
}
