//! What was measured on calibration data.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::id::ValueId;
use crate::observe::Sketch;

/// One measurement of one tensor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Statistic {
    /// The distribution of all its values.
    Distribution(Arc<Sketch>),
}

/// Measurements by tensor. An id never changes its meaning, so a statistic can be missing but never stale.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub(crate) by_value: BTreeMap<ValueId, Statistic>,
}

impl Stats {
    /// The distribution of `value`, where it was measured.
    pub fn distribution(&self, value: ValueId) -> Option<&Sketch> {
        match self.by_value.get(&value)? {
            Statistic::Distribution(sketch) => Some(sketch),
        }
    }

    /// The measured tensors, in the order of their ids.
    pub fn values(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.by_value.keys().copied()
    }
}
