//! `onnx-quant quantize`

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use passes::sensitivity;
use passes::target::{Container, Goal, Scheme};
use serde::Deserialize;

use super::common::{DataArgs, scheme, share, target_named};
use super::progress::Shown;
use super::{Ended, eprint, print};
use crate::driver::{self, Error, Kept, Request, Rest};
use crate::overrides::Set;
use crate::recipe::AUTO;
use crate::{emit, report};

/// Arguments.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct Args {
    /// The float model.
    model: PathBuf,
    /// Where the quantized model goes [default: MODEL.q.onnx].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Where it will run.
    #[arg(long)]
    target: Option<String>,
    /// Bits of weights and activations.
    #[arg(long)]
    scheme: Option<String>,
    #[command(flatten)]
    data: DataArgs,
    /// Leave so many samples, spread over all, out of everything but judging: the summary's fidelity and --max-drop go by them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    hold_out: usize,
    /// Fit to so many more samples per sample as well, where there are few: half of the token ids drawn anew; for models with batch norms,
    /// inputs for which these see what they saw in training. Where none is said, `best` draws token ids until there are enough.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(..=1000))]
    augment: Option<u16>,
    /// Fit to so many views of every picture as well: parts of it, mirrored, in other colors, mixed with others. For photographs, where there
    /// are few; not for text or digits, which mirrored are none.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1000), conflicts_with = "augment")]
    views: u16,
    /// Use statistics measured by `onnx-quant stats` instead of samples.
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// fast, balanced, best, or a TOML file.
    #[arg(long, default_value = "balanced")]
    recipe: String,
    /// How activation ranges are chosen: min-max, percentile, mse, entropy, cfp.
    #[arg(long)]
    observer: Option<String>,
    /// How weights are rounded: any of `list roundings`.
    #[arg(long)]
    rounding: Option<String>,
    /// The exact passes, overriding the recipe.
    #[arg(long, value_name = "TEXT")]
    pipeline: Option<String>,
    /// Keep nodes or tensors whose name matches this pattern in float; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    keep_float: Vec<String>,
    /// Write the weights of nodes or tensors whose name matches in another scheme, or all of a node in float: 'head*=w8a16',
    /// 'stem*=float'; may be repeated.
    #[arg(long, value_name = "PATTERN=SCHEME")]
    set: Vec<Set>,
    /// Write the tables that Gather reads, and heads that share them, in blocks: w8a16g32, w4a16g32asym. They stay in float otherwise.
    #[arg(long, value_name = "SCHEME")]
    embeddings: Option<String>,
    /// Write the caches of a decoder (past keys and values) in codes of 8 or 4 bits, each row with a range of its own: inputs and outputs
    /// become bytes with scales and zero points beside them.
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u32).range(4..=8))]
    cache: Option<u32>,
    /// Turn the residual stream of a decoder into another basis, in which no channel stands out: better rounding by data at 2 to 4 bits,
    /// for a head of its own where it was tied to the embedding.
    #[arg(long)]
    rotate: bool,
    /// Go on from the journal that an interrupted run has left beside the output; without this one is used where there is one.
    #[arg(long, conflicts_with = "fresh")]
    resume: bool,
    /// Learn anew, whatever an earlier run has left.
    #[arg(long)]
    fresh: bool,
    /// The type of what stays in float, for targets that take f16: tensorrt.
    #[arg(long, value_enum, default_value = "f32")]
    rest: Rest,
    /// Learn codes by gradients, block after block, any of `list parameterizations`: brecq, or brecq{iterations=1000, batch=16}; auto for
    /// what wins for the scheme, none for nothing. For `--recipe best`, whose codes it starts from.
    #[arg(long, value_name = "METHOD")]
    learn: Option<String>,
    /// Learn codes from what the whole model loses, once they are rounded (and learned block after block): latent, or
    /// brecq{iterations=400, batch=8}. Memory holds one block's tape at a time.
    #[arg(long, value_name = "METHOD")]
    distill: Option<String>,
    /// How --target rtl-mem folds and writes weights: pe=4,simd=8,format=coe; formats are mem, dat, coe, mif and hex, several if repeated.
    #[arg(long, value_name = "LAYOUT", default_value = "format=mem")]
    memory: emit::Layout,
    /// The processor that ort-cpu or openvino-cpu runs on. Without VNNI instructions (avx2) sums of two products saturate at 16 bits:
    /// weights get 7 bits, so that none can. vnni where it is not said.
    #[arg(long, value_name = "KIND", value_parser = ["vnni", "avx2"])]
    cpu: Option<String>,
    /// Mixed precision: the mean bits of a weight, spent where they lower the loss most.
    #[arg(long, value_name = "BITS", value_parser = share)]
    budget: Option<f64>,
    /// What tells `--budget` which weights need bits, any of `list sensitivities`: error or kl-top, runs of the model with one weight
    /// rounded after the other; moments or pivots, what layers return; weights, those alone; fisher, tacq or gradient-l1, gradients of all
    /// weights at once [default: error]
    #[arg(long, value_name = "METRIC", value_parser = PossibleValuesParser::new(sensitivity::all().map(|about| about.name)))]
    sensitivity: Option<String>,
    /// The loss allowed: squared error of the outputs over their square, 0.01 or 1% being 20 dB. Weights get more bits and nodes
    /// stay in float until it holds, the cheapest change first.
    #[arg(long, value_name = "X", value_parser = share)]
    max_drop: Option<f64>,
    /// Measure, plan and report, tensor by tensor; write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Tell of every layer what rounding its weight, and what it reads, costs at the outputs to first order, by gradients of the float
    /// model on 32 samples: in the summary the worst, in its JSON form all.
    #[arg(long)]
    first_order: bool,
    /// Fail when a node that the target could run on codes stays in float.
    #[arg(long)]
    no_fallback: bool,
    /// Write the JSON summary to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print the summary as JSON on standard output; the text goes to standard error.
    #[arg(long)]
    json: bool,
}

