//! How much of a block memory holds at once while it is learned.

use super::block::Program;
use super::objective::LANES;
use super::samples::{Sample, Samples};
use super::settings::Settings;
use crate::grad::{GradError, Sizes, Slot, Tape};
use crate::pass::{PassContext, PassError};

/// How many tapes run side by side, and where a tape is cut: what lies before a cut is run once more on the way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) at_once: usize,
    pub(super) cuts: Vec<usize>,
}

/// In more parts than this no tape is cut.
const MOST_PARTS: usize = 64;

impl Room {
    /// All there is.
    pub(super) const ALL: Self = Self { at_once: usize::MAX, cuts: Vec::new() };

    /// How many run side by side where nothing goes back.
    pub(super) fn forward(&self) -> usize {
        self.at_once.saturating_mul(2)
    }

    /// What `bytes` allow for `tape`, whose slots have these `sizes`; the least that it takes where they do not hold even that.
    pub(super) fn of(tape: &Tape, ends: &[Slot], sizes: &Sizes, bytes: u64) -> Result<Self, u64> {
        let whole = tape.bytes(&[], ends, sizes).max(1);
        if let Some(at_once) = usize::try_from(bytes / whole).ok().filter(|n| *n > 0) {
            return Ok(Self { at_once, cuts: Vec::new() });
        }
        let mut least = whole;
        for parts in 2..=MOST_PARTS {
            let cuts = tape.cut_in(parts, sizes);
            let needed = tape.bytes(&cuts, ends, sizes);
            if needed <= bytes {
                return Ok(Self { at_once: 1, cuts });
            }
            least = least.min(needed);
        }
        Err(least)
    }
}

/// The weights of `program`.
pub(super) fn weights(program: &Program) -> u64 {
    program.weights.iter().map(|(.., tensor)| tensor.len() as u64).sum()
}

/// The bytes that a step takes for the weights of `program`: gradients of so many `lanes`, of one more sample each where they have several,
/// and of all; points, leaves, and the best so far.
pub(super) fn stepped(program: &Program, lanes: usize, batch: usize) -> u64 {
    let of_lanes = lanes as u64 * if batch > LANES { 2 } else { 1 };
    weights(program).saturating_mul(4 * (of_lanes + 4))
}

/// The bytes of what is learned of the weights of a block, and of their gradients.
fn learned(settings: &Settings, program: &Program) -> u64 {
    weights(program).saturating_mul(settings.method.bytes_per_weight()).saturating_add(stepped(
        program,
        LANES,
        settings.batch,
    ))
}

/// What of the bytes of samples that wait a walk leaves to the samples of blocks that are learned on the way.
pub(crate) fn reserved(cx: &PassContext<'_>) -> u64 {
    cx.pair_budget / 2
}

/// How many times as large as the first sample the largest is, at most: tensors of a longer sample are larger.
pub(super) fn longest(samples: &Samples) -> usize {
    samples.all.iter().map(Sample::numbers).max().unwrap_or(0).div_ceil(samples.float.numbers().max(1))
}

/// What memory allows while `program` is learned from `samples`, where so many bytes are held `beside` it: by samples, that wait or that it is
/// learned from, and by sessions of the walk.
///
/// # Errors
/// [`PassError`] where it does not hold one sample however the tape is cut; inside, why the tape does not run.
pub(super) fn room(
    (program, number): (&Program, usize),
    settings: &Settings,
    samples: &Samples,
    cx: &PassContext<'_>,
    beside: u64,
) -> Result<Result<Room, GradError>, PassError> {
    let longest = longest(samples);
    let sizes = match program.sizes(&samples.float.feeds) {
        Ok((sizes, _)) => sizes.times(longest.max(1) as u64),
        Err(error) => return Ok(Err(error)),
    };
    let ends: Vec<Slot> = program.outputs.iter().map(|(slot, _)| *slot).collect();
    // Nothing is measured meanwhile.
    let (learned, allowed) = (learned(settings, program), cx.lone_budget.saturating_sub(beside));
    let room = Room::of(&program.tape, &ends, &sizes, allowed.saturating_sub(learned));
    tracing::debug!(block = number, ?room, learned, allowed, "memory of tapes");
    room.map(Ok).map_err(|least| {
        PassError::Model(format!(
            "block {number} takes {} MB of gradients for one sample beside {} MB that are learned of it, and there is room for {} MB: learn \
             fewer weights at a time (layers=, window=), give smaller samples, or allow more with --max-memory",
            least / 1_000_000,
            learned / 1_000_000,
            allowed / 1_000_000
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grad::tape_of_sums;

    #[test]
    fn less_memory_is_fewer_at_once_then_cuts_then_a_refusal() {
        // Twelve sums of a hundred numbers each, one behind the other.
        let (tape, end) = tape_of_sums(12);
        let sizes = Sizes { slots: [vec![0; 2], vec![400; 12]].concat(), aside: 0 };
        let whole = tape.bytes(&[], &[end], &sizes);
        let of = |bytes: u64| Room::of(&tape, &[end], &sizes, bytes);
        assert_eq!(of(whole * 100), Ok(Room { at_once: 100, cuts: Vec::new() }));
        assert_eq!(of(3 * whole), Ok(Room { at_once: 3, cuts: Vec::new() }));
        assert_eq!(of(whole), Ok(Room { at_once: 1, cuts: Vec::new() }));
        let cut = of(whole - 1).unwrap();
        assert!(cut.at_once == 1 && cut.cuts.len() == 1, "{cut:?}");
        let least = of(0).unwrap_err();
        assert!(least < whole * 2 / 3 && of(least).is_ok() && of(least - 1) == Err(least), "{least} of {whole}");
        // What a step takes for itself comes on top.
        let aside = Sizes { aside: 90, ..sizes.clone() };
        assert_eq!(Room::of(&tape, &[end], &aside, 0), Err(least + 90));
    }
}
