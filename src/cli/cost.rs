//! `onnx-quant cost`

use std::fmt::Write as _;
use std::path::PathBuf;

use passes::exec::Progress as _;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::target::Scheme;

use super::common::{DataArgs, scheme, target_named};
use super::progress::{self, Shown};
use super::{Ended, print};
use crate::cost::mvau::Folding;
use crate::cost::sweep::{self, Point};
use crate::cost::{self, Layer, mac};
use crate::driver::{self, Error, Request};
use crate::{emit, import};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model, quantized or float.
    #[arg(required_unless_present = "macs")]
    model: Option<PathBuf>,
    /// The formats of what is float: w4a4, we2m1ae2m1.
    #[arg(long, value_name = "SCHEME")]
    scheme: Option<String>,
    /// At most so many outputs at once, per layer.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pe: usize,
    /// At most so many inputs at once, per layer.
    #[arg(long, value_name = "N", default_value_t = 8)]
    simd: usize,
    /// Quantize a float model to every pair of formats of so many bits, 3-8, and print accuracy over cost; needs --data.
    #[arg(long, value_name = "BITS", value_parser = bits)]
    sweep: Option<(u32, u32)>,
    /// Draw the sweep.
    #[arg(long, value_name = "FILE", requires = "sweep")]
    svg: Option<PathBuf>,
    /// Print the table of single multiply-accumulates instead.
    #[arg(long)]
    macs: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataArgs,
}

/// `3-8`.
fn bits(text: &str) -> Result<(u32, u32), String> {
    let ends = text.split_once('-').and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
    ends.filter(|(low, high)| (2..=8).contains(low) && (low..=&8).contains(&high))
        .ok_or_else(|| format!("`{text}`: write 3-8, from 2 to 8 bits"))
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let Some(path) = args.model.as_ref().filter(|_| !args.macs) else {
        print(&macs(args.json));
        return Ok(Ended::Done);
    };
    if args.pe == 0 || args.simd == 0 {
        return Err(Error::Input("--pe and --simd are 1 or more".into()));
    }
    let request = args.data.request(path, "qonnx")?;
    let most = Folding { pe: args.pe, simd: args.simd };
    if let Some(range) = args.sweep {
        return swept(args, request, range, most);
    }
    let scheme = args.scheme.as_ref().map(|text| scheme(text)).transpose().map_err(Error::Input)?;
    let imported = import::in_f32(path).map_err(Error::input)?;
    let executor = driver::executor(&request.executor, &imported.model)?;
    let mut cx = PassContext::new(target_named("qonnx")?, executor.as_ref());
    let text = "infer-shapes, expand-qoperators, absorb-qdq, infer-shapes";
    let pipeline = Pipeline::parse(text, &passes::catalogue::passes()).map_err(Error::input)?;
    let (model, _) = PassManager::default().run(&pipeline, imported.model, &mut cx)?;
    let (layers, unknown) = cost::layers(&model, scheme, most);
    if layers.is_empty() {
        let why = unknown.first().map_or("it has no layers with weights", |(_, reason)| reason.as_str());
        return Err(Error::Input(format!("`{}`: nothing can be counted: {why}", path.display())));
    }
    print(&if args.json { format!("{:#}\n", cost::as_json(&layers, &unknown)) } else { as_text(&layers, &unknown) });
    Ok(Ended::Done)
}

fn as_text(layers: &[Layer], unknown: &[(String, String)]) -> String {
    let mut text = format!(
        "{:28}{:>14}{:>8}{:>12}{:>5}{:>11}{:>8}{:>6}{:>6}{:>10}{:>11}  source\n",
        "layer", "inputs x out", "pixels", "formats", "acc", "PE x SIMD", "LUT", "DSP", "BRAM", "cycles", "LUT cycles"
    );
    for layer in layers {
        let (w, a) = layer.formats;
        let name = layer.name.escape_debug().to_string();
        let size = format!("{} x {}", layer.shape.inputs, layer.shape.outputs);
        let lanes = format!("{} x {}", layer.folding.pe, layer.folding.simd);
        let _ = writeln!(
            text,
            "{name:28}{size:>14}{:>8}{:>12}{:>5}{lanes:>11}{:>8.0}{:>6}{:>6}{:>10}{:>11.2e}  {}",
            layer.shape.pixels,
            format!("{w} x {a}"),
            layer.accumulator,
            layer.cost.lut,
            layer.cost.dsp,
            layer.cost.bram,
            layer.cost.cycles,
            layer.cost.area_time(),
            layer.source.name()
        );
    }
    let total = cost::total(layers);
    let _ = writeln!(
        text,
        "\nall at once: {:.0} LUT (or {} DSP), {} BRAM18, {} bits of weights; a sample every {} cycles",
        total.lut, total.dsp, total.bram, total.weight_bits, total.cycles
    );
    if let Some(wide) = layers.iter().find(|layer| layer.accumulator > 32) {
        let _ = writeln!(text, "{} needs {} bits for its sums: 32-bit kernels overflow", wide.name, wide.accumulator);
    }
    for (name, reason) in unknown {
        let _ = writeln!(text, "not counted: {}: {reason}", name.escape_debug());
    }
    text
}

