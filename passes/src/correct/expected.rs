//! Means that training says a tensor has, without samples.
//!
//! What a folded batch normalization returned has the means and deviations that it was trained to; behind an activation f the mean is
//! E\[f(β + γ z)\] with z normal, one sum over a grid of z for every activation.
//!
//! Source: Nagel et al. 2019, arXiv:1906.04721, appendix C, whose closed forms for clipped values the sum agrees with.

use crate::id::ValueId;
use crate::ir::{Graph, Node};
use crate::model::{Model, Trained};

/// Beyond so many deviations nothing is left of a normal distribution.
const REACH: f64 = 8.0;
/// Points of the grid on either side of the mean: kinks cost at most the square of a step.
const POINTS: i32 = 2000;

/// The mean of every channel of `value`: that of a tensor that training saw, or of an activation behind one.
pub(super) fn means(model: &Model, value: ValueId) -> Option<Vec<f64>> {
    let (graph, stats) = (model.graph(), model.stats());
    if let Some(trained) = stats.trained(value) {
        return Some(trained.mean.iter().map(|mean| f64::from(*mean)).collect());
    }
    let (_, node) = graph.producer(value)?;
    let trained = stats.trained(node.input(0)?)?;
    let f = activation(graph, node)?;
    Some(expected(trained, &*f))
}

/// E\[f(β + γ z)\] channel by channel.
fn expected(trained: &Trained, f: &dyn Fn(f64) -> f64) -> Vec<f64> {
    let step = REACH / f64::from(POINTS);
    let nodes = (-POINTS..=POINTS).map(|at| f64::from(at) * step);
    let weighed: Vec<(f64, f64)> = nodes.map(|z| (z, (-0.5 * z * z).exp())).collect();
    let total: f64 = weighed.iter().map(|(_, weight)| weight).sum();
    let of = |(mean, deviation): (&f32, &f32)| {
        let (mean, deviation) = (f64::from(*mean), f64::from(deviation.abs()));
        weighed.iter().map(|(z, weight)| weight * f(mean + deviation * z)).sum::<f64>() / total
    };
    trained.mean.iter().zip(trained.deviation.iter()).map(of).collect()
}

/// What `node` makes of every number, where that is one of the usual activations.
fn activation(graph: &Graph, node: &Node) -> Option<Box<dyn Fn(f64) -> f64>> {
    let alpha = |default: f32| f64::from(node.float("alpha", default));
    if !node.op.domain.is_empty() {
        return None;
    }
    Some(match &*node.op.name {
        "Relu" => Box::new(|x: f64| x.max(0.0)),
        "Clip" => {
            let end = |input: usize, name: &str, default: f64| -> Option<f64> {
                match node.input(input) {
                    Some(value) => Some(f64::from(*graph.constant(value)?.floats()?.first()?)),
                    None => Some(node.attrs.get(name).map_or(default, |_| f64::from(node.float(name, 0.0)))),
                }
            };
            let (low, high) = (end(1, "min", f64::NEG_INFINITY)?, end(2, "max", f64::INFINITY)?);
            Box::new(move |x: f64| x.max(low).min(high))
        }
        "LeakyRelu" => {
            let slope = alpha(0.01);
            Box::new(move |x: f64| if x < 0.0 { slope * x } else { x })
        }
        "Sigmoid" => Box::new(|x: f64| 1.0 / (1.0 + (-x).exp())),
        "Tanh" => Box::new(f64::tanh),
        "HardSwish" => Box::new(|x: f64| x * ((x + 3.0) / 6.0).clamp(0.0, 1.0)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    fn trained(mean: f32, deviation: f32) -> Trained {
        Trained { mean: vec![mean].into(), deviation: vec![deviation].into() }
    }

    fn mean_of(op: &str, mean: f32, deviation: f32) -> f64 {
        let text =
            format!("graph (%x: f32[1,1,2,2]) -> (%y) {{ %low = const f32[] [0] %high = const f32[] [6] %y = {op} }}");
        let model = crate::text::parse(&text).unwrap();
        let (_, node) = model.graph().nodes().find(|(_, node)| node.output(0).is_some()).unwrap();
        let f = activation(model.graph(), node).unwrap();
        expected(&trained(mean, deviation), &*f)[0]
    }

    /// A normal number, by Box and Muller.
    fn normal(seed: u64) -> f64 {
        let (u, v) = (uniform(mixed(seed)).max(1e-12), uniform(mixed(seed ^ 0x9e37)));
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }

    const CASES: [(f32, f32); 6] = [(0.0, 1.0), (2.0, 0.5), (-1.5, 2.0), (8.0, 1.0), (-8.0, 1.0), (3.0, 4.0)];

    /// Within three standard errors of a hundred thousand draws.
    #[test]
    fn means_are_those_of_draws() {
        type Case = (&'static str, fn(f64) -> f64);
        let ops: [Case; 4] = [
            ("Relu(%x)", |x| x.max(0.0)),
            ("Clip(%x, %low, %high)", |x| x.clamp(0.0, 6.0)),
            ("LeakyRelu(%x) {alpha=0.1}", |x| if x < 0.0 { 0.1 * x } else { x }),
            ("HardSwish(%x)", |x| x * ((x + 3.0) / 6.0).clamp(0.0, 1.0)),
        ];
        let n = 100_000_u32;
        for (op, f) in ops {
            for (mean, deviation) in CASES {
                let draws = (0..n).map(|seed| f(f64::from(mean) + f64::from(deviation) * normal(seed.into())));
                let (sum, squares) = draws.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
                let (average, power) = (sum / f64::from(n), squares / f64::from(n));
                let error = ((power - average * average).max(0.0) / f64::from(n)).sqrt();
                let found = mean_of(op, mean, deviation);
                assert!((found - average).abs() < 3.0 * error + 1e-4, "{op} of {mean}, {deviation}: {found} {average}");
            }
        }
    }

    /// A clip whose end is out of reach is a Relu, one of no width says nothing, and no deviation is the mean itself.
    #[test]
    fn ends_are_what_they_should_be() {
        let clip = |high: &str, mean: f32, deviation: f32| {
            let text = format!(
                "graph (%x: f32[1,1,2,2]) -> (%y) {{ %low = const f32[] [0] %end = const f32[] [{high}] %y = Clip(%x, %low, %end) }}"
            );
            let model = crate::text::parse(&text).unwrap();
            let (_, node) = model.graph().nodes().find(|(_, node)| node.op.is("Clip")).unwrap();
            expected(&trained(mean, deviation), &*activation(model.graph(), node).unwrap())[0]
        };
        for (mean, deviation) in CASES {
            assert!((clip("1e9", mean, deviation) - mean_of("Relu(%x)", mean, deviation)).abs() < 1e-9);
            assert!(clip("0", mean, deviation).abs() < 1e-12);
        }
        assert!((mean_of("Relu(%x)", 3.0, 0.0) - 3.0).abs() < 1e-12 && mean_of("Relu(%x)", -3.0, 0.0).abs() < 1e-12);
    }
}
