//! Evaluating operators on constants, bit for bit as a runtime would, with a cap on what a result may take.
//!
//! Data movement works for every element type of whole bytes; arithmetic for f32 and the integer types that shape
//! computations use. What has no rule here is left in the graph.

mod arithmetic;
mod movement;

pub(crate) use movement::slice_bounds;

use std::sync::Arc;

use crate::ir::Node;
use crate::tensor::{DType, Tensor, count};

/// The most bytes one folded result may have: 64 MiB, and no more than 16 times its inputs past a mebibyte.
pub const MAX_FOLDED_BYTES: usize = 64 << 20;

/// Why a node was not evaluated.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// There is no rule for this operator, element type or attribute.
    #[error("there is no rule for it")]
    NoRule,
    /// The result would be over the cap.
    #[error("its result would have {0} bytes")]
    TooLarge(usize),
    /// The inputs contradict the operator's definition.
    #[error("its inputs contradict its definition: {0}")]
    Invalid(&'static str),
}

type Inputs<'a> = [Option<&'a Arc<Tensor>>];
type Outcome = Result<Vec<Tensor>, EvalError>;

/// The outputs of `node` for constant `inputs`.
///
/// # Errors
/// [`EvalError`].
pub fn evaluate(node: &Node, inputs: &Inputs<'_>) -> Outcome {
    if !node.op.domain.is_empty() {
        return Err(EvalError::NoRule);
    }
    let one = |tensor: Result<Tensor, EvalError>| tensor.map(|tensor| vec![tensor]);
    match &*node.op.name {
        "Identity" => one(Ok(required(inputs, 0)?.as_ref().clone())),
        "Shape" => one(movement::shape(node, required(inputs, 0)?)),
        "Size" => one(Ok(Tensor::scalar(as_i64(required(inputs, 0)?.len())?))),
        "Reshape" => one(movement::reshape(node, required(inputs, 0)?, required(inputs, 1)?)),
        "Flatten" => one(movement::flatten(node, required(inputs, 0)?)),
        "Squeeze" => one(movement::squeeze(required(inputs, 0)?, optional(inputs, 1))),
        "Unsqueeze" => one(movement::unsqueeze(required(inputs, 0)?, required(inputs, 1)?)),
        "Transpose" => one(movement::transpose(node, required(inputs, 0)?)),
        "Concat" => one(movement::concat(node, inputs)),
        "Slice" => one(movement::slice(inputs)),
        "Gather" => one(movement::gather(node, required(inputs, 0)?, required(inputs, 1)?)),
        "Expand" => one(movement::expand(required(inputs, 0)?, required(inputs, 1)?)),
        "Tile" => one(movement::tile(required(inputs, 0)?, required(inputs, 1)?)),
        "Split" => movement::split(node, required(inputs, 0)?, optional(inputs, 1)),
        "ConstantOfShape" => one(movement::constant_of_shape(node, required(inputs, 0)?)),
        "Range" => one(movement::range(required(inputs, 0)?, required(inputs, 1)?, required(inputs, 2)?)),
        "Cast" => one(arithmetic::cast(node, required(inputs, 0)?)),
        "Where" => one(arithmetic::select(required(inputs, 0)?, required(inputs, 1)?, required(inputs, 2)?)),
        "Not" | "Neg" | "Abs" | "Sqrt" | "Reciprocal" | "Floor" | "Ceil" => {
            one(arithmetic::unary(&node.op.name, required(inputs, 0)?))
        }
        "Add" | "Sub" | "Mul" | "Div" | "Min" | "Max" | "Equal" | "Less" | "LessOrEqual" | "Greater"
        | "GreaterOrEqual" | "And" | "Or"
            if inputs.len() == 2 =>
        {
            one(arithmetic::binary(&node.op.name, required(inputs, 0)?, required(inputs, 1)?))
        }
        "ReduceProd" => one(arithmetic::reduce_prod(node, required(inputs, 0)?, optional(inputs, 1))),
        _ => Err(EvalError::NoRule),
    }
}

fn required<'a>(inputs: &Inputs<'a>, index: usize) -> Result<&'a Arc<Tensor>, EvalError> {
    optional(inputs, index).ok_or(EvalError::Invalid("a required input is missing"))
}

fn optional<'a>(inputs: &Inputs<'a>, index: usize) -> Option<&'a Arc<Tensor>> {
    inputs.get(index).copied().flatten()
}

