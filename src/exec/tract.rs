//! tract: concrete shapes, a plan per shape.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::model::Metadata;
use passes::tensor::{DType, Tensor};
use prost::Message as _;
use tract_onnx::model::ParseResult;
use tract_onnx::prelude::{self as tract, Datum, DatumType, InferenceModelExt as _, IntoTValue as _};

use super::{encoded, feeds, guarded};

pub(super) static ABOUT: About = About {
    name: "tract",
    doc: "tract, embedded: optimizes the graph for concrete shapes and keeps a plan per shape. Real 64-bit integers and \
          16-bit floats; a new input shape costs an optimization.",
    source: "tract-onnx 0.23",
};

const NAME: &str = "tract";
/// Plans kept at once per graph; ragged data makes one per shape.
const MAX_PLANS: usize = 16;

type Plan = Arc<tract::TypedSimplePlan>;
/// What a plan is made for: element type and shape of every input, and the values of those that look like shapes.
type Key = Vec<(DType, Vec<usize>, Option<Vec<u8>>)>;

/// Integer vectors up to this length are taken for shapes: tract wants those as constants.
const SHAPE_LIKE: usize = 16;

fn key_of(tensor: &Tensor) -> (DType, Vec<usize>, Option<Vec<u8>>) {
    let shape_like = tensor.dtype() == DType::I64 && tensor.shape().len() <= 1 && tensor.len() <= SHAPE_LIKE;
    (tensor.dtype(), tensor.shape().to_vec(), shape_like.then(|| tensor.bytes().to_vec()))
}

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Tract {
    meta: Metadata,
}

impl Tract {
    pub(super) fn new(meta: &Metadata) -> Self {
        Self { meta: meta.clone() }
    }
}

/// The first quantized operator of `graph` or its bodies: tract's optimizer fuses those around softmax into garbage.
fn quantized_operator(graph: &Graph) -> Option<String> {
    graph.nodes().find_map(|(_, node)| {
        let quantized = node.op.name.ends_with("QuantizeLinear")
            || node.op.is("DequantizeLinear")
            || node.op.name.starts_with("QLinear");
        let inside = || node.bodies.iter().find_map(|body| quantized_operator(&body.graph));
        if quantized { Some(node.op.display()) } else { inside() }
    })
}

struct Prepared {
    bytes: Vec<u8>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    types: Vec<Option<DType>>,
    plans: Mutex<BTreeMap<Key, Plan>>,
}

impl Executor for Tract {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        if let Some(op) = quantized_operator(graph) {
            let message = format!("it would optimize {op} into wrong results");
            return Err(ExecError { executor: NAME, message });
        }
        Ok(Box::new(Prepared {
            bytes: encoded(graph, &self.meta),
            inputs: feeds::input_names(graph),
            outputs: feeds::output_names(graph),
            types: feeds::output_types(graph),
            plans: Mutex::new(BTreeMap::new()),
        }))
    }
}

impl Prepared {
    /// The plan for inputs like `given`. Made under the lock, so that two threads with one shape make one plan.
    fn plan(&self, given: &[Tensor]) -> tract::TractResult<Plan> {
        let key: Key = given.iter().map(key_of).collect();
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(Arc::clone(plan));
        }
        let plan = self.make(given)?;
        if plans.len() >= MAX_PLANS {
            plans.pop_first();
        }
        plans.insert(key, Arc::clone(&plan));
        Ok(plan)
    }

    fn make(&self, given: &[Tensor]) -> tract::TractResult<Plan> {
        let onnx = tract_onnx::onnx().with_ignore_value_info(true);
        let proto = tract_onnx::pb::ModelProto::decode(self.bytes.as_slice())?;
        let ParseResult { mut model, outlets_by_name, .. } = onnx.parse(&proto, None)?;
        drop(proto);
        for index in 0..model.output_outlets()?.len() {
            model.set_output_fact(index, tract::InferenceFact::default())?;
        }
        for (index, outlet) in model.input_outlets()?.to_vec().into_iter().enumerate() {
            let name = model.node(outlet.node).name.clone();
            let at = self.inputs.iter().position(|input| *input == name);
            let tensor = at.and_then(|at| given.get(at)).ok_or_else(|| anyhow::anyhow!("no feed for `{name}`"))?;
            let mut fact = tract::InferenceFact::dt_shape(datum(tensor.dtype())?, tensor.shape());
            if key_of(tensor).2.is_some() {
                let value = tract_tensor(tensor).map_err(|e| anyhow::anyhow!(e))?;
                fact.value = Arc::new(value).into();
            }
            model.set_input_fact(index, fact)?;
        }
        let find = |name: &String| {
            outlets_by_name.get(name).copied().ok_or_else(|| anyhow::anyhow!("it lost the tensor `{name}`"))
        };
        let outlets = self.outputs.iter().map(find).collect::<tract::TractResult<Vec<_>>>()?;
        model.select_output_outlets(&outlets)?;
        tract::TypedSimplePlan::new(model.into_typed()?.into_optimized()?)
    }
}

