//! A block as planned with everything behind it in float, run with one scale or another.

use std::collections::BTreeSet;

use super::blocks::Block;
use super::measure::{Measure, Wish};
use super::samples::{self, Sample};
use crate::encoding::Encoding;
use crate::exec;
use crate::grad::{self, Array, Value};
use crate::id::{Site, ValueId};
use crate::ir::{Graph, walk};
use crate::lockstep::{Lockstep, Pair};
use crate::model::{Model, Plan};
use crate::pass::{PassContext, PassError};
use crate::returned::returned;
use crate::simulate::{Crossing, Simulation, is_float_activation};
use crate::tensor::Tensor;

/// See the module.
pub(super) struct Tail {
    reads: Vec<ValueId>,
    planned: Simulation,
    float: Simulation,
    /// How activations are rounded by what has been settled so far.
    crossing: Crossing,
    measures: Vec<Measure>,
    /// What errors of every output weigh.
    weights: Vec<f64>,
}

/// What one sample says of every candidate: of every output its errors, as a sum and a count.
pub(super) struct Told {
    pub(super) index: usize,
    pub(super) origin: usize,
    errors: Vec<Vec<(f64, usize)>>,
}

/// The bytes that the tail of `block` takes while it is made ready: both versions as an executor holds them, and one as it is handed over.
pub(super) fn takes(graph: &Graph, block: &Block, to_outputs: bool) -> u64 {
    let whole = if to_outputs { block.with_rest(graph) } else { block.clone() };
    let reads: BTreeSet<ValueId> = whole.nodes.iter().filter_map(|id| graph.node(*id)).flat_map(walk::reads).collect();
    let bytes: u64 =
        reads.iter().filter_map(|value| graph.constant(*value)).map(|tensor| tensor.bytes().len() as u64).sum();
    exec::held(bytes).saturating_mul(2).saturating_add(bytes)
}

impl Tail {
    /// That of `block`, whose inputs `walk` has; with all that depends on it `to_outputs`, where errors of the block itself weigh `own`; `None`
    /// where it reads what is not there yet, or gives no floats.
    ///
    /// # Errors
    /// [`PassError`] where it does not run, or gives no numbers.
    pub(super) fn of(
        walk: &Lockstep<'_>,
        model: &Model,
        cx: &PassContext<'_>,
        block: &Block,
        (to_outputs, own): (bool, f64),
    ) -> Result<Option<Self>, PassError> {
        let graph = model.graph();
        let whole = if to_outputs { block.with_rest(graph) } else { block.clone() };
        let weight = |value: &ValueId| if !to_outputs || graph.outputs().contains(value) { 1.0 } else { own };
        let counts = |value: &ValueId| is_float_activation(graph, *value) && weight(value) > 0.0;
        let wanted: Vec<ValueId> = whole.outputs.iter().copied().filter(counts).collect();
        if wanted.is_empty() {
            return Ok(None);
        }
        let before = samples::before(graph, &whole.nodes);
        let is_first = |index: usize| index == 0;
        let there = walk.each_where(1, is_first, Vec::new, |found: &mut Vec<ValueId>, pair| {
            let has = |value: &&ValueId| pair.whole(**value, false).is_some() && pair.whole(**value, true).is_some();
            *found = before.iter().filter(has).copied().collect();
            Ok(())
        })?;
        let given: Vec<ValueId> = there.concat();
        let part = walk::extract(graph, &given, &wanted);
        if part.inputs().len() > given.len() {
            return Ok(None);
        }
        let planned = Simulation::prepare(&part, &block.own(graph, model.plan()), cx.executor, &wanted)?;
        let float = Simulation::prepare(&part, &Plan::default(), cx.executor, &wanted)?;
        let crossing = planned.crossing().clone();
        let weights = wanted.iter().map(weight).collect();
        let mut tail = Self { reads: given, planned, float, crossing, measures: Vec::new(), weights };
        let first = walk.each_where(1, is_first, Vec::new, |kept: &mut Vec<Sample>, pair| {
            kept.push(tail.says(pair)?);
            Ok(())
        })?;
        let first = first.concat();
        let kind = |value: &ValueId| Wish::Prediction.kind(returned(graph, *value));
        let measure = |(at, value): (usize, &ValueId)| Measure::of(Wish::Prediction, &first, at, kind(value));
        tail.measures = wanted.iter().enumerate().map(measure).collect();
        Ok(Some(tail))
    }

