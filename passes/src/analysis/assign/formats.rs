//! Which small float fits a weight best.
//!
//! Of as many bits, more for the exponent reach further and more for the mantissa step finer; which is better depends on how the numbers
//! of a weight are distributed. Biases of exponents play no part: scales are free.
//!
//! Source: Kuzmin et al. 2022, arXiv:2208.09225, section 3.2 (the best division of bits per tensor); Chen et al. 2024, arXiv:2408.06995, for
//! weights of 4 bits.

use std::collections::BTreeMap;

use super::{Goal, Goals, parameters};
use crate::grid::{self, Grid};
use crate::id::NodeId;
use crate::model::{Edit, Model};
use crate::pass::PassContext;
use crate::target::Scheme;
use crate::{ops, parallel};

/// Per linear node whose goal is a small float, its goal with another one that fits its weight better, where there is one.
pub(super) fn search(model: &Model, cx: &PassContext<'_>, goals: &Goals) -> BTreeMap<NodeId, Goal> {
    let nodes: Vec<NodeId> = model.graph().nodes().map(|(id, _)| id).collect();
    let best = parallel::map(&nodes, |id| best(model, cx, *id, goals.of(*id)));
    nodes.into_iter().zip(best).filter_map(|(id, goal)| Some((id, goal?))).collect()
}

/// The goal with the smallest squared error of rounding to nearest, if it is another than `goal`.
fn best(model: &Model, cx: &PassContext<'_>, id: NodeId, goal: &Goal) -> Option<Goal> {
    let is_free = !goal.weight_grid.info().integer && goal.scheme.block_format().is_none();
    is_free.then_some(())?;
    let mut best = (None, loss(model, id, goal)?);
    for other in others(cx, goal) {
        let other = Goal { weight_grid: other, ..*goal };
        let loss = loss(model, id, &other)?;
        if loss < best.1 {
            best = (Some(other), loss);
        }
    }
    best.0
}

/// The minifloats with as many bits as `goal` that its target takes.
fn others(cx: &PassContext<'_>, goal: &Goal) -> impl Iterator<Item = &'static dyn Grid> {
    let (own, scheme, target) = (goal.weight_grid.info(), goal.scheme, cx.target);
    let fits = move |grid: &&'static dyn Grid| {
        let info = grid.info();
        let is_minifloat = info.about.name.starts_with('e') && !info.integer && info.bits == own.bits;
        let asked = Scheme { weight_format: Some(info.about.name), ..scheme };
        is_minifloat && info.about.name != own.about.name && target.refuses(&asked).is_none()
    };
    grid::all().filter(fits)
}

/// The squared error of the weight of node `id` under `goal`.
fn loss(model: &Model, id: NodeId, goal: &Goal) -> Option<f64> {
    let graph = model.graph();
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(graph.node(id)?, roles.weight.into())?;
    let Edit::Encode { encoding, .. } = parameters::weight_alone(model, id, goal)? else { return None };
    let values = weight.floats()?;
    let mut rounded = values.to_vec();
    encoding.simulate(&mut rounded, weight.shape()).ok()?;
    Some(values.iter().zip(&rounded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum())
}
