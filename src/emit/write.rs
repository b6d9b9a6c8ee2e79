//! Files that appear whole or not at all.

use std::io::{self, BufWriter, Seek as _, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tempfile::{NamedTempFile, TempDir};

use super::Artifact;
use crate::load::Source;

/// Why nothing was written. What stood at the path before still stands there.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{path}`: {error}")]
pub struct WriteError {
    /// Where.
    pub path: PathBuf,
    /// What the system said.
    pub error: io::Error,
}

/// Files and folders that are being written, for the case that the process has to end at once.
static UNDER_WAY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A path in [`UNDER_WAY`] for as long as this lives.
#[derive(Debug)]
struct Registered(PathBuf);

impl Registered {
    fn new(path: &Path) -> Self {
        UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.0);
    }
}

/// Removes everything that is half written. Only for a process that ends right after.
pub fn discard_staged() {
    for path in UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // Best effort: there is nobody left to tell.
        let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> WriteError + '_ {
    move |error| WriteError { path: path.to_owned(), error }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file beside `path` and renames it into place when `fill` is done.
///
/// # Errors
/// [`WriteError`].
pub fn atomically(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), WriteError> {
    let fail = failed(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".onnx-quant-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // the umask takes away what the user wants gone
    }
    let mut file: NamedTempFile = builder.tempfile_in(folder_of(path)).map_err(&fail)?;
    let _registered = Registered::new(file.path());
    let mut buffered = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    fill(&mut buffered).map_err(&fail)?;
    buffered.flush().map_err(&fail)?;
    drop(buffered);
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

/// A model written whole, under its final names, in a folder of its own beside where it will lie. Dropped, it disappears.
#[derive(Debug)]
pub struct Staged {
    folder: TempDir,
    _registered: Registered,
    target: PathBuf,
    names: Vec<PathBuf>,
    /// Whether the folder that the files lie in becomes the one of `target`, whatever that held.
    whole: bool,
}

impl Staged {
    /// Nothing yet, in a folder beside `beside`; files are to lie where `target` does.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn begin(target: &Path, beside: &Path) -> Result<Self, WriteError> {
        let fail = failed(target);
        if target.file_name().is_none() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it names no file")));
        }
        let folder = tempfile::Builder::new().prefix(".onnx-quant-").tempdir_in(folder_of(beside)).map_err(&fail)?;
        let registered = Registered::new(folder.path());
        Ok(Self { folder, _registered: registered, target: target.to_owned(), names: Vec::new(), whole: false })
    }

    /// The same for files that become the folder `home`, in which `target` is the main one.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn folder(target: &Path, home: &Path) -> Result<Self, WriteError> {
        let staged = Self { whole: true, ..Self::begin(target, home)? };
        std::fs::create_dir(staged.place()).map_err(failed(home))?;
        Ok(staged)
    }

    /// The folder that the files lie in now.
    fn place(&self) -> PathBuf {
        if self.whole { self.folder.path().join("new") } else { self.folder.path().to_owned() }
    }

    /// Adds the file called `name`, which `fill` writes at the path that it is given. The last one added is the main file.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn add(&mut self, name: &str, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), WriteError> {
        fill(&self.place().join(name)).map_err(failed(&self.target))?;
        self.names.push(name.into());
        Ok(())
    }

    /// Adds `model` under the name that the target has.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn add_model(&mut self, model: proto::onnx::ModelProto) -> Result<(), WriteError> {
        let name = self.target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.add(&name, |path| fill(path, |out| proto::encode_to(model, out)))
    }

    /// Writes `artifact`, which is to lie at `target`. Payloads that are slices of `sources` are copied from file to file.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write(artifact: Artifact, target: &Path, sources: &[Source]) -> Result<Self, WriteError> {
        let mut staged = Self::begin(target, target)?;
        let Artifact { model, external, external_name } = artifact;
        if !external.is_empty() {
            staged.add(&external_name, |path| payloads(path, &external, sources))?;
        }
        staged.add_model(model)?;
        Ok(staged)
    }

    /// The main file, where it lies now.
    pub fn path(&self) -> PathBuf {
        self.place().join(self.names.last().map_or(Path::new(""), PathBuf::as_path))
    }

    /// The bytes of all files.
    ///
    /// # Errors
    /// [`WriteError`] when a file cannot be asked.
    pub fn bytes(&self) -> Result<u64, WriteError> {
        let size = |name: &PathBuf| Ok(self.place().join(name).metadata()?.len());
        self.names.iter().map(size).sum::<io::Result<u64>>().map_err(failed(&self.target))
    }

    /// Moves the files to where they belong: external data first, so that the model never lacks it.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn publish(self) -> Result<(), WriteError> {
        let home = folder_of(&self.target);
        if self.whole {
            // One rename, or two where there was one of ours before: never a new file beside an old one.
            if home.exists() {
                std::fs::rename(home, self.folder.path().join("old")).map_err(failed(home))?;
            }
            return std::fs::rename(self.place(), home).map_err(failed(home));
        }
        for name in &self.names {
            let to = folder_of(&self.target).join(name);
            std::fs::rename(self.folder.path().join(name), &to).map_err(failed(&to))?;
        }
        Ok(())
    }
}

/// Writes `external`, each payload at its offset, with zeros between. Neighbors that are neighbors in a source too are one copy.
fn payloads(path: &Path, external: &[(u64, Bytes)], sources: &[Source]) -> io::Result<()> {
    let mut out = std::fs::File::create_new(path)?;
    let place = |payload: &Bytes| sources.iter().enumerate().find_map(|(at, s)| Some((at, s.offset_of(payload)?)));
    let mut next = 0;
    while let Some((offset, payload)) = external.get(next) {
        // Seeking past the end leaves a hole, which reads as zeros.
        out.seek(io::SeekFrom::Start(*offset))?;
        next += 1;
        let Some((source, from)) = place(payload) else {
            out.write_all(payload)?;
            continue;
        };
        let mut length = payload.len() as u64;
        while let Some((later, payload)) = external.get(next) {
            if *later != offset + length || place(payload) != Some((source, from + length)) {
                break;
            }
            length += payload.len() as u64;
            next += 1;
        }
        sources[source].copy(from, length, &mut out)?;
    }
    Ok(())
}

fn fill(path: &Path, write: impl FnOnce(&mut BufWriter<std::fs::File>) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, std::fs::File::create_new(path)?);
    write(&mut out)?;
    out.flush()
}
