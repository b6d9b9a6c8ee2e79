//! Scales of activations, chosen by what the model makes of them.

use std::collections::{BTreeMap, BTreeSet};

use super::blocks::{self, Block};
use super::samples;
use super::steps;
use super::tail::{self, Tail};
use crate::encoding::Encoding;
use crate::exec::Dataset;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::ir::walk::{self, User, Users};
use crate::judges;
use crate::lockstep::{self, Lockstep, Span};
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
        cost: "For every quantizer and sample the block and all behind it, once per candidate. Memory: the weights from the block on twice as an executor holds them, and once more while they are handed over: refused where --max-memory does not hold that (`by=block`: of the block alone). Behind the rounding of weights.",
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
#[derive(Debug)]
struct Turn {
    block: Block,
    sites: Vec<Site>,
    /// The node before which the walk stops: all that the block reads is there.
    stop: NodeId,
}

impl Turn {
    /// The stages in which nodes of the block run before the walk stops, to the stage that it stops at, where there are any: they run again
    /// once scales are others.
    fn span(&self, graph: &Graph, stage_of: &BTreeMap<NodeId, usize>) -> Option<Span> {
        let last = *stage_of.get(&self.stop)?;
        let first = self.block.nodes.iter().filter_map(|id| stage_of.get(id)).min().filter(|first| **first < last)?;
        Some(Span { first: *first, last, reads: samples::before(graph, &self.block.nodes) })
    }
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
        let stage_of = lockstep::stages(model.graph(), &stops);
        let spans: Vec<Option<Span>> = turns.iter().map(|turn| turn.span(model.graph(), &stage_of)).collect();
        let all: Vec<Span> = spans.iter().flatten().cloned().collect();
        let mut walk = self.walk((model, cx), &turns, stage_of, &all)?;
        let mut ran = 0;
        cx.progress.begin(INFO.about.name, turns.iter().map(|turn| turn.sites.len() as u64).sum());
        for (turn, span) in turns.iter().zip(&spans) {
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
            let mut changed = false;
            for &site in &turn.sites {
                let edits = self.search(&walk, (&work, site), &mut tail, &chosen, cx)?;
                patch.count("scales searched", 1);
                patch.count("scales changed", u64::from(!edits.is_empty()));
                changed |= !edits.is_empty();
                patch.and_on(&mut work, edits)?;
                cx.progress.step();
            }
            if let Some(span) = span.as_ref().filter(|_| changed) {
                walk.again(span.first, work.plan())?;
            }
        }
        cx.progress.end();
        Ok(patch)
    }
}