/// A recipe file: options as on the command line, which come before it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Recipe {
    base: Option<String>,
    target: Option<String>,
    scheme: Option<String>,
    observer: Option<String>,
    rounding: Option<String>,
    pipeline: Option<String>,
    #[serde(default)]
    keep_float: Vec<String>,
    #[serde(default)]
    set: Vec<String>,
    embeddings: Option<String>,
    cache: Option<u32>,
    #[serde(default)]
    rotate: bool,
    learn: Option<String>,
    distill: Option<String>,
    budget: Option<Share>,
    sensitivity: Option<String>,
    max_drop: Option<Share>,
}

/// A number, or text such as `1%`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Share {
    Number(f64),
    Text(String),
}

impl Share {
    fn value(&self, name: &str) -> Result<f64, Error> {
        let text = match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        };
        share(&text).map_err(|e| Error::Input(format!("{name} of the recipe: {e}")))
    }
}

/// The recipe that goes on from where `best` ends.
const LEARNED: &str = "learned";

/// What the recipe called `name` learns weights by.
fn learned_by(name: &str) -> Option<String> {
    (name == LEARNED).then(|| AUTO.to_owned())
}

/// The goal called `name`.
fn goal(name: &str) -> Option<Goal> {
    match name {
        "fast" => Some(Goal::Fast),
        "balanced" => Some(Goal::Balanced),
        "best" | LEARNED => Some(Goal::Best),
        _ => None,
    }
}

fn recipe(name: &str) -> Result<(Goal, Recipe), Error> {
    if let Some(goal) = goal(name) {
        return Ok((goal, Recipe { learn: learned_by(name), ..Recipe::default() }));
    }
    let fail = |e: &dyn std::fmt::Display| Error::Input(format!("--recipe {name}: {e}"));
    let text = std::fs::read_to_string(name)
        .map_err(|e| fail(&format!("neither fast, balanced, best nor learned, and no file: {e}")))?;
    let mut recipe: Recipe = toml::from_str(&text).map_err(|e| fail(&e))?;
    let base = recipe.base.as_deref().unwrap_or("balanced");
    let goal = goal(base).ok_or_else(|| fail(&format!("base `{base}` is none of fast, balanced, best, learned")))?;
    recipe.learn = recipe.learn.take().or_else(|| learned_by(recipe.base.as_deref().unwrap_or_default()));
    Ok((goal, recipe))
}

