//! Samples that a model makes itself: inputs for which its batch norms see what they saw in training.
//!
//! A batch norm remembers the mean and the variance of every channel over all of the training set. Inputs that start as noise are moved
//! along gradients until the channels of a batch of them have those moments and each of them is taken for a class drawn at random. They
//! look like nothing, but what layers read of them is more like the training set than a hundred views of ten photographs are.
//!
//! [`Remembered::of`] reads the moments before batch norms are folded away; [`imagine`] makes the inputs.
//!
//! Source: moments of batch norms as a loss, Cai et al. 2020 (`ZeroQ`), arXiv:2001.00281, section 3.1; classes, smoothness and shifts, Yin et
//! al. 2020 (`DeepInversion`), arXiv:1912.08795, section 3.2; logarithms of spreads, moments of the step before and two sizes ours.

mod moments;
mod picture;
mod program;

pub use moments::Remembered;

use self::picture::{Looks, Picture};
use self::program::Program;
use crate::exec::{Dataset, Executor, Progress};
use crate::grad::GradError;
use crate::ir::Graph;
use crate::parallel;
use crate::seed;
use crate::tensor::Tensor;

/// At most so many inputs are made together, with common moments.
const BATCH: usize = 32;
/// Steps at half the size, where there is one, and at the whole.
const STEPS: (usize, usize) = (80, 40);
/// What the first steps move an element by, in spreads of the given inputs; the last ones a twentieth.
const RATE: f32 = 0.1;
/// What differences of neighbors count.
const SMOOTHNESS: f32 = 0.5;
/// Everything is drawn from this.
const SEED: u64 = 0x1a6e_5eed;

/// Makes `n` inputs for `graph`, which takes one float tensor and whose batch norms remembered `remembered`; in shape, range, mean and
/// spread like the `given` ones, so many `threads` at a time, each with a tape of the whole model. Reported to `progress` as `augment`;
/// `None` when the user interrupts.
///
/// # Errors
/// [`GradError`] says why the model makes none: no batch norm is left, gradients do not pass, or it takes other inputs.
pub fn imagine(
    graph: &Graph,
    remembered: &[Remembered],
    (given, n): (&dyn Dataset, usize),
    (executor, threads): (&dyn Executor, usize),
    progress: &dyn Progress,
) -> Result<Option<Vec<Tensor>>, GradError> {
    let sizes = sizes(graph, remembered, Looks::of(given)?, executor)?;
    let batches = n.div_ceil(BATCH).max(1);
    let steps: usize = sizes.iter().map(|size| size.steps).sum();
    progress.begin("augment", (batches as u64).saturating_mul(steps as u64));
    let made =
        (0..batches).map(|batch| made(&sizes, batch * n / batches..(batch + 1) * n / batches, threads, progress));
    let made = made.collect::<Result<Option<Vec<Vec<Tensor>>>, GradError>>();
    progress.end();
    Ok(made?.map(|made| made.into_iter().flatten().collect()))
}

