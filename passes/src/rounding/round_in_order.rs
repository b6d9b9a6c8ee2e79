//! Layer after layer, each behind the layers that are rounded already.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::clip_weights::{Form, clip};
use super::coupled::Couplings;
use super::descend::descend;
use super::held_out::{self, Asked, Chosen};
use super::layer::Layer;
use super::leanings::leanings;
use super::learned::Learning;
use super::norms::{self, Norm};
use super::prefix::{self, Halves, Inputs, Measured};
use super::readers::{self, Read};
use super::refit_scales::refit;
use super::tile::{Quadratic, Tile};
use super::told::{Asks, OfLayer};
use super::{Method, Prepared, round, work};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Dataset;
use crate::grid::Grid;
use crate::id::{NodeId, Site};
use crate::ir::walk::Users;
use crate::lockstep::{self, Lockstep};
use crate::model::{Edit, Model, Patch};
use crate::observe::Gram;
use crate::ops;
use crate::parallel;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::reconstruct::{Learner, reserved};
use crate::target::Scheme;

crate::declare_pass! {
    /// Chooses codes layer by layer in the order of the graph, each layer measured behind the layers rounded before it.
    ///
    /// The float model and the model as planned run side by side. Where a layer reads x̃ instead of x, rounding aims at the
    /// weight that comes nearest to the float output from x̃ (and, for `target=sum`, also makes up for the error that the
    /// other operand of a sum right after the layer carries), by ridge regression:
    ///
    /// ```text
    /// W* = W + (W E[(x − x̃) x̃ᵀ] + E[e x̃ᵀ]) (E[x̃ x̃ᵀ] + λ)⁻¹
    /// ```
    ///
    /// Off the diagonal moments are shrunk by d / (n + d) for n effective rows. Where there are fewer than five rows for two columns, and codes
    /// have fewer than eight bits, moments of either half of the samples choose codes of a few rows that those of the other half judge, both
    /// around the weight that all samples ask for; where that saves loss, moments are shrunk more and channels are taken to be louder than
    /// they were. Layers with a bias, in their own node or in an addition right after it, have their mean error taken back in it; where that
    /// bias is in float, the plan notes the corrected one.
    ///
    /// With `coupled`, rows of a weight make up for one another where the outputs of the model add up their errors: each block of rows aims at
    /// W* less what the errors of the rows before it bring there. Where no gradients come back from the outputs, a note says so.
    ///
    /// With `adaptive=η` H is (1 − η) E\[x̃ x̃ᵀ\] + η Σ Gᵀ G at the size of the former, with G the gradient of a weight by what the outputs lose on one
    /// sample: inputs count by what the outputs make of them.
    ///
    /// Two runs of the model where memory holds the tensors between stages; samples for which it does not run again from their inputs,
    /// by stages that are made ready anew where memory does not hold those.
    /// Everything that is no such layer goes to nearest, and so does everything where there are no
    /// samples. With `norms=1` the scales and shifts of norms that compute in float are fitted too, where they stand in the order;
    /// with `readers=1` once what reads them is rounded, to what that computes.
    INFO {
        name: "round-in-order",
        source: "order: Frantar et al. 2022, arXiv:2210.17323, section 5; target: Zhong et al. 2024 (ERQ), arXiv:2407.06794, \
                 section 3.2; rows that make up for one another: Tseng et al. 2025 (YAQA), arXiv:2505.22988, section 3; moments of gradients of weights: Edalati et al. 2024 (OAC), arXiv:2405.15025; norms: Li et \
                 al. 2023, arXiv:2309.02784, in closed form, for all readers of a norm at once ours; the sum's error ours",
        cost: "Float model and planned model once per sample, side by side; per weight of m × d a Gram matrix of what it reads (T d²), its factor (d³ / 3), and the method; with drift two more products of that size; for layers that are asked on held-out samples four to ten more factors, and the method for a few rows. Memory: tensors between two stages of all samples, as far as --max-memory allows; the others run again from their inputs. `coupled` adds the float model forward twice and back once for some 8,192 rows of what layers compute (32 texts of 256 words), and as many times that as it says, m² / 2 numbers per weight until it is rounded, and m³ / 3 and m² d multiply-adds. `adaptive` adds the same runs for 64 gradients of samples or more, d² / 2 numbers per weight until it is rounded, and m d² / 2 multiply-adds per gradient. `readers` adds 2 m d² multiply-adds per weight, d³ and 64 d² bytes per norm (of up to 4096 channels), and runs norms, and what follows them up to the next product, a second time. `stakes` adds two sweeps of the float model, each block forward twice and back once, and a Gram matrix for every layer where several share one; `learn` what the parameterization costs, `loss=fisher` four such sweeps before, and 8 bytes per element that blocks return, for every sample.",
        requires: Facts::ENCODED,
        establishes: Facts::ROUNDED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "method", doc: "how codes are chosen: gptq (default), or any of `list roundings`" },
            OptionInfo { name: "target", doc: "weight: W itself; output: the float output; sum (default): what follows the sum" },
            OptionInfo { name: "damping", doc: "λ of the regression in mean diagonals of the moments, 1 by default" },
            OptionInfo { name: "clip", doc: "1: ranges of weights are chosen anew before, as `clip-weights` does; 0 by default" },
            OptionInfo { name: "sweeps", doc: "sweeps of coordinate descent after it, 0 by default" },
            OptionInfo { name: "refit", doc: "rounds of fitting scales, with two sweeps each, 0 by default" },
            OptionInfo {
                name: "stakes",
                doc: "the share of what outputs depend on in what a row weighs, by gradients of the float model; from 0 (default) to 1",
            },
            OptionInfo {
                name: "coupled",
                doc: "1: rows of a weight make up for one another where the outputs add up their errors, by some 8,000 gradients of the float model at every layer; other numbers by so many times as many; 0 by default",
            },
            OptionInfo {
                name: "adaptive",
                doc: "the share of the second moments of gradients of the weight itself, squared sample by sample, in the matrix that rounding goes by (OAC: 1), for weights of up to 4096 columns; from 0 (default) to 1, and nothing where `method=nearest` goes by no moments. `loss_vs_nearest` of the report is by that matrix then",
            },
            OptionInfo { name: "norms", doc: "1: scales and shifts of norms are fitted anew behind rounded layers, and learned where blocks are; 2: only learned; 0 by default; not learned with loss=pd" },
            OptionInfo {
                name: "readers",
                doc: "1: once all products that read a norm are rounded, its scales and shifts are fitted to what those, and sums that read it, compute, and their biases corrected anew; norms that something else reads stay; 0 by default",
            },
            OptionInfo {
                name: "spare",
                doc: "1: moments leave out every eighth sample, with its variants, which judges what is learned here or after; by its number, so that the order of samples matters; 0 by default",
            },
            OptionInfo {
                name: "lean",
                doc: "1: what is learned here or by `distill` begins where every weight would go if it did not have to lie on a point, so that codes \
                      which matter least change first (not by brecq, scale-aware, lora-rounding and discquant, which begin at the float \
                      weight); a byte per weight, and some 16 of those of one layer for the time; 0 by default",
            },
            OptionInfo {
                name: "learn",
                doc: "what is learned of the weights of a block once they are rounded: none (default), or any of `list parameterizations`",
            },
            OptionInfo { name: "iterations", doc: "learning: steps per block, 200 by default" },
            OptionInfo { name: "batch", doc: "learning: samples per step, 8 by default" },
            OptionInfo { name: "layers", doc: "learning: the most weights of neighboring blocks that are learned together, 4 by default" },
            OptionInfo { name: "ends", doc: "learning: a pattern of names of nodes (`*` stands for anything) that blocks end behind, instead of by layers; where a node lies between two tensors that are still to be read, behind the place where one is left" },
            OptionInfo { name: "window", doc: "learning: so many neighboring blocks are learned together, 1 by default" },
            OptionInfo { name: "overlap", doc: "learning: so many blocks of a window are learned again in the next one, 0 by default" },
            OptionInfo {
                name: "correct-distribution",
                doc: "learning: 1 moves what blocks read, a little, until what they compute has the means and deviations that batch \
                      normalization saw in training; other numbers as many times as freely; 0 by default; what errors weigh by \
                      loss=fisher stays that of samples that are not moved",
            },
            OptionInfo { name: "rate", doc: "learning: times the usual rate of the method, 1 by default" },
            OptionInfo { name: "patience", doc: "learning: a block ends where so many checks in a row, of ten or more on the way, find nothing better; 0 (default): never" },
            OptionInfo { name: "drop", doc: "learning: the share of activations left in float, 0 by default" },
            OptionInfo {
                name: "inputs",
                doc: "learning: what a block reads while it is learned: quantized (default), what the rounded blocks before it give; float, what \
                      the float model does; mixed, element by element one or the other, drawn anew in every step. It is judged on the first",
            },
            OptionInfo { name: "codes", doc: "learning: 0 leaves codes as they are, and learns what they are multiplied with; 1 by default" },
            OptionInfo { name: "biases", doc: "learning: 0 leaves biases as they are; 1 by default" },
            OptionInfo { name: "scales", doc: "learning: 0 leaves scales of weights as they are; 1 by default" },
            OptionInfo { name: "steps", doc: "learning: 1 learns scales of activations too; 0 by default" },
            OptionInfo { name: "loss", doc: "learning: one of `list losses`: mse (default); kl for the outputs of the graph, where they are logits or probabilities; fitting, which tells those by how they are computed; pd, which adds what the rest of the model makes of a block; fisher, which weighs every element by what the outputs depend on it; fisher-each, the same with all samples alike; channels, by means and variances of channels; hidden, which adds what softmaxes along the hidden axis lose" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(RoundInOrder::new(options)?)) };

