//! Statistics as files: measured anywhere, merged, and used instead of samples.
//!
//! The file is JSON: per tensor name the filled buckets of its sketch, the exact ends, and the counts. Merging adds counts, so
//! the result does not depend on how the samples were split or in which order the parts are joined.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use passes::model::{Edit, Model, Patch, Statistic};
use passes::observe::{Means, Sketch};
use serde::{Deserialize, Serialize};

use crate::driver::Error;
use crate::emit;

/// The version of the file format.
const VERSION: u32 = 1;

/// A file of statistics.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatsFile {
    /// The version of the format.
    pub version: u32,
    /// Samples that were measured.
    pub samples: u64,
    /// By tensor name.
    pub tensors: BTreeMap<String, Distribution>,
    /// Channel means, by tensor name.
    #[serde(default)]
    pub means: BTreeMap<String, ChannelMeans>,
}

/// The channel means of one tensor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelMeans {
    /// The axis that the channels lie on.
    pub axis: usize,
    /// Values per channel.
    pub count: u64,
    /// Sums in units of 2^-60, in decimal: JSON numbers would lose digits.
    pub sums: Vec<String>,
}

impl ChannelMeans {
    fn of(means: &Means) -> Self {
        let (axis, sums, count) = means.to_parts();
        Self { axis, count, sums: sums.iter().map(ToString::to_string).collect() }
    }

    fn means(&self) -> Option<Means> {
        let sums: Option<Vec<i128>> = self.sums.iter().map(|sum| sum.parse().ok()).collect();
        Means::from_parts(self.axis, sums?, self.count)
    }
}

/// One tensor's distribution. The ends are bit patterns of f32, so that nothing is lost in text.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distribution {
    /// The bits of the smallest finite value.
    pub min_bits: u32,
    /// The bits of the largest finite value.
    pub max_bits: u32,
    /// Bucket number and count, ascending.
    pub buckets: Vec<(u32, u64)>,
}

impl Distribution {
    fn of(sketch: &Sketch) -> Self {
        let (buckets, min, max) = sketch.to_parts();
        Self { min_bits: min.to_bits(), max_bits: max.to_bits(), buckets }
    }

    fn sketch(&self) -> Option<Sketch> {
        Sketch::from_parts(&self.buckets, f32::from_bits(self.min_bits), f32::from_bits(self.max_bits))
    }
}

impl StatsFile {
    /// What was measured on `model`, over `samples` samples.
    pub fn of(samples: u64, model: &Model) -> Self {
        let mut file = Self { version: VERSION, samples, ..Self::default() };
        for id in model.stats().values() {
            let name = model.graph().value(id).name.to_string();
            if let Some(sketch) = model.stats().distribution(id) {
                file.tensors.insert(name.clone(), Distribution::of(sketch));
            }
            if let Some(means) = model.stats().means(id) {
                file.means.insert(name, ChannelMeans::of(means));
            }
        }
        file
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`Error::Input`] when it cannot be read or is no file of this version.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let fail = |e: &dyn std::fmt::Display| Error::Input(format!("statistics `{}`: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
        let file: Self = serde_json::from_str(&text).map_err(|e| fail(&e))?;
        if file.version != VERSION {
            return Err(fail(&format!("version {} is not {VERSION}", file.version)));
        }
        Ok(file)
    }

    /// Writes the file at `path`.
    ///
    /// # Errors
    /// [`Error::Resources`].
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        emit::atomically(path, |out| {
            serde_json::to_writer(&mut *out, self)?;
            out.write_all(b"\n")
        })?;
        Ok(())
    }

    /// What both measured together.
    ///
    /// # Errors
    /// [`Error::Input`] when a distribution contradicts itself or the counts overflow.
    pub fn merged(mut self, other: Self) -> Result<Self, Error> {
        let bad = |name: &str| Error::Input(format!("the distribution of `{name}` contradicts itself"));
        self.samples = self.samples.checked_add(other.samples).ok_or_else(|| bad("samples"))?;
        for (name, theirs) in other.tensors {
            let joined = match self.tensors.get(&name) {
                None => theirs,
                Some(mine) => {
                    let (a, b) = mine.sketch().zip(theirs.sketch()).ok_or_else(|| bad(&name))?;
                    let total = (a.finite() + a.nonfinite()).checked_add(b.finite() + b.nonfinite());
                    let mut sketch = a;
                    total.ok_or_else(|| bad(&name))?;
                    sketch.merge(&b);
                    Distribution::of(&sketch)
                }
            };
            self.tensors.insert(name, joined);
        }
        for (name, theirs) in other.means {
            let joined = match self.means.get(&name) {
                None => theirs,
                Some(mine) => {
                    let (mut a, b) = mine.means().zip(theirs.means()).ok_or_else(|| bad(&name))?;
                    a.merge(&b);
                    ChannelMeans::of(&a)
                }
            };
            self.means.insert(name, joined);
        }
        Ok(self)
    }
}

/// `model` with the statistics in the file at `path`, matched by tensor name.
///
/// # Errors
/// [`Error::Input`] when the file is none, or names no tensor of the model.
pub fn attach(mut model: Model, path: &Path) -> Result<Model, Error> {
    let file = StatsFile::read(path)?;
    let mut patch = Patch::on(&model);
    for id in model.graph().value_ids() {
        let name = &model.graph().value(id).name;
        if let Some(distribution) = file.tensors.get(&**name) {
            let sketch = distribution.sketch();
            let sketch =
                sketch.ok_or_else(|| Error::Input(format!("the distribution of `{name}` contradicts itself")))?;
            patch.edit(Edit::Record { value: id, statistic: Statistic::Distribution(Arc::new(sketch)) });
        }
        if let Some(means) = file.means.get(&**name) {
            let means = means.means();
            let means = means.ok_or_else(|| Error::Input(format!("the means of `{name}` contradict themselves")))?;
            patch.edit(Edit::Record { value: id, statistic: Statistic::Means(Arc::new(means)) });
        }
    }
    if patch.is_empty() {
        return Err(Error::Input(format!("statistics `{}` name no tensor of this model", path.display())));
    }
    model.apply(patch).map_err(Error::input)?;
    Ok(model)
}
