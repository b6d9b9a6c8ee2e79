//! ONNX Runtime, from a shared library found at run time. Built with the feature `ort`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use ort::session::Session as OrtSession;
use ort::session::builder::GraphOptimizationLevel;
use ort::value::{DynValue, Tensor as OrtTensor, TensorElementType, ValueType};
use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::model::Metadata;
use passes::tensor::{DType, Tensor};

use super::{encoded, feeds, guarded};

pub(super) static ABOUT: About = About {
    name: "ort",
    doc: "ONNX Runtime, loaded at run time from ORT_DYLIB_PATH or from the onnxruntime package of the python3 on the path. \
          Graph optimization is off: every tensor keeps its name.",
    source: "ONNX Runtime C API 17",
};

const NAME: &str = "ort";

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Ort {
    meta: Metadata,
}

/// The one environment of the process; loading twice is an error of the library.
fn environment() -> Result<&'static Environment, String> {
    static ENVIRONMENT: OnceLock<Result<Environment, String>> = OnceLock::new();
    let load = || {
        let path =
            library().ok_or("no ONNX Runtime library: set ORT_DYLIB_PATH, or install the onnxruntime package")?;
        let builder = ort::init_from(&path).map_err(|e| format!("`{}`: {e}", path.display()))?;
        builder.build().map_err(|e| e.to_string())
    };
    ENVIRONMENT.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// The shared library: what the environment names, or what the Python package carries.
fn library() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return Some(path.into());
    }
    let script = "import onnxruntime, os; print(os.path.join(os.path.dirname(onnxruntime.__file__), 'capi'))";
    let output = Command::new("python3").args(["-c", script]).output().ok()?;
    let folder = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let entries = std::fs::read_dir(folder).ok()?.filter_map(Result::ok).map(|entry| entry.path());
    entries.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libonnxruntime.so"))).max()
}

impl Ort {
    pub(super) fn new(meta: &Metadata) -> Result<Self, ExecError> {
        guarded(NAME, || environment().map(|_| ()))?;
        Ok(Self { meta: meta.clone() })
    }
}

impl Executor for Ort {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        guarded(NAME, || {
            let bytes = encoded(graph, &self.meta);
            let open = || -> ort::Result<OrtSession> {
                let environment = environment().map_err(ort::Error::new)?;
                OrtSession::builder(environment)?
                    .with_optimization_level(GraphOptimizationLevel::Disable)?
                    .with_intra_threads(1)?
                    .with_intra_op_spinning(false)?
                    .commit_from_memory(&bytes)
            };
            let session = open().map_err(|e| e.to_string())?;
            let (inputs, outputs) = (feeds::input_names(graph), feeds::output_names(graph));
            Ok(Box::new(Loaded { session: Mutex::new(session), inputs, outputs }) as Box<dyn Session>)
        })
    }
}

/// A session; the library wants it to itself while it runs.
struct Loaded {
    session: Mutex<OrtSession>,
    inputs: Vec<String>,
    outputs: Vec<String>,
}

impl Session for Loaded {
    fn run(&self, given: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        guarded(NAME, || {
            let named = self.inputs.iter().zip(given).map(|(name, tensor)| Ok((name.clone(), value_of(tensor)?)));
            let named = named.collect::<Result<Vec<_>, String>>()?;
            let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            let results = session.run(named).map_err(|e| e.to_string())?;
            let find = |name: &String| results.get(name.as_str()).ok_or_else(|| format!("it lost the tensor `{name}`"));
            self.outputs.iter().map(|name| tensor_of(find(name)?)).collect()
        })
    }
}

fn value_of(tensor: &Tensor) -> Result<DynValue, String> {
    macro_rules! typed {
        ($rust:ty) => {{
            let values = tensor.values::<$rust>().unwrap_or_default().into_owned();
            OrtTensor::from_array((tensor.shape().to_vec(), values))
                .map(ort::value::Value::into_dyn)
                .map_err(|e| e.to_string())
        }};
    }
    match tensor.dtype() {
        DType::F32 => typed!(f32),
        DType::F64 => typed!(f64),
        DType::I8 => typed!(i8),
        DType::U8 => typed!(u8),
        DType::I16 => typed!(i16),
        DType::U16 => typed!(u16),
        DType::I32 => typed!(i32),
        DType::U32 => typed!(u32),
        DType::I64 => typed!(i64),
        DType::U64 => typed!(u64),
        DType::Bool => {
            let values: Vec<bool> = tensor.bytes().iter().map(|&b| b != 0).collect();
            OrtTensor::from_array((tensor.shape().to_vec(), values))
                .map(ort::value::Value::into_dyn)
                .map_err(|e| e.to_string())
        }
        other => Err(format!("element type {} is not supported here", other.name())),
    }
}

fn tensor_of(value: &DynValue) -> Result<Tensor, String> {
    macro_rules! typed {
        ($rust:ty) => {{
            let (shape, data) = value.try_extract_tensor::<$rust>().map_err(|e| e.to_string())?;
            let shape: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
            Ok(Tensor::of(shape.ok_or("a negative dimension")?, data.to_vec()))
        }};
    }
    let ValueType::Tensor { ty, .. } = value.dtype() else { return Err("a result that is no tensor".into()) };
    match ty {
        TensorElementType::Float32 => typed!(f32),
        TensorElementType::Float64 => typed!(f64),
        TensorElementType::Int8 => typed!(i8),
        TensorElementType::Uint8 => typed!(u8),
        TensorElementType::Int32 => typed!(i32),
        TensorElementType::Int64 => typed!(i64),
        TensorElementType::Bool => {
            let (shape, data) = value.try_extract_tensor::<bool>().map_err(|e| e.to_string())?;
            let shape: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
            let bytes: Vec<u8> = data.iter().map(|&b| u8::from(b)).collect();
            Tensor::new(DType::Bool, shape.ok_or("a negative dimension")?, bytes.into()).map_err(|e| e.to_string())
        }
        other => Err(format!("a result of element type {other}, which is not supported here")),
    }
}