/// What a layer should imitate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Weight,
    Output,
    Sum,
}

/// See [`INFO`].
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "options that are set one by one")]
struct RoundInOrder {
    method: &'static dyn Method,
    target: Target,
    damping: f64,
    sweeps: usize,
    refit: usize,
    clips: bool,
    asks: Asks,
    norms: bool,
    readers: bool,
    spares: bool,
    leans: bool,
    learner: Option<Learner>,
}

impl RoundInOrder {
    fn new(options: &Options) -> Result<Self, OptionError> {
        let target = match options.text("target", "sum") {
            "weight" => Target::Weight,
            "output" => Target::Output,
            "sum" => Target::Sum,
            other => {
                let problem = format!("`{other}` is none of weight, output, sum");
                return Err(OptionError { option: "target".into(), problem });
            }
        };
        let (spares, learner) = (options.count("spare", 0)? > 0, Learner::of(options)?);
        let norms = match (options.count("norms", 0)?, learner.is_some()) {
            (norms @ (0 | 1), _) => norms == 1,
            (2, true) => false,
            (2, false) => {
                let problem = "nothing is learned: 1 fits norms, or say what is learned (learn=)".to_owned();
                return Err(OptionError { option: "norms".into(), problem });
            }
            _ => return Err(OptionError { option: "norms".into(), problem: "it must be 0, 1 or 2".into() }),
        };
        Ok(Self {
            method: round::method(options, "gptq")?,
            target,
            damping: match options.number("damping")? {
                None => 1.0,
                Some(damping) if damping > 0.0 => damping,
                Some(_) => {
                    let problem = "it must be over 0".to_owned();
                    return Err(OptionError { option: "damping".into(), problem });
                }
            },
            sweeps: options.count("sweeps", 0)?,
            refit: options.count("refit", 0)?,
            clips: options.count("clip", 0)? > 0,
            asks: Asks::of(options, spares)?,
            norms,
            readers: options.count("readers", 0)? > 0,
            spares,
            leans: options.count("lean", 0)? > 0,
            learner,
        })
    }

