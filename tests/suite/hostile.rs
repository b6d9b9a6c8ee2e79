//! Models come from strangers: errors, never panics, hangs or escapes.

use std::path::Path;

use onnx_quant::import;
use onnx_quant::load::ExternalFiles;
use proptest::prelude::*;
use proto::onnx::{GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto};

use super::{fixture, text, tool};

/// A model with the external weight `w` at `location`.
fn external(location: &str, offset: &str, length: &str, dims: &[i64]) -> ModelProto {
    let entry = |k: &str, v: &str| StringStringEntryProto { key: Some(k.into()), value: Some(v.into()) };
    let weight = TensorProto {
        name: Some("w".into()),
        dims: dims.to_vec(),
        data_type: Some(1),
        data_location: Some(1),
        external_data: vec![entry("location", location), entry("offset", offset), entry("length", length)],
        ..TensorProto::default()
    };
    let node = NodeProto {
        op_type: Some("Identity".into()),
        input: vec!["w".into()],
        output: vec!["y".into()],
        ..NodeProto::default()
    };
    let output = ValueInfoProto { name: Some("y".into()), ..ValueInfoProto::default() };
    let graph =
        GraphProto { node: vec![node], initializer: vec![weight], output: vec![output], ..GraphProto::default() };
    model(graph)
}

fn model(graph: GraphProto) -> ModelProto {
    let opset = proto::onnx::OperatorSetIdProto { domain: None, version: Some(21) };
    ModelProto { ir_version: Some(10), graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() }
}

fn import_beside(folder: &Path, wire: ModelProto) -> Result<(), String> {
    import::model(wire, &mut ExternalFiles::beside(&folder.join("m.onnx"))).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn external_data_stays_in_the_folder() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(root.path().join("secret"), [0; 64]).unwrap();
    std::fs::write(folder.join("w.bin"), [0; 64]).unwrap();
    std::os::unix::fs::symlink(root.path().join("secret"), folder.join("link")).unwrap();
    std::os::unix::fs::symlink(folder.join("w.bin"), folder.join("inside")).unwrap();
    std::fs::create_dir(folder.join("sub")).unwrap();
    let read =
        |location: &str, offset: &str, length: &str| import_beside(&folder, external(location, offset, length, &[4]));
    assert_eq!(read("w.bin", "0", "16"), Ok(()));
    assert_eq!(read("inside", "48", "16"), Ok(()));
    let absolute = folder.join("w.bin");
    for location in ["../secret", "a/../../secret", text(&absolute), "link", "sub", "absent", "", ".", "..\\secret"] {
        let error = read(location, "0", "16").unwrap_err();
        assert!(error.contains("`w`") || error.contains("tensor"), "{location}: {error}");
    }
    for (offset, length) in [("49", "16"), ("0", "15"), ("-1", "16"), ("+0", "16"), ("18446744073709551615", "16")] {
        assert!(read("w.bin", offset, length).is_err(), "{offset} {length}");
    }
    assert!(import_beside(&folder, external("w.bin", "0", "16", &[1 << 40])).is_err());
    assert!(import_beside(&folder, external("w.bin", "0", "16", &[-4])).is_err());
}

#[test]
fn a_fifo_is_no_weight() {
    let folder = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap();
    assert!(made.success());
    assert!(import_beside(folder.path(), external("pipe", "0", "16", &[4])).unwrap_err().contains("regular file"));
}

#[test]
fn truncation_at_every_byte_is_an_error_or_a_smaller_model() {
    let whole = std::fs::read(fixture("models/digits-mobilenet.onnx")).unwrap();
    for end in (0..whole.len()).step_by(997).chain(whole.len() - 40..whole.len()) {
        let bytes = bytes::Bytes::copy_from_slice(&whole[..end]);
        if let Ok(wire) = proto::decode(bytes) {
            let _ = import::model(wire, &mut ExternalFiles::beside(Path::new("m.onnx")));
        }
    }
}

#[test]
fn functions_that_call_themselves_end() {
    let call = NodeProto {
        op_type: Some("F".into()),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        ..NodeProto::default()
    };
    let twice = NodeProto { output: vec!["z".into()], ..call.clone() };
    let function = proto::onnx::FunctionProto {
        name: Some("F".into()),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: vec![call.clone(), twice],
        ..proto::onnx::FunctionProto::default()
    };
    let input = ValueInfoProto { name: Some("x".into()), ..ValueInfoProto::default() };
    let output = ValueInfoProto { name: Some("y".into()), ..ValueInfoProto::default() };
    let graph = GraphProto { node: vec![call], input: vec![input], output: vec![output], ..GraphProto::default() };
    let wire = ModelProto { functions: vec![function], ..model(graph) };
    assert!(import_beside(Path::new("."), wire).unwrap_err().contains("deep"));
}

