//! Learning block after block, each behind the blocks that have been learned.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::block::{Also, Program};
use super::block_stakes::BlockStakes;
use super::blocks::{self, Block};
use super::distribution::{Correction, GROUP};
use super::fake_quant;
use super::measure;
use super::objective::Objective;
use super::parameterization::{PARAMETERIZATIONS, Weight};
use super::room;
use super::run::Outcome;
use super::samples;
use super::settings::{Part, Settings, Usual};
use super::train;
use crate::encoding::Encoding;
use crate::grad::{GradError, Value};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::Graph;
use crate::lockstep::{Lockstep, Span};
use crate::model::{Edit, Model, Plan, bias, record};
use crate::pass::{OptionError, Options, PassContext, PassError};
use crate::returned::returned;

/// What is usual where options say nothing.
const USUAL: Usual = Usual { learn: "none", iterations: 200, batch: 8, norms: false, loss: "mse", warmup: 0.0 };

/// A block whose turn it is.
pub(crate) struct Turn<'a> {
    pub(crate) block: &'a Block,
    /// What tells it from others.
    pub(crate) number: usize,
    /// The plan before anything was rounded.
    pub(crate) given: &'a Plan,
    /// What errors of blocks weigh, where the loss asks for it.
    pub(crate) stakes: Option<&'a BlockStakes>,
}

/// The option that moves inputs of blocks towards the statistics of training. What errors weigh by `loss=fisher` is measured before, on
/// samples that are not moved.
const CORRECTION: &str = "correct-distribution";

/// How blocks are learned. The pass that does it lists the options.
#[derive(Debug)]
pub(crate) struct Learner {
    settings: Settings,
    layers: usize,
    /// Blocks end behind nodes of such names instead.
    ends: Option<String>,
    /// So many neighboring blocks are learned together.
    window: usize,
    /// So many of them again in the next window.
    overlap: usize,
    /// How freely inputs move towards the statistics of training, times what is usual; 0 where they stay.
    correction: f64,
}

impl Learner {
    /// What `options` say; `None` where nothing is to be learned.
    pub(crate) fn of(options: &Options) -> Result<Option<Self>, OptionError> {
        let learns = options.text("learn", USUAL.learn) != "none";
        // Where nothing is learned, options are checked as if it were.
        let mut read = options.clone();
        if let Some(any) = PARAMETERIZATIONS.first().filter(|_| !learns) {
            read.0.insert("learn".into(), any.about().name.into());
        }
        let Some(settings) = Settings::of(&read, &USUAL)? else { return Ok(None) };
        let window = options.count("window", 1)?.max(1);
        let overlap = options.count("overlap", 0)?;
        if overlap >= window {
            let problem = format!("a window of {window} blocks shares fewer than {window} with the next one");
            return Err(OptionError { option: "overlap".into(), problem });
        }
        let correction = match options.number(CORRECTION)?.unwrap_or(0.0) {
            strength if (0.0..=1e6).contains(&strength) => strength,
            _ => {
                return Err(OptionError {
                    option: CORRECTION.into(),
                    problem: "it must lie between 0 and 1000000".into(),
                });
            }
        };
        let ends = Some(options.text("ends", "").to_owned()).filter(|pattern| !pattern.is_empty());
        let learner = Self { settings, layers: options.count("layers", 4)?, ends, window, overlap, correction };
        if !learns && correction > 0.0 {
            let problem = "inputs are moved only for blocks that are learned: say how (learn=brecq), or leave it out";
            return Err(OptionError { option: CORRECTION.into(), problem: problem.into() });
        }
        Ok(Some(learner).filter(|_| learns))
    }

    /// Whether what options ask for can be done with `model`.
    ///
    /// # Errors
    /// Where blocks are to end at nodes that are not there, and where inputs are to be moved towards the statistics of training, and nothing
    /// says those.
    pub(crate) fn check(&self, model: &Model) -> Result<(), PassError> {
        let is_there = |pattern: &String| model.graph().nodes().any(|(_, node)| blocks::matches(pattern, &node.name));
        if let Some(pattern) = self.ends.as_ref().filter(|pattern| !is_there(pattern)) {
            return Err(PassError::Model(format!(
                "ends={pattern}: no node has such a name; `inspect --blocks` shows the nodes that blocks begin with"
            )));
        }
        let mut made = model.graph().nodes().flat_map(|(_, node)| node.outputs.iter().flatten());
        if self.correction > 0.0 && !made.any(|value| model.stats().trained(*value).is_some()) {
            return Err(PassError::Model(format!(
                "{CORRECTION}: nothing says what tensors were like in training, as no batch normalization was folded into a layer \
                 (exporters that fold them on their own take their statistics away): leave the option out, or export the model with its \
                 batch normalizations"
            )));
        }
        Ok(())
    }

