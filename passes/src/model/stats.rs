//! What was measured on calibration data, and what is known of training data.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::id::ValueId;
use crate::observe::{Ends, Gram, Judges, Means, Peaks, Rows, Sketch};

/// One measurement of one tensor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Statistic {
    /// The distribution of all its values.
    Distribution(Arc<Sketch>),
    /// The distribution on samples that judge.
    Judges(Arc<Judges>),
    /// The mean of every channel.
    Means(Arc<Means>),
    /// The largest magnitude of every index of an axis.
    Peaks {
        /// The axis.
        axis: usize,
        /// What was measured.
        peaks: Arc<Peaks>,
    },
    /// The least, the largest and the mean value of every index of an axis.
    Ends {
        /// The axis.
        axis: usize,
        /// What was measured.
        ends: Arc<Ends>,
    },
    /// The second moments of its rows.
    Gram {
        /// How rows are cut.
        rows: Rows,
        /// What was measured.
        gram: Arc<Gram>,
    },
    /// What training saw of it.
    Trained(Arc<Trained>),
}

/// What batch normalization saw of a tensor in training, channel by channel of its second axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Means.
    pub mean: Arc<[f32]>,
    /// Standard deviations.
    pub deviation: Arc<[f32]>,
}

impl Trained {
    /// What training would have seen of the tensor with channel j divided by `s[j]`; `None` where there are not as many channels.
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 once")]
    pub(crate) fn divided(&self, s: &[f64]) -> Option<Self> {
        let by = |values: &[f32]| values.iter().zip(s).map(|(v, s)| (f64::from(*v) / s) as f32).collect();
        let fits = self.mean.len() == s.len();
        fits.then(|| Self { mean: by(&self.mean), deviation: by(&self.deviation) })
    }
}

/// Measurements by tensor. An id never changes its meaning, so a statistic can be missing but never stale.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub(crate) distributions: BTreeMap<ValueId, Arc<Sketch>>,
    pub(crate) judges: BTreeMap<ValueId, Arc<Judges>>,
    pub(crate) means: BTreeMap<ValueId, Arc<Means>>,
    pub(crate) peaks: BTreeMap<(ValueId, usize), Arc<Peaks>>,
    pub(crate) ends: BTreeMap<(ValueId, usize), Arc<Ends>>,
    pub(crate) grams: BTreeMap<(ValueId, Rows), Arc<Gram>>,
    pub(crate) trained: BTreeMap<ValueId, Arc<Trained>>,
}

impl Stats {
    /// The distribution of `value`, where it was measured.
    pub fn distribution(&self, value: ValueId) -> Option<&Sketch> {
        self.distributions.get(&value).map(AsRef::as_ref)
    }

    /// The distribution of `value` on samples that judge, where it was measured.
    pub fn judges(&self, value: ValueId) -> Option<&Judges> {
        self.judges.get(&value).map(AsRef::as_ref)
    }

    /// The channel means of `value`, where they were measured.
    pub fn means(&self, value: ValueId) -> Option<&Means> {
        self.means.get(&value).map(AsRef::as_ref)
    }

    /// The largest magnitude of every index of `axis` of `value`, where it was measured.
    pub fn peaks(&self, value: ValueId, axis: usize) -> Option<&Peaks> {
        self.peaks.get(&(value, axis)).map(AsRef::as_ref)
    }

    /// The least, the largest and the mean value of every index of `axis` of `value`, where they were measured.
    pub fn ends(&self, value: ValueId, axis: usize) -> Option<&Ends> {
        self.ends.get(&(value, axis)).map(AsRef::as_ref)
    }

    /// The second moments of the `rows` of `value`, where they were measured.
    pub fn gram(&self, value: ValueId, rows: Rows) -> Option<&Arc<Gram>> {
        self.grams.get(&(value, rows))
    }

    /// What training saw of `value`, where a batch normalization that was folded into its producer says so.
    pub fn trained(&self, value: ValueId) -> Option<&Arc<Trained>> {
        self.trained.get(&value)
    }

    pub(crate) fn record(&mut self, value: ValueId, statistic: Statistic) {
        match statistic {
            Statistic::Distribution(sketch) => drop(self.distributions.insert(value, sketch)),
            Statistic::Judges(judges) => drop(self.judges.insert(value, judges)),
            Statistic::Means(means) => drop(self.means.insert(value, means)),
            Statistic::Peaks { axis, peaks } => drop(self.peaks.insert((value, axis), peaks)),
            Statistic::Ends { axis, ends } => drop(self.ends.insert((value, axis), ends)),
            Statistic::Gram { rows, gram } => drop(self.grams.insert((value, rows), gram)),
            Statistic::Trained(trained) => drop(self.trained.insert(value, trained)),
        }
    }

    /// Drops what samples brought of `value`; what training saw stays.
    pub(crate) fn forget(&mut self, value: ValueId) {
        self.distributions.remove(&value);
        self.judges.remove(&value);
        self.means.remove(&value);
        self.peaks.retain(|(of, _), _| *of != value);
        self.ends.retain(|(of, _), _| *of != value);
        self.grams.retain(|(of, _), _| *of != value);
    }

    /// The tensors of which anything was measured on samples, in the order of their ids.
    pub fn values(&self) -> impl Iterator<Item = ValueId> + '_ {
        let all: std::collections::BTreeSet<ValueId> =
            self.distributions.keys().chain(self.means.keys()).copied().collect();
        all.into_iter()
    }
}
