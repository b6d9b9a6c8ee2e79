//! More samples out of few: the given ones with tokens replaced by others of the vocabulary.
//!
//! Second moments of a few thousand tokens have directions that those tokens hardly visit, and what is rounded by data spends its freedom
//! there. Sentences with every other word drawn at random visit them, and keep the rest of what makes a sentence: its length, its padding
//! and its marks. Measured by `tests/bench/mixed.py`.

use std::collections::{BTreeMap, BTreeSet};

use passes::exec::{DataError, Dataset, Executor, Progress};
use passes::id::ValueId;
use passes::ir::Graph;
use passes::seed;
use passes::tensor::Tensor;

use super::Files;
use super::drawn::{Speaker, like};
use super::rounds::Rounds;

/// The share of tokens that are replaced.
const SHARE: f64 = 0.5;
/// The fewest rows of a table that is taken for a vocabulary: positions, segments and bytes have fewer.
const LEAST_ROWS: usize = 1000;
/// What may stand between an input and the table it indexes.
const CARRIES: &[&str] = &["Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"];

/// An input that holds token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tokens {
    /// Its place among the inputs.
    input: usize,
    /// How many ids there are.
    rows: usize,
}

/// Samples, followed by variants of them.
#[derive(Debug)]
pub struct Augmented<'a> {
    rounds: Rounds<'a>,
    tokens: Vec<Tokens>,
    /// Per entry of `tokens`, ids that stay where they are: those that more than half of the sequences hold.
    marks: Vec<BTreeSet<i64>>,
    /// Variants that the model itself has drawn, by sample.
    drawn: Option<Vec<Vec<Tensor>>>,
}

impl<'a> Augmented<'a> {
    /// `files`, followed by `times` variants of every sample for the model `graph`.
    ///
    /// `None` where no input of it holds token ids, which index tables of [`LEAST_ROWS`] rows or more.
    ///
    /// # Errors
    /// [`DataError`] where a sample cannot be read.
    pub fn new(files: &'a Files, graph: &Graph, times: usize) -> Result<Option<Self>, DataError> {
        let tokens = find_tokens(graph);
        if tokens.is_empty() {
            return Ok(None);
        }
        let marks = marks(files, &tokens)?;
        let rounds = Rounds { files, times, noun: "variant" };
        Ok(Some(Self { rounds, tokens, marks, drawn: None }))
    }

    /// The same, with words drawn by the model `graph` itself where it is a decoder.
    #[must_use]
    pub fn spoken(
        mut self,
        graph: &Graph,
        (executor, threads): (&dyn Executor, usize),
        progress: &dyn Progress,
    ) -> Self {
        if let ([tokens], [marks]) = (&*self.tokens, &*self.marks)
            && let Some(speaker) = Speaker::of(graph, executor, self.rounds.files, tokens.input, tokens.rows)
        {
            self.drawn =
                speaker.all((self.rounds.files, threads), self.rounds.times, &|id| marks.contains(&id), progress);
        }
        self
    }

    /// How many words the given samples hold: ids that are no marks.
    ///
    /// # Errors
    /// [`DataError`] where a sample cannot be read.
    pub fn words(&self) -> Result<usize, DataError> {
        let mut words = 0;
        for index in 0..self.rounds.files.len() {
            let sample = self.rounds.files.sample(index)?;
            for (tokens, marks) in self.tokens.iter().zip(&self.marks) {
                let ids = sample[tokens.input].integers().unwrap_or_default();
                words += ids.iter().filter(|id| !marks.contains(id)).count();
            }
        }
        Ok(words)
    }

    /// Whether the model itself draws the words.
    pub fn is_spoken(&self) -> bool {
        self.drawn.is_some()
    }

