//! 16-bit floats: graphs computed in them as graphs computed in f32, and back.
//!
//! Passes, simulation and executors compute in f32. What a file has as f16 is [`widen`]ed as it comes in, and [`narrow`]ed again as it
//! goes out, where that is asked for; inputs and outputs keep their types by a `Cast` each. `round` takes the rounding into the plan
//! before, `retype` builds the other graph, and `kept` says what has no form in 16 bits.

mod kept;
mod retype;
mod round;

use half::f16;

use retype::Retyping;
pub use round::ENTRY;

use crate::id::ValueId;
use crate::model::Model;
use crate::pass::PassError;
use crate::target::{LowerError, Lowered};
use crate::tensor::DType;

/// `model` computed in f32, where it was computed in f16 or bf16. Graphs inside nodes are carried as they are.
///
/// # Errors
/// Names a node with a graph inside whose results are of an unknown type.
pub fn widen(mut model: Model) -> Result<Model, PassError> {
    for from in [DType::F16, DType::Bf16] {
        let is_from = |id: ValueId| model.graph().value(id).ty.dtype() == Some(from);
        if model.graph().value_ids().any(is_from) {
            let graph = Retyping { from, to: DType::F32, graph: model.graph() }.run().map_err(PassError::Model)?;
            let widened = Model::new(graph, model.meta.as_ref().clone());
            model = widened.map_err(|error| PassError::Model(error.to_string()))?;
        }
    }
    Ok(model)
}

/// `lowered` computed in f16 but for its inputs and outputs, and operators that have no such form.
///
/// # Errors
/// [`LowerError`] for a node that has no form in 16 bits, where the type of its result is not known.
pub fn narrow(lowered: Lowered) -> Result<Lowered, LowerError> {
    let graph = Retyping { from: DType::F32, to: DType::F16, graph: &lowered.graph }.run();
    let graph = graph.map_err(|problem| LowerError { place: "--rest f16".into(), problem })?;
    Ok(Lowered { graph, ..lowered })
}

/// The least magnitude that is not nearest to 65504, the largest number of 16 bits.
const CUT: f32 = 65520.0;

/// `x` as 16 bits hold it, cut at their largest; what is not 0 does not become that.
fn rounded(x: f32) -> f32 {
    let near = if x.is_finite() { f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32() } else { x };
    if near == 0.0 && x != 0.0 { f16::from_bits(1).to_f32().copysign(x) } else { near }
}
