//! Graphs as ONNX messages, with external data where it belongs.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use passes::id::ValueId;
use passes::ir::{Attr, Body, Dim, Graph, Node, TensorType, Type, walk};
use passes::model::Metadata;
use passes::tensor::{DType, Tensor};
use proto::onnx::attribute_proto::AttributeType;
use proto::onnx::tensor_proto::DataLocation;
use proto::onnx::tensor_shape_proto::{Dimension, dimension};
use proto::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use proto::{ExternalRef, external_entries};

use crate::load::Source;

/// Constants of this many bytes and more move to external data, once the model has any.
const EXTERNAL_FROM: usize = 1024;
/// External payloads start at multiples of this, so that they can be mapped. One that lies in a source keeps its place within
/// the page instead: a copy from page to page is a third faster than one that straddles them.
const ALIGNMENT: u64 = 4096;
/// The largest element's bytes: a place in a source that is no multiple of it is not kept.
const ELEMENT: u64 = 8;
/// Above this many bytes of constants a model keeps them in external data: a protobuf message stops at 2 GiB.
const EXTERNAL_OVER: usize = 1 << 30;

/// How to write.
#[derive(Clone, Debug, Default)]
pub struct Emit<'a> {
    /// The external data file's name; `None` keeps everything in one file unless that would be too large.
    pub external: Option<String>,
    /// The files that weights may be slices of.
    pub sources: &'a [Source],
    /// Where constants lie already, by name: a file beside the model, an offset and a length.
    pub placed: BTreeMap<String, ExternalRef>,
}

/// A model as it will lie on disk.
#[derive(Debug)]
pub struct Artifact {
    /// The main message.
    pub model: ModelProto,
    /// Payloads of the external data file, each with its offset.
    pub external: Vec<(u64, Bytes)>,
    /// The external data file's name, when there are payloads.
    pub external_name: String,
}

impl Artifact {
    /// The bytes of both files.
    pub fn bytes(&self) -> u64 {
        let external = self.external.last().map_or(0, |(offset, payload)| offset + payload.len() as u64);
        prost::Message::encoded_len(&self.model) as u64 + external
    }
}

/// The IR version that goes with an ai.onnx opset, by the table of ONNX releases.
fn ir_version(opset: u32) -> i64 {
    match opset {
        ..=20 => 9,
        21 | 22 => 10,
        23 => 11,
        24 => 12,
        25..=27 => 13,
        _ => 14,
    }
}

/// The IR version that first had `dtype`.
fn ir_version_of(dtype: DType) -> i64 {
    match dtype {
        DType::U4 | DType::I4 => 10,
        DType::F4E2M1 => 11,
        DType::F8E8M0 => 12,
        DType::U2 | DType::I2 => 13,
        DType::F6E2M3 | DType::F6E3M2 => 14,
        _ => 9,
    }
}

/// `graph` as a model; `file` is the main file's name, after which an external data file is called.
pub fn model(graph: &Graph, meta: &Metadata, options: &Emit<'_>, file: &str) -> Artifact {
    let external = match &options.external {
        Some(name) => Some(name.clone()),
        None => (graph.constant_bytes() > EXTERNAL_OVER).then(|| format!("{file}.data")),
    };
    let mut writer = Writer {
        external: external.is_some(),
        name: external.unwrap_or_default(),
        sources: options.sources,
        placed: &options.placed,
        end: 0,
        payloads: Vec::new(),
    };
    let proto = writer.graph(graph, true);
    let newest = graph.value_ids().filter_map(|id| graph.value(id).ty.dtype()).map(ir_version_of).max().unwrap_or(0);
    let rest: ModelProto = proto::decode(meta.rest.clone()).unwrap_or_default();
    let text = |s: &String| (!s.is_empty()).then(|| s.clone());
    let [producer, version, domain, doc] = &meta.header;
    let model = ModelProto {
        ir_version: Some(ir_version(meta.opset()).max(newest)),
        producer_name: text(producer),
        producer_version: text(version),
        domain: text(domain),
        model_version: (meta.model_version != 0).then_some(meta.model_version),
        doc_string: text(doc),
        graph: Some(proto),
        opset_import: opset_imports(meta),
        metadata_props: entries(&meta.entries),
        ..rest
    };
    Artifact { model, external: writer.payloads, external_name: writer.name }
}

/// `graph` as a model for an executor: one message, no documentation.
pub fn part(graph: &Graph, meta: &Metadata) -> ModelProto {
    let mut writer = Writer {
        external: false,
        name: String::new(),
        sources: &[],
        placed: &BTreeMap::new(),
        end: 0,
        payloads: Vec::new(),
    };
    ModelProto {
        ir_version: Some(ir_version(meta.opset())),
        graph: Some(writer.graph(graph, false)),
        opset_import: opset_imports(meta),
        ..ModelProto::default()
    }
}

