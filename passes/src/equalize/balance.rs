//! What channels are divided by, so that the weights that write them and those that read them have one range.
//!
//! ```text
//! s[c] = √(r₁ / r₂),    r₁ the largest weight that writes channel c, r₂ the largest that reads it
//! ```
//!
//! Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1 and appendix A; classes of channels by Gauss–Seidel sweeps, ours.

use super::lanes::Lanes;
use super::taps::{Taps, divided_bias};
use crate::id::NodeId;
use crate::ir::Node;
use crate::tensor::Tensor;

const MOST_SWEEPS: usize = 50;
/// Sweeps end where no factor moves by more, on a logarithmic scale.
const STILL: f64 = 1e-5;
/// Factors nearer to 1 are not worth other weights: what has been balanced stays to the bit.
const WORTH: f64 = 1e-4;
/// Channels with no larger weight are dead.
const LEAST: f64 = 1e-9;
/// Biases count by a fifth: they must not explode where weights are small.
const SHRINK: f64 = 5.0;

/// A layer whose output or input channels can be divided.
struct Layer {
    taps: Taps,
    tops: Vec<f64>,
    bias: Vec<f64>,
    outputs: Option<Vec<usize>>,
    inputs: Option<Vec<usize>>,
}

impl Layer {
    /// The layer at `id`, where any channel that it writes or reads can be divided.
    fn of(lanes: &Lanes<'_>, id: NodeId, node: &Node) -> Option<Self> {
        let graph = lanes.graph;
        let taps = Taps::of(graph, &lanes.users, id)?;
        let classes = |value| Some(lanes.free(value?)?.classes.clone());
        let (outputs, inputs) = (classes(node.output(0)), classes(node.input(0)));
        (outputs.is_some() || inputs.is_some()).then_some(())?;
        let bias = divided_bias(graph, node, &vec![SHRINK; taps.outputs()]);
        let sizes = |bias: &Tensor| Some(bias.floats()?.iter().map(|b| f64::from(b.abs())).collect());
        let bias = bias.as_ref().and_then(sizes).unwrap_or_default();
        Some(Self { taps, tops: taps.tops(graph.constant_input(node, 1)?)?, bias, outputs, inputs })
    }

    /// The largest weight of an output or input channel, or its share of the bias, with classes divided by `s`.
    fn range(&self, of_outputs: bool, channel: usize, s: &[f64]) -> f64 {
        let at = |classes: &Option<Vec<usize>>, j: usize| classes.as_ref().map_or(1.0, |classes| s[classes[j]]);
        let line = self.taps.line(of_outputs, channel).map(|(kernel, other)| (self.tops[kernel], other));
        if of_outputs {
            let bias = self.bias.get(channel).copied().unwrap_or(0.0);
            line.map(|(w, j)| w * at(&self.inputs, j)).fold(bias, f64::max) / at(&self.outputs, channel)
        } else {
            line.map(|(w, o)| w / at(&self.outputs, o)).fold(0.0, f64::max) * at(&self.inputs, channel)
        }
    }
}

/// What channels of every class are divided by; `None` where nothing is worth it.
pub(super) fn factors(lanes: &Lanes<'_>) -> Option<Vec<f64>> {
    let layers: Vec<Layer> = lanes.graph.nodes().filter_map(|(id, node)| Layer::of(lanes, id, node)).collect();
    // Of every class the channels of layers that write it, and that read it.
    let mut uses: Vec<[Vec<(usize, usize)>; 2]> = vec![[Vec::new(), Vec::new()]; lanes.len()];
    for (at, layer) in layers.iter().enumerate() {
        for (side, classes) in [&layer.outputs, &layer.inputs].into_iter().enumerate() {
            for (channel, class) in classes.iter().flatten().enumerate().filter(|(_, class)| lanes.is_free(**class)) {
                uses[*class][side].push((at, channel));
            }
        }
    }
    let mut s = vec![1.0_f64; lanes.len()];
    for _ in 0..MOST_SWEEPS {
        let mut most = 0.0_f64;
        // One after the other: a class and another that stand around one weight would both take what is to be shared.
        for (class, [written, read]) in uses.iter().enumerate() {
            let range = |of_outputs, all: &[(usize, usize)]| {
                all.iter().map(|&(layer, channel)| layers[layer].range(of_outputs, channel, &s)).fold(0.0, f64::max)
            };
            let (written, read) = (range(true, written), range(false, read));
            if written > LEAST && read > LEAST {
                let step = (written / read).sqrt();
                most = most.max(step.ln().abs());
                s[class] *= step;
            }
        }
        if most < STILL {
            break;
        }
    }
    s.iter_mut().filter(|s| s.ln().abs() < WORTH).for_each(|s| *s = 1.0);
    s.iter().any(|s| (s - 1.0).abs() > f64::EPSILON).then_some(s)
}
