//! Local rewrites, and the sweep that makes a pass of one.

use std::borrow::Cow;

use super::{Pass, PassContext, PassError, PassInfo};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::target::KeepFloat;

/// A local rewrite.
pub trait Rewrite: std::fmt::Debug + Send + Sync {
    /// Name, documentation, facts.
    fn info(&self) -> &'static PassInfo;
    /// The ai.onnx operators to stop at; empty for all.
    fn anchors(&self) -> &'static [&'static str];
    /// Adds to `patch` what rewriting at `site` takes. After a [`Miss`] the sweep undoes what was added.
    ///
    /// # Errors
    /// [`Miss`] when nothing is to be done here.
    fn rewrite(&self, site: &Site<'_>, patch: &mut Patch) -> Result<(), Miss>;
}

/// Where a rewrite looks.
pub struct Site<'a> {
    /// The model.
    pub model: &'a Model,
    /// Who reads what.
    pub users: &'a Users,
    /// What stays in float because the user said so.
    pub keep_float: &'a KeepFloat,
    /// The node it stopped at.
    pub id: NodeId,
    /// That node.
    pub node: &'a Node,
}

impl<'a> Site<'a> {
    /// The graph.
    pub fn graph(&self) -> &'a Graph {
        self.model.graph()
    }

    /// The producer of `value`, when this is its only reader and it is no graph output.
    pub fn sole_producer(&self, value: ValueId) -> Option<(NodeId, &'a Node)> {
        self.users.only_input(value)?;
        self.graph().producer(value)
    }
}

/// Why nothing was rewritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    /// The pattern is not here.
    NoMatch,
    /// The pattern is here, but the rewrite would be wrong: shown to the user, not swallowed.
    Blocked(Cow<'static, str>),
}

/// The pass that tries a rewrite at every node.
#[derive(Debug)]
pub struct Sweep<R>(pub R);

impl<R: Rewrite> Pass for Sweep<R> {
    fn info(&self) -> &'static PassInfo {
        self.0.info()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let users = Users::of(model.graph());
        let mut patch = Patch::on(model);
        let anchors = self.0.anchors();
        for (id, node) in model.graph().nodes() {
            let stops = anchors.is_empty() || anchors.iter().any(|name| node.op.is(name));
            if !stops || patch.touches(id) {
                continue;
            }
            let mark = patch.mark();
            match self.0.rewrite(&Site { model, users: &users, keep_float: cx.keep_float, id, node }, &mut patch) {
                Ok(()) => {}
                Err(miss) => {
                    patch.roll_back(&mark);
                    if let Miss::Blocked(reason) = miss {
                        let place = Place::Node(std::sync::Arc::clone(&node.name));
                        let message = format!("{}: {reason}", self.0.info().about.name);
                        patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Note, place, message));
                    }
                }
            }
        }
        Ok(patch)
    }
}
