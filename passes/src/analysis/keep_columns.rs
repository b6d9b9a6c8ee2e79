//! The inputs of matrix products whose weights matter most, kept in float.

mod split;

use std::collections::BTreeSet;

use super::allocate;
use super::assign::{WeightScale, holds_zero};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Node;
use crate::ir::walk::Users;
use crate::model::{Model, Patch};
use crate::ops::{self, Linear};
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::reconstruct::{Gradient, SALIENCIES, Saliency};
use crate::target::Scheme;

crate::declare_pass! {
    /// Keeps the weights of few inputs of every matrix product in float, in a product of their own:
    ///
    /// ```text
    /// Y = X W + b   →   Y = (X W₀ + b) + X[…, K] W[K, :],   W₀ = W with the rows K of 0
    /// ```
    ///
    /// K are the rows whose rounding costs most: by `moments` E\[x\[k\]²\] Σ Δ\[k, n\]², as many in every product; by `tacq`, `fisher` or
    /// `gradient-l1` (`list sensitivities`) what gradients say, over all products together, per weight. Δ is what the encodings that were chosen round to
    /// nearest. Scales are chosen anew without them. Runtimes have no product with a mask: whole inputs are the form that they run. Declines
    /// weights that several nodes read, activations of fixed ranges, grids without 0, and what the user keeps in float; codes that are learned by gradients
    /// afterwards may use the rows of zeros.
    INFO {
        name: "keep-columns",
        source: "Xiao et al. 2025 (TaCQ), arXiv:2504.07389; whole inputs instead of single weights, and the form without gradients, ours",
        cost: "Every weight is rounded to nearest, and those that keep inputs have their scales chosen anew; by gradients one forward pass and one back of `samples` samples. When the model runs, per product a Gather, a product by the rows that are kept, and a sum.",
        requires: Facts::CALIBRATED.and(Facts::ENCODED),
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: UpToRounding,
        options: &[
            OptionInfo { name: "share", doc: "so much of all weights is kept, 0.005 by default, up to 0.25: by moments of every product, none of those with fewer inputs than one in that share" },
            OptionInfo { name: "by", doc: "moments (default), tacq, fisher or gradient-l1" },
            OptionInfo { name: "samples", doc: "so many samples for gradients, 32 by default" },
            OptionInfo { name: "weights", doc: "how weight scales are chosen: min-max, mse (default) or cfp" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(KeepColumns::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct KeepColumns {
    share: f64,
    by: Option<&'static Saliency>,
    samples: usize,
    weights: WeightScale,
}

impl KeepColumns {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let share = options.number("share")?.unwrap_or(0.005);
        if !(0.0..=0.25).contains(&share) {
            return Err(OptionError { option: "share".into(), problem: "it lies between 0 and 0.25".into() });
        }
        let by = match options.text("by", "moments") {
            "moments" => None,
            name => Some(SALIENCIES.iter().find(|s| s.about.name == name).ok_or_else(|| OptionError {
                option: "by".into(),
                problem: format!("`{name}` is none of moments, fisher, tacq, gradient-l1"),
            })?),
        };
        let samples = options.count("samples", 32)?;
        if samples == 0 {
            let problem = "without samples nothing is measured".into();
            return Err(OptionError { option: "samples".into(), problem });
        }
        Ok(Self { share, by, samples, weights: WeightScale::of(options)? })
    }
}

/// A product with a weight of its own.
struct Candidate {
    node: NodeId,
    roles: Linear,
    inputs: usize,
    outputs: usize,
    /// What rounding every row costs.
    saliency: Vec<f64>,
}

/// Products that can keep rows, with nothing said of them yet. Those that keep some already are none.
fn open(model: &Model, cx: &PassContext<'_>) -> Vec<Candidate> {
    let graph = model.graph();
    let users = Users::of(graph);
    let candidate = |id: NodeId| {
        let node = graph.node(id).filter(|node| node.op.is("MatMul") || node.op.is("Gemm"))?;
        let roles = ops::linear(graph, id).filter(|roles| roles.weight == 1)?;
        // Zeros stand for what is kept.
        model.plan().encoding(Site::Use { node: id, input: 1 }).filter(|encoding| holds_zero(encoding.grid))?;
        let [rows, columns] = *graph.constant_input(node, 1)?.shape() else { return None };
        // Shared weights stay.
        users.only_input(node.input(1)?)?;
        let fixed = model.plan().encoding_of_use(graph, id, 0).is_some_and(|e| !e.granularity.is_dynamic());
        let bare = node.int("transA", 0) == 0 && !cx.keep_float.contains_key(&*node.name);
        let coded = model.plan().encoding(Site::Value(node.output(0)?)).is_some();
        let rounded = model.plan().codes(Site::Use { node: id, input: 1 }).is_some();
        (bare && !fixed && !coded && !rounded && ops::kept_rows(graph, id).is_none()).then_some(())?;
        let (inputs, outputs) = if roles.out_axis == 1 { (rows, columns) } else { (columns, rows) };
        Some(Candidate { node: id, roles, inputs, outputs, saliency: Vec::new() })
    };
    graph.nodes().filter_map(|(id, _)| candidate(id)).collect()
}

/// The elements of row `k` of a weight of so many `inputs` and `outputs`.
fn row(values: &[f32], c: &Candidate, k: usize) -> Vec<f32> {
    if c.roles.out_axis == 1 {
        values[k * c.outputs..][..c.outputs].to_vec()
    } else {
        (0..c.outputs).map(|n| values[n * c.inputs + k]).collect()
    }
}

/// What rounding every row of `c` costs; `None` where it was never measured.
fn saliency(model: &Model, c: &Candidate, told: Option<(&Saliency, &Gradient)>) -> Option<Vec<f64>> {
    let graph = model.graph();
    let node = graph.node(c.node)?;
    let site = Site::Use { node: c.node, input: 1 };
    let weight = graph.constant_input(node, 1)?;
    let values = weight.floats()?;
    let mut rounded = values.to_vec();
    model.plan().encoding(site)?.simulate(&mut rounded, weight.shape()).ok()?;
    let errors = |k: usize| row(&rounded, c, k).into_iter().zip(row(&values, c, k)).map(|(a, b)| a - b);
    let score = |k: usize, power: f64| power * errors(k).map(|e| f64::from(e).powi(2)).sum::<f64>();
    let scores: Vec<f64> = if let Some((saliency, gradient)) = told {
        let gradient = gradient.get(&site).filter(|g| g.len() == values.len())?;
        (0..c.inputs).map(|k| saliency.of(&row(gradient, c, k), errors(k), &row(&values, c, k))).collect()
    } else {
        let x = node.input(0)?;
        let powers = model.stats().peaks(x, graph.value(x).ty.rank()?.checked_sub(1)?)?.powers();
        (powers.len() == c.inputs).then(|| (0..c.inputs).map(|k| score(k, powers[k])).collect())?
    };
    Some(scores.into_iter().map(|s| if s.is_finite() { s } else { 0.0 }).collect())
}

/// The rows that each of `all` keeps, ascending: a larger share keeps them, and more. Ties go to the first.
fn chosen(all: &[Candidate], share: f64, together: bool) -> Vec<Vec<usize>> {
    let mut kept = vec![Vec::new(); all.len()];
    let groups: Vec<Vec<usize>> =
        if together { vec![(0..all.len()).collect()] } else { (0..all.len()).map(|i| vec![i]).collect() };
    for group in groups {
        let size = |i: &usize| (all[*i].inputs * all[*i].outputs) as f64;
        let mut room = share * group.iter().map(size).sum::<f64>();
        let mut rows: Vec<(f64, usize, usize)> = group
            .iter()
            .flat_map(|&i| all[i].saliency.iter().enumerate().map(move |(k, s)| (s / all[i].outputs as f64, i, k)))
            .collect();
        rows.retain(|(score, ..)| *score > 0.0);
        rows.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        for (_, i, k) in rows {
            room -= all[i].outputs as f64;
            // Stopping, and not skipping, keeps choices nested.
            if room < -1e-6 {
                break;
            }
            kept[i].push(k);
        }
    }
    kept.iter_mut().for_each(|rows| rows.sort_unstable());
    kept
}

impl Pass for KeepColumns {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    /// Only at the first moment before encodings exist: every product that could be one.
    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        if self.by.is_some() {
            return BTreeSet::new();
        }
        let graph = model.graph();
        let peaks = |(id, node): (NodeId, &Node)| {
            (node.op.is("MatMul") || node.op.is("Gemm")).then_some(())?;
            ops::linear(graph, id).filter(|roles| roles.weight == 1)?;
            cx.target.rule(&node.op)?;
            let x = node.input(0).filter(|x| crate::simulate::is_float_activation(graph, *x))?;
            Some((x, Wish::Peaks { axis: graph.value(x).ty.rank()?.checked_sub(1)? }))
        };
        graph.nodes().filter_map(peaks).collect()
    }

    fn keeps_samples(&self) -> bool {
        self.by.is_some()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let mut all = open(model, cx);
        // A second look: with `together` the share was spent by the first.
        let spent = model.graph().nodes().any(|(id, _)| ops::kept_rows(model.graph(), id).is_some());
        if all.is_empty() || spent {
            return Ok(patch);
        }
        let gradient = match self.by {
            None => None,
            Some(by) => Some((
                by,
                by.gradient(model, cx, self.samples, INFO.about.name)?.map_err(|reason| {
                    PassError::Model(format!("gradients cannot tell which inputs to keep: {reason}; take by=moments"))
                })?,
            )),
        };
        let told = gradient.as_ref().map(|(by, gradient)| (*by, gradient));
        let scores = parallel::map(&all, |c| saliency(model, c, told));
        patch.count("products that were not measured", scores.iter().filter(|scores| scores.is_none()).count() as u64);
        let scores = scores.into_iter().map(Option::unwrap_or_default);
        all.iter_mut().zip(scores).for_each(|(c, scores)| c.saliency = scores);
        let users = Users::of(model.graph());
        let mut bits = Bits::default();
        for (c, rows) in all.iter().zip(chosen(&all, self.share, told.is_some())) {
            let mark = patch.mark();
            let scheme = scheme(model, cx, c).map(|scheme| (scheme, self.weights));
            let is_split = !rows.is_empty()
                && split::split((model, &users), cx.target.accepts(), (c, &rows), scheme, &mut patch).is_some();
            if is_split {
                patch.count("products", 1);
                patch.count("inputs kept", rows.len() as u64);
            } else {
                patch.roll_back(&mark);
            }
            bits.see(model, c, if is_split { rows.len() } else { 0 });
        }
        if !patch.is_empty() {
            patch.note(bits.said());
        }
        Ok(patch)
    }
}

/// In what the weight of `c` is written: as the user or `allocate-bits` said.
fn scheme(model: &Model, cx: &PassContext<'_>, c: &Candidate) -> Option<Scheme> {
    let (graph, site) = (model.graph(), Site::Use { node: c.node, input: 1 });
    let node = graph.node(c.node)?;
    let named = cx.schemes.get(&*node.name).or_else(|| cx.schemes.get(&*graph.value(node.input(1)?).name));
    match named {
        Some(scheme) => Some(*scheme),
        None if cx.scheme.weight_format.is_some() => Some(cx.scheme),
        None => allocate::in_bits(cx, model.plan().encoding(site)?.grid.info().bits),
    }
}

/// Bits of all weights that could keep inputs, kept ones and the numbers of those counted; scales not, as in `allocate-bits`.
#[derive(Default)]
struct Bits {
    elements: f64,
    codes: f64,
    kept: f64,
}

impl Bits {
    /// Counts `c`, of which so many rows are kept: zeros stand for them in codes too.
    fn see(&mut self, model: &Model, c: &Candidate, rows: usize) {
        let elements = (c.inputs * c.outputs) as f64;
        let bits = model.plan().encoding(Site::Use { node: c.node, input: 1 }).map_or(0, |e| e.grid.info().bits);
        self.elements += elements;
        self.codes += elements * f64::from(bits);
        self.kept += rows as f64 * (32.0 * c.outputs as f64 + 64.0);
    }

    fn said(&self) -> Diagnostic {
        let all = self.elements.max(1.0);
        let message = format!(
            "weights of matrix products take {:.3} bits each, {:.3} of them for inputs that are kept in float",
            (self.codes + self.kept) / all,
            self.kept / all
        );
        Diagnostic::new(diag::ALLOCATED, Severity::Note, Place::Model, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::{mixed, uniform};

    fn candidates(seed: u64) -> Vec<Candidate> {
        let roles = Linear { activation: 0, weight: 1, out_axis: 1, bias: None };
        let of = |at: u64| {
            let (inputs, outputs) = (5 + (mixed(seed ^ at) % 40) as usize, 3 + (mixed(seed ^ at ^ 0x99) % 20) as usize);
            let saliency = (0..inputs as u64).map(|k| (4.0 * uniform(mixed(seed) ^ (at << 8 | k))).floor()).collect();
            Candidate { node: NodeId(0), roles, inputs, outputs, saliency }
        };
        (0..4).map(of).collect()
    }

    /// A larger share keeps what a smaller one does, no share is exceeded, and what costs nothing is never kept.
    #[test]
    fn choices_are_nested_and_within_their_share() {
        for seed in 0..100 {
            let all = candidates(seed);
            for together in [false, true] {
                let mut before: Vec<Vec<usize>> = vec![Vec::new(); all.len()];
                for share in [0.0, 0.02, 0.05, 0.1, 0.25] {
                    let kept = chosen(&all, share, together);
                    let numbers = |c: &Candidate, rows: &Vec<usize>| (rows.len() * c.outputs) as f64;
                    let size = |c: &Candidate| (c.inputs * c.outputs) as f64;
                    let taken: f64 = all.iter().zip(&kept).map(|(c, rows)| numbers(c, rows)).sum();
                    assert!(taken <= share * all.iter().map(size).sum::<f64>() + 1e-6, "{seed} {share}: {taken}");
                    let each = |(c, rows): (&Candidate, &Vec<usize>)| numbers(c, rows) <= share * size(c) + 1e-6;
                    assert!(together || all.iter().zip(&kept).all(each), "{seed} {share}");
                    for ((c, rows), less) in all.iter().zip(&kept).zip(&before) {
                        assert!(
                            less.iter().all(|row| rows.contains(row)) && rows.is_sorted(),
                            "{seed} {share}: nested"
                        );
                        assert!(rows.iter().all(|row| c.saliency[*row] > 0.0));
                    }
                    before = kept;
                }
            }
        }
    }
}