    /// Whether codes depend on what layers read, and not on their weights alone.
    fn goes_by_moments(&self) -> bool {
        self.method.needs_data() || self.sweeps > 0 || self.refit > 0 || self.clips || self.leans
    }

    /// The edits that round `layer` and correct its bias.
    fn layer(
        &self,
        model: &Model,
        inputs: &Inputs,
        (measured, told): (&Measured, &OfLayer),
        bias: Option<Site>,
        scheme: &Scheme,
        asked: &mut Asked,
    ) -> Option<Vec<Edit>> {
        let moments = measured.of_reading.get(&inputs.reading)?;
        let sum = measured.of_sum.get(&inputs.node).filter(|_| self.target == Target::Sum);
        let layer = Layer::of(model, inputs.node)?.behind(Arc::clone(&moments.gram), bias.is_some());
        layer.has_gram().then_some(())?;
        let drift = moments.drift.as_ref().filter(|_| self.target != Target::Weight);
        let outputs = told.outputs.as_ref().filter(|outputs| outputs.channels == layer.rows / layer.groups);
        let (goal, couplings) = parallel::both(
            || prefix::target(&layer, drift, sum, self.damping),
            || outputs.map(|outputs| Couplings::of(outputs, layer.groups)),
        );
        let layer = layer.towards(goal);
        let grid = layer.encoding.grid;
        // Scales of block formats have a format of their own, which fitting would leave.
        let free = scheme.block_format().is_none() && layer.scales_are_own();
        let chosen =
            moments.halves.as_ref().filter(|_| asked.goes_on()).and_then(|halves| self.held_out(&layer, halves, free));
        let layer = chosen.map_or(layer.clone(), |chosen| layer.trusted(chosen.trust));
        if let Some(chosen) = chosen {
            asked.keep(inputs.node, chosen);
        }
        let layer = told.adapted(layer, moments.drift.as_ref());
        let rounded = |free: bool| match &couplings {
            Some(couplings) => self.together(&layer, couplings, (grid, free)),
            None => work::over_tiles(
                &layer,
                None,
                |q| self.method.prepare(q),
                |tiles, q, prepared| self.round(tiles, (grid, free), q, prepared.as_deref()),
            ),
        };
        let kept = || rounded(false).map(|rounded| rounded.points);
        let chosen = rounded(free)?;
        let rounded = match &couplings {
            // Rows make up for those of their own run.
            Some(_) if chosen.saturates(model, &layer) => rounded(false)?,
            _ => chosen.in_reach(model, &layer, kept)?,
        };
        let shift = bias.and_then(|bias| {
            let decoded = rounded.decoded(&layer);
            Some((bias, prefix::shift(&layer, moments, sum, &decoded)?))
        });
        let leanings = if self.leans { leanings(&layer, &rounded, outputs) } else { None };
        let mut edits = rounded.edits(model, &layer);
        if edits.is_empty() {
            return None; // the bias does not even fit the scales that were assigned: all stays as it was, and goes to nearest
        }
        if let Some((bias, shift)) = shift {
            correct(model, bias, &shift, &mut edits);
        }
        edits.extend(leanings.map(|leanings| Edit::Lean { site: layer.site, leanings }));
        Some(edits)
    }

