//! `onnx-quant lint`

use std::fmt::Write as _;
use std::path::PathBuf;

use passes::diag::{Diagnostic, Severity};
use serde_json::json;

use super::common::target_named;
use super::{Ended, print};
use crate::driver::Error;
use crate::lint;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model, float or quantized, .onnx or .oq.
    model: PathBuf,
    /// Where it is to run.
    #[arg(long)]
    target: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command: what the target will reject is an error, and ends with exit code 3.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let target = target_named(&args.target)?.info().about.name;
    let (model, opset) = super::opt::load_as_is(&args.model)?;
    let found = lint::lint(&model, opset, target);
    let errors = found.iter().filter(|finding| finding.severity == Severity::Error).count();
    print(&if args.json { as_json(&found, target) } else { as_text(&found, target) });
    if errors > 0 {
        return Err(Error::Target(format!(
            "target `{target}` rejects this model, or computes it wrong: {errors} findings above"
        )));
    }
    Ok(Ended::Done)
}

fn as_text(found: &[Diagnostic], target: &str) -> String {
    let mut text = String::new();
    for finding in found {
        let _ = writeln!(text, "{finding}");
    }
    let of = |severity| found.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings) = (of(Severity::Error), of(Severity::Warning));
    let _ = writeln!(text, "{target}: {errors} errors, {warnings} warnings");
    text
}

fn as_json(found: &[Diagnostic], target: &str) -> String {
    let finding = |f: &Diagnostic| json!({ "code": f.code.0, "severity": f.severity.to_string(), "place": f.place.to_string(), "message": f.message, "help": f.help });
    format!(
        "{:#}\n",
        json!({ "version": 1, "target": target, "findings": found.iter().map(finding).collect::<Vec<_>>() })
    )
}
