//! Scales of activations, chosen by what the model makes of them.

use std::collections::BTreeSet;

use super::blocks::{self, Block};
use super::steps;
use super::tail::Tail;
use crate::encoding::Encoding;
use crate::exec::Dataset;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{self, User, Users};
use crate::judges;
use crate::lockstep::{self, Lockstep};
use crate::model::{Edit, Model, Patch, bias};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Searches the scale of every quantizer of activations, block by block, by what the outputs of the model lose.
    ///
    /// ```text
    /// L(s) = Σ over outputs (their prediction difference) + λ Σ over what the block gives (its error over its power)
    /// ```
    ///
    /// The block runs as it is planned, on what the planned blocks before it give, and all behind it in float: outputs that are logits or
    /// probabilities differ by their divergence, others by their squared error over their power. Of the candidates that with the least loss
    /// on the samples that are fitted is taken, where it loses less on those that judge too (every eighth; all where there are few). Scales
    /// that are powers of two stay that. Biases in codes follow. Scales that an operator ties to another tensor's, that are read in several
    /// blocks, or that belong to a format of their own stay. Forward runs alone: no gradients are asked for.
    INFO {
        name: "search-scales",
        source: "Liu et al. 2023 (PD-Quant), arXiv:2212.07048, section 3.2: prediction difference with activation scales; the candidates and the judges ours",
        cost: "For every quantizer and sample the block and all behind it, once per candidate. Memory: two more copies of the weights from the block on. Behind the rounding of weights.",
        requires: Facts::ENCODED,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "by", doc: "prediction (default): what the outputs lose when all behind the block is float; block: what the block loses alone" },
            OptionInfo { name: "candidates", doc: "factors tried for every scale, from half to one and a half, 20 by default; of powers of two a quarter, a half and 2" },
            OptionInfo { name: "reconstruction", doc: "what errors of the block weigh beside those of the outputs, 0.1 by default" },
            OptionInfo { name: "samples", doc: "the most samples, 64 by default" },
            OptionInfo { name: "layers", doc: "the most weights of a block, 4 by default" },
        ],
    }
}

