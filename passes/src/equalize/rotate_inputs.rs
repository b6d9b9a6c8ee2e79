//! Rotation of what matrix products read, while the model runs.

use std::collections::BTreeSet;

use super::divided::{Group, groups};
use super::hadamard::Hadamard;
use super::rotate;
use crate::exec::Dataset;
use crate::id::{NodeId, ValueId};
use crate::ir::{Attrs, Dim, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Model, Patch};
use crate::observe::{self, Purpose, Sketch};
use crate::ops;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns what matrix products with a constant weight read into another basis, in which no channel of a token stands out: x Q,
    /// with Qᵀ W for W; Q a Hadamard matrix with random signs.
    ///
    /// A model pays for it whenever it runs: two products by matrices of about as many rows as the square root of its channels, before
    /// every tensor that is read so. What costs nothing is `rotate`, for models that it can prove. Meant for integers of few bits. Left alone are
    /// tensors that lose less in as many codes as they are than numbers of a normal distribution would, which is what they come to by a
    /// rotation (those behind a `Relu` most of all), and those of an odd number of channels.
    INFO {
        name: "rotate-inputs",
        source: "Ashkboos et al. 2024, arXiv:2404.00456 (online Hadamard transforms, section 4, stage 1c and 1d)",
        cost: "The same products as `rotate` when quantizing; when the model runs, about 2 √d multiply-adds per number that is turned.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "seed", doc: "which random signs, 0 by default" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(RotateInputs::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct RotateInputs {
    seed: u64,
}

impl RotateInputs {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { seed: rotate::seed(options)? })
    }
}

impl Pass for RotateInputs {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if cx.dataset.is_none_or(Dataset::is_empty) {
            return BTreeSet::new(); // all that can be turned is
        }
        groups(model.graph(), cx).into_iter().map(|group| (group.value, Wish::Distribution)).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let mut patch = Patch::on(model);
        let pays = |value: ValueId| {
            let bits = cx.scheme.activation_bits.unwrap_or(8);
            model.stats().distribution(value).is_none_or(|sketch| pays(sketch, bits))
        };
        let wanted = |group: &&Group| !is_turned(graph, group.value) && pays(group.value);
        for group in groups(graph, cx).iter().filter(wanted) {
            let mark = patch.mark();
            if turn(graph, group, self.seed, &mut patch).is_some() {
                patch.count("tensors", 1);
                patch.count("weights", group.sinks.len() as u64);
            } else {
                patch.roll_back(&mark);
            }
        }
        Ok(patch)
    }
}

/// The mean squared error of the best uniform steps for N(0, 1) in 1, 2, … bits. Source: Max 1960, "Quantizing for minimum
/// distortion", table II; beyond 5 bits by its ratio.
const NORMAL: [f64; 8] = [0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000_31, 0.000_09];

/// Whether values like those of `sketch` lose more in codes of so many `bits` than those of a normal distribution.
fn pays(sketch: &Sketch, bits: u32) -> bool {
    let Some(normal) = (bits as usize).checked_sub(1).and_then(|at| NORMAL.get(at)) else { return false };
    let levels = f64::from(bits).exp2();
    let mse = observe::find("mse", None);
    mse.is_some_and(|mse| {
        let (low, high) = mse.range(sketch, Purpose { levels, symmetric: false });
        let (signal, error) =
            observe::expected_error(sketch, (low, high), (high - low) / (levels - 1.0), f64::INFINITY);
        error > normal * signal
    })
}

/// Whether `value` comes out of such a rotation already: of a product with a matrix of ±1 / √n in a batch of one.
fn is_turned(graph: &Graph, value: ValueId) -> bool {
    let product = || {
        let (_, back) = graph.producer(value).filter(|(_, node)| node.op.is("Reshape"))?;
        graph.producer(back.input(0)?).filter(|(_, node)| node.op.is("MatMul"))
    };
    product().is_some_and(|(_, node)| {
        (0..2).filter_map(|input| graph.constant_input(node, input)).any(|matrix| match *matrix.shape() {
            [1, n, m] if n == m => {
                let size = 1.0 / (n as f32).sqrt();
                matrix.floats().is_some_and(|values| values.iter().all(|v| (v.abs() - size).abs() < 1e-6))
            }
            _ => false,
        })
    })
}

/// Lets the products of `group` read it turned.
fn turn(graph: &Graph, group: &Group, seed: u64, patch: &mut Patch) -> Option<()> {
    let first = *group.sinks.first()?;
    let channels = inputs(graph, first).filter(|channels| *channels > 1)?;
    let q = Hadamard::separable(channels, seed);
    let turned = Online { graph, value: group.value, before: first }.turned(&q, patch)?;
    for &id in &group.sinks {
        let (node, roles) = (graph.node(id)?, ops::linear(graph, id)?);
        let weight = graph.constant_input(node, roles.weight.into())?;
        // Q applies to rows of inputs: those of a weight that is stored by output.
        let made = if roles.out_axis == 0 {
            rotate::rows(weight, None, &q)?
        } else {
            rotate::rows(&weight.transposed()?, None, &q)?.transposed()?
        };
        let name = format!("{}.turned", graph.value(node.input(1)?).name);
        let mut copy = node.clone();
        copy.inputs[0] = Some(turned);
        copy.inputs[1] = Some(patch.constant(&name, made));
        patch.replace(id, copy);
    }
    Some(())
}

