//! The command line: what it prints, what it refuses, and how it exits.

use super::{fixture, quantized, text, tool, tool_ok};

fn refused(args: &[&str], code: i32, wanted: &[&str]) {
    let output = tool(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    for part in wanted {
        assert!(error.contains(part), "{args:?} should say `{part}`: {error}");
    }
}

#[test]
fn quantize_says_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let report = folder.path().join("report.json");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--report", text(&report)];
    let summary = tool_ok(&args);
    for part in ["Conv", "worst layers", "verified   read back as planned", "memory", "again      onnx-quant quantize"]
    {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(json["verify"]["passed"], true);
    assert_eq!(json["totals"]["kept_float"], 0);
    assert!(json["fidelity"]["sqnr_db"].as_f64().unwrap() > 30.0);
    assert!(json["output"]["bytes"].as_u64().unwrap() * 3 < json["input"]["bytes"].as_u64().unwrap());
    assert!(
        json["layers"].as_array().unwrap().iter().any(|l| l["op"] == "Conv" && l["weight"]["granularity"] == "axis 0")
    );
}

/// Whoever names a processor, or a target or scheme that none saturates on, knows.
#[test]
fn a_processor_that_saturates_is_named_unless_one_was() {
    #[cfg(target_arch = "x86_64")]
    let here = is_x86_feature_detected!("avx2")
        && !is_x86_feature_detected!("avx512vnni")
        && !is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    let here = false;
    let (model, data) = (fixture("models/digits-mobilenet.onnx"), fixture("data/digits"));
    let told = |more: &[&str]| {
        let args = ["quantize", text(&model), "--data", text(&data), "--samples", "2", "--dry-run"];
        let output = tool(&[&args, more].concat());
        assert!(output.status.success(), "{more:?}");
        String::from_utf8_lossy(&output.stderr).contains("say --cpu avx2")
    };
    assert_eq!(told(&["--target", "ort-cpu"]), here);
    let others: [&[&str]; 4] = [
        &["--target", "ort-cpu", "--cpu", "vnni"],
        &["--target", "ort-cpu", "--cpu", "avx2"],
        &["--target", "ort-cpu", "--scheme", "w4a8"],
        &["--target", "onnx-qdq"],
    ];
    for more in others {
        assert!(!told(more), "{more:?}");
    }
}

#[test]
fn json_goes_to_standard_output_alone() {
    let (model, data) = (fixture("models/digits-mobilenet.onnx"), fixture("data/digits"));
    let out = tool_ok(&["quantize", text(&model), "--data", text(&data), "--dry-run", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["verify"], serde_json::Value::Null);
    let plan = tool_ok(&["quantize", text(&model), "--data", text(&data), "--dry-run"]);
    assert!(plan.starts_with("plan {") && plan.contains("uint8 per-tensor, scale"), "{plan}");
    assert!(!model.with_extension("q.onnx").exists(), "a dry run writes nothing");
}

#[test]
fn held_out_samples_judge_and_are_not_fitted_to() {
    let (model, data) = (fixture("models/digits-mobilenet.onnx"), fixture("data/digits"));
    let base = [
        "quantize",
        text(&model),
        "--data",
        text(&data),
        "--scheme",
        "w3a8",
        "--recipe",
        "best",
        "--dry-run",
        "--json",
    ];
    let run = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&tool_ok(&[&base[..], &["--samples", "32"], more].concat())).unwrap()
    };
    let (fitted, judged) = (run(&[]), run(&["--hold-out", "8"]));
    let fidelity = |json: &serde_json::Value| json["fidelity"]["sqnr_db"].as_f64().unwrap();
    assert_eq!((&fitted["samples"], &fitted["fidelity"]["held_out"]), (&32.into(), &false.into()));
    assert_eq!((&judged["samples"], &judged["fidelity"]["held_out"]), (&24.into(), &true.into()));
    assert_eq!(judged["fidelity"]["samples"], 8);
    assert!(fidelity(&judged) < fidelity(&fitted), "what was fitted flatters: {fitted:#} {judged:#}");
    let said = |more: &[&str]| tool_ok(&[&base[..base.len() - 1], &["--samples", "32"], more].concat());
    assert!(said(&[]).contains("of the samples it was fitted to: on others it may be worse (--hold-out N"));
    assert!(said(&["--hold-out", "8"]).contains("on 8 held-out samples\n"));
    refused(&[&base[..], &["--samples", "32", "--hold-out", "32"]].concat(), 2, &["leaves none of the 32 samples"]);
    refused(&["quantize", text(&model), "--scheme", "w8a16", "--hold-out", "2", "--dry-run"], 2, &["--data"]);
    refused(&["quantize", text(&model), "--scheme", "w8a16", "--augment", "2", "--dry-run"], 2, &["--data"]);
    // Its batch norms remember what they have seen in training.
    let augmented = run(&["--hold-out", "8", "--augment", "1"]);
    assert_eq!((&augmented["samples"], &augmented["fidelity"]["samples"]), (&48.into(), &8.into()));
    let viewed = run(&["--hold-out", "8", "--views", "2"]);
    assert_eq!((&viewed["samples"], &viewed["fidelity"]["samples"]), (&72.into(), &8.into()));
    refused(&["quantize", text(&model), "--scheme", "w8a16", "--views", "2", "--dry-run"], 2, &["--views", "--data"]);
    refused(&[&base[..], &["--views", "1", "--augment", "1"]].concat(), 2, &["cannot be used with"]);
}