fn opset_imports(meta: &Metadata) -> Vec<OperatorSetIdProto> {
    let import = |(domain, version): (&Arc<str>, &u32)| OperatorSetIdProto {
        domain: Some(domain.to_string()),
        version: Some(i64::from(*version)),
    };
    meta.opsets.iter().map(import).collect()
}

fn entries(entries: &[(String, String)]) -> Vec<StringStringEntryProto> {
    let entry =
        |(key, value): &(String, String)| StringStringEntryProto { key: Some(key.clone()), value: Some(value.clone()) };
    entries.iter().map(entry).collect()
}

struct Writer<'a> {
    external: bool,
    name: String,
    sources: &'a [Source],
    placed: &'a BTreeMap<String, ExternalRef>,
    end: u64,
    payloads: Vec<(u64, Bytes)>,
}

impl Writer<'_> {
    fn graph(&mut self, graph: &Graph, infos: bool) -> GraphProto {
        let users = walk::Users::of(graph);
        let read = |id: &ValueId| !users.of_value(*id).is_empty();
        let initializer = graph
            .value_ids()
            .filter(read)
            .filter_map(|id| Some((id, graph.constant(id)?)))
            .map(|(id, tensor)| self.tensor(&graph.value(id).name, tensor))
            .collect();
        let outputs: Vec<ValueId> = graph.outputs().to_vec();
        let declared = |id: &ValueId| {
            let known = graph.value(*id).ty.tensor().is_none_or(|ty| ty.dtype.is_some() && ty.shape.is_some());
            infos && known && !outputs.contains(id)
        };
        let computed = graph.nodes().flat_map(|(_, node)| node.outputs.iter().flatten().copied());
        let value_info = computed.filter(declared).map(|id| info(graph, id)).collect();
        GraphProto {
            node: graph.nodes().map(|(_, node)| self.node(graph, node)).collect(),
            name: Some(if graph.name().is_empty() { "graph".into() } else { graph.name().to_owned() }),
            initializer,
            doc_string: (!graph.doc().is_empty()).then(|| graph.doc().to_owned()),
            input: graph.inputs().iter().map(|&id| info(graph, id)).collect(),
            output: outputs.iter().map(|&id| info(graph, id)).collect(),
            value_info,
            ..GraphProto::default()
        }
    }

    fn node(&mut self, graph: &Graph, node: &Node) -> NodeProto {
        let name = |value: &Option<ValueId>| value.map_or_else(String::new, |id| graph.value(id).name.to_string());
        let mut output: Vec<String> = node.outputs.iter().map(name).collect();
        while output.len() > 1 && output.last().is_some_and(String::is_empty) {
            output.pop();
        }
        let mut attribute: Vec<AttributeProto> = node.attrs.iter().map(|(name, attr)| attribute(name, attr)).collect();
        attribute.extend(node.bodies.iter().map(|body| self.body(body)));
        NodeProto {
            input: node.inputs.iter().map(name).collect(),
            output,
            name: Some(node.name.to_string()),
            op_type: Some(node.op.name.to_string()),
            domain: (!node.op.domain.is_empty()).then(|| node.op.domain.to_string()),
            attribute,
            doc_string: node.notes.as_ref().map(|n| n.doc.clone()).filter(|d| !d.is_empty()),
            metadata_props: node.notes.as_ref().map_or_else(Vec::new, |n| entries(&n.entries)),
            ..NodeProto::default()
        }
    }

    fn body(&mut self, body: &Body) -> AttributeProto {
        AttributeProto {
            name: Some(body.attr.to_string()),
            r#type: Some(AttributeType::Graph as i32),
            g: Some(self.graph(&body.graph, false)),
            ..AttributeProto::default()
        }
    }

    /// Where `payload` goes: at the next page's start, or at the next place that is as far into its page as in its source.
    fn place(&self, payload: &Bytes) -> u64 {
        let from = self.sources.iter().find_map(|source| source.offset_of(payload)).filter(|from| from % ELEMENT == 0);
        let phase = from.unwrap_or(0) % ALIGNMENT;
        let missing = (phase + ALIGNMENT - self.end % ALIGNMENT) % ALIGNMENT;
        self.end + missing
    }

    /// Shape-like constants stay inline even in a model with external data: shape inference reads them.
    fn tensor(&mut self, name: &str, tensor: &Tensor) -> TensorProto {
        if let Some(reference) = self.placed.get(name) {
            return outside(name, tensor, reference);
        }
        if !self.external || tensor.bytes().len() < EXTERNAL_FROM {
            return inline(name, tensor);
        }
        let offset = self.place(tensor.bytes());
        let length = tensor.bytes().len() as u64;
        self.end = offset + length;
        self.payloads.push((offset, tensor.bytes().clone()));
        outside(name, tensor, &ExternalRef { location: self.name.clone(), offset, length: Some(length) })
    }
}

