//! Codes learned by gradients, on the small residual network.

use onnx_quant::{exec, import};
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::reconstruct;

use super::{fixture, text, tool, tool_ok};

fn quantize(out: &std::path::Path, more: &[&str]) -> String {
    quantize_by("best", out, more)
}

fn quantize_by(recipe: &str, out: &std::path::Path, more: &[&str]) -> String {
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let args = ["quantize", text(&model), "--data", text(&data), "-o", text(out), "--progress", "none"];
    tool_ok(&[&args[..], &["--recipe", recipe, "--scheme", "w2a8", "--hold-out", "32"], more].concat())
}

/// The decibels of the summary.
fn decibels(summary: &str) -> f64 {
    let line = summary.lines().find(|line| line.starts_with("fidelity")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn learning_lifts_two_bits_and_the_threads_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let learn = ["--learn", "brecq{iterations=400, batch=8}"];
    let plain = quantize(&folder.path().join("plain.onnx"), &[]);
    let files: Vec<(String, Vec<u8>)> = ["1", "3"]
        .iter()
        .map(|threads| {
            let out = folder.path().join(format!("{threads}.onnx"));
            let summary = quantize(&out, &[&learn[..], &["--threads", threads]].concat());
            (summary, std::fs::read(out).unwrap())
        })
        .collect();
    assert!(files[0].1 == files[1].1, "other bytes with other threads");
    let (before, after) = (decibels(&plain), decibels(&files[0].0));
    assert!(after > before, "{before} dB before, {after} dB after");
}

#[test]
fn every_parameterization_runs() {
    let folder = tempfile::tempdir().unwrap();
    for method in reconstruct::PARAMETERIZATIONS {
        let learn = format!("{}{{iterations=4, batch=4, layers=2}}", method.about().name);
        let summary = quantize(&folder.path().join("q.onnx"), &["--learn", &learn, "--samples", "64"]);
        assert!(decibels(&summary) > 10.0, "{}: {summary}", method.about().name);
    }
}

/// The tapes of small blocks one after the other and the tape of the whole model say the same; threads do not matter.
#[test]
fn the_whole_model_is_learned_block_by_block() {
    let folder = tempfile::tempdir().unwrap();
    // Behind `balanced` there is something to learn, whatever last bits say.
    let plain = quantize_by("balanced", &folder.path().join("plain.onnx"), &[]);
    let run = |layers: usize, threads: &str| {
        let out = folder.path().join(format!("{layers}-{threads}.onnx"));
        let distill = format!("brecq{{iterations=60, batch=16, loss=mse, rate=0.5, layers={layers}}}");
        let summary = quantize_by("balanced", &out, &["--distill", &distill, "--threads", threads]);
        (decibels(&summary), std::fs::read(out).unwrap())
    };
    let (by_blocks, bytes) = run(2, "1");
    assert!(bytes == run(2, "3").1, "other bytes with other threads");
    let at_once = run(99, "2").0;
    assert!((by_blocks - at_once).abs() < 0.3, "{by_blocks} dB block by block, {at_once} dB at once");
    assert!(by_blocks > decibels(&plain) + 1.0, "{plain} and {by_blocks} dB");
}

/// What is learned of all weights at once is refused where memory does not hold it, with what takes less; that runs.
#[test]
fn learning_more_than_memory_holds_is_refused() {
    let run = |options: &str, bytes: u64| {
        let imported = import::file(&fixture("models/digits-resnet.onnx")).unwrap();
        let executor = (exec::find("rten").unwrap().build)(&imported.model.meta).unwrap();
        let slots = onnx_quant::dataset::Slot::of(imported.model.graph());
        let mut data = onnx_quant::dataset::Files::open(&fixture("data/digits"), slots, None, None).unwrap();
        data.keep(&(0..16).collect::<Vec<_>>());
        let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], executor.as_ref());
        cx.dataset = Some(&data);
        (cx.lone_budget, cx.pair_budget) = (bytes, bytes);
        let catalogue = passes::catalogue::passes();
        let text = format!(
            "infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes, calibrate, assign-encodings, round, \
             distill{{iterations=2, batch=1{options}}}"
        );
        let pipeline = Pipeline::parse(&text, &catalogue).unwrap();
        PassManager::new(Vec::new(), true)
            .run(&pipeline, imported.model, &mut cx)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let refused = run("", 800_000).unwrap_err();
    assert!(refused.contains("0 MB are left") && refused.contains("codes=0"), "{refused}");
    // Not even a tape that is cut is nothing.
    let refused = run(", codes=0", 100_000).unwrap_err();
    assert!(refused.contains("layers=1") && refused.contains("--max-memory"), "{refused}");
    run(", codes=0, layers=1", 4_000_000).unwrap();
}

