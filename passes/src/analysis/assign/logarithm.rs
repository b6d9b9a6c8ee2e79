//! Exponentials in few codes: even in the logarithm.

use super::Goal;
use crate::encoding::Encoding;
use crate::id::{NodeId, Site};
use crate::ir::Graph;
use crate::ir::walk::{User, Users};
use crate::ops;
use crate::target::Activations;

/// Beyond so many bits even steps are fine enough, and integer kernels take them.
const FEW: u32 = 4;

/// The lowest code stands for e to the minus this: what is smaller adds little to a sum of which the largest term is 1.
const REACH: f64 = 9.0;

/// Where, and how, the exponentials that the product `id` of two activations reads on its left are written by their logarithm: what `Exp`
/// reads, where that is the distance from the largest of a row, and what is masked is multiplied by 0 behind it, as `defer-softmax` writes
/// it; in codes of few bits. `None` for everything else, and where something beside their sum reads them too.
///
/// Source: Li et al. 2023 (RepQ-ViT), arXiv:2212.08254, section 3.3, whose steps are powers of √2 in four bits, too; the range that even
/// steps of the logarithm span, ours.
#[expect(clippy::cast_possible_truncation, reason = "a scale rounded to f32, and a zero point of few bits")]
pub(super) fn of(graph: &Graph, users: &Users, (id, input): (NodeId, u16), goal: &Goal) -> Option<(Site, Encoding)> {
    let grid = goal.activation_grid();
    let info = grid.info();
    let (low, high) = grid.range();
    if !info.integer || info.bits > FEW || low < 0.0 || goal.accepts.activations != Activations::Affine {
        return None;
    }
    let product =
        graph.node(id).filter(|node| node.op.is("MatMul") && input == 0 && ops::linear(graph, id).is_none())?;
    let made = |id: NodeId, input: usize| graph.producer(graph.node(id)?.input(input)?);
    let read = product.input(0)?;
    let sums = |user: &&User| match user {
        User::Input { node, .. } => *node != id && graph.node(*node).is_none_or(|node| !node.op.is("ReduceSum")),
        _ => true,
    };
    if users.of_value(read).iter().any(|user| sums(&user)) {
        return None;
    }
    let (masked, _) = graph.producer(read).filter(|(_, node)| node.op.is("Mul"))?;
    made(masked, 1).filter(|(_, node)| node.op.is("Clip"))?;
    let (exp, node) = made(masked, 0).filter(|(_, node)| node.op.is("Exp"))?;
    users.only_input(node.output(0)?)?;
    let (_, below) = made(exp, 0).filter(|(_, node)| node.op.is("Sub"))?;
    let (_, most) = graph.producer(below.input(1)?).filter(|(_, node)| node.op.is("ReduceMax"))?;
    (most.input(0) == below.input(0)).then_some(())?;
    let scale = REACH / high;
    let scale = if goal.scheme.power_of_two { scale.log2().round().exp2() } else { scale };
    Some((Site::Use { node: exp, input: 0 }, Encoding::per_tensor(grid, scale as f32, high as i32)))
}

#[cfg(test)]
mod tests {
    use super::super::weights::WeightScale;
    use super::*;
    use crate::target::{Accepts, Scheme};

    const DEFERRED: &str = "graph (%s: f32[8,8], %v: f32[8,4]) -> (%y: f32[8,4], %z: f32[8,4]) {
        %axes = const i64[1] [-1]
        %m = ReduceMax(%s, %axes) {keepdims = 1}
        %d = Sub(%s, %m)
        %e = Exp(%d)
        %r = const f32[] [101]
        %n = const f32[] [0]
        %o = const f32[] [1]
        %a = Add(%d, %r)
        %c = Clip(%a, %n, %o)
        %p = Mul(%e, %c)
        %y = MatMul(%p, %v)
        %other = Exp(%s)
        %z = MatMul(%other, %v)
    }";

    static SYMMETRIC: Accepts = Accepts { activations: Activations::Symmetric, ..Accepts::USUAL };

    fn written(bits: u32, product: usize, accepts: &'static Accepts) -> Option<Encoding> {
        let model = crate::text::parse(DEFERRED).unwrap();
        let products = model.graph().nodes().filter(|(_, node)| node.op.is("MatMul"));
        let id = products.map(|(id, _)| id).nth(product).unwrap();
        let goal = Goal::new(Scheme::integers(4, Some(bits)), WeightScale::MinMax, accepts).unwrap();
        let (site, encoding) = of(model.graph(), &Users::of(model.graph()), (id, 0), &goal)?;
        let Site::Use { node, input: 0 } = site else { panic!("{site:?}") };
        assert!(model.graph().node(node).unwrap().op.is("Exp"));
        Some(encoding)
    }

    #[test]
    fn distances_from_the_largest_of_a_row_have_even_steps_down_from_0() {
        for bits in [2, 3, 4] {
            let encoding = written(bits, 0, &Accepts::USUAL).unwrap();
            let mut ends = [0.0, -100.0, f32::NEG_INFINITY];
            encoding.simulate(&mut ends, &[3]).unwrap();
            assert!(ends[0] == 0.0 && ends[1..].iter().all(|end| (end + 9.0).abs() < 1e-5), "{bits} bits: {ends:?}");
        }
    }

    #[test]
    fn other_exponentials_and_finer_codes_are_written_as_they_are() {
        assert_eq!(written(8, 0, &Accepts::USUAL), None);
        assert_eq!(written(4, 1, &Accepts::USUAL), None, "nothing says that it is at most 1");
        assert_eq!(written(4, 0, &SYMMETRIC), None);
    }
}
