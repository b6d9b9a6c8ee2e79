//! Rotation of residual streams, learned.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::annealing::Annealing;
use super::orthogonal::Orthogonal;
use super::pivots::Errors;
use super::rotate::{self, turn_streams};
use super::stream::{Reader, Stream, streams};
use super::stream_weights::{MAX_WIDTH, Setting, moments, writers};
use super::turned_loss::TurnedLoss;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Progress;
use crate::id::ValueId;
use crate::ir::walk::Users;
use crate::model::{Model, Patch};
use crate::observe::Rows;
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};

crate::declare_pass! {
    /// Turns the residual stream of a decoder as `rotate` does, into a basis that is learned: orthogonal, begun at that of `rotate`,
    /// and moved to where rounding the weights that read and write the stream loses less.
    ///
    /// What is learned against is the squared error of rounding to nearest in the bits and blocks of the scheme, in shares of the power
    /// of what every weight computes. An error in column j of a reader costs what is left of it when later columns make up for earlier
    /// ones: the pivot of Rᵀ H R, where the second moments H of what norms return were measured; without samples all columns cost the
    /// same. Where activations are rounded, the one range of all channels counts too. Gradients go straight through the rounding. Kept is
    /// the best basis that was seen, so that the loss is never above that of the Hadamard matrix.
    /// How far the numbers that norms return fill the range that they span is told in a note per tensor.
    INFO {
        name: "learn-rotation",
        source: "Liu et al. 2024 (SpinQuant), arXiv:2405.16406, section 3.2; utilization rate: Hu et al. 2025 (OSTQuant), arXiv:2501.13987; \
                 the loss of weights and pivots instead of that of the model: ours",
        cost: "Second moments of what norms return and of what writers read. Then per sweep three products of every weight by a d × d matrix, \
               and about 10 d³ multiply-adds per norm. Memory: the weights once more, and eight times the largest.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[
            OptionInfo { name: "seed", doc: "which random signs to begin with, 0 by default" },
            OptionInfo { name: "sweeps", doc: "times that every weight is seen, 6 by default" },
            OptionInfo { name: "rate", doc: "times the usual rate, 1 by default" },
            OptionInfo { name: "errors", doc: "compensated (default): later columns make up for them, as when codes are chosen by data; stay: rounding to nearest" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(LearnRotation::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct LearnRotation {
    seed: u64,
    annealing: Annealing,
    errors: Errors,
}

/// At most so many steps see every weight once.
const STEPS: usize = 8;
/// The angle of a step between any two channels is this over the root of their number, while all steps agree.
const RATE: f64 = 0.1;
/// Of the mean of gradients, and of that of their squares.
const DECAY: (f64, f64) = (0.9, 0.99);

impl LearnRotation {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self {
            seed: rotate::seed(options)?,
            annealing: Annealing::of(options, RATE)?,
            errors: Errors::parse(options)?,
        })
    }
}

impl Pass for LearnRotation {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, _: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        let graph = model.graph();
        let found = streams(graph, &Users::of(graph)).into_iter().flatten();
        let usable = found.filter(|stream| stream.width <= MAX_WIDTH);
        let wished = usable.flat_map(|stream| {
            let normed: Vec<ValueId> = stream.readers.iter().map(|reader| reader.normed).collect();
            let narrow = |weight: ValueId| graph.constant(weight).is_some_and(|w| w.shape()[0] <= MAX_WIDTH);
            let writers = writers(graph, &stream).into_iter().filter(|(.., weight)| narrow(*weight));
            normed.into_iter().chain(writers.map(|(_, read, _)| read)).collect::<Vec<_>>()
        });
        wished.map(|value| (value, Wish::Gram(Rows::Last))).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        turn_streams(INFO.about.name, model, |stream, patch| {
            let hadamard = rotate::spread(stream, self.seed);
            let setting = Setting { model, cx, stream };
            let loss = match setting.loss(self.errors) {
                Ok(loss) => loss,
                Err(reason) => {
                    let message = format!("learn-rotation: {reason}; the stream is turned by the Hadamard matrix");
                    patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, Place::Model, message));
                    return Ok(hadamard);
                }
            };
            let start = Orthogonal::of(hadamard.as_ref());
            let (learned, [first, last]) = self.learn(&loss, start.clone(), cx.progress)?;
            let message = format!("what rounding loses came from {first:.6} to {last:.6}");
            patch.note(Diagnostic::new(diag::LEARNED_BASIS, Severity::Note, Place::Model, message));
            tell(model, stream, (&start, &learned), patch);
            Ok(Box::new(learned))
        })
    }
}

impl LearnRotation {
    /// The best of the bases on the way from `start`; what is lost in that, and in this.
    fn learn(
        &self,
        loss: &TurnedLoss,
        start: Orthogonal,
        progress: &dyn Progress,
    ) -> Result<(Orthogonal, [f64; 2]), PassError> {
        let first = loss.at(&start);
        let steps = STEPS.min(loss.groups.len()).max(1);
        let annealing = Annealing { rate: self.annealing.rate / (loss.width as f64).sqrt(), ..self.annealing };
        progress.begin(INFO.about.name, (annealing.sweeps * steps) as u64);
        let step = |basis: &mut Orthogonal, descent: &mut Descent, step: usize, rate: f64| {
            let tangent = basis.tangent(&loss.gradient(basis, step, steps));
            *basis = basis.moved(&descent.step(&tangent, rate));
            progress.step();
        };
        // A basis that has lost its right angles is none.
        let at = |basis: &Orthogonal| Some(loss.at(basis)).filter(|_| basis.error() < 1e-9);
        let best = annealing.best(steps, (first, start), || Descent::new(loss.width), step, at, progress);
        let (last, learned) = best.ok_or(PassError::Interrupted)?;
        progress.end();
        Ok((learned, [first, last]))
    }
}