    /// The blocks to learn, windows of several already put together, with the stages of their weights.
    pub(crate) fn blocks(&self, graph: &Graph, plan: &Plan, stage_of: &BTreeMap<NodeId, usize>) -> Vec<(Block, Span)> {
        let mut all: Vec<(Block, Span)> = Vec::new();
        // Where a block that is not learned lies between, no window reaches across.
        let mut starts: Vec<usize> = vec![0];
        for block in blocks::blocks(graph, plan, self.layers, self.ends.as_deref()) {
            let stages = block.nodes.iter().filter(|id| blocks::is_layer(graph, plan, **id)).map(|id| stage_of[id]);
            let (first, last) =
                stages.fold((usize::MAX, 0), |(first, last), stage| (first.min(stage), last.max(stage)));
            // A block that does not lie behind the one before it as a whole would be learned behind weights that still change.
            if first <= last && all.last().is_none_or(|(_, before)| before.last < first) {
                let reads = samples::before(graph, &self.learned_with(graph, &block).nodes);
                all.push((block, Span { first, last, reads }));
            } else if starts.last() != Some(&all.len()) {
                starts.push(all.len());
            }
        }
        let ends = starts.iter().skip(1).copied().chain([all.len()]);
        starts.iter().zip(ends).flat_map(|(start, end)| self.windows(graph, &all[*start..end])).collect()
    }

    /// Every window of these neighbors, one behind the other, the last one as long as all others.
    fn windows(&self, graph: &Graph, blocks: &[(Block, Span)]) -> Vec<(Block, Span)> {
        if self.window == 1 || blocks.is_empty() {
            return blocks.to_vec();
        }
        let length = self.window.min(blocks.len());
        let last = blocks.len() - length;
        let starts = (0..last).step_by(self.window - self.overlap).chain([last]);
        let together = |start: usize| {
            let parts = &blocks[start..start + length];
            let nodes: Vec<NodeId> = parts.iter().flat_map(|(block, _)| block.nodes.iter().copied()).collect();
            // What the graph returns from the middle counts as well.
            let returned = parts.iter().flat_map(|(block, _)| &block.outputs).filter(|v| graph.outputs().contains(v));
            let ends = parts.last().into_iter().flat_map(|(block, _)| &block.outputs);
            let outputs: BTreeSet<ValueId> = returned.chain(ends).copied().collect();
            let layers = parts.iter().map(|(block, _)| block.layers).sum();
            let block = Block { nodes, outputs: outputs.into_iter().collect(), layers };
            let reads = samples::before(graph, &self.learned_with(graph, &block).nodes);
            (block, Span { first: parts[0].1.first, last: parts[length - 1].1.last, reads })
        };
        starts.map(together).collect()
    }

