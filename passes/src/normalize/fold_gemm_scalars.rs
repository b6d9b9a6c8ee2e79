//! Gemm's alpha and beta into its constants.

use crate::ir::Attr;
use crate::model::Patch;
use crate::ops;
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Folds `alpha` and `beta` of a `Gemm` with a constant weight into its weight and bias, and sets both to 1.
    ///
    /// W' = alpha · W and C' = beta · C. Declines when a factor other than 1 stands before something that is not constant.
    INFO {
        name: "fold-gemm-scalars",
        source: "ONNX operator specification, Gemm-13",
        cost: "One walk over the nodes; every weight that folds is written once.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(FoldGemmScalars))) };

/// See [`INFO`].
#[derive(Debug)]
struct FoldGemmScalars;

impl Rewrite for FoldGemmScalars {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Gemm"]
    }

    #[expect(clippy::float_cmp, reason = "exactly 1 means that there is nothing to do")]
    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let node = site.node;
        let (alpha, beta) = (node.float("alpha", 1.0), node.float("beta", 1.0));
        if alpha == 1.0 && beta == 1.0 || site.model.plan().encodes_any_of(site.graph(), site.id) {
            return Err(Miss::NoMatch);
        }
        let roles = ops::linear(site.graph(), site.id).ok_or(Miss::NoMatch)?;
        let mut folded = node.clone();
        for (input, factor) in [(Some(roles.weight), alpha), (roles.bias, beta)] {
            let Some(input) = input.map(usize::from).filter(|_| factor != 1.0) else { continue };
            let id = node.input(input).ok_or(Miss::NoMatch)?;
            let tensor = site.graph().constant(id).filter(|t| t.dtype() == DType::F32);
            let tensor = tensor.ok_or(Miss::Blocked("what alpha or beta multiplies is not constant".into()))?;
            let values = tensor.floats().ok_or(Miss::NoMatch)?.iter().map(|v| v * factor).collect::<Vec<f32>>();
            let name = format!("{}.scaled", site.graph().value(id).name);
            folded.inputs[input] = Some(patch.constant(&name, Tensor::of(tensor.shape(), values)));
        }
        folded.attrs.insert("alpha".into(), Attr::Float(1.0));
        folded.attrs.insert("beta".into(), Attr::Float(1.0));
        patch.replace(site.id, folded);
        patch.count("folded", 1);
        Ok(())
    }
}