impl Session for Prepared {
    fn run(&self, given: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        guarded(NAME, || {
            let plan = self.plan(given).map_err(|e| format!("{e:#}"))?;
            let inputs: Result<_, String> = given.iter().map(|t| Ok(tract_tensor(t)?.into_tvalue())).collect();
            let results = plan.run(inputs?).map_err(|e| format!("{e:#}"))?;
            results.iter().zip(&self.types).map(|(result, ty)| tensor_of(result, *ty)).collect()
        })
    }
}

fn datum(dtype: DType) -> tract::TractResult<DatumType> {
    Ok(match dtype {
        DType::F32 => DatumType::F32,
        DType::F64 => DatumType::F64,
        DType::F16 => DatumType::F16,
        DType::I8 => DatumType::I8,
        DType::U8 => DatumType::U8,
        DType::I16 => DatumType::I16,
        DType::U16 => DatumType::U16,
        DType::I32 => DatumType::I32,
        DType::U32 => DatumType::U32,
        DType::I64 => DatumType::I64,
        DType::U64 => DatumType::U64,
        DType::Bool => DatumType::Bool,
        other => anyhow::bail!("element type {} is not supported", other.name()),
    })
}

fn tract_tensor(tensor: &Tensor) -> Result<tract::Tensor, String> {
    fn typed<T: passes::tensor::Element + Datum>(tensor: &Tensor) -> Result<tract::Tensor, String> {
        let values = tensor.values::<T>().unwrap_or_default();
        tract::Tensor::from_shape(tensor.shape(), &values).map_err(|e| format!("{e:#}"))
    }
    match tensor.dtype() {
        DType::F32 => typed::<f32>(tensor),
        DType::F64 => typed::<f64>(tensor),
        DType::I8 => typed::<i8>(tensor),
        DType::U8 => typed::<u8>(tensor),
        DType::I16 => typed::<i16>(tensor),
        DType::U16 => typed::<u16>(tensor),
        DType::I32 => typed::<i32>(tensor),
        DType::U32 => typed::<u32>(tensor),
        DType::I64 => typed::<i64>(tensor),
        DType::U64 => typed::<u64>(tensor),
        DType::Bool => {
            let values: Vec<bool> = tensor.bytes().iter().map(|&b| b != 0).collect();
            tract::Tensor::from_shape(tensor.shape(), &values).map_err(|e| format!("{e:#}"))
        }
        DType::F16 => {
            let halves = tensor.bytes().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]));
            let values: Vec<half::f16> = halves.collect();
            tract::Tensor::from_shape(tensor.shape(), &values).map_err(|e| format!("{e:#}"))
        }
        other => Err(format!("element type {} is not supported", other.name())),
    }
}

fn tensor_of(result: &tract::Tensor, declared: Option<DType>) -> Result<Tensor, String> {
    let shape = result.shape().to_vec();
    let failed = |e: tract::TractError| format!("{e:#}");
    if result.datum_type() == DatumType::F32 {
        let ram = result.try_as_plain_ram().map_err(failed)?;
        return Ok(Tensor::of(shape, ram.as_slice::<f32>().map_err(failed)?.to_vec()));
    }
    if result.datum_type().is_float() {
        let wide = result.cast_to::<f64>().map_err(failed)?;
        let values = wide.try_as_plain_ram().map_err(failed)?.as_slice::<f64>().map_err(failed)?.to_vec();
        let f16 = result.datum_type() == DatumType::F16;
        if !f16 {
            return Ok(Tensor::of(shape, values));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f64(v).to_le_bytes()).collect();
        return Tensor::new(DType::F16, shape, bytes.into()).map_err(|e| e.to_string());
    }
    // Shapes come out as symbolic dimensions: on concrete inputs they are numbers.
    let wide = result.cast_to::<i64>().map_err(failed)?;
    let values = wide.try_as_plain_ram().map_err(failed)?.as_slice::<i64>().map_err(failed)?.to_vec();
    let own = match result.datum_type() {
        DatumType::Bool => DType::Bool,
        DatumType::U8 => DType::U8,
        DatumType::I8 => DType::I8,
        DatumType::I32 => DType::I32,
        _ => DType::I64,
    };
    feeds::integers(declared.unwrap_or(own), shape, values)
}
