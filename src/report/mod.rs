//! What a run did, for people and for scripts.

mod json;
mod text;

pub use json::summary as json;
pub(crate) use text::size as readable_size;
pub use text::summary as text;

use passes::id::{NodeId, Site};
use passes::model::Model;
use passes::ops;
use passes::reconstruct::Cost;

use crate::driver::Outcome;

/// One node that the plan decided about.
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) op: String,
    /// Grid and granularity of the weight.
    pub(crate) weight: Option<(String, String)>,
    /// Grid of the activation.
    pub(crate) activation: Option<String>,
    pub(crate) sqnr_db: Option<f64>,
    /// What its codes lose over what nearest ones would, on the samples that they were chosen by.
    pub(crate) over_nearest: Option<f64>,
    /// What rounding its weight costs to first order.
    pub(crate) weight_cost: Option<Cost>,
    /// What rounding what it reads costs.
    pub(crate) activation_cost: Option<Cost>,
    pub(crate) quantized: bool,
    pub(crate) reason: String,
}

/// The nodes that the plan decided about, in graph order.
pub(crate) fn layers(outcome: &Outcome) -> Vec<Layer> {
    let model = &outcome.model;
    let by_node = outcome.fidelity.as_ref().map(|f| &f.by_node);
    model
        .graph()
        .nodes()
        .filter_map(|(id, node)| {
            let decision = model.plan().decision(id)?;
            Some(Layer {
                name: node.name.to_string(),
                op: node.op.display(),
                weight: weight(model, id),
                activation: activation(model, id),
                sqnr_db: by_node.and_then(|all| all.get(&id)).copied(),
                over_nearest: ops::linear(model.graph(), id)
                    .and_then(|roles| model.plan().loss_over_nearest(Site::Use { node: id, input: roles.weight })),
                weight_cost: weight_cost(outcome, id),
                activation_cost: activation_cost(outcome, id),
                quantized: decision.quantized,
                reason: decision.reason.clone(),
            })
        })
        .collect()
}

/// Format of the weight of node `id`, and who shares a scale.
pub(crate) fn weight(model: &Model, id: NodeId) -> Option<(String, String)> {
    let (graph, plan) = (model.graph(), model.plan());
    // What is no linear node reads a table, or one transposed.
    let table = || Site::Use { node: id, input: 0 };
    let site = match ops::linear(graph, id) {
        Some(roles) => Site::Use { node: id, input: roles.weight },
        None if graph.constant_input(graph.node(id)?, 0).is_some() => table(),
        None => plan.transposed(graph, id).next()?,
    };
    let encoding = plan.encoding(site)?;
    Some((encoding.grid.info().about.name.to_owned(), granularity(encoding.granularity)))
}

fn weight_cost(outcome: &Outcome, id: NodeId) -> Option<Cost> {
    let roles = ops::linear(outcome.model.graph(), id)?;
    outcome.costs.as_ref()?.get(&Site::Use { node: id, input: roles.weight }).copied()
}

fn activation_cost(outcome: &Outcome, id: NodeId) -> Option<Cost> {
    let (graph, costs) = (outcome.model.graph(), outcome.costs.as_ref()?);
    let input = ops::linear(graph, id)?.activation;
    let value = graph.node(id)?.input(input.into())?;
    // What one node alone reads in codes counts before what all do.
    [Site::Use { node: id, input }, Site::Value(value)].iter().find_map(|site| costs.get(site)).copied()
}

/// Format of what node `id` reads.
pub(crate) fn activation(model: &Model, id: NodeId) -> Option<String> {
    let input = ops::linear(model.graph(), id).map_or(0, |roles| roles.activation);
    let constant = model.graph().node(id)?.input(input.into()).is_some_and(|v| model.graph().constant(v).is_some());
    let encoding = model.plan().encoding_of_use(model.graph(), id, input).filter(|_| !constant)?;
    let name = encoding.grid.info().about.name;
    Some(if encoding.granularity.is_dynamic() { format!("{name} dynamic") } else { name.to_owned() })
}

/// Who shares a scale, in words.
pub(crate) fn granularity(granularity: passes::encoding::Granularity) -> String {
    use passes::encoding::Granularity;
    match granularity {
        Granularity::Tensor => "tensor".into(),
        Granularity::Dynamic => "each run".into(),
        Granularity::DynamicRows { axis, .. } => format!("tokens along axis {axis}, each run"),
        Granularity::DynamicBlocks { axis, size } => format!("blocks of {size} on axis {axis}, each run"),
        Granularity::Axis(axis) => format!("axis {axis}"),
        Granularity::Block { axis, size } => format!("blocks of {size} on axis {axis}"),
    }
}

/// The most memory that this process ever held, where the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
