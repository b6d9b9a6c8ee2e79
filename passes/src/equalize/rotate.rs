//! Rotation of residual streams.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::affine_norm::with_bias;
use super::hadamard::Hadamard;
use super::keeps_mean::KeepsMean;
use super::orthogonal::Rotation;
use super::stream::{Reader, Role, Stream, streams};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::ValueId;
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Turns the residual stream of a decoder into another basis, in which no channel stands out: x' = x Q, Q a Hadamard matrix with
    /// random signs.
    ///
    /// What writes to the stream is multiplied by Q, what reads it by Qᵀ; root mean square norms do not see it once their gain is in
    /// the weights that read them. Layer norms do not either, their shift in biases, where Q keeps the mean: there it is followed by the reflection
    /// that takes the image of the vector of ones back to it.
    /// So every norm loses its gain and its shift, and a head that is tied to the embedding gets a weight of its own. A stream whose norms have
    /// neither is taken for one that was rotated already.
    /// Done only where every node on the stream is accounted for: sums, products with constant weights, rows of a constant table, rows
    /// laid out anew, `LayerNormalization`, `RMSNormalization`, and both kinds of norms written out. Anything else, such as a `Gemm` that `split-gemm` did not take apart,
    /// is named in a note, and its stream is left alone.
    INFO {
        name: "rotate",
        source: "Ashkboos et al. 2024, arXiv:2404.00456 (R1); Liu et al. 2024, arXiv:2405.16406; a basis that keeps the mean in place of layer norms made root mean square norms: ours",
        cost: "m d (a + b) multiply-adds for a weight of m × d, a · b = d the two factors of the Hadamard matrix; no data. A head that was tied to the embedding becomes a weight of its own.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "seed", doc: "which random signs, 0 by default" }],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |options| Ok(Box::new(Rotate::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct Rotate {
    seed: u64,
}

impl Rotate {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { seed: seed(options)? })
    }
}

impl Pass for Rotate {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        turn_streams("rotate", model, |stream, _| Ok(spread(stream, self.seed)))
    }
}

/// The Hadamard matrix with the signs of `seed` for `stream`, with a reflection behind it where norms take the mean away.
pub(super) fn spread(stream: &Stream, seed: u64) -> Box<dyn Rotation> {
    let hadamard = Hadamard::new(stream.width, seed);
    if stream.is_centered { Box::new(KeepsMean::of(hadamard)) } else { Box::new(hadamard) }
}

/// Turns every proven stream of `model` that has a gain or a shift left by what `basis` gives for it; notes of `pass` say why others stay.
///
/// # Errors
/// Those of `basis`.
pub(super) fn turn_streams(
    pass: &str,
    model: &Model,
    mut basis: impl FnMut(&Stream, &mut Patch) -> Result<Box<dyn Rotation>, PassError>,
) -> Result<Patch, PassError> {
    let graph = model.graph();
    let users = Users::of(graph);
    let mut patch = Patch::on(model);
    let found = streams(graph, &users);
    if found.is_empty() {
        let message = format!("{pass}: no residual stream that a norm reads");
        patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, Place::Model, message));
    }
    let mut refused: Vec<(&str, Arc<str>, usize)> = Vec::new();
    for stream in found {
        match stream {
            Ok(stream) if stream.width > 1 && stream.readers.iter().any(Reader::has_affine) => {
                let rotation = basis(&stream, &mut patch)?;
                let mark = patch.mark();
                if turn(graph, &users, &stream, rotation.as_ref(), &mut patch).is_none() {
                    patch.roll_back(&mark);
                    refused.push((
                        "holds numbers around its stream that do not fit f32 once it is turned",
                        "".into(),
                        0,
                    ));
                    continue;
                }
                patch.count("streams", 1);
                patch.count("readers", stream.readers.len() as u64);
            }
            Ok(_) => {}
            Err((node, problem)) => {
                if let Some((.., others)) = refused.iter_mut().find(|(same, ..)| *same == problem) {
                    *others += 1;
                } else {
                    let node = node.and_then(|node| graph.node(node));
                    refused.push((problem, node.map(|node| Arc::clone(&node.name)).unwrap_or_default(), 0));
                }
            }
        }
    }
    for (problem, name, others) in refused {
        let others =
            if others > 0 { format!("; {others} more streams stay for the same reason") } else { String::new() };
        let message = format!("{pass}: it {problem}{others}");
        patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, Place::Node(name), message));
    }
    Ok(patch)
}

/// Which random signs are asked for.
pub(super) fn seed(options: &Options) -> Result<u64, OptionError> {
    let seed = options.number("seed")?.unwrap_or(0.0);
    let problem = || OptionError { option: "seed".into(), problem: format!("`{seed}` is no whole number from 0 on") };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be whole, small and not negative"
    )]
    let whole = (seed >= 0.0 && seed.fract() == 0.0 && seed < 1e9).then_some(seed as u64);
    whole.ok_or_else(problem)
}

