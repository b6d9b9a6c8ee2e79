//! Work on all cores with results that do not depend on how many there are.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::prelude::*;

/// [`map`] may have more items under way than there are threads: one that waits begins another. No more than these are counted with.
pub const AT_ONCE: usize = 64;

/// `f` of every item, in the order of the items.
pub fn map<T: Sync, U: Send>(items: &[T], f: impl Fn(&T) -> U + Sync + Send) -> Vec<U> {
    items.par_iter().map(f).collect()
}

/// `f` on every item.
pub fn each<T: Send>(items: &mut [T], f: impl Fn(&mut T) + Sync + Send) {
    items.par_iter_mut().for_each(f);
}

/// `f` of every item, in the order of the items, of no more at once than there are threads: one that waits for parallel work of its own
/// begins no other meanwhile, not even for work of another pool, as executors have. For items that take much memory each.
pub fn few<T: Send, U: Send>(
    items: impl Iterator<Item = T>,
    f: impl Fn(T) -> U + Sync + Send,
) -> impl Iterator<Item = U> {
    few_of(usize::MAX, items, f)
}

/// The same, of no more than `most` at once.
pub fn few_of<T: Send, U: Send>(
    most: usize,
    mut items: impl Iterator<Item = T>,
    f: impl Fn(T) -> U + Sync + Send,
) -> impl Iterator<Item = U> {
    let run = move || {
        let run: Vec<T> = items.by_ref().take(rayon::current_num_threads().min(most).max(1)).collect();
        (!run.is_empty()).then(|| run.into_par_iter().map(&f).collect::<Vec<U>>())
    };
    std::iter::from_fn(run).flatten()
}

/// What both give.
pub fn both<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    rayon::join(a, b)
}

/// Runs jobs `0..jobs` on `threads` plain threads, each with a state of its own made by `start`, and returns the states.
/// Which job lands in which state depends on timing: states must be such that merging them does not care.
///
/// # Errors
/// The error of the job with the smallest number among those that failed; the jobs not yet begun are left out then.
pub fn workers<S: Send, E: Send>(
    threads: usize,
    jobs: usize,
    start: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<(), E> + Sync,
) -> Result<Vec<S>, E> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let run = || {
        let mut state = start();
        while !stop.load(Ordering::Relaxed) {
            let job = next.fetch_add(1, Ordering::Relaxed);
            if job >= jobs {
                break;
            }
            if let Err(error) = work(&mut state, job) {
                stop.store(true, Ordering::Relaxed);
                return Err((job, error));
            }
        }
        Ok(state)
    };
    let results: Vec<Result<S, (usize, E)>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.clamp(1, jobs.max(1))).map(|_| scope.spawn(run)).collect();
        // A worker that panicked takes the run down with it: its counts would be missing.
        let join = |handle: std::thread::ScopedJoinHandle<'_, _>| {
            handle.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        };
        handles.into_iter().map(join).collect()
    });
    let (states, failures): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    match failures.into_iter().filter_map(Result::err).min_by_key(|(job, _)| *job) {
        Some((_, error)) => Err(error),
        None => Ok(states.into_iter().filter_map(Result::ok).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Work that a second pool does, as executors have one of their own; returns the sums and how many items were under way at most.
    fn nested(run: impl FnOnce(&(dyn Fn(usize) -> usize + Sync)) -> Vec<usize> + Send) -> (Vec<usize>, usize) {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (outer, inner) = (pool(2), pool(1));
        let (begun, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |i: usize| {
            most.fetch_max(begun.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            inner.install(|| std::thread::sleep(std::time::Duration::from_millis(2)));
            begun.fetch_sub(1, Ordering::SeqCst);
            3 * i
        };
        (outer.install(|| run(&work)), most.into_inner())
    }

    #[test]
    fn no_other_item_is_begun_while_one_waits() {
        let (tripled, most) = nested(|work| few(0..32, work).collect());
        assert_eq!(tripled, (0..32).map(|i| 3 * i).collect::<Vec<usize>>());
        assert!(most <= 2, "{most} at once");
    }

    #[test]
    fn a_plain_map_begins_others_while_one_waits() {
        let (tripled, most) = nested(|work| map(&(0..32).collect::<Vec<usize>>(), |i| work(*i)));
        assert_eq!(tripled, (0..32).map(|i| 3 * i).collect::<Vec<usize>>());
        assert!(most > 2, "{most} at once: then `few` is not needed any more");
    }
}
