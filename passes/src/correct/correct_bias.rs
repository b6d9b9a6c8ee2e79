//! The mean error of rounded weights, taken back in the bias.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::id::{NodeId, Site, ValueId};
use crate::ir::Node;
use crate::model::{Edit, Model, Patch};
use crate::ops::{self, Linear};
use crate::parallel;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Takes the mean error that rounding a weight makes back in the bias of its node.
    ///
    /// Rounding W to Ŵ shifts the output of channel o by Σ (Ŵ − W)\[o, j, k\] · x\[j\] on average; with the measured mean
    /// of every input channel that is known, and the bias codes are rounded again from
    ///
    /// ```text
    /// b'[o] = b[o] − Σ_{j,k} (Ŵ − W)[o, j, k] · E[x_j] · covered[k]
    /// ```
    ///
    /// where covered is the share of output positions at which kernel tap k reads the input rather than zero padding (1
    /// where the input's extent is not known). Convolutions of any group count and `Gemm`; nodes without a bias input are
    /// left alone, and so are those whose input was never seen or whose bias was corrected before. The graph stays as it is: only bias codes change.
    INFO {
        name: "correct-bias",
        source: "Nagel et al. 2019, arXiv:1906.04721, section 4.2; coverage of padding ours",
        requires: Facts::ROUNDED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(CorrectBias)) };

/// See [`INFO`].
#[derive(Debug)]
struct CorrectBias;

impl Pass for CorrectBias {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        let graph = model.graph();
        graph
            .nodes()
            .filter(|(_, node)| cx.target.rule(&node.op).is_some())
            .filter_map(|(id, node)| Some((node, ops::linear(graph, id)?)))
            .filter(|(_, roles)| roles.bias.is_some())
            .filter_map(|(node, roles)| Some((node.input(roles.activation.into())?, Wish::Means { axis: 1 })))
            .filter(|(value, _)| crate::simulate::is_float_activation(graph, *value))
            .collect()
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let nodes: Vec<NodeId> = model.graph().nodes().map(|(id, _)| id).collect();
        for edit in parallel::map(&nodes, |id| corrected(model, *id)).into_iter().flatten() {
            patch.edit(edit);
            patch.count("corrected", 1);
        }
        Ok(patch)
    }
}

/// The new bias codes of node `id`, when it has a rounded weight, an encoded bias and a measured input.
fn corrected(model: &Model, id: NodeId) -> Option<Edit> {
    let graph = model.graph();
    let node = graph.node(id)?;
    let roles = ops::linear(graph, id)?;
    let site = Site::Use { node: id, input: roles.bias? };
    let encoding = model.plan().encoding(site)?;
    let weight = graph.constant_input(node, roles.weight.into())?;
    let bias = graph.constant_input(node, roles.bias?.into())?;
    // Codes other than those of the bias itself were corrected already, behind rounded layers.
    let values = bias.floats()?;
    let plain = encoding.encode(&values, bias.shape()).ok()?;
    model.plan().codes(site).is_none_or(|codes| **codes == plain).then_some(())?;
    let means = model.stats().means(node.input(roles.activation.into())?)?.means()?;
    let error = weight_error(model, id, &roles, weight)?;
    let shift = output_shift(graph, node, &roles, weight, &error, &means)?;
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
    let target: Vec<f32> = values.iter().zip(shift).map(|(b, s)| (f64::from(*b) - s) as f32).collect();
    let codes = encoding.encode(&target, bias.shape()).ok()?;
    Some(Edit::Round { site, codes: Arc::new(codes) })
}

/// Ŵ − W.
fn weight_error(model: &Model, id: NodeId, roles: &Linear, weight: &Tensor) -> Option<Vec<f64>> {
    let site = Site::Use { node: id, input: roles.weight };
    let rounded = model.plan().encoding(site)?.decode(model.plan().codes(site)?).ok()?;
    Some(rounded.iter().zip(weight.floats()?.iter()).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect())
}

/// The mean shift of every output channel.
fn output_shift(
    graph: &crate::ir::Graph,
    node: &Node,
    roles: &Linear,
    weight: &Tensor,
    error: &[f64],
    means: &[f64],
) -> Option<Vec<f64>> {
    let shape = weight.shape();
    match &*node.op.name {
        "Conv" => {
            let (outputs, inputs) = (shape[0], shape[1]);
            let groups = usize::try_from(node.int("group", 1)).ok().filter(|&g| g > 0)?;
            if inputs.checked_mul(groups) != Some(means.len()) || outputs % groups != 0 {
                return None;
            }
            let taps = coverage(graph, node, &shape[2..]);
            let shift = |o: usize| {
                let group = o / (outputs / groups);
                let of_input = |j: usize| {
                    let at = (o * inputs + j) * taps.len();
                    let row = error[at..at + taps.len()].iter().zip(&taps).map(|(e, c)| e * c).sum::<f64>();
                    row * means[group * inputs + j]
                };
                (0..inputs).map(of_input).sum()
            };
            Some((0..outputs).map(shift).collect())
        }
        "Gemm" => {
            let (rows, columns) = (shape[0], shape[1]);
            let (outputs, inputs) = if roles.out_axis == 0 { (rows, columns) } else { (columns, rows) };
            let at = |o: usize, j: usize| if roles.out_axis == 0 { o * columns + j } else { j * columns + o };
            let shift = |o: usize| (0..inputs).map(|j| error[at(o, j)] * means[j]).sum();
            (means.len() == inputs).then(|| (0..outputs).map(shift).collect())
        }
        _ => None,
    }
}

/// Strides, paddings and extents from here on are not worth the exact count, and could overflow it.
const MAX_GEOMETRY: i64 = 1 << 20;

/// Per kernel tap, the share of output positions at which it reads the input rather than padding.
fn coverage(graph: &crate::ir::Graph, node: &Node, kernel: &[usize]) -> Vec<f64> {
    let extents = node.input(0).and_then(|value| graph.value(value).ty.tensor()?.shape.clone());
    let list =
        |name: &str, at: usize, default: i64| node.ints(name).and_then(|l| l.get(at).copied()).unwrap_or(default);
    let explicit = node.text("auto_pad", "NOTSET") == "NOTSET";
    let mut taps = vec![1.0];
    for (axis, &size) in kernel.iter().enumerate() {
        let extent = extents.as_ref().and_then(|s| s.get(axis + 2)?.known()).and_then(|n| i64::try_from(n).ok());
        let (stride, dilation) = (list("strides", axis, 1).max(1), list("dilations", axis, 1));
        let (begin, end) = (list("pads", axis, 0), list("pads", axis + kernel.len(), 0));
        let sane = |v: &i64| (0..MAX_GEOMETRY).contains(v);
        if ![stride, dilation, begin, end, extent.unwrap_or(0)].iter().all(sane) || size >= 1 << 20 {
            taps = taps.iter().flat_map(|t| std::iter::repeat_n(*t, size)).collect();
            continue;
        }
        let reach = dilation * (i64::try_from(size).unwrap_or(1) - 1) + 1;
        let along: Vec<f64> = (0_i64..)
            .take(size)
            .map(|tap| match extent.filter(|_| explicit) {
                Some(n) if n + begin + end >= reach => {
                    let steps = (n + begin + end - reach) / stride + 1;
                    let inside = (0..steps).filter(|s| (0..n).contains(&(s * stride + tap * dilation - begin))).count();
                    inside as f64 / steps as f64
                }
                _ => 1.0,
            })
            .collect();
        taps = taps.iter().flat_map(|t| along.iter().map(move |a| t * a)).collect();
    }
    taps
}
