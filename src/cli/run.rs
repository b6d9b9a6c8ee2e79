//! `onnx-quant run`

use std::path::PathBuf;

use passes::exec::{Dataset as _, Progress as _};
use passes::ir::Graph;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::tensor::{DType, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::common::{DataArgs, target_named};
use super::progress::Shown;
use super::{Ended, print};
use crate::dataset::Slot;
use crate::driver::{self, Error};
use crate::{emit, import, samples};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model, float or quantized in any dialect that is read.
    model: PathBuf,
    /// Where its outputs go, one tensor each with all samples behind one another, as .safetensors.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    data: DataArgs,
}

/// Runs the command: what the model computes by our own arithmetic, for comparison with whoever else runs it.
pub(crate) fn run(args: &Args) -> Result<Ended, Error> {
    let request = args.data.request(&args.model, "ort-cpu")?;
    let imported = import::in_f32(&args.model).map_err(Error::input)?;
    driver::guard_inputs(&args.output, &args.model, &imported.external)?;
    samples::refuse_herding(&request)?;
    let executor = driver::executor(&request.executor, &imported.model)?;
    let progress = Shown::new(args.data.progress);
    let mut cx = PassContext {
        threads: request.threads,
        progress: &progress,
        ..PassContext::new(target_named("ort-cpu")?, executor.as_ref())
    };
    let pipeline = Pipeline::parse(
        "infer-shapes, expand-qoperators, absorb-qdq, fold-constants, drop-dead",
        &passes::catalogue::passes(),
    );
    let (model, _) = PassManager::default().run(&pipeline.map_err(Error::input)?, imported.model, &mut cx)?;
    let graph = model.graph();
    // Caches in codes have become float inputs.
    let dataset = samples::open(&request, Slot::of(graph))?;
    let dataset = dataset.ok_or_else(|| Error::Input("samples are needed: pass them with --data".into()))?;
    let simulation =
        Simulation::prepare(graph, model.plan(), executor.as_ref(), graph.outputs()).map_err(Error::input)?;
    let mut outputs: Vec<Joined> = graph.outputs().iter().map(|_| Joined::default()).collect();
    progress.begin("run", dataset.len() as u64);
    for index in 0..dataset.len() {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let results = simulation.run(&dataset.sample(index).map_err(Error::input)?).map_err(Error::input)?;
        for (joined, tensor) in outputs.iter_mut().zip(&results) {
            joined.add(tensor).map_err(|problem| Error::Input(format!("{}: {problem}", dataset.name(index))))?;
        }
        progress.step();
    }
    progress.end();
    let file = serialized(graph, &outputs)?;
    emit::atomically(&args.output, |out| out.write_all(&file))?;
    print(&format!("{} samples -> {}\n", dataset.len(), args.output.display()));
    Ok(Ended::Done)
}

/// Results of samples behind one another.
#[derive(Default)]
struct Joined {
    dtype: Option<DType>,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Joined {
    fn add(&mut self, tensor: &Tensor) -> Result<(), String> {
        let shape = tensor.shape();
        let rows = shape.first().copied().unwrap_or(1);
        if self.dtype.is_none() {
            self.dtype = Some(tensor.dtype());
            self.shape = [&[0][..], shape.get(1..).unwrap_or(&[])].concat();
        }
        if self.dtype != Some(tensor.dtype()) || self.shape[1..] != *shape.get(1..).unwrap_or(&[]) {
            return Err(format!("an output of shape {shape:?} does not fit behind those before it, {:?}", self.shape));
        }
        self.shape[0] += rows;
        self.bytes.extend_from_slice(tensor.bytes());
        Ok(())
    }
}

fn serialized(graph: &Graph, outputs: &[Joined]) -> Result<Vec<u8>, Error> {
    let view = |(id, joined): (&passes::id::ValueId, &'_ Joined)| {
        let name = graph.value(*id).name.to_string();
        let dtype = joined.dtype.and_then(emit::stored);
        let dtype =
            dtype.ok_or_else(|| Error::Input(format!("output `{name}` has no type that .safetensors holds")))?;
        Ok((name, dtype))
    };
    let named: Vec<(String, Dtype)> = graph.outputs().iter().zip(outputs).map(view).collect::<Result<_, Error>>()?;
    let views: Vec<(&str, TensorView<'_>)> = named
        .iter()
        .zip(outputs)
        .map(|((name, dtype), joined)| {
            let view = TensorView::new(*dtype, joined.shape.clone(), &joined.bytes);
            Ok((name.as_str(), view.map_err(Error::input)?))
        })
        .collect::<Result<_, Error>>()?;
    safetensors::serialize(views, None).map_err(Error::input)
}
