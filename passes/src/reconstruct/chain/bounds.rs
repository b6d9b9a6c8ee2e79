//! How much of a chain memory holds at once.

use super::super::objective::LANES;
use super::super::room::{Room, stepped, weights};
use super::back::Carried;
use super::{Chain, Link};
use crate::grad::{GradError, Sizes, Slot};
use crate::pass::{PassContext, PassError};

/// The bytes that there are for a chain.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Budget {
    /// For samples, at most.
    pub(in super::super) samples: u64,
    /// For these, and for tapes.
    pub(in super::super) all: u64,
    /// Samples of a step.
    pub(in super::super) batch: usize,
}

/// What one sample takes.
pub(super) struct Takes {
    /// The tape of every link.
    tapes: Vec<Sizes>,
    /// All that links hand on.
    handed: u64,
    /// The most of it that is still to be read at one link.
    alive: u64,
}

impl Takes {
    /// What lies between links: of a batch all that is handed on, with gradients of what is still to be read; of samples that judge the
    /// latter alone.
    fn between(&self, batch: usize, judges: usize) -> u64 {
        let back = (self.handed + self.alive).saturating_mul(batch as u64);
        back.max(self.alive.saturating_mul(judges as u64))
    }
}

/// What is kept of a tape until its block is left.
fn ends(link: &Link) -> Vec<Slot> {
    link.program.outputs.iter().map(|(slot, _)| *slot).collect()
}

impl Chain {
    /// What a tape of `link` takes: beside itself, of what is returned the target, the difference and the gradient.
    fn of_tape(&self, link: &Link, sizes: &Sizes) -> Sizes {
        let returned: u64 = self.returned(link).map(|(slot, _)| 3 * sizes.of(slot)).sum();
        Sizes { aside: sizes.aside + returned, ..sizes.clone() }
    }

    /// What sample `i` takes.
    pub(super) fn takes(&self, i: usize) -> Result<Takes, GradError> {
        let (mut state, mut takes) = (Carried::default(), Takes { tapes: Vec::new(), handed: 0, alive: 0 });
        let held = |state: &Carried| state.values.values().map(|v| 4 * v.len() as u64).sum::<u64>();
        for (at, link) in self.links.iter().enumerate() {
            let (sizes, values) = link.program.sizes(&self.feeds(link, i, &state)?)?;
            let before = held(&state);
            self.hand_on(link, &values, &mut state);
            takes.handed += held(&state).saturating_sub(before);
            state.values.retain(|value, _| self.carried.get(value).is_some_and(|&last| last > at));
            takes.alive = takes.alive.max(held(&state));
            takes.tapes.push(sizes);
        }
        Ok(takes)
    }

    /// What samples leave to tapes: what as many as run side by side would take, but no more than half of all.
    pub(super) fn reserve(&self, takes: &Takes, budget: &Budget) -> u64 {
        let side_by_side = budget.batch.min(LANES) as u64;
        let of = |(link, sizes): (&Link, &Sizes)| {
            let tape = link.program.tape.bytes(&[], &ends(link), &self.of_tape(link, sizes));
            tape.saturating_mul(side_by_side).saturating_add(stepped(&link.program, LANES, budget.batch))
        };
        let most = self.links.iter().zip(&takes.tapes).map(of).max().unwrap_or(0);
        most.saturating_add(takes.between(budget.batch, 0)).min(budget.all / 2)
    }

    /// Says how many tapes of every link run side by side, and where they are cut, so that a step takes no more than `bytes`.
    ///
    /// # Errors
    /// Where a link takes more however it is cut.
    pub(super) fn fit(&mut self, takes: &Takes, bytes: u64, batch: usize) -> Result<(), PassError> {
        let between = takes.between(batch, self.held_out.len());
        let own = |link: &Link, lanes: usize| between + stepped(&link.program, lanes, batch);
        self.take_rooms(takes, bytes, &own).map_err(|(at, needed)| crowded(at, needed, bytes))
    }

    /// The same for gradients that are drawn, of as many samples as there are lanes, where so many bytes are held `beside` samples, and
    /// `per_weight` for every weight of a block and sample of a batch; or why memory does not hold them.
    pub(in super::super) fn fit_draws(
        &mut self,
        cx: &PassContext<'_>,
        (beside, per_weight): (u64, u64),
    ) -> Result<(), String> {
        let numbers = |at: &usize| -> usize {
            self.given[*at].values.values().map(|v| v.shape().iter().product::<usize>()).sum()
        };
        let longest = (0..self.given.len()).max_by_key(numbers).unwrap_or(0);
        let takes = self.takes(longest).map_err(|error| error.to_string())?;
        let left = cx.lone_budget.saturating_sub(self.waiting).saturating_sub(beside);
        let between = takes.between(LANES, 0);
        // Weights in float as leaves; what samples leave stays until all of a batch have gone back, however few run at once.
        let own = |link: &Link, _: usize| between + (4 + per_weight * LANES as u64) * weights(&link.program);
        self.take_rooms(&takes, left, &own).map_err(|(at, needed)| {
            format!(
                "gradients of block {at} take {} MB for one sample, and {} MB are left: give smaller samples, or allow more with --max-memory",
                needed.div_ceil(1_000_000),
                left / 1_000_000
            )
        })
    }

    /// Tapes of every link, as many side by side as `bytes` hold beside `own`, what a link takes for so many lanes.
    ///
    /// # Errors
    /// The first link that takes more however it is cut, and what it takes.
    fn take_rooms(&mut self, takes: &Takes, bytes: u64, own: &dyn Fn(&Link, usize) -> u64) -> Result<(), (usize, u64)> {
        let room = |(at, (link, sizes)): (usize, (&Link, &Sizes))| {
            let sizes = self.of_tape(link, sizes);
            let of = |lanes: usize| {
                let beside = own(link, lanes);
                let room = Room::of(&link.program.tape, &ends(link), &sizes, bytes.saturating_sub(beside));
                room.map_err(|least| least.saturating_add(beside))
            };
            let alone = |_| of(1).map(|room| Room { at_once: 1, ..room });
            of(LANES).or_else(alone).map_err(|needed| (at, needed))
        };
        let rooms = self.links.iter().zip(&takes.tapes).enumerate().map(room).collect::<Result<Vec<Room>, _>>()?;
        tracing::debug!(bytes, ?rooms, "memory of the chain");
        self.links.iter_mut().zip(rooms).for_each(|(link, room)| link.program.room = room);
        Ok(())
    }
}

fn crowded(at: usize, needed: u64, bytes: u64) -> PassError {
    PassError::Model(format!(
        "a step through block {at} of the model takes {} MB, and {} MB are left beside what is learned and the samples: hold fewer weights \
         at a time (layers=1), learn less (codes=0, or learn=q-galore), take a smaller batch= or fewer --samples, or allow more with \
         --max-memory",
        needed.div_ceil(1_000_000),
        bytes / 1_000_000
    ))
}
