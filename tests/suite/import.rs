//! The wire: what goes in comes out.

use std::path::Path;

use onnx_quant::emit::{self, Emit};
use onnx_quant::import;
use onnx_quant::load::ExternalFiles;
use prost::Message as _;

use super::{fixture, text, tool_ok};

#[test]
fn real_models_decode_and_encode_to_the_same_bytes() {
    for model in ["models/digits-resnet.onnx", "models/digits-mobilenet.onnx"] {
        let bytes = std::fs::read(fixture(model)).unwrap();
        let wire = proto::decode(bytes.clone().into()).unwrap();
        assert!(proto::encode(&wire) == bytes, "{model}");
        let mut streamed = Vec::new();
        proto::encode_to(wire, &mut streamed).unwrap();
        assert!(streamed == bytes, "{model}");
    }
}

/// Exporting, importing and exporting again changes nothing.
#[test]
fn export_is_stable() {
    for model in ["models/digits-resnet.onnx", "models/digits-mobilenet.onnx"] {
        let once = exported(&fixture(model));
        let wire = proto::decode(once.clone().into()).unwrap();
        let again = import::model(wire, &mut ExternalFiles::beside(Path::new("m.onnx"))).unwrap();
        let again = emit::model(again.model.graph(), &again.model.meta, &Emit::default(), "m.onnx");
        assert!(again.model.encode_to_vec() == once, "{model}");
    }
}

fn exported(path: &Path) -> Vec<u8> {
    let imported = import::file(path).unwrap();
    emit::model(imported.model.graph(), &imported.model.meta, &Emit::default(), "m.onnx").model.encode_to_vec()
}

/// A model with external data keeps its weights outside, aligned, and reads back.
#[test]
fn external_data_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let imported = import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let options = Emit { external: Some("m.onnx.data".into()), ..Emit::default() };
    let artifact = emit::model(imported.model.graph(), &imported.model.meta, &options, "m.onnx");
    assert!(artifact.external.iter().all(|(offset, payload)| offset % 4096 == 0 && payload.len() >= 1024));
    let path = folder.path().join("m.onnx");
    emit::Staged::write(artifact, &path, &[]).unwrap().publish().unwrap();
    let back = import::file(&path).unwrap();
    assert_eq!(back.external.len(), 1);
    let of = |model: &passes::model::Model| passes::text::graph(model);
    assert_eq!(of(&back.model), of(&imported.model));
    let out = folder.path().join("again.onnx");
    tool_ok(&["opt", text(&path), "--pipeline", "", "-o", text(&out)]);
    assert!(folder.path().join("again.onnx.data").is_file(), "what came with external data leaves with it");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "and nothing else is left behind");
}

/// What exporters and optimizers leave behind: entries for tensors that are no more, and results for training that nobody
/// reads.
#[test]
fn leftovers_of_other_tools_do_not_matter() {
    use proto::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto};
    let info = |name: &str| ValueInfoProto { name: Some(name.into()), ..ValueInfoProto::default() };
    let weight = |name: &str| TensorProto {
        name: Some(name.into()),
        dims: vec![1],
        data_type: Some(1),
        float_data: vec![1.0],
        ..TensorProto::default()
    };
    let outputs = ["y", "mean", "var", "saved_mean", "saved_var"];
    let norm = NodeProto {
        op_type: Some("BatchNormalization".into()),
        input: ["x", "s", "b", "m", "v"].map(str::to_owned).to_vec(),
        output: outputs.map(str::to_owned).to_vec(),
        ..NodeProto::default()
    };
    let graph = GraphProto {
        node: vec![norm],
        initializer: ["s", "b", "m", "v"].map(weight).to_vec(),
        input: vec![info("x")],
        output: vec![info("y")],
        value_info: vec![info("long_gone")],
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { domain: None, version: Some(9) };
    let wire =
        ModelProto { ir_version: Some(4), graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
    let imported = import::model(wire, &mut ExternalFiles::beside(Path::new("m.onnx"))).unwrap();
    let (_, node) = imported.model.graph().nodes().next().unwrap();
    assert_eq!((node.op.opset, node.outputs.len()), (21, 1));
}
