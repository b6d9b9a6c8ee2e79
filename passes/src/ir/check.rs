//! Structural rules that every graph keeps; `Model::apply` and `opt --check` run them.
//!
//! 1. Value names are unique and not empty.
//! 2. Every input of a node is defined before the node in the order.
//! 3. A value says it is output `i` of node `n` exactly where `n` says so.
//! 4. Graph inputs are `Def::Input`; graph outputs exist.
//! 5. Captures of a body name values that are defined before the node that has the body.
//! 6. Bodies keep the same rules.

use std::collections::BTreeSet;

use super::{Def, Graph, walk};
use crate::id::{Name, ValueId};

/// A broken rule, with its place.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct CheckError {
    /// The node or value.
    pub place: Name,
    /// The rule, and how it is broken.
    pub problem: String,
}

/// Checks `graph` and its bodies.
///
/// # Errors
/// The first rule that does not hold.
pub fn check(graph: &Graph) -> Result<(), CheckError> {
    let fail = |place: &str, problem: String| Err(CheckError { place: place.into(), problem });
    let mut names = BTreeSet::new();
    let mut ready = vec![false; graph.n_values()];
    let inputs: BTreeSet<ValueId> = graph.inputs.iter().copied().collect();
    for id in graph.value_ids() {
        let value = graph.value(id);
        if value.name.is_empty() || !names.insert(&value.name) {
            return fail(&value.name, "value names must be unique and not empty".into());
        }
        match value.def {
            Def::Output { node, index } => {
                if graph.node(node).is_some_and(|node| node.output(index.into()) != Some(id)) {
                    return fail(&value.name, format!("says it is output {index} of a node that does not say so"));
                }
            }
            // What was an input once is nothing any more.
            Def::Input => ready[id.index()] = inputs.contains(&id),
            Def::Const(_) | Def::Capture(_) => ready[id.index()] = true,
        }
    }
    for (id, node) in graph.nodes() {
        if let Some(value) = walk::reads(node).find(|value| !ready.get(value.index()).copied().unwrap_or(false)) {
            let name = graph.values.get(value.index()).map_or("a value of another graph", |v| &v.name);
            return fail(&node.name, format!("reads `{name}` before anything defines it"));
        }
        for (index, output) in node.outputs.iter().enumerate() {
            let Some(output) = output else { continue };
            let says = matches!(graph.values.get(output.index()).map(|v| &v.def),
                Some(Def::Output { node, index: i }) if *node == id && usize::from(*i) == index);
            if !says {
                return fail(&node.name, format!("output {index} is a value that names another origin"));
            }
            ready[output.index()] = true;
        }
        for body in &node.bodies {
            check(&body.graph)?;
        }
    }
    let ends = |ids: &[ValueId]| ids.iter().all(|id| ready.get(id.index()).copied().unwrap_or(false));
    if !ends(&graph.inputs) || !ends(&graph.outputs) {
        return fail(graph.name(), "a graph input or output is not defined".into());
    }
    if let Some(input) = graph.inputs.iter().find(|id| !matches!(graph.value(**id).def, Def::Input)) {
        return fail(&graph.value(*input).name, "is a graph input but something else defines it".into());
    }
    Ok(())
}