    /// What the samples that are `chosen` say of every one of `tried` at `site`.
    ///
    /// # Errors
    /// [`PassError`] where something does not run.
    pub(super) fn errors(
        &self,
        (walk, workers): (&Lockstep<'_>, usize),
        site: Site,
        tried: &[Encoding],
        chosen: &BTreeSet<usize>,
    ) -> Result<Vec<Told>, PassError> {
        let crossings: Vec<Crossing> =
            tried.iter().map(|encoding| self.crossing.with(site, encoding.clone())).collect();
        let told = walk.each_where(
            workers,
            |index| chosen.contains(&index),
            Vec::new,
            |told: &mut Vec<Told>, pair| {
                let (says, feeds) = (self.says(pair)?, self.feeds(pair, true)?);
                let of = |crossing: &Crossing| Ok(self.distances(&says, &self.planned.run_as(crossing, &feeds)?));
                let errors = crossings.iter().map(of).collect::<Result<_, PassError>>()?;
                told.push(Told { index: pair.index, origin: pair.origin, errors });
                Ok(())
            },
        )?;
        let mut told: Vec<Told> = told.into_iter().flatten().collect();
        told.sort_by_key(|told| told.index);
        Ok(told)
    }

    /// What `candidate` loses on these of the samples that were asked.
    pub(super) fn loss(&self, told: &[Told], candidate: usize, samples: &[usize]) -> f64 {
        let of_output = |(at, weight): (usize, &f64)| {
            let errors = samples.iter().map(|sample| told[*sample].errors[candidate][at]);
            let (sum, count) = errors.fold((0.0, 0), |all, (sum, count)| (all.0 + sum, all.1 + count));
            weight * sum / count.max(1) as f64
        };
        self.weights.iter().enumerate().map(of_output).sum()
    }

    /// From here on, `site` has `encoding`.
    pub(super) fn settle(&mut self, site: Site, encoding: &Encoding) {
        self.crossing = self.crossing.with(site, encoding.clone());
    }

    /// What the float model gives for a sample.
    fn says(&self, pair: &Pair) -> Result<Sample, PassError> {
        let given = self.float.run(&self.feeds(pair, false)?)?;
        let targets = given.iter().map(numbers).collect::<Result<Vec<_>, _>>()?;
        let words = targets.iter().map(|target| pair.words(target.shape()).map(<[bool]>::to_vec)).collect();
        Ok(Sample { feeds: Vec::new(), targets, words, weights: Vec::new() })
    }

    fn feeds(&self, pair: &Pair, planned: bool) -> Result<Vec<Tensor>, PassError> {
        let missing = || PassError::Model("a bug in onnx-quant: a block reads what is not there".into());
        self.reads.iter().map(|value| pair.whole(*value, planned).cloned().ok_or_else(missing)).collect()
    }

    /// How far every output is off; without end where it is of another shape, as behind a choice of boxes, or holds what is no number.
    fn distances(&self, says: &Sample, given: &[Tensor]) -> Vec<(f64, usize)> {
        let of = |(at, (measure, tensor)): (usize, (&Measure, &Tensor))| {
            let distance = numbers(tensor).ok().and_then(|got| measure.error(says, at, Some(&got)).ok());
            distance.filter(|(sum, _)| sum.is_finite()).unwrap_or((f64::INFINITY, 1))
        };
        self.measures.iter().zip(given).enumerate().map(of).collect()
    }
}

fn numbers(tensor: &Tensor) -> Result<Array<f32>, PassError> {
    match grad::value_of(tensor) {
        Some(Value::Real(array)) => Ok(array),
        _ => Err(PassError::Model("a bug in onnx-quant: an output is no float".into())),
    }
}