    /// Chooses points of `layer`, and scales where they are `free`, its rows making up for one another.
    fn together(
        &self,
        layer: &Layer<'_>,
        couplings: &Couplings,
        (grid, free): (&dyn Grid, bool),
    ) -> Option<work::Rounded> {
        let rows = |group: usize, _: usize| couplings.tiles(group);
        let prepare = |q: &Quadratic| self.method.prepare(q);
        work::over_groups(layer, None, &rows, prepare, |group, tiles, q, prepared| {
            let choose = |tiles: &mut [Tile]| self.round(tiles, (grid, free), q, prepared.as_deref());
            match couplings.of_group(group) {
                Some(coupling) => coupling.round(tiles, &choose),
                None => choose(tiles),
            }
        })
    }

    /// Chooses points of `tiles`, and scales where they are `free`.
    fn round(
        &self,
        tiles: &mut [Tile],
        (grid, free): (&dyn Grid, bool),
        q: &Quadratic,
        prepared: Option<&dyn Prepared>,
    ) {
        if self.clips && free {
            parallel::each(tiles, |tile| clip(tile, grid, q, Form::Diagonal));
        }
        match prepared {
            Some(prepared) => prepared.round_all(tiles, grid, q),
            None => parallel::each(tiles, |tile| tile.nearest(grid)),
        }
        parallel::each(tiles, |tile| {
            descend(tile, grid, q, self.sweeps);
            if self.refit > 0 && free {
                refit(tile, grid, q, self.refit, 2);
            }
        });
    }

