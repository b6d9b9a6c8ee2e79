//! Mean pools as convolutions.

use super::factors::{Factors, Instead, Readers};
use crate::id::NodeId;
use crate::ir::walk::Users;
use crate::ir::{Attr, Graph, Node, OpKey};
use crate::model::{Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns `GlobalAveragePool` over known extents into a depthwise convolution of the same size.
    ///
    /// Hardware generators divide the sum of a pool in a way of their own; a convolution they compute exactly. Its weights are the power
    /// of two nearest to one over the number of elements, which any number of bits holds, and the weights of the linear nodes behind it
    /// make up for the rest; where something else reads the result, they are one over that number.
    INFO {
        name: "pool-to-conv",
        source: "hls4ml 1.3.0, whose GlobalAveragePool differs from QONNX's reference executor while a depthwise Conv does not",
        cost: "One walk over the nodes.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(PoolToConv)) };

/// Larger pools would need more weights than a feature map is worth.
const MOST_TAPS: usize = 1 << 12;
/// The same for all pools of a model together.
const MOST_WEIGHTS: usize = 1 << 24;

/// See [`INFO`].
#[derive(Debug)]
struct PoolToConv;

impl Pass for PoolToConv {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let graph = model.graph();
        let users = Users::of(graph);
        let mut factors = Factors::default();
        let mut weights = 0_usize;
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("GlobalAveragePool")) {
            let Some(shape) = shape(graph, node).filter(|_| !cx.keep_float.contains_key(&*node.name)) else { continue };
            weights = weights.saturating_add(shape.iter().product());
            if weights > MOST_WEIGHTS {
                break;
            }
            let elements = shape[1..].iter().product::<usize>() as f64;
            let readers = node.output(0).and_then(|value| Readers::of(graph, &users, value));
            let free = |id: &NodeId| graph.node(*id).is_none_or(|node| !cx.keep_float.contains_key(&*node.name));
            // Another pool on the way has a factor of its own.
            let pools = |id: &NodeId| graph.node(*id).is_some_and(|node| node.op.is("GlobalAveragePool"));
            let taken = |readers: &Readers| {
                readers.linear.iter().chain(&readers.inside).all(free) && !readers.inside.iter().any(pools)
            };
            let tap = match readers.filter(taken) {
                Some(readers) => {
                    let tap = (-elements.log2().round()).exp2();
                    factors.add(&[id], &readers, tap * elements);
                    tap
                }
                None => 1.0 / elements,
            };
            factors.instead(id, convolution(node, &shape, tap));
            patch.count("pools", 1);
        }
        factors.apply(graph, &mut patch);
        Ok(patch)
    }
}

/// Channels and spatial extents of what `node` pools, where they are known and small.
fn shape(graph: &Graph, node: &Node) -> Option<Vec<usize>> {
    let ty = graph.value(node.input(0)?).ty.tensor().filter(|ty| ty.dtype == Some(DType::F32))?;
    let dims = ty.shape.as_ref()?;
    let known: Vec<usize> = dims.get(1..)?.iter().map(crate::ir::Dim::known).collect::<Option<_>>()?;
    let product = |extents: &[usize]| extents.iter().try_fold(1_usize, |all, n| all.checked_mul(*n));
    let fits = product(known.get(1..)?)? <= MOST_TAPS && product(&known)? <= MOST_WEIGHTS && !known.contains(&0);
    (known.len() >= 2 && fits).then_some(known)
}

/// A depthwise convolution over all of a tensor of `shape` (channels, then extents), with weights of `tap`.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn convolution(node: &Node, shape: &[usize], tap: f64) -> Instead {
    let wide = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let attrs = [
        ("kernel_shape".into(), Attr::Ints(shape[1..].iter().map(|&n| wide(n)).collect())),
        ("group".into(), Attr::Int(wide(shape[0]))),
    ];
    let op = OpKey { name: "Conv".into(), ..node.op.clone() };
    let weight = [&[shape[0], 1][..], &shape[1..]].concat();
    let taps = vec![tap as f32; weight.iter().product()];
    Instead::Operator {
        node: Node { op, attrs: attrs.into_iter().collect(), ..node.clone() },
        constants: vec![Tensor::of(weight, taps)],
    }
}
