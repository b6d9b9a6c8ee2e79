//! Constant folding.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::ValueId;
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::model::{Edit, Model, Patch};
use crate::ops::{self, EvalError, Laws};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Evaluates what depends on constants alone, and reads shapes that are known.
    ///
    /// Evaluation is our own and bit-equal to a runtime's; an operator or element type without a rule stays. `Shape`, and
    /// `Gather` or `Slice` of a `Shape`, fold when the dimensions they report are known, though others may not be. A
    /// result over 64 MiB stays, and so does a large constant that others read too: a copy of a tied weight would untie it.
    INFO {
        name: "fold-constants",
        source: "ONNX operator specification",
        cost: "What is constant is computed once, each result at most 64 MiB.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(FoldConstants)) };

/// See [`INFO`].
#[derive(Debug)]
struct FoldConstants;

/// From this size on, a constant with other readers is not copied into a folded form.
const TIED_BYTES: usize = 1 << 16;

/// All that one run of the pass may make: a small file of many large constants must not fill the memory.
const MAX_MADE: usize = 512 << 20;

impl Pass for FoldConstants {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let users = Users::of(graph);
        let mut patch = Patch::on(model);
        let mut folded: BTreeMap<ValueId, Arc<Tensor>> = BTreeMap::new();
        let mut made = 0_usize;
        for (id, node) in graph.nodes() {
            let is_output = |v: &ValueId| users.of_value(*v).contains(&User::Output);
            let stays = !node.bodies.is_empty()
                || ops::laws(&node.op).contains(Laws::RANDOM)
                || model.plan().encodes_any_of(graph, id)
                || node.outputs.iter().flatten().any(is_output);
            if stays {
                continue;
            }
            let results = match evaluate(graph, &users, node, &folded) {
                Ok(results) => results,
                Err(EvalError::TooLarge(bytes)) => {
                    let message = format!("its constant result would have {bytes} bytes; it is left to the runtime");
                    let place = Place::Node(Arc::clone(&node.name));
                    patch.note(Diagnostic::new(diag::FOLD_TOO_LARGE, Severity::Note, place, message));
                    continue;
                }
                Err(_) => continue,
            };
            made += results.iter().map(|tensor| tensor.bytes().len()).sum::<usize>();
            if made > MAX_MADE {
                break;
            }
            for (value, tensor) in node.outputs.iter().zip(results) {
                if let Some(value) = *value {
                    let tensor = Arc::new(tensor);
                    folded.insert(value, Arc::clone(&tensor));
                    patch.edit(Edit::Freeze { value, tensor });
                }
            }
            patch.erase(id);
            patch.count("folded", 1);
        }
        Ok(patch)
    }
}

fn evaluate(
    graph: &Graph,
    users: &Users,
    node: &Node,
    folded: &BTreeMap<ValueId, Arc<Tensor>>,
) -> Result<Vec<Tensor>, EvalError> {
    let constant = |value: ValueId| folded.get(&value).or_else(|| graph.constant(value));
    if let Some(known) = known_dimensions(graph, node, &constant) {
        return Ok(vec![known]);
    }
    let mut inputs = Vec::with_capacity(node.inputs.len());
    for input in &node.inputs {
        let tensor = input.map(|value| constant(value).ok_or(EvalError::NoRule)).transpose()?;
        let tied = input.is_some_and(|value| users.of_value(value).len() > 1);
        if tied && tensor.is_some_and(|tensor| tensor.bytes().len() >= TIED_BYTES) {
            return Err(EvalError::NoRule);
        }
        inputs.push(tensor);
    }
    if inputs.iter().all(Option::is_none) {
        return Err(EvalError::NoRule);
    }
    ops::evaluate(node, &inputs)
}

/// `Shape(x)`, `Gather(Shape(x), indices)` or `Slice(Shape(x), …)` where what is asked for is known.
fn known_dimensions<'a>(
    graph: &Graph,
    node: &Node,
    constant: &impl Fn(ValueId) -> Option<&'a Arc<Tensor>>,
) -> Option<Tensor> {
    if node.op.is("Shape") {
        let dims: Option<Vec<i64>> = dimensions(graph, node)?.into_iter().collect();
        let dims = dims?;
        return Some(Tensor::of([dims.len()], dims));
    }
    if !node.op.is("Gather") && !node.op.is("Slice") {
        return None;
    }
    let (_, shape) = graph.producer(node.input(0)?)?;
    let dims = if shape.op.is("Shape") { dimensions(graph, shape)? } else { return None };
    // Evaluate the places, then look each of them up.
    let n = i64::try_from(dims.len()).ok()?;
    let places = Arc::new(Tensor::of([dims.len()], (0..n).collect::<Vec<i64>>()));
    let mut inputs = vec![Some(&places)];
    for input in &node.inputs[1..] {
        inputs.push(match *input {
            Some(value) => Some(constant(value)?),
            None => None,
        });
    }
    let picked = ops::evaluate(node, &inputs).ok()?.pop()?;
    let values: Option<Vec<i64>> =
        picked.integers()?.into_iter().map(|at| *dims.get(usize::try_from(at).ok()?)?).collect();
    Some(Tensor::of(picked.shape(), values?))
}

/// What a `Shape` node reports, `None` where a dimension is not known.
fn dimensions(graph: &Graph, node: &Node) -> Option<Vec<Option<i64>>> {
    let shape = graph.value(node.input(0)?).ty.tensor()?.shape.as_ref()?;
    let range = ops::shape_range(node, shape.len());
    Some(shape[range].iter().map(|dim| dim.known().and_then(|n| i64::try_from(n).ok())).collect())
}