impl SearchScales {
    /// The walk over the blocks of `turns`, of which one with what lies behind it fits into memory beside the samples that it keeps.
    fn walk<'a>(
        &self,
        (model, cx): (&'a Model, &'a PassContext<'a>),
        turns: &[Turn],
        stage_of: BTreeMap<NodeId, usize>,
        spans: &[Span],
    ) -> Result<Lockstep<'a>, PassError> {
        let takes = |turn: &Turn| tail::takes(model.graph(), &turn.block, self.by_outputs);
        let needed = turns.iter().map(takes).max().unwrap_or(0);
        let walk = Lockstep::new(model.graph(), model.plan(), cx, stage_of, spans)?;
        // Samples that wait can run again instead.
        let walk = walk.beside(needed.saturating_sub(cx.lone_budget.saturating_sub(cx.pair_budget))).holding(needed);
        let left = cx.lone_budget.saturating_sub(walk.held()).saturating_sub(walk.sessions());
        tracing::debug!(needed, left, "memory of tails");
        if needed <= left {
            return Ok(walk);
        }
        let (what, fix) = if self.by_outputs {
            ("a block and all behind it, in two versions,", "measure blocks alone (by=block)")
        } else {
            ("a block in two versions", "take smaller blocks (layers=1)")
        };
        Err(PassError::Model(format!(
            "{what} takes {} MB, and {} MB are left: {fix}, leave the pass out, or allow more with --max-memory",
            needed.div_ceil(1_000_000),
            left / 1_000_000
        )))
    }

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
    use crate::reconstruct::testing::{Drawn, NoTarget, Tapes, two_products_around, two_products_of};

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
        // Stages that stay ready, and such as are made ready anew.
        for (threads, pair_budget, state_budget) in [(3, 1 << 30, u64::MAX), (1, 0, u64::MAX), (2, 0, 0), (1, 100, 0)] {
            let mut cx = PassContext { threads, pair_budget, state_budget, ..context(&samples) };
            assert_eq!(searched("search-scales", 0.28, &mut cx).2, first, "{threads} {pair_budget} {state_budget}");
        }
    }

    #[test]
    fn what_memory_does_not_hold_is_refused_with_what_takes_less() {
        let samples = Drawn(8);
        let run = |options: &str, lone_budget: u64| {
            let mut cx = PassContext { lone_budget, pair_budget: 0, state_budget: 0, ..context(&samples) };
            let pipeline =
                Pipeline::parse(&format!("search-scales{{{options}}}"), &crate::catalogue::passes()).unwrap();
            PassManager::default().run(&pipeline, model(0.2).0, &mut cx).map(|_| ()).map_err(|e| e.to_string())
        };
        let refused = run("by=prediction", 100).unwrap_err();
        assert!(["by=block", "--max-memory", "search-scales"].iter().all(|fix| refused.contains(fix)), "{refused}");
        let refused = run("by=block", 100).unwrap_err();
        assert!(refused.contains("layers=1") && !refused.contains("by=block"), "{refused}");
        // The second product, 8 × 3 numbers, has the one scale: held twice over in both versions, and once more while it is handed over.
        run("by=block, layers=1", 5 * 96).unwrap();
        assert!(run("by=block, layers=1", 5 * 96 - 1).is_err());
        let (model, _) = model(0.2);
        let blocks = blocks::blocks(model.graph(), model.plan(), 1, None);
        let of = |at: usize, whole: bool| tail::takes(model.graph(), &blocks[at], whole);
        assert_eq!((of(0, false), of(0, true), of(1, true)), (5 * 128, 5 * 224, 5 * 96), "with what lies behind");
    }

    /// A product of what the block reads that does not lie behind the first of its nodes runs again once the scale is another.
    #[test]
    fn what_ran_under_an_older_scale_runs_again() {
        let between = "%g = Tanh(%p)
            %c = const f32[8,8] rand(seed=3, std=0.5)
            %d = const f32[8,8] rand(seed=4, std=0.5)
            %q = MatMul(%g, %c)
            %r = Tanh(%q)
            %s = MatMul(%g, %d)
            %t = Add(%r, %s)
            %h = Tanh(%t)";
        let mut model = two_products_around(between, 8, 0.7);
        let mut patch = Patch::on(&model);
        for (value, scale) in [("g", 0.5), ("h", 0.2)] {
            let site = Site::Value(model.graph().find(value).unwrap());
            let encoding = Encoding::per_tensor(crate::grid::find("int4").unwrap(), scale, 0);
            patch.edit(Edit::Encode { site, encoding });
        }
        model.apply(patch).unwrap();
        let samples = Drawn(24);
        let search = SearchScales::of(&Options([("layers".to_owned(), "1".to_owned())].into())).unwrap();
        let turns = search.turns(&model);
        let stage_of = lockstep::stages(model.graph(), &turns.iter().map(|turn| turn.stop).collect());
        let spans: Vec<_> = turns.iter().filter_map(|turn| turn.span(model.graph(), &stage_of)).collect();
        assert_eq!(spans.iter().map(|span| (span.first, span.last)).collect::<Vec<_>>(), [(0, 1)], "{turns:?}");
        let plan = |pair_budget: u64, state_budget: u64| {
            let mut cx = PassContext { pair_budget, state_budget, ..context(&samples) };
            let pipeline = Pipeline::parse("search-scales{by=block, layers=1}", &crate::catalogue::passes()).unwrap();
            let (model, trace) = PassManager::default().run(&pipeline, model.clone(), &mut cx).unwrap();
            assert_eq!(trace.steps[0].1.counts["scales changed"], 2);
            record::digest(model.plan())
        };
        assert!(plan(1 << 30, 0) == plan(0, 0) && plan(0, 0) == plan(0, u64::MAX));
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
