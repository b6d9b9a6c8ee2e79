//! Data and weights that say nothing, or nonsense: every method has a rule for them, and none ends worse than nearest rounding.

use std::fmt::Write as _;

use super::{text, tool, tool_ok};

/// Channels 0 and 1 never carry anything, channel 2 always the same, and some behind the first Relu are dead; one weight is all zero.
fn model() -> String {
    let zeros = vec!["0"; 64].join(", ");
    format!(
        "graph (%x: f32[N,8]) -> (%y, %z) {{
  %a = const f32[8,24] rand(seed=1, std=1)
  %b = const f32[24,16] rand(seed=2, std=1)
  %c = const f32[16,4] [{zeros}]
  %d = const f32[16,40] rand(seed=3, std=1)
  %p = MatMul(%x, %a)
  %q = Relu(%p)
  %r = MatMul(%q, %b)
  %s = Relu(%r)
  %y = MatMul(%s, %d)
  %z = MatMul(%s, %c)
}}"
    )
}

/// Row `n` of what the model reads.
fn row(n: u64) -> Vec<f32> {
    let drawn = |i: u64| (passes::seed::mixed(8 * n + i) % 2001) as f32 / 1000.0 - 1.0;
    let value = |i: u64| match i {
        0 | 1 => 0.0,
        2 => 5.0,
        _ => drawn(i),
    };
    (0..8).map(value).collect()
}

/// A folder with `model` and so many rows of samples, one file each.
fn folder(model: &str, samples: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.oq"), model).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    std::fs::create_dir(path("data")).unwrap();
    for n in 0..samples {
        let x: Vec<u8> = row(n).into_iter().flat_map(f32::to_le_bytes).collect();
        let x = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 8], &x).unwrap();
        std::fs::write(path(&format!("data/{n}.safetensors")), safetensors::serialize([("x", x)], None).unwrap())
            .unwrap();
    }
    folder
}

/// What the tool says of the model in `folder` with `options`.
fn said(folder: &tempfile::TempDir, options: &[&str]) -> serde_json::Value {
    let path = |name: &str| folder.path().join(name);
    let (model, data, out) = (path("model.onnx"), path("data"), path("q.onnx"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--json", "--progress", "none"];
    serde_json::from_str(&tool_ok(&[&args[..], options].concat())).unwrap()
}

/// What codes lose over what nearest ones do, layer by layer.
fn ratios(json: &serde_json::Value) -> Vec<f64> {
    json["layers"].as_array().unwrap().iter().filter_map(|layer| layer["loss_vs_nearest"].as_f64()).collect()
}

#[test]
fn no_method_does_worse_than_nearest_however_little_the_samples_say() {
    for samples in [1, 3, 40] {
        let folder = folder(&model(), samples);
        for method in passes::rounding::ROUNDINGS.iter().map(|method| method.about().name) {
            // Blocks of 16 leave a ragged tail of 24 columns.
            for scheme in ["w4a8", "w2a16g16", "w4a16g16asym"] {
                let json = said(&folder, &["--target", "onnx-qdq", "--scheme", scheme, "--rounding", method]);
                let mut told = String::new();
                let _ = write!(told, "{method} {scheme} {samples}: {:?}", ratios(&json));
                assert_eq!(json["verify"]["passed"], true, "{told}");
                let by_data = passes::rounding::ROUNDINGS.iter().any(|m| m.about().name == method && m.needs_data());
                assert!(!by_data || samples == 1 || !ratios(&json).is_empty(), "{told}");
                // Rounding by chance is to be unbiased, not near.
                assert!(method == "stochastic" || ratios(&json).iter().all(|ratio| *ratio <= 1.0 + 1e-6), "{told}");
            }
        }
    }
}

#[test]
fn every_recipe_takes_one_sample() {
    let folder = folder(&model(), 1);
    for recipe in ["fast", "balanced", "best", "learned"] {
        for scheme in [
            "w8a8",
            "w4a8",
            "w4a4",
            "w2a4",
            "w4a4tok",
            "w3a16g16",
            "w2a16g16",
            "w4a16g16asym",
            "wfp4a8",
            "wfp4ae3m2tok",
        ] {
            let json = said(&folder, &["--target", "onnx-qdq", "--scheme", scheme, "--recipe", recipe]);
            assert_eq!(json["verify"]["passed"], true, "{recipe} {scheme}: {json:#}");
            assert!(json["fidelity"]["cosine"].as_f64().is_some_and(f64::is_finite), "{recipe} {scheme}: {json:#}");
        }
    }
}

/// What is no number is counted and told, where ranges are measured and where second moments alone are.
#[test]
fn what_is_no_number_inside_of_a_model_is_told() {
    let odd = "graph (%x: f32[N,8]) -> (%y) {
  %a = const f32[8,24] rand(seed=1, std=1)
  %b = const f32[24,16] rand(seed=2, std=1)
  %p = MatMul(%x, %a)
  %l = Log(%p)
  %y = MatMul(%l, %b)
}";
    let folder = folder(odd, 4);
    let path = |name: &str| folder.path().join(name);
    let (model, data) = (path("model.onnx"), path("data"));
    for (scheme, recipe) in [("w8a8", "balanced"), ("w4a16g16", "balanced"), ("w4a16g16", "best"), ("w4a8", "best")] {
        let args = ["quantize", text(&model), "--data", text(&data), "--dry-run", "--json", "--progress", "none"];
        let ran = tool(&[&args[..], &["--scheme", scheme, "--recipe", recipe, "--target", "onnx-qdq"]].concat());
        let json: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
        let notes = json["diagnostics"].as_array().unwrap();
        let told = notes.iter().any(|note| note["code"] == "OQ3001" && note["place"]["tensor"] == "l");
        assert!(told, "{scheme} {recipe}: {notes:#?}");
    }
}

#[test]
fn tensors_that_were_hardly_seen_are_told() {
    let folder = folder(&model(), 1);
    let json = said(&folder, &["--scheme", "w8a8"]);
    assert!(json["diagnostics"].to_string().contains("OQ3002"), "{json:#}");
}
