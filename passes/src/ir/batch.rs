//! The extent that counts samples, and types for one of them.

use std::collections::BTreeSet;

use super::{Dim, Graph, TensorType, Type};
use crate::id::{Name, ValueId};

/// The symbols of leading extents: whoever compiles for fixed shapes wants the number of samples, and takes one at a time.
pub(crate) fn batch_symbols(graph: &Graph) -> BTreeSet<Name> {
    let leading = |id: &ValueId| graph.value(*id).ty.tensor()?.shape.as_ref()?.first().cloned();
    let symbol = |dim: Dim| if let Dim::Symbol(name) = dim { Some(name) } else { None };
    graph.inputs().iter().filter_map(leading).filter_map(symbol).collect()
}

/// `ty` for one sample.
pub(crate) fn of_one_sample(ty: &Type, batch: &BTreeSet<Name>) -> Type {
    let Some(known) = ty.tensor() else { return ty.clone() };
    let one = |(at, dim): (usize, &Dim)| match dim {
        Dim::Symbol(name) if batch.contains(name) => Dim::Known(1),
        Dim::Unknown if at == 0 => Dim::Known(1),
        other => other.clone(),
    };
    let shape = known.shape.as_ref().map(|dims| dims.iter().enumerate().map(one).collect());
    Type::Tensor(TensorType { dtype: known.dtype, shape })
}