/// `tensor` with its payload at `reference`.
fn outside(name: &str, tensor: &Tensor, reference: &ExternalRef) -> TensorProto {
    TensorProto {
        raw_data: None,
        external_data: external_entries(reference),
        data_location: Some(DataLocation::External as i32),
        ..inline(name, tensor)
    }
}

/// Whether `tensor` is worth a place outside the model.
pub(super) fn is_large(tensor: &Tensor) -> bool {
    tensor.bytes().len() >= EXTERNAL_FROM && tensor.dtype() != DType::String
}

fn attribute(name: &str, attr: &Attr) -> AttributeProto {
    let mut wire = AttributeProto { name: Some(name.to_owned()), ..AttributeProto::default() };
    let kind = match attr {
        Attr::Int(value) => {
            wire.i = Some(*value);
            AttributeType::Int
        }
        Attr::Float(value) => {
            wire.f = Some(*value);
            AttributeType::Float
        }
        Attr::String(value) => {
            wire.s = Some(value.to_vec());
            AttributeType::String
        }
        Attr::Tensor(tensor) => {
            wire.t = Some(inline("", tensor));
            AttributeType::Tensor
        }
        Attr::Ints(values) => {
            wire.ints.clone_from(values);
            AttributeType::Ints
        }
        Attr::Floats(values) => {
            wire.floats.clone_from(values);
            AttributeType::Floats
        }
        Attr::Strings(values) => {
            wire.strings = values.iter().map(|s| s.to_vec()).collect();
            AttributeType::Strings
        }
        Attr::Tensors(tensors) => {
            wire.tensors = tensors.iter().map(|tensor| inline("", tensor)).collect();
            AttributeType::Tensors
        }
        Attr::Opaque(encoded) => return proto::decode_message(encoded.clone()).unwrap_or(wire),
    };
    wire.r#type = Some(kind as i32);
    wire
}

fn inline(name: &str, tensor: &Tensor) -> TensorProto {
    let strings = tensor.as_strings().map(|s| s.iter().map(|s| s.to_vec()).collect());
    TensorProto {
        dims: tensor.shape().iter().map(|&d| i64::try_from(d).unwrap_or(i64::MAX)).collect(),
        data_type: Some(tensor.dtype().code()),
        name: (!name.is_empty()).then(|| name.to_owned()),
        raw_data: strings.is_none().then(|| tensor.bytes().clone()),
        string_data: strings.unwrap_or_default(),
        ..TensorProto::default()
    }
}

fn info(graph: &Graph, id: ValueId) -> ValueInfoProto {
    let value = graph.value(id);
    let ty = match &value.ty {
        Type::Opaque(encoded) => proto::decode_message(encoded.clone()).ok(),
        Type::Tensor(ty) => ty.dtype.map(|dtype| tensor_type(dtype, ty)),
    };
    ValueInfoProto { name: Some(value.name.to_string()), r#type: ty, ..ValueInfoProto::default() }
}

fn tensor_type(dtype: DType, ty: &TensorType) -> TypeProto {
    let dim = |dim: &Dim| Dimension {
        value: match dim {
            Dim::Known(n) => Some(dimension::Value::DimValue(i64::try_from(*n).unwrap_or(i64::MAX))),
            Dim::Symbol(name) => Some(dimension::Value::DimParam(name.to_string())),
            Dim::Unknown => None,
        },
        ..Dimension::default()
    };
    let shape = ty.shape.as_ref().map(|dims| TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: Some(dtype.code()), shape };
    TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::ExternalFiles;

    /// Neighbors stay neighbors, and pages copy to pages; what lies in no source starts a page.
    #[test]
    fn payloads_of_a_source_keep_their_place_in_the_page() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("w.bin"), vec![1; 40_000]).unwrap();
        let mut files = ExternalFiles::beside(&folder.path().join("m.onnx"));
        let mut slice = |offset: u64, length: usize| {
            let reference = ExternalRef { location: "w.bin".into(), offset, length: None };
            files.read("w", &reference, length).unwrap()
        };
        let payloads = [slice(64, 2304), slice(2368, 9000), slice(30_003, 1200), Bytes::from(vec![2; 2000])];
        let sources = files.take_sources();
        let mut writer = Writer {
            external: true,
            name: "d".into(),
            sources: &sources,
            placed: &BTreeMap::new(),
            end: 0,
            payloads: Vec::new(),
        };
        let places = payloads.map(|payload| {
            let offset = writer.place(&payload);
            writer.end = offset + payload.len() as u64;
            offset
        });
        assert_eq!(places, [64, 2368, 12_288, 16_384]);
    }
}