#[test]
fn deep_nests_are_refused_without_a_crash() {
    let mut graph = GraphProto::default();
    for _ in 0..10_000 {
        let attribute = proto::onnx::AttributeProto {
            name: Some("body".into()),
            g: Some(graph),
            r#type: Some(5),
            ..proto::onnx::AttributeProto::default()
        };
        let node = NodeProto { op_type: Some("If".into()), attribute: vec![attribute], ..NodeProto::default() };
        graph = GraphProto { node: vec![node], ..GraphProto::default() };
        if graph_depth(&graph) > 40 {
            break;
        }
    }
    let bytes = bytes::Bytes::from(proto::encode(&model(graph)));
    assert!(proto::decode(bytes).unwrap_err().to_string().contains("recursion limit"));
}

fn graph_depth(graph: &GraphProto) -> usize {
    1 + graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.g.as_ref()).map(graph_depth).max().unwrap_or(0)
}

#[test]
fn what_is_no_model_is_refused_and_nothing_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    for garbage in [&b""[..], b"\x08", b"hello, world", &[0xff; 100]] {
        std::fs::write(&path, garbage).unwrap();
        let output = tool(&["quantize", text(&path), "--data", text(&fixture("data/digits"))]);
        assert_eq!(output.status.code(), Some(2), "{garbage:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// How many random inputs: `ONNX_QUANT_CASES`, or few enough for every run of the suite.
fn cases() -> u32 {
    std::env::var("ONNX_QUANT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(256)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes flipped anywhere in a real model: an error or a model, never a panic.
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let mut bytes = std::fs::read(fixture("models/digits-mobilenet.onnx")).unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(wire) = proto::decode(bytes.into()) {
            let _ = import::model(wire, &mut ExternalFiles::beside(Path::new("m.onnx")));
        }
    }

    /// Any text at all: an error or a model.
    #[test]
    fn any_text_parses_or_is_refused(source in "[%@a-zA-Z0-9_ .,:=(){}\\[\\]\"#\n-]{0,200}") {
        let _ = passes::text::parse(&source);
        let catalogue = passes::catalogue::passes();
        let _ = passes::pass::Pipeline::parse(&source, &catalogue);
    }
}

/// A function whose body's branch calls the function again: the calls never nest directly, but never end either.
#[test]
fn functions_that_call_themselves_from_a_branch_end() {
    let call = NodeProto {
        op_type: Some("F".into()),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        ..NodeProto::default()
    };
    let output = ValueInfoProto { name: Some("y".into()), ..ValueInfoProto::default() };
    let branch = GraphProto { node: vec![call.clone()], output: vec![output.clone()], ..GraphProto::default() };
    let attribute = |name: &str| proto::onnx::AttributeProto {
        name: Some(name.into()),
        g: Some(branch.clone()),
        r#type: Some(5),
        ..proto::onnx::AttributeProto::default()
    };
    let choice = NodeProto {
        op_type: Some("If".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        attribute: vec![attribute("then_branch"), attribute("else_branch")],
        ..NodeProto::default()
    };
    let function = proto::onnx::FunctionProto {
        name: Some("F".into()),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: vec![choice],
        ..proto::onnx::FunctionProto::default()
    };
    let input = ValueInfoProto { name: Some("x".into()), ..ValueInfoProto::default() };
    let graph = GraphProto { node: vec![call], input: vec![input], output: vec![output], ..GraphProto::default() };
    let wire = ModelProto { functions: vec![function], ..model(graph) };
    assert!(import_beside(Path::new("."), wire).is_err());
}

/// Sixty functions that each call the next twice: two to the sixtieth calls out of a kilobyte.
#[test]
fn functions_that_double_end() {
    let call = |to: usize, output: &str| NodeProto {
        op_type: Some(format!("F{to}")),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec![output.into()],
        ..NodeProto::default()
    };
    let function = |n: usize| proto::onnx::FunctionProto {
        name: Some(format!("F{n}")),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: if n < 60 { vec![call(n + 1, "a"), call(n + 1, "y")] } else { Vec::new() },
        ..proto::onnx::FunctionProto::default()
    };
    let input = ValueInfoProto { name: Some("x".into()), ..ValueInfoProto::default() };
    let output = ValueInfoProto { name: Some("y".into()), ..ValueInfoProto::default() };
    let graph =
        GraphProto { node: vec![call(0, "y")], input: vec![input], output: vec![output], ..GraphProto::default() };
    let wire = ModelProto { functions: (0..61).map(function).collect(), ..model(graph) };
    assert!(import_beside(Path::new("."), wire).unwrap_err().contains("function calls"));
}

/// Shapes declared with absurd lengths: nothing is allocated for a declaration.
#[test]
fn a_declared_length_is_no_reason_to_allocate() {
    for op in ["Reshape(%x, %s)", "Expand(%x, %s)", "ConstantOfShape(%s)", "Slice(%x, %s, %s)"] {
        let source = format!("graph (%x: f32[2], %s: i64[10000000000000]) -> (%y) {{\n  %y = {op}\n}}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.oq");
        std::fs::write(&path, source).unwrap();
        let output = tool(&["opt", text(&path), "--pipeline", "infer-shapes, fold-constants", "--check"]);
        assert!(output.status.success(), "{op}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn text_nests_no_deeper_than_it_may() {
    let lists = format!("graph () -> () {{\n  %y = A() {{a={}}}\n}}", "[".repeat(200_000));
    assert!(passes::text::parse(&lists).is_err());
}
