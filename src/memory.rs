//! What a run will take, from shapes alone, before anything large is allocated.

use std::collections::BTreeMap;
use std::path::Path;

use passes::exec::Executor;
use passes::id::ValueId;
use passes::ir::TensorType;
use passes::ir::walk::Users;
use passes::model::{Edit, Model, Patch};
use passes::ops::sizes;
use passes::pass::{PassContext, PassManager, Pipeline};
use passes::target::Target;
use passes::tensor::Tensor;

use crate::driver::Error;

/// The program itself, its buffers and what the allocator keeps.
const BASE: u64 = 40 << 20;

/// Without a limit, tensors held at once for measuring take at most this.
pub(crate) const DEFAULT_TAP_BYTES: u64 = 256 << 20;

/// Tensors that wait between the stages of a walk may take this, or half of what is left where that is more: samples that do not fit run
/// from the start at every stage.
const DEFAULT_PAIR_BYTES: u64 = 2 << 30;

/// Fewer bytes than this for measured tensors would mean a pass over the data for every single one.
const LEAST_TAP_BYTES: u64 = 16 << 20;

/// How many copies of the weights a run holds at its worst, while the simulation is compared with the float model: the mapped
/// file, the float executor's, the rounded ones, the quantized executor's, and the part of them being handed over.
const COPIES: u64 = 5;

/// The same for a model with large weights, which is compared in slices: the mapped file, the float executor's copy while ranges are
/// measured, the message it is handed over in, and the codes.
const COPIES_OF_LARGE: u64 = 4;

/// The same while parameters of all weights are learned, and nothing is measured: the mapped file, weights that a pass has made others of,
/// and the codes with those of the best step so far.
const COPIES_WHILE_LEARNED: u64 = 3;

pub(crate) use passes::exec::PREPACK_LIMIT;

/// What one model needs on samples of one shape.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    weights: u64,
    /// Tensors alive at once while one sample runs.
    live: u64,
    /// All activations of one sample.
    all: u64,
    /// The bytes of every tensor for one sample, where they follow from the sample's shapes.
    pub(crate) sizes: BTreeMap<ValueId, u64>,
}

/// What a run may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Worker threads.
    pub(crate) threads: usize,
    /// Bytes of tensors held at once for measuring.
    pub(crate) taps: u64,
    /// Bytes of tensors that may wait between the stages of a walk: what is left, as samples that do not fit run again.
    pub(crate) pairs: u64,
    /// Bytes that are left beside all that for what is kept of all weights.
    pub(crate) state: u64,
    /// Bytes that are left while nothing is measured and no executor runs: for what is learned of all weights, and samples that wait.
    pub(crate) lone: u64,
    /// What the run will take in all.
    pub(crate) estimate: u64,
}

impl Needs {
    /// What `model` needs for a sample like `sample`.
    pub(crate) fn of(model: &Model, sample: &[Tensor], target: &dyn Target, executor: &dyn Executor) -> Self {
        // A copy whose inputs have the sample's shapes: shape rules and folding then say every size that follows.
        let concrete = with_shapes(model.clone(), sample, target, executor).unwrap_or_else(|| model.clone());
        let graph = concrete.graph();
        let users = Users::of(graph);
        let read = graph.value_ids().filter(|id| !users.of_value(*id).is_empty());
        let weights = read.filter_map(|id| graph.constant(id)).map(|t| t.bytes().len() as u64).sum();
        let bytes = sizes::of(graph, sample);
        Self { weights, live: sizes::alive_at_once(graph, &bytes), all: bytes.values().sum(), sizes: bytes }
    }

    fn total(&self, threads: usize, taps: u64) -> u64 {
        // A model that is not large is packed by the executors, in two versions.
        let copies = if self.weights > PREPACK_LIMIT { COPIES_OF_LARGE } else { COPIES + 2 };
        let taps = taps.min((threads as u64).saturating_mul(self.all));
        self.base(threads, copies).saturating_add(taps)
    }

    /// The program, so many `copies` of the weights, and what runs of one sample per thread hold.
    fn base(&self, threads: usize, copies: u64) -> u64 {
        let weights = self.weights.saturating_mul(copies);
        BASE.saturating_add(weights).saturating_add((threads as u64).saturating_mul(self.live))
    }

    /// The bytes of tensors that wait between the stages of a walk over so many samples, both versions of them, within `pairs`.
    pub(crate) fn waiting(&self, pairs: u64, samples: usize) -> u64 {
        self.live.saturating_mul(2).saturating_mul(samples as u64).min(pairs)
    }

