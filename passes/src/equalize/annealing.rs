//! Steps downhill whose rate cools.

use std::f64::consts::PI;

use crate::exec::Progress;
use crate::pass::{OptionError, Options};

/// How a transform is learned: in sweeps of steps, each sweep behind the best state that was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Annealing {
    /// How often everything is seen.
    pub(super) sweeps: usize,
    /// How far a step goes at first.
    pub(super) rate: f64,
}

impl Annealing {
    /// What `options` say of `sweeps`, and of the `rate`, as times the `usual` one.
    ///
    /// # Errors
    /// [`OptionError`] for a rate that leads nowhere.
    pub(super) fn of(options: &Options, usual: f64) -> Result<Self, OptionError> {
        let rate = options.number("rate")?.unwrap_or(1.0);
        if rate <= 0.0 || rate > 100.0 {
            let problem = format!("`{rate}` is no number above 0 and up to 100");
            return Err(OptionError { option: "rate".into(), problem });
        }
        Ok(Self { sweeps: options.count("sweeps", 6)?, rate: usual * rate })
    }

    /// The best state on the way from `start`, with what `loss` says of it; `None` where the user stopped.
    ///
    /// `step` moves a state, with what `fresh` makes, as step so many of a sweep of `steps`, at a rate that falls by half a cosine from the
    /// first step to 0 behind the last. After a sweep that finds nothing better all goes on from the best state, afresh, at half the rate.
    pub(super) fn best<S: Clone, M>(
        self,
        steps: usize,
        start: (f64, S),
        fresh: impl Fn() -> M,
        mut step: impl FnMut(&mut S, &mut M, usize, f64),
        loss: impl Fn(&S) -> Option<f64>,
        progress: &dyn Progress,
    ) -> Option<(f64, S)> {
        let (mut current, mut moments, mut rate) = (start.1.clone(), fresh(), self.rate);
        let mut best = start;
        let total = (self.sweeps * steps).max(1) as f64;
        for sweep in 0..self.sweeps {
            for at in 0..steps {
                if progress.cancelled() {
                    return None;
                }
                let done = (sweep * steps + at) as f64 / total;
                step(&mut current, &mut moments, at, 0.5 * rate * (1.0 + (PI * done).cos()));
            }
            let now = loss(&current);
            tracing::debug!(sweep, loss = now, best = best.0, "annealed");
            if let Some(now) = now.filter(|now| *now < best.0) {
                best = (now, current.clone());
            } else {
                (current, moments, rate) = (best.1.clone(), fresh(), 0.5 * rate);
            }
        }
        Some(best)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::exec::Silent;

    /// A user who stopped already.
    pub(in super::super) struct Stopped;

    impl Progress for Stopped {
        fn begin(&self, _: &str, _: u64) {}
        fn step(&self) {}
        fn end(&self) {}
        fn cancelled(&self) -> bool {
            true
        }
    }

    /// From 1 towards 0, where squares are least.
    fn descended(annealing: Annealing, progress: &dyn Progress) -> Option<(f64, f64)> {
        let step = |x: &mut f64, (): &mut (), _, rate: f64| *x -= rate * x.signum();
        annealing.best(10, (1.0, 1.0), || (), step, |x| Some(x * x), progress)
    }

    #[test]
    fn the_best_is_never_above_the_start() {
        let near = descended(Annealing { sweeps: 6, rate: 0.05 }, &Silent).unwrap();
        assert!(near.0 < 0.01, "{near:?}");
        let far = descended(Annealing { sweeps: 6, rate: 1e6 }, &Silent).unwrap();
        assert!(far.0 <= 1.0, "{far:?}");
        assert_eq!(descended(Annealing { sweeps: 0, rate: 1.0 }, &Silent), Some((1.0, 1.0)));
    }

    /// Every sweep that finds nothing better begins at the best state again, with moments of its own, at half the rate.
    #[test]
    fn a_sweep_in_vain_is_taken_back() {
        let (seen, made) = (std::cell::RefCell::new(Vec::new()), std::cell::Cell::new(0));
        let fresh = || made.set(made.get() + 1);
        let step = |x: &mut f64, (): &mut (), at: usize, rate: f64| {
            seen.borrow_mut().push((*x, at, rate));
            *x += 1.0;
        };
        let annealing = Annealing { sweeps: 3, rate: 8.0 };
        assert_eq!(annealing.best(2, (0.0, 5.0), fresh, step, |x| Some(*x), &Silent), Some((0.0, 5.0)));
        let cosine = |at: i32| 0.5 * (1.0 + (PI * f64::from(at) / 6.0).cos());
        let want = [8.0, 8.0, 4.0, 4.0, 2.0, 2.0].iter().zip(0..).map(|(rate, at)| rate * cosine(at));
        let states = [5.0, 6.0].iter().cycle();
        for (at, ((seen, want), state)) in seen.borrow().iter().zip(want).zip(states).enumerate() {
            assert_eq!((seen.0, seen.1), (*state, at % 2), "{at}");
            assert!((seen.2 - want).abs() < 1e-12, "{at}: {} and not {want}", seen.2);
        }
        assert_eq!((seen.borrow().len(), made.get()), (6, 4));
    }

    #[test]
    fn a_state_that_has_no_loss_is_left() {
        let annealing = Annealing { sweeps: 3, rate: 0.05 };
        let step = |x: &mut f64, (): &mut (), _, rate: f64| *x -= rate;
        let best = annealing.best(4, (1.0, 1.0), || (), step, |_| None, &Silent);
        assert_eq!(best, Some((1.0, 1.0)));
    }

    #[test]
    fn a_user_can_stop_it() {
        assert_eq!(descended(Annealing { sweeps: 3, rate: 0.1 }, &Stopped), None);
    }

    #[test]
    fn rates_that_lead_nowhere_are_refused() {
        let of = |rate: &str| Annealing::of(&Options([("rate".to_owned(), rate.to_owned())].into()), 0.5);
        assert_eq!(of("2").unwrap(), Annealing { sweeps: 6, rate: 1.0 });
        for rate in ["0", "-1", "101"] {
            assert!(of(rate).is_err(), "{rate}");
        }
    }
}
