//! A chain forward and back.

use std::collections::BTreeMap;

use super::super::objective::LANES;
use super::super::run::{Gradients, Leaves, add};
use super::super::samples::Sample;
use super::{Chain, Link};
use crate::grad::{Array, GradError, Slot, Value, Values};
use crate::id::ValueId;
use crate::parallel;
use crate::seed;

/// What blocks hand on for one sample, and the gradients that come back.
#[derive(Default)]
pub(super) struct Carried {
    pub(super) values: BTreeMap<ValueId, Array<f32>>,
    grads: BTreeMap<ValueId, Array<f32>>,
}

/// What goes back from what the graph returns.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Pull {
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
    pub(in super::super) fn of(self, g: f32) -> f32 {
        match self {
            Self::Square => g * g,
            Self::Size => g.abs(),
        }
    }
}

/// All activations in float, in thousandths.
pub(in super::super) const FLOAT: (i64, u64) = (1000, 0);

/// What is done with a link, a sample, the values of its tape, and what arrives.
pub(in super::super) type See<'a, T = ()> = &'a (dyn Fn(&Link, usize, &Values<f32>, Arrived) -> T + Sync);

/// What arrives somewhere on the way back; `None` where nothing does.
pub(in super::super) type Arrived = Vec<Option<Array<f32>>>;

impl Chain {
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
    pub(super) fn run(
        &self,
        link: &Link,
        leaves: &Leaves,
        i: usize,
        carried: &Carried,
        drop: (i64, u64),
    ) -> Result<Values<f32>, GradError> {
        link.program.run(leaves, &self.feeds(link, i, carried)?, drop)
    }

    /// What `link` reads of sample `i`.
    pub(super) fn feeds(&self, link: &Link, i: usize, carried: &Carried) -> Result<Vec<Value<f32>>, GradError> {
        let missing = || GradError("a bug in onnx-quant: a block reads what is not there".into());
        let feed = |(_, value): &(Slot, ValueId)| match carried.values.get(value) {
            Some(array) => Ok(Value::Real(array.clone())),
            None => self.given[i].values.get(value).cloned().ok_or_else(missing),
        };
        link.program.feeds.iter().map(feed).collect()
    }

    /// Keeps what `link` hands on.
    pub(super) fn hand_on(&self, link: &Link, values: &Values<f32>, state: &mut Carried) {
        let outputs = link.program.outputs.iter().filter(|(_, value)| self.carried.contains_key(value));
        state.values.extend(outputs.filter_map(|(slot, value)| Some((*value, values.real(*slot)?.clone()))));
    }

    /// What the graph returns out of `link`, with its place among all that it returns.
    pub(super) fn returned<'a>(&'a self, link: &'a Link) -> impl Iterator<Item = (Slot, usize)> + 'a {
        link.program
            .outputs
            .iter()
            .filter_map(|(slot, value)| Some((*slot, self.teacher.returned.iter().position(|other| other == value)?)))
    }

    /// Takes `batch` forward and back, by gradients of the errors or those that are drawn; `leaves` is told whether a link is on its way
    /// back, and `see` gets the gradients of one link after the other, from the last to the first.
    pub(in super::super) fn sweep(
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
            let mut total: Vec<Vec<f32>> = vec![Vec::new(); link.program.learned().len()];
            let lanes = states.chunks_mut(lane).zip(batch.chunks(lane));
            for lane in parallel::few_of(link.program.room.at_once, lanes, back) {
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
            let most = link.program.room.forward();
            parallel::few_of(most, states.iter_mut().zip(batch), run).collect::<Result<(), GradError>>()?;
        }
        Ok(states)
    }

    /// Takes gradients [drawn](Measure::drawn) from the seed `drawn` back through the float model for every sample of `batch`; `see` gets,
    /// link after link, what the tape of a sample holds, and what arrives in those slots that `wanted` says, in their order.
    pub(in super::super) fn trace(
        &self,
        batch: &[usize],
        drawn: u64,
        wanted: &(dyn Fn(&Link) -> Vec<Slot> + Sync),
        see: See<'_>,
    ) -> Result<(), GradError> {
        self.arrivals(batch, drawn, wanted, see, &mut |_, _| ())
    }

    /// The same, where `see` leaves something of every sample; `done` gets that for all samples of `batch`, in their order.
    pub(in super::super) fn arrivals<T: Send>(
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
            let at_once = link.program.room.at_once;
            let left = parallel::few_of(at_once, states.iter_mut().zip(batch), back);
            let left = left.collect::<Result<Vec<T>, GradError>>()?;
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
        let mut grads = link.program.back(values, seeds, &wanted)?;
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
