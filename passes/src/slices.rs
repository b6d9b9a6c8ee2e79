//! A plan run in slices: a few nodes with their weights at a time.
//!
//! What [`crate::simulate::Simulation`] does with the whole model ready at once, done for models whose weights one does not want
//! to hold in several copies: every slice is made ready, runs on all samples, and is let go.

use std::collections::{BTreeMap, BTreeSet};

use crate::exec::Executor;
use crate::id::{NodeId, ValueId};
use crate::ir::{Graph, walk};
use crate::model::Plan;
use crate::simulate::{Crossing, Cutter, Known, SimulateError, Version, cut, exported};
use crate::tensor::Tensor;

/// The most bytes of constants in a slice; a node with more has one of its own.
const SLICE_BYTES: usize = 64 << 20;

/// Runs `samples` (graph inputs in order) through `graph` under `plan`, and hands every wanted tensor to `see`, with the numbers of
/// the sample and of the tensor among the `wanted`, as soon as it is computed.
///
/// # Errors
/// [`SimulateError`].
pub fn run(
    graph: &Graph,
    plan: &Plan,
    executor: &dyn Executor,
    wanted: &[ValueId],
    samples: &[Vec<Tensor>],
    see: &mut dyn FnMut(usize, usize, Tensor),
) -> Result<(), SimulateError> {
    let cutter = Cutter { graph, plan };
    let crossing = Crossing::of(graph, plan);
    let versions: Vec<Version> = wanted.iter().map(|&value| cutter.of_value(value)).collect();
    let (needed, _) = walk::needed(graph, &BTreeSet::new(), wanted);
    let (slices, depths) = (slices(graph, &needed), cutter.depths());
    let place = |id: NodeId| (slices.get(&id).copied().unwrap_or(0), depths.get(&id).copied().unwrap_or(0));
    let mut handed_on = exported(&cutter, &needed, place);
    handed_on.extend(wanted);
    let mut by_place: BTreeMap<(usize, usize), Vec<NodeId>> = BTreeMap::new();
    needed.iter().for_each(|&id| by_place.entry(place(id)).or_default().push(id));
    let mut last_reader: BTreeMap<ValueId, (usize, usize)> = BTreeMap::new();
    for &id in &needed {
        for value in graph.node(id).into_iter().flat_map(walk::reads) {
            let last = last_reader.entry(value).or_insert((0, 0));
            *last = place(id).max(*last);
        }
    }
    let inputs = |feeds: &Vec<Tensor>| -> Known {
        graph.inputs().iter().zip(feeds).map(|(&value, tensor)| ((value, None), tensor.clone())).collect()
    };
    let mut known: Vec<Known> = samples.iter().map(inputs).collect();
    let constants = wanted.iter().filter_map(|value| Some((*value, graph.constant(*value)?)));
    let constants: Vec<(ValueId, Tensor)> = constants.map(|(value, tensor)| (value, tensor.as_ref().clone())).collect();
    let given: Vec<ValueId> = graph.inputs().iter().copied().chain(constants.iter().map(|(value, _)| *value)).collect();
    let mut hand_over = |sample: usize, known: &mut Known, computed: &[ValueId]| -> Result<(), SimulateError> {
        for (at, version) in versions.iter().enumerate().filter(|(_, version)| computed.contains(&version.0)) {
            see(sample, at, crossing.version(known, *version)?);
        }
        Ok(())
    };
    for (sample, known) in known.iter_mut().enumerate() {
        known.extend(constants.iter().map(|(value, tensor)| ((*value, None), tensor.clone())));
        hand_over(sample, known, &given)?;
    }
    for (at, nodes) in by_place {
        let part = cut(&cutter, &nodes, &handed_on, executor)?;
        for (sample, known) in known.iter_mut().enumerate() {
            let computed = part.run(known, &crossing)?.to_vec();
            hand_over(sample, known, &computed)?;
            known.retain(|(value, _), _| last_reader.get(value).is_some_and(|last| *last > at));
        }
    }
    Ok(())
}

/// The slice of every node, ascending in graph order.
fn slices(graph: &Graph, needed: &[NodeId]) -> BTreeMap<NodeId, usize> {
    let (mut slice, mut filled) = (0, 0_usize);
    let mut slices = BTreeMap::new();
    for &id in needed {
        let constants = graph.node(id).into_iter().flat_map(|node| node.inputs.iter().flatten());
        let bytes = constants.filter_map(|value| graph.constant(*value)).map(|tensor| tensor.bytes().len()).sum();
        if filled > 0 && filled.saturating_add(bytes) > SLICE_BYTES {
            slice += 1;
            filled = 0;
        }
        filled = filled.saturating_add(bytes);
        slices.insert(id, slice);
    }
    slices
}
