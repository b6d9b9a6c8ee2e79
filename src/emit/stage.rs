//! A lowered model in the files that its target reads.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use passes::model::Model;
use passes::target::{Container, Lowered, Target};

use super::{Emit, Layout, Staged, WriteError, compressed, memories, packed};
use crate::load::Source;

/// The file that a model at `output` is read from: `output` itself, or `model.onnx` in it where the target writes a folder.
pub fn main_file(target: &dyn Target, output: &Path) -> PathBuf {
    match target.container() {
        Container::Onnx => output.to_owned(),
        Container::Packed | Container::Memories => output.join("model.onnx"),
        Container::CompressedTensors => output.join(compressed::FILE),
    }
}

/// The file by which a folder is known to be one of ours.
pub(super) const MANIFEST: &str = "manifest.json";

/// Why `output` cannot become what `target` writes: a folder takes the place of one of ours or of none, and never that of `input`.
pub fn obstacle(target: &dyn Target, output: &Path, input: &Path) -> Option<String> {
    let name = output.display();
    if target.container() == Container::Onnx {
        return output.is_dir().then(|| format!("the output `{name}` is a folder; name a file"));
    }
    if output.is_file() {
        return Some(format!("the output `{name}` is a file; this target writes a folder"));
    }
    let inside = || Some(input.canonicalize().ok()?.starts_with(output.canonicalize().ok()?));
    if inside().unwrap_or(false) {
        return Some(format!("the input lies in `{name}`, which would be replaced: choose another -o"));
    }
    let empty = std::fs::read_dir(output).map_or(true, |mut entries| entries.next().is_none());
    let ours = || std::fs::read_to_string(output.join(MANIFEST)).is_ok_and(|text| text.contains("\"onnx-quant\""));
    (!empty && !ours())
        .then(|| format!("the folder `{name}` holds other files, which would be replaced: choose another -o"))
}

/// Writes `lowered`, which `model` became for `target`, beside `output`. Weights that are slices of `sources` are copied from file to file.
///
/// # Errors
/// [`WriteError`].
pub fn stage(
    target: &dyn Target,
    (model, lowered): (&Model, Lowered),
    output: &Path,
    sources: &[Source],
    layout: &Layout,
) -> Result<Staged, WriteError> {
    let main = main_file(target, output);
    let file = main.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let json = |value: &serde_json::Value, path: &Path| {
        let mut out = std::io::BufWriter::new(std::fs::File::create_new(path)?);
        serde_json::to_writer_pretty(&mut out, value)?;
        out.write_all(b"\n")?;
        out.flush()
    };
    let name = target.info().about.name;
    match target.container() {
        Container::Onnx => {
            let external = (!sources.is_empty()).then(|| format!("{file}.data"));
            let options = Emit { external, sources, ..Emit::default() };
            let artifact = super::model(&lowered.graph, &lowered.meta, &options, &file);
            drop(lowered);
            Staged::write(artifact, output, sources)
        }
        Container::Packed => {
            let mut staged = Staged::folder(&main, output)?;
            let mut placed = std::collections::BTreeMap::new();
            staged.add(packed::FILE, |path| {
                placed = packed::write(&lowered.graph, path)?;
                Ok(())
            })?;
            let manifest = packed::manifest(model, name, &placed);
            staged.add(MANIFEST, |path| json(&manifest, path))?;
            let options = Emit { placed, ..Emit::default() };
            staged.add_model(super::model(&lowered.graph, &lowered.meta, &options, &file).model)?;
            Ok(staged)
        }
        Container::CompressedTensors => {
            let whole = compressed::Compressed::of(model);
            let whole =
                whole.map_err(|problem| WriteError { path: main.clone(), error: std::io::Error::other(problem) })?;
            let mut staged = Staged::folder(&main, output)?;
            let config = whole.config();
            staged.add("config.json", |path| json(&config, path))?;
            staged.add(MANIFEST, |path| json(&memories::manifest(name, layout, &[]), path))?;
            staged.add(compressed::FILE, |path| whole.write(path))?;
            Ok(staged)
        }
        Container::Memories => {
            let mut staged = Staged::folder(&main, output)?;
            let mut entries = Vec::new();
            let refused = |problem| WriteError { path: main.clone(), error: std::io::Error::other(problem) };
            for memory in memories::of(model, layout).map_err(refused)? {
                for (name, text) in memory.files(layout) {
                    staged.add(&name, |path| std::fs::write(path, &text))?;
                    entries.push(memory.entry(&name, &text));
                }
            }
            let header = memories::header(model).map_err(refused)?;
            staged.add("weights.h", |path| std::fs::write(path, &header))?;
            let manifest = memories::manifest(name, layout, &entries);
            staged.add(MANIFEST, |path| json(&manifest, path))?;
            staged.add_model(super::model(&lowered.graph, &lowered.meta, &Emit::default(), &file).model)?;
            Ok(staged)
        }
    }
}
