//! Every scheme that a target takes is written, read back and verified; data helps.

use super::{fixture, text, tool, tool_ok};

fn run(scheme: &str, recipe: &str) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--progress", "none", "--json"];
    let json = tool_ok(&[&args[..], &["--scheme", scheme, "--recipe", recipe]].concat());
    serde_json::from_str(&json).unwrap()
}

#[test]
fn every_scheme_verifies() {
    let integers = ["w8a8", "w5a8", "w4a8", "w2a8", "w4a4", "w8a16", "w4a16", "w4a16g32", "w3a16g16asym", "w2a16g32"];
    let floats = ["wfp8a16", "wfp8e5m2a16", "wfp4a8", "we2m3a8", "we3m0a16g32", "wnf4a16g32"];
    let blocks = ["wmxfp8a16", "wmxfp4a16", "wmxint8a16", "wnvfp4a16"];
    for scheme in integers.into_iter().chain(floats).chain(blocks) {
        let json = run(scheme, "best");
        assert_eq!(json["verify"]["passed"], true, "{scheme}: {json:#}");
        assert_eq!(json["scheme"], scheme);
        assert!(json["totals"]["quantized"].as_u64().unwrap() > 0, "{scheme}");
    }
}

/// ONNX Runtime's optimizer trips over 8-bit floats as activations: its target says so, the plain one writes them.
#[test]
fn float8_activations_are_for_the_plain_target() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "wfp8afp8", "--json"];
    let refused = tool(&args);
    assert_eq!(refused.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--target onnx-qdq"));
    let json: serde_json::Value =
        serde_json::from_str(&tool_ok(&[&args[..], &["--target", "onnx-qdq"]].concat())).unwrap();
    assert_eq!(json["verify"]["passed"], true);
    assert!(json["fidelity"]["sqnr_db"].as_f64().unwrap() > 15.0, "{json:#}");
}

#[test]
fn rounding_by_data_beats_nearest() {
    for scheme in ["w8a8", "w4a8"] {
        let [fast, best] = ["fast", "best"].map(|recipe| run(scheme, recipe)["fidelity"]["sqnr_db"].as_f64().unwrap());
        assert!(best > fast + 1.0, "{scheme}: {best} dB against {fast} dB");
    }
}

#[test]
fn weights_alone_need_no_samples_and_say_what_that_costs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let model = fixture("models/digits-resnet.onnx");
    let args = ["quantize", text(&model), "-o", text(&out), "--scheme", "w4a16g32", "--recipe", "best"];
    let output = tool(&args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("OQ3004"), "{said}");
}
