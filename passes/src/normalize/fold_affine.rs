//! Constant factors and terms into the linear operator before them.

use super::scale_linear::Scaled;
use crate::ir::Node;
use crate::model::Patch;
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Folds a multiplication, division, addition or subtraction by a constant per channel into the `Conv`,
    /// `ConvTranspose`, `Gemm` or `MatMul` that feeds it; so batch norm written as `Mul` and `Add` folds too.
    ///
    /// ```text
    /// y · s:  W'[o, …] = s[o] · W[o, …],  b'[o] = s[o] · b[o]
    /// y + t:  b'[o] = b[o] + t[o]
    /// ```
    ///
    /// Equal over the reals; computed in f64 and rounded once. `MatMul` takes factors only: it has no bias. Declines when
    /// the linear result has another reader, when the constant varies along another axis than the channels, and when
    /// broadcasting would enlarge the result.
    INFO {
        name: "fold-affine",
        source: "Jacob et al. 2018, arXiv:1712.05877, section 3.2",
        cost: "One walk over the nodes; every weight that folds is written once.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(FoldAffine))) };

/// See [`INFO`].
#[derive(Debug)]
struct FoldAffine;

impl Rewrite for FoldAffine {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Mul", "Div", "Add", "Sub"]
    }

    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let graph = site.graph();
        let (computed, constant, swapped) = operands(site).ok_or(Miss::NoMatch)?;
        let value = site.node.input(computed).ok_or(Miss::NoMatch)?;
        let (producer, _) = site.sole_producer(value).ok_or(Miss::NoMatch)?;
        if site.model.plan().encodes_any_of(graph, site.id) {
            return Err(Miss::NoMatch);
        }
        let linear = Scaled::of(site.model, producer).ok_or(Miss::NoMatch)?;
        let tensor = graph.constant_input(site.node, constant).ok_or(Miss::NoMatch)?;
        let rank = linear.fixed_rank().ok_or(Miss::NoMatch)?;
        let row = per_channel(tensor, rank, linear.channel_axis(rank), linear.channels).ok_or(Miss::NoMatch)?;
        let (scale, shift) = affine(site.node, swapped, &row).ok_or(Miss::NoMatch)?;
        if patch.touches(producer) || (shift.iter().any(|&t| t != 0.0) && !linear.takes_bias()) {
            return Err(Miss::NoMatch);
        }
        let mut folded = linear.fold(&scale, &shift, "affine", patch).ok_or(Miss::NoMatch)?;
        folded.outputs.clone_from(&site.node.outputs);
        patch.replace(site.id, folded);
        patch.erase(producer);
        patch.count("folded", 1);
        Ok(())
    }
}

/// Which input is computed, which is constant, and whether the constant comes first.
fn operands(site: &RewriteSite<'_>) -> Option<(usize, usize, bool)> {
    let constant = |input: usize| site.graph().constant_input(site.node, input).is_some();
    match (constant(0), constant(1)) {
        (false, true) => Some((0, 1, false)),
        (true, false) => Some((1, 0, true)),
        _ => None,
    }
}

/// The constant as one number per channel, if it has no other extent and does not enlarge an output of rank `rank`.
fn per_channel(tensor: &Tensor, rank: usize, axis: usize, channels: usize) -> Option<Vec<f64>> {
    if tensor.dtype() != DType::F32 || tensor.shape().len() > rank {
        return None;
    }
    let values = tensor.floats()?;
    let skip = rank - tensor.shape().len();
    let fits = tensor.shape().iter().enumerate().all(|(i, &dim)| dim == 1 || (i + skip == axis && dim == channels));
    match values.len() {
        1 if fits => Some(vec![f64::from(values[0]); channels]),
        n if fits && n == channels => Some(values.iter().map(|&v| f64::from(v)).collect()),
        _ => None,
    }
}

/// Scale and shift per channel.
fn affine(node: &Node, swapped: bool, row: &[f64]) -> Option<(Vec<f64>, Vec<f64>)> {
    let constant = |v: f64| vec![v; row.len()];
    let negated = || row.iter().map(|v| -v).collect();
    Some(match (&*node.op.name, swapped) {
        ("Mul", _) => (row.to_vec(), constant(0.0)),
        ("Div", false) if row.iter().all(|&v| v != 0.0) => (row.iter().map(|v| 1.0 / v).collect(), constant(0.0)),
        ("Add", _) => (constant(1.0), row.to_vec()),
        ("Sub", false) => (constant(1.0), negated()),
        ("Sub", true) => (constant(-1.0), row.to_vec()),
        _ => return None,
    })
}