/// How many inputs the product `id` sums over.
fn inputs(graph: &Graph, id: NodeId) -> Option<usize> {
    let roles = ops::linear(graph, id)?;
    graph.constant_input(graph.node(id)?, roles.weight.into())?.shape().get(1 - roles.out_axis).copied()
}

/// A tensor that is turned while the model runs, by nodes before another.
struct Online<'a> {
    graph: &'a Graph,
    value: ValueId,
    before: NodeId,
}

impl Online<'_> {
    /// x Q; `None` where Q would change nothing, or the number of extents is not known.
    fn turned(&self, q: &Hadamard, patch: &mut Patch) -> Option<ValueId> {
        let source = self.graph.value(self.value);
        let tensor = source.ty.tensor()?;
        let rank = tensor.rank().filter(|rank| *rank >= 2)?;
        let (left, right) = q.factors();
        (left.len() * right.len() > 1).then_some(())?;
        let whole = left.len() * right.len() == q.len();
        let blocks = q.len() / (left.len() * right.len());
        let cut: Vec<usize> =
            [(!whole).then_some(blocks), Some(left.len()), Some(right.len())].into_iter().flatten().collect();
        let outer = tensor.shape.as_ref().map(|shape| shape[..rank - 1].to_vec());
        let typed = |last: &[usize]| {
            let dims =
                outer.clone().map(|outer| outer.into_iter().chain(last.iter().map(|n| Dim::Known(*n))).collect());
            Type::Tensor(TensorType::new(Some(DType::F32), dims))
        };
        let inner = typed(&cut);
        let name = |what: &str| format!("{}.{what}", source.name);
        // An extent of 0 stands for that of the input.
        let shape = |last: &[usize]| {
            let last = last.iter().map(|n| i64::try_from(*n).unwrap_or(i64::MAX));
            let dims: Vec<i64> = std::iter::repeat_n(0, rank - 1).chain(last).collect();
            Tensor::of([dims.len()], dims)
        };
        let to = patch.constant(&name("cut"), shape(&cut));
        let mut value = self.node(patch, "Reshape", &name("cut"), [self.value, to], inner.clone());
        if right.len() > 1 {
            let matrix = constant(patch, &name("basis"), &right);
            value = self.node(patch, "MatMul", &name("inner"), [value, matrix], inner.clone());
        }
        if left.len() > 1 {
            let matrix = constant(patch, &name("basis"), &left);
            value = self.node(patch, "MatMul", &name("outer"), [matrix, value], inner);
        }
        let back = patch.constant(&name("whole"), shape(&[q.len()]));
        Some(self.node(patch, "Reshape", &name("turned"), [value, back], typed(&[q.len()])))
    }

    fn node(&self, patch: &mut Patch, op: &str, name: &str, inputs: [ValueId; 2], ty: Type) -> ValueId {
        let opset = self.graph.node(self.before).map_or(21, |node| node.op.opset);
        let node = Node {
            name: format!("{name}.{op}").into(),
            op: OpKey { domain: "".into(), name: op.into(), opset },
            inputs: inputs.map(Some).to_vec(),
            outputs: Vec::new(),
            attrs: Attrs::new(),
            bodies: Vec::new(),
            notes: None,
        };
        patch.node(node, name, ty, Some(self.before))
    }
}

/// A square matrix, as one of a batch of one: it is no weight.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
fn constant(patch: &mut Patch, name: &str, rows: &[Vec<f64>]) -> ValueId {
    let values = rows.iter().flatten().map(|v| *v as f32).collect();
    patch.constant(name, Tensor::of([1, rows.len(), rows.len()], values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::uniform;

    /// A normal distribution, filled evenly: what random numbers lose depends on the outermost.
    fn normal() -> impl Iterator<Item = f64> {
        let n = 10_000;
        (0..n).map(move |i| {
            let radius = (-2.0 * (1.0 - (f64::from(i) + 0.5) / f64::from(n)).ln()).sqrt();
            radius * (std::f64::consts::TAU * (f64::from(i) * 0.618_033_988_7).fract()).cos()
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "tensors are f32")]
    fn sketch(values: impl Iterator<Item = f64>) -> Sketch {
        let values: Vec<f32> = values.map(|v| v as f32).collect();
        let mut sketch = Sketch::default();
        sketch.see(&values);
        sketch
    }

    #[test]
    fn turning_pays_for_spikes_and_not_for_what_is_even_or_normal_already() {
        let spiky = sketch(normal().map(|v| v.powi(3)));
        let even = sketch((0..10_000).map(|i| 2.0 * uniform(i) - 1.0));
        for bits in 2..=8 {
            assert!(pays(&spiky, bits) && !pays(&even, bits), "{bits} bits");
        }
        assert!(!pays(&sketch(normal()), 4));
        assert!(!pays(&spiky, 16) && !pays(&spiky, 0), "there is no telling");
    }
}
