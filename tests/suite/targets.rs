//! What is written for a target is what it takes, and the same codes for all that take the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use passes::diag::Severity;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::tensor::Tensor;

use super::{fixture, text, tool, tool_ok};

fn quantize(folder: &Path, model: &str, target: &str, scheme: &str) -> PathBuf {
    let out = folder.join(format!("{model}-{target}-{scheme}.onnx"));
    let (model, data) = (fixture(&format!("models/{model}.onnx")), fixture("data/digits"));
    let args =
        ["quantize", text(&model), "--data", text(&data), "--target", target, "--scheme", scheme, "-o", text(&out)];
    tool_ok(&[&args[..], &["--progress", "none"]].concat());
    out
}

const PAIRS: &[(&str, &[&str])] = &[
    ("ort-cpu", &["w8a8", "w4a4"]),
    ("onnx-qdq", &["w8a8", "w6a6", "w5a5", "w8auint16", "wfp8afp8"]),
    ("openvino-cpu", &["w8a8"]),
    ("tensorrt", &["w8a8", "wfp8afp8", "wmxfp8amxfp8"]),
    ("qonnx", &["w8a8", "w6a6", "w3a5", "w4a12", "we2m3ae3m2"]),
    ("hls4ml", &["w8a8", "w6a6", "w4a4"]),
    ("finn", &["w8a8", "w4a4"]),
    ("tract", &["w8a8"]),
    ("qnn", &["w8a8", "w8auint16"]),
    ("vitisai", &["w8a8"]),
    ("qoperator", &["w8a8", "w6a8"]),
    ("packed", &["w8a8"]),
    ("rtl-mem", &["w8a8", "w4a4"]),
];

/// Every target's own rules find nothing in what is written for it that it would reject, and no schemes are refused by accident.
#[test]
fn every_target_takes_what_is_written_for_it() {
    let folder = tempfile::tempdir().unwrap();
    for (target, schemes) in PAIRS {
        for (model, scheme) in
            schemes.iter().flat_map(|scheme| [("digits-resnet", scheme), ("digits-mobilenet", scheme)])
        {
            let out = quantize(folder.path(), model, target, scheme);
            let main = if out.is_dir() { out.join("model.onnx") } else { out };
            let written = onnx_quant::import::file(&main).unwrap();
            let found = onnx_quant::lint::lint(&written.model, written.opset, target);
            let wrong: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert!(found.iter().all(|f| f.severity != Severity::Error), "{target} {scheme}: {wrong:#?}");
        }
    }
}

/// The codes of every weight, by the name of the node that reads it.
fn weights(path: &Path) -> BTreeMap<String, Tensor> {
    let model = onnx_quant::import::file(path).unwrap().model;
    let catalogue = passes::catalogue::passes();
    let executor = (onnx_quant::exec::find("rten").unwrap().build)(&model.meta).unwrap();
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], executor.as_ref());
    let pipeline = Pipeline::parse("infer-shapes, absorb-qdq", &catalogue).unwrap();
    let (model, _) = PassManager::default().run(&pipeline, model, &mut cx).unwrap();
    let of = |(id, node): (passes::id::NodeId, &passes::ir::Node)| {
        let codes = model.plan().codes(passes::id::Site::Use { node: id, input: 1 })?;
        Some((node.name.to_string(), codes.as_ref().clone()))
    };
    model.graph().nodes().filter_map(of).collect()
}

#[test]
fn targets_with_the_same_rules_get_the_same_codes() {
    let folder = tempfile::tempdir().unwrap();
    let of = |target: &str| weights(&quantize(folder.path(), "digits-resnet", target, "w8a8"));
    let usual = of("ort-cpu");
    assert_eq!(usual.len(), 10);
    // One scale per output channel, signed codes: float or integer biases and zero points of activations do not matter.
    for target in ["onnx-qdq", "openvino-cpu", "qonnx"] {
        assert_eq!(of(target), usual, "{target}");
    }
    // All but the last product, which has too few outputs for it.
    let tensorrt = of("tensorrt");
    assert_eq!(tensorrt.len(), 9);
    assert!(tensorrt.iter().all(|(name, codes)| usual[name] == *codes));
    // One scale in all.
    let single = of("tract");
    assert_ne!(single, usual);
}