fn macs(json: bool) -> String {
    let rows = mac::measured();
    if json {
        let rows: Vec<_> = rows
            .map(|(a, b, m)| serde_json::json!({ "a": a.to_string(), "b": b.to_string(), "lut": m.lut, "accumulator_bits": m.accumulator, "source": m.source.name() }))
            .collect();
        return format!("{:#}\n", serde_json::json!({ "version": 1, "macs": rows }));
    }
    let mut text = format!("{:10}{:10}{:>5}{:>13}  source\n", "operand", "operand", "LUT", "accumulator");
    for (a, b, mac) in rows {
        let _ = writeln!(
            text,
            "{:10}{:10}{:>5}{:>13}  {}",
            a.to_string(),
            b.to_string(),
            mac.lut,
            mac.accumulator,
            mac.source.name()
        );
    }
    text
}

/// Quantizes to every pair of formats.
fn swept(args: &Args, mut request: Request, (low, high): (u32, u32), most: Folding) -> Result<Ended, Error> {
    let shown = Shown::new(args.data.progress);
    let silent = passes::exec::Silent;
    let schemes = sweep::schemes(low, high);
    shown.begin("sweep", schemes.len() as u64);
    let mut points = Vec::new();
    for text in schemes {
        if progress::is_cancelled() {
            return Err(Error::Interrupted);
        }
        let asked = Scheme::parse(&text).ok_or_else(|| Error::Input(format!("`{text}` is no scheme")))?;
        request.scheme = request.target.accepts().completed(asked);
        let outcome = driver::quantize(&request, &silent)?;
        let fidelity =
            outcome.fidelity.ok_or_else(|| Error::Input("a sweep needs samples: pass them with --data".into()))?;
        let (layers, _) = cost::layers(&outcome.model, None, most);
        let total = cost::total(&layers);
        let float = request.scheme.weight_format.is_some();
        points.push(Point {
            scheme: text,
            float,
            lut: total.lut,
            weight_bits: total.weight_bits,
            sqnr_db: fidelity.sqnr_db,
        });
        shown.step();
    }
    shown.end();
    points.sort_by(|a, b| a.lut.total_cmp(&b.lut).then(b.sqnr_db.total_cmp(&a.sqnr_db)));
    if let Some(path) = &args.svg {
        let name = request.input.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let title = format!("{name}: accuracy over lookup tables, {low} to {high} bits");
        let drawn = tempfile::NamedTempFile::new().map_err(|e| Error::Resources(e.to_string()))?;
        sweep::draw(&points, &title, drawn.path()).map_err(Error::Resources)?;
        let bytes = std::fs::read(drawn.path()).map_err(|e| Error::Resources(e.to_string()))?;
        emit::atomically(path, |out| out.write_all(&bytes))?;
    }
    print(&if args.json { sweep_json(&points) } else { sweep_text(&points) });
    Ok(Ended::Done)
}

fn sweep_text(points: &[Point]) -> String {
    let mut text = format!("{:16}{:>9}{:>14}{:>9}\n", "formats", "LUT", "weight bits", "dB");
    for point in points {
        let front = if sweep::is_on_front(point, points) { "  front" } else { "" };
        let _ = writeln!(
            text,
            "{:16}{:>9.0}{:>14}{:>9.2}{front}",
            point.scheme, point.lut, point.weight_bits, point.sqnr_db
        );
    }
    text
}

fn sweep_json(points: &[Point]) -> String {
    let row = |p: &Point| serde_json::json!({ "scheme": p.scheme, "lut": p.lut, "weight_bits": p.weight_bits, "sqnr_db": p.sqnr_db, "front": sweep::is_on_front(p, points) });
    format!("{:#}\n", serde_json::json!({ "version": 1, "points": points.iter().map(row).collect::<Vec<_>>() }))
}
