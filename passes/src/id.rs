//! Ids: dense numbers that never change their meaning within one graph.

use std::fmt;
use std::sync::Arc;

/// A name as people and the model's interface know it.
pub type Name = Arc<str>;

/// One real-valued function of the graph's inputs, for ever: a rewrite that needs another function mints another id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub(crate) u32);

/// One node of one graph; ids are not reused after a node is erased.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

impl ValueId {
    /// The position in dense tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    /// The position in dense tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// A place where a tensor is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// The tensor itself, for everyone who reads it.
    Value(ValueId),
    /// One input of one node.
    Use {
        /// The reader.
        node: NodeId,
        /// Which of its inputs.
        input: u16,
    },
}