#[test]
fn what_a_target_cannot_take_is_refused_before_any_work() {
    let model = fixture("models/digits-resnet.onnx");
    for (target, scheme, instead) in [
        ("tensorrt", "w8a8dyn", "w4a16g128"),
        ("tensorrt", "w4a16g32", "blocks of 64 or 128"),
        ("openvino-cpu", "w8a8dyn", "w8a16g128"),
        ("openvino-cpu", "w4a4", "w8a8"),
        ("hls4ml", "w4a16g32", "w4a4"),
        ("hls4ml", "w8auint16", "2 to 8 bits"),
        ("finn", "w4a12", "1 to 8 bits"),
        ("tract", "w4a8", "w4a16g32"),
        ("qnn", "w4a16g32", "w8auint16"),
        ("vitisai", "w4a4", "w8a8"),
        ("onnx-qdq", "w8a1", "w8a8dyn"),
        ("onnx-qdq", "w1a8dyn", "beside weights of 5 to 8"),
        ("hls4ml", "w1a8", "--target finn"),
        ("rtl-mem", "w1a8", "--target qonnx"),
        ("tensorrt", "w1a8", "w8a8"),
        ("openvino-cpu", "w1a8", "weights of 5 to 8"),
        ("tract", "w1a16g32", "w4a16g32"),
        ("safetensors-ct", "w1a16", "weights of 2 to 8 bits"),
        ("ort-cpu", "w8auint16", "--target qnn"),
        ("ort-cpu", "w4a4tok", "only onnx-qdq"),
        ("tensorrt", "w8a8tok", "w4a16g128"),
        ("onnx-qdq", "w4afp4tok", "8-bit floats"),
        ("onnx-qdq", "w4ae4m1tok", "8-bit floats"),
        ("onnx-qdq", "w8a8pow2tok", "no powers of two"),
        ("onnx-qdq", "w8aint16tok", "without a sign"),
    ] {
        let output = tool(&["quantize", text(&model), "--target", target, "--scheme", scheme, "-o", "never.onnx"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{target} {scheme}: {error}");
        assert!(error.contains(instead), "{target} {scheme} should name `{instead}`: {error}");
    }
}

#[test]
fn lint_ends_with_code_3_where_a_target_rejects() {
    let folder = tempfile::tempdir().unwrap();
    let out = quantize(folder.path(), "digits-resnet", "ort-cpu", "w8a8");
    assert!(tool_ok(&["lint", text(&out), "--target", "ort-cpu"]).contains("0 errors"));
    let rejected = tool(&["lint", text(&out), "--target", "tensorrt", "--json"]);
    assert_eq!(rejected.status.code(), Some(3));
    let json: serde_json::Value = serde_json::from_slice(&rejected.stdout).unwrap();
    let codes: Vec<&str> = json["findings"].as_array().unwrap().iter().filter_map(|f| f["code"].as_str()).collect();
    assert!(codes.contains(&"OQ8302") && codes.contains(&"OQ8306"), "{codes:?}");
    let plain = tool(&["lint", text(&fixture("models/digits-mobilenet.onnx")), "--target", "hls4ml"]);
    let found = String::from_utf8_lossy(&plain.stdout).into_owned();
    assert!(found.contains("OQ8421") && found.contains("Clip") && found.contains("OQ8429"), "{found}");
}

/// tract loads what is written for it, and its labels are those of our simulation: it rounds ties away from zero, so that a code may
/// be off by one here and there.
#[test]
fn tract_runs_what_is_written_for_it() {
    use tract_onnx::prelude::*;
    let folder = tempfile::tempdir().unwrap();
    let out = quantize(folder.path(), "digits-resnet", "tract", "w8a8");
    let results = folder.path().join("out.safetensors");
    let data = fixture("data/digits/00.npz");
    tool_ok(&["run", text(&out), "--data", text(&data), "-o", text(&results), "--progress", "none"]);
    let bytes = std::fs::read(&results).unwrap();
    let ours = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = ours.tensor("logits").unwrap();
    let ours: Vec<f32> = ours.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let slots = onnx_quant::dataset::Slot::of(onnx_quant::import::file(&out).unwrap().model.graph());
    let files = onnx_quant::dataset::Files::open(&data, slots, None, None).unwrap();
    let model = tract_onnx::onnx().model_for_path(&out).unwrap();
    let model = model.into_optimized().unwrap().into_runnable().unwrap();
    let mut agreed = 0;
    for (index, mine) in ours.chunks(10).enumerate() {
        let sample = passes::exec::Dataset::sample(&files, index).unwrap();
        let values = sample[0].floats().unwrap().into_owned();
        let input = tract_ndarray::Array4::from_shape_vec((1, 1, 28, 28), values).unwrap();
        let theirs = model.run(tvec!(input.into_tensor().into())).unwrap();
        let theirs: Vec<f32> = theirs[0].to_plain_array_view::<f32>().unwrap().iter().copied().collect();
        let top = |logits: &[f32]| (0..10).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        agreed += usize::from(top(mine) == top(&theirs));
        let error = mine.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let signal = mine.iter().map(|a| a * a).sum::<f32>();
        assert!(error < 1e-3 * signal, "sample {index}: {mine:?} {theirs:?}");
    }
    assert_eq!(agreed, ours.len() / 10);
}

/// Codes, scales and zero points.
type Written = (Vec<u8>, Vec<u32>, Vec<i32>);

/// What stands in a file: every encoded input by node and place, with its bytes.
fn everything(path: &Path) -> BTreeMap<(String, usize), Written> {
    let model = onnx_quant::import::file(path).unwrap().model;
    let catalogue = passes::catalogue::passes();
    let executor = (onnx_quant::exec::find("rten").unwrap().build)(&model.meta).unwrap();
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], executor.as_ref());
    let pipeline = Pipeline::parse("infer-shapes, expand-qoperators, absorb-qdq", &catalogue).unwrap();
    let (model, _) = PassManager::default().run(&pipeline, model, &mut cx).unwrap();
    let (graph, plan) = (model.graph(), model.plan());
    let mut found = BTreeMap::new();
    for (id, node) in graph.nodes() {
        for input in 0..u16::try_from(node.inputs.len()).unwrap() {
            let Some(encoding) = plan.encoding_of_use(graph, id, input) else { continue };
            let codes = plan.codes(passes::id::Site::Use { node: id, input }).map(|codes| codes.bytes().to_vec());
            let scales = encoding.scale.iter().map(|scale| scale.to_bits()).collect();
            found.insert(
                (node.name.to_string(), input.into()),
                (codes.unwrap_or_default(), scales, encoding.zero_point.to_vec()),
            );
        }
    }
    found
}

