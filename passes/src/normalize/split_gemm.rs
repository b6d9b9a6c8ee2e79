//! Gemm as a product and a sum.

use std::sync::Arc;

use crate::ir::{Attrs, Node, OpKey, TensorType, Type};
use crate::model::Patch;
use crate::ops;
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};
use crate::tensor::{DType, Tensor};

crate::declare_pass! {
    /// Turns a `Gemm` with a constant weight on the right into a `MatMul`, its weight transposed where it has to be, and an `Add`
    /// of its bias.
    ///
    /// x Wᵀ + b, for runtimes that have a kernel for packed or dynamically quantized products only where a `MatMul` stands, with the
    /// weight as \[inputs, outputs\]. Declines where alpha or beta is not 1, or the activation is transposed.
    INFO {
        name: "split-gemm",
        source: "ONNX operator specification, Gemm-13",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(SplitGemm))) };

/// See [`INFO`].
#[derive(Debug)]
struct SplitGemm;

impl Rewrite for SplitGemm {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Gemm"]
    }

    #[expect(clippy::float_cmp, reason = "a factor of exactly 1 is none")]
    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let (node, graph) = (site.node, site.graph());
        let roles = ops::linear(graph, site.id).filter(|roles| roles.weight == 1).ok_or(Miss::NoMatch)?;
        if node.float("alpha", 1.0) != 1.0 || node.float("beta", 1.0) != 1.0 || node.int("transA", 0) != 0 {
            return Err(Miss::Blocked("its alpha or beta is not 1, or its activation is transposed".into()));
        }
        let (Some(activation), Some(weight), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
            return Err(Miss::NoMatch);
        };
        let weight = match graph.constant(weight).filter(|_| roles.out_axis == 0) {
            Some(tensor) => {
                let turned = transposed(tensor).ok_or(Miss::Blocked("its weight is not f32".into()))?;
                patch.constant(&format!("{}.transposed", graph.value(weight).name), turned)
            }
            None => weight,
        };
        let opset = node.op.opset;
        let plain = |op: &str, inputs| Node {
            op: OpKey { domain: "".into(), name: op.into(), opset },
            inputs,
            attrs: Attrs::new(),
            ..node.clone()
        };
        let product = plain("MatMul", vec![Some(activation), Some(weight)]);
        match node.input(2) {
            None => patch.replace(site.id, product),
            Some(bias) => {
                let ty = graph.value(output).ty.tensor().cloned();
                let ty = Type::Tensor(ty.unwrap_or_else(|| TensorType::new(Some(DType::F32), None)));
                let name = format!("{}.product", graph.value(output).name);
                let product = patch.node(product, &name, ty, Some(site.id));
                let sum = Node {
                    name: format!("{}.bias", node.name).into(),
                    ..plain("Add", vec![Some(product), Some(bias)])
                };
                patch.replace(site.id, sum);
            }
        }
        patch.count("split", 1);
        Ok(())
    }
}

/// \[inputs, outputs\] of a weight \[outputs, inputs\].
fn transposed(tensor: &Arc<Tensor>) -> Option<Tensor> {
    let [rows, columns] = *tensor.shape() else { return None };
    let values = tensor.values::<f32>()?;
    let mut turned = vec![0.0_f32; values.len()];
    for (row, line) in values.chunks_exact(columns.max(1)).enumerate() {
        turned.iter_mut().skip(row).step_by(rows.max(1)).zip(line).for_each(|(to, from)| *to = *from);
    }
    Some(Tensor::of([columns, rows], turned))
}
