//! What channels are divided by, so that the weights that write them and those that read them have one range.
//!
//! ```text
//! s[c] = √(r₁ / r₂),    r₁ the largest weight that writes channel c, r₂ the largest that reads it
//! ```
//!
//! Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1 and appendix A; classes of channels by Gauss–Seidel sweeps, ours.

use std::borrow::Cow;

use super::lanes::Lanes;
use super::taps::{Taps, divided_bias};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Node;
use crate::ops;
use crate::pass::{PassContext, PassError};
use crate::tensor::Tensor;

/// Sweeps look at so many kernels in all, and are no fewer than [`LEAST_SWEEPS`] and no more than [`MOST_SWEEPS`]: what is balanced along a
/// chain of n layers takes some n² of them.
const LOOKS: usize = 2_000_000_000;
const LEAST_SWEEPS: usize = 50;
const MOST_SWEEPS: usize = 50_000;
/// Sweeps end where no factor moves by more, on a logarithmic scale.
const STILL: f64 = 1e-5;
/// Factors nearer to 1 are not worth other weights: what has been balanced stays to the bit.
const WORTH: f64 = 1e-4;
/// Channels with no larger weight are dead.
const LEAST: f64 = 1e-9;
/// Biases count by a fifth: they must not explode where weights are small.
const SHRINK: f64 = 5.0;

/// A layer whose output or input channels can be divided.
struct Layer<'a> {
    taps: Taps,
    tops: Cow<'a, [f32]>,
    bias: Vec<f64>,
    outputs: Option<Vec<usize>>,
    inputs: Option<Vec<usize>>,
}

impl<'a> Layer<'a> {
    /// The layer at `id`, where any channel that it writes or reads can be divided.
    fn of(lanes: &Lanes<'a>, id: NodeId, node: &'a Node) -> Option<Self> {
        let graph = lanes.graph;
        let taps = Taps::of(graph, &lanes.users, id)?;
        let classes = |value: Option<ValueId>| Some(lanes.free(value?)?.1);
        let (outputs, inputs) = (classes(node.output(0)), classes(node.input(0)));
        (outputs.is_some() || inputs.is_some()).then_some(())?;
        let tops = taps.tops(graph.constant_input(node, 1)?)?;
        let bias = bias(lanes, (id, node), &taps).unwrap_or_default();
        Some(Self { taps, tops, bias, outputs, inputs })
    }

    /// The largest weight of an output or input channel, or its share of the bias, with classes divided by `s`.
    fn range(&self, of_outputs: bool, channel: usize, s: &[f64]) -> f64 {
        let at = |classes: &Option<Vec<usize>>, j: usize| classes.as_ref().map_or(1.0, |classes| s[classes[j]]);
        let line =
            self.taps.line(of_outputs, channel).map(|(kernel, other)| (f64::from(self.tops[kernel].abs()), other));
        if of_outputs {
            let bias = self.bias.get(channel).copied().unwrap_or(0.0);
            line.map(|(w, j)| w * at(&self.inputs, j)).fold(bias, f64::max) / at(&self.outputs, channel)
        } else {
            line.map(|(w, o)| w / at(&self.outputs, o)).fold(0.0, f64::max) * at(&self.inputs, channel)
        }
    }
}

/// What the bias of a layer counts, output by output: its own, or one that is added right behind.
fn bias(lanes: &Lanes<'_>, (id, node): (NodeId, &Node), taps: &Taps) -> Option<Vec<f64>> {
    let graph = lanes.graph;
    let own = divided_bias(graph, node, &vec![SHRINK; taps.outputs()]);
    let sizes = |bias: &Tensor, by: f64| Some(bias.floats()?.iter().map(|b| f64::from(b.abs()) / by).collect());
    match (own, ops::bias_site(graph, &lanes.users, id)) {
        (Some(own), _) => sizes(&own, 1.0),
        (None, Some(Site::Use { node: at, input })) => {
            sizes(graph.constant_input(graph.node(at)?, input.into())?, SHRINK)
        }
        _ => None,
    }
}

/// What channels of every class are divided by; `None` where nothing is worth it. Reported to the progress of `cx` as `stage`.
///
/// # Errors
/// [`PassError::Interrupted`].
pub(super) fn factors(lanes: &Lanes<'_>, cx: &PassContext<'_>, stage: &str) -> Result<Option<Vec<f64>>, PassError> {
    let layers: Vec<Layer<'_>> = lanes.graph.nodes().filter_map(|(id, node)| Layer::of(lanes, id, node)).collect();
    // Of every class the channels of layers that write it, and that read it.
    let mut uses: Vec<[Vec<(usize, usize)>; 2]> = vec![[Vec::new(), Vec::new()]; lanes.len()];
    for (at, layer) in layers.iter().enumerate() {
        for (side, classes) in [&layer.outputs, &layer.inputs].into_iter().enumerate() {
            for (channel, class) in classes.iter().flatten().enumerate().filter(|(_, class)| lanes.is_free(**class)) {
                uses[*class][side].push((at, channel));
            }
        }
    }
    let kernels = layers.iter().map(|layer| layer.tops.len()).sum::<usize>().max(1);
    let sweeps = (LOOKS / kernels).clamp(LEAST_SWEEPS, MOST_SWEEPS);
    let (mut s, mut steps) = (vec![1.0_f64; lanes.len()], Vec::new());
    cx.progress.begin(stage, sweeps as u64);
    for _ in 0..sweeps {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        steps.push(sweep(&layers, &uses, &mut s));
        cx.progress.step();
        if steps.last().is_some_and(|last| *last < STILL) {
            break;
        }
    }
    cx.progress.end();
    // Where that was not enough, passes that run until nothing changes go on, each with half of what there was to do or less.
    let (first, last) = (steps.first().copied().unwrap_or(0.0), steps.last().copied().unwrap_or(0.0));
    if last >= STILL && last > first / 2.0 {
        return Ok(None);
    }
    s.iter_mut().filter(|s| s.ln().abs() < WORTH).for_each(|s| *s = 1.0);
    let finite = s.iter().all(|s| s.is_normal());
    Ok((finite && s.iter().any(|s| (s - 1.0).abs() > f64::EPSILON)).then_some(s))
}

/// Balances every class once, one after the other: one and another that stand around one weight would both take what is to be shared. The
/// largest step, on a logarithmic scale.
fn sweep(layers: &[Layer<'_>], uses: &[[Vec<(usize, usize)>; 2]], s: &mut [f64]) -> f64 {
    let mut most = 0.0_f64;
    for (class, [written, read]) in uses.iter().enumerate() {
        let range = |of_outputs, all: &[(usize, usize)]| {
            all.iter().map(|&(layer, channel)| layers[layer].range(of_outputs, channel, s)).fold(0.0, f64::max)
        };
        let (written, read) = (range(true, written), range(false, read));
        if written > LEAST && read > LEAST {
            let step = (written / read).sqrt();
            most = most.max(step.ln().abs());
            s[class] *= step;
        }
    }
    most
}
