//! FINN's compiler for dataflow hardware.

use std::borrow::Cow;

use passes::about::About;
use passes::ir::OpKey;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{
    Accepts, Activations, Bias, Goal, LowerError, Lowered, Outcome, PerChannel, Rule, Scheme, Target, TargetInfo,
};

use super::fpga;

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct Finn;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "finn",
        doc: "QONNX as FINN turns it into hardware: activations of up to 8 bits become thresholds, unsigned after a Relu and signed \
              elsewhere; weights have a scale per output channel in convolutions and one in all in matrix products; means of 2^t elements cut their \
              lowest bits off (Trunc).",
        source: "conversion and streamlining passes of FINN, read in its source of 2026-04; not built here",
    },
    version: "source of 2026-04-14",
};

static ACCEPTS: Accepts = Accepts {
    caches: false,
    activations: Activations::BySign,
    per_channel: PerChannel::Only(&["Conv"]),
    bias: Bias::Int32,
    narrow: true,
    power_of_two: false,
    negative_scales: false,
    whole_blocks: false,
    products_of_activations: true,
    half: false,
    one_sample: true,
};

/// Before those of all hardware: means have the encoding of what they are of, `Trunc` has no other.
static MEANS: &[Rule] =
    &[Rule::on_codes("AveragePool", Outcome::Same), Rule::on_codes("GlobalAveragePool", Outcome::Same)];

impl Target for Finn {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        fpga::RULES
    }

    fn rule(&self, op: &OpKey) -> Option<&'static Rule> {
        let named = |rule: &&Rule| op.domain.is_empty() && *rule.op == *op.name;
        MEANS.iter().chain(fpga::RULES).find(named)
    }

    fn accepts(&self) -> &'static Accepts {
        &ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        // Means are cut off before weights behind them are rounded.
        let text = fpga::pipeline(goal, scheme, "");
        let at = text.find("assign-encodings").and_then(|at| Some(at + text[at..].find('}')? + 1));
        at.map_or(text.clone(), |at| format!("{}, truncate-pools{}", &text[..at], &text[at..]).into())
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        fpga::refuses(scheme, 8)
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QONNX_AND_TRUNC)
    }
}
