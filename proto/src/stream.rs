//! Writing a model piece by piece, so that no second copy of its weights is ever made.

use std::io::{self, Write};

use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::onnx::{GraphProto, ModelProto, TensorProto};

const MODEL_GRAPH: u32 = 7;
const GRAPH_INITIALIZER: u32 = 5;
const TENSOR_RAW_DATA: u32 = 9;

/// Writes `model` to `out`: the same bytes as [`crate::encode`], with one small buffer per node list and initializer
/// payloads passed straight through.
///
/// # Errors
/// Those of `out`.
pub fn encode_to(mut model: ModelProto, out: &mut impl Write) -> io::Result<()> {
    let graph = model.graph.take();
    // prost writes fields in the order of their numbers: split what comes before and after the graph.
    let after = ModelProto {
        opset_import: std::mem::take(&mut model.opset_import),
        metadata_props: std::mem::take(&mut model.metadata_props),
        training_info: std::mem::take(&mut model.training_info),
        functions: std::mem::take(&mut model.functions),
        configuration: std::mem::take(&mut model.configuration),
        ..ModelProto::default()
    };
    out.write_all(&model.encode_to_vec())?;
    if let Some(graph) = graph {
        write_header(out, MODEL_GRAPH, graph.encoded_len())?;
        write_graph(graph, out)?;
    }
    out.write_all(&after.encode_to_vec())
}

fn write_graph(mut graph: GraphProto, out: &mut impl Write) -> io::Result<()> {
    let initializers = std::mem::take(&mut graph.initializer);
    let before = GraphProto { node: std::mem::take(&mut graph.node), name: graph.name.take(), ..GraphProto::default() };
    out.write_all(&before.encode_to_vec())?;
    drop(before);
    for tensor in initializers {
        write_header(out, GRAPH_INITIALIZER, tensor.encoded_len())?;
        write_tensor(tensor, out)?;
    }
    out.write_all(&graph.encode_to_vec())
}

fn write_tensor(mut tensor: TensorProto, out: &mut impl Write) -> io::Result<()> {
    let raw = tensor.raw_data.take();
    let after = TensorProto {
        double_data: std::mem::take(&mut tensor.double_data),
        uint64_data: std::mem::take(&mut tensor.uint64_data),
        doc_string: tensor.doc_string.take(),
        external_data: std::mem::take(&mut tensor.external_data),
        data_location: tensor.data_location.take(),
        metadata_props: std::mem::take(&mut tensor.metadata_props),
        ..TensorProto::default()
    };
    out.write_all(&tensor.encode_to_vec())?;
    if let Some(raw) = raw {
        write_header(out, TENSOR_RAW_DATA, raw.len())?;
        out.write_all(&raw)?;
    }
    out.write_all(&after.encode_to_vec())
}

fn write_header(out: &mut impl Write, field: u32, length: usize) -> io::Result<()> {
    let mut header = Vec::with_capacity(16);
    encode_key(field, WireType::LengthDelimited, &mut header);
    encode_varint(length as u64, &mut header);
    out.write_all(&header)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::onnx::{NodeProto, OperatorSetIdProto, StringStringEntryProto};

    /// Every field group of the three split messages is filled, so that a field on the wrong side would move bytes.
    #[test]
    fn the_stream_equals_the_plain_encoding() {
        let tensor = TensorProto {
            dims: vec![2],
            data_type: Some(1),
            name: Some("w".into()),
            raw_data: Some(Bytes::from_static(&[7; 8])),
            doc_string: Some("doc".into()),
            double_data: vec![1.0],
            uint64_data: vec![3],
            external_data: vec![StringStringEntryProto::default()],
            data_location: Some(1),
            metadata_props: vec![StringStringEntryProto::default()],
            ..TensorProto::default()
        };
        let graph = GraphProto {
            node: vec![NodeProto { op_type: Some("Relu".into()), ..NodeProto::default() }],
            name: Some("g".into()),
            initializer: vec![tensor.clone(), tensor],
            doc_string: Some("d".into()),
            ..GraphProto::default()
        };
        let model = ModelProto {
            ir_version: Some(10),
            producer_name: Some("p".into()),
            doc_string: Some("m".into()),
            graph: Some(graph),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(21) }],
            metadata_props: vec![StringStringEntryProto::default()],
            ..ModelProto::default()
        };
        let mut streamed = Vec::new();
        encode_to(model.clone(), &mut streamed).unwrap();
        assert_eq!(streamed, model.encode_to_vec());
    }
}
