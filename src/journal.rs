//! A journal in a file beside the output: what has been learned survives the run that learned it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use passes::journal::Journal;
use sha2::{Digest as _, Sha256};

/// What the file begins with.
const MAGIC: &[u8] = b"onnx-quant journal 1\n";
/// What the file of a standing begins with.
const STANDING: &[u8] = b"onnx-quant standing 1\n";
/// Bytes of a checksum.
const SUM: usize = 32;
/// The most bytes of a standing: it is made in memory, and written at every check of what is being learned.
const ROOM: u64 = 1 << 30;

/// Records of one run, each behind the other, each with its checksum; what a killed run left half-written is cut off. Where a pass stands
/// lies in a file of its own, which is written beside the one before it and then takes its name.
#[derive(Debug)]
pub(crate) struct FileJournal {
    path: PathBuf,
    identity: [u8; SUM],
    records: Mutex<BTreeMap<String, Vec<u8>>>,
    file: Mutex<File>,
}

/// What stands in the way of a journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// The disk.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What it says.
        error: io::Error,
    },
    /// It belongs to other options, data, or another model.
    #[error(
        "{0} is the journal of a run with other options, other data or another model: pass --fresh to start anew, or run that one to its end"
    )]
    Other(String),
    /// It is none of ours.
    #[error("{0} is no journal of onnx-quant: move it away, or choose another output")]
    Foreign(String),
    /// Another run writes it.
    #[error("{0} is in use: another run writes the same output")]
    Busy(String),
    /// There is none.
    #[error("--resume: there is no journal {0}")]
    Missing(String),
}

impl FileJournal {
    /// Where the journal of a run that writes `output` lies.
    pub(crate) fn beside(output: &Path) -> PathBuf {
        let mut name = output.file_name().unwrap_or_default().to_os_string();
        name.push(".journal");
        output.with_file_name(name)
    }

    /// Opens the journal at `path` of the run that `identity` tells from all others, or begins it; `fresh` begins it in any case.
    pub(crate) fn open(path: &Path, identity: [u8; SUM], fresh: bool, must_be: bool) -> Result<Self, JournalError> {
        let shown = || path.display().to_string();
        let fail = |error: io::Error| JournalError::Io { path: shown(), error };
        if must_be && !path.exists() {
            return Err(JournalError::Missing(shown()));
        }
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
        let mut bytes = Vec::new();
        file.try_lock().map_err(|_| JournalError::Busy(shown()))?;
        file.read_to_end(&mut bytes).map_err(fail)?;
        if fresh && (bytes.starts_with(MAGIC) || MAGIC.starts_with(&bytes)) {
            bytes.clear();
        }
        let standing = extended(path, STATE);
        let stands = begins(&standing, STANDING).map_err(fail)?;
        if stands == Some(false) {
            return Err(JournalError::Foreign(standing.display().to_string()));
        }
        let header = [MAGIC, &identity].concat();
        let mut records = BTreeMap::new();
        // What is shorter was killed before its first record.
        let end = if header.starts_with(&bytes) {
            file.set_len(0).and_then(|()| file.rewind()).map_err(fail)?;
            file.write_all(&header).map_err(fail)?;
            header.len()
        } else if !bytes.starts_with(MAGIC) {
            return Err(JournalError::Foreign(shown()));
        } else if bytes.starts_with(&header) {
            header.len() + read_records(&bytes[header.len()..], &mut records)
        } else {
            return Err(JournalError::Other(shown()));
        };
        // The first record says how much memory there was: without it, nobody knows what where a pass stood was learned from.
        if records.is_empty() && stands.is_some() {
            std::fs::remove_file(&standing).map_err(fail)?;
        }
        file.set_len(end as u64).map_err(fail)?;
        file.seek(SeekFrom::Start(end as u64)).map_err(fail)?;
        Ok(Self { path: path.to_owned(), identity, records: Mutex::new(records), file: Mutex::new(file) })
    }

    /// How many records there are.
    pub(crate) fn len(&self) -> usize {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether a pass stood somewhere on its way.
    pub(crate) fn stands(&self) -> bool {
        begins(&extended(&self.path, STATE), &[STANDING, &self.identity].concat())
            .is_ok_and(|found| found == Some(true))
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the file away: what it held is in the output.
    pub(crate) fn remove(&self) {
        for path in [extended(&self.path, NEW), extended(&self.path, STATE), self.path.clone()] {
            // The lock is held until all are gone.
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "the journal is left behind");
            }
        }
    }
}

