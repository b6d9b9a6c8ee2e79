//! Attribute values.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::id::Name;
use crate::tensor::Tensor;

/// The attributes of a node, graphs excepted: those are its bodies.
pub type Attrs = BTreeMap<Name, Attr>;

/// One attribute value.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are ONNX's own attribute kinds")]
pub enum Attr {
    Int(i64),
    Float(f32),
    String(Bytes),
    Tensor(Arc<Tensor>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<Bytes>),
    Tensors(Vec<Arc<Tensor>>),
    /// A kind that no pass reads (sparse tensors, types): the encoded `AttributeProto`, carried as it is.
    Opaque(Bytes),
}

impl Attr {
    /// A string attribute.
    pub fn text(value: &str) -> Self {
        Self::String(Bytes::copy_from_slice(value.as_bytes()))
    }
}