    /// Fits the norms of `reads`, whose layers are rounded now, and has `walk` run again from there.
    fn fit_to_readers(
        &self,
        reads: &[&Read],
        (users, here, measured): (&Users, &[Inputs], &Measured),
        (walk, work): (&mut Lockstep<'_>, &mut Model),
        patch: &mut Patch,
    ) -> Result<(), PassError> {
        let mut first: Option<usize> = None;
        for read in reads {
            let Some(edits) = read.fit(work, users, here, measured, self.target == Target::Sum) else {
                patch.count("norms that fitting to what reads them did not help", 1);
                continue;
            };
            patch.count("norms fitted to what reads them", 1);
            patch.and_on(work, edits)?;
            let from = walk.stage_of(read.norm.node);
            first = Some(first.map_or(from, |first| first.min(from)));
        }
        first.map_or(Ok(()), |first| walk.again(first, work.plan()))
    }

    /// How far moments of what `layer` reads are trusted, by what a few of its rows lose on either half of the samples.
    fn held_out(&self, layer: &Layer<'_>, halves: &[Arc<Gram>; 2], free: bool) -> Option<Chosen> {
        let grid = layer.encoding.grid;
        held_out::choose(layer, halves, |chosen, judge, parts| match chosen {
            Some(chosen) => work::loss_of(
                chosen,
                judge,
                parts,
                |q| self.method.prepare(q),
                |tiles, q, prepared| {
                    self.round(tiles, (grid, free), q, prepared.as_deref());
                },
            ),
            None => work::loss_of(
                judge,
                judge,
                parts,
                |_| (),
                |tiles, _, ()| {
                    tiles.iter_mut().for_each(|tile| tile.nearest(grid));
                },
            ),
        })
    }
}

/// Adds the edit that shifts `bias`, which `edits` may have encoded anew.
#[expect(clippy::cast_possible_truncation, reason = "biases are f32")]
pub(super) fn correct(model: &Model, bias: Site, shift: &[f64], edits: &mut Vec<Edit>) {
    let Site::Use { node, input } = bias else { return };
    let graph = model.graph();
    let Some(tensor) = graph.node(node).and_then(|node| graph.constant_input(node, input.into())) else { return };
    let Some(values) = tensor.floats().filter(|values| values.len() == shift.len()) else { return };
    let corrected: Vec<f32> = values.iter().zip(shift).map(|(b, s)| (f64::from(*b) + s) as f32).collect();
    let anew = edits.iter().find_map(|edit| match edit {
        Edit::Encode { site, encoding } if *site == bias => Some(encoding.clone()),
        _ => None,
    });
    let encoding = anew.or_else(|| model.plan().encoding(bias).cloned());
    edits.extend(Edit::constant(bias, tensor.shape(), corrected, encoding.as_ref()));
}

impl Pass for RoundInOrder {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn keeps_samples(&self) -> bool {
        true
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        if cx.dataset.is_none_or(Dataset::is_empty) {
            round::note_no_moments(model, self.method, &mut patch);
            round::to_nearest(model, &BTreeSet::new(), &mut patch)?;
            return Ok(patch);
        }
        round::note_beyond_data(model, &mut patch);
        let mut work = model.clone();
        let users = Users::of(model.graph());
        let mut layers = Inputs::all(model, &users);
        let by = (self.method, self.goes_by_moments());
        let mut told = self.asks.tell((model, &layers), by, cx, &mut patch)?;
        for layer in &mut layers {
            layer.reading.weighed_for = Some(layer.node).filter(|node| told.roots.weigh(*node));
        }
        let norms = if self.norms { norms::find(model.graph(), model.plan()) } else { Vec::new() };
        let reads = if self.readers { readers::find(model, &users, &layers) } else { Vec::new() };
        let of_norms = norms.iter().map(|norm| norm.node).chain(reads.iter().map(|read| read.norm.node));
        let stops: BTreeSet<NodeId> = layers.iter().map(|layer| layer.node).chain(of_norms).collect();
        let stage_of = lockstep::stages(model.graph(), &stops);
        let learning = Learning::new(self.learner.as_ref(), model, &stage_of, cx)?;
        let again = reads.iter().map(|read| read.span(&stage_of));
        let spans: Vec<_> = learning.spans().into_iter().chain(again).collect();
        let held = told.held();
        let walk = Lockstep::new(model.graph(), model.plan(), cx, stage_of, &spans)?.sparing(self.spares);
        let learns = if self.learner.is_some() { reserved(cx) } else { 0 };
        let mut walk = walk.beside(held.saturating_sub(cx.state_budget).saturating_add(learns)).holding(held);
        let last = stops.iter().map(|node| walk.stage_of(*node)).max().unwrap_or(0);
        let samples = cx.dataset.map_or(0, Dataset::len);
        let spared = (0..samples).filter(|index| walk.is_spared(*index)).count();
        patch.count("samples left to judge what is learned", spared as u64);
        cx.progress.begin(INFO.about.name, layers.len() as u64 + learning.steps());
        let mut asked = Asked::default();
        for stage in 1..=last {
            walk.advance(work.plan())?;
            let here = layers.iter().filter(|layer| walk.stage_of(layer.node) == stage);
            let of_sums = self.target == Target::Sum;
            let here: Vec<Inputs> = here.map(|layer| layer.at_its_stage(model.graph(), &walk, of_sums)).collect();
            let few = |inputs: &Inputs| Layer::of(&work, inputs.node).is_some_and(|layer| held_out::tells(&layer));
            let reads: Vec<&Read> = reads.iter().filter(|read| read.is_ready(&walk, stage)).collect();
            let apart = asked.goes_on() && here.iter().any(few) || !reads.is_empty();
            let halves = if apart { Halves::Apart } else { Halves::Together };
            let measured = prefix::measure(&walk, model.graph(), work.plan(), &here, samples, (&told.roots, halves))?;
            measured
                .nonfinite
                .iter()
                .for_each(|(value, count)| patch.note(diag::nonfinite(&model.graph().value(*value).name, *count)));
            for inputs in &here {
                let bias = ops::bias_site(model.graph(), &users, inputs.node);
                let own = (&measured, &told.take(inputs.node));
                let edits = self.layer(&work, inputs, own, bias, &cx.scheme, &mut asked).unwrap_or_default();
                patch.count("rounded in order", u64::from(!edits.is_empty()));
                patch.and_on(&mut work, edits)?;
                cx.progress.step();
            }
            self.fit_to_readers(&reads, (&users, &here, &measured), (&mut walk, &mut work), &mut patch)?;
            let norms: Vec<Norm> = norms.iter().filter(|norm| walk.stage_of(norm.node) == stage).copied().collect();
            let fitted = norms::fit(&walk, model.graph(), work.plan(), &norms)?;
            patch.count("norms fitted", fitted.iter().filter(|edit| norms::is_scale(edit, &norms)).count() as u64);
            patch.and_on(&mut work, fitted)?;
            learning.after(stage, (&mut walk, &mut work), cx, &mut patch)?;
        }
        cx.progress.end();
        if let Some(said) = asked.said(model.graph()) {
            patch.note(Diagnostic::new(diag::HELD_OUT, Severity::Note, Place::Model, said));
        }
        round::to_nearest(&work, &BTreeSet::new(), &mut patch)?;
        Ok(patch)
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::tests::{independent, with_a_large_bias};
    use super::prefix::Moments;
    use super::*;
    use crate::model::record;
    use crate::pass::{PassManager, Pipeline};
    use crate::reconstruct::testing::{Drawn, NoTarget, Tapes, two_products_of};

