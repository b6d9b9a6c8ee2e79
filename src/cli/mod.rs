//! The command line: one file per command.

mod catalogue;
mod common;
mod compare;
mod convert;
mod cost;
mod inspect;
mod lint;
mod opt;
mod progress;
mod quantize;
mod run;
mod stats;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::driver::Error;

/// Quantizes ONNX models for the place where they will run.
#[derive(Debug, Parser)]
#[command(name = "onnx-quant", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Quantize a float model.
    Quantize(Box<quantize::Args>),
    /// Show operators, inputs, weights, what can be quantized, what cannot and why.
    Inspect(inspect::Args),
    /// Compare a quantized model with its float model, layer by layer, worst first.
    Compare(compare::Args),
    /// Say what a model costs on programmable logic, layer by layer.
    Cost(Box<cost::Args>),
    /// Write a quantized model in another dialect, codes unchanged.
    Convert(convert::Args),
    /// Say what a target will reject, leave in float, not fuse or run slowly.
    Lint(lint::Args),
    /// Run a model, float or quantized, by our own arithmetic.
    Run(run::Args),
    /// Run any passes over a model.
    Opt(opt::Args),
    /// Convert between ONNX and the text form.
    Cat(opt::CatArgs),
    /// Measure calibration statistics, or merge measured ones.
    Stats(stats::Args),
    /// List what there is.
    List(catalogue::ListArgs),
    /// Print the page of a pass, observer, format, target, executor or diagnostic code.
    Explain(catalogue::ExplainArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// How a command that ran ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// As asked.
    Done,
    /// Done, but a stated budget is broken.
    Broken,
}

/// Parses the arguments, runs the command, prints errors; the exit code is the contract's.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    start_logging();
    let result = match cli.command {
        Command::Quantize(args) => quantize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Lint(args) => lint::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Opt(args) => opt::run(&args),
        Command::Cat(args) => opt::cat(&args),
        Command::Stats(args) => stats::run(&args),
        Command::List(args) => catalogue::list(&args),
        Command::Explain(args) => catalogue::explain(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "onnx-quant", &mut std::io::stdout());
            Ok(Ended::Done)
        }
    };
    match result {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::Broken) => ExitCode::from(1),
        Err(error) => {
            eprint(&format!("error: {error}\n"));
            ExitCode::from(match error {
                Error::Input(_) => 2,
                Error::Target(_) => 3,
                Error::Resources(_) => 4,
                Error::Interrupted | Error::Paused(_) => 130,
            })
        }
    }
}

/// Logs go to standard error, by `ONNX_QUANT_LOG` (error, warn, info, debug, trace).
fn start_logging() {
    if let Ok(filter) = std::env::var("ONNX_QUANT_LOG") {
        let filter = tracing_subscriber::EnvFilter::new(format!("onnx_quant={filter},passes={filter}"));
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    }
}

/// Prints to standard output; a reader that went away (`| head`) ends the printing, not the program.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints to standard error.
pub(crate) fn eprint(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