/// QDQ, QONNX, QDQ, packed, QDQ: the same bytes all the way.
#[test]
fn conversions_do_not_touch_a_code() {
    let folder = tempfile::tempdir().unwrap();
    for (model, target, scheme) in [
        ("digits-resnet", "onnx-qdq", "w8a8"),
        ("digits-mobilenet", "onnx-qdq", "w6a6"),
        ("digits-resnet", "ort-cpu", "w4a8"),
    ] {
        let first = quantize(folder.path(), model, target, scheme);
        let want = everything(&first);
        assert!(want.len() > 20);
        let mut from = first;
        for (step, target) in ["qonnx", "onnx-qdq", "packed", "onnx-qdq"].into_iter().enumerate() {
            let to = folder.path().join(format!("{model}-{scheme}-{step}"));
            tool_ok(&[
                "convert",
                text(&from),
                "--target",
                target,
                "-o",
                text(&to),
                "--data",
                text(&fixture("data/digits")),
            ]);
            from = if to.is_dir() { to.join("model.onnx") } else { to };
            let found = everything(&from);
            for (at, (codes, scales, zeros)) in &want {
                let (other, others, zero) = found.get(at).unwrap_or_else(|| panic!("{target}: {at:?} is gone"));
                assert!(
                    codes == other && scales == others && zeros == zero,
                    "{scheme}, step {step} to {target}: {at:?} changed"
                );
            }
        }
    }
}

#[test]
fn what_cannot_be_said_in_a_dialect_names_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let blocks = quantize(folder.path(), "digits-resnet", "onnx-qdq", "w4a16g32");
    let usual = quantize(folder.path(), "digits-resnet", "ort-cpu", "w8a8");
    let never = folder.path().join("never");
    let float = fixture("models/digits-resnet.onnx");
    for (from, target, code, wanted) in [
        (&blocks, "qonnx", 3, "scales of blocks cannot be said"),
        (&usual, "tensorrt", 3, "OQ8301"),
        (&usual, "hls4ml", 3, "OQ8423"),
        (&usual, "tract", 3, "OQ8502"),
        (&float, "qonnx", 2, "onnx-quant quantize"),
    ] {
        let output = tool(&["convert", text(from), "--target", target, "-o", text(&never)]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{target}: {error}");
        assert!(error.contains(wanted) && !never.exists(), "{target} should say `{wanted}`: {error}");
    }
    // Symmetric codes are taken; biases become float.
    let symmetric = quantize(folder.path(), "digits-resnet", "vitisai", "w8a8");
    tool_ok(&[
        "convert",
        text(&symmetric),
        "--target",
        "tensorrt",
        "-o",
        text(&never),
        "--data",
        text(&fixture("data/digits")),
    ]);
}

