//! Calibration samples from files.
//!
//! A file holds one feed: a tensor per graph input, possibly for several samples. Where the model's leading dimension is
//! open, feeds are cut into single samples, so that the result does not depend on how samples were batched. Files are read
//! when their samples are asked for, and only the last few are kept.

mod augment;
mod drawn;
mod files;
mod fit;
mod images;
mod imagined;
mod rounds;
mod views;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use passes::exec::{DataError, Dataset};
use passes::ir::{Dim, Graph, TensorType};
use passes::tensor::Tensor;

pub use augment::Augmented;
pub use images::{ImageError, ImageOptions};
pub use imagined::Imagined;
pub use views::Views;

/// Feeds kept in memory: workers ask for neighbors.
const KEPT: usize = 2;

/// What a graph input takes.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its declared type.
    pub ty: TensorType,
}

impl Slot {
    /// The inputs of `graph`, in order.
    pub fn of(graph: &Graph) -> Vec<Self> {
        let slot = |id: &passes::id::ValueId| {
            let value = graph.value(*id);
            Self { name: value.name.to_string(), ty: value.ty.tensor().cloned().unwrap_or_default() }
        };
        graph.inputs().iter().map(slot).collect()
    }
}

/// One feed's place on disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// `.npz`, `.npy`, `.safetensors` or `.pb`.
    File(PathBuf),
    /// A folder of `input_0.pb`, `input_1.pb`, …
    PbFolder(PathBuf),
    /// A picture.
    Image(PathBuf),
}

impl Source {
    fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::PbFolder(path) | Self::Image(path) => path,
        }
    }
}

/// Samples from a file or a folder.
#[derive(Debug)]
pub struct Files {
    slots: Vec<Slot>,
    sources: Vec<Source>,
    image: Option<ImageOptions>,
    /// Per sample, its source and the row of its feed.
    samples: Vec<(usize, usize)>,
    split: bool,
    kept: Mutex<Vec<(usize, Arc<Vec<Tensor>>)>>,
}

impl Files {
    /// The samples at `path` for a model with inputs `slots`. Every file is read once to count and check its samples.
    ///
    /// # Errors
    /// [`DataError`] for a path without samples, a file that cannot be read or does not fit the inputs (with what they
    /// take), and NaN or infinite values.
    pub fn open(
        path: &Path,
        slots: Vec<Slot>,
        image: Option<ImageOptions>,
        limit: Option<usize>,
    ) -> Result<Self, DataError> {
        let sources = sources(path, image.is_some())?;
        if sources.is_empty() {
            return Err(data_error(
                path,
                "there are no .npz, .npy, .pb, .safetensors files here, and images need --image",
            ));
        }
        let slots = counting_samples(slots);
        let split = opens_with_batch(&slots);
        let mut files = Self { slots, sources, image, samples: Vec::new(), split, kept: Mutex::new(Vec::new()) };
        let limit = limit.unwrap_or(usize::MAX);
        for index in 0..files.sources.len() {
            if files.samples.len() >= limit {
                break;
            }
            let feed = files.feed(index)?;
            let rows =
                if split { fit::rows(&feed).map_err(|p| data_error(files.sources[index].path(), p))? } else { 1 };
            files.samples.extend((0..rows).map(|row| (index, row)));
        }
        files.samples.truncate(limit);
        if files.samples.is_empty() {
            return Err(data_error(path, "the files hold no sample"));
        }
        Ok(files)
    }

    /// Whether feeds are cut into single samples.
    pub fn is_split(&self) -> bool {
        self.split
    }

    /// How many samples.
    pub fn n_samples(&self) -> usize {
        self.samples.len()
    }

    /// How many files.
    pub fn n_files(&self) -> usize {
        self.sources.len()
    }

    /// Keeps only the samples with the numbers `chosen`, in their order.
    pub fn keep(&mut self, chosen: &[usize]) {
        self.samples = chosen.iter().filter_map(|&at| self.samples.get(at).copied()).collect();
    }

    /// Another view of the same files with only the samples with the numbers `chosen`.
    #[must_use]
    pub fn only(&self, chosen: &[usize]) -> Self {
        let (slots, sources, image) = (self.slots.clone(), self.sources.clone(), self.image.clone());
        let samples = chosen.iter().filter_map(|&at| self.samples.get(at).copied()).collect();
        Self { slots, sources, image, samples, split: self.split, kept: Mutex::new(Vec::new()) }
    }

