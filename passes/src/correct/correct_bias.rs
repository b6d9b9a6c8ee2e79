//! The mean error of rounded weights, taken back in the bias.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::expected;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Node;
use crate::model::{Edit, Model, Patch};
use crate::ops::{self, Linear};
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
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
    /// With `means=trained` that mean is what batch normalization, folded into the layer before, saw in training, behind an activation that of
    /// a normal distribution which the activation cuts: no samples are needed, and few samples of few things do not mislead it. covered is the share of output positions at which kernel tap k reads the input rather than zero padding (1
    /// where the input's extent is not known). Convolutions of any group count and `Gemm`; nodes without a bias input are
    /// left alone, and so are those whose input was never seen or whose bias was corrected before. The graph stays as it is: only bias codes change.
    INFO {
        name: "correct-bias",
        source: "Nagel et al. 2019, arXiv:1906.04721, section 4.2 and, for means=trained, appendix C; coverage of padding ours",
        cost: "m d multiply-adds per weight; means come from `calibrate`.",
        requires: Facts::ROUNDED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo {
            name: "means",
            doc: "measured (default), by samples; trained, by what batch normalizations before saw in training, where they say it, and by samples \
                  elsewhere",
        }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(CorrectBias::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct CorrectBias {
    by_training: bool,
}

impl CorrectBias {
    fn new(options: &Options) -> Result<Self, OptionError> {
        match options.text("means", "measured") {
            "measured" => Ok(Self { by_training: false }),
            "trained" => Ok(Self { by_training: true }),
            other => {
                let problem = format!("`{other}` is none of measured, trained");
                Err(OptionError { option: "means".into(), problem })
            }
        }
    }
}

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
        for edit in parallel::map(&nodes, |id| corrected(model, *id, self.by_training)).into_iter().flatten() {
            patch.edit(edit);
            patch.count("corrected", 1);
        }
        Ok(patch)
    }
}