#[test]
fn what_stays_in_float_has_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let out = folder.path().join("q.onnx");
    let base = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--keep-float", "*Gemm*"];
    let output = tool(&[&base[..], &["--no-fallback", "--json"]].concat());
    assert_eq!(output.status.code(), Some(1), "a fallback breaks the budget");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let gemm = json["layers"].as_array().unwrap().iter().find(|l| l["op"] == "Gemm").unwrap();
    assert!(gemm["kept_float"].as_bool().unwrap() && gemm["reason"].as_str().unwrap().contains("--keep-float"));
}

#[test]
fn bad_requests_are_refused_before_any_work() {
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let (model, data) = (text(&model), text(&data));
    refused(&["quantize", model], 2, &["--data"]);
    refused(&["quantize", model, "--data", data, "--target", "abacus"], 3, &["ort-cpu"]);
    refused(&["quantize", model, "--data", data, "--scheme", "w9a8"], 3, &["2 to 8 bits"]);
    refused(&["quantize", model, "--data", data, "--scheme", "int8"], 3, &["w4a16g32"]);
    refused(&["quantize", model, "--data", data, "--keep-float", "nothing-like-it*"], 2, &["matches no node"]);
    refused(&["quantize", model, "--data", data, "--executor", "magic"], 2, &["tract"]);
    refused(&["quantize", model, "--data", data, "-o", model], 2, &["never touched"]);
    refused(&["quantize", model, "--data", data, "--max-memory", "1M"], 4, &["--max-memory allows 1 MB"]);
    refused(&["quantize", "no-such-model.onnx", "--data", data], 2, &["no-such-model.onnx"]);
    refused(&["quantize", model, "--data", data, "-o", "/no/such/folder/q.onnx"], 4, &["cannot write"]);
    refused(&["opt", model, "--pipeline", "calibrat"], 2, &["did you mean `calibrate`"]);
    refused(&["explain", "percentil"], 2, &["did you mean `percentile`"]);
    refused(&["frobnicate"], 2, &["Usage"]);
}

