//! Mixed precision: which weights get how many bits.

mod hull;

use std::collections::BTreeSet;

use super::assign::{WeightScale, reencode};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::model::{Decision, Edit, Model, Patch, Plan};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::reconstruct::{Gradient, SALIENCIES, Saliency};
use crate::sensitivity::{FORMS, Form, METRICS, Metric, Probe};
use crate::target::Scheme;
use crate::{ops, parallel};

crate::declare_pass! {
    /// Gives every weight the bits that it needs: the cheapest loss per bit first, until a budget is spent or the loss is small
    /// enough.
    ///
    /// Every weight is rounded alone, to nearest in the fewest bits there are to choose, and what that does to the outputs of the model
    /// is measured on a few samples; more bits cost in proportion to the squared rounding error that they make. With `metric=fisher`,
    /// `tacq` or `gradient-l1` (`list sensitivities`) gradients tell it instead, of all weights at once: of the rounding errors e of every
    /// choice Σ F e², Σ A |e| |w| or Σ A |e|, F being the mean square of the gradient by a weight w, A its mean size. With `metric=moments`, `pivots`
    /// or `weights` nothing follows a layer but what it returns, or its weight: the relative error of either, choice by choice. With
    /// `shares=moments` or `pivots` a run per weight still tells what the fewest bits cost, and those how it falls with more. Losses are taken to add
    /// up; of each weight's choices those on the lower convex hull count, and steps between them are taken in the order of loss saved per
    /// bit, so that a larger budget never gives any weight fewer bits. Weights that `--set` names, or that several nodes read, keep theirs.
    INFO {
        name: "allocate-bits",
        source: "output probes and hull allocation as in Dong et al. 2019 (HAWQ), arXiv:1905.03696, and Xiao et al. 2025 (TaCQ), \
                 arXiv:2504.07389",
        cost: "With probes: one forward pass of `samples` samples (4) for every weight. With metric=fisher, tacq or gradient-l1: one forward pass and one back of 32 samples in all, and 4 bytes per weight. With moments or pivots: one forward pass of all samples, and a factorization of every second moment.",
        requires: Facts::ENCODED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "budget", doc: "the mean bits of a weight, scales not counted" },
            OptionInfo { name: "max-drop", doc: "the loss that all weights together may cost; bits only rise from those of the scheme" },
            OptionInfo { name: "bits", doc: "the bits to choose from, such as 2+3+4+8; those of the scheme, 4 and 8 by default" },
            OptionInfo { name: "metric", doc: "error (default): squared error of the outputs over their square; kl-top: divergence of the likeliest classes; moments, pivots, weights: by what the layer returns, or the weight alone; fisher, tacq, gradient-l1: by gradients of the outputs" },
            OptionInfo { name: "shares", doc: "how what a run tells of the fewest bits falls with more: squares (default), as the squared rounding error; moments or pivots, as what the layer returns loses" },
            OptionInfo { name: "samples", doc: "so many samples are run for every weight, 4 by default; for gradients 32, once for all of them" },
            OptionInfo { name: "weights", doc: "how weight scales are chosen: min-max, mse (default) or cfp" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(AllocateBits::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct AllocateBits {
    budget: Option<f64>,
    max_drop: Option<f64>,
    bits: Vec<u32>,
    judge: Judge,
    /// What that is called.
    metric: String,
    samples: usize,
    weights: WeightScale,
    /// What tells how what probes find falls with more bits; squared errors where nothing is said.
    shares: Option<Form>,
}

/// What tells how much the outputs lose.
#[derive(Clone, Copy, Debug)]
enum Judge {
    /// Runs of the model, one per weight.
    Probes(Metric),
    /// What the layer returns, or its weight alone.
    Forms(Form),
    /// Gradients of all weights at once.
    Gradients(&'static Saliency),
}

impl Judge {
    /// The one called `name`.
    fn of(name: &str) -> Result<Self, OptionError> {
        let probes = METRICS.iter().map(|(metric, about)| (Self::Probes(*metric), about));
        let gradients = SALIENCIES.iter().map(|saliency| (Self::Gradients(saliency), &saliency.about));
        let forms = FORMS.iter().map(|(form, about)| (Self::Forms(*form), about));
        let all: Vec<_> = probes.chain(forms).chain(gradients).collect();
        all.iter().find(|(_, about)| about.name == name).map(|(judge, _)| *judge).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|(_, about)| about.name).collect();
            OptionError { option: "metric".into(), problem: format!("`{name}` is none of {}", names.join(", ")) }
        })
    }
}

fn positive(options: &Options, name: &str) -> Result<Option<f64>, OptionError> {
    match options.number(name)? {
        Some(value) if value <= 0.0 => Err(OptionError { option: name.into(), problem: "it must be over 0".into() }),
        other => Ok(other),
    }
}

impl AllocateBits {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let (budget, max_drop) = (positive(options, "budget")?, positive(options, "max-drop")?);
        if budget.is_none() && max_drop.is_none() {
            let problem = "give it, or max-drop: how much may be spent".to_owned();
            return Err(OptionError { option: "budget".into(), problem });
        }
        let number = |text: &str| text.parse().ok().filter(|bits| (2..=8).contains(bits));
        let bits: Option<Vec<u32>> = options.text("bits", "4+8").split('+').map(number).collect();
        let bits = bits.ok_or_else(|| OptionError {
            option: "bits".into(),
            problem: "write numbers from 2 to 8, as in 2+3+4+8".into(),
        })?;
        let name = options.text("metric", "error");
        let judge = Judge::of(name)?;
        let gradients = matches!(judge, Judge::Gradients(_));
        let probes = matches!(judge, Judge::Probes(_));
        if !probes && max_drop.is_some() {
            let problem = format!("{name} tells no squared errors of outputs, which max-drop is about: give a budget");
            return Err(OptionError { option: "metric".into(), problem });
        }
        let samples = options.count("samples", if gradients { 32 } else { 4 })?.max(1);
        let shares = match options.text("shares", "squares") {
            "squares" => None,
            other => match FORMS.iter().find(|(form, about)| about.name == other && *form != Form::Weights) {
                Some((form, _)) if probes => Some(*form),
                Some(_) => {
                    let problem = format!("`{name}` tells what every choice costs: leave it out");
                    return Err(OptionError { option: "shares".into(), problem });
                }
                None => {
                    let problem = format!("`{other}` is none of squares, moments, pivots");
                    return Err(OptionError { option: "shares".into(), problem });
                }
            },
        };
        let (metric, weights) = (name.to_owned(), WeightScale::of(options)?);
        Ok(Self { budget, max_drop, bits, judge, metric, samples, weights, shares })
    }

    /// What second moments are asked for: all that tells, or how what probes tell falls with bits.
    fn form(&self) -> Option<Form> {
        match self.judge {
            Judge::Forms(form) => Some(form),
            Judge::Probes(_) => self.shares,
            Judge::Gradients(_) => None,
        }
    }

    /// How much the outputs depend on weights, where gradients tell it.
    fn told(&self, model: &Model, cx: &PassContext<'_>) -> Result<Option<Told>, PassError> {
        let Judge::Gradients(saliency) = self.judge else { return Ok(None) };
        if model.plan().encodings().next().is_none() {
            return Ok(None);
        }
        let gradient = saliency.gradient(model, cx, self.samples, INFO.about.name)?.map_err(|reason| {
            PassError::Model(format!(
                "gradients cannot tell which weights need bits: {reason}; take the metric error or kl-top"
            ))
        })?;
        Ok(Some(Told { saliency, gradient }))
    }

    /// The bits to choose from, ascending.
    fn choices(&self, cx: &PassContext<'_>) -> Vec<u32> {
        let base = cx.scheme.weight_bits;
        let lowest = if self.budget.is_some() { 0 } else { base };
        let all: BTreeSet<u32> = self.bits.iter().copied().chain([base]).collect();
        let fits = |bits: &u32| *bits >= lowest && in_bits(cx, *bits).is_some();
        all.into_iter().filter(fits).collect()
    }
}