    /// Threads and tap bytes for a run in `limit` bytes, or in what the machine has free where no limit is given.
    ///
    /// # Errors
    /// [`Error::Resources`] when one thread with the fewest taps does not fit.
    pub(crate) fn budget(&self, limit: Option<u64>, threads: usize) -> Result<Budget, Error> {
        let Some(most) = allowed(limit) else {
            let taps = DEFAULT_TAP_BYTES;
            return Ok(Budget {
                threads,
                taps,
                pairs: DEFAULT_PAIR_BYTES,
                state: u64::MAX,
                lone: u64::MAX,
                estimate: self.total(threads, taps),
            });
        };
        for threads in (1..=threads.max(1)).rev() {
            let left = most.saturating_sub(self.total(threads, 0));
            let taps = left.min(DEFAULT_TAP_BYTES);
            if taps >= LEAST_TAP_BYTES.min((threads as u64).saturating_mul(self.all)) {
                let estimate = self.total(threads, taps);
                let left = most.saturating_sub(estimate);
                let pairs = left.min(DEFAULT_PAIR_BYTES.max(left / 2));
                let state = left - pairs;
                let lone = most.saturating_sub(self.base(threads, COPIES_WHILE_LEARNED));
                return Ok(Budget { threads, taps, pairs, state, lone, estimate });
            }
        }
        let needed = self.total(1, LEAST_TAP_BYTES);
        let source = if limit.is_some() { "--max-memory allows" } else { "this machine has free" };
        Err(Error::Resources(format!(
            "about {} MB are needed ({} MB of weights in up to {COPIES} copies, {} MB of tensors for one sample), and {source} \
             {} MB: use smaller samples or a larger machine",
            needed / 1_000_000,
            self.weights / 1_000_000,
            self.live / 1_000_000,
            most / 1_000_000
        )))
    }
}

fn with_shapes(mut model: Model, sample: &[Tensor], target: &dyn Target, executor: &dyn Executor) -> Option<Model> {
    let mut patch = Patch::on(&model);
    for (&value, tensor) in model.graph().inputs().iter().zip(sample) {
        patch.edit(Edit::Refine { value, ty: TensorType::of(tensor) });
    }
    model.apply(patch).ok()?;
    let catalogue = passes::catalogue::passes();
    let pipeline = Pipeline::parse("*(infer-shapes, fold-constants)", &catalogue).ok()?;
    let mut cx = PassContext::new(target, executor);
    PassManager::default().run(&pipeline, model, &mut cx).ok().map(|(model, _)| model)
}

/// What a run may take: `limit`, or what is free; `None` where that is not known.
pub(crate) fn allowed(limit: Option<u64>) -> Option<u64> {
    limit.or_else(available)
}

/// The bytes that this process may still take: what the machine has free, or what its control group leaves, if less.
fn available() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let free = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)?;
    Some(control_group_room(Path::new("/sys/fs/cgroup")).map_or(free, |room| room.min(free)))
}

fn control_group_room(folder: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // Pages of files that were read count as used, and are given back when they are needed.
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    let used = number("memory.current")?.saturating_sub(cached.unwrap_or(0));
    Some(number("memory.max")?.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs() -> Needs {
        Needs { weights: 100 << 20, live: 20 << 20, all: 300 << 20, sizes: BTreeMap::new() }
    }

    #[test]
    fn a_tight_limit_takes_threads_and_taps_before_it_refuses() {
        let free = needs().budget(Some(8 << 30), 4).unwrap();
        assert_eq!((free.threads, free.taps), (4, DEFAULT_TAP_BYTES));
        let one = needs().total(1, LEAST_TAP_BYTES);
        let tight = needs().budget(Some(one), 4).unwrap();
        assert_eq!((tight.threads, tight.taps), (1, LEAST_TAP_BYTES));
        assert!(tight.estimate <= one);
        assert_eq!(tight.lone, one - needs().base(1, COPIES_WHILE_LEARNED));
        assert!(tight.lone > tight.state + tight.taps + tight.pairs, "nothing is measured while weights are learned");
        let error = needs().budget(Some(one - (1 << 20)), 4).unwrap_err().to_string();
        assert!(error.contains("--max-memory allows"), "{error}");
    }

    #[test]
    fn what_waits_between_stages_may_take_half_of_what_is_left_where_that_is_much() {
        let pairs = |limit: u64| {
            let budget = needs().budget(Some(limit), 4).unwrap();
            (budget.pairs, budget.state, limit - budget.estimate)
        };
        let (pairs_of_little, state, left) = pairs(2 << 30);
        assert_eq!((pairs_of_little, state), (left, 0));
        let (pairs_of_much, state, left) = pairs(20 << 30);
        assert_eq!((pairs_of_much, state), (left / 2, left - left / 2));
        assert!(pairs_of_much > DEFAULT_PAIR_BYTES);
    }

    #[test]
    fn what_waits_between_stages_grows_with_the_samples_up_to_its_budget() {
        assert_eq!(needs().waiting(1 << 30, 3), 120 << 20);
        assert_eq!(needs().waiting(1 << 30, 1000), 1 << 30);
    }

    #[test]
    fn a_control_group_without_a_number_sets_no_limit() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("memory.max"), "max\n").unwrap();
        std::fs::write(folder.path().join("memory.current"), "5\n").unwrap();
        assert_eq!(control_group_room(folder.path()), None);
        std::fs::write(folder.path().join("memory.max"), "15\n").unwrap();
        assert_eq!(control_group_room(folder.path()), Some(10));
    }
}