#[test]
fn samples_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("models/digits-resnet.onnx");
    let write = |name: &str, array: &[u8]| std::fs::write(folder.path().join(name), array).unwrap();
    let npy = |descr: &str, shape: &str, data: &[u8]| {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        while (header.len() + 11) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        file.extend(header.bytes());
        file.extend(data);
        file
    };
    let run = |name: &str, wanted: &[&str]| {
        let path = folder.path().join(name);
        refused(&["quantize", text(&model), "--data", text(&path), "-o", "/dev/null/x"], 2, wanted);
    };
    let floats = |n: usize, last: f32| {
        let mut data: Vec<u8> = std::iter::repeat_n(0.5_f32.to_le_bytes(), n - 1).flatten().collect();
        data.extend(last.to_le_bytes());
        data
    };
    write("shape.npy", &npy("<f4", "(1, 1, 27, 28)", &floats(27 * 28, 0.5)));
    run("shape.npy", &["[1, 1, 27, 28]", "f32[batch,1,28,28]"]);
    write("nan.npy", &npy("<f4", "(2, 1, 28, 28)", &floats(2 * 28 * 28, f32::NAN)));
    run("nan.npy", &["NaN", "sample 1", "`input`"]);
    write("type.npy", &npy("|u1", "(1, 1, 28, 28)", &[7; 784]));
    run("type.npy", &["u8", "f32"]);
    write("short.npy", &npy("<f4", "(1, 1, 28, 28)", &[0; 12]));
    run("short.npy", &["short.npy"]);
    write("lies.npy", &npy("<f4", "(999999999, 999999999, 28, 28)", &[0; 12]));
    run("lies.npy", &["lies.npy"]);
    write("pickle.npy", &npy("|O", "(1,)", b"cos\nsystem\n"));
    run("pickle.npy", &["never loaded"]);
    write("garbage.npz", b"this is no archive");
    run("garbage.npz", &["garbage.npz"]);
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    run("empty", &["there are no"]);
    run("absent", &["cannot be read"]);
}

#[test]
fn statistics_can_be_measured_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let model = fixture("models/digits-mobilenet.onnx");
    let data = fixture("data/digits");
    for (part, files) in [("a", ["00.npz", "01.npz"]), ("b", ["02.npz", "03.npz"])] {
        std::fs::create_dir(folder.path().join(part)).unwrap();
        for file in files {
            std::fs::copy(data.join(file), folder.path().join(part).join(file)).unwrap();
        }
        tool_ok(&[
            "stats",
            text(&model),
            "--data",
            &at(part),
            "-o",
            &at(&format!("{part}.json")),
            "--progress",
            "none",
        ]);
    }
    tool_ok(&["stats", text(&model), "--data", text(&data), "-o", &at("whole.json"), "--progress", "none"]);
    tool_ok(&["stats", "merge", &at("b.json"), &at("a.json"), "-o", &at("merged.json")]);
    assert_eq!(std::fs::read(at("merged.json")).unwrap(), std::fs::read(at("whole.json")).unwrap());
    tool_ok(&["quantize", text(&model), "--stats", &at("merged.json"), "-o", &at("s.onnx"), "--progress", "none"]);
    tool_ok(&["quantize", text(&model), "--data", text(&data), "-o", &at("d.onnx"), "--progress", "none"]);
    assert_eq!(std::fs::read(at("s.onnx")).unwrap(), std::fs::read(at("d.onnx")).unwrap());
    std::fs::write(at("bad.json"), "{\"version\":1,\"samples\":1,\"tensors\":{\"input\":{\"min_bits\":0,\"max_bits\":0,\"buckets\":[[99999999,1]]}}}").unwrap();
    refused(&["quantize", text(&model), "--stats", &at("bad.json"), "-o", &at("x.onnx")], 2, &["contradicts itself"]);
}