    fn feed(&self, index: usize) -> Result<Arc<Vec<Tensor>>, DataError> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, feed)) = kept().iter().find(|(at, _)| *at == index) {
            return Ok(Arc::clone(feed));
        }
        let source = &self.sources[index];
        let fail = |problem: String| data_error(source.path(), problem);
        let named = match (source, &self.image) {
            (Source::File(path), _) => files::read(path, &self.slots).map_err(fail)?,
            (Source::PbFolder(path), _) => files::read_pb_folder(path, &self.slots).map_err(fail)?,
            (Source::Image(path), Some(options)) => images::read(path, &self.slots, options).map_err(fail)?,
            (Source::Image(_), None) => return Err(fail("images need --image mean=…,std=…,size=…".into())),
        };
        let feed = Arc::new(fit::feed(&named, &self.slots, self.split).map_err(fail)?);
        let mut kept = kept();
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((index, Arc::clone(&feed)));
        Ok(feed)
    }
}

impl Dataset for Files {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> String {
        match self.samples.get(index) {
            Some(&(source, row)) => format!("{}, sample {row}", self.sources[source].path().display()),
            None => format!("sample {index}"),
        }
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let &(source, row) = self.samples.get(index).ok_or_else(|| DataError {
            sample: format!("sample {index}"),
            problem: format!("there are only {}", self.samples.len()),
        })?;
        let feed = self.feed(source)?;
        if !self.split {
            return Ok(feed.as_ref().clone());
        }
        feed.iter()
            .map(|tensor| fit::row(tensor, row).map_err(|p| data_error(self.sources[source].path(), p)))
            .collect()
    }
}

fn data_error(path: &Path, problem: impl Into<String>) -> DataError {
    DataError { sample: path.display().to_string(), problem: problem.into() }
}

/// Whether the leading dimension of every input is open, so that it counts samples.
/// `slots`, where each takes exactly one sample with any number of them: files are cut into single ones.
fn counting_samples(mut slots: Vec<Slot>) -> Vec<Slot> {
    let one = |slot: &Slot| slot.ty.shape.as_ref().is_some_and(|shape| shape.first() == Some(&Dim::Known(1)));
    if slots.iter().all(one) {
        for dim in slots.iter_mut().filter_map(|slot| slot.ty.shape.as_mut()?.first_mut()) {
            *dim = Dim::Unknown;
        }
    }
    slots
}

fn opens_with_batch(slots: &[Slot]) -> bool {
    let leading = |slot: &Slot| slot.ty.shape.as_ref().and_then(|shape| shape.first().cloned());
    !slots.is_empty() && slots.iter().all(|slot| leading(slot).is_some_and(|dim| !matches!(dim, Dim::Known(_))))
}

fn sources(path: &Path, images: bool) -> Result<Vec<Source>, DataError> {
    let data = path.metadata().map_err(|e| data_error(path, format!("cannot be read: {e}")))?;
    if data.is_file() {
        return Ok(source_of(path, images).into_iter().collect());
    }
    let mut sources = Vec::new();
    let entries = std::fs::read_dir(path).map_err(|e| data_error(path, format!("cannot be listed: {e}")))?;
    for entry in entries {
        let entry = entry.map_err(|e| data_error(path, format!("cannot be listed: {e}")))?.path();
        if entry.is_dir() {
            if entry.join("input_0.pb").is_file() {
                sources.push(Source::PbFolder(entry));
            }
        } else {
            sources.extend(source_of(&entry, images));
        }
    }
    if path.join("input_0.pb").is_file() {
        return Ok(vec![Source::PbFolder(path.to_owned())]);
    }
    sources.sort();
    Ok(sources)
}

fn source_of(path: &Path, images: bool) -> Option<Source> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "npz" | "npy" | "pb" | "safetensors" => Some(Source::File(path.to_owned())),
        "png" | "jpg" | "jpeg" | "bmp" | "webp" | "pgm" | "ppm" if images => Some(Source::Image(path.to_owned())),
        _ => None,
    }
}
