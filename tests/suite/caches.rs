//! Caches of decoders in codes.

use onnx_quant::{exec, import, targets};
use passes::ir::Graph;
use passes::model::Plan;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::simulate::Simulation;
use passes::tensor::{DType, Tensor};

use super::{text, tool, tool_ok};

/// A head of attention whose keys come out of a cache.
fn decoder(size: usize, concat: &str) -> String {
    let weight = |name: &str, rows: usize, columns: usize| {
        let value = |i: usize| format!("{:.3}", ((i * 31 + name.len() * 17) % 41) as f32 / 20.0 - 1.0);
        let values: Vec<String> = (0..rows * columns).map(value).collect();
        format!("  %{name} = const f32[{rows},{columns}] [{}]\n", values.join(", "))
    };
    format!(
        "opset 21\ngraph (%x: f32[batch,seq,32], %past_keys: f32[batch,past,{size}]) -> (%y, %present_keys) {{\n{}{}  %k = MatMul(%x, %wk)\n  \
         {concat}\n  %q = MatMul(%x, %wqq)\n  %t = Transpose(%present_keys) {{perm=[0, 2, 1]}}\n  %s = MatMul(%q, %t)\n  \
         %y = Softmax(%s) {{axis=-1}}\n}}\n",
        weight("wk", 32, size),
        weight("wqq", 32, size),
    )
}

const APPEND: &str = "%present_keys = Concat(%past_keys, %k) {axis=1}";

/// The names and types of inputs and outputs.
fn ends(graph: &Graph) -> Vec<(String, Option<DType>)> {
    let all = graph.inputs().iter().chain(graph.outputs());
    all.map(|value| (graph.value(*value).name.to_string(), graph.value(*value).ty.dtype())).collect()
}

#[test]
fn caches_become_bytes_with_their_scales_beside_them_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.oq"), decoder(16, APPEND)).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    for (target, bits) in [("onnx-qdq", "8"), ("onnx-qdq", "4"), ("ort-cpu", "8"), ("ort-cpu", "4")] {
        let (model, out, again) = (path("model.onnx"), path("out.onnx"), path("again.onnx"));
        let args = ["quantize", text(&model), "-o", text(&out), "--recipe", "fast", "--scheme", "w8a16g32", "--json"];
        let json = tool_ok(&[&args[..], &["--target", target, "--cache", bits, "--progress", "none"]].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["verify"]["passed"], true, "{target} {bits}: {json:#}");
        let written = import::file(&out).unwrap().model;
        let (byte, float) = (Some(DType::U8), Some(DType::F32));
        let named = |name: &str, dtype| (name.to_owned(), dtype);
        let want = [
            named("x", float),
            named("past_keys", byte),
            named("past_keys.scale", float),
            named("past_keys.zero_point", byte),
            named("y", float),
            named("present_keys", byte),
            named("present_keys.scale", float),
            named("present_keys.zero_point", byte),
        ];
        assert_eq!(ends(written.graph()), want, "{target} {bits}");
        tool_ok(&["convert", text(&out), "-o", text(&again), "--target", target]);
        assert_eq!(ends(import::file(&again).unwrap().model.graph()), want, "{target} {bits}: read and written again");
    }
}

#[test]
fn what_is_no_cache_or_does_not_fit_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refused = |source: &str, options: &[&str]| {
        std::fs::write(path("model.oq"), source).unwrap();
        tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
        let (model, out) = (path("model.onnx"), path("out.onnx"));
        let args = ["quantize", text(&model), "-o", text(&out), "--recipe", "fast", "--progress", "none"];
        let scheme = if options.contains(&"tensorrt") { "w4a16g128" } else { "w8a16g32" };
        let output = tool(&[&args[..], &["--scheme", scheme], options].concat());
        assert!(!output.status.success() && !out.exists(), "{options:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let other = decoder(16, "%m = Mul(%past_keys, %past_keys)\n  %present_keys = Concat(%m, %k) {axis=1}");
    let said = refused(&other, &["--target", "onnx-qdq", "--cache", "8"]);
    assert!(said.contains("no input is a cache") && said.contains("past_keys"), "{said}");
    let narrow = decoder(
        16,
        "%past = Cast(%past_keys) {to=1}\n  %wide = Concat(%past, %k) {axis=1}\n  %present_keys = Identity(%wide)",
    )
    .replace("past_keys: f32", "past_keys: f16");
    let said = refused(&narrow, &["--target", "onnx-qdq", "--cache", "8"]);
    assert!(said.contains("`past_keys`: it is f16") && said.contains("behind a Cast"), "{said}");
    let said = refused(&decoder(15, APPEND), &["--target", "onnx-qdq", "--cache", "4"]);
    assert!(said.contains("past_keys") && said.contains("rows of 15"), "{said}");
    let said = refused(&decoder(16, APPEND), &["--target", "tensorrt", "--cache", "8"]);
    assert!(said.contains("tensorrt") && said.contains("ort-cpu and onnx-qdq"), "{said}");
    let said = refused(&decoder(16, APPEND), &["--target", "onnx-qdq", "--cache", "5"]);
    assert!(said.contains("4 or 8 bits"), "{said}");
}

/// Graphs that look like caches and are none: nothing panics, and what cannot be written says so.
#[test]
fn near_misses_of_caches_are_carried_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model.onnx"), folder.path().join("out.onnx"));
    for concat in [
        "%present_keys = Concat(%past_keys, %past_keys) {axis=1}",
        "%present_keys = Concat(%k, %past_keys) {axis=1}",
        "%present_keys = Concat(%past_keys, %k) {axis=2}",
        "%present_keys = Concat(%past_keys, %k, %k) {axis=1}",
        "%present_keys = Concat(%past_keys, %k) {axis=9}",
    ] {
        let source = folder.path().join("model.oq");
        std::fs::write(&source, decoder(16, concat)).unwrap();
        if !tool(&["cat", text(&source), "--to", "onnx", "-o", text(&model)]).status.success() {
            continue; // refused before
        }
        let args = ["quantize", text(&model), "-o", text(&out), "--recipe", "fast", "--scheme", "w8a16g32"];
        let output = tool(&[&args[..], &["--target", "onnx-qdq", "--cache", "8", "--progress", "none"]].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && !said.contains("panicked") && !said.contains("a bug"), "{concat}: {said}");
    }
}

