//! Which samples out of many stand for all of them.
//!
//! What rounding by data needs of samples are second moments of what layers read. A few samples stand for a pool when their mean
//! moments are near the pool's; herding picks them one by one, each the one that brings the mean nearest. Moments of a few
//! probed tensors are compared in a random projection, whose inner products are those of the moments on average.
//!
//! Source: Chen, Welling and Smola 2010, arXiv:1203.3472; moments as features, and the sketch, ours.

use crate::exec::Dataset;
use crate::id::ValueId;
use crate::ir::Graph;
use crate::model::Plan;
use crate::padding::Mask;
use crate::pass::{PassContext, PassError};
use crate::simulate::{Simulation, is_float_activation};
use crate::tensor::Tensor;
use crate::{ops, padding, parallel, seed};

/// Tensors that are probed, spread over the graph.
const PROBES: usize = 6;
/// Directions that every probe is projected on.
const DIRECTIONS: usize = 16;
/// Rows of one sample's tensor that are looked at, evenly spread.
const ROWS: usize = 256;

/// The numbers of `n` samples of `dataset` whose second moments come nearest to those of all, ascending; all of them where there
/// are no more. Deterministic: ties go to the smaller number.
///
/// # Errors
/// [`PassError`] when a sample or the executor fails, or the user interrupts.
pub fn select(graph: &Graph, dataset: &dyn Dataset, cx: &PassContext<'_>, n: usize) -> Result<Vec<usize>, PassError> {
    if n >= dataset.len() {
        return Ok((0..dataset.len()).collect());
    }
    let probes = probes(graph);
    let simulation = Simulation::prepare(graph, &Plan::default(), cx.executor, &probes)?;
    cx.progress.begin("select", dataset.len() as u64);
    let states =
        parallel::workers(cx.threads, dataset.len(), Vec::new, |features: &mut Vec<(usize, Vec<f32>)>, at| {
            if cx.progress.cancelled() {
                return Err(PassError::Interrupted);
            }
            let feeds = dataset.sample(at)?;
            let mask = Mask::of(graph, &feeds);
            let mut feature = vec![0.0; probes.len() * DIRECTIONS * (DIRECTIONS + 1) / 2];
            let size = DIRECTIONS * (DIRECTIONS + 1) / 2;
            simulation.run_with(&feeds, &mut |probe, tensor| {
                let tensor = padding::without(mask.as_ref(), tensor);
                feature[probe * size..(probe + 1) * size].copy_from_slice(&sketch(probe, &tensor));
            })?;
            features.push((at, feature));
            cx.progress.step();
            Ok::<(), PassError>(())
        })?;
    cx.progress.end();
    let mut features: Vec<(usize, Vec<f32>)> = states.into_iter().flatten().collect();
    features.sort_by_key(|(at, _)| *at);
    let mut features: Vec<Vec<f32>> = features.into_iter().map(|(_, feature)| feature).collect();
    balance(&mut features, probes.len());
    Ok(herd(&features, n))
}

/// Activations that linear nodes read, evenly spread over the graph.
fn probes(graph: &Graph) -> Vec<ValueId> {
    let read = |(id, node): (crate::id::NodeId, &crate::ir::Node)| {
        let roles = ops::linear(graph, id)?;
        node.input(roles.activation.into()).filter(|value| is_float_activation(graph, *value))
    };
    let mut all: Vec<ValueId> = graph.nodes().filter_map(read).collect();
    all.dedup();
    let n = PROBES.min(all.len());
    let mut probes: Vec<ValueId> = (0..n).map(|i| all[(2 * i + 1) * all.len() / (2 * n)]).collect();
    probes.sort_unstable();
    probes.dedup();
    probes
}

/// Of the rows of `tensor` (channels on axis 1 of images, else on the last), the upper triangle of the mean of y yᵀ for the
/// projection y of every row, off the diagonal times √2, so that inner products are those of whole matrices.
#[expect(clippy::cast_possible_truncation, reason = "features are f32")]
fn sketch(probe: usize, tensor: &Tensor) -> Vec<f32> {
    let mut moments = vec![0.0_f64; DIRECTIONS * DIRECTIONS];
    let shape = tensor.shape();
    let values = tensor.values::<f32>().unwrap_or_default();
    let (channels, inner) = match shape {
        [_, channels, rest @ ..] if shape.len() >= 4 => (*channels, rest.iter().product()),
        _ => (shape.last().copied().unwrap_or(1), 1_usize),
    };
    let rows = values.len().checked_div(channels).unwrap_or(0);
    let step = rows.div_ceil(ROWS).max(1);
    let seen = rows.div_ceil(step);
    for row in (0..rows).step_by(step) {
        let (outer, within) = (row / inner.max(1), row % inner.max(1));
        let mut y = [0.0_f64; DIRECTIONS];
        for channel in 0..channels {
            let v = values[(outer * channels + channel) * inner.max(1) + within];
            let v = if v.is_finite() { f64::from(v) } else { 0.0 };
            let signs = signs(probe, channel);
            y.iter_mut().enumerate().for_each(|(k, y)| *y += if signs >> k & 1 == 1 { v } else { -v });
        }
        for i in 0..DIRECTIONS {
            for j in i..DIRECTIONS {
                moments[i * DIRECTIONS + j] += y[i] * y[j];
            }
        }
    }
    let scale = 1.0 / (seen.max(1) * DIRECTIONS) as f64;
    let upper = (0..DIRECTIONS).flat_map(|i| (i..DIRECTIONS).map(move |j| (i, j)));
    upper
        .map(|(i, j)| {
            let off = if i == j { 1.0 } else { std::f64::consts::SQRT_2 };
            (moments[i * DIRECTIONS + j] * scale * off) as f32
        })
        .collect()
}