/// The scheme in so many bits, without zero points where the target has none for so many; `None` where it takes neither.
pub(super) fn in_bits(cx: &PassContext<'_>, weight_bits: u32) -> Option<Scheme> {
    let scheme = Scheme { weight_bits, ..cx.scheme };
    let schemes = [scheme, Scheme { asymmetric: false, ..scheme }];
    schemes.into_iter().find(|scheme| cx.target.refuses(scheme).is_none())
}

/// What gradients tell.
struct Told {
    saliency: &'static Saliency,
    gradient: Gradient,
}

/// A weight to choose bits for.
struct Candidate {
    node: NodeId,
    site: Site,
    /// Elements.
    size: usize,
    /// Squared rounding errors, choice by choice; what they cost where gradients tell it.
    noise: Vec<f64>,
    /// How it is written, choice by choice.
    encodings: Vec<Encoding>,
    /// Its square.
    energy: f64,
}

impl Candidate {
    /// What the first choice costs, for the others.
    fn share(&self, at: usize) -> f64 {
        if self.noise[0] > 0.0 { self.noise[at] / self.noise[0] } else { 0.0 }
    }
}

/// The weights whose bits are free, with the errors that each of `choices` makes, at what gradients have `told` that they cost.
fn candidates(
    model: &Model,
    cx: &PassContext<'_>,
    choices: &[u32],
    weights: WeightScale,
    told: Option<&Told>,
) -> Result<Vec<Candidate>, PassError> {
    let graph = model.graph();
    let users = Users::of(graph);
    let nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    let found = parallel::map(&nodes, |&node| {
        let roles = ops::linear(graph, node)?;
        let site = Site::Use { node, input: roles.weight };
        model.plan().encoding(site)?;
        let value = graph.node(node)?.input(roles.weight.into())?;
        users.only_input(value)?;
        let named = |name: &str| cx.schemes.contains_key(name);
        if named(&graph.node(node)?.name) || named(&graph.value(value).name) {
            return None;
        }
        let tensor = graph.constant(value)?;
        let values = tensor.floats()?;
        let encoding = |bits: u32| {
            let edits = reencode(model, node, (in_bits(cx, bits)?, weights), cx.target.accepts())?;
            edits.iter().find_map(|edit| encoding_at(edit, site)).cloned()
        };
        let costs = match told {
            None => None,
            Some(told) => match told.gradient.get(&site).filter(|gradient| gradient.len() == values.len()) {
                None => return Some(Err(unreached(&graph.node(node)?.name))),
                Some(gradient) => Some((told.saliency, gradient)),
            },
        };
        let encodings: Vec<Encoding> = choices.iter().map(|&bits| encoding(bits)).collect::<Option<_>>()?;
        let noise = encodings.iter().map(|encoding| {
            let mut rounded = values.to_vec();
            encoding.simulate(&mut rounded, tensor.shape()).ok()?;
            let errors = rounded.iter().zip(values.iter()).map(|(a, b)| a - b);
            Some(match costs {
                Some((saliency, gradient)) => saliency.of(gradient, errors, &values),
                None => errors.map(|error| f64::from(error).powi(2)).sum(),
            })
        });
        let noise = noise.collect::<Option<_>>()?;
        let energy = values.iter().map(|w| f64::from(*w).powi(2)).sum();
        Some(Ok(Candidate { node, site, size: tensor.len(), noise, encodings, energy }))
    });
    found.into_iter().flatten().collect()
}

