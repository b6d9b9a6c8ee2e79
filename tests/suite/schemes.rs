//! Every scheme that a target takes is written, read back and verified; data helps.

use std::path::Path;

use super::{fixture, text, tool, tool_ok};

/// Zero points of weights beside activations in codes, which only the plain target writes.
const ZERO_POINTS: [&str; 3] = ["w4a8asym", "w2a4asym", "w4a4asympow2"];

fn run(scheme: &str, recipe: &str) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--progress", "none", "--json"];
    let plain = scheme.ends_with("tok") || ZERO_POINTS.contains(&scheme);
    let target = if plain { "onnx-qdq" } else { "ort-cpu" };
    let json = tool_ok(&[&args[..], &["--scheme", scheme, "--recipe", recipe, "--target", target]].concat());
    serde_json::from_str(&json).unwrap()
}

#[test]
fn every_scheme_verifies() {
    let integers = [
        "w8a8",
        "w5a8",
        "w4a8",
        "w2a8",
        "w4a4",
        "w8a16",
        "w4a16",
        "w4a16g32",
        "w3a16g16asym",
        "w2a16g32",
        "w8a8dyn",
        "w5a8dyn",
    ];
    let shifts = ["w8a8pow2", "w4a8pow2", "w4a16g32pow2", "w3a16g16asympow2", "we2m3a8pow2"];
    let tokens = [
        "w8a8tok",
        "w4a4tok",
        "w4a6tok",
        "w2a2tok",
        "w4a8g32asymtok",
        "wfp4afp8tok",
        "we2m3afp8e5m2tok",
        "wfp4ae3m2tok",
        "w4ae2m3tok",
        "wfp4ae2m3g32tok",
    ];
    let floats = ["wfp8a16", "wfp8e5m2a16", "wfp4a8", "we2m3a8", "we3m0a16g32", "wnf4a16g32"];
    let signs = ["w1a8", "w1a4", "w1a16", "w1a16g32", "w1a4tok", "w1a8pow2"];
    let blocks = ["wmxfp8a16", "wmxfp4a16", "wmxint8a16", "wnvfp4a16"];
    for scheme in
        integers.into_iter().chain(ZERO_POINTS).chain(shifts).chain(tokens).chain(floats).chain(signs).chain(blocks)
    {
        let json = run(scheme, "best");
        assert_eq!(json["verify"]["passed"], true, "{scheme}: {json:#}");
        assert_eq!(json["scheme"], scheme);
        assert!(json["totals"]["quantized"].as_u64().unwrap() > 0, "{scheme}");
    }
}

#[test]
fn scales_are_powers_of_two_where_the_scheme_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let shifts = |scale: &f32| scale.to_bits().trailing_zeros() >= 23;
    for (scheme, least_db) in [("w8a8", 33.0), ("w8a8pow2", 28.0), ("w4a16g32asympow2", 18.0), ("w4a8pow2", 18.0)] {
        let out = folder.path().join(format!("{scheme}.onnx"));
        let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--target", "onnx-qdq", "--json"];
        let json = tool_ok(&[&args[..], &["--recipe", "best", "--scheme", scheme]].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert!(json["fidelity"]["sqnr_db"].as_f64().unwrap() > least_db, "{scheme}: {}", json["fidelity"]);
        let written = onnx_quant::import::file(&out).unwrap().model;
        let graph = written.graph();
        let dequantized = graph.nodes().filter(|(_, node)| node.op.is("DequantizeLinear"));
        let scales: Vec<f32> = dequantized
            .flat_map(|(_, node)| graph.constant_input(node, 1).unwrap().floats().unwrap().into_owned())
            .collect();
        assert!(scales.len() > 10, "{scheme}");
        assert_eq!(scales.iter().all(shifts), scheme.ends_with("pow2"), "{scheme}");
    }
    let odd =
        tool(&["quantize", text(&fixture("models/digits-resnet.onnx")), "--scheme", "wnvfp4a16pow2", "--dry-run"]);
    assert_eq!(odd.status.code(), Some(3), "block formats have scales of their own");
}

