//! Clamps that end where codes end.

use super::factors::{Factors, Instead, Readers, is_linear};
use crate::id::NodeId;
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::target::Activations;

crate::declare_pass! {
    /// Moves clamps from 0 to a number, such as `Clip(0, 6)`, to where unsigned codes at a power-of-two scale end.
    ///
    /// With `s = (2^bits - 1) 2^k / high`, k the whole number that brings s nearest to 1, the weight and bias in front of the clamp are
    /// multiplied by s, its upper end with them, and the weights behind it divided by s: `clip(s x, 0, s high) = s clip(x, 0, high)`. The
    /// function is the same, all codes are used, and the quantizer saturates exactly where the clamp did, which then is none any more:
    /// hardware without clamps computes the model as it was trained. Nothing is done where something else than linear nodes, pools and
    /// data movement reads the result, or where scales need not be powers of two.
    INFO {
        name: "fit-clamps",
        source: "positive homogeneity as in Nagel et al. 2019, arXiv:1906.04721, section 4.1, applied to bounded activations",
        cost: "One walk over the nodes; every weight beside a clamp is written once.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(FitClamps)) };

/// See [`INFO`].
#[derive(Debug)]
struct FitClamps;

impl Pass for FitClamps {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let unsigned = cx.target.accepts().activations == Activations::BySign;
        let Some(bits) = cx.scheme.activation_bits.filter(|_| unsigned && cx.scheme.power_of_two) else {
            return Ok(patch);
        };
        let graph = model.graph();
        let mut factors = Factors::default();
        let users = Users::of(graph);
        for (id, node) in graph.nodes() {
            if let Some(clamp) = Clamp::at(graph, &users, cx, id, node) {
                let factor = clamp.factor(bits);
                if (factor - 1.0).abs() < f64::from(f32::EPSILON) {
                    continue; // it ends there already
                }
                factors.add(&[clamp.source, clamp.id], &clamp.readers, factor);
                factors.read(clamp.id, factor);
                factors.instead(clamp.id, Instead::Clamp { high: factor * clamp.high });
                patch.count("clamps", 1);
            }
        }
        factors.apply(graph, &mut patch);
        Ok(patch)
    }
}

/// A clamp between linear nodes.
struct Clamp {
    id: NodeId,
    high: f64,
    /// The linear node that it clamps.
    source: NodeId,
    readers: Readers,
}

impl Clamp {
    fn at(graph: &Graph, users: &Users, cx: &PassContext<'_>, id: NodeId, node: &Node) -> Option<Self> {
        let bound = |input: usize| graph.constant_input(node, input)?.floats()?.first().copied();
        let (low, high) = (bound(1)?, bound(2)?);
        (node.op.is("Clip") && low == 0.0 && high > 0.0 && high.is_finite()).then_some(())?;
        let (source, _) = graph.producer(node.input(0)?)?;
        users.only_input(node.input(0)?)?;
        let readers = Readers::of(graph, users, node.output(0)?)?;
        let kept = |id: &NodeId| graph.node(*id).is_some_and(|node| cx.keep_float.contains_key(&*node.name));
        let free = ![source, id].iter().chain(&readers.inside).chain(&readers.linear).any(kept);
        (is_linear(graph, source, 0) && free).then(|| Self { id, high: f64::from(high), source, readers })
    }

    /// What brings the upper end to that of unsigned codes of so many bits at a power of two.
    fn factor(&self, bits: u32) -> f64 {
        let levels = f64::from(bits).exp2() - 1.0;
        levels * (self.high / levels).log2().round().exp2() / self.high
    }
}
