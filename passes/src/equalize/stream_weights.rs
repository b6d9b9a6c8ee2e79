//! The weights around a residual stream, and the moments of what they read: what a basis of the stream loses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::pivots::{self, Errors, Moments};
use super::rounding_loss::Rounding;
use super::stream::{Reader, Role, Stream};
use super::turned_loss::{AT_ONCE, Group, TurnedLoss, Weight};
use crate::id::{NodeId, ValueId};
use crate::ir::Graph;
use crate::model::Model;
use crate::observe::{Gram, Rows};
use crate::pass::PassContext;
use crate::tensor::Tensor;

/// Wider streams than this are not learned, since a step costs the cube of the width, and of wider tensors no moments are asked for.
pub(super) const MAX_WIDTH: usize = 4096;

/// A stream in its model.
pub(super) struct Setting<'a> {
    pub(super) model: &'a Model,
    pub(super) cx: &'a PassContext<'a>,
    pub(super) stream: &'a Stream,
}

impl Setting<'_> {
    /// What a basis of the stream loses; or why nothing can be learned.
    pub(super) fn loss(&self, errors: Errors) -> Result<TurnedLoss, String> {
        let (graph, width) = (self.model.graph(), self.stream.width);
        if width > MAX_WIDTH {
            return Err(format!("a stream of {width} channels is wider than {MAX_WIDTH}"));
        }
        self.fits()?;
        let mut groups = Vec::new();
        let mut readers: BTreeMap<ValueId, Vec<&Reader>> = BTreeMap::new();
        for reader in &self.stream.readers {
            readers.entry(reader.normed).or_default().push(reader);
        }
        for readers in readers.into_values() {
            let moments = readers.first().and_then(|reader| moments(self.model, reader, width));
            let weights: Vec<Weight> =
                readers.into_iter().filter_map(|reader| self.reader(reader, moments.as_ref())).collect();
            if !weights.is_empty() {
                groups.push(Group::Readers(weights, moments));
            }
        }
        for (node, read, weight) in writers(graph, self.stream) {
            groups.extend(self.writer(node, read, weight, errors));
        }
        if groups.is_empty() {
            return Err("no weight that reads or writes the stream is rounded".into());
        }
        let levels = self.cx.scheme.activation_bits.map(|bits| f64::from(bits.min(24)).exp2());
        Ok(TurnedLoss { width, groups, errors, levels })
    }

    /// Whether memory holds the weights once more, those of them that are in work, and the moments.
    fn fits(&self) -> Result<(), String> {
        let graph = self.model.graph();
        let bytes = |value: ValueId| graph.constant(value).map_or(0, |tensor| 4 * tensor.len() as u64);
        let writers = writers(graph, self.stream);
        let read = self.stream.readers.iter().map(|reader| reader.weight);
        let weights: Vec<u64> = read.chain(writers.iter().map(|(.., weight)| *weight)).map(bytes).collect();
        let inputs = writers.iter().filter_map(|(_, read, weight)| {
            let inputs = *graph.constant(*weight)?.shape().first()?;
            self.gram(*read, inputs).map(|_| inputs)
        });
        let norms: BTreeSet<ValueId> = self.stream.readers.iter().map(|reader| reader.normed).collect();
        // Some matrices of that size are in work at once: those of the stream, and before, one after the other, those of what writers read.
        let of_stream = Moments::bytes(self.stream.width).saturating_mul(norms.len() as u64 + 64);
        let of_writer = Moments::bytes(inputs.max().unwrap_or(0)).saturating_mul(8);
        let needed = of_weights(&weights).saturating_add(of_stream.max(of_writer));
        let left = self.cx.state_budget;
        if needed <= left {
            return Ok(());
        }
        Err(format!("what it learns from takes {} MB, and {} MB are left", needed / 1_000_000, left / 1_000_000))
    }

    fn gram(&self, value: ValueId, columns: usize) -> Option<&Arc<Gram>> {
        self.model.stats().gram(value, Rows::Last).filter(|gram| gram.columns == columns)
    }

    /// The weight of `reader`, with its gain, one row per output.
    fn reader(&self, reader: &Reader, moments: Option<&Moments>) -> Option<Weight> {
        let graph = self.model.graph();
        let width = self.stream.width;
        let rounding = Rounding::of(graph, self.cx, (reader.node, reader.weight), width)?;
        let weight = graph.constant(reader.weight)?;
        let by_output = if reader.transposed { Tensor::clone(weight) } else { weight.transposed()? };
        let mut rows = by_output.values::<f32>()?.into_owned();
        if let Some(gain) = reader.gain {
            let gain = graph.constant(gain)?.values::<f32>()?.into_owned();
            for row in rows.chunks_exact_mut(width) {
                row.iter_mut().zip(&gain).for_each(|(w, g)| *w *= g);
            }
        }
        let power = moments.map_or_else(|| square(&rows), |moments| moments.power(&rows));
        Some(Weight { rows, share: share(power)?, rounding })
    }

    /// The `weight` \[K, D\] of the product `node` that reads `read`.
    fn writer(&self, node: NodeId, read: ValueId, weight: ValueId, errors: Errors) -> Option<Group> {
        let graph = self.model.graph();
        let tensor = graph.constant(weight)?;
        let [inputs, _] = *tensor.shape() else { return None };
        let rounding = Rounding::of(graph, self.cx, (node, weight), inputs)?;
        let rows = tensor.values::<f32>()?.into_owned();
        let gram = self.gram(read, inputs);
        let costs = gram.and_then(|gram| pivots::fixed(gram, errors));
        let power = match gram {
            Some(gram) => Moments::of(gram).power(tensor.transposed()?.values::<f32>()?.as_ref()),
            None => square(&rows),
        };
        let costs = costs.unwrap_or_else(|| vec![1.0; inputs]);
        Some(Group::Writer(Weight { rows, share: share(power)?, rounding }, costs))
    }
}