/// What a file with caches in codes computes by our own arithmetic, from float samples.
#[test]
fn files_with_caches_in_codes_run_on_float_samples() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.oq"), decoder(16, APPEND)).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    std::fs::create_dir(path("data")).unwrap();
    let floats =
        |n: usize| (0..n).flat_map(|i| (((i * 37) % 19) as f32 / 9.0 - 1.0).to_le_bytes()).collect::<Vec<u8>>();
    let (x, past) = (floats(2 * 32), floats(3 * 16));
    let view =
        |shape: Vec<usize>, bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
    let views = [("x", view(vec![1, 2, 32], &x)), ("past_keys", view(vec![1, 3, 16], &past))];
    std::fs::write(path("data/0.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let (model, out, data) = (path("model.onnx"), path("out.onnx"), path("data"));
    let args = ["quantize", text(&model), "-o", text(&out), "--data", text(&data), "--scheme", "w8a16g32", "--json"];
    let json = tool_ok(&[&args[..], &["--target", "onnx-qdq", "--cache", "8", "--progress", "none"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["verify"]["passed"], true, "{json:#}");
    assert!(json["fidelity"]["sqnr_db"].as_f64().unwrap() > 25.0, "{json:#}");
    let results = path("results.safetensors");
    tool_ok(&["run", text(&out), "--data", text(&data), "-o", text(&results), "--progress", "none"]);
    tool_ok(&["convert", text(&out), "--data", text(&data), "-o", text(&path("again.onnx")), "--target", "onnx-qdq"]);
}

/// Past-only: without a past nothing is rounded, with one only what is read of it; and what a sample of a batch has in its cache is
/// nothing to the others.
#[test]
fn only_the_past_is_rounded_and_every_sample_by_itself() {
    let float = passes::text::parse(&decoder(16, APPEND)).unwrap();
    let executor = (exec::find("auto").unwrap().build)(&float.meta).unwrap();
    let mut cx = PassContext::new(targets::find("onnx-qdq").unwrap(), executor.as_ref());
    let pipeline = Pipeline::parse("infer-shapes, encode-caches{bits=4}", &passes::catalogue::passes()).unwrap();
    let (model, _) = PassManager::new(Vec::new(), true).run(&pipeline, float, &mut cx).unwrap();
    let graph = model.graph();
    let run = |plan: &Plan, batch: &[usize], past: usize| -> Vec<Vec<f32>> {
        let of = |shape: [usize; 3]| {
            let each = shape[1] * shape[2];
            let value = |(sample, i): (usize, usize)| ((i * 37 + sample * 101) % 83) as f32 / 41.0 - 1.0;
            Tensor::of(shape, batch.iter().flat_map(|s| (0..each).map(move |i| (*s, i))).map(value).collect())
        };
        let feeds = [of([batch.len(), 2, 32]), of([batch.len(), past, 16])];
        let simulation = Simulation::prepare(graph, plan, executor.as_ref(), &graph.outputs()[..1]).unwrap();
        let y = simulation.run(&feeds).unwrap().remove(0);
        y.values::<f32>().unwrap().chunks(y.len() / batch.len()).map(<[f32]>::to_vec).collect()
    };
    let none = Plan::default();
    assert_eq!(run(model.plan(), &[0, 1], 0), run(&none, &[0, 1], 0));
    let rounded = run(model.plan(), &[0, 1], 5);
    assert_ne!(rounded, run(&none, &[0, 1], 5), "nothing is rounded");
    let turned = run(model.plan(), &[1, 0], 5);
    assert_eq!([&turned[1], &turned[0]], [&rounded[0], &rounded[1]]);
}

/// In another basis caches hold other numbers, and the model computes what it did, told one after the other what comes next.
#[test]
fn smoothed_caches_compute_the_same_token_by_token() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.oq"), decoder(16, APPEND)).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    std::fs::create_dir(path("data")).unwrap();
    let value = |seed: usize, i: usize| ((i * 37 + seed * 11) % 19) as f32 / 9.0 - 1.0;
    let x: Vec<u8> = (0..6 * 32).flat_map(|i| value(0, i).to_le_bytes()).collect();
    let view =
        |shape: Vec<usize>, bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
    let views = [("x", view(vec![1, 6, 32], &x)), ("past_keys", view(vec![1, 0, 16], &[]))];
    std::fs::write(path("data/0.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let (model, out, data) = (path("model.onnx"), path("out.onnx"), path("data"));
    let pipeline = "infer-shapes, calibrate, smooth-caches, infer-shapes, drop-dead";
    let args = ["quantize", text(&model), "-o", text(&out), "--data", text(&data), "--scheme", "w8a16g32"];
    tool_ok(&[&args[..], &["--target", "onnx-qdq", "--pipeline", pipeline, "--progress", "none"]].concat());
    // What is returned step by step, and the last cache.
    let told = |path: &std::path::Path| -> (Vec<Vec<f32>>, Vec<f32>) {
        let model = import::file(path).unwrap().model;
        let executor = (exec::find("auto").unwrap().build)(&model.meta).unwrap();
        let graph = model.graph();
        let simulation = Simulation::prepare(graph, &Plan::default(), executor.as_ref(), graph.outputs()).unwrap();
        let mut past = Tensor::of([1, 0, 16], Vec::<f32>::new());
        let mut all = Vec::new();
        for step in 0..4 {
            let x = Tensor::of([1, 2, 32], (0..64).map(|i| value(step + 1, i)).collect::<Vec<f32>>());
            let mut outputs = simulation.run(&[x, past]).unwrap();
            past = outputs.remove(1);
            all.push(outputs.remove(0).values::<f32>().unwrap().to_vec());
        }
        (all, past.values::<f32>().unwrap().to_vec())
    };
    let ((plain, cache), (smoothed, other)) = (told(&model), told(&out));
    assert_ne!(cache, other, "nothing was smoothed");
    for (a, b) in plain.iter().flatten().zip(smoothed.iter().flatten()) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

/// Smoothed caches hold other numbers by design: `compare` says so and leaves them out, and refuses samples that bring a past.
#[test]
fn compare_leaves_smoothed_caches_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("model.oq"), decoder(16, APPEND)).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    let sample = |name: &str, past: usize| {
        std::fs::create_dir(path(name)).unwrap();
        let floats =
            |n: usize| (0..n).flat_map(|i| (((i * 37) % 19) as f32 / 9.0 - 1.0).to_le_bytes()).collect::<Vec<u8>>();
        let (x, old) = (floats(2 * 32), floats(past * 16));
        let view = |shape: Vec<usize>, bytes| {
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap()
        };
        let views = [("x", view(vec![1, 2, 32], &x)), ("past_keys", view(vec![1, past, 16], &old))];
        std::fs::write(path(name).join("0.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        path(name)
    };
    let (fresh, told) = (sample("fresh", 0), sample("told", 3));
    let (model, out) = (path("model.onnx"), path("out.onnx"));
    let compared = |bits: &str, data: &std::path::Path| {
        let args = ["quantize", text(&model), "-o", text(&out), "--data", text(&fresh), "--scheme", "w8a16g32"];
        tool_ok(&[&args[..], &["--target", "onnx-qdq", "--cache", bits, "--progress", "none"]].concat());
        tool(&["compare", text(&model), text(&out), "--data", text(data), "--json", "--progress", "none"])
    };
    // Of 4 bits and with samples, caches are smoothed; of 8 they are not.
    let json: serde_json::Value = serde_json::from_slice(&compared("4", &fresh).stdout).unwrap();
    let tensors = |json: &serde_json::Value| -> Vec<String> {
        json["layers"].as_array().unwrap().iter().map(|row| row["tensor"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(json["left_out"], serde_json::json!(["present_keys"]), "{json:#}");
    assert!(
        !tensors(&json).contains(&"present_keys".to_owned()) && tensors(&json).contains(&"y".to_owned()),
        "{json:#}"
    );
    let refused = compared("4", &told);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("past_keys") && said.contains("another basis"), "{said}");
    let json: serde_json::Value = serde_json::from_slice(&compared("8", &told).stdout).unwrap();
    assert_eq!(json["left_out"], serde_json::json!([]), "{json:#}");
    assert!(tensors(&json).contains(&"present_keys".to_owned()), "{json:#}");
}
