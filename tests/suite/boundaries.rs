//! Models with an operator that no gradients pass.

use super::{text, tool, tool_ok};

/// A folder with a model that rounds in its middle, and samples of it.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = "graph (%x: f32[N,16]) -> (%y) {
  %a = const f32[16,32] rand(seed=1, std=1)
  %b = const f32[32,32] rand(seed=2, std=1)
  %c = const f32[32,8] rand(seed=3, std=1)
  %p = MatMul(%x, %a)
  %q = Relu(%p)
  %r = Round(%q)
  %s = MatMul(%r, %b)
  %t = Relu(%s)
  %y = MatMul(%t, %c)
}";
    std::fs::write(path("model.oq"), model).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    std::fs::create_dir(path("data")).unwrap();
    let drawn = |i: u64| ((passes::seed::mixed(i) % 2001) as f32 / 1000.0 - 1.0) * 3.0;
    let x: Vec<u8> = (0..64 * 16).flat_map(|i| drawn(i).to_le_bytes()).collect();
    let x = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![64, 16], &x).unwrap();
    std::fs::write(path("data/0.safetensors"), safetensors::serialize([("x", x)], None).unwrap()).unwrap();
    folder
}

/// What is learned before and behind it is learned; only the node itself is a boundary, and nothing is said of it as it has no weights.
#[test]
fn blocks_around_an_operator_without_gradients_are_learned() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (model, data) = (path("model.onnx"), path("data"));
    let quantize = |name: &str, more: &[&str]| -> (serde_json::Value, Vec<u8>) {
        let out = path(name);
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "w3a8", "--recipe", "best"];
        let summary = tool_ok(&[&args[..], &["--hold-out", "16", "--json", "--progress", "none"], more].concat());
        (serde_json::from_str(&summary).unwrap(), std::fs::read(out).unwrap())
    };
    let (plain, bytes) = quantize("plain.onnx", &[]);
    let (learned, other) = quantize("learned.onnx", &["--learn", "brecq{iterations=300, batch=16, layers=9}"]);
    assert_ne!(bytes, other, "nothing was learned");
    assert!(!learned["diagnostics"].to_string().contains("OQ3005"), "{learned:#}");
    let decibels = |json: &serde_json::Value| json["fidelity"]["sqnr_db"].as_f64().unwrap();
    assert!(decibels(&learned) > decibels(&plain) - 0.5, "{} {}", decibels(&plain), decibels(&learned));
    // No window reaches across it: what lies before would hear nothing of what lies behind.
    let (_, windows) = quantize("windows.onnx", &["--learn", "brecq{iterations=300, batch=16, layers=9, window=2}"]);
    assert!(windows == other, "windows of one block each are those blocks");
    let blocks = tool_ok(&["inspect", text(&model), "--blocks", "9", "--json"]);
    let blocks: serde_json::Value = serde_json::from_str(&blocks).unwrap();
    let passes: Vec<bool> = blocks.as_array().unwrap().iter().map(|row| row["boundary"].is_null()).collect();
    assert_eq!(passes, [true, false, true], "{blocks:#}");
}

/// The whole model cannot be learned at once: an error names the node and the way that is left.
#[test]
fn a_model_that_gradients_do_not_pass_is_refused_as_a_whole() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (model, data, out) = (path("model.onnx"), path("data"), path("q.onnx"));
    let args =
        ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "w3a8", "--distill", "latent"];
    let refused = tool(&args);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && !out.exists(), "{said}");
    assert!(said.contains("Round") && said.contains("--learn"), "{said}");
}

/// A weight that two products read is not rounded by data, which is told; others are, and nothing is said of them.
#[test]
fn a_weight_that_is_not_rounded_by_data_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = "graph (%x: f32[N,16]) -> (%y) {
  %a = const f32[16,16] rand(seed=1, std=1)
  %b = const f32[16,8] rand(seed=2, std=1)
  %p = MatMul(%x, %a)
  %q = Relu(%p)
  %r = MatMul(%q, %a)
  %y = MatMul(%r, %b)
}";
    std::fs::write(path("model.oq"), model).unwrap();
    let data = self::folder();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    for recipe in ["balanced", "best"] {
        let told = |scheme: &str| -> Vec<serde_json::Value> {
            let (model, data) = (path("model.onnx"), data.path().join("data"));
            let args = ["quantize", text(&model), "--data", text(&data), "--scheme", scheme, "--recipe", recipe];
            let json = tool_ok(&[&args[..], &["--dry-run", "--json", "--progress", "none"]].concat());
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let notes = json["diagnostics"].as_array().unwrap().iter();
            notes.filter(|note| note["code"] == "OQ3007").cloned().collect()
        };
        let told_at_four = told("w4a8");
        assert_eq!(told_at_four.len(), 2, "{recipe}: {told_at_four:#?}");
        assert!(told_at_four.iter().all(|note| note["message"].as_str().unwrap().contains("several nodes read")));
        assert!(told("w8a8").is_empty(), "{recipe}");
    }
}
