//! Mixed precision: budgets hold, losses stay under what is allowed, and names get what was asked for them.

use serde_json::Value;

use super::{fixture, text, tool};

/// Exit code, summary and messages of a run on the small residual network.
fn run(extra: &[&str]) -> (Option<i32>, Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("q.onnx");
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let base = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--json", "--progress", "none"];
    let output = tool(&[&base[..], extra].concat());
    let summary = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code(), summary, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn done(extra: &[&str]) -> Value {
    let (code, summary, error) = run(extra);
    assert_eq!(code, Some(0), "{extra:?}: {error}");
    assert_eq!(summary["verify"]["passed"], true);
    summary
}

/// Elements of the weights of the layers that have any, in graph order.
const WEIGHTS: [(&str, f64); 10] = [
    ("/0/Conv", 144.0),
    ("/3/c1/Conv", 2304.0),
    ("/3/c2/Conv", 2304.0),
    ("/4/c1/Conv", 4608.0),
    ("/4/c2/Conv", 9216.0),
    ("/4/d/d.0/Conv", 512.0),
    ("/5/c1/Conv", 18432.0),
    ("/5/c2/Conv", 36864.0),
    ("/5/d/d.0/Conv", 2048.0),
    ("/8/Gemm", 640.0),
];

fn bits(summary: &Value, name: &str) -> f64 {
    let layers = summary["layers"].as_array().unwrap();
    let layer = layers.iter().find(|layer| layer["name"] == name).unwrap();
    let format = layer["weight"]["format"].as_str().unwrap();
    format.trim_start_matches("int").trim_end_matches("-in-4").parse().unwrap()
}

fn mean_bits(summary: &Value) -> f64 {
    let total: f64 = WEIGHTS.iter().map(|(_, n)| n).sum();
    WEIGHTS.iter().map(|(name, n)| bits(summary, name) * n).sum::<f64>() / total
}

fn decibels(summary: &Value) -> f64 {
    summary["fidelity"]["sqnr_db"].as_f64().unwrap()
}

#[test]
fn a_budget_is_spent_where_it_helps_and_never_exceeded() {
    let four = done(&["--scheme", "w4a8"]);
    let mut last = decibels(&four);
    for budget in ["4.5", "5", "6.5"] {
        let mixed = done(&["--scheme", "w4a8", "--budget", budget]);
        let mean = mean_bits(&mixed);
        assert!(mean <= budget.parse::<f64>().unwrap() && mean > 4.0, "{budget}: {mean}");
        assert!(decibels(&mixed) > last, "{budget}: {} after {last}", decibels(&mixed));
        last = decibels(&mixed);
    }
    let fewer = done(&["--scheme", "w8a8", "--budget", "6"]);
    assert!(mean_bits(&fewer) <= 6.0, "bits go down from those of the scheme too");
}

/// Operators on bytes take no zero points that differ by channel.
#[test]
fn what_is_given_eight_bits_has_no_zero_points_beside_codes() {
    let four = ["--scheme", "w4a8asym", "--target", "onnx-qdq"];
    let mixed = done(&[&four[..], &["--budget", "5"]].concat());
    assert!(decibels(&mixed) > decibels(&done(&four)));
    let layers = mixed["layers"].as_array().unwrap();
    let mut formats: Vec<&str> = layers.iter().filter_map(|layer| layer["weight"]["format"].as_str()).collect();
    formats.sort_unstable();
    formats.dedup();
    assert!(formats.contains(&"uint4") && formats.contains(&"int8"), "{formats:?}");
    assert!(!formats.iter().any(|format| ["uint5", "uint6", "uint7", "uint8"].contains(format)), "{formats:?}");
}

/// The share of the loss in the fewest bits that the reason of the layer called `name` states, in percent.
fn share(summary: &Value, name: &str) -> f64 {
    let layers = summary["layers"].as_array().unwrap();
    let reason = layers.iter().find(|layer| layer["name"] == name).unwrap()["reason"].as_str().unwrap();
    let (_, share) = reason.split_once("it alone makes ").unwrap();
    share.split(' ').next().unwrap().parse().unwrap()
}

/// Gradients of all weights at once tell what runs of the model, one per weight, do.
#[test]
fn gradients_find_the_layers_that_probes_find() {
    let by = |metric: &str| done(&["--scheme", "w4a8", "--budget", "5", "--sensitivity", metric]);
    let (probed, fisher) = (by("kl-top"), by("fisher"));
    let (four, eight) = (done(&["--scheme", "w4a8"]), mean_bits(&fisher));
    assert!(eight > 4.0 && eight <= 5.0, "{eight}");
    assert!(decibels(&fisher) > decibels(&four), "{} {}", decibels(&fisher), decibels(&four));
    let ratio = |(name, _): &(&str, f64)| (share(&fisher, name) / share(&probed, name)).ln();
    let apart: Vec<f64> = WEIGHTS.iter().map(ratio).collect();
    let mean_square = apart.iter().map(|ratio| ratio * ratio).sum::<f64>() / apart.len() as f64;
    assert!(mean_square.sqrt() < 3.0_f64.ln(), "usually within a factor of 3: {apart:?}");
    let alone = done(&["--scheme", "w4a8", "--budget", "5", "--sensitivity", "fisher", "--threads", "1"]);
    assert_eq!(alone["layers"], fisher["layers"], "the same on one thread");
    for (options, wanted) in
        [(&[][..], "give that too"), (&["--budget", "5", "--max-drop", "1%"], "for --budget alone")]
    {
        let (code, _, error) = run(&[&["--scheme", "w4a8", "--sensitivity", "fisher"], options].concat());
        assert!(code == Some(2) && error.contains(wanted), "{code:?} {error}");
    }
}

/// Gradients by size, with or without the weight, and what layers return: whatever a budget gives, a larger one gives too.
#[test]
fn larger_budgets_never_give_a_weight_fewer_bits() {
    for metric in ["tacq", "gradient-l1", "weights", "moments", "pivots"] {
        let mut last = [0.0; WEIGHTS.len()];
        for budget in ["4", "4.6", "5.5", "7"] {
            let summary = done(&["--scheme", "w4a8", "--budget", budget, "--sensitivity", metric]);
            let mean = mean_bits(&summary);
            assert!(mean <= budget.parse::<f64>().unwrap(), "{metric} {budget}: {mean}");
            let given = WEIGHTS.map(|(name, _)| bits(&summary, name));
            assert!(
                given.iter().zip(&last).all(|(now, before)| now >= before),
                "{metric} {budget}: {given:?} after {last:?}"
            );
            last = given;
        }
        assert!(last.iter().any(|bits| *bits > 4.0), "{metric}: {last:?}");
        let budget =
            |threads: &str| done(&["--scheme", "w4a8", "--budget", "5", "--sensitivity", metric, "--threads", threads]);
        assert_eq!(budget("1")["layers"], budget("3")["layers"], "{metric} on any number of threads");
    }
}

/// Before anything is rounded, layers are expected to lose what they lose once GPTQ has rounded them; what runs tell falls by either.
#[test]
fn what_layers_return_tells_which_weights_need_bits() {
    let by = |metric: &str| done(&["--scheme", "w4a8", "--budget", "5", "--sensitivity", metric]);
    let (solved, expected) = (by("moments"), by("pivots"));
    let four = decibels(&done(&["--scheme", "w4a8"]));
    let ratio = |(name, _): &(&str, f64)| (share(&solved, name) / share(&expected, name)).ln();
    let apart: Vec<f64> = WEIGHTS.iter().map(ratio).collect();
    let mean_square = apart.iter().map(|ratio| ratio * ratio).sum::<f64>() / apart.len() as f64;
    assert!(mean_square.sqrt() < 2.0_f64.ln(), "usually within a factor of 2: {apart:?}");
    for mixed in [&solved, &expected] {
        assert!(mean_bits(mixed) > 4.0 && decibels(mixed) > four, "{} {four}", decibels(mixed));
    }
    let pipeline = solved["pipeline"].as_str().unwrap();
    for shares in ["squares", "moments", "pivots"] {
        let text = pipeline.replace("metric=moments", &format!("metric=error, shares={shares}"));
        let mixed = done(&["--scheme", "w4a8", "--pipeline", &text]);
        assert!((4.0..=5.0).contains(&mean_bits(&mixed)) && decibels(&mixed) > four, "{shares}: {}", decibels(&mixed));
    }
    for (from, to, wanted) in [
        ("metric=moments", "metric=error, shares=weights", "none of squares, moments, pivots"),
        ("metric=moments", "metric=moments, shares=pivots", "leave it out"),
        ("budget=5, metric=moments", "max-drop=0.01, metric=moments", "give a budget"),
    ] {
        assert!(pipeline.contains(from), "{pipeline}");
        let (code, _, error) = run(&["--scheme", "w4a8", "--pipeline", &pipeline.replace(from, to)]);
        assert!(code == Some(2) && error.contains(wanted), "{code:?} {error}");
    }
}

/// Every weight tells what rounding it costs to first order; fewer bits cost more, and what is usual is less than the most.
#[test]
fn gradients_tell_what_rounding_costs_at_every_layer() {
    let costs = |scheme: &str, threads: &str| -> Vec<(Value, Value)> {
        let summary = done(&["--scheme", scheme, "--first-order", "--threads", threads]);
        let layers = summary["layers"].as_array().unwrap().clone();
        let layer = |name: &str| layers.iter().find(|layer| layer["name"] == name).unwrap()["first_order"].clone();
        WEIGHTS.iter().map(|(name, _)| (layer(name)["weight"].clone(), layer(name)["activation"].clone())).collect()
    };
    let number = |cost: &Value, key: &str| cost[key].as_f64().unwrap();
    let (eight, four) = (costs("w8a8", "2"), costs("w4a8", "2"));
    for ((eight, four), (name, _)) in eight.iter().zip(&four).zip(WEIGHTS) {
        let [few, many] = [&eight.0, &four.0].map(|cost| number(cost, "usual"));
        assert!(few > 0.0 && many > 4.0 * few, "{name}: {few} in eight bits, {many} in four");
        assert!(number(&four.0, "most") > many, "{name}: {four:?}");
    }
    // Nothing before the first layer gets a gradient.
    assert!(eight[0].1.is_null() && eight[1..].iter().all(|(_, read)| number(read, "usual") > 0.0), "{eight:?}");
    assert_eq!(costs("w4a8", "1"), four, "the same on one thread");
    assert!(done(&["--scheme", "w4a8"])["layers"][0]["first_order"].is_null());
}

#[test]
fn a_budget_that_cannot_be_met_names_the_least() {
    let (code, _, error) = run(&["--scheme", "w4a8", "--budget", "3"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("4 bits are the fewest") && error.contains("fewer bits"), "{error}");
    let (code, _, error) = run(&["--scheme", "wfp4a16", "--budget", "5"]);
    assert!(code == Some(2) && error.contains("only integer weights"), "{code:?} {error}");
}

/// What a pipeline has no place for is refused, not left out.
#[test]
fn pipelines_without_a_place_for_it_are_refused() {
    let plain = "infer-shapes, fold-batch-norm, drop-dead";
    for (options, wanted) in
        [(["--budget", "5"], "behind `assign-encodings`"), (["--max-drop", "1%"], "behind the last `calibrate`")]
    {
        let (code, _, error) = run(&[&["--pipeline", plain], &options[..]].concat());
        assert!(code == Some(2) && error.contains(wanted), "{options:?}: {code:?} {error}");
    }
}

#[test]
fn what_may_be_lost_is_not_exceeded() {
    // 0.01 % is 40 dB: more than eight bits everywhere give.
    let (usual, kept) = (done(&[]), done(&["--max-drop", "0.01%"]));
    assert!(decibels(&usual) < 40.0 && decibels(&kept) >= 40.0, "{} {}", decibels(&usual), decibels(&kept));
    let layers = kept["layers"].as_array().unwrap();
    let reasons = layers.iter().filter(|layer| layer["reason"].as_str().unwrap().contains("--max-drop 0.0001"));
    let n = reasons.count();
    assert!(n > 0 && n < layers.len() / 2, "{n} of {} in float", layers.len());
    // What holds anyway changes nothing.
    assert_eq!(done(&["--max-drop", "1%"])["layers"], usual["layers"]);
}

#[test]
fn weights_rise_before_nodes_go_to_float() {
    let summary = done(&["--scheme", "w4a8", "--max-drop", "0.3%"]);
    assert!(decibels(&summary) >= 25.2, "{}", decibels(&summary));
    assert_eq!(summary["totals"]["kept_float"], 0);
    assert!(mean_bits(&summary) > 4.0 && mean_bits(&summary) < 8.0);
}

#[test]
fn names_get_what_was_asked_for_them() {
    let summary =
        done(&["--scheme", "w4a8", "--set", "/8/Gemm=w8a8", "--set", "5.c1.weight=w2a8", "--set", "/0/*=float"]);
    let of = |name: &str| bits(&summary, name);
    assert!((of("/8/Gemm"), of("/5/c1/Conv"), of("/5/c2/Conv")) == (8.0, 2.0, 4.0));
    let first = &summary["layers"][0];
    assert!(first["kept_float"].as_bool().unwrap() && first["reason"].as_str().unwrap().contains("--set /0/*=float"));
    assert!(
        summary["layers"].as_array().unwrap().iter().any(|l| l["reason"].as_str().unwrap().contains("w8a8 by `--set`"))
    );
    // The last one counts.
    let summary = done(&["--scheme", "w4a8", "--set", "/8/*=float", "--set", "/8/Gemm=w8a8"]);
    assert!((bits(&summary, "/8/Gemm") - 8.0).abs() < 1e-9);
    // A budget does not touch them.
    let summary = done(&["--scheme", "w4a8", "--set", "5.c1.weight=w2a8", "--budget", "6"]);
    assert!((bits(&summary, "/5/c1/Conv") - 2.0).abs() < 1e-9);
    for (set, code, wanted) in [
        ("/8/Gem=w8a8", 2, "did you mean `/8/Gemm`"),
        ("/8/Gemm=w8a16", 3, "only weights can differ"),
        ("/8/Gemm=int8", 2, "is no scheme"),
        ("/2/Relu=w8a8", 2, "changes nothing: `/2/Relu`"),
    ] {
        let (got, _, error) = run(&["--scheme", "w4a8", "--set", set]);
        assert!(got == Some(code) && error.contains(wanted), "{set}: {got:?} {error}");
    }
}
