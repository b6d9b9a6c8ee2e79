//! Edits of biases and other constants that follow from those of weights.

use std::sync::Arc;

use super::{Edit, Model, Patch};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site};
use crate::ops;
use crate::pass::PassError;
use crate::tensor::Tensor;

/// A 32-bit bias is kept this far from saturation.
const BIAS_LIMIT: f64 = (1_u64 << 31) as f64 * 0.999;

impl Edit {
    /// The edit that makes the constant read at `site` come to `values`: in codes of `encoding` where there is one, in float
    /// otherwise. `None` where the encoding does not fit.
    pub(crate) fn constant(site: Site, shape: &[usize], values: Vec<f32>, encoding: Option<&Encoding>) -> Option<Self> {
        Some(match encoding {
            Some(encoding) => Self::Round { site, codes: Arc::new(encoding.encode(&values, shape).ok()?) },
            None => Self::Substitute { site, tensor: Arc::new(Tensor::of(shape, values)) },
        })
    }
}

impl Patch {
    /// Adds `edits`, and makes them in `work`.
    ///
    /// # Errors
    /// [`PassError`] when they do not fit: a bug.
    pub(crate) fn and_on(&mut self, work: &mut Model, edits: Vec<Edit>) -> Result<(), PassError> {
        let mut step = Self::on(work);
        for edit in edits {
            self.edit(edit.clone());
            step.edit(edit);
        }
        work.apply(step).map_err(|error| PassError::Model(format!("a bug in onnx-quant: {error}")))
    }
}

/// The bias of `node` encoded and rounded anew for the scales of `weight`, where it is encoded; `None` when it would not fit 32 bits.
pub(crate) fn behind_weight(model: &Model, node: NodeId, weight: &Encoding) -> Option<Vec<Edit>> {
    let Some(roles) = ops::linear(model.graph(), node) else { return Some(Vec::new()) };
    let own = Site::Use { node, input: roles.weight };
    behind(model, node, &|site| if site == own { Some(weight) } else { model.plan().encoding(site) })
}

/// The bias of `node` encoded and rounded anew, where it is encoded and `encoding` says other scales than the plan of what it is added to;
/// `None` when it would not fit 32 bits.
pub(crate) fn behind<'a>(
    model: &'a Model,
    node: NodeId,
    encoding: &dyn Fn(Site) -> Option<&'a Encoding>,
) -> Option<Vec<Edit>> {
    let Some((input, old)) = encoded(model, node) else { return Some(Vec::new()) };
    let encoding = anew(model, node, old, encoding)?;
    if encoding == *old {
        return Some(Vec::new());
    }
    let tensor: &Tensor = model.graph().constant_input(model.graph().node(node)?, input.into())?;
    let values = tensor.floats()?;
    if !beyond(&values, &encoding).is_empty() {
        return None;
    }
    let codes = Arc::new(encoding.encode(&values, tensor.shape()).ok()?);
    let site = Site::Use { node, input };
    Some(vec![Edit::Encode { site, encoding }, Edit::Round { site, codes }])
}

/// The bias of `node` at the scales that `encoding` says: nearest codes where it has those now, else what its codes stand for in new ones;
/// `None` where it would not fit 32 bits.
pub(crate) fn moved<'a>(
    model: &'a Model,
    node: NodeId,
    encoding: &dyn Fn(Site) -> Option<&'a Encoding>,
) -> Option<Vec<Edit>> {
    let Some((input, old)) = encoded(model, node) else { return Some(Vec::new()) };
    let new = anew(model, node, old, encoding)?;
    if new == *old {
        return Some(Vec::new());
    }
    let site = Site::Use { node, input };
    let tensor: &Tensor = model.graph().constant_input(model.graph().node(node)?, input.into())?;
    let (plain, codes) = (tensor.floats()?.into_owned(), model.plan().codes(site));
    let is_nearest = |codes: &Tensor| old.encode(&plain, tensor.shape()).is_ok_and(|nearest| nearest == *codes);
    let values = match codes.filter(|codes| !is_nearest(codes)) {
        Some(corrected) => old.decode(corrected).ok()?,
        None => plain,
    };
    if !beyond(&values, &new).is_empty() {
        return None;
    }
    let round = match codes {
        Some(_) => Some(Edit::Round { site, codes: Arc::new(new.encode(&values, tensor.shape()).ok()?) }),
        None => None,
    };
    Some([Edit::Encode { site, encoding: new }].into_iter().chain(round).collect())
}

/// The elements of the bias of `node` that would not fit 32 bits in codes for the scales of `weight`.
pub(crate) fn saturated(model: &Model, node: NodeId, weight: &Encoding) -> Vec<usize> {
    let graph = model.graph();
    let own = ops::linear(graph, node).map(|roles| Site::Use { node, input: roles.weight });
    let of = |site: Site| if own == Some(site) { Some(weight) } else { model.plan().encoding(site) };
    let elements = || {
        let (input, old) = encoded(model, node)?;
        let encoding = anew(model, node, old, &of).filter(|encoding| encoding != old)?;
        let values = graph.constant_input(graph.node(node)?, input.into())?.floats()?;
        Some(beyond(&values, &encoding))
    };
    elements().unwrap_or_default()
}

