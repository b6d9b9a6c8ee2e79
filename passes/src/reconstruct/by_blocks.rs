//! Learning block after block, each behind the blocks that have been learned.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::Program;
use super::blocks::{self, Block};
use super::fake_quant;
use super::measure;
use super::objective::{Objective, Outcome};
use super::parameterization;
use super::samples;
use super::train::{self, Settings};
use crate::encoding::Encoding;
use crate::id::{NodeId, Site};
use crate::ir::Graph;
use crate::lockstep::{Lockstep, Span};
use crate::model::{Edit, Model, Plan, bias, record};
use crate::pass::{OptionError, Options, PassContext, PassError};

/// How blocks are learned. The pass that does it lists the options.
#[derive(Debug)]
pub(crate) struct Learner {
    settings: Settings,
    layers: usize,
}

impl Learner {
    /// What `options` say; `None` where nothing is to be learned.
    pub(crate) fn of(options: &Options) -> Result<Option<Self>, OptionError> {
        let name = options.text("learn", "none");
        if name == "none" {
            return Ok(None);
        }
        let method = parameterization::find(name).ok_or_else(|| {
            let names: Vec<&str> = super::PARAMETERIZATIONS.iter().map(|p| p.about().name).collect();
            OptionError { option: "learn".into(), problem: format!("`{name}` is none of none, {}", names.join(", ")) }
        })?;
        let positive = |name: &str, default: f64, most: f64| -> Result<f64, OptionError> {
            match options.number(name)?.unwrap_or(default) {
                value if (0.0..=most).contains(&value) => Ok(value),
                _ => Err(OptionError { option: name.into(), problem: format!("it must lie between 0 and {most}") }),
            }
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        let settings = Settings {
            method,
            iterations: positive("iterations", 200.0, 1e6)? as usize,
            batch: options.count("batch", 8)?.max(1),
            rate: positive("rate", 1.0, 1e3)? as f32,
            drop: (positive("drop", 0.0, 1.0)? * 1000.0) as i64,
            biases: options.count("biases", 1)? > 0,
            scales: options.count("scales", 1)? > 0,
            steps: options.count("steps", 0)? > 0,
            loss: loss(options)?,
        };
        Ok(Some(Self { settings, layers: options.count("layers", 4)? }))
    }

    /// The blocks to learn, with the stages of their weights.
    pub(crate) fn blocks(&self, graph: &Graph, plan: &Plan, stage_of: &BTreeMap<NodeId, usize>) -> Vec<(Block, Span)> {
        let mut all: Vec<(Block, Span)> = Vec::new();
        for block in blocks::blocks(graph, plan, self.layers) {
            let stages = block.nodes.iter().filter(|id| blocks::is_layer(graph, plan, **id)).map(|id| stage_of[id]);
            let (first, last) =
                stages.fold((usize::MAX, 0), |(first, last), stage| (first.min(stage), last.max(stage)));
            // A block that does not lie behind the one before it as a whole would be learned behind weights that still change.
            if first <= last && all.last().is_none_or(|(_, before)| before.last < first) {
                let reads = samples::before(graph, &block.nodes);
                all.push((block, Span { first, last, reads }));
            }
        }
        all
    }

    /// The steps that learning so many blocks takes.
    pub(crate) fn steps(&self, blocks: usize) -> u64 {
        (blocks * self.settings.iterations) as u64
    }

    /// What the journal says that `block` came to, or what [`Self::learn`] says now, which the journal is told.
    pub(crate) fn learn_once(
        &self,
        walk: &Lockstep<'_>,
        model: &Model,
        given: &Plan,
        cx: &PassContext<'_>,
        block: &Block,
        number: usize,
    ) -> Result<Result<Vec<Edit>, String>, PassError> {
        // Another plan (more bits, other blocks before it) is another question.
        let key = format!("block {number} behind {:016x}", record::digest(model.plan()));
        if let Some(edits) = cx.journal.get(&key).and_then(|bytes| record::read(&bytes)) {
            (0..self.settings.iterations).for_each(|_| cx.progress.step());
            return Ok(Ok(edits));
        }
        let learned = self.learn(walk, model, given, cx, block, number)?;
        if let Some(bytes) = learned.as_ref().ok().and_then(|edits| record::write(edits)) {
            let kept = cx.journal.put(&key, &bytes);
            kept.map_err(|problem| PassError::Model(format!("what was learned cannot be kept: {problem}")))?;
        }
        Ok(learned)
    }

    /// The edits that `block`, which `number` tells from others, comes to: none where learning does no better on the samples held out
    /// from it. The reason where gradients do not pass it.
    fn learn(
        &self,
        walk: &Lockstep<'_>,
        model: &Model,
        given: &Plan,
        cx: &PassContext<'_>,
        block: &Block,
        number: usize,
    ) -> Result<Result<Vec<Edit>, String>, PassError> {
        // Scales in a format of their own, and powers of two, stay what they are.
        let free = cx.scheme.block_format().is_none() && !cx.scheme.power_of_two;
        let steps = self.settings.steps && free;
        let program = match Program::of(model.graph(), model.plan(), given, block, steps) {
            Ok(program) => program,
            Err(reason) => return Ok(Err(reason)),
        };
        let before = samples::before(model.graph(), &block.nodes);
        let Some(samples) = samples::gather(walk, model.graph(), cx, &program, &before)? else {
            return Ok(Err("a tensor that it reads is computed behind its weights".into()));
        };
        let settings = Settings { scales: self.settings.scales && free, ..self.settings.clone() };
        let learn = || {
            Objective::agrees(&program, &samples.float)?;
            let objective = {
                let returned = |value| model.graph().outputs().contains(&value);
                Objective::new(&program, &samples.all, model.plan(), settings.loss, returned)?
            };
            let start = objective.start();
            let first = objective.loss(&start)?;
            let tick = || {
                cx.progress.step();
                !cx.progress.cancelled()
            };
            let mut learned = train::learn(&objective, &settings, &start, number as u64, tick)?;
            let made = edits(model, block, &program, &objective, &learned);
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
        let learned: Result<Vec<Edit>, crate::grad::GradError> = learn();
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        Ok(learned.map_err(|error| error.to_string()))
    }
}

/// The `biases` that come out of `edits`.
fn written(program: &Program, plan: &Plan, edits: &[Edit], biases: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
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

/// The loss that the option names.
fn loss(options: &Options) -> Result<measure::Wish, OptionError> {
    let name = options.text("loss", "mse");
    let found = measure::LOSSES.iter().find(|(_, about)| about.name == name).map(|(wish, _)| *wish);
    found.ok_or_else(|| {
        let names: Vec<&str> = measure::LOSSES.iter().map(|(_, about)| about.name).collect();
        OptionError { option: "loss".into(), problem: format!("`{name}` is none of {}", names.join(", ")) }
    })
}

/// The edits that write `learned` into the plan; `None` where a bias would not fit its codes any more.
fn edits(
    model: &Model,
    block: &Block,
    program: &Program,
    objective: &Objective<'_>,
    learned: &Outcome,
) -> Option<Vec<Edit>> {
    let plan = model.plan();
    let mut encodings: BTreeMap<Site, Encoding> = BTreeMap::new();
    for ((_, site), step) in program.steps.iter().zip(&learned.steps).filter(|(_, step)| **step != 0.0) {
        encodings.insert(*site, fake_quant::rescaled(plan.encoding(*site)?, *step));
    }
    let mut rounded = Vec::new();
    let weights = program.weights.iter().zip(&objective.weights).zip(learned.units.iter().zip(&learned.scales));
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