#[test]
fn windows_of_blocks_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let run = |learn: &str| {
        let summary = quantize(&out, &["--learn", learn, "--samples", "64"]);
        (decibels(&summary), std::fs::read(&out).unwrap())
    };
    let alone = run("lora-rounding{iterations=20, batch=4, layers=2}").1;
    assert!(alone == run("lora-rounding{iterations=20, batch=4, layers=2, window=1}").1, "a window of one is a block");
    let (db, windows) = run("lora-rounding{iterations=20, batch=4, layers=2, window=2, overlap=1}");
    assert!(db > 10.0 && windows != alone, "{db}");
}

#[test]
fn what_the_rest_of_the_model_makes_of_a_block_counts() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    for loss in ["pd", "kl", "fitting", "fisher-each", "hidden"] {
        let learn = format!("brecq{{iterations=30, batch=8, loss={loss}}}");
        let summary = quantize(&out, &["--learn", &learn, "--samples", "64"]);
        assert!(decibels(&summary) > 10.0, "{loss}: {summary}");
    }
}

/// What errors weigh changes what is learned, and is the same on any number of threads and in windows of blocks.
#[test]
fn errors_weigh_what_the_outputs_depend_on_them() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let run = |options: &str, threads: &str| {
        let learn = format!("brecq{{iterations=30, batch=8, layers=2{options}}}");
        let summary = quantize(&out, &["--learn", &learn, "--samples", "64", "--threads", threads]);
        assert!(decibels(&summary) > 10.0, "{options}: {summary}");
        std::fs::read(&out).unwrap()
    };
    let fisher = run(", loss=fisher", "1");
    assert!(fisher == run(", loss=fisher", "3"), "other bytes with other threads");
    assert!(fisher != run(", loss=mse", "1"), "the same as squares");
    assert!(fisher != run(", loss=fisher, window=2, overlap=1", "2"), "the same in windows");
}

/// A block may read the float model's numbers while it is learned, or both by chance; nothing said is what rounded blocks give.
#[test]
fn a_block_reads_what_was_asked_for_while_it_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let run = |options: &str, threads: &str| {
        let learn = format!("brecq{{iterations=30, batch=8{options}}}");
        let summary = quantize(&out, &["--learn", &learn, "--samples", "64", "--threads", threads]);
        assert!(decibels(&summary) > 10.0, "{options}: {summary}");
        std::fs::read(&out).unwrap()
    };
    let plain = run("", "2");
    assert!(plain == run(", inputs=quantized", "2"), "other bytes where the default is said");
    let (float, mixed) = (run(", inputs=float", "2"), run(", inputs=mixed", "1"));
    assert!(float != plain && mixed != plain && mixed != float, "the same codes whatever is read");
    assert!(mixed == run(", inputs=mixed", "3"), "other bytes with other threads");
    let whole = run(", inputs=mixed, drop=0.5, loss=pd, correct-distribution=1", "2");
    assert!(whole != run(", drop=0.5, loss=pd, correct-distribution=1", "2"));
}

