//! The pass that chooses codes.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::layer::beyond_data;
use super::{Method, work};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{Site, ValueId};
use crate::ir::walk::Users;
use crate::model::{Edit, Model, Patch};
use crate::ops;
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Chooses codes for every encoded constant that has none yet.
    ///
    /// The method decides about the weights of linear nodes whose input was measured; everything else, and every weight for
    /// `nearest`, goes to the nearest point, ties to even, as `QuantizeLinear` would. Constants that share a value and an
    /// encoding share their codes; a weight that several nodes read goes to nearest. `list roundings` names the methods.
    INFO {
        name: "round",
        source: "ONNX operator specification, QuantizeLinear-21; the methods name theirs",
        cost: "What the method costs (`explain METHOD`), rows in parallel. By data it reads Gram matrices that `calibrate` has summed.",
        requires: Facts::ENCODED,
        establishes: Facts::ROUNDED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo { name: "method", doc: "how codes are chosen: nearest (default), or any of `list roundings`" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(Round { method: method(options, "nearest")? })) };

/// The method that `options` name.
pub(super) fn method(options: &Options, default: &str) -> Result<&'static dyn Method, OptionError> {
    let name = options.text("method", default);
    super::find(name).ok_or_else(|| {
        let names: Vec<&str> = super::ROUNDINGS.iter().map(|method| method.about().name).collect();
        OptionError { option: "method".into(), problem: format!("`{name}` is none of {}", names.join(", ")) }
    })
}

/// See [`INFO`].
#[derive(Debug)]
struct Round {
    method: &'static dyn Method,
}

impl Pass for Round {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if self.method.needs_data() { work::wishes(model, cx) } else { BTreeSet::new() }
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let by_data = if self.method.needs_data() { self.by_data(model, cx, &mut patch)? } else { BTreeSet::new() };
        to_nearest(model, &by_data, &mut patch)?;
        Ok(patch)
    }
}

impl Round {
    /// Rounds what the method can; says which sites those are.
    fn by_data(&self, model: &Model, cx: &PassContext<'_>, patch: &mut Patch) -> Result<BTreeSet<Site>, PassError> {
        let layers = work::layers(model);
        if layers.is_empty() {
            note_no_moments(model, self.method, patch);
        } else {
            note_beyond_data(model, patch);
        }
        let mut done = BTreeSet::new();
        cx.progress.begin(self.method.about().name, layers.len() as u64);
        for layer in layers.iter().filter(|layer| model.plan().codes(layer.site).is_none()) {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            let grid = layer.encoding.grid;
            let rounded = work::over_tiles(
                layer,
                None,
                |q| self.method.prepare(q),
                |tiles, q, prepared| match prepared {
                    Some(prepared) => prepared.round_all(tiles, grid, q),
                    None => parallel::each(tiles, |tile| tile.nearest(grid)),
                },
            );
            if let Some(rounded) = rounded {
                rounded.edits(model, layer).into_iter().for_each(|edit| patch.edit(edit));
                patch.count("rounded by data", 1);
                done.insert(layer.site);
            }
            cx.progress.step();
        }
        cx.progress.end();
        Ok(done)
    }
}

/// Tells that `method` had nothing to go by, where anything is to be rounded.
pub(super) fn note_no_moments(model: &Model, method: &dyn Method, patch: &mut Patch) {
    if !model.plan().is_empty() {
        let message = format!("no second moments were measured: {} falls back to nearest", method.about().name);
        let note = Diagnostic::new(diag::NO_MOMENTS, Severity::Warning, Place::Model, message);
        patch.note(note.help("pass calibration samples with --data"));
    }
}

/// Tells which weights of linear nodes no method rounds by data, and why. Those of eight bits and more lose next to nothing by it.
pub(super) fn note_beyond_data(model: &Model, patch: &mut Patch) {
    let (graph, users) = (model.graph(), Users::of(model.graph()));
    for (id, node) in graph.nodes() {
        let of_few_bits = ops::linear(graph, id).is_some_and(|roles| {
            let site = Site::Use { node: id, input: roles.weight };
            let encoding = model.plan().encoding(site).filter(|_| model.plan().codes(site).is_none());
            encoding.is_some_and(|encoding| encoding.grid.info().bits < 8)
        });
        if let Some(reason) = beyond_data(graph, &users, id).filter(|_| of_few_bits) {
            let place = Place::Node(Arc::clone(&node.name));
            let message = format!("its weight goes to nearest points: {reason}");
            let note = Diagnostic::new(diag::BEYOND_DATA, Severity::Warning, place, message);
            patch.note(
                note.help("give every node its own weight, write padding out, or give this one more bits (--set)"),
            );
        }
    }
}

/// `model` with every constant that is encoded and has no codes yet in its nearest ones.
pub(crate) fn in_nearest(model: &Model) -> Result<Model, PassError> {
    let (mut rounded, mut patch) = (model.clone(), Patch::on(model));
    to_nearest(model, &BTreeSet::new(), &mut patch)?;
    let edits = patch.edits().to_vec();
    Patch::on(model).and_on(&mut rounded, edits)?;
    Ok(rounded)
}

/// Rounds every constant that is encoded, has no codes and is not in `done`.
pub(super) fn to_nearest(model: &Model, done: &BTreeSet<Site>, patch: &mut Patch) -> Result<(), PassError> {
    let open: Vec<(Site, ValueId)> = model
        .plan()
        .encodings()
        .filter(|(site, _)| model.plan().codes(*site).is_none() && !done.contains(site))
        .filter_map(|(site, _)| Some((site, constant_at(model, site)?)))
        .collect();
    let rounded = parallel::map(&open, |(site, value)| {
        let (tensor, encoding) = model.graph().constant(*value).zip(model.plan().encoding(*site))?;
        let name = &model.graph().value(*value).name;
        let values = tensor.floats()?;
        Some(encoding.encode(&values, tensor.shape()).map_err(|e| PassError::Model(format!("tensor `{name}`: {e}"))))
    });
    let mut shared: Vec<(ValueId, Site, Arc<Tensor>)> = Vec::new();
    for ((site, value), codes) in open.into_iter().zip(rounded) {
        let Some(codes) = codes.transpose()? else { continue };
        let plan = model.plan();
        let twin = shared.iter().find(|(v, s, _)| *v == value && plan.encoding(*s) == plan.encoding(site));
        let codes = twin.map_or_else(|| Arc::new(codes), |(_, _, codes)| Arc::clone(codes));
        shared.push((value, site, Arc::clone(&codes)));
        patch.edit(Edit::Round { site, codes });
        patch.count("rounded", 1);
    }
    Ok(())
}

fn constant_at(model: &Model, site: Site) -> Option<ValueId> {
    let value = match site {
        Site::Value(value) => value,
        Site::Use { node, input } => model.graph().node(node)?.input(input.into())?,
    };
    model.graph().constant(value).map(|_| value)
}
