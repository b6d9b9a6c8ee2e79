//! From paths to bytes: memory maps, and the rules for external data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use proto::ExternalRef;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The operating system refused.
    #[error("cannot read `{path}`: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A location that leaves the model's folder, or is no regular file.
    #[error("external data `{location}` of tensor `{tensor}`: {problem}")]
    External {
        /// The tensor.
        tensor: String,
        /// As in the model.
        location: String,
        /// The rule that it breaks.
        problem: String,
    },
}

/// The bytes of the regular file at `path`, mapped.
///
/// # Errors
/// [`LoadError::Io`] when it cannot be opened or is no regular file.
pub fn map(path: &Path) -> Result<Bytes, LoadError> {
    let fail = |error| LoadError::Io { path: path.to_owned(), error };
    let file = File::open(path).map_err(fail)?;
    map_file(&file).map_err(fail)
}

fn map_file(file: &File) -> io::Result<Bytes> {
    let data = file.metadata()?;
    if !data.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if data.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and private to this process. Another process that truncates the file while we run can
    // make a read fault; that ends the run, which is what reading such a file deserves, and nothing was written yet.
    #[expect(
        unsafe_code,
        reason = "mapping a file is the one thing that cannot be said safely; weights must not be copied"
    )]
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}

/// A file that weights were read from, open for as long as they may be wanted.
#[derive(Debug)]
pub struct Source {
    /// Where it lies.
    pub path: PathBuf,
    file: File,
    bytes: Bytes,
}

impl Source {
    /// Where in this file `payload` lies, when it is a slice of its map.
    pub fn offset_of(&self, payload: &Bytes) -> Option<u64> {
        let offset = (payload.as_ptr() as usize).checked_sub(self.bytes.as_ptr() as usize)?;
        (offset.checked_add(payload.len())? <= self.bytes.len()).then_some(offset as u64)
    }

    /// Appends the `length` bytes from `offset` on to `out`, without bringing them into this process.
    ///
    /// # Errors
    /// What the system says, and the end of a file that has become shorter.
    pub fn copy(&self, offset: u64, length: u64, out: &mut File) -> io::Result<()> {
        let mut file = &self.file;
        file.seek(io::SeekFrom::Start(offset))?;
        let copied = io::copy(&mut file.take(length), out)?;
        if copied == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The external files of one model, each opened and mapped once.
#[derive(Debug)]
pub struct ExternalFiles {
    folder: PathBuf,
    sources: BTreeMap<String, Source>,
}

impl ExternalFiles {
    /// The files beside the model at `path`.
    pub fn beside(path: &Path) -> Self {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Self { folder: folder.to_owned(), sources: BTreeMap::new() }
    }

    /// Hands over the files that were opened.
    pub fn take_sources(&mut self) -> Vec<Source> {
        std::mem::take(&mut self.sources).into_values().collect()
    }

    /// The bytes of `reference`, which must have `wanted` bytes, as a slice of the mapped file.
    ///
    /// # Errors
    /// [`LoadError`] when the file is missing, lies outside the model's folder after symlinks are resolved, is no regular
    /// file, or does not have the bytes.
    pub fn read(&mut self, tensor: &str, reference: &ExternalRef, wanted: usize) -> Result<Bytes, LoadError> {
        let fail = |problem: String| LoadError::External {
            tensor: tensor.to_owned(),
            location: reference.location.clone(),
            problem,
        };
        let file = if let Some(source) = self.sources.get(&reference.location) {
            source.bytes.clone()
        } else {
            let source = self.open(&reference.location).map_err(fail)?;
            let bytes = source.bytes.clone();
            self.sources.insert(reference.location.clone(), source);
            bytes
        };
        if let Some(length) = reference.length.filter(|&length| length != wanted as u64) {
            return Err(fail(format!("has length {length} where the shape needs {wanted} bytes")));
        }
        let start = usize::try_from(reference.offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(wanted)?)).filter(|r| r.end <= file.len());
        let range = range.ok_or_else(|| {
            fail(format!("asks for {wanted} bytes at offset {} of a file of {}", reference.offset, file.len()))
        })?;
        Ok(file.slice(range))
    }

    fn open(&self, location: &str) -> Result<Source, String> {
        let folder = self.folder.canonicalize().map_err(|e| format!("the model's folder cannot be resolved: {e}"))?;
        let path = folder.join(location).canonicalize().map_err(|e| format!("cannot be opened: {e}"))?;
        if !path.starts_with(&folder) {
            return Err("leads outside the model's folder through a link".into());
        }
        let data = path.metadata().map_err(|e| format!("cannot be opened: {e}"))?;
        if !data.is_file() {
            return Err("is not a regular file".into());
        }
        let file = File::open(&path).map_err(|e| format!("cannot be opened: {e}"))?;
        let bytes = map_file(&file).map_err(|e| format!("cannot be mapped: {e}"))?;
        Ok(Source { path: self.folder.join(location), file, bytes })
    }
}
