//! A run that was killed goes on from its journal and writes the very bytes of one that never was.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{fixture, text, tool, tool_ok};

const LEARN: &str = "brecq{iterations=40, layers=2}";

fn arguments(output: &Path, learn: &'static str) -> Vec<String> {
    let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
    let words = [
        "quantize",
        text(&model),
        "--data",
        text(&data),
        "-o",
        text(output),
        "--target",
        "onnx-qdq",
        "--scheme",
        "w3a8",
        "--recipe",
        "best",
        "--learn",
        learn,
        "--distill",
        "latent{iterations=10, batch=8}",
        "--progress",
        "none",
    ];
    words.map(str::to_owned).to_vec()
}

fn run(arguments: &[String]) {
    tool_ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Starts a run and kills it once its journal has grown so many times; whether it was still running then.
fn killed(arguments: &[String], journal: &Path, times: usize) -> bool {
    let (mut size, mut grown) = (0, 0);
    killed_once(arguments, || {
        let now = std::fs::metadata(journal).map_or(0, |data| data.len());
        grown += usize::from(now > size);
        size = size.max(now);
        grown >= times
    })
}

/// Starts a run and kills it once the file at `path` has been written so many times; whether it was still running then.
fn killed_at(arguments: &[String], path: &Path, times: usize) -> bool {
    let modified = || std::fs::metadata(path).and_then(|data| data.modified()).ok();
    let (mut last, mut written) = (modified(), 0);
    killed_once(arguments, || {
        let now = modified();
        written += usize::from(now != last);
        last = now;
        written >= times
    })
}

/// Starts a run and kills it when `is_time` says so; whether it was still running then.
fn killed_once(arguments: &[String], mut is_time: impl FnMut() -> bool) -> bool {
    let mut child = Command::new(env!("CARGO_BIN_EXE_onnx-quant"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_mins(10);
    while !is_time() && Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap(); // SIGKILL on Unix
    child.wait().unwrap();
    true
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.onnx");
    run(&arguments(&whole, LEARN));
    let wanted = std::fs::read(&whole).unwrap();
    assert!(!journal_of(&whole).exists(), "it is taken away once all is written");
    for times in [2, 4] {
        let output = folder.path().join("killed.onnx");
        let words = arguments(&output, LEARN);
        assert!(killed(&words, &journal_of(&output), times), "it ended before it could be killed");
        assert!(!output.exists() && journal_of(&output).exists());
        // Another thread count, and a longer report: the bytes do not depend on that.
        run(&[&words[..], &["--resume", "--threads", "1", "--first-order"].map(str::to_owned)].concat());
        assert_eq!(std::fs::read(&output).unwrap(), wanted, "killed after {times}");
        assert!(!journal_of(&output).exists());
        std::fs::remove_file(&output).unwrap();
    }
}

/// Learning the whole model is one answer that takes long: where it stands is kept at every check.
#[test]
fn a_run_killed_while_it_learns_the_whole_model_goes_on_from_its_last_check() {
    let folder = tempfile::tempdir().unwrap();
    // The second draws what it starts with, and learns scales of activations too.
    let ways = ["brecq{iterations=60, batch=16, rate=0.5}", "lrq{iterations=60, batch=8, loss=mse, steps=1, drop=0.3}"];
    let mut learned = Vec::new();
    for distill in ways {
        let arguments = |output: &Path| {
            let (model, data) = (fixture("models/digits-resnet.onnx"), fixture("data/digits"));
            let words = ["quantize", text(&model), "--data", text(&data), "-o", text(output), "--progress", "none"];
            let more = ["--scheme", "w2a4", "--recipe", "best", "--distill", distill];
            words.into_iter().chain(more).map(str::to_owned).collect::<Vec<String>>()
        };
        let whole = folder.path().join("whole.onnx");
        run(&arguments(&whole));
        let wanted = std::fs::read(&whole).unwrap();
        let output = folder.path().join("killed.onnx");
        let state = PathBuf::from(format!("{}.state", journal_of(&output).display()));
        let words = arguments(&output);
        // Killed twice: what goes on is kept again.
        for checks in [1, 2] {
            assert!(killed_at(&words, &state, checks), "{distill}: it ended before it could be killed");
            assert!(!output.exists() && journal_of(&output).exists() && state.exists());
        }
        let again = Command::new(env!("CARGO_BIN_EXE_onnx-quant"))
            .args(words.iter().map(String::as_str).chain(["--resume", "--threads", "1"]))
            .env("ONNX_QUANT_LOG", "debug")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(again.status.success() && said.contains("goes on from its last check"), "{said}");
        assert!(String::from_utf8_lossy(&again.stdout).contains("OQ5002"));
        assert_eq!(std::fs::read(&output).unwrap(), wanted, "{distill}");
        assert!(!journal_of(&output).exists() && !state.exists());
        std::fs::remove_file(&output).unwrap();
        learned.push(wanted);
    }
    assert!(learned[0] != learned[1], "neither has learned anything");
}

#[test]
fn a_journal_of_other_options_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("a.onnx");
    let words = arguments(&output, LEARN);
    let missing = tool(&[&words.iter().map(String::as_str).collect::<Vec<_>>()[..], &["--resume"]].concat());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("there is no journal"));
    assert!(killed(&words, &journal_of(&output), 2));
    let other = arguments(&output, "brecq{iterations=41, layers=2}");
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    let refused = tool(&other);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("other options") && said.contains("--fresh"), "{said}");
    tool_ok(&[&other[..], &["--fresh"]].concat());
}

fn journal_of(output: &Path) -> PathBuf {
    PathBuf::from(format!("{}.journal", output.display()))
}