/// The new bias codes of node `id`, when it has a rounded weight, an encoded bias and an input whose means are known.
fn corrected(model: &Model, id: NodeId, by_training: bool) -> Option<Edit> {
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
    let value = node.input(roles.activation.into())?;
    let trained = if by_training { expected::means(model, value) } else { None };
    let means = trained.or_else(|| model.stats().means(value)?.means())?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Attr, Attrs, Builder, Graph, OpKey, TensorType, Type};
    use crate::seed::{mixed, uniform};
    use crate::tensor::DType;

    /// A graph of one `op` that reads a tensor of `shape`, and `weight`.
    fn graph(op: &str, attrs: Attrs, shape: &[usize], weight: &Tensor) -> Graph {
        let mut builder = Builder::new("one", "");
        let x = builder.input("x", Type::Tensor(TensorType::known(DType::F32, shape))).unwrap();
        let w = builder.constant("w", Arc::new(weight.clone())).unwrap();
        let node = Node {
            name: "node".into(),
            op: OpKey { domain: "".into(), name: op.into(), opset: 21 },
            inputs: vec![Some(x), Some(w)],
            outputs: vec![Some(builder.value("y"))],
            attrs,
            bodies: Vec::new(),
            notes: None,
        };
        builder.node(node).unwrap();
        builder.output("y");
        builder.finish().unwrap()
    }

    /// What the pass says that `error` in `weight` does.
    fn shift(graph: &Graph, weight: &Tensor, error: &[f64], means: &[f64]) -> Vec<f64> {
        let (id, node) = graph.nodes().next().unwrap();
        let roles = ops::linear(graph, id).unwrap();
        output_shift(graph, node, &roles, weight, error, means).unwrap()
    }

    fn random(seed: u64, n: usize) -> Vec<f64> {
        (0..n as u64).map(|i| 2.0 * uniform(seed << 32 | i) - 1.0).collect()
    }

    fn assert_near(got: &[f64], want: &[f64], what: &dyn std::fmt::Debug) {
        assert_eq!(got.len(), want.len(), "{what:?}");
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-9), "{what:?}: {got:?} {want:?}");
    }

    /// Zero error shifts nothing, and errors add up.
    fn assert_linear(graph: &Graph, weight: &Tensor, means: &[f64]) {
        let (a, b) = (random(8, weight.len()), random(9, weight.len()));
        let of = |error: &[f64]| shift(graph, weight, error, means);
        assert!(of(&vec![0.0; weight.len()]).iter().all(|shift| *shift == 0.0));
        let both: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - 3.0 * b).collect();
        let want: Vec<f64> = of(&a).iter().zip(of(&b)).map(|(a, b)| a - 3.0 * b).collect();
        assert_near(&of(&both), &want, weight);
    }

    /// The geometry of a convolution over two axes.
    #[derive(Debug)]
    struct Conv {
        groups: usize,
        shape: [usize; 4],
        weight: [usize; 4],
        strides: [usize; 2],
        dilations: [usize; 2],
        pads: [usize; 4],
    }

    impl Conv {
        /// A random one; `None` where the kernel is larger than what it reads.
        fn drawn(seed: u64) -> Option<Self> {
            let below = |at: u64, n: u64| usize::try_from(mixed(seed << 32 | at) % n).unwrap();
            let (groups, inputs) = (1 + below(0, 3), 1 + below(1, 3));
            let made = Self {
                groups,
                shape: [2, groups * inputs, 1 + below(2, 8), 1 + below(3, 8)],
                weight: [groups * (1 + below(4, 2)), inputs, 1 + below(5, 3), 1 + below(6, 3)],
                strides: [1 + below(7, 3), 1 + below(8, 3)],
                dilations: [1 + below(9, 2), 1 + below(10, 2)],
                pads: [below(11, 3), below(12, 3), below(13, 3), below(14, 3)],
            };
            (made.outputs(0).is_some() && made.outputs(1).is_some()).then_some(made)
        }

        fn outputs(&self, axis: usize) -> Option<usize> {
            let reach = self.dilations[axis] * (self.weight[axis + 2] - 1) + 1;
            let padded = self.shape[axis + 2] + self.pads[axis] + self.pads[axis + 2];
            Some(padded.checked_sub(reach)? / self.strides[axis] + 1)
        }

        fn attrs(&self) -> Attrs {
            let ints = |values: &[usize]| Attr::Ints(values.iter().map(|&v| i64::try_from(v).unwrap()).collect());
            Attrs::from([
                ("group".into(), Attr::Int(i64::try_from(self.groups).unwrap())),
                ("strides".into(), ints(&self.strides)),
                ("dilations".into(), ints(&self.dilations)),
                ("pads".into(), ints(&self.pads)),
            ])
        }

        /// The mean, over all positions, of the convolution with `error` of a tensor whose channels are `means`.
        fn by_definition(&self, error: &[f64], means: &[f64]) -> Vec<f64> {
            let [outputs, inputs, height, width] = self.weight;
            let (lines, columns) = (self.outputs(0).unwrap(), self.outputs(1).unwrap());
            let is_inside = |axis: usize, at: usize, tap: usize| {
                let read = (at * self.strides[axis] + tap * self.dilations[axis]).checked_sub(self.pads[axis]);
                read.is_some_and(|read| read < self.shape[axis + 2])
            };
            let of = |o: usize| {
                let mut sum = 0.0;
                for (line, column) in (0..lines).flat_map(|line| (0..columns).map(move |column| (line, column))) {
                    for at in 0..inputs * height * width {
                        let (j, tap) = (at / (height * width), at % (height * width));
                        if is_inside(0, line, tap / width) && is_inside(1, column, tap % width) {
                            let channel = o / (outputs / self.groups) * inputs + j;
                            sum += error[o * inputs * height * width + at] * means[channel];
                        }
                    }
                }
                sum / (lines * columns) as f64
            };
            (0..outputs).map(of).collect()
        }
    }

    #[test]
    fn shifts_of_convolutions_are_those_of_a_constant_input() {
        let mut tested = 0;
        for (seed, conv) in (0..120).filter_map(|seed| Some((seed, Conv::drawn(seed)?))) {
            tested += 1;
            let weight = Tensor::of(conv.weight, vec![0.0_f32; conv.weight.iter().product()]);
            let graph = graph("Conv", conv.attrs(), &conv.shape, &weight);
            let (error, means) = (random(2 * seed, weight.len()), random(2 * seed + 1, conv.shape[1]));
            assert_near(&shift(&graph, &weight, &error, &means), &conv.by_definition(&error, &means), &conv);
            assert_linear(&graph, &weight, &means);
        }
        assert!(tested > 60, "{tested}");
    }

    #[test]
    fn shifts_of_products_are_those_of_a_constant_input() {
        for transposed in [0, 1] {
            let (outputs, inputs) = (3, 5);
            let shape = if transposed == 1 { [outputs, inputs] } else { [inputs, outputs] };
            let weight = Tensor::of(shape, vec![0.0_f32; 15]);
            let attrs = Attrs::from([("transB".into(), Attr::Int(transposed))]);
            let graph = graph("Gemm", attrs, &[4, inputs], &weight);
            let (error, means) = (random(1, 15), random(2, inputs));
            let at = |o: usize, j: usize| if transposed == 1 { o * inputs + j } else { j * outputs + o };
            let of = |o: usize| (0..inputs).map(|j| error[at(o, j)] * means[j]).sum::<f64>();
            let want: Vec<f64> = (0..outputs).map(of).collect();
            assert_near(&shift(&graph, &weight, &error, &means), &want, &transposed);
            assert_linear(&graph, &weight, &means);
        }
    }
}
