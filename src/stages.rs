//! How long the stages of a run take, and what the user should know of its outcome.

use std::time::Instant;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::ir::Graph;
use passes::model::Model;

use crate::driver::{Sizes, Stage};
use crate::verify::Fidelity;

/// Below this, an 8-bit model deserves a look.
const LOW_SQNR_DB: f64 = 5.0;

/// What ran so far, and since when the current stage does.
pub(crate) struct Clock {
    pub(crate) stages: Vec<Stage>,
    since: Instant,
}

impl Clock {
    /// Started now.
    pub(crate) fn start() -> Self {
        Self { stages: Vec::new(), since: Instant::now() }
    }

    /// The stage called `name` ends here.
    pub(crate) fn lap(&mut self, name: &'static str) {
        self.stages.push(Stage { name, time: self.since.elapsed() });
        self.since = Instant::now();
    }
}

/// Charges the time of passes to stages as users know them.
pub(crate) struct StageTimes<'a> {
    clock: &'a mut Clock,
    current: &'static str,
}

impl<'a> StageTimes<'a> {
    pub(crate) fn new(clock: &'a mut Clock) -> Self {
        Self { clock, current: "normalize" }
    }

    fn stage_of(pass: &str) -> &'static str {
        let stage = passes::catalogue::STAGES.iter().find(|(_, table)| table.iter().any(|e| e.info.about.name == pass));
        match stage.map(|(name, _)| *name) {
            Some("calibrate") => "calibrate",
            Some("analysis" | "rounding" | "correct") => "quantize",
            _ => "normalize",
        }
    }
}

impl passes::pass::Instrument for StageTimes<'_> {
    fn before(&mut self, pass: &passes::pass::PassInfo, _: &Model) {
        let stage = Self::stage_of(pass.about.name);
        if stage != self.current {
            self.clock.lap(self.current);
            self.current = stage;
        }
    }
}

impl Drop for StageTimes<'_> {
    fn drop(&mut self) {
        self.clock.lap(self.current);
    }
}

/// What the sizes and the fidelity of a result say, and what of its graph stayed out of reach.
pub(crate) fn outcome_notes(sizes: &Sizes, fidelity: Option<&Fidelity>, graph: &Graph) -> Vec<Diagnostic> {
    let mut notes = body_notes(graph);
    if sizes.output_bytes >= sizes.input_bytes {
        let message = format!("{} bytes became {}", sizes.input_bytes, sizes.output_bytes);
        notes.push(Diagnostic::new(diag::GREW, Severity::Warning, Place::Model, message));
    }
    if let Some(fidelity) = fidelity.filter(|f| f.sqnr_db < LOW_SQNR_DB) {
        let message = format!("its outputs keep {:.1} dB of the float model's", fidelity.sqnr_db);
        let help = "keep the worst layers of the summary in float with --keep-float, or try --observer";
        notes.push(Diagnostic::new(diag::LOW_FIDELITY, Severity::Warning, Place::Model, message).help(help));
    }
    notes
}

/// What is inside the bodies of `If`, `Loop` and `Scan` is carried, not quantized: say how much that is.
fn body_notes(graph: &Graph) -> Vec<Diagnostic> {
    fn inside(node: &passes::ir::Node) -> usize {
        node.bodies.iter().map(|body| body.graph.nodes().map(|(_, node)| 1 + inside(node)).sum::<usize>()).sum()
    }
    let note = |node: &passes::ir::Node| {
        let n = inside(node);
        let message =
            format!("the {n} nodes in its bodies stay in float: this version does not quantize inside bodies");
        (n > 0).then(|| Diagnostic::new(diag::KEPT_FLOAT, Severity::Warning, Place::Node(node.name.clone()), message))
    };
    graph.nodes().filter_map(|(_, node)| note(node)).collect()
}