    /// One row whose bias leaves no room for a finer scale, and the others have theirs all the same.
    #[test]
    fn a_large_bias_holds_no_other_row_back() {
        let (model, node) = with_a_large_bias();
        let users = Users::of(model.graph());
        let inputs = Inputs::all(&model, &users)[0];
        let moments = Moments { gram: independent(), halves: None, drift: None };
        let measured = Measured { of_reading: [(inputs.reading, moments)].into(), ..Measured::default() };
        let options = Options([("clip".to_owned(), "1".to_owned())].into());
        let bias = ops::bias_site(model.graph(), &users, node);
        let scheme = Scheme::parse("w4a8").unwrap();
        let pass = RoundInOrder::new(&options).unwrap();
        let edits = pass
            .layer(&model, &inputs, (&measured, &OfLayer::default()), bias, &scheme, &mut Asked::default())
            .unwrap();
        let scales = edits.iter().find_map(|edit| match edit {
            Edit::Encode { site, encoding } if Some(*site) != bias => Some(encoding.scale.to_vec()),
            _ => None,
        });
        assert_eq!(scales.unwrap(), [0.15, 0.3, 1.0]);
    }

    /// A digest of what `round-in-order` with `options` makes of two products within so much memory, and its notes that gradients do not tell.
    fn rounded(options: &str, bytes: u64) -> (u64, Vec<String>) {
        let data = Drawn(24);
        let given = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
        let mut cx = PassContext { state_budget: bytes, pair_budget: bytes, ..given };
        let pipeline = Pipeline::parse(&format!("round-in-order{{{options}}}"), &crate::catalogue::passes()).unwrap();
        let (model, trace) = PassManager::default().run(&pipeline, two_products_of(80, 0.7), &mut cx).unwrap();
        let notes = trace.notes.into_iter().filter(|note| note.code == diag::NO_GRADIENTS);
        (record::digest(model.plan()), notes.map(|note| note.message).collect())
    }

