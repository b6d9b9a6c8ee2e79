//! Attention whose weights are divided by their sum after the product.

use crate::id::{NodeId, ValueId};
use crate::ir::{Attr, Attrs, Dim, Node, OpKey, TensorType, Type};
use crate::model::Patch;
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Lets a product that reads a `Softmax` read exponentials instead, and divides what it computes by their sum:
    /// softmax(s) V = (e V) / Σ e, with e = exp(s − max s) · clip(s − max s + 101, 0, 1).
    ///
    /// The largest number of every row is 1 then, however even the row is: in few codes of one range, rows whose weights are many and small
    /// keep theirs. The second factor is 0 for what is masked and 1 for everything that f32 can tell from 0: codes of s − max s, of which the
    /// lowest is no mask, leave it as it is. The same numbers are computed, in seven nodes more. Declines where anything else reads the
    /// softmax, where it is not along the last axis, and where the user keeps it or its reader in float.
    INFO {
        name: "defer-softmax",
        source: "deferred division: Dao et al. 2022 (FlashAttention), arXiv:2205.14135, section 3.1; for the sake of few codes, ours",
        cost: "One walk over the nodes; when the model runs, a maximum, a difference, a sum and a division per row of attention.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(DeferSoftmax))) };

/// See [`INFO`].
#[derive(Debug)]
struct DeferSoftmax;

/// e to the minus this is 0 beside 1, and the reach of masks is far beyond.
const REACH: f32 = 100.0;

impl Rewrite for DeferSoftmax {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Softmax"]
    }

    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let graph = site.graph();
        let softmax = site.node;
        let (scores, weights) = softmax.input(0).zip(softmax.output(0)).ok_or(Miss::NoMatch)?;
        let (reader, input) = site.users.only_input(weights).ok_or(Miss::NoMatch)?;
        let product = graph.node(reader).filter(|node| node.op.is("MatMul") && input == 0).ok_or(Miss::NoMatch)?;
        let values = product.input(1).filter(|value| graph.constant(*value).is_none()).ok_or(Miss::NoMatch)?;
        let kept = |name: &str| site.keep_float.contains_key(name);
        let mut tensors = product.inputs.iter().chain(&product.outputs).flatten();
        if kept(&softmax.name) || kept(&product.name) || tensors.any(|value| kept(&graph.value(*value).name)) {
            return Err(Miss::NoMatch);
        }
        // A vector would lose an axis that its sum keeps.
        graph.value(values).ty.rank().filter(|rank| *rank >= 2).ok_or(Miss::NoMatch)?;
        let plan = site.model.plan();
        if patch.touches(reader) || plan.encodes_any_of(graph, site.id) || plan.encodes_any_of(graph, reader) {
            return Err(Miss::NoMatch);
        }
        let tensor = graph.value(scores).ty.tensor().filter(|ty| ty.dtype == Some(DType::F32)).ok_or(Miss::NoMatch)?;
        let rank = tensor.rank().filter(|rank| *rank >= 2).ok_or(Miss::NoMatch)?;
        let axis = softmax.int("axis", -1);
        if axis != -1 && usize::try_from(axis) != Ok(rank - 1) {
            return Err(Miss::Blocked("it is not along the last axis, which the product sums over".into()));
        }
        let deferred = Deferred { softmax, before: reader };
        let (exponentials, sum) = deferred.exponentials(patch, scores, tensor, rank);
        let output = product.output(0).ok_or(Miss::NoMatch)?;
        // The product keeps its name: people know it by that.
        let inner = Node { inputs: vec![Some(exponentials), Some(values)], outputs: Vec::new(), ..product.clone() };
        let name = format!("{}.undivided", graph.value(output).name);
        let inner = patch.node(inner, &name, graph.value(output).ty.clone(), Some(reader));
        patch.replace(reader, Node { outputs: product.outputs.clone(), ..deferred.operator("Div", &[inner, sum]) });
        patch.erase(site.id);
        patch.count("softmaxes", 1);
        Ok(())
    }
}

/// What takes the place of a softmax.
struct Deferred<'a> {
    softmax: &'a Node,
    /// The product.
    before: NodeId,
}

impl Deferred<'_> {
    /// Adds the exponentials of `scores`, a tensor of that type and rank, and their sum along the last axis.
    fn exponentials(&self, patch: &mut Patch, scores: ValueId, ty: &TensorType, rank: usize) -> (ValueId, ValueId) {
        let dims = ty.shape.as_ref().map(|dims| [&dims[..rank - 1], &[Dim::Known(1)]].concat());
        let (rows, whole) = (Type::Tensor(TensorType::new(ty.dtype, dims)), Type::Tensor(ty.clone()));
        let named = |what: &str| format!("{}.{what}", self.softmax.name);
        let axes = patch.constant(&named("axes"), Tensor::of([1], vec![-1_i64]));
        let [reach, none, all] = [("reach", REACH + 1.0), ("none", 0.0), ("all", 1.0)]
            .map(|(what, value)| patch.constant(&named(what), Tensor::of([], vec![value])));
        let most = self.node(patch, "ReduceMax", &[scores, axes], rows.clone());
        let below = self.node(patch, "Sub", &[scores, most], whole.clone());
        let exponentials = self.node(patch, "Exp", &[below], whole.clone());
        let above = self.node(patch, "Add", &[below, reach], whole.clone());
        let open = self.node(patch, "Clip", &[above, none, all], whole.clone());
        let masked = self.node(patch, "Mul", &[exponentials, open], whole);
        (masked, self.node(patch, "ReduceSum", &[masked, axes], rows))
    }

    fn operator(&self, op: &str, inputs: &[ValueId]) -> Node {
        let mut attrs = Attrs::new();
        if op.starts_with("Reduce") {
            attrs.insert("keepdims".into(), Attr::Int(1));
        }
        Node {
            name: format!("{}.{op}", self.softmax.name).into(),
            op: OpKey { domain: "".into(), name: op.into(), opset: self.softmax.op.opset },
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: Vec::new(),
            attrs,
            bodies: Vec::new(),
            notes: None,
        }
    }

    fn node(&self, patch: &mut Patch, op: &str, inputs: &[ValueId], ty: Type) -> ValueId {
        patch.node(self.operator(op, inputs), &format!("{}.{op}", self.softmax.name), ty, Some(self.before))
    }
}