/// The input that carries the bias of `node`, and its encoding, where it is encoded.
fn encoded(model: &Model, node: NodeId) -> Option<(u16, &Encoding)> {
    let input = ops::linear(model.graph(), node)?.bias?;
    Some((input, model.plan().encoding(Site::Use { node, input })?))
}

/// What the encoding of the bias of `node`, which is `old`, comes to with the scales that `encoding` says.
fn anew<'a>(
    model: &'a Model,
    node: NodeId,
    old: &Encoding,
    encoding: &dyn Fn(Site) -> Option<&'a Encoding>,
) -> Option<Encoding> {
    let graph = model.graph();
    let roles = ops::linear(graph, node)?;
    // Exactly the f32 product: runtimes check it, or ignore what is stored and use it.
    let read = Site::Use { node, input: roles.activation };
    let input = encoding(read).or_else(|| encoding(Site::Value(graph.node(node)?.input(roles.activation.into())?)))?;
    let weight = encoding(Site::Use { node, input: roles.weight })?;
    let input_scale = *input.scale.first()?;
    let last = weight.scale.len() - 1;
    let scale = (0..old.scale.len()).map(|i| input_scale * weight.scale[i.min(last)]).collect();
    Some(Encoding { scale, ..old.clone() })
}

/// Which of the `values` of a bias are not in reach of codes of `encoding`.
fn beyond(values: &[f32], encoding: &Encoding) -> Vec<usize> {
    let scale_of = |index: usize| encoding.scale[index.min(encoding.scale.len() - 1)];
    let fits = |index: usize| f64::from(values[index]).abs() < f64::from(scale_of(index)) * BIAS_LIMIT;
    (0..values.len()).filter(|index| !fits(*index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEMM: &str = "graph (%x: f32[1,2]) -> (%y: f32[1,3]) {
        %w = const f32[2,3] [1, 2, 3, 4, 5, 6]
        %b = const f32[3] [0.5, -1.25, 2]
        %y = Gemm(%x, %w, %b)
    }";

    fn grid(name: &str) -> &'static dyn crate::grid::Grid {
        crate::grid::find(name).unwrap()
    }

    /// The bias after the scale of the input went from 0.1 to 0.13, where its codes were `codes` (nearest ones, without).
    fn after(codes: Option<Vec<i32>>, input_scale: f32) -> Option<Vec<f32>> {
        let mut model = crate::text::parse(GEMM).unwrap();
        let (node, _) = model.graph().nodes().next().unwrap();
        let site = |input| Site::Use { node, input };
        let bias = Encoding::per_tensor(grid("int32"), 0.1 * 0.05, 0);
        let nearest = bias.encode(&[0.5, -1.25, 2.0], &[3]).unwrap();
        let codes = codes.map_or(nearest, |codes| Tensor::of([3], codes));
        let mut patch = Patch::on(&model);
        patch.edit(Edit::Encode { site: site(0), encoding: Encoding::per_tensor(grid("int8"), 0.1, 0) });
        patch.edit(Edit::Encode { site: site(1), encoding: Encoding::per_tensor(grid("int8"), 0.05, 0) });
        patch.edit(Edit::Encode { site: site(2), encoding: bias });
        patch.edit(Edit::Round { site: site(2), codes: Arc::new(codes) });
        model.apply(patch).unwrap();
        let new = Encoding::per_tensor(grid("int8"), input_scale, 0);
        let of = |other: Site| if other == site(0) { Some(&new) } else { model.plan().encoding(other) };
        let edits = moved(&model, node, &of)?;
        let [Edit::Encode { encoding, .. }, Edit::Round { codes, .. }] = &edits[..] else { panic!("{edits:?}") };
        assert!((encoding.scale[0] - input_scale * 0.05).abs() < 1e-12, "{encoding:?}");
        Some(encoding.decode(codes).unwrap())
    }

    #[test]
    fn biases_follow_scales_whether_they_are_nearest_or_corrected() {
        let near = |found: Vec<f32>, want: [f32; 3]| {
            found.iter().zip(want).all(|(f, w)| (f - w).abs() <= 0.5 * 0.13 * 0.05 + 1e-6)
        };
        assert!(near(after(None, 0.13).unwrap(), [0.5, -1.25, 2.0]));
        // In steps of 0.005: a bias that was moved away from what the float model has stays there.
        assert!(near(after(Some(vec![120, -200, 500]), 0.13).unwrap(), [0.6, -1.0, 2.5]));
        assert!(after(None, 1e-9).is_none(), "beyond 32 bits");
    }
}