    #[test]
    fn gradients_that_nothing_goes_by_are_not_drawn_and_a_note_says_so() {
        let (plain, none) = rounded("method=nearest", u64::MAX);
        let (asked, notes) = rounded("method=nearest, adaptive=0.5", u64::MAX);
        assert!(asked == plain && none.is_empty(), "{none:?}");
        assert!(notes.len() == 1 && notes[0].contains("sweeps=1") && notes[0].contains("nearest"), "{notes:?}");
        let (_, notes) = rounded("method=nearest, adaptive=1, sweeps=2", u64::MAX);
        assert!(notes.is_empty(), "behind it, moments count: {notes:?}");
    }

    #[test]
    fn stages_made_ready_anew_come_to_the_same_codes() {
        let codes = |pair_budget: u64, state_budget: u64| {
            let data = Drawn(9);
            let given = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let mut cx = PassContext { pair_budget, state_budget, ..given };
            let pipeline = Pipeline::parse("round-in-order{sweeps=1}", &crate::catalogue::passes()).unwrap();
            let (model, _) = PassManager::default().run(&pipeline, two_products_of(40, 0.7), &mut cx).unwrap();
            record::digest(model.plan())
        };
        let all = codes(1 << 30, 0);
        assert!([(0, u64::MAX), (0, 0), (200, 0)].iter().all(|(pair, state)| codes(*pair, *state) == all));
    }