    /// The ids of `tensor` with a share of them drawn anew: by what they are and by `variant`, so that the order of samples does not matter.
    fn varied(&self, which: usize, tensor: &Tensor, variant: usize) -> Option<Tensor> {
        let (tokens, marks) = (self.tokens[which], &self.marks[which]);
        let given = tensor.integers()?;
        let start = given.iter().fold(variant as u64, |hash, id| seed::mixed(hash ^ id.cast_unsigned()));
        let draw = |(at, &id): (usize, &i64)| {
            let x = start.wrapping_add(2 * at as u64);
            if marks.contains(&id) || seed::uniform(x) >= SHARE {
                return id;
            }
            let new = i64::try_from(seed::mixed(x.wrapping_add(1)) % tokens.rows as u64).unwrap_or(id);
            if marks.contains(&new) { id } else { new }
        };
        let ids: Vec<i64> = given.iter().enumerate().map(draw).collect();
        like(tensor, ids)
    }
}

impl Dataset for Augmented<'_> {
    fn len(&self) -> usize {
        self.rounds.len()
    }

    fn name(&self, index: usize) -> String {
        self.rounds.name(index)
    }

    fn origin(&self, index: usize) -> usize {
        self.rounds.place(index).1
    }

    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let (variant, of) = self.rounds.place(index);
        let mut sample = self.rounds.files.sample(of)?;
        if variant == 0 {
            return Ok(sample);
        }
        if let Some(drawn) = &self.drawn {
            let variant = drawn.get(of).and_then(|variants| variants.get(variant - 1));
            let places = self.tokens.iter().map(|tokens| tokens.input).zip(variant.cloned());
            places.for_each(|(input, variant)| sample[input] = variant);
            return Ok(sample);
        }
        for (which, tokens) in self.tokens.iter().enumerate() {
            let refuse = || DataError {
                sample: self.name(index),
                problem: "its token ids are no 32- or 64-bit integers".into(),
            };
            sample[tokens.input] = self.varied(which, &sample[tokens.input], variant).ok_or_else(refuse)?;
        }
        Ok(sample)
    }
}

/// The inputs of `graph` that index the largest table of all that inputs index, when that is as large as a vocabulary.
fn find_tokens(graph: &Graph) -> Vec<Tokens> {
    let mut from: BTreeMap<ValueId, usize> = graph.inputs().iter().enumerate().map(|(at, id)| (*id, at)).collect();
    let mut found: Vec<Tokens> = Vec::new();
    for (_, node) in graph.nodes() {
        let read = |input| node.input(input).and_then(|value| from.get(&value).copied());
        if CARRIES.iter().any(|name| node.op.is(name)) {
            if let (Some(input), Some(output)) = (read(0), node.output(0)) {
                from.insert(output, input);
            }
        } else if let (true, Some(input)) = (node.op.is("Gather") && node.int("axis", 0) == 0, read(1)) {
            let rows = graph.constant_input(node, 0).and_then(|table| table.shape().first().copied());
            found.extend(rows.filter(|&rows| rows >= LEAST_ROWS).map(|rows| Tokens { input, rows }));
        }
    }
    let most = found.iter().map(|tokens| tokens.rows).max();
    found.retain(|tokens| Some(tokens.rows) == most);
    found.sort_by_key(|tokens| tokens.input);
    found.dedup();
    found
}