/// The pass.
pub(crate) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(SearchScales::of(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct SearchScales {
    /// Whether the outputs of the model count, and not the block's alone.
    by_outputs: bool,
    candidates: usize,
    /// λ.
    reconstruction: f64,
    samples: usize,
    layers: usize,
}

/// A block with the scales that are searched in it.
struct Turn {
    block: Block,
    sites: Vec<Site>,
    /// The node before which the walk stops: all that the block reads is there.
    stop: NodeId,
}

impl SearchScales {
    fn of(options: &Options) -> Result<Self, OptionError> {
        let fail = |option: &str, problem: String| OptionError { option: option.into(), problem };
        let by_outputs = match options.text("by", "prediction") {
            "prediction" => true,
            "block" => false,
            other => return Err(fail("by", format!("`{other}` is none of prediction, block"))),
        };
        let candidates = options.count("candidates", 20)?;
        if candidates < 2 {
            return Err(fail("candidates", format!("{candidates} are none to choose from: 2 at least")));
        }
        let reconstruction = options.number("reconstruction")?.unwrap_or(0.1);
        if !(0.0..=1000.0).contains(&reconstruction) {
            return Err(fail("reconstruction", "it must lie between 0 and 1000".into()));
        }
        let samples = options.count("samples", 64)?;
        if samples == 0 {
            return Err(fail("samples", "without samples nothing is measured".into()));
        }
        let layers = options.count("layers", 4)?.max(1);
        Ok(Self { by_outputs, candidates, reconstruction, samples, layers })
    }

    /// What a scale is multiplied with; 1 comes first, so that ties keep it.
    fn factors(&self, power_of_two: bool) -> Vec<f32> {
        if power_of_two {
            return vec![1.0, 0.5, 2.0, 0.25];
        }
        let at = |k: usize| 0.5 + k as f32 / (self.candidates - 1) as f32;
        [1.0].into_iter().chain((0..self.candidates).map(at)).collect()
    }

    /// The blocks in which there is anything to search, in order.
    fn turns(&self, model: &Model) -> Vec<Turn> {
        let (graph, plan) = (model.graph(), model.plan());
        let users = Users::of(graph);
        let turn = |block: Block| {
            let free = steps::free(graph, plan, &users, &block.nodes);
            let first = |site: &Site| block.nodes.iter().position(|id| reads_at(graph, *id, *site));
            let mut sites: Vec<Site> = free.into_iter().collect();
            sites.sort_by_key(first);
            let is_fed = |id: &NodeId| {
                let outputs: Vec<ValueId> = graph.node(*id)?.outputs.iter().flatten().copied().collect();
                (!walk::needed(graph, &BTreeSet::new(), &outputs).1.is_empty()).then_some(*id)
            };
            let stop = block.nodes.iter().find_map(is_fed)?;
            (!sites.is_empty()).then_some(Turn { block, sites, stop })
        };
        blocks::blocks(graph, plan, self.layers, None).into_iter().filter_map(turn).collect()
    }
}

impl Pass for SearchScales {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn keeps_samples(&self) -> bool {
        true
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let dataset = cx.dataset.filter(|data: &&dyn Dataset| !data.is_empty()).ok_or(PassError::NoData)?;
        if !cx.scheme.fixes_ranges() {
            return Err(PassError::Model(format!(
                "search-scales: scheme {} fixes no ranges of activations: leave the pass out, or take a scheme such as w4a8",
                cx.scheme
            )));
        }
        let origins: Vec<usize> = (0..dataset.len()).map(|index| dataset.origin(index)).collect();
        let chosen: BTreeSet<usize> = judges::chosen(&origins, self.samples).into_iter().collect();
        let turns = self.turns(model);
        let stops: BTreeSet<NodeId> = turns.iter().map(|turn| turn.stop).collect();
        let (mut patch, mut work) = (Patch::on(model), model.clone());
        let mut walk = Lockstep::new(model.graph(), model.plan(), cx, lockstep::stages(model.graph(), &stops), &[])?;
        let mut ran = 0;
        cx.progress.begin(INFO.about.name, turns.iter().map(|turn| turn.sites.len() as u64).sum());
        for turn in &turns {
            while ran < walk.stage_of(turn.stop) {
                walk.advance(work.plan())?;
                ran += 1;
            }
            let tail = Tail::of(&walk, &work, cx, &turn.block, (self.by_outputs, self.reconstruction))?;
            let Some(mut tail) = tail else {
                patch.count("blocks that cannot be searched", 1);
                turn.sites.iter().for_each(|_| cx.progress.step());
                continue;
            };
            for &site in &turn.sites {
                let edits = self.search(&walk, (&work, site), &mut tail, &chosen, cx)?;
                patch.count("scales searched", 1);
                patch.count("scales changed", u64::from(!edits.is_empty()));
                patch.and_on(&mut work, edits)?;
                cx.progress.step();
            }
        }
        cx.progress.end();
        Ok(patch)
    }
}

impl SearchScales {
    /// The edits that give `site` the best of its candidates, which `tail` then has; none where it is best as it is.
    fn search(
        &self,
        walk: &Lockstep<'_>,
        (work, site): (&Model, Site),
        tail: &mut Tail,
        chosen: &BTreeSet<usize>,
        cx: &PassContext<'_>,
    ) -> Result<Vec<Edit>, PassError> {
        let Some(old) = work.plan().encoding(site) else { return Ok(Vec::new()) };
        let scaled = |factor: &f32| Encoding { scale: old.scale.iter().map(|s| s * factor).collect(), ..old.clone() };
        let fits = |encoding: &Encoding| encoding.scale.iter().all(|scale| scale.is_normal());
        if !fits(old) {
            return Ok(Vec::new());
        }
        let tried: Vec<Encoding> = self.factors(cx.scheme.power_of_two).iter().map(scaled).filter(fits).collect();
        let told = tail.errors((walk, cx.threads), site, &tried, chosen)?;
        let (held_out, fitted) = judges::split(&told.iter().map(|told| told.origin).collect::<Vec<_>>());
        let judges = if held_out.is_empty() { &fitted } else { &held_out };
        let loss = |candidate: usize, samples: &[usize]| tail.loss(&told, candidate, samples);
        let least = (0..tried.len()).min_by(|a, b| loss(*a, &fitted).total_cmp(&loss(*b, &fitted)));
        let better = least.filter(|best| *best != 0 && loss(*best, judges) < loss(0, judges));
        tracing::debug!(?site, ?least, kept = better.is_none(), "searched");
        let Some(encoding) = better.map(|best| &tried[best]) else { return Ok(Vec::new()) };
        let Some(biases) = biases(work, site, encoding) else { return Ok(Vec::new()) };
        tail.settle(site, encoding);
        Ok([vec![Edit::Encode { site, encoding: encoding.clone() }], biases].concat())
    }
}

/// The biases of what reads `site`, at its new `encoding`; `None` where one would not fit.
fn biases(work: &Model, site: Site, encoding: &Encoding) -> Option<Vec<Edit>> {
    let graph = work.graph();
    let of = |other: Site| if other == site { Some(encoding) } else { work.plan().encoding(other) };
    let readers: Vec<NodeId> = match site {
        Site::Use { node, .. } => vec![node],
        Site::Value(value) => {
            let users = Users::of(graph);
            let node = |user: &User| if let User::Input { node, .. } = user { Some(*node) } else { None };
            users.of_value(value).iter().filter_map(node).collect::<BTreeSet<_>>().into_iter().collect()
        }
    };
    readers.into_iter().map(|node| bias::moved(work, node, &of)).collect::<Option<Vec<_>>>().map(|edits| edits.concat())
}

/// Whether node `id` reads what is rounded at `site`.
fn reads_at(graph: &Graph, id: NodeId, site: Site) -> bool {
    match site {
        Site::Use { node, .. } => node == id,
        Site::Value(value) => graph.node(id).is_some_and(|node| walk::reads(node).any(|read| read == value)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::record;
    use crate::pass::{PassManager, Pipeline};
    use crate::reconstruct::testing::{Drawn, NoTarget, Tapes, two_products_of};

    /// Two products with weights in codes, and what lies between them in 4 bits of this scale.
    fn model(scale: f32) -> (Model, Site) {
        let mut model = two_products_of(8, 0.7);
        let site = Site::Value(model.graph().find("h").unwrap());
        let mut patch = Patch::on(&model);
        let encoding = Encoding::per_tensor(crate::grid::find("int4").unwrap(), scale, 0);
        patch.edit(Edit::Encode { site, encoding });
        model.apply(patch).unwrap();
        (model, site)
    }

    /// `scale` after `pass`, what it counted, and the plan's digest.
    fn searched(pass: &str, scale: f32, cx: &mut PassContext<'_>) -> (f32, BTreeMap<&'static str, u64>, u64) {
        let (model, site) = model(scale);
        let pipeline = Pipeline::parse(pass, &crate::catalogue::passes()).unwrap();
        let (model, trace) = PassManager::default().run(&pipeline, model, cx).unwrap();
        let found = model.plan().encoding(site).unwrap().scale[0];
        (found, trace.steps[0].1.counts.clone(), record::digest(model.plan()))
    }

    fn context(samples: &Drawn) -> PassContext<'_> {
        PassContext { dataset: Some(samples), ..PassContext::new(&NoTarget, &Tapes) }
    }

    #[test]
    fn a_scale_that_is_too_large_or_too_small_is_mended() {
        let samples = Drawn(24);
        // What tanh gives reaches to 1: 7 steps of 1/7.
        for by in ["prediction", "block"] {
            let pass = format!("search-scales{{by={by}, layers=1}}");
            let (down, counts, _) = searched(&pass, 0.28, &mut context(&samples));
            assert!((0.1..0.2).contains(&down) && counts["scales changed"] == 1, "{by}: {down} {counts:?}");
            let (up, ..) = searched(&pass, 0.1, &mut context(&samples));
            assert!((0.11..0.151).contains(&up), "{by}: {up}");
        }
        let mut powers = context(&samples);
        powers.scheme.power_of_two = true;
        let (halved, ..) = searched("search-scales", 1.0, &mut powers);
        assert!([0.5, 0.25].iter().any(|power| (halved - power).abs() < 1e-9), "{halved}");
    }

    #[test]
    fn what_is_best_as_it_is_stays_and_threads_and_memory_say_nothing() {
        let samples = Drawn(24);
        let (scale, _, first) = searched("search-scales", 0.28, &mut context(&samples));
        // The second time nothing is better, or it gets better again and then stays.
        let (again, counts, _) = searched("search-scales{candidates=2}", scale, &mut context(&samples));
        assert!((again - scale).abs() < 1e-9 && counts["scales changed"] == 0, "{again} {scale}");
        for (threads, pair_budget) in [(3, 1 << 30), (1, 0), (2, 0)] {
            let mut cx = PassContext { threads, pair_budget, ..context(&samples) };
            assert_eq!(searched("search-scales", 0.28, &mut cx).2, first, "{threads} {pair_budget}");
        }
    }

    #[test]
    fn what_cannot_be_searched_is_refused() {
        let problem = |options: &str| {
            let text = format!("search-scales{{{options}}}");
            Pipeline::parse(&text, &crate::catalogue::passes()).err().map_or(String::new(), |error| error.to_string())
        };
        assert!(problem("by=output").contains("none of prediction, block"));
        assert!(problem("candidates=1").contains("2 at least") && problem("samples=0").contains("nothing is measured"));
        assert!(problem("reconstruction=-1").contains("between 0 and 1000"));
        let samples = Drawn(8);
        let mut cx = context(&samples);
        cx.scheme = crate::target::Scheme::parse("w4a16").unwrap();
        let pipeline = Pipeline::parse("search-scales", &crate::catalogue::passes()).unwrap();
        let refused = PassManager::default().run(&pipeline, model(0.2).0, &mut cx).unwrap_err().to_string();
        assert!(refused.contains("fixes no ranges"), "{refused}");
        let mut nothing = PassContext::new(&NoTarget, &Tapes);
        let refused = PassManager::default().run(&pipeline, model(0.2).0, &mut nothing).unwrap_err().to_string();
        assert!(refused.contains("samples are needed"), "{refused}");
    }
}