fn request(args: &Args) -> Result<Request, Error> {
    let (goal, recipe) = recipe(&args.recipe)?;
    let target_name = args.target.clone().or(recipe.target).unwrap_or_else(|| "ort-cpu".into());
    let target = target_named(&target_name)?;
    let scheme_text = args.scheme.clone().or(recipe.scheme).unwrap_or_else(|| "w8a8".into());
    let ending = if target.container() == Container::Onnx { "q.onnx" } else { "q" };
    let output = args.output.clone().unwrap_or_else(|| args.model.with_extension(ending));
    let of_recipe = recipe.set.iter().map(|text| text.parse().map_err(|e| Error::Input(format!("set `{text}`: {e}"))));
    let of_file = |share: &Option<Share>, name: &str| share.as_ref().map(|share| share.value(name)).transpose();
    // Of several that match, the last counts: the command line's.
    let set = of_recipe.chain(args.set.iter().cloned().map(Ok)).collect::<Result<_, Error>>()?;
    let scheme_of = |text: &str| scheme(text).map(|scheme| target.accepts().completed(scheme)).map_err(Error::Target);
    let embeddings = args.embeddings.as_ref().or(recipe.embeddings.as_ref());
    Ok(Request {
        set,
        rotate: args.rotate || recipe.rotate,
        rest: args.rest,
        journal: match (args.fresh, args.resume) {
            (true, _) => Kept::Fresh,
            (false, true) => Kept::Needed,
            (false, false) => Kept::Used,
        },
        learn: args.learn.clone().or(recipe.learn),
        distill: args.distill.clone().or(recipe.distill),
        cache: args.cache.or(recipe.cache),
        embeddings: embeddings.map(|text| scheme(text)).transpose().map_err(Error::Target)?,
        budget: args.budget.or(of_file(&recipe.budget, "budget")?),
        first_order: args.first_order,
        sensitivity: args.sensitivity.clone().or(recipe.sensitivity),
        hold_out: args.hold_out,
        augment: args.augment.map(usize::from),
        views: usize::from(args.views),
        max_drop: args.max_drop.or(of_file(&recipe.max_drop, "max-drop")?),
        output: (!args.dry_run).then_some(output),
        stats: args.stats.clone(),
        target,
        layout: args.memory.clone(),
        scheme: for_cpu(args.cpu.as_deref(), scheme_of(&scheme_text)?),
        goal,
        pipeline: args.pipeline.clone().or(recipe.pipeline),
        observer: args.observer.clone().or(recipe.observer),
        rounding: args.rounding.clone().or(recipe.rounding),
        keep_float: args.keep_float.iter().chain(&recipe.keep_float).cloned().collect(),
        ..args.data.request(&args.model, &target_name)?
    })
}

/// `scheme` with weights that cannot saturate the sums of a processor of this `kind`: two products of 8-bit codes with 7-bit ones,
/// 2 · 255 · 64 = 32640, fit 16 bits.
fn for_cpu(kind: Option<&str>, scheme: Scheme) -> Scheme {
    if kind == Some("avx2") && saturates(&scheme) { Scheme { weight_bits: 7, ..scheme } } else { scheme }
}

/// Whether sums of two products may pass 16 bits, where a processor adds them in so many.
fn saturates(scheme: &Scheme) -> bool {
    scheme.weight_format.is_none() && scheme.activation_bits == Some(8) && scheme.weight_bits == 8
}

/// What to tell who did not say a processor, and has one that saturates.
const SATURATES_HERE: &str = "note: this processor has no VNNI instructions, and on such ones kernels for 8-bit weights saturate: \
     accuracy is lost without a word. If the model runs here, say --cpu avx2 (weights of 7 bits); --cpu vnni says that it does not.\n";

/// Whether this processor adds products of bytes in 16 bits, since it has AVX2 and no better instructions.
fn saturates_here() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx2") && !has!("avx512vnni") && !has!("avxvnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let request = request(args)?;
    let progress = Shown::new(args.data.progress);
    let on_cpu = matches!(request.target.info().about.name, "ort-cpu" | "openvino-cpu");
    if args.cpu.is_none() && on_cpu && saturates(&request.scheme) && saturates_here() {
        eprint(SATURATES_HERE);
    }
    let outcome = driver::quantize(&request, &progress)?;
    let json = report::json(&request, &outcome);
    let mut text = report::text(&request, &outcome, &command());
    if args.dry_run {
        // Everything but writing was done: the plan is exact, and so are time and memory above.
        text = passes::text::plan(&outcome.model) + &text;
    }
    if let Some(path) = &args.report {
        driver::guard_inputs(path, &args.model, &[])?;
        emit::atomically(path, |out| {
            serde_json::to_writer_pretty(&mut *out, &json)?;
            out.write_all(b"\n")
        })?;
    }
    if args.json {
        eprint(&text);
        print(&format!("{json:#}\n"));
    } else {
        print(&text);
    }
    let fell_back = args.no_fallback && json["totals"]["kept_float"].as_u64() != Some(0);
    if fell_back {
        eprint("error: --no-fallback: nodes that the target could run on codes stay in float; see the summary\n");
    }
    let over = outcome.notes.iter().any(|note| note.code == passes::diag::OVER_BUDGET);
    let broken = fell_back || over || outcome.verdict.as_ref().is_some_and(|v| !v.passed);
    Ok(if broken { Ended::Broken } else { Ended::Done })
}

/// The command that was typed, quoted where a shell needs it.
fn command() -> String {
    let quoted = |arg: String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) { arg } else { format!("'{}'", arg.replace('\'', "'\\''")) }
    };
    let rest: Vec<String> = std::env::args().skip(1).map(quoted).collect();
    format!("onnx-quant {}", rest.join(" "))
}
