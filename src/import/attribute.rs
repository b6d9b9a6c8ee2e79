//! Attributes from the wire.

use bytes::Bytes;
use passes::ir::Attr;
use proto::onnx::AttributeProto;
use proto::onnx::attribute_proto::AttributeType;

use super::{ImportError, tensor};
use crate::load::ExternalFiles;

/// The kind of `wire`, from its `type` field or, where an old exporter left it out, from what is filled.
pub(super) fn kind(wire: &AttributeProto) -> AttributeType {
    match wire.r#type() {
        AttributeType::Undefined if wire.f.is_some() => AttributeType::Float,
        AttributeType::Undefined if wire.i.is_some() => AttributeType::Int,
        AttributeType::Undefined if wire.s.is_some() => AttributeType::String,
        AttributeType::Undefined if wire.t.is_some() => AttributeType::Tensor,
        AttributeType::Undefined if wire.g.is_some() => AttributeType::Graph,
        AttributeType::Undefined if !wire.floats.is_empty() => AttributeType::Floats,
        AttributeType::Undefined if !wire.ints.is_empty() => AttributeType::Ints,
        AttributeType::Undefined if !wire.strings.is_empty() => AttributeType::Strings,
        stated => stated,
    }
}

/// The value of `wire`, which is no graph.
///
/// # Errors
/// [`ImportError`] for a tensor that contradicts itself.
pub(super) fn import(wire: &AttributeProto, files: &mut ExternalFiles) -> Result<Attr, ImportError> {
    Ok(match kind(wire) {
        AttributeType::Float => Attr::Float(wire.f()),
        AttributeType::Int => Attr::Int(wire.i()),
        AttributeType::String => Attr::String(Bytes::copy_from_slice(wire.s())),
        AttributeType::Tensor => match &wire.t {
            Some(t) => Attr::Tensor(tensor::tensor(t, files)?),
            None => Attr::Opaque(proto::encode(wire).into()),
        },
        AttributeType::Floats => Attr::Floats(wire.floats.clone()),
        AttributeType::Ints => Attr::Ints(wire.ints.clone()),
        AttributeType::Strings => Attr::Strings(wire.strings.iter().map(|s| Bytes::copy_from_slice(s)).collect()),
        AttributeType::Tensors => {
            Attr::Tensors(wire.tensors.iter().map(|t| tensor::tensor(t, files)).collect::<Result<_, _>>()?)
        }
        _ => Attr::Opaque(proto::encode(wire).into()),
    })
}