impl Journal for FileJournal {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn put(&self, key: &str, record: &[u8]) -> Result<(), String> {
        let (head, sum) = framed(key, record);
        let bytes = [head.as_slice(), record, &sum].concat();
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = file.write_all(&bytes).and_then(|()| file.sync_data());
        written.map_err(|error| format!("{}: {error}", self.path.display()))?;
        self.records.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), record.to_vec());
        Ok(())
    }

    fn room(&self) -> Option<u64> {
        Some(ROOM)
    }

    fn standing(&self, key: &str) -> Option<Vec<u8>> {
        let header = [STANDING, &self.identity].concat();
        let path = extended(&self.path, STATE);
        begins(&path, &header).ok()?.filter(|ours| *ours)?;
        let bytes = std::fs::read(path).ok()?;
        let mut records = BTreeMap::new();
        read_records(bytes.get(header.len()..)?, &mut records);
        records.remove(key)
    }

    fn stand(&self, key: &str, state: &[u8]) -> Result<(), String> {
        let (new, path) = (extended(&self.path, NEW), extended(&self.path, STATE));
        // One at a time, as with records.
        let _held = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (head, sum) = framed(key, state);
        let write = || {
            let mut file = File::create(&new)?;
            [STANDING, &self.identity, head.as_slice(), state, &sum]
                .iter()
                .try_for_each(|part| file.write_all(part))?;
            file.sync_data()?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|error: io::Error| format!("{}: {error}", path.display()))
    }
}

/// Behind the name of a journal: where a pass stands, and the same while it is written.
const STATE: &str = ".state";
const NEW: &str = ".state.new";

fn extended(path: &Path, by: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(by);
    name.into()
}

/// Whether the file at `path` begins with `header`; `None` where there is no file.
fn begins(path: &Path, header: &[u8]) -> io::Result<Option<bool>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(header.len() as u64).read_to_end(&mut bytes)?;
    Ok(Some(bytes == header))
}

/// What stands before `record` in a file, and its checksum, which stands behind it.
fn framed(key: &str, record: &[u8]) -> (Vec<u8>, [u8; SUM]) {
    let mut head = (key.len() as u64).to_le_bytes().to_vec();
    head.extend(key.as_bytes());
    head.extend((record.len() as u64).to_le_bytes());
    let mut hash = Sha256::new();
    hash.update(&head);
    hash.update(record);
    (head, hash.finalize().into())
}

/// Reads whole records into `records`; returns where the last one ends.
fn read_records(bytes: &[u8], records: &mut BTreeMap<String, Vec<u8>>) -> usize {
    fn part(rest: &mut &[u8]) -> Option<Vec<u8>> {
        let (length, behind) = rest.split_at_checked(8)?;
        let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
        let (part, behind) = behind.split_at_checked(length)?;
        *rest = behind;
        Some(part.to_vec())
    }
    let mut end = 0;
    loop {
        let mut rest = &bytes[end..];
        let Some((key, record)) = part(&mut rest).and_then(|key| Some((key, part(&mut rest)?))) else { return end };
        let length = bytes.len() - end - rest.len();
        let sound = rest.get(..SUM) == Some(Sha256::digest(&bytes[end..end + length]).as_slice());
        let (true, Ok(key)) = (sound, String::from_utf8(key)) else { return end };
        records.insert(key, record);
        end += length + SUM;
    }
}

/// Folders are walked so deep.
const DEEPEST: usize = 8;

/// Whether the file at `path` may hold samples: others that come and go beside them are not part of what a run is about.
fn is_sample(path: &Path) -> bool {
    const KINDS: &[&str] =
        &["npz", "npy", "pb", "safetensors", "png", "jpg", "jpeg", "bmp", "webp", "pnm", "ppm", "pgm", "pbm"];
    let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default().to_ascii_lowercase();
    KINDS.contains(&kind.as_str())
}

