//! `onnx-quant list` and `onnx-quant explain`

use std::fmt::Write as _;

use passes::about::About;
use passes::target::{Goal, Scheme};
use passes::{diag, grid, observe, reconstruct, rounding, sensitivity};

use super::{Ended, print};
use crate::driver::Error;
use crate::{exec, lint, targets};

/// What can be listed.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Passes,
    Roundings,
    Parameterizations,
    Losses,
    Sensitivities,
    Observers,
    Formats,
    Targets,
    Recipes,
    Executors,
    Codes,
}

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// What to list.
    kind: Kind,
}

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// A name from `list`, or a diagnostic code such as OQ4001.
    name: String,
}

static RECIPES: &[About] = &[
    About {
        name: "fast",
        doc: "Ranges by minimum and maximum. One pass over the data; the least work that gives a sound model.",
        source: "onnx-quant",
    },
    About {
        name: "balanced",
        doc: "The default. Ranges by least squared error and one pass over the data at eight bits; with fewer weight bits, rounding by \
              data, which takes a second pass. `explain TARGET` prints the passes.",
        source: "onnx-quant",
    },
    About {
        name: "best",
        doc: "The most accurate that this version has: outliers moved into weights, matrix products that 8-bit activations would ruin left \
              in float, weights rounded layer by layer behind the layers rounded before, scales fitted below eight bits; there what \
              convolutions hand on is turned into another basis, what matrix products read at up to 4 bits is turned as the model \
              runs, rows make up for one another where activations stay in float or have the range of each token, and few words of text \
              get variants. Two passes over the data and one walk that runs the float and the quantized model side by side, at eight \
              bits four to nine times the time of balanced; where rows make up for one another also the float model forward twice and \
              back once for some thousand rows (four bits and more) or eight thousand; variants take as many times the time as there are \
              samples more. Memory for the tensors between two stages: half of what is left, 2 GiB where that is less, under \
              --max-memory what it leaves.",
        source: "onnx-quant",
    },
    About {
        name: "learned",
        doc: "best, and then what wins for the scheme among the ways to learn codes block after block (`--learn auto`): lrq for w4a8, brecq for \
              other 3 and 4 bits and for w2a4, talr for other 2 bits and less with activations in codes and lora-rounding without, latent for \
              small floats, nothing for 5 bits and more. 200 steps per block: three to ten times the time of best. The order of the samples matters, \
              as it does not for the others.",
        source: "onnx-quant; tests/bench/learning.py",
    },
];

fn abouts(kind: Kind) -> Vec<&'static About> {
    match kind {
        Kind::Passes => passes::catalogue::passes().into_iter().map(|entry| &entry.info.about).collect(),
        Kind::Roundings => rounding::ROUNDINGS.iter().map(|method| method.about()).collect(),
        Kind::Parameterizations => reconstruct::PARAMETERIZATIONS.iter().map(|p| p.about()).collect(),
        Kind::Losses => reconstruct::losses().collect(),
        Kind::Sensitivities => sensitivity::all().collect(),
        Kind::Observers => observe::OBSERVERS.iter().map(|entry| entry.about).collect(),
        Kind::Formats => grid::all()
            .map(|grid| &grid.info().about)
            .chain(grid::block::BLOCKS.iter().map(|block| &block.about))
            .collect(),
        Kind::Targets => targets::TARGETS.iter().map(|target| &target.info().about).collect(),
        Kind::Recipes => RECIPES.iter().collect(),
        Kind::Executors => exec::EXECUTORS.iter().map(|entry| entry.about).collect(),
        Kind::Codes => Vec::new(),
    }
}

/// Runs `list`.
#[expect(clippy::unnecessary_wraps, reason = "every command has this signature")]
pub(crate) fn list(args: &ListArgs) -> Result<Ended, Error> {
    let mut text = String::new();
    for about in abouts(args.kind) {
        let _ = writeln!(text, "{:22}{}", about.name, about.summary());
    }
    if matches!(args.kind, Kind::Codes) {
        for page in diag::CODES {
            let _ = writeln!(text, "{:10}{}", page.code.0, page.title);
        }
        for lint in lint::all() {
            let _ = writeln!(text, "{:8}{} ({})", lint.code.0, lint.title, lint::targets_of(lint).join(", "));
        }
    }
    print(&text);
    Ok(Ended::Done)
}

