//! The extent that counts samples, and types for one of them.

use std::collections::BTreeSet;

use super::{Dim, Graph, TensorType, Type};
use crate::id::{Name, ValueId};

/// The symbol that counts samples, where there is one: it leads every input, or all that lead with no 1, and stands nowhere else.
pub(crate) fn batch_symbols(graph: &Graph) -> BTreeSet<Name> {
    let shape = |id: &ValueId| graph.value(*id).ty.tensor()?.shape.clone();
    let shapes: Vec<Vec<Dim>> = graph.inputs().iter().filter_map(shape).collect();
    let leading: BTreeSet<&Dim> = shapes.iter().filter_map(|dims| dims.first()).collect();
    let symbols =
        leading.iter().filter_map(|dim| if let Dim::Symbol(name) = dim { Some(Name::clone(name)) } else { None });
    let symbols: BTreeSet<Name> = symbols.collect();
    let elsewhere = |name: &Name| {
        shapes.iter().flat_map(|dims| dims.iter().skip(1)).any(|dim| *dim == Dim::Symbol(Name::clone(name)))
    };
    let others = leading.iter().any(|dim| matches!(dim, Dim::Known(n) if *n != 1) || **dim == Dim::Unknown);
    if symbols.len() == 1 && !others && !symbols.iter().any(elsewhere) { symbols } else { BTreeSet::new() }
}

/// `ty` for one sample; that of an `input` whose leading extent has no name as well.
pub(crate) fn of_one_sample(ty: &Type, batch: &BTreeSet<Name>, input: bool) -> Type {
    let Some(known) = ty.tensor() else { return ty.clone() };
    let one = |(at, dim): (usize, &Dim)| match dim {
        Dim::Symbol(name) if batch.contains(name) => Dim::Known(1),
        Dim::Unknown if at == 0 && input => Dim::Known(1),
        other => other.clone(),
    };
    let shape = known.shape.as_ref().map(|dims| dims.iter().enumerate().map(one).collect());
    Type::Tensor(TensorType { dtype: known.dtype, shape })
}
