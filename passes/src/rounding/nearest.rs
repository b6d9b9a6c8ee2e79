//! Every entry to its nearest point.

use std::sync::Arc;

use crate::id::{Site, ValueId};
use crate::model::{Edit, Model, Patch};
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Chooses codes for every encoded constant that has none yet.
    ///
    /// The method `nearest` takes the nearest point of the grid, ties to even, as `QuantizeLinear` would. Constants that
    /// share a value and an encoding share their codes.
    INFO {
        name: "round",
        source: "ONNX operator specification, QuantizeLinear-21",
        requires: Facts::ENCODED,
        establishes: Facts::ROUNDED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo { name: "method", doc: "how codes are chosen: nearest (default)" }],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry {
    info: &INFO,
    build: |options| match options.text("method", "nearest") {
        "nearest" => Ok(Box::new(Round)),
        other => {
            Err(OptionError { option: "method".into(), problem: format!("`{other}` is unknown; there is nearest") })
        }
    },
};

/// See [`INFO`].
#[derive(Debug)]
struct Round;

impl Pass for Round {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let open: Vec<(Site, ValueId)> = model
            .plan()
            .encodings()
            .filter(|(site, _)| model.plan().codes(*site).is_none())
            .filter_map(|(site, _)| Some((site, constant_at(model, site)?)))
            .collect();
        let rounded = parallel::map(&open, |(site, value)| {
            let (tensor, encoding) = model.graph().constant(*value).zip(model.plan().encoding(*site))?;
            let name = &model.graph().value(*value).name;
            let values = tensor.floats()?;
            Some(
                encoding.encode(&values, tensor.shape()).map_err(|e| PassError::Model(format!("tensor `{name}`: {e}"))),
            )
        });
        let mut shared: Vec<(ValueId, Site, Arc<crate::tensor::Tensor>)> = Vec::new();
        for ((site, value), codes) in open.into_iter().zip(rounded) {
            let Some(codes) = codes.transpose()? else { continue };
            let plan = model.plan();
            let twin = shared.iter().find(|(v, s, _)| *v == value && plan.encoding(*s) == plan.encoding(site));
            let codes = twin.map_or_else(|| Arc::new(codes), |(_, _, codes)| Arc::clone(codes));
            shared.push((value, site, Arc::clone(&codes)));
            patch.edit(Edit::Round { site, codes });
            patch.count("rounded", 1);
        }
        Ok(patch)
    }
}

fn constant_at(model: &Model, site: Site) -> Option<ValueId> {
    let value = match site {
        Site::Value(value) => value,
        Site::Use { node, input } => model.graph().node(node)?.input(input.into())?,
    };
    model.graph().constant(value).map(|_| value)
}