/// The memories hold the codes, whatever their form; the C header too.
#[test]
fn memories_hold_the_codes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("rtl");
    let (model, data) = (fixture("models/digits-mobilenet.onnx"), fixture("data/digits"));
    let layout = "pe=2,simd=3,format=mem,format=coe,format=mif,format=hex,format=dat";
    let args =
        ["quantize", text(&model), "--data", text(&data), "--target", "rtl-mem", "--scheme", "w6a6", "-o", text(&out)];
    tool_ok(&[&args[..], &["--memory", layout, "--progress", "none"]].concat());
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("manifest.json")).unwrap()).unwrap();
    let codes = weights(&out.join("model.onnx"));
    let entries = manifest["memories"].as_array().unwrap();
    assert_eq!(entries.iter().filter(|e| e["role"] == "weight").count(), 5 * codes.len());
    for entry in entries.iter().filter(|e| e["role"] == "weight") {
        let file = entry["file"].as_str().unwrap();
        let source = std::fs::read_to_string(out.join(file)).unwrap();
        let words: Vec<String> = match file.rsplit('.').next().unwrap() {
            "mem" | "dat" => source.lines().map(str::to_owned).collect(),
            "coe" => source
                .split("vector=")
                .nth(1)
                .unwrap()
                .trim()
                .trim_end_matches(';')
                .split(',')
                .map(|w| w.trim().to_owned())
                .collect(),
            "mif" => source
                .lines()
                .filter_map(|line| Some(line.split_once(" : ")?.1.trim_end_matches(';').to_owned()))
                .collect(),
            _ => source
                .lines()
                .filter(|line| line[7..9] == *"00")
                .map(|line| line[9..line.len() - 2].to_lowercase())
                .collect(),
        };
        let number = |key: &str| usize::try_from(entry[key].as_u64().unwrap()).unwrap();
        let (pe, simd, bits) = (number("pe"), number("simd"), number("bits"));
        let tensor = &codes[entry["node"].as_str().unwrap()];
        let (values, rows) = (tensor.integers().unwrap(), tensor.shape()[0]);
        let columns = values.len() / rows;
        let groups = columns.div_ceil(simd);
        assert_eq!(words.len(), rows.div_ceil(pe) * groups, "{file}");
        for (at, value) in values.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let word = u128::from_str_radix(&words[row / pe * groups + column / simd], 16).unwrap();
            let lane = (row % pe * simd + column % simd) * bits;
            let code = i64::try_from(word >> lane & ((1 << bits) - 1)).unwrap();
            let signed = if code >> (bits - 1) == 1 { code - (1 << bits) } else { code };
            assert_eq!(signed, *value, "{file} {row} {column}");
        }
    }
    let header = std::fs::read_to_string(out.join("weights.h")).unwrap();
    assert!(header.contains("static const int8_t") && header.contains("_scale[1]"));
}

/// On processors whose kernels add two products in 16 bits, none can overflow.
#[test]
fn pairs_of_products_cannot_saturate_without_vnni() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    tool_ok(&[
        "quantize",
        text(&model),
        "--data",
        text(&data),
        "--cpu",
        "avx2",
        "-o",
        text(&out),
        "--progress",
        "none",
    ]);
    let codes = weights(&out);
    assert_eq!(codes.len(), 10);
    for tensor in codes.values() {
        assert!(tensor.integers().unwrap().iter().all(|code| (-64..=63).contains(code)));
    }
}

/// Operators on codes go out and come back.
#[test]
fn operators_on_codes_convert_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let first = quantize(folder.path(), "digits-resnet", "ort-cpu", "w8a8");
    let (there, back) = (folder.path().join("there.onnx"), folder.path().join("back.onnx"));
    let data = fixture("data/digits");
    tool_ok(&["convert", text(&first), "--target", "qoperator", "-o", text(&there), "--data", text(&data)]);
    let model = onnx_quant::import::file(&there).unwrap().model;
    let count = |op: &str| model.graph().nodes().filter(|(_, node)| node.op.is(op)).count();
    assert_eq!((count("QLinearConv"), count("Conv")), (9, 0));
    tool_ok(&["convert", text(&there), "--target", "ort-cpu", "-o", text(&back), "--data", text(&data)]);
    assert_eq!(weights(&back), weights(&first));
}