/// Puts what `form` tells in the place of squared errors. Of how many weights it could not: they count by squared errors over their square,
/// times what usually comes of those where it could.
fn by_form(form: Form, model: &Model, cx: &PassContext<'_>, candidates: &mut [Candidate]) -> Result<usize, PassError> {
    cx.progress.begin(INFO.about.name, candidates.len() as u64);
    let (mut untold, mut ratios) = (Vec::new(), Vec::new());
    // One after the other: each takes the square of its columns, and is parallel inside.
    for (at, candidate) in candidates.iter_mut().enumerate() {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        let energy = candidate.energy.max(f64::MIN_POSITIVE);
        candidate.noise.iter_mut().for_each(|noise| *noise /= energy);
        match form.losses(model, candidate.node, &candidate.encodings) {
            Some(told) => {
                ratios.extend(Some(told[0] / candidate.noise[0]).filter(|ratio| ratio.is_finite()));
                candidate.noise = told;
            }
            None => untold.push(at),
        }
        cx.progress.step();
    }
    cx.progress.end();
    ratios.sort_by(f64::total_cmp);
    let usual = ratios.get(ratios.len() / 2).copied().unwrap_or(1.0);
    untold.iter().for_each(|at| candidates[*at].noise.iter_mut().for_each(|noise| *noise *= usual));
    Ok(untold.len())
}

fn unreached(node: &str) -> PassError {
    PassError::Model(format!("gradients do not reach the weight of node `{node}`: take the metric error or kl-top"))
}

fn encoding_at(edit: &Edit, wanted: Site) -> Option<&Encoding> {
    match edit {
        Edit::Encode { site, encoding } if *site == wanted => Some(encoding),
        _ => None,
    }
}

