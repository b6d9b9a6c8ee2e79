//! Types from the wire.

use passes::id::Name;
use passes::ir::{Dim, TensorType, Type};
use passes::tensor::DType;
use proto::onnx::tensor_shape_proto::dimension::Value;
use proto::onnx::{TensorShapeProto, TypeProto, ValueInfoProto, type_proto};

/// The type that `info` declares.
pub(super) fn of_info(info: &ValueInfoProto) -> Type {
    info.r#type.as_ref().map_or_else(Type::default, of)
}

fn of(ty: &TypeProto) -> Type {
    match &ty.value {
        Some(type_proto::Value::TensorType(tensor)) => {
            Type::Tensor(TensorType::new(DType::from_code(tensor.elem_type().into()), tensor.shape.as_ref().map(dims)))
        }
        Some(_) => Type::Opaque(proto::encode(ty).into()),
        None => Type::default(),
    }
}

fn dims(shape: &TensorShapeProto) -> Vec<Dim> {
    shape
        .dim
        .iter()
        .map(|dim| match &dim.value {
            // Exporters write 0 or -1, and `?`, for "any".
            Some(Value::DimValue(n)) => usize::try_from(*n).ok().filter(|&n| n > 0).map_or(Dim::Unknown, Dim::Known),
            Some(Value::DimParam(symbol)) if !symbol.is_empty() && symbol != "?" => {
                Dim::Symbol(Name::from(symbol.as_str()))
            }
            _ => Dim::Unknown,
        })
        .collect()
}
