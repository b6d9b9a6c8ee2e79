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