impl Pass for AllocateBits {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        self.form().map_or_else(BTreeSet::new, |form| form.wishes(model, cx))
    }

    fn keeps_samples(&self) -> bool {
        matches!(self.judge, Judge::Gradients(_))
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        if cx.scheme.weight_format.is_some() {
            let problem = format!("scheme {}: only integer weights come in several widths", cx.scheme);
            return Err(PassError::Model(problem));
        }
        let choices = self.choices(cx);
        let Some(base) = choices.iter().position(|&bits| bits == cx.scheme.weight_bits) else { return Ok(patch) };
        let told = self.told(model, cx)?;
        let mut candidates = candidates(model, cx, &choices, self.weights, told.as_ref())?;
        if candidates.is_empty() {
            return Ok(patch);
        }
        if let Some(form) = self.form() {
            let without = by_form(form, model, cx, &mut candidates)?;
            if without > 0 && form != Form::Weights {
                let message = format!(
                    "of {without} of {} weights there are no second moments: their own squared errors count, as those of the others do",
                    candidates.len()
                );
                patch.note(Diagnostic::new(diag::NO_MOMENTS, Severity::Note, Place::Model, message));
            }
        }
        let losses = match self.judge {
            Judge::Probes(metric) => {
                let probe = Probe::new(model.graph(), cx, self.samples, metric)?;
                let alone: Vec<Plan> = candidates.iter().map(|c| Plan::of(c.site, c.encodings[0].clone())).collect();
                probe.losses(&alone, cx, INFO.about.name)?
            }
            Judge::Gradients(_) | Judge::Forms(_) => candidates.iter().map(|candidate| candidate.noise[0]).collect(),
        };
        let rows = rows(&candidates, &choices, &losses);
        let elements: f64 = candidates.iter().map(|candidate| candidate.size as f64).sum();
        let limits = hull::Limits { cost: self.budget.map(|bits| bits * elements), loss: self.max_drop, usual: base };
        let chosen = hull::allocate(&rows, limits).map_err(|least| {
            PassError::Model(format!(
                "a budget of {} bits per weight cannot be met: {} bits are the fewest with a choice of {choices:?}; take a scheme \
                 of fewer bits, or give others with bits=",
                self.budget.unwrap_or(0.0),
                least / elements
            ))
        })?;
        let total: f64 = chosen.iter().zip(&rows).map(|(&at, row)| row.0[at].1).sum();
        let spent: f64 = chosen.iter().zip(&rows).map(|(&at, row)| row.0[at].0).sum::<f64>() / elements;
        let cost = match self.judge {
            Judge::Forms(_) => "the relative errors of all of them should sum to",
            _ => "rounded to nearest they should cost",
        };
        let message = format!("its weights take {spent:.3} bits each; {cost} {total:.3e} by {}", self.metric);
        patch.note(Diagnostic::new(diag::ALLOCATED, Severity::Note, Place::Model, message));
        for ((candidate, &at), loss) in candidates.iter().zip(&chosen).zip(&losses) {
            if at != base {
                let scheme = in_bits(cx, choices[at]).ok_or_else(|| {
                    PassError::Model("a bug in onnx-quant: bits that the target refuses were chosen".into())
                })?;
                let edits = reencode(model, candidate.node, (scheme, self.weights), cx.target.accepts());
                edits.into_iter().flatten().for_each(|edit| patch.edit(edit));
                patch.count(if at > base { "given more bits" } else { "given fewer bits" }, 1);
            }
            let old = model.plan().decision(candidate.node).map_or("", |decision| &decision.reason);
            let share = loss / losses.iter().sum::<f64>().max(f64::MIN_POSITIVE) * 100.0;
            let (bits, fewest) = (choices[at], choices[0]);
            let reason =
                format!("{old}; its weight has {bits} bits: in {fewest} it alone makes {share:.2} % of the loss");
            patch.edit(Edit::Decide { node: candidate.node, decision: Decision { quantized: true, reason } });
        }
        Ok(patch)
    }
}

/// What every choice costs in bits, and loses: as much of the measured loss of the fewest bits as its rounding error is of theirs.
fn rows(candidates: &[Candidate], choices: &[u32], losses: &[f64]) -> Vec<hull::Row> {
    let row = |(candidate, loss): (&Candidate, &f64)| {
        let point = |(at, &bits): (usize, &u32)| (f64::from(bits) * candidate.size as f64, loss * candidate.share(at));
        hull::Row(choices.iter().enumerate().map(point).collect())
    };
    candidates.iter().zip(losses).map(row).collect()
}
