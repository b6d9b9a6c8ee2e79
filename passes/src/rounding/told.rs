//! What gradients of the float model tell of all layers before any is rounded.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Method;
use super::layer::Layer;
use super::prefix::{Inputs, Roots};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::NodeId;
use crate::judges;
use crate::model::{Model, Patch};
use crate::observe::Cross;
use crate::pass::{OptionError, Options, PassContext, PassError};
use crate::reconstruct::{OutputMoments, WeightMoments, output_moments, stakes, weight_moments};

/// So many draws of gradients tell what is at stake.
const DRAWS: usize = 2;

/// What is asked of gradients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asks {
    /// How much rows weigh by what is at stake there.
    stakes: f64,
    /// How many gradients tell how errors of channels add up, times what is usual.
    coupled: f64,
    /// The share of the moments of gradients of the weight itself.
    adaptive: f64,
    /// Whether some samples are left out.
    spares: bool,
}

impl Asks {
    /// What `options` say, where samples that judge are `spared`, or not.
    pub(super) fn of(options: &Options, spares: bool) -> Result<Self, OptionError> {
        let number = |name: &str, most: f64| match options.number(name)?.unwrap_or(0.0) {
            value if (0.0..=most).contains(&value) => Ok(value),
            _ => Err(OptionError { option: name.into(), problem: format!("it must be from 0 to {most}") }),
        };
        let (stakes, coupled, adaptive) =
            (number("stakes", 1.0)?, number("coupled", 1000.0)?, number("adaptive", 1.0)?);
        if stakes > 0.0 && adaptive > 0.0 {
            let problem = "stakes weighs rows by the same gradients: give one of both".to_owned();
            return Err(OptionError { option: "adaptive".into(), problem });
        }
        Ok(Self { stakes, coupled, adaptive, spares })
    }

    /// What gradients tell of `layers`, which a method rounds that goes by moments, or not.
    pub(super) fn tell(
        &self,
        (model, layers): (&Model, &[Inputs]),
        (method, by_moments): (&dyn Method, bool),
        cx: &PassContext<'_>,
        patch: &mut Patch,
    ) -> Result<Told, PassError> {
        let roots = self.roots(model, layers, cx, patch)?;
        let name = method.about().name;
        let outputs = if method.learns_together() && self.coupled > 0.0 {
            let reason = format!("rows learn together with {name}");
            patch.note(note("every row of a weight is rounded as if the others were exact", &reason));
            BTreeMap::new()
        } else {
            self.outputs(model, cx, patch)?
        };
        let gradients = if !by_moments && self.adaptive > 0.0 {
            let reason = format!(
                "{name} goes by no moments: take another method=, or sweeps=1 behind it, or leave adaptive= out"
            );
            patch.note(note("no gradients of weights are drawn", &reason));
            BTreeMap::new()
        } else {
            self.gradients((model, layers), &outputs, cx, patch)?
        };
        Ok(Told { roots, outputs, gradients, share: self.adaptive })
    }

    /// Whether sample `at` is left out.
    fn is_spared(&self, cx: &PassContext<'_>, at: usize) -> bool {
        self.spares && cx.dataset.is_some_and(|data| judges::is_judge(data.origin(at)))
    }

    /// What rows weigh.
    fn roots(
        &self,
        model: &Model,
        layers: &[Inputs],
        cx: &PassContext<'_>,
        patch: &mut Patch,
    ) -> Result<Roots, PassError> {
        if self.stakes <= 0.0 {
            return Ok(Roots::default());
        }
        match stakes(model, cx, DRAWS, "stakes")? {
            Ok(stakes) => {
                patch.count("layers weighed by what is at stake", stakes.len() as u64);
                let without = layers.iter().filter(|layer| !stakes.contains_key(&layer.node));
                for node in without.filter_map(|layer| model.graph().node(layer.node)) {
                    let message =
                        "no gradients arrive from the outputs, or they are no numbers: its rows weigh the same";
                    let place = Place::Node(Arc::clone(&node.name));
                    patch.note(Diagnostic::new(diag::NO_MOMENTS, Severity::Note, place, message));
                }
                Ok(Roots::of_stakes(stakes, self.stakes, |at| self.is_spared(cx, at)))
            }
            Err(reason) => Err(PassError::Model(format!("stakes={}: gradients do not tell: {reason}", self.stakes))),
        }
    }

