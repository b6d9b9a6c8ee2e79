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
    let graph = model.graph();
    let Some(roles) = ops::linear(graph, node) else { return Some(Vec::new()) };
    let site = roles.bias.map(|input| Site::Use { node, input });
    let Some((site, old)) = site.and_then(|site| Some((site, model.plan().encoding(site)?))) else {
        return Some(Vec::new());
    };
    // Exactly the f32 product: runtimes check it, or ignore what is stored and use it.
    let read = Site::Use { node, input: roles.activation };
    let input = encoding(read).or_else(|| encoding(Site::Value(graph.node(node)?.input(roles.activation.into())?)))?;
    let weight = encoding(Site::Use { node, input: roles.weight })?;
    let input_scale = *input.scale.first()?;
    let last = weight.scale.len() - 1;
    let scale = (0..old.scale.len()).map(|i| input_scale * weight.scale[i.min(last)]).collect();
    let encoding = Encoding { scale, ..old.clone() };
    if encoding == *old {
        return Some(Vec::new());
    }
    let tensor: &Tensor = graph.constant_input(graph.node(node)?, roles.bias?.into())?;
    let values = tensor.floats()?;
    let scale_of = |index: usize| encoding.scale[index.min(encoding.scale.len() - 1)];
    let fits = |(index, value): (usize, &f32)| f64::from(*value).abs() < f64::from(scale_of(index)) * BIAS_LIMIT;
    if !values.iter().enumerate().all(fits) {
        return None;
    }
    let codes = Arc::new(encoding.encode(&values, tensor.shape()).ok()?);
    Some(vec![Edit::Encode { site, encoding }, Edit::Round { site, codes }])
}
