//! Variants of samples that a recipe draws where there are few words.

use super::{fixture, text, tool_ok};

/// Ids of 24 sentences of 12 words each, between a mark at their start and padding.
fn sentences() -> Vec<i64> {
    (0..24)
        .flat_map(|n| (0..16).map(move |at| if (1..13).contains(&at) { 10 + (37 * n + 11 * at) % 900 } else { 0 }))
        .collect()
}

/// What the tool says of a model of words with `options`.
fn said(options: &[&str]) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = "graph (%ids: i64[N,16]) -> (%y) {
  %words = const f32[1000,32] rand(seed=1, std=1)
  %weight = const f32[32,64] rand(seed=2, std=1)
  %x = Gather(%words, %ids)
  %y = MatMul(%x, %weight)
}";
    std::fs::write(path("model.oq"), model).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    std::fs::create_dir(path("data")).unwrap();
    let ids: Vec<u8> = sentences().into_iter().flat_map(i64::to_le_bytes).collect();
    let ids = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![24, 16], &ids).unwrap();
    std::fs::write(path("data/0.safetensors"), safetensors::serialize([("ids", ids)], None).unwrap()).unwrap();
    let (model, data) = (path("model.onnx"), path("data"));
    let args = ["quantize", text(&model), "--data", text(&data), "--dry-run", "--json", "--progress", "none"];
    serde_json::from_str(&tool_ok(&[&args[..], options].concat())).unwrap()
}

/// The number of samples, and whether a note says that the recipe drew some.
fn fitted(json: &serde_json::Value) -> (u64, bool) {
    (json["samples"].as_u64().unwrap(), json["diagnostics"].to_string().contains("OQ3006"))
}

#[test]
fn best_draws_variants_where_words_are_few_and_says_so() {
    let best = |scheme: &'static str, more: &[&'static str]| {
        fitted(&said(&[&["--recipe", "best", "--scheme", scheme], more].concat()))
    };
    // 288 words: eight variants are the most.
    assert_eq!(best("w4a16g32", &[]), (24 * 9, true));
    assert_eq!(best("w4a4tok", &["--target", "onnx-qdq"]), (24 * 9, true));
    assert_eq!(best("w4a16g32", &["--samples", "12"]), (12 * 9, true));
    assert_eq!(best("w4a16g32", &["--hold-out", "4"]), (20 * 9, true));
    // What the user says comes first; and what rounds to eight bits, or by ranges that are fixed, asks for none.
    assert_eq!(best("w4a16g32", &["--augment", "0"]), (24, false));
    assert_eq!(best("w4a16g32", &["--augment", "2"]), (24 * 3, false));
    assert_eq!(best("w8a16g32", &[]), (24, false));
    assert_eq!(best("w4a8", &[]), (24, false));
    assert_eq!(fitted(&said(&["--scheme", "w4a16g32"])), (24, false));
}

#[test]
fn pictures_have_no_words() {
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = [
        "quantize",
        text(&model),
        "--data",
        text(&data),
        "--samples",
        "16",
        "--dry-run",
        "--json",
        "--progress",
        "none",
    ];
    let json = tool_ok(&[&args[..], &["--recipe", "best", "--scheme", "w4a16g32"]].concat());
    assert_eq!(fitted(&serde_json::from_str(&json).unwrap()), (16, false));
}