#[test]
fn compare_finds_the_worst_layer_first() {
    let folder = tempfile::tempdir().unwrap();
    let out = quantized(folder.path(), &[]);
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let json = tool_ok(&["compare", text(&model), text(&out), "--data", text(&data), "--json", "--progress", "none"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let rows = json["layers"].as_array().unwrap();
    let db: Vec<f64> = rows.iter().map(|row| row["sqnr_db"].as_f64().unwrap_or(f64::INFINITY)).collect();
    assert!(rows.len() > 10 && db.windows(2).all(|pair| pair[0] <= pair[1]), "{db:?}");
    assert!(db[0] > 20.0, "{db:?}");
}

/// Of every tensor it is told in which formats it was computed, and with the report of the run why.
#[test]
fn compare_tells_formats_and_why_layers_have_them() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (out, report) = (at("q.onnx"), at("r.json"));
    let mixed = ["--scheme", "w4a8", "--set", "/3/c1/Conv=w8a8", "--set", "/4/c1/Conv=float", "--report", &report];
    tool_ok(
        &[&["quantize", text(&model), "--data", text(&data), "-o", &out, "--progress", "none"][..], &mixed].concat(),
    );
    let compared = ["compare", text(&model), &out, "--data", text(&data), "--progress", "none", "--report", &report];
    let json: serde_json::Value = serde_json::from_str(&tool_ok(&[&compared[..], &["--json"]].concat())).unwrap();
    let rows = json["layers"].as_array().unwrap();
    let formats: std::collections::BTreeSet<&str> =
        rows.iter().filter_map(|row| row["weight"]["format"].as_str()).collect();
    assert_eq!(formats.into_iter().collect::<Vec<_>>(), ["int4", "int8"], "{json:#}");
    let float = rows.iter().find(|row| row["op"] == "Conv" && row["weight"].is_null()).unwrap();
    let reason = float["reason"].as_str().unwrap();
    assert!(!reason.is_empty(), "{float:#}");
    let said = tool_ok(&compared);
    assert!(said.contains(reason) && said.contains("int4 per axis 0, reads uint8"), "{said}");
    std::fs::write(at("none.json"), "{}").unwrap();
    let none = ["compare", text(&model), &out, "--data", text(&data), "--report", &at("none.json")];
    refused(&none, 2, &["none.json", "layers"]);
}

/// What the report says of codes is measured: chosen by data they lose less than nearest ones, and nearest ones are compared with nothing.
#[test]
fn the_report_tells_what_rounding_by_data_saves_and_how_far_logits_diverge() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let report = |recipe: &str| -> serde_json::Value {
        let to = folder.path().join("q.onnx");
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&to), "--scheme", "w4a8", "--recipe", recipe];
        serde_json::from_str(&tool_ok(&[&args[..], &["--json", "--progress", "none"]].concat())).unwrap()
    };
    let ratios = |report: &serde_json::Value| -> Vec<f64> {
        report["layers"].as_array().unwrap().iter().filter_map(|layer| layer["loss_vs_nearest"].as_f64()).collect()
    };
    let (nearest, by_data) = (report("fast"), report("best"));
    assert_eq!(ratios(&nearest), [0.0; 0]);
    let of_data = ratios(&by_data);
    assert!(of_data.len() >= 9 && of_data.iter().all(|ratio| (0.0..1.0).contains(ratio)), "{of_data:?}");
    let divergence = |report: &serde_json::Value| report["fidelity"]["kl_top"].as_f64().unwrap();
    assert!(divergence(&by_data) > 0.0 && divergence(&by_data) < divergence(&nearest), "{by_data:#}");
}

#[test]
fn text_and_onnx_are_two_forms_of_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let case = fixture("passes/drop-dead/captured.oq");
    tool_ok(&["cat", text(&case), "--to", "onnx", "-o", &at("m.onnx")]);
    let there = tool_ok(&["cat", &at("m.onnx")]);
    std::fs::write(at("again.oq"), &there).unwrap();
    assert_eq!(tool_ok(&["cat", &at("again.oq")]), there);
    assert!(there.contains("then_branch=graph"), "{there}");
}