/// Second moments of what the norm that `reader` reads returns without its gain and shift, where those of `width` channels were measured.
pub(super) fn moments(model: &Model, reader: &Reader, width: usize) -> Option<Moments> {
    let gram = model.stats().gram(reader.normed, Rows::Last).filter(|gram| gram.columns == width)?;
    if !reader.is_whole {
        return Some(Moments::of(gram));
    }
    let row = |value: Option<ValueId>| model.graph().constant(value?)?.floats();
    let [gain, shift] = [row(reader.gain), row(reader.shift)];
    Some(Moments::of(gram).without(gain.as_deref(), shift.as_deref()))
}

/// What computes parts of `stream` by a weight: the product, what it reads, the weight \[K, D\].
pub(super) fn writers(graph: &Graph, stream: &Stream) -> Vec<(NodeId, ValueId, ValueId)> {
    let writes = stream.roles.iter().filter(|(_, role)| **role == Role::Writes);
    writes
        .filter_map(|(id, _)| {
            let node = graph.node(*id)?;
            Some((*id, node.input(0)?, node.input(1)?))
        })
        .collect()
}

/// The bytes that weights of so many `bytes` each take: all of them once, and twice more, turned and as slopes, those in work.
fn of_weights(bytes: &[u64]) -> u64 {
    let largest = bytes.iter().copied().max().unwrap_or(0);
    let in_work = largest.saturating_mul(2 * AT_ONCE as u64);
    bytes.iter().fold(in_work, |sum, bytes| sum.saturating_add(*bytes))
}

fn square(rows: &[f32]) -> f64 {
    rows.iter().map(|w| f64::from(*w).powi(2)).sum()
}

/// One over `power`; `None` for a weight that computes nothing, or no numbers.
pub(super) fn share(power: f64) -> Option<f64> {
    Some(1.0 / power).filter(|share| power > 0.0 && share.is_normal())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_weight_counts_twice_more_for_every_group_in_work() {
        assert_eq!(of_weights(&[]), 0);
        assert_eq!(of_weights(&[10, 30, 20]), 60 + 2 * 4 * 30);
        assert_eq!(of_weights(&[u64::MAX, 1]), u64::MAX);
    }
}