/// Scales of activations are searched behind the rounding of weights, the same ones on any number of threads; biases follow them, corrected or not.
#[test]
fn scales_of_activations_are_searched_by_what_the_outputs_lose() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let run = |search: &str, threads: &str| {
        let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
        let pipeline = format!(
            "infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes, calibrate, assign-encodings, round, correct-bias{search}"
        );
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--samples", "48", "--scheme", "w4a4"];
        let output =
            tool(&[&args[..], &["--target", "onnx-qdq", "--pipeline", &pipeline, "--threads", threads]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (decibels(&String::from_utf8(output.stdout).unwrap()), std::fs::read(&out).unwrap())
    };
    let (plain, _) = run("", "2");
    let (searched, bytes) = run(", search-scales{candidates=11}", "2");
    assert!(searched > plain + 0.3, "{searched} behind {plain} dB");
    assert!(bytes == run(", search-scales{candidates=11}", "1").1, "other bytes with other threads");
}

/// What batch normalizations saw in training outlives folding and equalization; what blocks read moves towards it.
#[test]
fn inputs_move_towards_the_statistics_of_training() {
    let folder = tempfile::tempdir().unwrap();
    let run = |learn: &str, threads: &str| {
        let out = folder.path().join(format!("{threads}.onnx"));
        let summary = quantize(&out, &["--learn", learn, "--samples", "64", "--threads", threads]);
        (decibels(&summary), std::fs::read(out).unwrap())
    };
    let plain = run("brecq{iterations=30, batch=8, loss=pd}", "2").1;
    assert!(plain == run("brecq{iterations=30, batch=8, loss=pd, correct-distribution=0}", "2").1);
    let learn = "brecq{iterations=30, batch=8, loss=pd, correct-distribution=1}";
    let (db, moved) = run(learn, "1");
    assert!(db > 10.0 && moved != plain, "{db} dB");
    assert!(moved == run(learn, "3").1, "other bytes with other threads");
}

/// A file whose exporter folded its batch normalizations says nothing of training: that is refused, and not passed over.
#[test]
fn without_statistics_of_training_nothing_is_moved() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let folded = folder.path().join("folded.onnx");
    let pipeline = "infer-shapes, *(fold-batch-norm, fold-constants, drop-dead)";
    tool_ok(&["opt", text(&model), "--pipeline", pipeline, "-o", text(&folded)]);
    let out = folder.path().join("q.onnx");
    let args =
        ["quantize", text(&folded), "--data", text(&data), "-o", text(&out), "--recipe", "best", "--scheme", "w2a8"];
    let output = tool(&[&args[..], &["--learn", "brecq{iterations=4, correct-distribution=1}"]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("correct-distribution: nothing says"), "{said}");
    assert!(!out.exists());
}

#[test]
fn what_cannot_be_learned_is_refused_with_the_fix() {
    let model = fixture("models/digits-resnet.onnx");
    let data = fixture("data/digits");
    let args = ["quantize", text(&model), "--data", text(&data), "--dry-run", "--learn"];
    let refused = |more: &[&str]| {
        let output = tool(&[&args[..], more].concat());
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["brecq"]).contains("add `--recipe best`"));
    assert!(refused(&["brec", "--recipe", "best"]).contains("brecq, scale-aware, lora-rounding"));
    assert!(refused(&["brecq{iterations=-1}", "--recipe", "best"]).contains("between 0 and"));
    assert!(refused(&["brecq{window=2, overlap=2}", "--recipe", "best"]).contains("fewer than 2"));
    assert!(refused(&["brecq{loss=fish}", "--recipe", "best"]).contains("pd, kl, fisher, fisher-each"));
    assert!(
        refused(&["none", "--recipe", "best", "--distill", "latent{loss=fisher}"]).contains("`fisher` is about blocks")
    );
    assert!(refused(&["brecq{inputs=both}", "--recipe", "best"]).contains("none of quantized, float, mixed"));
    assert!(refused(&["none{inputs=both}", "--recipe", "best"]).contains("none of quantized, float, mixed"));
    assert!(refused(&["none", "--recipe", "best", "--distill", "latent{inputs=mixed}"]).contains("inputs"));
    assert!(refused(&["brecq{correct-distribution=-1}", "--recipe", "best"]).contains("between 0 and"));
    // Where nothing is learned, what is said of learning is checked all the same.
    assert!(refused(&["none{loss=nonsense}", "--recipe", "best"]).contains("pd, kl, fisher, fisher-each"));
    assert!(refused(&["none{correct-distribution=-5}", "--recipe", "best"]).contains("between 0 and"));
    assert!(refused(&["none{correct-distribution=1}", "--recipe", "best"]).contains("say how (learn=brecq)"));
    let distill = tool(&["quantize", text(&model), "--dry-run", "--distill", "latent"]);
    assert!(String::from_utf8(distill.stderr).unwrap().contains("--distill latent needs samples"));
}

