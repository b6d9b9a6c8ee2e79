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
    let mut child = Command::new(env!("CARGO_BIN_EXE_onnx-quant"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_mins(2);
    let (mut size, mut grown) = (0, 0);
    while grown < times && Instant::now() < deadline {
        let now = std::fs::metadata(journal).map_or(0, |data| data.len());
        grown += usize::from(now > size);
        size = size.max(now);
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
        // Another thread count: the bytes do not depend on that.
        run(&[&words[..], &["--resume".to_owned(), "--threads".to_owned(), "1".to_owned()]].concat());
        assert_eq!(std::fs::read(&output).unwrap(), wanted, "killed after {times}");
        assert!(!journal_of(&output).exists());
        std::fs::remove_file(&output).unwrap();
    }
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