/// A digest of the files at `paths`, of samples where those are folders, walked in the order of names, and of `words`.
pub(crate) fn identity(paths: &[&Path], words: &str) -> io::Result<[u8; SUM]> {
    fn add(hash: &mut Sha256, path: &Path, depth: usize) -> io::Result<()> {
        if path.is_dir() && depth < DEEPEST {
            let mut inside = std::fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
            inside.retain(|path| path.is_dir() || is_sample(path));
            inside.sort();
            return inside.iter().try_for_each(|path| add(hash, path, depth + 1));
        }
        if path.is_file() {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(std::fs::metadata(path)?.len().to_le_bytes());
            io::copy(&mut File::open(path)?, hash)?;
        }
        Ok(())
    }
    let mut hash = Sha256::new();
    hash.update(words.as_bytes());
    paths.iter().try_for_each(|path| add(&mut hash, path, 0))?;
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_pass_stands_is_one_file_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = FileJournal::beside(&folder.path().join("a.onnx"));
        let open = |identity: u8, fresh| FileJournal::open(&path, [identity; SUM], fresh, false);
        let journal = open(1, false).unwrap();
        assert!(!journal.stands() && journal.standing("way").is_none());
        journal.put("one", b"first").unwrap();
        journal.stand("way", b"first").unwrap();
        journal.stand("way", &[7; 1000]).unwrap();
        assert_eq!(journal.standing("way"), Some(vec![7; 1000]));
        assert_eq!((journal.standing("other"), journal.len()), (None, 1));
        drop(journal);
        let state = extended(&path, STATE);
        let whole = std::fs::read(&state).unwrap();
        for cut in (0..whole.len()).step_by(13) {
            std::fs::write(&state, &whole[..cut]).unwrap();
            // What is shorter than what such files begin with is none of ours.
            assert!(open(1, false).map_or(cut < STANDING.len(), |journal| journal.standing("way").is_none()), "{cut}");
        }
        let mut turned = whole.clone();
        *turned.last_mut().unwrap() ^= 1;
        std::fs::write(&state, &turned).unwrap();
        assert!(open(1, false).unwrap().standing("way").is_none(), "a bit turned over");
        std::fs::write(&state, &whole).unwrap();
        // A killed run leaves half of the next one.
        std::fs::write(extended(&path, NEW), &whole[..40]).unwrap();
        let journal = open(1, false).unwrap();
        assert!(journal.stands() && journal.standing("way").is_some());
        journal.remove();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::write(&state, &whole).unwrap();
        assert!(open(2, false).unwrap().standing("way").is_none(), "that of another run");
        assert!(!open(2, true).unwrap().stands() && !state.exists());
        std::fs::write(&state, "my notes").unwrap();
        assert!(matches!(open(2, true), Err(JournalError::Foreign(_))));
        assert_eq!(std::fs::read(&state).unwrap(), b"my notes");
    }

    #[test]
    fn where_a_pass_stands_is_gone_with_the_first_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = FileJournal::beside(&folder.path().join("a.onnx"));
        let open = || FileJournal::open(&path, [1; SUM], false, false).unwrap();
        let (state, header) = (extended(&path, STATE), MAGIC.len() + SUM);
        for left in [None, Some(0), Some(header - 1), Some(header), Some(header + 9)] {
            let journal = open();
            journal.put("one", b"first").unwrap();
            journal.stand("way", b"where").unwrap();
            drop(journal);
            assert!(open().standing("way").is_some());
            let whole = std::fs::read(&path).unwrap();
            match left {
                None => std::fs::remove_file(&path).unwrap(),
                Some(left) => std::fs::write(&path, &whole[..left]).unwrap(),
            }
            let journal = open();
            assert!(!journal.stands() && journal.standing("way").is_none() && !state.exists(), "{left:?}");
        }
    }

    #[test]
    fn records_survive_and_half_ones_are_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = FileJournal::beside(&folder.path().join("a.onnx"));
        assert!(path.ends_with("a.onnx.journal"));
        let open = |identity: u8, fresh| FileJournal::open(&path, [identity; SUM], fresh, false);
        let journal = open(1, false).unwrap();
        journal.put("one", b"first").unwrap();
        journal.put("two", &[7; 1000]).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in [whole.len() - 1, whole.len() - SUM - 1, whole.len() - 900] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let journal = open(1, false).unwrap();
            assert_eq!((journal.get("one").as_deref(), journal.get("two")), (Some(&b"first"[..]), None), "{cut}");
            journal.put("two", &[7; 1000]).unwrap();
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        assert!(matches!(open(2, false), Err(JournalError::Other(_))), "another run");
        assert_eq!(open(2, true).unwrap().len(), 0);
        let held = open(2, false).unwrap();
        assert!(matches!(open(2, false), Err(JournalError::Busy(_))));
        held.remove();
        assert!(!path.exists());
        std::fs::write(&path, "my notes").unwrap();
        for fresh in [false, true] {
            assert!(matches!(open(1, fresh), Err(JournalError::Foreign(_))));
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"my notes");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(FileJournal::open(&path, [1; SUM], false, true), Err(JournalError::Missing(_))));
    }
}