/// Computes `stream` in the basis of `rotation` beside the old one, and lets its readers read that.
fn turn(graph: &Graph, users: &Users, stream: &Stream, rotation: &dyn Rotation, patch: &mut Patch) -> Option<()> {
    let mut turned: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let mut weights: BTreeMap<(ValueId, Option<ValueId>, [bool; 2]), ValueId> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let Some(role) = stream.roles.get(&id) else { continue };
        let mut copy = node.clone();
        for input in copy.inputs.iter_mut().flatten() {
            *input = turned.get(input).copied().unwrap_or(*input);
        }
        let constant = match role {
            Role::Writes => Some(1),
            Role::Gathers => Some(0),
            Role::AddsRows(input) => Some(*input),
            Role::Adds | Role::Follows => None,
            Role::Bares => {
                let ones = Tensor::of([stream.width], vec![1.0_f32; stream.width]);
                copy.inputs.truncate(1);
                copy.inputs.push(Some(patch.constant(&format!("{}.ones", node.name), ones)));
                None
            }
            Role::Falls(input) => {
                turned.insert(node.output(0)?, copy.input(*input)?);
                continue;
            }
            Role::Measures => {
                patch.replace(id, copy);
                continue;
            }
        };
        if let Some(input) = constant {
            let value = node.input(input)?;
            let key = (value, None, [false; 2]);
            let made = match weights.get(&key) {
                Some(made) => *made,
                None => constant_of(graph, patch, value, rows(graph.constant(value)?, None, rotation)?),
            };
            weights.insert(key, made);
            copy.inputs[input] = Some(made);
        }
        let output = node.output(0)?;
        let source = graph.value(output);
        turned.insert(output, patch.node(copy, &format!("{}.rotated", source.name), source.ty.clone(), Some(id)));
    }
    for reader in &stream.readers {
        let key = (reader.weight, reader.gain, [true, reader.transposed]);
        let made = match weights.get(&key) {
            Some(made) => *made,
            None => constant_of(graph, patch, reader.weight, read(graph, reader, rotation)?),
        };
        weights.insert(key, made);
        let node = graph.node(reader.node)?;
        let copy = Node { inputs: vec![Some(*turned.get(&reader.read)?), Some(made)], ..node.clone() };
        match reader.shift {
            Some(shift) => with_bias(graph, users, reader.node, copy, &less(graph, reader, shift)?, patch)?,
            None => patch.replace(reader.node, copy),
        }
    }
    Some(())
}

/// −β W for the shift β and the weight \[D, N\] of `reader`, to be taken from its bias once the norm has no shift.
fn less(graph: &Graph, reader: &Reader, shift: ValueId) -> Option<Vec<f64>> {
    let shift = graph.constant(shift)?.floats()?;
    let weight = graph.constant(reader.weight)?;
    let outputs = weight.shape()[usize::from(!reader.transposed)];
    let values = weight.values::<f32>()?;
    let mut less = vec![0.0; outputs];
    if reader.transposed {
        for (row, sum) in values.chunks_exact(shift.len()).zip(&mut less) {
            *sum = -row.iter().zip(shift.iter()).map(|(w, b)| f64::from(*w) * f64::from(*b)).sum::<f64>();
        }
    } else {
        for (row, b) in values.chunks_exact(outputs.max(1)).zip(shift.iter()) {
            row.iter().zip(&mut less).for_each(|(w, sum)| *sum -= f64::from(*w) * f64::from(*b));
        }
    }
    Some(less)
}

fn constant_of(graph: &Graph, patch: &mut Patch, old: ValueId, tensor: Tensor) -> ValueId {
    patch.constant(&format!("{}.rotated", graph.value(old).name), tensor)
}

/// Every row of `tensor`, its entries times `gain` first, times Q.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
pub(super) fn rows(tensor: &Tensor, gain: Option<&[f32]>, rotation: &dyn Rotation) -> Option<Tensor> {
    let mut values = tensor.values::<f32>()?.into_owned();
    values.par_chunks_exact_mut(rotation.width()).for_each(|row| {
        let mut wide: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        if let Some(gain) = gain {
            wide.iter_mut().zip(gain).for_each(|(v, g)| *v *= f64::from(*g));
        }
        rotation.apply(&mut wide);
        row.iter_mut().zip(wide).for_each(|(to, from)| *to = from as f32);
    });
    Some(Tensor::of(tensor.shape(), values))
}

/// Qᵀ diag(gain) W for the weight \[D, N\] of `reader`.
fn read(graph: &Graph, reader: &Reader, rotation: &dyn Rotation) -> Option<Tensor> {
    let gain = match reader.gain {
        Some(gain) => Some(graph.constant(gain)?.values::<f32>()?.into_owned()),
        None => None,
    };
    let weight = graph.constant(reader.weight)?;
    let by_output = if reader.transposed {
        rows(weight, gain.as_deref(), rotation)?
    } else {
        rows(&weight.transposed()?, gain.as_deref(), rotation)?
    };
    by_output.transposed()
}
