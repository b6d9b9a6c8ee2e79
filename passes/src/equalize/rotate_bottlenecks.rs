//! Rotation of linear bottlenecks.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::hadamard::Hadamard;
use super::region::{self, Region};
use super::rotate;
use crate::id::NodeId;
use crate::ir::Graph;
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Turns the channels of linear bottlenecks into another basis, in which none stands out: x' = x Q, Q a Hadamard matrix with random
    /// signs.
    ///
    /// A bottleneck is what convolutions hand on to convolutions with nothing but sums and averages between: no activation looks at its
    /// channels one by one. So the outputs of the weights that write to it, and their biases, are multiplied by Q, the inputs of those
    /// that read it by Qᵀ, and no node is added. Inverted residuals have one in every block. Convolutions in groups keep their channels
    /// apart, and leave a bottleneck as it is.
    INFO {
        name: "rotate-bottlenecks",
        source: "rotation: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; linear bottlenecks: Sandler et al. 2018, \
                 arXiv:1801.04381, section 3.2; of channels between convolutions ours",
        cost: "d log d multiply-adds for every d weights along the turned channels; no data.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "seed", doc: "which random signs, 0 by default" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(RotateBottlenecks::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct RotateBottlenecks {
    seed: u64,
}

impl RotateBottlenecks {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { seed: rotate::seed(options)? })
    }
}

/// Behind the names of what is turned: once is enough.
const TURNED: &str = ".turned";

impl Pass for RotateBottlenecks {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let mut patch = Patch::on(model);
        // A convolution between two bottlenecks is turned on both sides.
        let mut turned: BTreeMap<NodeId, Turned> = BTreeMap::new();
        for region in region::free_regions(graph, cx, false) {
            let both = || region.sources.iter().chain(&region.sinks);
            let parts: Option<Vec<Turned>> = both().map(|id| Turned::of(model, cx, *id)).collect();
            let (Some(parts), true) = (parts, is_linear(graph, &region)) else { continue };
            for (id, part) in both().zip(parts) {
                turned.entry(*id).or_insert(part);
            }
            let rotation = Hadamard::new(region.channels, self.seed);
            let of = |ids: &[NodeId]| ids.iter().copied().collect::<BTreeSet<NodeId>>();
            for id in of(&region.sources) {
                turned.entry(id).and_modify(|turned| turned.outputs(&rotation));
            }
            for id in of(&region.sinks) {
                turned.entry(id).and_modify(|turned| turned.inputs(&rotation));
            }
            patch.count("bottlenecks", 1);
        }
        for (id, turned) in turned {
            turned.replace(graph, id, &mut patch);
        }
        Ok(patch)
    }
}

/// Whether every basis does for the channels of `region`, which are only added up and averaged, and there is one that mixes them.
fn is_linear(graph: &Graph, region: &Region) -> bool {
    let is_linear = |id: &NodeId| {
        let node = graph.node(*id);
        node.is_some_and(|node| ["Add", "Identity", "AveragePool", "GlobalAveragePool"].iter().any(|op| node.op.is(op)))
    };
    let reads = |id: &NodeId| Some(graph.constant_input(graph.node(*id)?, 1)?.shape()[1]);
    let fits = region.sinks.iter().all(|id| reads(id) == Some(region.channels));
    fits && region.channels > 0 && region.channels.is_multiple_of(2) && region.inside.iter().all(is_linear)
}

/// A convolution with other weights.
struct Turned {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Turned {
    /// The convolution `id` as it is; `None` for one in groups, one that was turned before or is in codes, one whose numbers are not
    /// finite, and one whose weight the user named.
    fn of(model: &Model, cx: &PassContext<'_>, id: NodeId) -> Option<Self> {
        let graph = model.graph();
        let node = graph.node(id)?;
        let name = &graph.value(node.input(1)?).name;
        let is_named = cx.schemes.contains_key(&**name) && !cx.schemes.contains_key(&*node.name);
        let is_free = !name.ends_with(TURNED) && !is_named && !model.plan().encodes_any_of(graph, id);
        let weight = graph.constant_input(node, 1).filter(|_| is_free && node.int("group", 1) == 1)?;
        let bias = graph.constant_input(node, 2);
        let is_finite = |tensor: &Tensor| tensor.floats().is_some_and(|all| all.iter().all(|v| v.is_finite()));
        let is_row = |bias: &Tensor| weight.shape().get(..1) == Some(bias.shape());
        let fits = is_finite(weight) && bias.is_none_or(|bias| is_finite(bias) && is_row(bias));
        fits.then(|| Self { weight: weight.as_ref().clone(), bias: bias.map(|bias| bias.as_ref().clone()) })
    }

    /// The same convolution, whose result is turned by `rotation`.
    fn outputs(&mut self, rotation: &Hadamard) {
        self.weight = along(&self.weight, 0, rotation);
        self.bias = self.bias.take().map(|bias| along(&bias, 0, rotation));
    }

    /// The same convolution, of what is turned by `rotation`.
    fn inputs(&mut self, rotation: &Hadamard) {
        self.weight = along(&self.weight, 1, rotation);
    }

    /// Puts it in the place of `id`.
    fn replace(self, graph: &Graph, id: NodeId, patch: &mut Patch) {
        let Some(node) = graph.node(id) else { return };
        let mut copy = node.clone();
        let parts = [(1, Some(self.weight)), (2, self.bias)];
        for (input, tensor) in parts.into_iter().filter_map(|(input, tensor)| Some((input, tensor?))) {
            let Some(Some(value)) = copy.inputs.get_mut(input) else { continue };
            *value = patch.constant(&format!("{}{TURNED}", graph.value(*value).name), tensor);
        }
        patch.replace(id, copy);
    }
}

/// Every vector of `tensor` along `axis` times Q.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn along(tensor: &Tensor, axis: usize, rotation: &Hadamard) -> Tensor {
    let (Some(values), shape) = (tensor.values::<f32>(), tensor.shape()) else { return tensor.clone() };
    let (n, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
    let mut values = values.into_owned();
    values.par_chunks_exact_mut((n * inner).max(1)).for_each(|slab| {
        let mut vector = vec![0.0; n];
        for at in 0..inner {
            vector.iter_mut().enumerate().for_each(|(i, v)| *v = f64::from(slab[i * inner + at]));
            rotation.apply(&mut vector);
            vector.iter().enumerate().for_each(|(i, v)| slab[i * inner + at] = *v as f32);
        }
    });
    Tensor::of(shape, values)
}