/// Operators on bytes want the zero points of all channels to be the same; nothing makes operators of weights in 4 bits.
#[test]
fn zero_points_of_weights_beside_codes_are_for_the_plain_target_and_few_bits() {
    let model = fixture("models/digits-resnet.onnx");
    let taken = |target, scheme| {
        let data = fixture("data/digits");
        let args = ["quantize", text(&model), "--data", text(&data), "--dry-run", "--progress", "none"];
        tool(&[&args[..], &["--target", target, "--scheme", scheme]].concat()).status.code()
    };
    for (target, scheme, code) in [
        ("onnx-qdq", "w4a8asym", 0),
        ("onnx-qdq", "w5a8asym", 3),
        ("onnx-qdq", "w4a8g32asym", 3),
        ("ort-cpu", "w4a8asym", 3),
        ("openvino-cpu", "w4a8asym", 3),
    ] {
        assert_eq!(taken(target, scheme), Some(code), "{target} {scheme}");
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
fn ranges_of_each_run_need_no_samples_and_take_eight_bits() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let model = fixture("models/digits-resnet.onnx");
    let json = tool_ok(&["quantize", text(&model), "-o", text(&out), "--scheme", "w8a8dyn", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["verify"]["passed"], &json["totals"]["quantized"]), (&true.into(), &1.into()), "{json:#}");
    // Without samples `best` rounds to nearest, and says so; a tensor's name keeps what makes it in float.
    let json =
        tool_ok(&["quantize", text(&model), "-o", text(&out), "--scheme", "w8a8dyn", "--recipe", "best", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["totals"]["quantized"], 1);
    let args = ["quantize", text(&model), "-o", text(&out), "--scheme", "w8a8dyn", "--keep-float", "logits", "--json"];
    let json: serde_json::Value = serde_json::from_str(&tool_ok(&args)).unwrap();
    assert_eq!(json["totals"]["quantized"], 0, "{json:#}");
    for odd in ["w4a8dyn", "w8a4dyn", "w8a8g32dyn", "w8a8asymdyn", "w8a8pow2dyn", "we2m3a8dyn"] {
        let refused = tool(&["quantize", text(&model), "--scheme", odd, "--dry-run"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(3) && said.contains("w8a8dyn"), "{odd}: {said}");
    }
}

#[test]
fn tables_are_written_in_blocks_and_shared_with_a_tied_head() {
    let folder = tempfile::tempdir().unwrap();
    let [model, out] = ["tied.onnx", "q.onnx"].map(|name| folder.path().join(name));
    tool_ok(&["cat", text(&fixture("passes/fold-constants/tied-weight.oq")), "--to", "onnx", "-o", text(&model)]);
    let run = |model: &Path, extra: &[&str]| {
        let base = ["quantize", text(model), "-o", text(&out), "--scheme", "w4a16g32", "--json", "--progress", "none"];
        let output = tool(&[&base[..], extra].concat());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output.status.code(), json, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let operators = || {
        let graph = onnx_quant::import::file(&out).unwrap().model.graph().clone();
        graph.nodes().map(|(_, node)| node.op.name.to_string()).collect::<Vec<_>>()
    };
    for scheme in ["w8a16g32", "w4a16g16", "w3a16g64asym", "w2a16g128"] {
        for target in ["ort-cpu", "onnx-qdq"] {
            let (code, json, error) = run(&model, &["--embeddings", scheme, "--target", target]);
            assert_eq!((code, &json["verify"]["passed"]), (Some(0), &true.into()), "{scheme} {target}: {error}");
            let quantized = json["totals"]["quantized"].as_u64();
            assert_eq!(quantized, Some(2), "{scheme} {target}: the table and the head: {json:#}");
            let packed = ["GatherBlockQuantized", "Reshape", "MatMulNBits"];
            let plain = ["DequantizeLinear", "Gather", "Transpose", "MatMul"];
            let want = if target == "ort-cpu" { &packed[..] } else { &plain[..] };
            assert_eq!(operators(), want, "{scheme} {target}");
        }
    }
    // What one reader keeps in float, the other still has in codes.
    let (code, json, error) = run(&model, &["--embeddings", "w4a16g32", "--keep-float", "MatMul"]);
    assert_eq!((code, &json["totals"]["quantized"]), (Some(0), &1.into()), "{error}");
    assert_eq!(operators(), ["GatherBlockQuantized", "Transpose", "MatMul"]);
    // 96 columns would not be whole blocks of 64: here 128 are none of 256.
    let (code, json, error) = run(&model, &["--embeddings", "w4a16g256"]);
    assert_eq!((code, &json["totals"]["quantized"]), (Some(0), &0.into()), "{error}");
    let layers = json["layers"].to_string();
    assert!(layers.contains("no whole blocks of 256"), "{layers}");
    for odd in ["w8a8", "w8a16", "wnf4a16g32", "w4a16g8"] {
        assert_eq!(run(&model, &["--embeddings", odd]).0, Some(3), "{odd}");
    }
    for name in ["Transpose", "t", "x"] {
        let (code, json, error) = run(&model, &["--embeddings", "w4a16g32", "--keep-float", name]);
        assert_eq!((code, &json["totals"]["quantized"]), (Some(0), &1.into()), "{name}: {error}");
    }
    let (code, _, error) = run(&model, &["--embeddings", "w4a16g32", "--set", "e=w8a16g32"]);
    assert!(code == Some(2) && error.contains("both say"), "{error}");
    let (code, _, error) = run(&fixture("models/digits-resnet.onnx"), &["--embeddings", "w8a16g32"]);
    assert!(code == Some(2) && error.contains("no Gather"), "{error}");
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

/// Weights of one bit are their signs, as 4-bit integers that ONNX reads, at a scale that is their mean magnitude.
#[test]
fn signs_are_written_as_integers() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    for target in ["onnx-qdq", "ort-cpu"] {
        let out = folder.path().join(format!("{target}.onnx"));
        let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "w1a8", "--json"];
        let json = tool_ok(&[&args[..], &["--recipe", "fast", "--target", target, "--progress", "none"]].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["verify"]["passed"], true, "{target}: {json:#}");
        assert!(!json.to_string().contains("float numbers"), "{target}: {json:#}");
        let written = onnx_quant::import::file(&out).unwrap().model;
        let graph = written.graph();
        let mut weights = 0;
        for (_, node) in graph.nodes().filter(|(_, node)| node.op.is("DequantizeLinear")) {
            let Some(codes) = graph.constant_input(node, 0).filter(|c| c.dtype() == passes::tensor::DType::I4) else {
                continue;
            };
            let unpacked = passes::encoding::unpack(codes);
            assert!(unpacked.iter().all(|code| matches!(code, 1 | 0xf)), "{target} {}", node.name);
            assert!(unpacked.contains(&1) && unpacked.contains(&0xf), "{target} {}", node.name);
            let zeros = graph.constant_input(node, 2).unwrap();
            assert!(passes::encoding::unpack(zeros).iter().all(|zero| *zero == 0), "{target} {}", node.name);
            weights += 1;
        }
        assert!(weights >= 9, "{target}: {weights}");
    }
}

/// Of small floats with as many bits every weight gets the one that fits it best.
#[test]
fn small_floats_that_fit_better_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let formats = |how: &str| {
        let out = folder.path().join("q.onnx");
        let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
        let pipeline = format!(
            "infer-shapes, fold-constants, *(eliminate-identity, fold-batch-norm, fold-affine, fold-constants, infer-shapes, drop-dead), \
             calibrate, assign-encodings{{formats={how}}}, round"
        );
        let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "we4m1a8", "--json"];
        let json =
            tool_ok(&[&args[..], &["--target", "onnx-qdq", "--pipeline", &pipeline, "--progress", "none"]].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["verify"]["passed"], true, "{json:#}");
        let layers = json["layers"].as_array().unwrap().clone();
        let names = layers.iter().filter_map(|layer| layer["weight"]["format"].as_str().map(str::to_owned));
        (names.collect::<std::collections::BTreeSet<String>>(), json["fidelity"]["sqnr_db"].as_f64().unwrap())
    };
    let (asked, before) = formats("asked");
    let (found, after) = formats("search");
    assert_eq!(asked.into_iter().collect::<Vec<_>>(), ["e4m1"]);
    assert!(!found.contains("e4m1") && found.iter().all(|name| name.len() == 4), "{found:?}");
    assert!(after > before + 3.0, "{before} {after}");
}

/// What layers multiply has the bits of the scheme; sums of branches and what the model is given have 8, and circuits know no such thing.
#[test]
fn few_bits_are_for_what_is_multiplied() {
    use passes::tensor::DType;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let bits = |pipeline: &[&str]| {
        let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--target", "onnx-qdq"];
        tool_ok(&[&args[..], &["--scheme", "w4a4", "--progress", "none"], pipeline].concat());
        let written = onnx_quant::import::file(&out).unwrap().model;
        let graph = written.graph();
        let read = |value| {
            let (_, back) = graph.producer(value).filter(|(_, node)| node.op.is("DequantizeLinear"))?;
            Some((graph.constant_input(back, 2)?.dtype(), graph.producer(back.input(0)?)?.1.input(0)?))
        };
        let mut found: Vec<(String, bool, DType)> = Vec::new();
        for (_, node) in graph.nodes().filter(|(_, node)| ["Conv", "Gemm", "Add"].iter().any(|op| node.op.is(op))) {
            let activations = if node.op.is("Add") { 2 } else { 1 };
            for (dtype, source) in node.inputs.iter().take(activations).flatten().filter_map(|value| read(*value)) {
                found.push((node.op.name.to_string(), graph.inputs().contains(&source), dtype));
            }
        }
        found
    };
    let found = bits(&[]);
    assert!(found.iter().any(|(op, ..)| op == "Add") && found.iter().any(|(_, given, _)| *given), "{found:?}");
    for (op, given, dtype) in &found {
        let want = if op == "Add" || *given { DType::U8 } else { DType::U4 };
        assert_eq!(*dtype, want, "{op} {given}: {found:?}");
    }
    let all = "infer-shapes, fold-constants, calibrate, assign-encodings, round";
    let found = bits(&["--pipeline", all]);
    assert!(found.len() > 5 && found.iter().all(|(.., dtype)| *dtype == DType::U4), "{found:?}");
    let more = "infer-shapes, fold-constants, calibrate, assign-encodings{others=16}, round";
    let memories = folder.path().join("memories");
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&memories), "--target", "rtl-mem"];
    let output = tool(&[&args[..], &["--scheme", "w4a4", "--progress", "none", "--pipeline", more]].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("`others`") && error.contains("2 to 8 bits"), "{error}");
}