/// Two residual blocks, and what lies before and behind them.
#[test]
fn blocks_do_not_cut_residual_sums() {
    let imported = import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let executor = (exec::find("rten").unwrap().build)(&imported.model.meta).unwrap();
    let mut cx = PassContext::new(onnx_quant::targets::TARGETS[0], executor.as_ref());
    let catalogue = passes::catalogue::passes();
    let pipeline =
        Pipeline::parse("infer-shapes, *(fold-batch-norm, fold-constants, drop-dead), infer-shapes", &catalogue);
    let model = PassManager::new(Vec::new(), true).run(&pipeline.unwrap(), imported.model, &mut cx).unwrap().0;
    let graph = model.graph();
    let plan = reconstruct::all_weights(graph);
    for layers in [1, 3, 4, 99] {
        let blocks = reconstruct::blocks(graph, &plan, layers, None);
        let nodes: Vec<_> = blocks.iter().flat_map(|block| block.nodes.iter().copied()).collect();
        assert_eq!(nodes.len(), graph.n_nodes(), "every node is in one block");
        assert_eq!(blocks.iter().map(|block| block.layers).sum::<usize>(), 10);
        for block in &blocks {
            assert_eq!(block.outputs.len(), 1, "one tensor leaves");
            assert_eq!(reconstruct::boundary(graph, &plan, block), None);
            let sums = block.nodes.iter().filter_map(|id| graph.node(*id)).filter(|node| node.op.is("Add"));
            for value in sums.flat_map(|node| node.inputs.iter().flatten()) {
                let (producer, _) = graph.producer(*value).unwrap();
                let before = blocks.iter().any(|other| other.outputs.contains(value));
                assert!(before || block.nodes.contains(&producer));
            }
        }
        assert!(layers < 99 || blocks.len() == 1);
    }
}

#[test]
fn inspect_shows_the_blocks() {
    let model = fixture("models/digits-resnet.onnx");
    let shown = tool_ok(&["inspect", text(&model), "--blocks", "3"]);
    assert!(shown.contains("first node") && shown.lines().count() >= 4, "{shown}");
    let json: serde_json::Value =
        serde_json::from_str(&tool_ok(&["inspect", text(&model), "--blocks", "--json"])).unwrap();
    assert!(json.as_array().unwrap().iter().all(|row| row["boundary"].is_null()));
    // Where the user says so, blocks end elsewhere.
    let ends = ["inspect", text(&model), "--blocks", "--ends", "*/Add", "--json"];
    let named: serde_json::Value = serde_json::from_str(&tool_ok(&ends)).unwrap();
    let of_layers = |json: &serde_json::Value| -> Vec<u64> {
        json.as_array().unwrap().iter().map(|row| row["layers"].as_u64().unwrap()).collect()
    };
    assert_eq!(of_layers(&named), [3, 3, 3, 1], "{named:#}");
    let none = String::from_utf8(tool(&["inspect", text(&model), "--blocks", "--ends", "*/Mul"]).stderr).unwrap();
    assert!(none.contains("no node") && none.contains("*/Mul"), "{none}");
    let folder = tempfile::tempdir().unwrap();
    let quantize_by = |ends: &str| {
        let (data, out) = (fixture("data/digits"), folder.path().join("q.onnx"));
        let learn = format!("brecq{{iterations=4, batch=4, ends={ends}}}");
        let args =
            ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--scheme", "w2a8", "--samples", "32"];
        tool(&[&args[..], &["--recipe", "best", "--learn", &learn, "--progress", "none"]].concat())
    };
    assert!(quantize_by("*/Add").status.success());
    let said = String::from_utf8(quantize_by("*/Mul").stderr).unwrap();
    assert!(said.contains("no node") && said.contains("*/Mul"), "{said}");
}

/// Where rounding tells where weights would go, codes change at a rate at which none does otherwise.
#[test]
fn codes_that_lean_change_first() {
    let folder = tempfile::tempdir().unwrap();
    let (out, report) = (folder.path().join("q.onnx"), folder.path().join("r.json"));
    let distill = "latent{iterations=20, batch=8, rate=0.5, layers=99}";
    quantize(&out, &["--distill", distill, "--report", text(&report), "--samples", "64"]);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert!(report["pipeline"].as_str().unwrap().contains("lean=1"), "{report:#}");
    // Something was learned, and not without codes: the note that says so is told where weights were learned.
    assert!(!report["diagnostics"].to_string().contains("OQ5006"), "{report:#}");
    let still = folder.path().join("still.onnx");
    quantize(&still, &["--samples", "64"]);
    let still = std::fs::read(still).unwrap();
    assert_ne!(std::fs::read(&out).unwrap(), still, "nothing was learned");
    // From a quarter of a step none gets so far.
    let report = folder.path().join("far.json");
    quantize(&out, &["--learn", "none{lean=0}", "--distill", distill, "--report", text(&report), "--samples", "64"]);
    let stayed = std::fs::read_to_string(report).unwrap().contains("OQ5006");
    assert!(stayed || std::fs::read(&out).unwrap() == still);
}
