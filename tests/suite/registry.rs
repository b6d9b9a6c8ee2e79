//! Every listed thing has a name, a document and a source; names are unique and in their form.

use std::collections::BTreeSet;

use onnx_quant::{exec, targets};
use passes::about::About;
use passes::pass::Pipeline;
use passes::target::Goal;
use passes::{catalogue, grid, observe, reconstruct, rounding, sensitivity};

fn everything() -> Vec<&'static About> {
    let passes = catalogue::passes().into_iter().map(|entry| &entry.info.about);
    let observers = observe::OBSERVERS.iter().map(|entry| entry.about);
    let grids = grid::all().map(|grid| &grid.info().about);
    let places = targets::TARGETS.iter().map(|target| &target.info().about);
    let methods = rounding::ROUNDINGS.iter().map(|m| m.about());
    let learned = reconstruct::PARAMETERIZATIONS.iter().map(|p| p.about());
    let passes = passes.chain(methods).chain(learned).chain(sensitivity::all());
    passes.chain(observers).chain(grids).chain(places).chain(exec::EXECUTORS.iter().map(|e| e.about)).collect()
}

#[test]
fn every_entry_is_documented() {
    let mut names = BTreeSet::new();
    for about in everything() {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(about.name.chars().all(plain), "{}", about.name);
        // tract runs float models here, and is a place where quantized ones run.
        assert!(names.insert((about.name, about.source)), "{} is listed twice", about.name);
        assert!(about.summary().len() > 15, "{} has no document", about.name);
        assert!(about.source.len() > 5, "{} has no source", about.name);
    }
}

#[test]
fn every_pipeline_of_every_target_parses_and_meets_its_requirements() {
    let catalogue = catalogue::passes();
    for target in targets::TARGETS {
        for goal in [Goal::Fast, Goal::Balanced, Goal::Best] {
            let pipeline = Pipeline::parse(&target.pipeline(goal, &passes::target::Scheme::W8A8), &catalogue)
                .expect("the pipeline parses");
            let facts = pipeline.check(passes::pass::Facts::NONE, &catalogue).expect("requirements are met");
            assert!(facts.contains(passes::pass::Facts::ROUNDED));
        }
    }
}

#[test]
fn every_rule_names_a_known_operator_once() {
    for target in targets::TARGETS {
        let mut seen = BTreeSet::new();
        for rule in target.rules() {
            assert!(passes::ops::OPS.iter().any(|op| op.name == rule.op), "{}", rule.op);
            assert!(seen.insert(rule.op), "{} has two rules", rule.op);
        }
    }
}

#[test]
fn every_normalizing_pass_has_fixtures() {
    for (stage, table) in catalogue::STAGES {
        for entry in table.iter().filter(|_| *stage == "normalize") {
            let folder = super::fixture("passes").join(entry.info.about.name);
            let cases = std::fs::read_dir(&folder).map_or(0, Iterator::count);
            assert!(cases >= 2, "{} has no cases in {}", entry.info.about.name, folder.display());
        }
    }
}

#[test]
fn pipelines_that_make_no_sense_are_refused_with_a_hint() {
    let catalogue = catalogue::passes();
    let error = |text: &str| Pipeline::parse(text, &catalogue).map(|_| ()).unwrap_err().to_string();
    assert!(error("fold-batchnorm").contains("did you mean `fold-batch-norm`"));
    assert!(error("calibrate{observer=mse}").contains("takes no options"));
    assert!(error("assign-encodings{observer=magic}").contains("min-max"));
    assert!(error("infer-shapes infer-shapes").contains("expected `,`"));
    assert!(error("*(drop-dead").contains("expected `)`"));
    let early = Pipeline::parse("assign-encodings", &catalogue).unwrap();
    assert!(early.check(passes::pass::Facts::NONE, &catalogue).unwrap_err().to_string().contains("put `calibrate`"));
}

#[test]
fn every_lint_has_a_source_a_way_out_and_a_fixture() {
    let lints = onnx_quant::lint::all();
    assert!(lints.len() >= 40);
    for lint in lints {
        assert!(lint.source.len() > 5 && lint.help.len() > 3 && lint.title.len() > 5, "{}", lint.code.0);
        assert!(super::fixture("lint").join(format!("{}.oq", lint.code.0)).exists(), "{} has no fixture", lint.code.0);
        assert!(!onnx_quant::lint::targets_of(lint).is_empty(), "{}", lint.code.0);
        assert!(super::tool_ok(&["explain", lint.code.0]).contains(lint.title));
    }
}

#[test]
fn everything_that_takes_time_says_what_it_costs() {
    for entry in catalogue::passes() {
        assert!(entry.info.cost.len() > 15, "{} does not say what it costs", entry.info.about.name);
    }
    for method in rounding::ROUNDINGS {
        assert!(method.cost().len() > 15, "{} does not say what it costs", method.about().name);
    }
    for learned in reconstruct::PARAMETERIZATIONS {
        assert!(learned.bytes_per_weight() > 0, "{} does not say what it costs", learned.about().name);
    }
}
