//! The laws and the command line, on fixtures.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "test binary")]

mod attention;
mod balanced;
mod boundaries;
mod caches;
mod cli;
mod columns;
mod degenerate;
mod determinism;
#[cfg(feature = "ort")]
mod differential;
mod equalize;
mod files;
mod folds;
mod formats;
mod halves;
mod heads;
mod hostile;
mod import;
mod journal;
mod layering;
mod learning;
mod mixed;
mod normalize;
mod norms;
mod on_samples;
mod registry;
mod rotations;
mod rounding;
mod schemes;
mod targets;
mod variants;
mod verify;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A path under `fixtures/`.
fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// Runs the tool.
fn tool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_onnx-quant")).args(args).output().expect("the tool starts")
}

/// Runs the tool, which must succeed, and returns its standard output.
fn tool_ok(args: &[&str]) -> String {
    let output = tool(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?} ended with {:?}: {error}", output.status.code());
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

/// Quantizes the small residual network into `folder` and returns the file.
fn quantized(folder: &Path, extra: &[&str]) -> PathBuf {
    let out = folder.join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let mut args = vec!["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--progress", "none"];
    args.extend_from_slice(extra);
    tool_ok(&args);
    out
}

fn text(path: &Path) -> &str {
    path.to_str().expect("fixture paths are UTF-8")
}
