//! What a plan and a graph hold, rounded to 16 bits before it is simulated.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::kept::{computes_in_f32, keeps_input};
use super::{CUT, rounded};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::{Encoding, Granularity};
use crate::grid::block;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::{Attr, Graph};
use crate::model::{Edit, Model};
use crate::ops;
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::{DType, Tensor};

/// A scale that 16 bits change by more than this share of it is refused: it is nearly subnormal.
const SCALE_ERROR: f32 = 1.0 / 256.0;

crate::declare_pass! {
    /// Rounds every float constant, and the scale of every encoding, to what 16-bit floats hold, so that `--rest f16` writes exactly
    /// what was planned and simulated.
    ///
    /// What is larger than 65504 becomes that, with a warning that names it; what is not 0 stays so. 32-bit biases keep f32 scales, the products of those of what they are
    /// added to. What operators without a form in 16 bits read stays as it is, as do the scales of formats that have scales
    /// of their own (nvfp4, mxfp8).
    INFO {
        name: "round-to-half",
        source: "IEEE 754 binary16; TensorRT documentation: the type of a scale is the type that is dequantized to",
        cost: "One walk over the constants.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: UpToRounding,
        options: &[],
    }
}

/// See [`INFO`].
pub const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(RoundToHalf)) };

/// See [`INFO`].
#[derive(Debug)]
struct RoundToHalf;

impl Pass for RoundToHalf {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<crate::model::Patch, PassError> {
        let mut patch = crate::model::Patch::on(model);
        let (graph, plan) = (model.graph(), model.plan());
        let mut encodings: BTreeMap<Site, Encoding> = BTreeMap::new();
        let mine = |encoding: &Encoding| !has_own_scales(encoding) && encoding.grid.info().storage != DType::I32;
        for (site, encoding) in plan.encodings().filter(|(_, encoding)| mine(encoding)) {
            let scale: Arc<[f32]> = encoding.scale.iter().map(|scale| rounded(*scale)).collect();
            let off = |(a, b): (&f32, &f32)| (a - b).abs() > SCALE_ERROR * a.abs();
            if encoding.scale.iter().zip(scale.iter()).any(off) {
                return Err(PassError::Model(format!(
                    "{}: 16-bit floats do not hold its scale: write the rest in f32 (--rest f32), or leave it in float (--keep-float)",
                    place(graph, site)
                )));
            }
            if scale != encoding.scale {
                let encoding = Encoding { scale, ..encoding.clone() };
                patch.edit(Edit::Encode { site, encoding: encoding.clone() });
                if let Some(codes) = plan.codes(site) {
                    patch.edit(Edit::Round { site, codes: Arc::clone(codes) });
                }
                encodings.insert(site, encoding);
                patch.count("scales", 1);
            }
        }
        for (id, _) in graph.nodes() {
            for edit in bias_of(model, id, &encodings).into_iter().flatten() {
                patch.edit(edit);
            }
        }
        for value in graph.value_ids() {
            let constant = graph.constant(value).filter(|tensor| tensor.dtype() == DType::F32);
            let Some(values) = constant.and_then(|tensor| tensor.values::<f32>()) else { continue };
            if values.iter().any(|v| rounded(*v).to_bits() != v.to_bits()) && is_plain(model, value) {
                let tensor =
                    Tensor::of(constant.map_or(&[][..], |t| t.shape()), values.iter().map(|v| rounded(*v)).collect());
                patch.edit(Edit::Freeze { value, tensor: Arc::new(tensor) });
                patch.count("constants", 1);
                let place = Place::Value(graph.value(value).name.clone());
                cut(&values).into_iter().for_each(|said| patch.note(warning(place.clone(), said)));
            }
        }
        for (_, node) in graph.nodes().filter(|(_, node)| node.op.is("ConstantOfShape")) {
            let Some(Attr::Tensor(filled)) = node.attrs.get("value") else { continue };
            if let Some(values) = filled.values::<f32>().filter(|_| !computes_in_f32(graph, node, DType::F32)) {
                let place = Place::Node(node.name.clone());
                cut(&values).into_iter().for_each(|said| patch.note(warning(place.clone(), said)));
            }
        }
        for (site, tensor) in plan.substitutes() {
            if let Some(values) = tensor.values::<f32>() {
                if let Some(said) = cut(&values) {
                    patch.note(warning(read_at(graph, site), said));
                }
                let tensor = Tensor::of(tensor.shape(), values.iter().map(|v| rounded(*v)).collect());
                patch.edit(Edit::Substitute { site, tensor: Arc::new(tensor) });
            }
        }
        Ok(patch)
    }
}