    #[test]
    fn rows_make_up_for_one_another_where_gradients_tell_and_a_note_says_where_not() {
        let (alone, none) = rounded("coupled=0", u64::MAX);
        let (together, passed) = rounded("coupled=1", u64::MAX);
        assert_ne!(alone, together);
        assert!(none.is_empty() && passed.is_empty(), "{none:?} {passed:?}");
        assert_eq!(rounded("coupled=1", u64::MAX).0, together, "the same every time");
        let (tight, notes) = rounded("coupled=1", 50);
        assert_eq!((tight, notes.len()), (rounded("coupled=0", 50).0, 1));
        let options = |coupled: &str| Options([("coupled".to_owned(), coupled.to_owned())].into());
        assert!(["-1", "nan", "1e9"].iter().all(|odd| RoundInOrder::new(&options(odd)).is_err()));
        assert!(notes[0].contains("--max-memory"), "{notes:?}");
    }

    /// What gradients of weights tell changes codes where it is asked for, and is the same every time.
    #[test]
    fn gradients_of_weights_have_their_share() {
        let (alone, _) = rounded("adaptive=0", u64::MAX);
        let (half, notes) = rounded("adaptive=0.5", u64::MAX);
        let (whole, _) = rounded("adaptive=1", u64::MAX);
        assert!(alone != half && half != whole && alone == rounded("sweeps=0", u64::MAX).0);
        assert!(notes.is_empty(), "{notes:?}");
        assert_eq!(rounded("adaptive=0.5", u64::MAX).0, half, "the same every time");
        let (tight, notes) = rounded("adaptive=1", 50);
        assert_eq!((tight, notes.len()), (rounded("adaptive=0", 50).0, 1));
        assert!(notes[0].contains("--max-memory"), "{notes:?}");
        let refused = |given: &[(&str, &str)]| {
            let options = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            RoundInOrder::new(&Options(options)).err().map(|error| error.problem)
        };
        assert!(refused(&[("adaptive", "2")]).unwrap().contains("from 0 to 1"));
        assert!(refused(&[("adaptive", "0.5"), ("stakes", "0.5")]).unwrap().contains("one of both"));
    }

    /// Fewer tapes side by side, and tapes in parts, come to the same codes; where not even that fits, the fix is named.
    #[test]
    fn memory_decides_how_tapes_run_and_not_what_is_learned() {
        let learned = |room: u64| {
            let data = Drawn(9);
            let limited = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let mut cx = PassContext { lone_budget: 8192 + room, pair_budget: 8192, ..limited };
            let text = "round-in-order{learn=brecq, iterations=12, batch=4, layers=2}";
            let pipeline = Pipeline::parse(text, &crate::catalogue::passes()).unwrap();
            let planned = PassManager::default().run(&pipeline, two_products_of(40, 0.7), &mut cx);
            planned.map(|(model, _)| crate::model::record::digest(model.plan())).map_err(|error| error.to_string())
        };
        let plenty = learned(1 << 30).unwrap();
        let all: Vec<_> = (0..40).map(|step| learned(step * 512)).collect();
        let fits = all.iter().position(Result::is_ok).unwrap();
        assert!(fits > 0 && all[fits..].iter().all(|found| *found == Ok(plenty)), "{all:?}");
        let refused = all[0].as_ref().unwrap_err();
        assert!(["--max-memory", "layers="].iter().all(|fix| refused.contains(fix)), "{refused}");
    }
}