/// Per entry of `tokens`, the ids that more than half of the sequences of `files` hold: padding, starts and ends.
fn marks(files: &Files, tokens: &[Tokens]) -> Result<Vec<BTreeSet<i64>>, DataError> {
    let mut seen: Vec<(usize, BTreeMap<i64, usize>)> = vec![(0, BTreeMap::new()); tokens.len()];
    for index in 0..files.len() {
        let sample = files.sample(index)?;
        for (tokens, (sequences, holding)) in tokens.iter().zip(&mut seen) {
            let ids = sample[tokens.input].integers().unwrap_or_default();
            let length = sample[tokens.input].shape().last().copied().unwrap_or(1).max(1);
            for sequence in ids.chunks(length) {
                *sequences += 1;
                for id in sequence.iter().collect::<BTreeSet<_>>() {
                    *holding.entry(*id).or_default() += 1;
                }
            }
        }
    }
    let most = |(sequences, holding): (usize, BTreeMap<i64, usize>)| {
        holding.into_iter().filter(|(_, n)| 2 * n > sequences).map(|(id, _)| id).collect()
    };
    Ok(seen.into_iter().map(most).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Slot;

    const MODEL: &str = "graph (%ids: i64[N,20], %segments: i64[N,20]) -> (%y) {
  %words = const f32[2000,2] rand(seed=1, std=1)
  %sides = const f32[2,2] [1, 2, 3, 4]
  %axes = const i64[1] [0]
  %column = Unsqueeze(%ids, %axes)
  %w = Gather(%words, %column)
  %s = Gather(%sides, %segments)
  %y = Add(%w, %s)
}";

    /// 30 sentences of 20 ids that start with 1, end with 2 and are padded with 0.
    fn written(folder: &std::path::Path) -> Vec<i64> {
        let sentence = |n: i64| {
            let words = (0..9 + n % 9).map(move |at| 100 + (37 * n + 11 * at) % 1800);
            std::iter::once(1).chain(words).chain([2]).chain(std::iter::repeat(0)).take(20)
        };
        let ids: Vec<i64> = (0..30).flat_map(sentence).collect();
        for (index, values) in [ids.clone(), vec![0; 600]].into_iter().enumerate() {
            let tensor = proto::onnx::TensorProto {
                dims: vec![30, 20],
                data_type: Some(7),
                int64_data: values,
                ..proto::onnx::TensorProto::default()
            };
            std::fs::write(folder.join(format!("input_{index}.pb")), proto::encode(&tensor)).unwrap();
        }
        ids
    }

    #[test]
    fn half_of_the_words_are_drawn_anew_and_marks_stay() {
        let folder = tempfile::tempdir().unwrap();
        let ids = written(folder.path());
        let model = passes::text::parse(MODEL).unwrap();
        let files = Files::open(folder.path(), Slot::of(model.graph()), None, None).unwrap();
        let augmented = Augmented::new(&files, model.graph(), 3).unwrap().unwrap();
        assert_eq!((files.len(), augmented.len()), (30, 120));
        let (mut words, mut changed) = (0, 0);
        for index in 0..120 {
            let sample = augmented.sample(index).unwrap();
            assert_eq!(sample, augmented.sample(index).unwrap(), "the same whenever it is asked for");
            assert_eq!(sample[1], files.sample(index % 30).unwrap()[1], "segments stay");
            let given = &ids[index % 30 * 20..][..20];
            let found = sample[0].integers().unwrap();
            assert!(found.iter().all(|id| (0..2000).contains(id)));
            for (given, found) in given.iter().zip(&found) {
                if *given < 100 || index < 30 {
                    assert_eq!(given, found, "marks and given samples stay");
                } else {
                    (words, changed) = (words + 1, changed + usize::from(given != found));
                }
            }
        }
        assert!(changed * 100 > words * 42 && changed * 100 < words * 58, "{changed} of {words}");
        let backwards: Vec<usize> = (0..30).rev().collect();
        let turned = files.only(&backwards);
        let turned = Augmented::new(&turned, model.graph(), 3).unwrap().unwrap();
        assert_eq!(turned.sample(30 + 29).unwrap(), augmented.sample(30).unwrap(), "in whatever order samples come");
        assert_ne!(augmented.sample(30).unwrap(), augmented.sample(60).unwrap(), "variants differ");
        assert!(augmented.name(45).contains("variant 1"));
        assert_eq!(augmented.words().unwrap(), ids.iter().filter(|id| **id >= 100).count());
    }

    #[test]
    fn a_model_without_a_vocabulary_has_no_variants() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path());
        let model = passes::text::parse(&MODEL.replace("2000", "999")).unwrap();
        let files = Files::open(folder.path(), Slot::of(model.graph()), None, None).unwrap();
        assert!(Augmented::new(&files, model.graph(), 1).unwrap().is_none());
    }
}