#[test]
fn the_catalogue_can_be_read() {
    for kind in [
        "passes",
        "roundings",
        "parameterizations",
        "losses",
        "sensitivities",
        "observers",
        "formats",
        "targets",
        "recipes",
        "executors",
        "codes",
    ] {
        assert!(!tool_ok(&["list", kind]).is_empty(), "{kind}");
    }
    assert!(tool_ok(&["explain", "OQ4001"]).contains("stays in float"));
    assert!(tool_ok(&["explain", "fold-batch-norm"]).contains("1712.05877"));
    assert!(tool_ok(&["explain", "ort-cpu"]).contains("assign-encodings"));
    assert!(tool_ok(&["explain", "pd"]).contains("2212.07048"));
    assert!(tool_ok(&["completions", "bash"]).contains("onnx-quant"));
    assert!(tool_ok(&["inspect", text(&fixture("models/digits-resnet.onnx"))]).contains("opset 17"));
}

/// The digits as pictures give the same statistics as the digits as arrays: only the form differs.
#[test]
fn pictures_are_samples_too() {
    use passes::exec::Dataset as _;
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("models/digits-resnet.onnx");
    let imported = onnx_quant::import::file(&model).unwrap();
    let slots = onnx_quant::dataset::Slot::of(imported.model.graph());
    let data = onnx_quant::dataset::Files::open(&fixture("data/digits"), slots.clone(), None, Some(12)).unwrap();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pixels between 0 and 255")]
    for index in 0..12 {
        let pixels: Vec<u8> =
            data.sample(index).unwrap()[0].floats().unwrap().iter().map(|v| (v * 255.0).round() as u8).collect();
        let picture = image::GrayImage::from_raw(28, 28, pixels).unwrap();
        picture.save(folder.path().join(format!("{index:02}.png"))).unwrap();
    }
    let options = "mean=0,std=1".parse().unwrap();
    let pictures = onnx_quant::dataset::Files::open(folder.path(), slots, Some(options), None).unwrap();
    assert_eq!(pictures.len(), 12);
    for index in 0..12 {
        let (a, b) = (pictures.sample(index).unwrap(), data.sample(index).unwrap());
        let near = a[0].floats().unwrap().iter().zip(b[0].floats().unwrap().iter()).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near && a[0].shape() == b[0].shape(), "picture {index}");
    }
    refused(&["quantize", text(&model), "--data", text(folder.path()), "-o", "/dev/null/x"], 2, &["--image"]);
    refused(
        &["quantize", text(&model), "--data", text(folder.path()), "--image", "blur=1"],
        2,
        &["none of mean, std, size"],
    );
}

/// Ctrl-C in the middle of calibration: exit 130, nothing written, nothing left behind.
#[test]
fn an_interrupted_run_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let samples = 20_000_usize;
    let bytes = samples * 784 * 4;
    let header =
        format!("{{\"input\":{{\"dtype\":\"F32\",\"shape\":[{samples},1,28,28],\"data_offsets\":[0,{bytes}]}}}}");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.resize(file.len() + bytes, 0);
    let data = folder.path().join("many.safetensors");
    std::fs::write(&data, file).unwrap();
    let out = folder.path().join("q.onnx");
    let model = fixture("models/digits-resnet.onnx");
    let args =
        ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--threads", "1", "--progress", "none"];
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_onnx-quant"))
        .args(args)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut child = child.unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the samples are there");
}

