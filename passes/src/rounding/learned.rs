//! Blocks that are learned as soon as all of their layers are rounded.

use std::collections::BTreeMap;

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::NodeId;
use crate::lockstep::{Lockstep, Span};
use crate::model::{Model, Patch};
use crate::pass::{PassContext, PassError};
use crate::reconstruct::{Block, BlockStakes, Learner, Turn};

/// What is learned on the way, of a model as it was `given`; nothing without a learner.
pub(super) struct Learning<'a> {
    learner: Option<&'a Learner>,
    given: &'a Model,
    blocks: Vec<(Block, Span)>,
    stakes: Option<BlockStakes>,
}

impl<'a> Learning<'a> {
    /// The blocks of `given` that `learner` learns, where nodes stand in these stages.
    ///
    /// # Errors
    /// [`PassError`] where the learner asks for what `given` has not, or samples cannot be run.
    pub(super) fn new(
        learner: Option<&'a Learner>,
        given: &'a Model,
        stage_of: &BTreeMap<NodeId, usize>,
        cx: &PassContext<'_>,
    ) -> Result<Self, PassError> {
        let Some(own) = learner else { return Ok(Self { learner, given, blocks: Vec::new(), stakes: None }) };
        own.check(given)?;
        let blocks = own.blocks(given.graph(), given.plan(), stage_of);
        let stakes = own.stakes(given, cx, &blocks)?;
        Ok(Self { learner, given, blocks, stakes })
    }

    /// The stages of every block.
    pub(super) fn spans(&self) -> Vec<Span> {
        self.blocks.iter().map(|(_, span)| span.clone()).collect()
    }

    /// How many steps it takes, at most.
    pub(super) fn steps(&self) -> u64 {
        self.learner.map_or(0, |learner| learner.steps(self.blocks.len()))
    }

    /// Learns the block whose last layers are those of `stage`, if there is one, and has `walk` run again through it.
    ///
    /// # Errors
    /// [`PassError`] where samples cannot be run, or the user interrupts.
    pub(super) fn after(
        &self,
        stage: usize,
        (walk, work): (&mut Lockstep<'_>, &mut Model),
        cx: &PassContext<'_>,
        patch: &mut Patch,
    ) -> Result<(), PassError> {
        let ended = self.blocks.iter().enumerate().find(|(_, (_, span))| span.last == stage);
        let (Some(learner), Some((number, (block, span)))) = (self.learner, ended) else { return Ok(()) };
        let turn = Turn { block, number, given: self.given.plan(), stakes: self.stakes.as_ref() };
        match learner.learn_once(walk, work, cx, &turn)? {
            Ok(edits) if edits.is_empty() => patch.count("blocks that learning did not help", 1),
            Ok(edits) => {
                patch.count("blocks learned", 1);
                patch.and_on(work, edits)?;
                walk.again(span.first, work.plan())?;
            }
            Err(reason) => {
                patch.count("blocks that gradients do not pass", 1);
                let message = format!("block {number} keeps the codes that it has: {reason}");
                patch.note(Diagnostic::new(diag::NO_GRADIENTS, Severity::Note, Place::Model, message));
            }
        }
        Ok(())
    }
}
