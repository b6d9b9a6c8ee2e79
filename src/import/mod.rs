//! From the wire to the graph.
//!
//! Local functions are inlined, `Constant` nodes and initializers become constants, and every ai.onnx operator is brought
//! to opset 21 with the semantics it had. Unknown operators and domains are carried untouched.

mod attribute;
mod function;
mod graph;
mod opset;
mod tensor;
mod types;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::id::Name;
use passes::ir::BuildError;
use passes::model::{Metadata, Model};
use proto::DecodeError;
use proto::onnx::{ModelProto, OperatorSetIdProto};

use crate::load::{self, ExternalFiles, LoadError, Source};

pub use tensor::tensor;

/// The ai.onnx version that operators are converted to.
pub const TARGET_OPSET: u32 = 21;
/// The oldest ai.onnx version that is read.
const OLDEST_OPSET: u32 = 7;
/// The newest ai.onnx version that is carried.
const NEWEST_OPSET: u32 = 26;

/// Why a model cannot be imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// Not a readable model.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A file that cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A graph that is none.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A structural rule that is broken.
    #[error(transparent)]
    Check(#[from] passes::ir::check::CheckError),
    /// A model-wide contradiction.
    #[error("{0}")]
    Model(String),
    /// A node that cannot be carried.
    #[error("node `{node}` ({op}): {problem}")]
    Node {
        /// Its name, or that of its first output.
        node: String,
        /// Its operator.
        op: String,
        /// What is wrong, and what to do.
        problem: String,
    },
}

/// An imported model, and what the user should know about the import.
#[derive(Debug)]
pub struct Imported {
    /// The model.
    pub model: Model,
    /// What was noticed.
    pub notes: Vec<Diagnostic>,
    /// The ai.onnx version of the file.
    pub opset: u32,
    /// The files that weights were read from, besides the model itself.
    pub external: Vec<Source>,
}

/// Reads the model at `path`; weights stay mapped.
///
/// # Errors
/// [`ImportError`].
pub fn file(path: &Path) -> Result<Imported, ImportError> {
    let wire = proto::decode(load::map(path)?)?;
    model(wire, &mut ExternalFiles::beside(path))
}

/// The same as passes take it: computed in f32 throughout.
///
/// # Errors
/// [`ImportError`].
pub fn in_f32(path: &Path) -> Result<Imported, ImportError> {
    let imported = file(path)?;
    let model = passes::half::widen(imported.model).map_err(|error| ImportError::Model(error.to_string()))?;
    Ok(Imported { model, ..imported })
}

/// Imports a decoded model.
///
/// # Errors
/// [`ImportError`].
pub fn model(mut wire: ModelProto, files: &mut ExternalFiles) -> Result<Imported, ImportError> {
    let mut notes = Vec::new();
    if proto::is_newer_than_schema(&wire) {
        let message = format!("the model has IR version {}; fields newer than 14 are not carried", wire.ir_version());
        notes.push(Diagnostic::new(diag::NEWER_IR, Severity::Warning, Place::Model, message));
    }
    let mut opsets = versions(&wire.opset_import)?;
    let opset = opsets.get("").copied().unwrap_or(1);
    if wire.graph.is_none() {
        return Err(ImportError::Model("the model has no graph".into()));
    }
    check_version(opset, &wire)?;
    let functions = function::Library::of(std::mem::take(&mut wire.functions))?;
    functions.add_domains(&mut opsets);
    let proto = wire.graph.take().unwrap_or_default();
    let context = graph::Context { opsets: &opsets, functions: &functions, files, notes: &mut notes, depth: 0 };
    let graph = graph::import(proto, context)?;
    let target = opset.max(TARGET_OPSET);
    if opset > TARGET_OPSET {
        let message = format!("the model imports opset {opset}: it is kept, as nothing newer than 21 is converted");
        notes.push(Diagnostic::new(diag::UNCONVERTED_OPSET, Severity::Note, Place::Model, message));
    }
    opsets.insert("".into(), target);
    let model = Model::new(graph, metadata(wire, opsets))?;
    Ok(Imported { model, notes, opset, external: files.take_sources() })
}

fn check_version(opset: u32, wire: &ModelProto) -> Result<(), ImportError> {
    let uses_onnx = wire.graph.iter().flat_map(|g| &g.node).any(|n| graph::domain(n).is_empty());
    if uses_onnx && opset < OLDEST_OPSET {
        return Err(ImportError::Model(format!(
            "the model imports ai.onnx opset {opset}; the oldest that is read is {OLDEST_OPSET}: export it again for a newer one"
        )));
    }
    if opset > NEWEST_OPSET {
        return Err(ImportError::Model(format!(
            "the model imports ai.onnx opset {opset}; the newest that is read is {NEWEST_OPSET}: export it again for an older one"
        )));
    }
    Ok(())
}

/// Domain to version; `ai.onnx` is the empty domain.
fn versions(imports: &[OperatorSetIdProto]) -> Result<BTreeMap<Name, u32>, ImportError> {
    let mut versions = BTreeMap::new();
    for import in imports {
        let domain = if import.domain() == "ai.onnx" { "" } else { import.domain() };
        let version = u32::try_from(import.version())
            .map_err(|_| ImportError::Model(format!("domain `{domain}` has version {}", import.version())))?;
        versions.insert(Name::from(domain), version);
    }
    Ok(versions)
}

fn metadata(wire: ModelProto, opsets: BTreeMap<Name, u32>) -> Metadata {
    let header =
        [wire.producer_name, wire.producer_version, wire.domain, wire.doc_string].map(Option::unwrap_or_default);
    let entries = wire
        .metadata_props
        .into_iter()
        .map(|entry| (entry.key.unwrap_or_default(), entry.value.unwrap_or_default()))
        .collect();
    let rest =
        ModelProto { training_info: wire.training_info, configuration: wire.configuration, ..ModelProto::default() };
    Metadata {
        opsets,
        header,
        model_version: wire.model_version.unwrap_or(0),
        entries,
        rest: proto::encode(&rest).into(),
    }
}

/// A shared name.
fn name(text: &str) -> Name {
    Arc::from(text)
}