/// One random sign per direction.
fn signs(probe: usize, channel: usize) -> u64 {
    seed::mixed((probe as u64) << 32 | channel as u64)
}

/// Gives every probe the same weight: the pool's mean moments of each get length 1.
#[expect(clippy::cast_possible_truncation, reason = "features are f32")]
fn balance(features: &mut [Vec<f32>], probes: usize) {
    let size = features.first().map_or(0, Vec::len) / probes.max(1);
    for probe in 0..probes {
        let range = probe * size..(probe + 1) * size;
        let mean: Vec<f64> = range
            .clone()
            .map(|k| features.iter().map(|f| f64::from(f[k])).sum::<f64>() / features.len() as f64)
            .collect();
        let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
        if length > 0.0 {
            features
                .iter_mut()
                .for_each(|f| f[range.clone()].iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32));
        }
    }
}

/// Greedy herding: each pick brings the mean of the picked nearest to the mean of all. Ascending.
fn herd(features: &[Vec<f32>], n: usize) -> Vec<usize> {
    let dims = features.first().map_or(0, Vec::len);
    let mean: Vec<f64> =
        (0..dims).map(|k| features.iter().map(|f| f64::from(f[k])).sum::<f64>() / features.len() as f64).collect();
    let mut sum = vec![0.0_f64; dims];
    let mut picked: Vec<usize> = Vec::new();
    let all: Vec<usize> = (0..features.len()).collect();
    for t in 0..n {
        let wanted: Vec<f64> = mean.iter().zip(&sum).map(|(m, s)| (t + 1) as f64 * m - s).collect();
        // ‖sum + φ − (t+1) mean‖², less what does not depend on φ.
        let costs = parallel::map(&all, |&at| {
            let f = &features[at];
            f.iter().zip(&wanted).map(|(f, w)| f64::from(*f) * (f64::from(*f) - 2.0 * w)).sum::<f64>()
        });
        let open = all.iter().filter(|at| !picked.contains(at));
        let Some(&best) = open.min_by(|a, b| costs[**a].total_cmp(&costs[**b])) else { break };
        sum.iter_mut().zip(&features[best]).for_each(|(s, f)| *s += f64::from(*f));
        picked.push(best);
    }
    picked.sort_unstable();
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance(features: &[Vec<f32>], picked: &[usize]) -> f64 {
        let dims = features[0].len();
        let mean = |of: &mut dyn Iterator<Item = usize>, k: usize| {
            let all: Vec<f64> = of.map(|at| f64::from(features[at][k])).collect();
            all.iter().sum::<f64>() / all.len() as f64
        };
        (0..dims)
            .map(|k| (mean(&mut (0..features.len()), k) - mean(&mut picked.iter().copied(), k)).powi(2))
            .sum::<f64>()
    }

    /// Eight clusters, one after the other: the picked ones come much nearer to the pool than the first ones do, and nearer than
    /// evenly spread ones.
    #[test]
    fn the_picked_stand_for_the_pool() {
        let features: Vec<Vec<f32>> = (0..200_usize)
            .map(|i| {
                (0..12_usize).map(|k| ((i / 25 * 31 + k * 17) % 23) as f32 + ((i * 13 + k) % 5) as f32 * 0.1).collect()
            })
            .collect();
        let picked = herd(&features, 16);
        assert_eq!(picked.len(), 16);
        let first: Vec<usize> = (0..16).collect();
        let spread: Vec<usize> = (0..16).map(|i| i * 12).collect();
        assert!(distance(&features, &picked) < 0.02 * distance(&features, &first));
        assert!(distance(&features, &picked) < distance(&features, &spread));
        assert!(herd(&features, 200).len() == 200 && distance(&features, &herd(&features, 200)) < 1e-9);
    }

    /// On average over directions, inner products of sketches are those of the moments.
    #[test]
    fn sketches_keep_inner_products() {
        let tensor = |seed: usize| {
            let value = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
            Tensor::of([64, 8], (0..512).map(value).collect::<Vec<f32>>())
        };
        let (a, b) = (tensor(1), tensor(5));
        let exact = {
            let rows = |t: &Tensor| t.values::<f32>().unwrap().chunks(8).map(<[f32]>::to_vec).collect::<Vec<_>>();
            let (a, b) = (rows(&a), rows(&b));
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            a.iter().flat_map(|x| b.iter().map(move |y| dot(x, y).powi(2))).sum::<f64>() / (64.0 * 64.0)
        };
        let n = 200;
        let mean = (0..n)
            .map(|probe| {
                let (x, y) = (sketch(probe, &a), sketch(probe, &b));
                x.iter().zip(&y).map(|(x, y)| f64::from(x * y)).sum::<f64>()
            })
            .sum::<f64>()
            / n as f64;
        // The expectation of the product of two such forms is ⟨A, B⟩ + (tr A tr B + ⟨A, B⟩ − …) / k: near, not equal.
        assert!(mean > 0.8 * exact && mean < 3.0 * exact, "{mean} {exact}");
    }

    /// Small whole numbers, of which a mean over sixteen is exact.
    fn drawn(seed: u64) -> Vec<Vec<f32>> {
        let value = |i: u64| (seed::mixed(seed << 32 | i) % 9) as f32 - 4.0;
        (0..16).map(|at| (0..3).map(|k| value(3 * at + k)).collect()).collect()
    }

    /// The same picks from their definition.
    fn by_definition(features: &[Vec<f32>], n: usize) -> Vec<usize> {
        let mean = |k: usize| features.iter().map(|f| f64::from(f[k])).sum::<f64>() / features.len() as f64;
        let mut picked: Vec<usize> = Vec::new();
        for _ in 0..n {
            let gap = |at: usize| {
                let of = |k: usize| {
                    let sum: f64 = picked.iter().chain([&at]).map(|&i| f64::from(features[i][k])).sum();
                    (sum - (picked.len() + 1) as f64 * mean(k)).powi(2)
                };
                (0..features[0].len()).map(of).sum::<f64>()
            };
            let open = (0..features.len()).filter(|at| !picked.contains(at));
            let best = open.min_by(|a, b| gap(*a).total_cmp(&gap(*b))).unwrap();
            picked.push(best);
        }
        picked.sort_unstable();
        picked
    }

    #[test]
    fn picks_are_those_of_trying_all_and_more_keep_the_fewer() {
        for seed in 0..40 {
            let features = drawn(seed);
            let mut fewer: Vec<usize> = Vec::new();
            for n in 1..=16 {
                let picked = herd(&features, n);
                assert_eq!(picked, by_definition(&features, n), "{seed}");
                assert!(
                    picked.len() == n && fewer.iter().all(|at| picked.contains(at)),
                    "{seed}: {fewer:?} {picked:?}"
                );
                fewer = picked;
            }
        }
    }

    #[test]
    fn features_of_nothing_are_taken_in_order() {
        for mut features in [vec![Vec::new(); 5], vec![vec![0.0; 3]; 5]] {
            balance(&mut features, 3);
            assert!(features.iter().flatten().all(|v| *v == 0.0));
            assert_eq!(herd(&features, 3), [0, 1, 2]);
        }
        balance(&mut [], 3);
        assert!(herd(&[], 3).is_empty());
    }

    /// The order of the pool plays no part where no two samples are as good; neither does the unit of all features.
    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "features are f32")]
    fn picks_follow_their_samples_wherever_those_stand() {
        for seed in 0..20_u64 {
            let value = |i: u64| seed::uniform(seed << 32 | i) as f32 - 0.4;
            let features: Vec<Vec<f32>> = (0..40).map(|at| (0..5).map(|k| value(5 * at + k)).collect()).collect();
            // 7 and 40 share no divisor: every sample has a place of its own.
            let moved: Vec<Vec<f32>> = (0..40).map(|at| features[7 * at % 40].clone()).collect();
            let louder: Vec<Vec<f32>> = features.iter().map(|f| f.iter().map(|v| 8.0 * v).collect()).collect();
            for n in [1, 4, 11, 39] {
                let picked = herd(&features, n);
                let mut found: Vec<usize> = herd(&moved, n).into_iter().map(|at| 7 * at % 40).collect();
                found.sort_unstable();
                assert_eq!(found, picked, "{seed} {n}");
                assert_eq!(herd(&louder, n), picked, "{seed} {n}");
            }
        }
    }
}