    /// How errors of output channels add up, layer by layer.
    fn outputs(
        &self,
        model: &Model,
        cx: &PassContext<'_>,
        patch: &mut Patch,
    ) -> Result<BTreeMap<NodeId, OutputMoments>, PassError> {
        if self.coupled <= 0.0 {
            return Ok(BTreeMap::new());
        }
        let found = output_moments(model, cx, (|at| self.is_spared(cx, at), self.coupled), "gradients");
        let without = "every row of a weight is rounded as if the others were exact";
        told(found, ("layers whose rows make up for one another", without), patch)
    }

    /// Second moments of the gradients of weights, layer by layer.
    fn gradients(
        &self,
        (model, layers): (&Model, &[Inputs]),
        outputs: &BTreeMap<NodeId, OutputMoments>,
        cx: &PassContext<'_>,
        patch: &mut Patch,
    ) -> Result<BTreeMap<NodeId, WeightMoments>, PassError> {
        if self.adaptive <= 0.0 {
            return Ok(BTreeMap::new());
        }
        let held = outputs.values().map(OutputMoments::held).sum();
        let found = weight_moments(model, cx, (|at| self.is_spared(cx, at), held), "gradients");
        let without = "weights are rounded by what their layers return alone";
        let found = told(found, ("layers rounded by gradients of their weights", without), patch)?;
        let others = layers.iter().filter(|layer| !found.is_empty() && !found.contains_key(&layer.node));
        for node in others.filter_map(|layer| model.graph().node(layer.node)) {
            let message = "no gradients arrive at its weight, or they are no numbers, or it has more than 4096 columns: it is rounded by what \
                           its layer returns alone";
            let place = Place::Node(Arc::clone(&node.name));
            patch.note(Diagnostic::new(diag::NO_MOMENTS, Severity::Note, place, message));
        }
        Ok(found)
    }
}

/// What was `found`, counted in `patch`; nothing, and a note, where gradients do not tell.
fn told<T>(
    found: Result<Result<BTreeMap<NodeId, T>, String>, PassError>,
    (counted, without): (&'static str, &str),
    patch: &mut Patch,
) -> Result<BTreeMap<NodeId, T>, PassError> {
    let reason = match found {
        Ok(Ok(found)) => {
            patch.count(counted, found.len() as u64);
            return Ok(found);
        }
        Ok(Err(reason)) | Err(PassError::Model(reason)) => reason,
        Err(error) => return Err(error),
    };
    patch.note(note(without, &reason));
    Ok(BTreeMap::new())
}

fn note(without: &str, reason: &str) -> Diagnostic {
    Diagnostic::new(diag::NO_GRADIENTS, Severity::Note, Place::Model, format!("{without}: {reason}"))
}

/// What gradients told, until layers take it.
#[derive(Debug)]
pub(super) struct Told {
    /// What rows weigh.
    pub(super) roots: Roots,
    outputs: BTreeMap<NodeId, OutputMoments>,
    gradients: BTreeMap<NodeId, WeightMoments>,
    /// The share of the latter.
    share: f64,
}

/// What they told of one layer.
#[derive(Debug, Default)]
pub(super) struct OfLayer {
    /// How errors of its output channels add up.
    pub(super) outputs: Option<OutputMoments>,
    gradients: Option<(WeightMoments, f64)>,
}

impl Told {
    /// The bytes that wait.
    pub(super) fn held(&self) -> u64 {
        let outputs = self.outputs.values().map(OutputMoments::held);
        outputs.chain(self.gradients.values().map(WeightMoments::held)).sum()
    }

    /// Hands over what was told of layer `node`.
    pub(super) fn take(&mut self, node: NodeId) -> OfLayer {
        let gradients = self.gradients.remove(&node).map(|gradients| (gradients, self.share));
        OfLayer { outputs: self.outputs.remove(&node), gradients }
    }
}

impl OfLayer {
    /// `layer` with what gradients of its weight tell among its moments; `drift` is what the float model reads less what it reads.
    pub(super) fn adapted<'a>(&self, layer: Layer<'a>, drift: Option<&Cross>) -> Layer<'a> {
        match &self.gradients {
            Some((gradients, share)) => layer.adapted(gradients, *share, drift),
            None => layer,
        }
    }
}
