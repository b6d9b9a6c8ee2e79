//! Memories of circuits of one's own.

use std::borrow::Cow;

use passes::about::About;
use passes::lower::Dialect;
use passes::model::Model;
use passes::target::{Accepts, Container, Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};

use super::{fpga, hls4ml};

/// See [`INFO`].
#[derive(Debug)]
pub(super) struct RtlMem;

static INFO: TargetInfo = TargetInfo {
    about: About {
        name: "rtl-mem",
        doc: "Weights and biases as memory files for Verilog, Xilinx and Intel (--memory), with a C header, a manifest and the model in \
              QONNX, the reference of what the circuit must compute. One power-of-two scale per tensor, so that scaling is a shift.",
        source: "folding of FINN's decoupled weights; text formats of $readmemh, COE, MIF and Intel HEX, read back by Icarus Verilog 11",
    },
    version: "1",
};

impl Target for RtlMem {
    fn info(&self) -> &'static TargetInfo {
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        fpga::RULES
    }

    fn container(&self) -> Container {
        Container::Memories
    }

    fn accepts(&self) -> &'static Accepts {
        &hls4ml::ACCEPTS
    }

    fn pipeline(&self, goal: Goal, scheme: &Scheme) -> Cow<'static, str> {
        hls4ml::Hls4ml.pipeline(goal, scheme)
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        if scheme.weight_format == Some("bipolar") {
            return Some(
                "its memories hold integers of 2 to 8 bits, no signs alone: take w2a8, or --target qonnx".into(),
            );
        }
        fpga::refuses(scheme, 8)
    }

    fn lower(&self, model: &Model) -> Result<Lowered, LowerError> {
        passes::lower::lower(model, Dialect::QONNX)
    }
}
