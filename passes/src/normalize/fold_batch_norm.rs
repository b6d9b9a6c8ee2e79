//! Batch normalization into the linear operator before it.

use std::sync::Arc;

use super::scale_linear::Scaled;
use crate::ir::{Graph, Node};
use crate::model::{Edit, Patch, Statistic, Trained};
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};

crate::declare_pass! {
    /// Folds inference-mode `BatchNormalization` into the `Conv`, `ConvTranspose` or `Gemm` that feeds it.
    ///
    /// With γ, β, μ, σ² of shape `f32[C_out]` and s = γ / √(σ² + ε):
    ///
    /// ```text
    /// W'[o, …] = s[o] · W[o, …]                 W: f32[C_out, C_in / groups, k…]
    /// b'[o]    = s[o] · (b[o] − μ[o]) + β[o]     b: f32[C_out], zero if absent
    /// ```
    ///
    /// What training saw of the result stays known as its statistics: means β and deviations |γ|, for passes that go by them.
    ///
    /// Equal over the reals; computed in f64 and rounded once. Declines when the linear result has another reader or is
    /// a graph output, when a statistic is not constant, when the node trains, when a factor is over 10⁶, and when weight, bias or
    /// result are in codes already.
    INFO {
        name: "fold-batch-norm",
        source: "Jacob et al. 2018, arXiv:1712.05877, section 3.2",
        cost: "One walk over the nodes; every weight that folds is written once.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(FoldBatchNorm))) };

/// See [`INFO`].
#[derive(Debug)]
struct FoldBatchNorm;

impl Rewrite for FoldBatchNorm {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["BatchNormalization"]
    }

    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let norm = site.node;
        let input = norm.input(0).ok_or(Miss::NoMatch)?;
        let (producer, _) = site.graph().producer(input).ok_or(Miss::NoMatch)?;
        let linear = Scaled::of(site.model, producer).filter(Scaled::takes_bias).ok_or(Miss::NoMatch)?;
        if site.sole_producer(input).is_none() {
            return Err(Miss::Blocked("the result to be normalized has another reader".into()));
        }
        if norm.int("training_mode", 0) != 0 || norm.outputs.iter().skip(1).any(Option::is_some) {
            return Err(Miss::Blocked("the normalization is in training mode".into()));
        }
        if patch.touches(producer) || site.model.plan().encodes_any_of(site.graph(), site.id) {
            return Err(Miss::NoMatch);
        }
        let (scale, shift) = affine(site.graph(), norm, linear.channels)?;
        let trained = trained(site.graph(), norm);
        let folded = linear.fold(&scale, &shift, "bn", patch);
        let mut folded = folded.ok_or(Miss::Blocked("a factor is over 1e6 or the bias is no row".into()))?;
        folded.outputs.clone_from(&norm.outputs);
        folded.outputs.truncate(1);
        let mut kept = folded.clone();
        kept.outputs.resize(norm.outputs.len(), None);
        patch.replace(site.id, kept);
        patch.erase(producer);
        if let Some((value, trained)) = norm.output(0).zip(trained) {
            patch.edit(Edit::Record { value, statistic: Statistic::Trained(Arc::new(trained)) });
        }
        patch.count("folded", 1);
        Ok(())
    }
}

/// Means and deviations of the result over the data of training: β and |γ|, as those of its input were μ and √(σ² + ε).
fn trained(graph: &Graph, norm: &Node) -> Option<Trained> {
    let row = |input: usize| graph.constant_input(norm, input)?.floats();
    let (gamma, beta) = (row(1)?, row(2)?);
    Some(Trained { mean: (*beta).into(), deviation: gamma.iter().map(|g| g.abs()).collect() })
}

/// s = γ / √(σ² + ε) and β − s·μ, per channel.
fn affine(graph: &Graph, norm: &Node, channels: usize) -> Result<(Vec<f64>, Vec<f64>), Miss> {
    let row = |input: usize| {
        let values = graph.constant_input(norm, input).and_then(|t| t.floats().map(std::borrow::Cow::into_owned));
        let values = values.ok_or(Miss::Blocked("a statistic is not constant".into()))?;
        if values.len() == channels { Ok(values) } else { Err(Miss::Blocked("a statistic has another length".into())) }
    };
    let (gamma, beta, mean, variance) = (row(1)?, row(2)?, row(3)?, row(4)?);
    let epsilon = f64::from(norm.float("epsilon", 1e-5));
    let mut scale = Vec::with_capacity(channels);
    let mut shift = Vec::with_capacity(channels);
    for c in 0..channels {
        let spread = f64::from(variance[c]) + epsilon;
        if spread.is_nan() || spread <= 0.0 {
            return Err(Miss::Blocked("a variance is not positive".into()));
        }
        let s = f64::from(gamma[c]) / spread.sqrt();
        scale.push(s);
        shift.push(f64::from(beta[c]) - s * f64::from(mean[c]));
    }
    Ok((scale, shift))
}