/// A folder takes the place of one of ours or of none: weights that lie beside a model are not lost.
#[test]
fn folders_of_others_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let out = quantize(folder.path(), "digits-mobilenet", "packed", "w8a8");
    let (model, data) = (fixture("models/digits-mobilenet.onnx"), fixture("data/digits"));
    let again = |model: &Path, out: &Path| {
        tool(&[
            "quantize",
            text(model),
            "--data",
            text(&data),
            "--target",
            "packed",
            "-o",
            text(out),
            "--progress",
            "none",
        ])
    };
    std::fs::write(out.join("stale.mem"), "1").unwrap();
    assert!(again(&model, &out).status.success() && !out.join("stale.mem").exists(), "ours is replaced whole");
    let (theirs, file) = (folder.path().join("theirs"), folder.path().join("file"));
    std::fs::create_dir(&theirs).unwrap();
    std::fs::write(theirs.join("model.safetensors"), "weights").unwrap();
    std::fs::write(&file, "text").unwrap();
    for out in [&theirs, &file, &out.join("model.onnx")] {
        assert_eq!(again(&model, out).status.code(), Some(2), "{}", out.display());
    }
    assert_eq!(again(&out.join("model.onnx"), &out).status.code(), Some(2), "the input lies there");
    assert_eq!(std::fs::read(theirs.join("model.safetensors")).unwrap(), b"weights");
}

/// Weights that memories would hold wrong are refused by name.
#[test]
fn memories_have_no_zero_points() {
    let folder = tempfile::tempdir().unwrap();
    let (source, model) = (folder.path().join("m.oq"), folder.path().join("m.onnx"));
    std::fs::write(
        &source,
        "opset 21\ngraph (%x: f32[1,2]) -> (%y) {\n  %c = const u8[2,2] [129, 127, 128, 130]\n  %s = const f32[] [0.5]\n  %z = const u8[] \
         [128]\n  %w = DequantizeLinear(%c, %s, %z)\n  %y = MatMul(%x, %w)\n}\n",
    )
    .unwrap();
    tool_ok(&["cat", text(&source), "--to", "onnx", "-o", text(&model)]);
    let output = tool(&["convert", text(&model), "--target", "rtl-mem", "-o", text(&folder.path().join("rtl"))]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("zero points") && error.contains("MatMul"), "{error}");
}

/// Every graph that breaks a rule, and every one that a pass is tried on, converts or is refused: nothing panics.
#[test]
fn odd_graphs_convert_or_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let graphs =
        ["lint", "passes/absorb-qdq", "passes/expand-qoperators"].map(|name| std::fs::read_dir(fixture(name)).unwrap());
    for path in graphs.into_iter().flatten().map(|entry| entry.unwrap().path()) {
        let model = folder.path().join("model.onnx");
        let readable = path.extension().is_some_and(|e| e == "oq")
            && tool(&["cat", text(&path), "--to", "onnx", "-o", text(&model)]).status.success();
        for target in ["onnx-qdq", "qoperator", "tensorrt", "qonnx", "rtl-mem", "packed"].iter().filter(|_| readable) {
            let out = folder.path().join(format!("{target}.out"));
            let output = tool(&["convert", text(&model), "--target", target, "-o", text(&out)]);
            let error = String::from_utf8_lossy(&output.stderr);
            let known = matches!(output.status.code(), Some(0..=4)) && !error.contains("a bug in");
            assert!(known, "{} to {target}: {error}", path.display());
        }
    }
}

