//! Files that appear whole or not at all.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::Artifact;

/// Why nothing was written. What stood at the path before still stands there.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{path}`: {error}")]
pub struct WriteError {
    /// Where.
    pub path: PathBuf,
    /// What the system said.
    pub error: io::Error,
}

/// Writes a file beside `path` and renames it into place when `fill` is done and the data is on disk.
///
/// # Errors
/// [`WriteError`].
pub fn atomically(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), WriteError> {
    stage(path, fill)?.persist(path).map(|_| ()).map_err(|e| WriteError { path: path.to_owned(), error: e.error })
}

/// The finished file under a temporary name; dropping it removes it.
fn stage(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<NamedTempFile, WriteError> {
    let fail = |error: io::Error| WriteError { path: path.to_owned(), error };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".onnx-quant-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // the umask takes away what the user wants gone
    }
    let mut file = builder.tempfile_in(folder).map_err(fail)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    fill(&mut buffered).map_err(fail)?;
    buffered.flush().map_err(fail)?;
    drop(buffered);
    Ok(file)
}

/// Writes `artifact` to `path` and, where it has external data, to the file beside it. Neither file is touched before both
/// are complete under temporary names.
///
/// # Errors
/// [`WriteError`].
pub fn write(artifact: Artifact, path: &Path) -> Result<(), WriteError> {
    let Artifact { model, external, external_name } = artifact;
    let data_path = path.with_file_name(&external_name);
    let data = if external.is_empty() {
        None
    } else {
        Some(stage(&data_path, |out| {
            let mut end = 0_u64;
            for (offset, payload) in &external {
                let gap = usize::try_from(offset - end).unwrap_or(0);
                out.write_all(&vec![0; gap])?;
                out.write_all(payload)?;
                end = offset + payload.len() as u64;
            }
            Ok(())
        })?)
    };
    let main = stage(path, |mut out| proto::encode_to(model, &mut out))?;
    if let Some(data) = data {
        data.persist(&data_path).map_err(|e| WriteError { path: data_path, error: e.error })?;
    }
    main.persist(path).map_err(|e| WriteError { path: path.to_owned(), error: e.error })?;
    Ok(())
}
