//! What was measured on calibration data.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::id::ValueId;
use crate::observe::{Means, Sketch};

/// One measurement of one tensor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Statistic {
    /// The distribution of all its values.
    Distribution(Arc<Sketch>),
    /// The mean of every channel.
    Means(Arc<Means>),
}

/// Measurements by tensor. An id never changes its meaning, so a statistic can be missing but never stale.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub(crate) distributions: BTreeMap<ValueId, Arc<Sketch>>,
    pub(crate) means: BTreeMap<ValueId, Arc<Means>>,
}

impl Stats {
    /// The distribution of `value`, where it was measured.
    pub fn distribution(&self, value: ValueId) -> Option<&Sketch> {
        self.distributions.get(&value).map(AsRef::as_ref)
    }

    /// The channel means of `value`, where they were measured.
    pub fn means(&self, value: ValueId) -> Option<&Means> {
        self.means.get(&value).map(AsRef::as_ref)
    }

    pub(crate) fn record(&mut self, value: ValueId, statistic: Statistic) {
        match statistic {
            Statistic::Distribution(sketch) => drop(self.distributions.insert(value, sketch)),
            Statistic::Means(means) => drop(self.means.insert(value, means)),
        }
    }

    /// The tensors of which anything was measured, in the order of their ids.
    pub fn values(&self) -> impl Iterator<Item = ValueId> + '_ {
        let all: std::collections::BTreeSet<ValueId> =
            self.distributions.keys().chain(self.means.keys()).copied().collect();
        all.into_iter()
    }
}
