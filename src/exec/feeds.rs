//! What executors say about the graphs that they are handed.

use passes::ir::{Graph, Type};
use passes::tensor::{DType, Tensor};

/// Names of the graph's outputs, in order.
pub(super) fn output_names(graph: &Graph) -> Vec<String> {
    graph.outputs().iter().map(|&id| graph.value(id).name.to_string()).collect()
}

/// Names of the graph's inputs, in order.
pub(super) fn input_names(graph: &Graph) -> Vec<String> {
    graph.inputs().iter().map(|&id| graph.value(id).name.to_string()).collect()
}

/// Declared element types of the graph's outputs, in order; `None` where the file does not say.
pub(super) fn output_types(graph: &Graph) -> Vec<Option<DType>> {
    graph
        .outputs()
        .iter()
        .map(|&id| match &graph.value(id).ty {
            Type::Tensor(ty) => ty.dtype,
            Type::Opaque(_) => None,
        })
        .collect()
}

/// Integers of one type as a tensor of another.
pub(super) fn integers(dtype: DType, shape: Vec<usize>, values: Vec<i64>) -> Result<Tensor, String> {
    if dtype == DType::I64 {
        return Ok(Tensor::of(shape, values));
    }
    let width = match dtype {
        DType::Bool => 1,
        other if other.is_integer() => other.bits() as usize / 8,
        other => return Err(format!("an integer result where {} is declared", other.name())),
    };
    let bytes: Vec<u8> = if dtype == DType::Bool {
        values.iter().map(|&v| u8::from(v != 0)).collect()
    } else {
        values.iter().flat_map(|v| v.to_le_bytes().into_iter().take(width)).collect()
    };
    Tensor::new(dtype, shape, bytes.into()).map_err(|e| e.to_string())
}