/// The bias of `id` in codes of the product of the scales in `encodings`, where it has codes.
fn bias_of(model: &Model, id: NodeId, encodings: &BTreeMap<Site, Encoding>) -> Option<[Edit; 2]> {
    let (graph, plan) = (model.graph(), model.plan());
    let roles = ops::linear(graph, id)?;
    let at = |input: u16| Site::Use { node: id, input };
    let now = |site: Site| encodings.get(&site).or_else(|| plan.encoding(site));
    let site = at(roles.bias?);
    let (old, codes) = plan.encoding(site).zip(plan.codes(site))?;
    let read = graph.node(id)?.input(roles.activation.into())?;
    let input = *now(at(roles.activation)).or_else(|| now(Site::Value(read)))?.scale.first()?;
    let weight = &now(at(roles.weight))?.scale;
    let scale = (0..old.scale.len()).map(|i| input * weight[i.min(weight.len() - 1)]).collect();
    let encoding = Encoding { scale, ..old.clone() };
    let codes = encoding.encode(&old.decode(codes).ok()?, codes.shape()).ok()?;
    (encoding != *old).then(|| [Edit::Encode { site, encoding }, Edit::Round { site, codes: Arc::new(codes) }])
}

fn place(graph: &Graph, site: Site) -> String {
    match site {
        Site::Value(value) => format!("tensor `{}`", graph.value(value).name),
        Site::Use { node, input } => format!("input {input} of node `{}`", graph.node(node).map_or("", |n| &n.name)),
    }
}

/// What is read at `site`.
fn read_at(graph: &Graph, site: Site) -> Place {
    let value = match site {
        Site::Value(value) => Some(value),
        Site::Use { node, input } => graph.node(node).and_then(|node| node.input(input.into())),
    };
    value.map_or(Place::Model, |value| Place::Value(graph.value(value).name.clone()))
}

/// How many of `values` are cut at the largest number of 16 bits, in words; `None` where none are.
fn cut(values: &[f32]) -> Option<String> {
    let beyond = values.iter().filter(|v| v.is_finite() && v.abs() >= CUT);
    let (count, largest) = beyond.fold((0_usize, 0.0_f32), |(n, top), v| (n + 1, top.max(v.abs())));
    let of = values.len();
    (count > 0).then(|| {
        format!("{count} of its {of} numbers lie beyond 65504, up to {largest:e}, and become that in 16-bit floats")
    })
}

fn warning(place: Place, said: String) -> Diagnostic {
    Diagnostic::new(diag::CUT_IN_HALF, Severity::Warning, place, said)
        .help("masks that a Softmax reads are none the worse for it; for anything else leave --rest f16 out")
}

/// Whether the scales of `encoding` are written in a format of their own.
fn has_own_scales(encoding: &Encoding) -> bool {
    match encoding.granularity {
        Granularity::Block { size, .. } => block::of(encoding.grid, size).is_some(),
        Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => true,
        Granularity::Tensor | Granularity::Axis(_) => false,
    }
}

/// Whether somebody reads the constant `value` as floats: codes are all that others see of it.
fn is_plain(model: &Model, value: ValueId) -> bool {
    let (graph, plan) = (model.graph(), model.plan());
    let coded = |node: crate::id::NodeId, input: usize| {
        u16::try_from(input).is_ok_and(|input| plan.encoding_of_use(graph, node, input).is_some())
    };
    let (mut plain, mut kept) = (false, false);
    for (id, node) in graph.nodes() {
        for (input, _) in node.inputs.iter().enumerate().filter(|(_, read)| **read == Some(value)) {
            let in_f32 = keeps_input(graph, node, input, DType::F32);
            kept |= in_f32;
            plain |= !in_f32 && !coded(id, input);
        }
    }
    // What is read in f32 as well stays what it is.
    plain && !kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 65519 is nearest to 65504, 65520 is the first that is not; infinities stay what they are.
    #[test]
    fn what_is_cut_is_counted() {
        assert_eq!(cut(&[1.0, 65504.0, -65519.0, f32::INFINITY, f32::NAN]), None);
        let said = cut(&[1.0, 65520.0, -1e9, f32::NEG_INFINITY]).unwrap();
        assert!(said.starts_with("2 of its 4") && said.contains("1e9"), "{said}");
        for (given, sign) in [(65519.0, 1.0), (-65520.0, -1.0), (-1e9, -1.0)] {
            assert!((rounded(given) - sign * 65504.0).abs() < 1.0, "{given}");
        }
        assert!(rounded(f32::NEG_INFINITY) == f32::NEG_INFINITY && rounded(1e-20) > 0.0);
    }
}