#[test]
fn means_are_cut_off_for_finn() {
    let folder = tempfile::tempdir().unwrap();
    let (source, plain) = (folder.path().join("pools.oq"), folder.path().join("pools.onnx"));
    let graph = "opset 13
graph (%input: f32[batch,1,28,28]) -> (%y: f32[batch,3]) {
  %w = const f32[2,1,3,3] rand(seed=3, std=0.4)
  %v = const f32[128,3] rand(seed=5, std=0.1)
  %c = Conv(%input, %w) {kernel_shape=[3,3], pads=[1,1,1,1]}
  %r = Relu(%c)
  %odd = AveragePool(%r) {kernel_shape=[3,3], strides=[3,3], pads=[1,1,1,1]}
  %p = AveragePool(%odd) {kernel_shape=[2,2], strides=[1,1]}
  %q = MaxPool(%p) {kernel_shape=[2,2], strides=[1,1]}
  %f = Flatten(%q) {axis=1}
  %y = MatMul(%f, %v)
}
";
    std::fs::write(&source, graph).unwrap();
    tool_ok(&["cat", text(&source), "--to", "onnx", "-o", text(&plain)]);
    let out = folder.path().join("finn.onnx");
    let data = fixture("data/digits");
    let args = ["--data", text(&data), "--target", "finn", "--scheme", "w4a4", "--progress", "none"];
    // What is read back is compared with the plan: a failure would end with code 1.
    tool_ok(&[&["quantize", text(&plain), "-o", text(&out)], &args[..]].concat());
    let written = onnx_quant::import::file(&out).unwrap().model;
    let named = |name: &str| written.graph().nodes().filter(|(_, node)| &*node.op.name == name).count();
    // Nine elements are no power of two, and lie outside at the border.
    assert_eq!((named("AveragePool"), named("Trunc"), named("Mul")), (2, 1, 1));
    // Elsewhere a mean rounds to nearest: the shift stays in the graph.
    let other = folder.path().join("qdq.onnx");
    tool_ok(&["convert", text(&out), "--target", "onnx-qdq", "-o", text(&other)]);
    let back = folder.path().join("back.onnx");
    tool_ok(&["convert", text(&other), "--target", "finn", "-o", text(&back)]);
    let again = onnx_quant::import::file(&back).unwrap().model;
    assert_eq!(again.graph().nodes().filter(|(_, node)| &*node.op.name == "Trunc").count(), 1);
}

#[test]
fn learning_plans_within_a_drop_from_its_own_codes_only() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let out = folder.path().join("x.onnx");
    let base = ["quantize", text(&model), "--data", text(&data), "--target", "onnx-qdq", "--scheme", "w3a8"];
    let more =
        ["--recipe", "best", "--learn", "brecq{iterations=10}", "--max-drop", "0.001", "--json", "--progress", "none"];
    let told = |how: &[&str]| {
        let output = tool(&[&base[..], &more[..], how].concat());
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (told["fidelity"].clone(), told["layers"].clone())
    };
    // Without an output there is no journal.
    assert_eq!(told(&["--dry-run"]), told(&["-o", text(&out)]));
}

/// Ranges per token need nodes that compute them: who takes constants only is told so before anything is lowered, with the node, the
/// rule and the way out; who takes them is told that it is slow, not that constants should be folded.
#[test]
fn ranges_per_token_convert_to_who_takes_them_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = format!(
        "opset 21\ngraph (%x: f32[batch,seq,32]) -> (%y) {{\n{}  %y = MatMul(%x, %w)\n}}\n",
        super::equalize::matrix("w", 32, 16)
    );
    std::fs::write(path("model.oq"), source).unwrap();
    tool_ok(&["cat", text(&path("model.oq")), "--to", "onnx", "-o", text(&path("model.onnx"))]);
    let (model, tokens, out) = (path("model.onnx"), path("tokens.onnx"), path("out"));
    let args = ["quantize", text(&model), "-o", text(&tokens), "--recipe", "fast", "--progress", "none"];
    tool_ok(&[&args[..], &["--target", "onnx-qdq", "--scheme", "w8a8tok"]].concat());
    for target in onnx_quant::targets::TARGETS.iter().map(|target| target.info().about.name) {
        let output = tool(&["convert", text(&tokens), "--target", target, "-o", text(&out)]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match target {
            "ort-cpu" | "onnx-qdq" => {
                assert!(output.status.success(), "{target}: {said}");
                std::fs::remove_file(&out).unwrap();
            }
            "packed" => {
                assert!(output.status.success(), "{target}: {said}");
                std::fs::remove_dir_all(&out).unwrap();
            }
            _ => {
                assert_eq!(output.status.code(), Some(3), "{target}: {said}");
                assert!(said.contains("OQ8010") && said.contains("tensor `x`") && !out.exists(), "{target}: {said}");
                let way_out = said.contains("--target ort-cpu or onnx-qdq");
                assert!(said.contains("node `x.quantize`") && way_out, "{target}: {said}");
            }
        }
    }
    let linted = tool_ok(&["lint", text(&tokens), "--target", "onnx-qdq"]);
    assert!(linted.contains("OQ8009") && !linted.contains("OQ8007") && !linted.contains("fold constants"), "{linted}");
}
