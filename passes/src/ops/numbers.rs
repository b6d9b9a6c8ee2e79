//! Whole numbers that follow from types: the targets of reshapes, as exporters compute them from the extents of other tensors.

use super::eval::slice_bounds;
use super::{MAX_RANK, Types, positive_axis};
use crate::id::ValueId;
use crate::ir::{Graph, Node, TensorType};

/// So many nodes are looked at, at most.
const MOST_NODES: usize = 64;

/// The numbers of `value`, a scalar or a vector of integers, each where it is the same in every run; `None` where not even their count is
/// known. `types` are those of the values before it.
pub(super) fn numbers(graph: &Graph, value: ValueId, types: Types<'_>) -> Option<Vec<Option<i64>>> {
    let mut left = MOST_NODES;
    of_value((graph, types), value, &mut left)
}

fn of_value((graph, types): (&Graph, Types<'_>), value: ValueId, left: &mut usize) -> Option<Vec<Option<i64>>> {
    if let Some(constant) = graph.constant(value) {
        let vector = constant.shape().len() <= 1 && constant.len() <= MAX_RANK;
        return vector.then(|| constant.integers())?.map(|all| all.into_iter().map(Some).collect());
    }
    *left = left.checked_sub(1)?;
    // Of a matrix the order of numbers would count.
    (types(value)?.rank()? <= 1).then_some(())?;
    let (_, node) = graph.producer(value).filter(|(_, node)| node.op.domain.is_empty())?;
    let mut first = || of_value((graph, types), node.input(0)?, left);
    let found = match &*node.op.name {
        "Shape" => extents(node, &types(node.input(0)?)?)?,
        "Unsqueeze" | "Squeeze" | "Identity" | "Reshape" => first()?,
        // What is no integer before has no numbers here.
        "Cast" if matches!(node.int("to", 0), 6 | 7) => {
            let fits = |n: &i64| node.int("to", 0) == 7 || i32::try_from(*n).is_ok();
            first()?.into_iter().map(|n| n.filter(fits)).collect()
        }
        "Gather" => {
            let at = graph.constant_input(node, 1).filter(|at| at.len() <= MAX_RANK)?;
            let (data, at) = (first()?, at.integers()?);
            let count = i64::try_from(data.len()).ok()?;
            let index = |i: &i64| usize::try_from(if *i < 0 { i.saturating_add(count) } else { *i }).ok();
            at.iter().map(|i| data.get(index(i)?).copied()).collect::<Option<_>>()?
        }
        "Slice" => sliced(graph, node, &first()?)?,
        "Concat" if node.inputs.len() <= MAX_RANK => {
            let mut all = Vec::new();
            for input in &node.inputs {
                all.extend(of_value((graph, types), (*input)?, left)?);
                (all.len() <= MAX_RANK).then_some(())?;
            }
            all
        }
        _ => return None,
    };
    (found.len() <= MAX_RANK).then_some(found)
}

/// What the `Shape` `node` gives of a tensor of type `ty`.
fn extents(node: &Node, ty: &TensorType) -> Option<Vec<Option<i64>>> {
    let shape = ty.shape.as_ref()?;
    let known: Vec<Option<i64>> = shape.iter().map(|dim| i64::try_from(dim.known()?).ok()).collect();
    let rank = i64::try_from(known.len()).ok()?;
    let at = |name: &str, none: i64| {
        let at = node.int(name, none);
        usize::try_from((if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank)).ok()
    };
    let (start, end) = (at("start", 0)?, at("end", rank)?);
    Some(known.get(start..end.max(start))?.to_vec())
}

/// What `Slice` leaves of `data`, a vector.
fn sliced(graph: &Graph, node: &Node, data: &[Option<i64>]) -> Option<Vec<Option<i64>>> {
    let one = |input: usize, none: i64| match node.input(input) {
        Some(_) => graph.constant_input(node, input).filter(|one| one.len() == 1)?.integers()?.first().copied(),
        None => Some(none),
    };
    positive_axis(one(3, 0)?, 1)?;
    let bounds = slice_bounds(data.len(), one(1, 0)?, one(2, 0)?, one(4, 1)?)?;
    let at = |k: usize| usize::try_from(bounds.start + bounds.step * i64::try_from(k).ok()?).ok();
    (0..bounds.count).map(|k| data.get(at(k)?).copied()).collect()
}

#[cfg(test)]
mod tests {

    fn shape_of(nodes: &str) -> String {
        let text = format!(
            "opset 21\ngraph (%x: f32[N,7,12], %k: i64[1]) -> (%y) {{\n  %zero = const i64[1] [0]\n  %one = const i64[1] [1]\n  \
             %two = const i64[] [2]\n  %w = const i64[1] [12]\n  %h = const i64[2] [3, 4]\n  %h2 = const i64[2] [1, 2]\n  %s = Shape(%x)\n{nodes}}}\n"
        );
        let model = crate::text::parse(&text).unwrap();
        let executor = crate::reconstruct::testing::Tapes;
        let pipeline = crate::pass::Pipeline::parse("*(infer-shapes)", &crate::catalogue::passes()).unwrap();
        let mut cx = crate::pass::PassContext::new(&crate::reconstruct::testing::NoTarget, &executor);
        let (model, _) = crate::pass::PassManager::default().run(&pipeline, model, &mut cx).unwrap();
        let ty = model.graph().value(model.graph().find("y").unwrap()).ty.tensor().unwrap().clone();
        ty.shape.map_or("none".into(), |shape| {
            shape.iter().map(|dim| dim.known().map_or("?".to_owned(), |n| n.to_string())).collect::<Vec<_>>().join(",")
        })
    }

    #[test]
    fn targets_of_reshapes_follow_from_other_tensors_extents() {
        for (nodes, want) in [
            ("  %a = Slice(%s, %zero, %one)\n  %c = Concat(%a, %w) {axis=0}\n  %y = Reshape(%x, %c)\n", "?,12"),
            (
                "  %a = Gather(%s, %two)\n  %u = Unsqueeze(%a, %zero)\n  %m = const i64[1] [-1]\n  %c = Concat(%m, %u) {axis=0}\n  %y = Reshape(%x, %c)\n",
                "?,12",
            ),
            ("  %a = Slice(%s, %zero, %w)\n  %y = Reshape(%x, %a)\n", "?,7,12"),
            ("  %t = Shape(%x) {start=1}\n  %c = Concat(%k, %t) {axis=0}\n  %y = Reshape(%x, %c)\n", "?,?,?"),
            (
                "  %m = const i64[1] [-1]\n  %t = Shape(%x) {start=-2}\n  %c = Concat(%m, %t) {axis=0}\n  %e = Expand(%w, %t)\n  %y = Identity(%e)\n",
                "7,12",
            ),
            ("  %t = Mul(%s, %s)\n  %y = Reshape(%x, %t)\n", "?,?,?"),
            // A matrix in between, whose rows are no numbers of the vector.
            (
                "  %m = Reshape(%h, %h2)\n  %a = Concat(%m, %m) {axis=1}\n  %f = const i64[1] [-1]\n  %b = Reshape(%a, %f)\n  %y = Reshape(%x, %b)\n",
                "?,?,?,?",
            ),
            // An index outside.
            (
                "  %o = const i64[] [5]\n  %a = Gather(%s, %o)\n  %u = Unsqueeze(%a, %zero)\n  %c = Concat(%u, %w) {axis=0}\n  %y = Reshape(%x, %c)\n",
                "?,?",
            ),
        ] {
            assert_eq!(shape_of(nodes), want, "{nodes}");
        }
    }

    /// A chain that doubles at every node is given up, not followed.
    #[test]
    fn what_branches_without_end_is_given_up() {
        let doubled = |k: usize| {
            format!(
                "  %d{} = Concat(%d{k}, %d{k}) {{axis=0}}\n  %e{} = Slice(%d{}, %zero, %one)\n",
                k + 1,
                k + 1,
                k + 1
            )
        };
        let nodes: String =
            std::iter::once("  %d0 = Slice(%s, %zero, %one)\n".to_owned()).chain((0..40).map(doubled)).collect();
        assert_eq!(shape_of(&format!("{nodes}  %y = Reshape(%x, %e40)\n")), "?");
    }

    /// However many reshapes take their targets from one another, one walk knows them all.
    #[test]
    fn a_chain_of_reshapes_is_known_at_once() {
        let step = |k: usize| {
            let before = if k == 0 { "x".to_owned() } else { format!("r{}", k - 1) };
            format!(
                "  %t{k} = Shape(%{before}) {{start=-2}}\n  %c{k} = Concat(%one, %t{k}) {{axis=0}}\n  %r{k} = Reshape(%{before}, %c{k})\n"
            )
        };
        let nodes: String = (0..300).map(step).collect();
        assert_eq!(shape_of(&format!("{nodes}  %y = Identity(%r299)\n")), "1,7,12");
    }
}
