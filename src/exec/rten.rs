//! rten: dynamic shapes, one load for any sample.

use std::sync::Arc;

use passes::about::About;
use passes::exec::{ExecError, Executor, Session};
use passes::ir::Graph;
use passes::model::Metadata;
use passes::tensor::{DType, Tensor};
use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value, ValueOrView};
use rten_tensor::Layout as _;

use super::{feeds, guarded};

pub(super) static ABOUT: About = About {
    name: "rten",
    doc: "rten, embedded: takes dynamic shapes as they are, loads a graph once for all samples. Integers are 32 bits \
          inside; no bfloat16, no 16-bit integers.",
    source: "rten 0.27",
};

const NAME: &str = "rten";

/// See [`ABOUT`].
#[derive(Debug)]
pub(super) struct Rten {
    meta: Metadata,
}

impl Rten {
    pub(super) fn new(meta: &Metadata) -> Self {
        Self { meta: meta.clone() }
    }
}

struct Loaded {
    model: Model,
    inputs: Vec<NodeId>,
    outputs: Vec<NodeId>,
    types: Vec<Option<DType>>,
}

std::thread_local! {
    /// One thread per caller: calibration runs samples in parallel, not the inside of one.
    static POOL: Arc<ThreadPool> = Arc::new(ThreadPool::with_num_threads(1));
}

impl Executor for Rten {
    fn name(&self) -> &'static str {
        NAME
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        guarded(NAME, || {
            let mut wire = crate::emit::part(graph, &self.meta);
            write_default_attributes(&mut wire, graph);
            let mut options = ModelOptions::with_all_ops();
            let weights: u64 =
                graph.value_ids().filter_map(|id| graph.constant(id)).map(|t| t.bytes().len() as u64).sum();
            // Packed weights are held once more: for large models that costs more memory than it saves time.
            options.enable_optimization(false).prepack_weights(weights <= crate::memory::PREPACK_LIMIT);
            let model = options.load(proto::encode(&wire)).map_err(|e| e.to_string())?;
            let find = |names: Vec<String>| -> Result<Vec<NodeId>, String> {
                names.iter().map(|n| model.find_node(n).ok_or_else(|| format!("it lost the tensor `{n}`"))).collect()
            };
            let inputs = find(feeds::input_names(graph))?;
            let outputs = find(feeds::output_names(graph))?;
            let loaded = Loaded { inputs, outputs, types: feeds::output_types(graph), model };
            Ok(Box::new(loaded) as Box<dyn Session>)
        })
    }
}

/// What rten insists on and ONNX leaves to defaults: strides, dilations and padding of windows.
fn write_default_attributes(wire: &mut proto::onnx::ModelProto, graph: &Graph) {
    use proto::onnx::AttributeProto;
    use proto::onnx::attribute_proto::AttributeType;
    let Some(proto) = wire.graph.as_mut() else { return };
    for ((_, node), target) in graph.nodes().zip(&mut proto.node) {
        let windowed =
            ["Conv", "ConvTranspose", "AveragePool", "MaxPool", "ConvInteger"].iter().any(|op| node.op.is(op));
        if !windowed {
            continue;
        }
        let rank = [1, 0].iter().find_map(|&i| graph.value(node.input(i)?).ty.rank());
        let kernel = node.ints("kernel_shape").map(<[i64]>::len);
        let Some(spatial) = kernel.or(rank.and_then(|r| r.checked_sub(2))) else { continue };
        let mut add = |name: &str, values: Vec<i64>| {
            if !target.attribute.iter().any(|a| a.name() == name) {
                target.attribute.push(AttributeProto {
                    name: Some(name.to_owned()),
                    r#type: Some(AttributeType::Ints as i32),
                    ints: values,
                    ..AttributeProto::default()
                });
            }
        };
        add("strides", vec![1; spatial]);
        if !node.op.is("AveragePool") {
            add("dilations", vec![1; spatial]);
        }
        if node.text("auto_pad", "NOTSET") == "NOTSET" {
            add("pads", vec![0; 2 * spatial]);
        }
    }
}

impl Session for Loaded {
    fn run(&self, given: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        guarded(NAME, || {
            let feeds: Result<Vec<(NodeId, ValueOrView<'_>)>, String> =
                self.inputs.iter().zip(given).map(|(&id, tensor)| Ok((id, value_of(tensor)?.into()))).collect();
            let pool = POOL.with(Arc::clone);
            let options = RunOptions::default().with_thread_pool(Some(pool));
            // rten refuses to return a value twice.
            let mut unique = self.outputs.clone();
            unique.sort_unstable();
            unique.dedup();
            let values = self.model.run(feeds?, &unique, Some(options)).map_err(|e| e.to_string())?;
            let mut tensors = Vec::with_capacity(values.len());
            for (value, id) in values.into_iter().zip(&unique) {
                let ty = self.outputs.iter().position(|o| o == id).and_then(|at| self.types[at]);
                tensors.push(tensor_of(value, ty)?);
            }
            let place = |id: &NodeId| unique.binary_search(id).map(|at| tensors[at].clone());
            self.outputs.iter().map(|id| place(id).map_err(|_| "it lost an output".to_owned())).collect()
        })
    }
}

fn value_of(tensor: &Tensor) -> Result<Value, String> {
    let shape = tensor.shape().to_vec();
    let failed = |e: &dyn std::fmt::Display| format!("a tensor of shape {shape:?}: {e}");
    match tensor.dtype() {
        DType::I8 => {
            let data = tensor.values::<i8>().unwrap_or_default().into_owned();
            Value::from_shape(shape.clone(), data).map_err(|e| failed(&e))
        }
        DType::U8 => {
            let data = tensor.values::<u8>().unwrap_or_default().into_owned();
            Value::from_shape(shape.clone(), data).map_err(|e| failed(&e))
        }
        dtype if dtype.is_float() => {
            let data = tensor.floats().unwrap_or_default().into_owned();
            Value::from_shape(shape.clone(), data).map_err(|e| failed(&e))
        }
        dtype => {
            let wide = tensor.integers().ok_or_else(|| format!("element type {} is not supported", dtype.name()))?;
            let data: Option<Vec<i32>> = wide.iter().map(|&v| i32::try_from(v).ok()).collect();
            let data = data.ok_or("an integer over 32 bits")?;
            Value::from_shape(shape.clone(), data).map_err(|e| failed(&e))
        }
    }
}

fn tensor_of(value: Value, declared: Option<DType>) -> Result<Tensor, String> {
    Ok(match value {
        Value::FloatTensor(t) => {
            let mut shape = t.shape().to_vec();
            let data: Vec<f32> = t.into_data();
            match declared {
                None | Some(DType::F32) => Tensor::of(std::mem::take(&mut shape), data),
                Some(DType::F64) => Tensor::of(shape, data.into_iter().map(f64::from).collect()),
                Some(other) => return Err(format!("a float result where {} is declared", other.name())),
            }
        }
        Value::Int32Tensor(t) => {
            let shape = t.shape().to_vec();
            let wide = t.into_data().into_iter().map(i64::from).collect();
            feeds::integers(declared.unwrap_or(DType::I64), shape, wide)?
        }
        Value::Int8Tensor(t) => Tensor::of(t.shape().to_vec(), t.into_data()),
        Value::UInt8Tensor(t) => Tensor::of(t.shape().to_vec(), t.into_data()),
        _ => return Err("a result that is no tensor".into()),
    })
}