    /// What runs when `block` is learned: itself, or all that follows as well.
    fn learned_with<'b>(&self, graph: &Graph, block: &'b Block) -> Cow<'b, Block> {
        match self.settings.loss {
            measure::Wish::Prediction => Cow::Owned(block.with_rest(graph)),
            _ => Cow::Borrowed(block),
        }
    }

    /// What errors of what `blocks` return weigh, where the loss asks for it.
    ///
    /// # Errors
    /// [`PassError::Model`] where gradients cannot tell, with the reason; as the model's runs have them else.
    pub(crate) fn stakes(
        &self,
        model: &Model,
        cx: &PassContext<'_>,
        blocks: &[(Block, Span)],
    ) -> Result<Option<BlockStakes>, PassError> {
        if !self.settings.loss.weighs() || blocks.is_empty() {
            return Ok(None);
        }
        let values = blocks.iter().flat_map(|(block, _)| block.outputs.iter().copied()).collect();
        let alike = self.settings.loss == measure::Wish::FisherEach;
        let stakes = |stakes: BlockStakes| Some(if alike { stakes.of_samples_alike() } else { stakes });
        let refused = |reason| {
            PassError::Model(format!(
                "loss=fisher: gradients do not tell what errors weigh: {reason}; or take loss=mse"
            ))
        };
        BlockStakes::of(model, cx, self.layers, &values)?.map(stakes).map_err(refused)
    }

    /// The steps that learning so many blocks takes.
    pub(crate) fn steps(&self, blocks: usize) -> u64 {
        (blocks * self.settings.iterations) as u64
    }

    /// What the journal keeps the answer of block `number` under: another plan (more bits, other blocks before it) is another question,
    /// and so are other options.
    fn key(&self, number: usize, plan: &Plan) -> String {
        format!("block {number} behind {:016x} by {self:?}", record::digest(plan))
    }

    /// What the journal says that the block of `turn` came to, or what [`Self::learn`] says now, which the journal is told.
    pub(crate) fn learn_once(
        &self,
        walk: &Lockstep<'_>,
        model: &Model,
        cx: &PassContext<'_>,
        turn: &Turn<'_>,
    ) -> Result<Result<Vec<Edit>, String>, PassError> {
        let key = self.key(turn.number, model.plan());
        if let Some(edits) = record::kept(cx.journal, &key) {
            (0..self.settings.iterations).for_each(|_| cx.progress.step());
            return Ok(Ok(edits));
        }
        let learned = self.learn(walk, model, cx, turn)?;
        if let Ok(edits) = &learned {
            record::keep(cx.journal, &key, edits).map_err(PassError::Model)?;
        }
        Ok(learned)
    }

    /// The edits that the block of `turn` comes to: none where learning does no better on the samples held out from it. The reason where
    /// gradients do not pass it, or do not tell what its errors weigh.
    fn learn(
        &self,
        walk: &Lockstep<'_>,
        model: &Model,
        cx: &PassContext<'_>,
        turn: &Turn<'_>,
    ) -> Result<Result<Vec<Edit>, String>, PassError> {
        let &Turn { block, number, given, stakes } = turn;
        let free = cx.scheme.block_format().is_none() && !cx.scheme.power_of_two;
        let settings = self.settings.with_scales(free);
        let with_rest = self.settings.loss == measure::Wish::Prediction;
        let norms = settings.learns(Part::Norms) && !with_rest;
        let whole = self.learned_with(model.graph(), block);
        let rest = whole.nodes.len() - block.nodes.len();
        let also = Also { steps: settings.learns(Part::Steps), norms, inputs: false, rest };
        // What follows runs in float.
        let plan =
            if with_rest { Cow::Owned(block.own(model.graph(), model.plan())) } else { Cow::Borrowed(model.plan()) };
        let mut program = match Program::of(model.graph(), &plan, given, &whole, also) {
            Ok(program) => program,
            Err(reason) => return Ok(Err(reason)),
        };
        if !settings.learns(Part::Biases) {
            program.hold_biases(model.graph(), &plan, block);
        }
        let dead = program.outputs.iter().find(|(_, value)| stakes.is_some_and(|stakes| !stakes.tell(*value)));
        if let Some((_, value)) = dead {
            let name = &model.graph().value(*value).name;
            return Ok(Err(format!("no gradients arrive at `{name}` from the outputs, or they are no numbers")));
        }
        let before = samples::before(model.graph(), &whole.nodes);
        let corrects = self.correction > 0.0;
        let both = corrects || settings.inputs.reads_floats();
        let gathered = samples::gather(walk, model.graph(), cx, &program, (&before, stakes), both)?;
        let Some(mut samples) = gathered else {
            return Ok(Err("a tensor that it reads is computed behind its weights".into()));
        };
        let sessions = walk.sessions().max(model.graph().constant_bytes() as u64);
        let beside = walk.held() + samples.bytes() + sessions;
        program.room = match room::room((&program, number), &settings, &samples, cx, beside)? {
            Ok(room) => room,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let left = cx.lone_budget.saturating_sub(beside);
        let fed = (&program, samples.float.feeds.as_slice(), room::longest(&samples));
        let mut correction = match self.correction((model, given), (block, number), fed, left)? {
            Ok(correction) => correction,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut learn = || {
            Objective::agrees(&program, &samples.float)?;
            if corrects {
                self.correct(correction.take(), &program, &mut samples)?;
            }
            let objective = {
                let kind = |value| settings.loss.kind(returned(model.graph(), value));
                Objective::new(&program, (&samples.all, &samples.origins), model.plan(), settings.loss, kind)?
            };
            let objective = objective.reading(settings.inputs, &samples.floats);
            let start = program.start(&objective.weights);
            let first = objective.loss(&start)?;
            let mut ticks = 0;
            let tick = |loss| {
                ticks += 1;
                cx.progress.loss(loss);
                cx.progress.step();
                !cx.progress.cancelled()
            };
            let mut learned = train::learn(&objective, &settings, &start, number as u64, tick)?;
            // Those of a block that ended early are done as well.
            (ticks..settings.iterations).for_each(|_| cx.progress.step());
            let made = edits(model, block, &program, &objective.weights, &learned);
            // Judged as it will be written: biases in codes of the new scales.
            if let Some(made) = &made {
                learned.biases = written(&program, model.plan(), made, learned.biases);
            }
            let last = objective.loss(&learned)?;
            tracing::debug!(
                block = number,
                layers = block.layers,
                samples = samples.all.len(),
                ?first,
                ?last,
                "learned"
            );
            let better = last.held_out < first.held_out;
            Ok(made.filter(|_| better).unwrap_or_default())
        };
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        let learned: Result<Vec<Edit>, GradError> = learn();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        Ok(learned.map_err(|error| error.to_string()))
    }
}

impl Learner {
    /// How what `block` reads is moved, within so many `bytes`; `None` where it is not. Inside, why its tape does not run.
    ///
    /// # Errors
    /// [`PassError`] where memory does not hold one tape of it.
    fn correction(
        &self,
        (model, given): (&Model, &Plan),
        (block, number): (&Block, usize),
        (program, feeds, longest): (&Program, &[Value<f32>], usize),
        bytes: u64,
    ) -> Result<Result<Option<Correction>, GradError>, PassError> {
        if self.correction <= 0.0 {
            return Ok(Ok(None));
        }
        let fitted = || {
            // All of the plan: what only follows the block has no say, and what comes before it makes what the block reads movable.
            let plans = (model.plan(), given);
            let found = Correction::of(model.graph(), model.stats(), plans, block, self.correction)?;
            let Some(found) = found else { return Ok(Ok(None)) };
            let own = found.feeds(program, feeds)?;
            Ok(found.within(&own, longest, bytes)?.map(Some))
        };
        let fitted: Result<Result<Option<Correction>, u64>, GradError> = fitted();
        match fitted {
            Ok(Ok(found)) => Ok(Ok(found)),
            Ok(Err(needed)) => Err(PassError::Model(format!(
                "{CORRECTION}: block {number} takes {} MB for what {GROUP} samples read and one tape, and there is room for {} MB: take \
                 smaller blocks (layers=), leave the option out, or allow more with --max-memory",
                needed.div_ceil(1_000_000),
                bytes / 1_000_000
            ))),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Moves what `samples` of a block, with which `program` begins, read.
    fn correct(
        &self,
        correction: Option<Correction>,
        program: &Program,
        samples: &mut samples::Samples,
    ) -> Result<(), GradError> {
        if let Some(correction) = correction {
            let (before, after) = correction.apply(program, samples)?;
            tracing::debug!(before, after, "inputs moved towards the statistics of training");
        }
        if !self.settings.inputs.reads_floats() {
            samples.floats = Vec::new();
        }
        Ok(())
    }
}

/// The `biases` that come out of `edits`.
pub(super) fn written(program: &Program, plan: &Plan, edits: &[Edit], biases: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let encoding = |site: Site| {
        let anew = edits.iter().rev().find_map(|edit| match edit {
            Edit::Encode { site: other, encoding } if *other == site => Some(encoding),
            _ => None,
        });
        anew.or_else(|| plan.encoding(site))
    };
    let one = |((_, site, tensor), mut values): (&(_, Site, Arc<crate::tensor::Tensor>), Vec<f32>)| {
        if let Some(encoding) = encoding(*site) {
            // What does not fit was refused when the edits were made.
            let _ = encoding.simulate(&mut values, tensor.shape());
        }
        values
    };
    program.biases.iter().zip(biases).map(one).collect()
}

/// The edits that write `learned` into the plan; `None` where a bias would not fit its codes any more.
pub(super) fn edits(
    model: &Model,
    block: &Block,
    program: &Program,
    weights: &[Weight],
    learned: &Outcome,
) -> Option<Vec<Edit>> {
    let plan = model.plan();
    let mut encodings: BTreeMap<Site, Encoding> = BTreeMap::new();
    for ((_, site), step) in program.steps.iter().zip(&learned.steps).filter(|(_, step)| **step != 0.0) {
        encodings.insert(*site, fake_quant::rescaled(plan.encoding(*site)?, *step));
    }
    let mut rounded = Vec::new();
    let weights = program.weights.iter().zip(weights).zip(learned.units.iter().zip(&learned.scales));
    for (((_, site, tensor), weight), (units, scales)) in weights {
        let encoding = Encoding { scale: scales.as_slice().into(), ..weight.encoding.clone() };
        let codes = Arc::new(encoding.pack_points(units, tensor.shape()));
        if encoding != weight.encoding {
            encodings.insert(*site, encoding);
        }
        rounded.push(Edit::Round { site: *site, codes });
    }
    let mut biases = Vec::new();
    for &node in &block.nodes {
        biases.extend(bias::behind(model, node, &|site| encodings.get(&site).or_else(|| plan.encoding(site)))?);
    }
    for ((_, site, tensor), values) in program.biases.iter().zip(&learned.biases) {
        let anew = biases.iter().find_map(|edit| match edit {
            Edit::Encode { site: other, encoding } if other == site => Some(encoding.clone()),
            _ => None,
        });
        let encoding = anew.or_else(|| plan.encoding(*site).cloned());
        biases.push(Edit::constant(*site, tensor.shape(), values.clone(), encoding.as_ref())?);
    }
    let encoded = encodings.into_iter().map(|(site, encoding)| Edit::Encode { site, encoding });
    Some(encoded.chain(rounded).chain(biases).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products_around};
    use super::*;
    use crate::pass::{PassManager, Pipeline};

    #[test]
    fn other_options_are_another_question() {
        let key = |name: &str, value: &str| {
            let mut options = BTreeMap::from([("learn".to_owned(), "latent".to_owned())]);
            options.insert(name.to_owned(), value.to_owned());
            Learner::of(&Options(options)).unwrap().unwrap().key(3, &Plan::default())
        };
        let options = [
            ("learn", "brecq"),
            ("iterations", "7"),
            ("layers", "3"),
            ("window", "2"),
            (CORRECTION, "1"),
            ("loss", "fisher"),
            ("steps", "1"),
            ("inputs", "mixed"),
        ];
        let keys: BTreeSet<String> = options.iter().map(|(name, value)| key(name, value)).collect();
        assert_eq!(keys.len(), options.len(), "{keys:?}");
        assert!(!keys.contains(&key("learn", "latent")));
    }

    /// Where a norm stands between two layers, its scale is learned by what channels are like, and all else stays as it was rounded.
    #[test]
    fn norms_alone_are_learned_and_nothing_else() {
        let data = Drawn(24);
        let between = "%s = const f32[5] [1.0, 1.0, 1.0, 1.0, 1.0] %h = LayerNormalization(%p, %s)";
        let run = |learn: &str| {
            let cx = PassContext { dataset: Some(&data), ..PassContext::new(&NoTarget, &Tapes) };
            let pass = format!("round-in-order{{{learn}}}");
            let pipeline = Pipeline::parse(&pass, &crate::catalogue::passes()).unwrap();
            let model = two_products_around(between, 5, 0.7);
            PassManager::default().run(&pipeline, model, &mut { cx }).unwrap().0
        };
        let codes = |model: &Model| -> Vec<Vec<u8>> {
            let codes = model.plan().encodings().filter_map(|(site, _)| model.plan().codes(site));
            codes.map(|codes| codes.bytes().to_vec()).collect()
        };
        let alone = run("learn=none");
        assert_eq!(alone.plan().substitutes().count(), 0);
        let norms =
            "learn=latent, codes=0, scales=0, biases=0, norms=2, loss=channels, layers=4, iterations=40, batch=4";
        let still = run(&format!("{norms}, rate=0"));
        assert_eq!(record::digest(still.plan()), record::digest(alone.plan()));
        let learned = run(&format!("{norms}, rate=30"));
        assert_eq!(codes(&learned), codes(&alone));
        let moved: Vec<_> = learned.plan().substitutes().collect();
        let [(Site::Use { node, input: 1 }, scale)] = moved[..] else { panic!("{moved:?}") };
        assert!(learned.graph().node(node).is_some_and(|node| node.op.is("LayerNormalization")));
        assert!(scale.floats().unwrap().iter().any(|s| (s - 1.0).abs() > 1e-4), "{scale:?}");
        // Without biases, but with norms where they are asked for, and without those where they are not.
        let none = run("learn=latent, codes=0, scales=0, biases=0, layers=4, iterations=40, batch=4, rate=30");
        assert_eq!(record::digest(none.plan()), record::digest(alone.plan()));
    }
}
