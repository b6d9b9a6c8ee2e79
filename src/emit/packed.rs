//! Weights in a `.safetensors` file that the model's external data points into, with a manifest.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use passes::ir::Graph;
use passes::model::Model;
use passes::tensor::{DType, Tensor};
use proto::ExternalRef;
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::onnx::is_large;

/// The name of the file that holds the weights.
pub(super) const FILE: &str = "model.safetensors";

/// A constant as the file holds it: codes of fewer than 8 bits as bytes.
struct Stored<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<'a> Stored<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        match stored(tensor.dtype()) {
            Some(dtype) => Self { tensor, dtype, shape: tensor.shape().to_vec() },
            None => Self { tensor, dtype: Dtype::U8, shape: vec![tensor.bytes().len()] },
        }
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.tensor.bytes())
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes().len()
    }
}

/// The type that holds `dtype` in a .safetensors file.
pub(crate) fn stored(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::Bool => Dtype::BOOL,
        DType::U8 => Dtype::U8,
        DType::I8 => Dtype::I8,
        DType::I16 => Dtype::I16,
        DType::U16 => Dtype::U16,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::I64 => Dtype::I64,
        DType::U64 => Dtype::U64,
        DType::F8E4M3Fn => Dtype::F8_E4M3,
        DType::F8E5M2 => Dtype::F8_E5M2,
        _ => return None,
    })
}

/// Writes the large constants of `graph` to `path`; returns where each lies.
pub(super) fn write(graph: &Graph, path: &Path) -> io::Result<BTreeMap<String, ExternalRef>> {
    let users = passes::ir::walk::Users::of(graph);
    let constants = graph.value_ids().filter(|id| !users.of_value(*id).is_empty());
    let large: Vec<(String, Stored<'_>)> = constants
        .filter_map(|id| Some((id, graph.constant(id).filter(|tensor| is_large(tensor))?)))
        .map(|(id, tensor)| (graph.value(id).name.to_string(), Stored::of(tensor)))
        // A name that the format keeps for itself.
        .filter(|(name, _)| name != "__metadata__")
        .collect();
    safetensors::serialize_to_file(large, None, path).map_err(io::Error::other)?;
    let written = crate::load::map(path).map_err(io::Error::other)?;
    let (header, metadata) = SafeTensors::read_metadata(&written).map_err(io::Error::other)?;
    let data = 8 + header as u64;
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (from, to) = info.data_offsets;
        let reference =
            ExternalRef { location: FILE.into(), offset: data + from as u64, length: Some((to - from) as u64) };
        (name, reference)
    };
    Ok(metadata.tensors().into_iter().map(place).collect())
}

/// What every encoded weight of `model` is, for readers of the file that know no ONNX.
pub(super) fn manifest(model: &Model, target: &str, placed: &BTreeMap<String, ExternalRef>) -> Value {
    let graph = model.graph();
    let weights: Vec<Value> = model
        .plan()
        .encodings()
        .filter_map(|(site, encoding)| Some((site, encoding, model.plan().codes(site)?)))
        .map(|(site, encoding, codes)| {
            let passes::id::Site::Use { node, input } = site else { return Value::Null };
            let reader = graph.node(node);
            let name =
                reader.and_then(|node| node.input(input.into())).map(|value| graph.value(value).name.to_string());
            let (low, _) = encoding.grid.range();
            json!({
                "tensor": name,
                "node": reader.map(|node| node.name.to_string()),
                "format": encoding.grid.info().about.name,
                "bits": encoding.grid.info().bits,
                "signed": low < 0.0,
                "shape": codes.shape(),
                "granularity": crate::report::granularity(encoding.granularity),
                "zero_point": if encoding.is_symmetric() { "none" } else { "per scale" },
                "scales": encoding.scale.len(),
                "sha256_of_codes": hex(codes.bytes()),
            })
        })
        .collect();
    let places: BTreeMap<&String, Value> =
        placed.iter().map(|(name, at)| (name, json!({ "offset": at.offset, "length": at.length }))).collect();
    json!({
        "version": 1,
        "tool": { "name": "onnx-quant", "version": env!("CARGO_PKG_VERSION") },
        "target": target,
        "byte_order": "little, elements of fewer than 8 bits from the low end of a byte",
        "data": FILE,
        "places": places,
        "weights": weights,
    })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
