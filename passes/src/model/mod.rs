//! What flows through the middle: a float graph, what was measured on it, what was decided about it.

pub(crate) mod bias;
mod patch;
mod plan;
pub(crate) mod record;
mod region;
mod stats;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

pub use patch::{Edit, Patch, PatchError, can_redirect};
pub use plan::{Decision, GAP, Leanings, Plan};
pub use stats::{Statistic, Stats, Trained};

use crate::id::Name;
use crate::ir::{Graph, check};
use crate::pass::Facts;

/// The model between import and lowering.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) graph: Graph,
    pub(crate) stats: Stats,
    pub(crate) plan: Plan,
    /// Carried from the wire to the wire.
    pub meta: Arc<Metadata>,
    pub(crate) facts: Facts,
    pub(crate) revision: u64,
}

/// What the file says besides the graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Domain (empty: ai.onnx) to imported version.
    pub opsets: BTreeMap<Name, u32>,
    /// `producer_name`, `producer_version`, `domain`, `doc_string`, in this order.
    pub header: [String; 4],
    /// `model_version`.
    pub model_version: i64,
    /// `metadata_props`, in order.
    pub entries: Vec<(String, String)>,
    /// What no pass reads (training information, device configurations): an encoded `ModelProto` with just that.
    pub rest: Bytes,
}

impl Metadata {
    /// The imported version of ai.onnx.
    pub fn opset(&self) -> u32 {
        self.opsets.get("").copied().unwrap_or(0)
    }
}

impl Model {
    /// A model of which only the graph is known.
    ///
    /// # Errors
    /// The structural rule that `graph` breaks.
    pub fn new(graph: Graph, meta: Metadata) -> Result<Self, check::CheckError> {
        check::check(&graph)?;
        Ok(Self {
            graph,
            stats: Stats::default(),
            plan: Plan::default(),
            meta: Arc::new(meta),
            facts: Facts::NONE,
            revision: 0,
        })
    }

    /// The float graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// What was measured.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Lets go of second moments, which take more memory than all else that was measured, when nobody will read them again.
    pub fn drop_moments(&mut self) {
        self.stats.grams.clear();
    }

    /// What was decided.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What passes have established.
    pub fn facts(&self) -> Facts {
        self.facts
    }
}