/// Runs `explain`.
pub(crate) fn explain(args: &ExplainArgs) -> Result<Ended, Error> {
    if let Some(page) = diag::CODES.iter().find(|page| page.code.0.eq_ignore_ascii_case(&args.name)) {
        print(&format!("{}: {}\n\n{}\n", page.code.0, page.title, page.text));
        return Ok(Ended::Done);
    }
    if let Some(lint) = lint::all().into_iter().find(|lint| lint.code.0.eq_ignore_ascii_case(&args.name)) {
        let targets = lint::targets_of(lint).join(", ");
        print(&format!(
            "{}: {} ({})\n\nWhat to do: {}.\nTargets: {targets}.\nSource: {}\n",
            lint.code.0, lint.title, lint.severity, lint.help, lint.source
        ));
        return Ok(Ended::Done);
    }
    let kinds = [
        Kind::Passes,
        Kind::Observers,
        Kind::Formats,
        Kind::Targets,
        Kind::Recipes,
        Kind::Executors,
        Kind::Roundings,
        Kind::Parameterizations,
        Kind::Losses,
        Kind::Sensitivities,
    ];
    let found: Vec<&About> = kinds.into_iter().flat_map(abouts).filter(|about| about.name == args.name).collect();
    if found.is_empty() {
        let codes = diag::CODES.iter().map(|page| page.code.0).chain(lint::all().into_iter().map(|lint| lint.code.0));
        let names = kinds.into_iter().flat_map(abouts).map(|about| about.name).chain(codes);
        let near = passes::pass::nearest(&args.name, names).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
        return Err(Error::Input(format!("there is no page `{}`{near}", args.name)));
    }
    found.into_iter().for_each(|about| print(&page(about)));
    Ok(Ended::Done)
}

/// The page of one thing.
fn page(about: &About) -> String {
    let mut text = format!("{}\n\n", about.name);
    for line in about.doc.lines() {
        let _ = writeln!(text, "{}", line.strip_prefix(' ').unwrap_or(line));
    }
    let _ = writeln!(text, "\nSource: {}", about.source);
    if let Some(entry) = passes::catalogue::passes().into_iter().find(|e| e.info.about.name == about.name) {
        let info = entry.info;
        let _ = writeln!(text, "Costs: {}", info.cost);
        let _ = writeln!(
            text,
            "Requires: {}. Establishes: {}. Fidelity: {:?}.",
            info.requires, info.establishes, info.fidelity
        );
        for option in info.options {
            let _ = writeln!(text, "Option {}: {}.", option.name, option.doc);
        }
    }
    if let Some(method) = rounding::ROUNDINGS.iter().find(|method| std::ptr::eq(method.about(), about)) {
        let _ = writeln!(text, "Costs: {}", method.cost());
    }
    if let Some(learned) = reconstruct::PARAMETERIZATIONS.iter().find(|p| std::ptr::eq(p.about(), about)) {
        let _ = writeln!(
            text,
            "Costs: per step of `batch` samples, a block forward and back, three times the products of running it; {} bytes per weight of the \
             block for parameters and their optimizer, beside the tape of a sample per thread.",
            learned.bytes_per_weight()
        );
    }
    if let Some(target) =
        targets::find(about.name).filter(|target| std::ptr::from_ref(&target.info().about) == std::ptr::from_ref(about))
    {
        let goals = [("fast", Goal::Fast), ("balanced", Goal::Balanced), ("best", Goal::Best)];
        for (name, goal) in goals {
            let _ = writeln!(text, "Recipe {name} for w8a8:\n{}\n", target.pipeline(goal, &Scheme::W8A8));
        }
        let weights_only = Scheme { block: Some(32), ..Scheme::integers(4, None) };
        for (name, goal) in goals {
            let _ = writeln!(text, "Recipe {name} for w4a16g32:\n{}\n", target.pipeline(goal, &weights_only));
        }
    }
    text
}
