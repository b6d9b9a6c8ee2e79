//! Words that a language model itself draws.
//!
//! What a decoder says of the next word is drawn from for every second word of a sample; the next variant starts from the one before. That is a step of a
//! Markov chain whose texts are the model's own, and costs one run of the model per variant.
//!
//! Source: texts of the model's own for rounding by data, Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, section 3.1; words side by side
//! instead of one after the other ours.

use passes::exec::{Dataset, Executor, Progress, Session};
use passes::ir::Graph;
use passes::parallel;
use passes::seed;
use passes::tensor::{DType, Tensor};

/// The share of words that are drawn anew.
const SHARE: f64 = 0.5;
/// The most that the logits of the first half may change when the words of the second do, over the largest.
const AHEAD: f32 = 1e-3;

/// A language model: what it says of position t tells the word at t + 1.
pub(super) struct Speaker {
    session: Box<dyn Session>,
    /// The input that holds words.
    input: usize,
}

impl Speaker {
    /// The model `graph` as one, of words at `input` out of so many `rows`; `None` where it is none.
    pub(super) fn of(
        graph: &Graph,
        executor: &dyn Executor,
        data: &dyn Dataset,
        input: usize,
        rows: usize,
    ) -> Option<Self> {
        let session = executor.prepare(graph).ok()?;
        let speaker = Self { session, input };
        let feeds = data.sample(0).ok()?;
        let ids = feeds.get(input)?.integers()?.clone();
        (ids.len() > 2).then_some(())?;
        let said = speaker.says(&feeds, ids.len())?;
        (said.len() == ids.len() * rows).then_some(())?;
        // Of a model that looks ahead, words say what they are themselves.
        let half = ids.len() / 2;
        let other: Vec<i64> = ids
            .iter()
            .enumerate()
            .map(|(at, &id)| if at < half { id } else { (id + 1) % i64::try_from(rows).unwrap_or(i64::MAX).max(2) })
            .collect();
        let mut changed = feeds.clone();
        changed[input] = like(&feeds[input], other)?;
        let without = speaker.says(&changed, ids.len())?;
        let largest = said.iter().fold(0.0_f32, |most, z| most.max(z.abs()));
        let apart = |range: std::ops::Range<usize>| {
            said[range.clone()].iter().zip(&without[range]).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()))
        };
        let (before, behind) = (apart(0..half * rows), apart(half * rows..said.len()));
        (before <= AHEAD * largest && behind > AHEAD * largest).then_some(speaker)
    }

    /// The logits of one sequence of so many words.
    fn says(&self, feeds: &[Tensor], words: usize) -> Option<Vec<f32>> {
        let outputs = self.session.run(feeds).ok()?;
        let [batch, positions, _] = *outputs.first()?.shape() else { return None };
        (batch == 1 && positions == words).then_some(())?;
        outputs[0].floats().map(std::borrow::Cow::into_owned)
    }

    /// So many variants of sample `index`, each from the one before; words that are `fixed` stay.
    fn variants(&self, feeds: &[Tensor], times: usize, fixed: &(dyn Fn(i64) -> bool + Sync)) -> Option<Vec<Tensor>> {
        let mut feeds = feeds.to_vec();
        let mut variants = Vec::new();
        for variant in 1..=times {
            let mut ids = feeds[self.input].integers()?.clone();
            let said = self.says(&feeds, ids.len())?;
            let start = ids.iter().fold(variant as u64, |hash, id| seed::mixed(hash ^ id.cast_unsigned()));
            let rows = said.len() / ids.len().max(1);
            for at in 1..ids.len() {
                let x = start.wrapping_add(2 * at as u64);
                if !fixed(ids[at]) && seed::uniform(x) < SHARE {
                    let row = &said[(at - 1) * rows..at * rows];
                    let drawn = i64::try_from(draw(row, seed::uniform(x.wrapping_add(1)))).ok()?;
                    ids[at] = if fixed(drawn) { ids[at] } else { drawn };
                }
            }
            feeds[self.input] = like(&feeds[self.input], ids)?;
            variants.push(feeds[self.input].clone());
        }
        Some(variants)
    }

    /// `times` variants of every sample of `data`, those of one sample side by side, made by so many `threads`; `None` when one cannot be
    /// made or the user interrupts.
    pub(super) fn all(
        &self,
        (data, threads): (&dyn Dataset, usize),
        times: usize,
        fixed: &(dyn Fn(i64) -> bool + Sync),
        progress: &dyn Progress,
    ) -> Option<Vec<Vec<Tensor>>> {
        progress.begin("augment", data.len() as u64);
        // Sessions run on a thread of their own for each plain thread; workers of a pool would wait for one another there.
        let made = parallel::workers(threads, data.len(), Vec::new, |made, index| {
            let feeds = data.sample(index).ok().filter(|_| !progress.cancelled()).ok_or(())?;
            made.push((index, self.variants(&feeds, times, fixed).ok_or(())?));
            progress.step();
            Ok::<_, ()>(())
        });
        progress.end();
        let mut made: Vec<(usize, Vec<Tensor>)> = made.ok()?.into_iter().flatten().collect();
        made.sort_by_key(|(index, _)| *index);
        Some(made.into_iter().map(|(_, variants)| variants).collect())
    }
}

/// The class at which the running sum of the softmax of `logits` passes `share`.
fn draw(logits: &[f32], share: f64) -> usize {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|z| (z - top).exp()).collect();
    let mut left = share * weights.iter().map(|w| f64::from(*w)).sum::<f64>();
    let passed = weights.iter().position(|w| {
        left -= f64::from(*w);
        left < 0.0
    });
    passed.unwrap_or(0)
}

/// `ids` in the shape and type of `tensor`.
pub(super) fn like(tensor: &Tensor, ids: Vec<i64>) -> Option<Tensor> {
    let shape = tensor.shape().to_vec();
    match tensor.dtype() {
        DType::I64 => Some(Tensor::of(shape, ids)),
        DType::I32 => {
            Some(Tensor::of(shape, ids.iter().map(|&id| i32::try_from(id).ok()).collect::<Option<Vec<_>>>()?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_drawn_as_often_as_the_softmax_says() {
        let logits = [0.0_f32, 4.0_f32.ln(), f32::NEG_INFINITY, 5.0_f32.ln()];
        let mut counts = [0; 4];
        (0..1000_u16).for_each(|i| counts[draw(&logits, f64::from(i) / 1000.0)] += 1);
        assert_eq!(counts, [100, 400, 0, 500]);
    }
}