fn as_i64(n: usize) -> Result<i64, EvalError> {
    i64::try_from(n).map_err(|_| EvalError::Invalid("a count over i64"))
}

/// The number of elements of a result of `shape`, if it may be made at all. `source`: bytes of the inputs.
fn allowed(dtype: DType, shape: &[usize], source: usize) -> Result<usize, EvalError> {
    let elements = count(shape).ok_or(EvalError::TooLarge(usize::MAX))?;
    let bytes = dtype.bytes_for(elements).ok_or(EvalError::TooLarge(usize::MAX))?;
    if bytes > MAX_FOLDED_BYTES || bytes > (1 << 20_usize).max(source.saturating_mul(16)) {
        return Err(EvalError::TooLarge(bytes));
    }
    Ok(elements)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ir::{Attr, OpKey};

    fn node(name: &str, attrs: &[(&str, Attr)]) -> Node {
        Node {
            name: name.into(),
            op: OpKey { domain: "".into(), name: name.into(), opset: 21 },
            inputs: Vec::new(),
            outputs: Vec::new(),
            attrs: attrs.iter().map(|(k, v)| ((*k).into(), v.clone())).collect::<BTreeMap<_, _>>(),
            bodies: Vec::new(),
            notes: None,
        }
    }

    fn run(node: &Node, inputs: &[Tensor]) -> Result<Tensor, EvalError> {
        let shared: Vec<Arc<Tensor>> = inputs.iter().cloned().map(Arc::new).collect();
        let inputs: Vec<Option<&Arc<Tensor>>> = shared.iter().map(Some).collect();
        evaluate(node, &inputs).map(|mut outputs| outputs.swap_remove(0))
    }

    fn ints(values: &[i64]) -> Tensor {
        Tensor::of([values.len()], values.to_vec())
    }

    #[test]
    fn slices_go_both_ways() {
        let data = ints(&[0, 1, 2, 3, 4]);
        let slice = |start, end, step| {
            run(&node("Slice", &[]), &[data.clone(), ints(&[start]), ints(&[end]), ints(&[0]), ints(&[step])]).unwrap()
        };
        assert_eq!(slice(1, 4, 2), ints(&[1, 3]));
        assert_eq!(slice(-1, i64::MIN, -1), ints(&[4, 3, 2, 1, 0]));
        assert_eq!(slice(3, 1, 1), ints(&[]));
        assert_eq!(slice(0, i64::MAX, 1), data);
    }

    #[test]
    fn a_small_file_cannot_ask_for_terabytes() {
        let huge = ints(&[1 << 20, 1 << 20]);
        assert!(matches!(run(&node("ConstantOfShape", &[]), std::slice::from_ref(&huge)), Err(EvalError::TooLarge(_))));
        assert!(matches!(run(&node("Expand", &[]), &[ints(&[1]), huge.clone()]), Err(EvalError::TooLarge(_))));
        let overflow = ints(&[i64::MAX, i64::MAX]);
        assert!(run(&node("ConstantOfShape", &[]), &[overflow]).is_err());
        let range = run(&node("Range", &[]), &[Tensor::scalar(0_i64), Tensor::scalar(i64::MAX), Tensor::scalar(1_i64)]);
        assert!(matches!(range, Err(EvalError::TooLarge(_))));
    }

    #[test]
    fn transpose_by_hand() {
        let tensor = Tensor::of([2, 3], vec![1_i64, 2, 3, 4, 5, 6]);
        let turned = run(&node("Transpose", &[]), &[tensor]).unwrap();
        assert_eq!(turned, Tensor::of([3, 2], vec![1_i64, 4, 2, 5, 3, 6]));
    }

    #[test]
    fn gather_takes_negative_indices_and_refuses_wild_ones() {
        let at = |i| run(&node("Gather", &[]), &[ints(&[7, 8, 9]), Tensor::scalar(i)]);
        assert_eq!(at(-1_i64).unwrap(), Tensor::scalar(9_i64));
        assert!(at(3).is_err());
    }

    #[test]
    fn integer_division_truncates_and_never_panics() {
        let divide = |a: i64, b: i64| run(&node("Div", &[]), &[ints(&[a]), ints(&[b])]);
        assert_eq!(divide(-7, 2).unwrap(), ints(&[-3]));
        assert!(divide(1, 0).is_err());
        assert!(divide(i64::MIN, -1).is_ok());
    }
}