/// Adam over skew-symmetric matrices, with one second moment for all entries: they mix as the basis turns.
///
/// Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; one moment per matrix: Becigneul and Ganea 2019, arXiv:1810.00760.
struct Descent {
    first: Vec<f64>,
    second: f64,
    steps: i32,
}

impl Descent {
    fn new(n: usize) -> Self {
        Self { first: vec![0.0; n * n], second: 0.0, steps: 0 }
    }

    fn step(&mut self, tangent: &[f64], rate: f64) -> Vec<f64> {
        self.steps += 1;
        self.first.iter_mut().zip(tangent).for_each(|(m, g)| *m = DECAY.0 * *m + (1.0 - DECAY.0) * g);
        let square = tangent.iter().map(|g| g * g).sum::<f64>() / tangent.len().max(1) as f64;
        self.second = DECAY.1 * self.second + (1.0 - DECAY.1) * square;
        let unbiased = (1.0 - DECAY.0.powi(self.steps), 1.0 - DECAY.1.powi(self.steps));
        let factor = rate / unbiased.0 / (self.second / unbiased.1).sqrt();
        // Nothing to learn, or nothing that is a number.
        let factor = if factor.is_finite() { factor } else { 0.0 };
        self.first.iter().map(|m| factor * m).collect()
    }
}

/// Notes how far what norms of `stream` return fills its range: as it is, turned by `start`, and as learned.
fn tell(model: &Model, stream: &Stream, (start, learned): (&Orthogonal, &Orthogonal), patch: &mut Patch) {
    let norms: BTreeMap<ValueId, &Reader> = stream.readers.iter().map(|reader| (reader.normed, reader)).collect();
    for (normed, reader) in norms {
        let Some(moments) = moments(model, reader, stream.width) else { continue };
        let rates = [None, Some(start), Some(learned)].map(|r| moments.utilization(r));
        let [Some(before), Some(turned), Some(after)] = rates else { continue };
        let message = format!(
            "the logarithm of its space utilization rate per channel is {before:.3}, {turned:.3} turned by the Hadamard matrix, \
             {after:.3} as learned"
        );
        let place = Place::Value(Arc::clone(&model.graph().value(normed).name));
        patch.note(Diagnostic::new(diag::LEARNED_BASIS, Severity::Note, place, message));
    }
}

#[cfg(test)]
mod tests {
    use super::super::annealing::tests::Stopped;
    use super::super::hadamard::Hadamard;
    use super::super::turned_loss::tests::loss;
    use super::*;
    use crate::exec::Silent;

    fn pass(sweeps: usize, errors: Errors) -> LearnRotation {
        LearnRotation { seed: 0, annealing: Annealing { sweeps, rate: RATE }, errors }
    }

    #[test]
    fn what_is_learned_loses_less_and_is_orthogonal() {
        for errors in [Errors::Stay, Errors::Compensated] {
            for levels in [None, Some(16.0)] {
                let loss = loss(errors, levels);
                let start = Orthogonal::of(&Hadamard::new(loss.width, 0));
                let (learned, [first, last]) = pass(20, errors).learn(&loss, start, &Silent).unwrap();
                assert!(learned.error() < 1e-9, "{}", learned.error());
                assert!(last < 0.95 * first, "{errors:?}, {levels:?}: {last} of {first}");
                assert!((loss.at(&learned) - last).abs() < 1e-12, "the best is what is returned");
            }
        }
    }

    /// However far steps go, what is kept never loses more than the start.
    #[test]
    fn steps_of_any_size_never_end_above_the_start() {
        let loss = loss(Errors::Compensated, None);
        let start = Orthogonal::of(&Hadamard::new(loss.width, 5));
        for rate in [1e-3, 10.0, 100.0] {
            let wild =
                LearnRotation { annealing: Annealing { sweeps: 4, rate: RATE * rate }, ..pass(4, Errors::Compensated) };
            let (learned, [first, last]) = wild.learn(&loss, start.clone(), &Silent).unwrap();
            assert!(last <= first && learned.error() < 1e-9, "{rate}: {last} of {first}");
        }
        let (learned, [first, last]) = pass(0, Errors::Stay).learn(&loss, start.clone(), &Silent).unwrap();
        assert!((first - last).abs() < 1e-15 && learned.single() == start.single());
    }

    #[test]
    fn who_stops_it_is_told_so() {
        let loss = loss(Errors::Stay, None);
        let start = Orthogonal::of(&Hadamard::new(loss.width, 0));
        let stopped = pass(3, Errors::Stay).learn(&loss, start, &Stopped);
        assert!(matches!(stopped, Err(PassError::Interrupted)));
    }

    #[test]
    fn a_gradient_of_nothing_moves_nothing() {
        let mut descent = Descent::new(2);
        assert_eq!(descent.step(&[0.0; 4], 0.1), [0.0; 4]);
        assert!(descent.step(&[0.0, 1.0, -1.0, 0.0], 0.1)[1] > 0.0);
    }
}