/// A convolution whose quantized result is read inside a branch: the branch reads it by the name it has outside.
#[test]
fn a_branch_may_read_what_is_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let source = "graph (%x: f32[batch,1,28,28]) -> (%y) {
  %w = const f32[4,1,3,3] rand(seed=1, std=0.3)
  %b = const f32[4] [0, 0.1, 0.2, 0.3]
  %zero = const f32[] [0]
  %c = Conv(%x, %w, %b)
  %r = Relu(%c)
  %m = ReduceMax(%r) {keepdims=0}
  %p = Greater(%m, %zero)
  %y = If(%p) {then_branch=graph () -> (%t) {
    %t = Neg(%r)
  }, else_branch=graph () -> (%e) {
    %e = Identity(%r)
  }}
}
";
    std::fs::write(at("m.oq"), source).unwrap();
    tool_ok(&["cat", &at("m.oq"), "--to", "onnx", "-o", &at("input.onnx")]);
    let inspected = tool_ok(&["inspect", &at("input.onnx")]);
    assert!(inspected.contains("x: f32[batch,1,28,28]"), "{inspected}");
    // The fixture's samples are called `input`.
    let renamed = source.replace("%x", "%input");
    std::fs::write(at("m.oq"), renamed).unwrap();
    tool_ok(&["cat", &at("m.oq"), "--to", "onnx", "-o", &at("input.onnx")]);
    let data = fixture("data/digits");
    let summary =
        tool_ok(&["quantize", &at("input.onnx"), "--data", text(&data), "-o", &at("q.onnx"), "--progress", "none"]);
    assert!(summary.contains("read back as planned") && summary.contains("stay in float"), "{summary}");
    let written = tool_ok(&["cat", &at("q.onnx")]);
    assert!(written.contains("QuantizeLinear"), "{written}");
    refused(&["quantize", &at("q.onnx"), "--data", text(&data), "-o", &at("r.onnx")], 2, &["quantized already"]);
}

/// A weight that is not finite: its node stays in float, named with the tensor, and the rest is quantized.
#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let source = "graph (%input: f32[batch,1,28,28]) -> (%y) {
  %bad = const f32[1,1,1,1] [nan]
  %good = const f32[1,1,1,1] [0.5]
  %a = Conv(%input, %good)
  %y = Conv(%a, %bad)
}
";
    std::fs::write(at("m.oq"), source).unwrap();
    tool_ok(&["cat", &at("m.oq"), "--to", "onnx", "-o", &at("m.onnx")]);
    let (model, data) = (at("m.onnx"), fixture("data/digits"));
    let args = ["quantize", &model, "--data", text(&data), "--dry-run", "--json"];
    let json: serde_json::Value = serde_json::from_str(&tool_ok(&args)).unwrap();
    let reasons: Vec<&str> = json["layers"].as_array().unwrap().iter().filter_map(|l| l["reason"].as_str()).collect();
    assert!(reasons.iter().any(|r| r.contains("`bad` has NaN")) && json["totals"]["quantized"] == 1, "{reasons:?}");
}

/// The weights of the input are as untouchable as its main file.
#[test]
fn external_weights_of_the_input_are_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let imported = onnx_quant::import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let options =
        onnx_quant::emit::Emit { external: Some("foo.onnx.data".into()), ..onnx_quant::emit::Emit::default() };
    let artifact = onnx_quant::emit::model(imported.model.graph(), &imported.model.meta, &options, "foo.onnx");
    onnx_quant::emit::Staged::write(artifact, at("float.onnx").as_ref(), &[]).unwrap().publish().unwrap();
    let before = std::fs::read(at("foo.onnx.data")).unwrap();
    let data = fixture("data/digits");
    refused(&["quantize", &at("float.onnx"), "--data", text(&data), "-o", &at("foo.onnx")], 2, &["never touched"]);
    refused(&["opt", &at("float.onnx"), "--pipeline", "", "-o", &at("float.onnx")], 2, &["never touched"]);
    assert_eq!(std::fs::read(at("foo.onnx.data")).unwrap(), before);
}

/// Sixteen herded samples out of 128 do; other commands say that they cannot choose.
#[test]
fn samples_are_chosen_by_herding() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--samples", "16"];
    let json: serde_json::Value =
        serde_json::from_str(&tool_ok(&[&args[..], &["--select", "herding", "--json"]].concat())).unwrap();
    assert_eq!(json["samples"], 16, "{json:#}");
    let stats = folder.path().join("s.json");
    let args = ["stats", text(&model), "--data", text(&data), "-o", text(&stats), "--select", "herding"];
    let output = tool(&args);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("only `quantize` does that"));
}