/// The inputs with these `numbers`; `None` when the user interrupts.
fn made(
    sizes: &[Size],
    numbers: std::ops::Range<usize>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Option<Vec<Tensor>>, GradError> {
    let start = |at: usize| Picture::drawn(&sizes[0].looks, seed::mixed(SEED ^ at as u64));
    let mut pictures: Vec<Picture> = numbers.map(start).collect();
    for size in sizes {
        pictures.iter_mut().for_each(|picture| picture.resize(&size.looks));
        if !size.refine(&mut pictures, threads, progress)? {
            return Ok(None);
        }
    }
    Ok(Some(pictures.into_iter().map(Picture::into_tensor).collect()))
}

/// A size that inputs have for a while.
struct Size {
    program: Program,
    looks: Looks,
    steps: usize,
}

/// Half of `whole` where the model takes that and says as much of it, then `whole`.
fn sizes(
    graph: &Graph,
    remembered: &[Remembered],
    whole: Looks,
    executor: &dyn Executor,
) -> Result<Vec<Size>, GradError> {
    let size = |looks: Looks, steps| {
        let program = Program::of(graph, remembered, looks.shape(), executor)?;
        let said = program.classes(&looks)?;
        Ok::<_, GradError>((Size { program, looks, steps }, said))
    };
    let half = whole.halved().and_then(|half| size(half, STEPS.0).ok());
    let (mut whole, said) = size(whole, STEPS.1)?;
    let half = half.filter(|(_, of_half)| *of_half == said).map(|(half, _)| half);
    if half.is_none() {
        whole.steps += STEPS.0;
    }
    Ok(half.into_iter().chain([whole]).collect())
}

impl Size {
    /// Moves `pictures` along their gradients; whether the user let it end.
    fn refine(&self, pictures: &mut [Picture], threads: usize, progress: &dyn Progress) -> Result<bool, GradError> {
        let first = at_once(threads, pictures, |picture| self.program.moments(picture));
        let mut seen = self.program.no_moments();
        for own in first {
            seen.add(&own?);
        }
        tracing::debug!(loss = self.program.loss(&seen), shape = ?self.looks.shape(), "moments at the start");
        for step in 0..self.steps {
            if progress.cancelled() {
                return Ok(false);
            }
            progress.step();
            let gradients = at_once(threads, pictures, |picture| self.program.gradient(picture, step, &seen));
            let rate = falling(step, self.steps);
            let mut next = self.program.no_moments();
            for (picture, moved) in pictures.iter_mut().zip(gradients) {
                let (own, mut gradient) = moved?;
                next.add(&own);
                picture.smooth(&self.looks, SMOOTHNESS, &mut gradient);
                picture.step(&self.looks, &gradient, rate);
            }
            seen = next;
        }
        tracing::debug!(loss = self.program.loss(&seen), "moments at the end");
        Ok(true)
    }
}

/// `f` of every picture, of so many at once.
fn at_once<U: Send>(threads: usize, pictures: &[Picture], f: impl Fn(&Picture) -> U + Sync + Send) -> Vec<U> {
    pictures.chunks(threads.max(1)).flat_map(|some| parallel::map(some, &f)).collect()
}

/// Half a cosine from [`RATE`] to a twentieth of it.
fn falling(step: usize, steps: usize) -> f32 {
    let way = step as f32 / steps.max(1) as f32;
    RATE * (0.5 * (1.0 + (std::f32::consts::PI * way).cos())).max(0.05)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::exec::{DataError, Silent};
    use crate::pass::{PassContext, PassManager, Pipeline};
    use crate::reconstruct::testing::{NoTarget, Tapes};

    /// Samples of one input each.
    pub(in crate::imagine) struct Given(pub(in crate::imagine) Vec<Tensor>);

    impl Dataset for Given {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn name(&self, index: usize) -> String {
            format!("sample {index}")
        }

        fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
            Ok(vec![self.0[index].clone()])
        }
    }

    const MODEL: &str = "graph (%x: f32[1,2,12,12]) -> (%y) {
  %w = const f32[4,2,3,3] rand(seed=1, std=0.5)
  %gamma = const f32[4] [1, 0.5, 2, 0]
  %beta = const f32[4] [0, 1, -1, 0.5]
  %mean = const f32[4] [0.3, -0.2, 0.1, 0]
  %variance = const f32[4] [1, 2, 0.5, 1]
  %c = Conv(%x, %w) {pads=[1,1,1,1]}
  %n = BatchNormalization(%c, %gamma, %beta, %mean, %variance)
  %r = Relu(%n)
  %p = GlobalAveragePool(%r)
  %f = Flatten(%p)
  %v = const f32[4,5] rand(seed=2, std=1)
  %y = MatMul(%f, %v)
}";

    /// The graph of `text`, with shapes.
    fn parsed(text: &str) -> Graph {
        let pipeline = Pipeline::parse("infer-shapes", &crate::catalogue::passes()).unwrap();
        let mut cx = PassContext::new(&NoTarget, &Tapes);
        let (model, _) = PassManager::default().run(&pipeline, crate::text::parse(text).unwrap(), &mut cx).unwrap();
        model.graph().clone()
    }

    /// The model with its batch norm as one multiplication and one addition, and what the norm remembered.
    fn plain() -> (Graph, Vec<Remembered>) {
        let remembered = Remembered::of(&parsed(MODEL));
        assert_eq!(remembered.len(), 1);
        let s = [1.0, 0.5 / 2.0_f32.sqrt(), 2.0 / 0.5_f32.sqrt(), 0.0];
        let t = [-0.3, 1.0 + 0.2 * s[1], -1.0 - 0.1 * s[2], 0.5];
        let list = |row: [f32; 4]| row.map(|x| x.to_string()).join(", ");
        let norm = "%n = BatchNormalization(%c, %gamma, %beta, %mean, %variance)";
        let plain = format!(
            "%s = const f32[4,1,1] [{}]\n  %t = const f32[4,1,1] [{}]\n  %m = Mul(%c, %s)\n  %n = Add(%m, %t)",
            list(s),
            list(t)
        );
        let graph = parsed(&MODEL.replace(norm, &plain));
        let value = graph.find("n").unwrap();
        (graph, remembered.into_iter().map(|norm| Remembered { value, ..norm }).collect())
    }

    fn given(n: u64) -> Given {
        #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
        let numbers = |at: u64| (0..288).map(|i| 4.0 * seed::uniform(at << 32 | i) as f32 - 1.0).collect::<Vec<f32>>();
        Given((0..n).map(|at| Tensor::of([1, 2, 12, 12], numbers(at))).collect())
    }

    /// How far the norm sees what is not of training in `inputs`.
    fn loss(graph: &Graph, remembered: &[Remembered], inputs: &[Tensor]) -> f64 {
        let program = Program::of(graph, remembered, &[1, 2, 12, 12], &Tapes).unwrap();
        let mut seen = program.no_moments();
        for input in inputs {
            seen.add(&program.moments(&Picture::of(input)).unwrap());
        }
        program.loss(&seen)
    }

    #[test]
    fn what_is_made_has_the_moments_of_training_and_lies_in_the_range_of_what_is_given() {
        let (graph, remembered) = plain();
        let made = imagine(&graph, &remembered, (&given(6), 40), (&Tapes, 2), &Silent).unwrap().unwrap();
        assert_eq!(made.len(), 40);
        let numbers = |tensor: &Tensor| tensor.values::<f32>().unwrap().into_owned();
        assert!(made.iter().flat_map(numbers).all(|x| (-1.0..=3.0).contains(&x)));
        let (before, after) = (loss(&graph, &remembered, &given(40).0), loss(&graph, &remembered, &made));
        assert!(after < 0.3 * before, "{before} {after}");
        assert!((1..40).all(|i| made[0] != made[i]), "no two are the same");
    }

    #[test]
    fn what_is_made_does_not_depend_on_threads() {
        let (graph, remembered) = plain();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let made = || imagine(&graph, &remembered, (&given(3), 5), (&Tapes, threads), &Silent);
            pool.install(made).unwrap().unwrap()
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn models_that_remember_nothing_are_refused_with_the_reason() {
        let (graph, remembered) = plain();
        let refused = |graph: &Graph, remembered: &[Remembered], given: &Given| {
            imagine(graph, remembered, (given, 1), (&Tapes, 1), &Silent).unwrap_err().to_string()
        };
        assert!(refused(&graph, &[], &given(1)).contains("reach 0 of its 0 batch norms"));
        assert!(refused(&graph, &remembered, &given(0)).contains("no sample"));
        let cut = parsed(&MODEL.replace("Conv(%x", "Round(%x").replace(", %w) {pads=[1,1,1,1]}", ")"));
        let refusal = refused(&cut, &Remembered::of(&cut), &given(1));
        assert!(refusal.contains("reach 0 of its 1 batch norms: node"), "{refusal}");
        let two = parsed(&MODEL.replace("12,12])", "12,12], %z: f32[1])"));
        assert!(refused(&two, &Remembered::of(&two), &given(1)).contains("2 inputs"));
    }

    #[test]
    fn it_ends_when_the_user_interrupts() {
        struct Third(AtomicUsize);
        impl Progress for Third {
            fn begin(&self, _: &str, _: u64) {}
            fn step(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
            fn end(&self) {}
            fn cancelled(&self) -> bool {
                self.0.load(Ordering::Relaxed) >= 3
            }
        }
        let ((graph, remembered), third) = (plain(), Third(AtomicUsize::new(0)));
        assert!(imagine(&graph, &remembered, (&given(3), 5), (&Tapes, 1), &third).unwrap().is_none());
        assert_eq!(third.0.into_inner(), 3);
    }
}
