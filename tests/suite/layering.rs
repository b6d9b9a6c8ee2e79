//! What each crate must not mention.

use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            files.extend(sources(&entry));
        } else if entry.extension().is_some_and(|e| e == "rs") {
            files.push(entry);
        }
    }
    files
}

fn check(folder: &str, forbidden: &[&str]) {
    for file in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
        let source = std::fs::read_to_string(&file).unwrap();
        for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for word in forbidden {
                assert!(!line.contains(word), "{} mentions {word}: {line}", file.display());
            }
        }
    }
}

#[test]
fn the_middle_knows_no_files_no_clock_and_no_protobuf() {
    check("passes/src", &["std::fs", "std::env", "Instant::now", "HashMap", "HashSet", "prost", "println!", "ort-cpu"]);
}

#[test]
fn the_wire_knows_no_graphs_and_no_files() {
    check("proto/src", &["std::fs", "passes::", "HashMap"]);
}

/// The stages of the middle meet in the model and do not use one another.
#[test]
fn stages_do_not_use_one_another() {
    let stages = ["normalize", "calibrate", "analysis", "rounding", "correct", "lower"];
    for stage in stages {
        let others: Vec<String> = stages.iter().filter(|s| **s != stage).map(|s| format!("crate::{s}")).collect();
        let forbidden: Vec<&str> = others.iter().map(String::as_str).collect();
        check(&format!("passes/src/{stage}"), &forbidden);
    }
}

#[test]
fn no_target_is_named_by_an_executor_or_the_importer() {
    check("src/exec", &["targets::"]);
    check("src/import", &["targets::"]);
}
