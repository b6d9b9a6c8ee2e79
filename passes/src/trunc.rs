//! Means that hardware cuts off instead of rounding: which pools, and by how much they are shifted for it.
//!
//! A mean of 2^t codes is a sum of codes without its lowest t bits: `⌊sum / 2^t⌋`. Rounding to nearest of the mean of codes shifted by
//! `(1/2)(2^−t − 1)` steps gives that very number, so the float graph carries the shift, and nothing but the spelling knows of bits that
//! are cut off.

use crate::encoding::{Encoding, Granularity};
use crate::id::{Site, ValueId};
use crate::ir::{Graph, Node};
use crate::model::Plan;

/// How many elements `pool` takes the mean of, where that is a power of two, more than one, of a window that never leaves the tensor.
pub(crate) fn window(graph: &Graph, pool: &Node) -> Option<usize> {
    let n = if pool.op.is("GlobalAveragePool") {
        let shape = graph.value(pool.input(0)?).ty.tensor()?.shape.as_ref()?;
        shape.get(2..)?.iter().try_fold(1_usize, |n, dim| n.checked_mul(dim.known()?))?
    } else {
        let inside = pool.ints("pads").is_none_or(|pads| pads.iter().all(|pad| *pad == 0));
        let plain = pool.int("ceil_mode", 0) == 0 && matches!(pool.text("auto_pad", "NOTSET"), "NOTSET" | "VALID");
        (pool.op.is("AveragePool") && inside && plain).then_some(())?;
        pool.ints("kernel_shape")?.iter().try_fold(1_usize, |n, k| n.checked_mul(usize::try_from(*k).ok()?))?
    };
    (n > 1 && n <= 1 << 16 && n.is_power_of_two()).then_some(n)
}

/// What is added to every element so that rounding the mean of `n` codes at `scale` cuts it off.
#[expect(clippy::cast_possible_truncation, reason = "half a step, rounded to f32 once")]
pub(crate) fn shift(scale: f32, n: usize) -> f32 {
    (f64::from(scale) * (0.5 / n as f64 - 0.5)) as f32
}

/// The encoding that the input and the result of a pool share, where both are integers of one scale without zero point.
pub(crate) fn shared(plan: &Plan, input: ValueId, result: ValueId) -> Option<&Encoding> {
    let encoding = plan.encoding(Site::Value(input))?;
    let integers =
        encoding.grid.info().integer && encoding.granularity == Granularity::Tensor && encoding.is_symmetric();
    (integers && plan.encoding(Site::Value(result)) == Some(encoding)).then_some(encoding)
}

/// A pool behind such a shift.
pub(crate) struct Truncated<'a> {
    /// What is shifted.
    pub(crate) source: ValueId,
    /// The node that shifts it.
    pub(crate) shift: crate::id::NodeId,
    pub(crate) n: usize,
    pub(crate) encoding: &'a Encoding,
}

/// What `pool` cuts off, where the graph says so.
pub(crate) fn truncated<'a>(graph: &Graph, plan: &'a Plan, pool: &Node) -> Option<Truncated<'a>> {
    let n = window(graph, pool)?;
    let (id, add) = graph.producer(pool.input(0)?).filter(|(_, add)| add.op.is("Add"))?;
    let (source, by) = (add.input(0)?, graph.constant_input(add, 1)?.floats()?);
    let encoding = shared(plan, source, pool.output(0)?)?;
    let ours = by.len() == 1 && by[0].to_bits() == shift(encoding.scale[0], n).to_bits();
    ours.then_some(Truncated { source, shift: id, n, encoding })
}
