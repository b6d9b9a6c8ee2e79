//! How much what the model returns depends on every element of what its blocks return: the diagonal of the Fisher information there.
//!
//! Gradients are drawn at the outputs of the float model so that their second moment is that of an error there (see `Measure::drawn`):
//! no labels are needed, and where nothing is rounded the divergence of a model from itself has no gradient to go by. The square of what
//! arrives at an element of what a block returns is what a unit of squared error there costs at the outputs, elements taken as independent.
//!
//! Source: Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3; the model's own distribution instead of labels after Kunstner
//! et al. 2019, arXiv:1905.12558, section 2.

use std::collections::{BTreeMap, BTreeSet};

use super::chain::Link;
use super::stakes::Draw;
use crate::grad::Array;
use crate::id::ValueId;
use crate::model::Model;
use crate::pass::{PassContext, PassError};

/// So many draws of gradients are summed for every sample.
const DRAWS: usize = 4;

/// Per value that a block returns and per sample, what a squared error of every element costs, in the order of storage and up to a factor
/// that all of them share.
#[derive(Debug)]
pub(crate) struct BlockStakes(BTreeMap<ValueId, Vec<Vec<f32>>>);

impl BlockStakes {
    /// Those of `values`, which blocks of at most so many `layers` return; or why gradients cannot tell. Values that no gradients reach,
    /// or only such as are no numbers, have none.
    ///
    /// # Errors
    /// [`PassError`] without samples, when the model does not run, or when the user interrupts.
    pub(super) fn of(
        model: &Model,
        cx: &PassContext<'_>,
        layers: usize,
        values: &BTreeSet<ValueId>,
    ) -> Result<Result<Self, String>, PassError> {
        let draw = Draw { layers, draws: DRAWS, stage: "block stakes", what: "element of what blocks return" };
        let outputs = |link: &Link| {
            let outputs = link.program.outputs.iter().filter(|(_, value)| values.contains(value));
            outputs.map(|(slot, value)| (*value, *slot)).collect()
        };
        let squares = |_, grad: &Array<f32>| Some(grad.iter().map(|g| g * g).collect());
        Ok(draw.squares(model, cx, &outputs, &squares)?.map(Self))
    }

    /// The same with the mean of every sample 1, or all 0.
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    pub(super) fn of_samples_alike(mut self) -> Self {
        for sample in self.0.values_mut().flatten() {
            let mean = sample.iter().map(|w| f64::from(*w)).sum::<f64>() / sample.len().max(1) as f64;
            if mean > 0.0 {
                sample.iter_mut().for_each(|w| *w = (f64::from(*w) / mean) as f32);
            }
        }
        self
    }

    /// Whether there are any of `value`.
    pub(super) fn tell(&self, value: ValueId) -> bool {
        self.0.contains_key(&value)
    }

    /// Those of `value` for one sample.
    pub(super) fn of_sample(&self, value: ValueId, sample: usize) -> Option<&[f32]> {
        self.0.get(&value)?.get(sample).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Drawn, NoTarget, Tapes, two_products};
    use super::*;
    use crate::exec::Dataset;
    use crate::model::Plan;
    use crate::simulate::Simulation;

    fn value(model: &Model, name: &str) -> ValueId {
        let graph = model.graph();
        graph.value_ids().find(|id| &*graph.value(*id).name == name).unwrap()
    }

    fn context(data: &dyn Dataset) -> PassContext<'_> {
        PassContext { dataset: Some(data), ..PassContext::new(&NoTarget, &Tapes) }
    }

    /// Σ p ln (p / q) of the softmax of h B and of what it is once element `at` of h is moved.
    fn divergence(h: &[f64], b: &[f32], at: usize, by: f64) -> f64 {
        let logarithms = |h: &[f64]| -> Vec<f64> {
            let z: Vec<f64> =
                (0..3).map(|k| h.iter().enumerate().map(|(j, h)| h * f64::from(b[3 * j + k])).sum()).collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            z.iter().map(|z| z - sum.ln()).collect()
        };
        let mut moved = h.to_vec();
        moved[at] += by;
        let (p, q) = (logarithms(h), logarithms(&moved));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    /// What a squared error costs is what moving the element alone costs at the outputs, by central differences.
    #[test]
    fn squares_are_those_of_differences() {
        const DRAWS: usize = 3000;
        let (model, data) = (two_products(0.7), Drawn(3));
        let h = value(&model, "h");
        let draw = Draw { layers: 1, draws: DRAWS, stage: "test", what: "element" };
        let outputs = |link: &Link| {
            let outputs = link.program.outputs.iter().filter(|(_, value)| *value == h);
            outputs.map(|(slot, value)| (*value, *slot)).collect()
        };
        let square = |_, grad: &Array<f32>| Some(grad.iter().map(|g| g * g).collect());
        let squares = draw.squares(&model, &context(&data), &outputs, &square).unwrap().unwrap();
        let float = Simulation::prepare(model.graph(), &Plan::default(), &Tapes, &[h]).unwrap();
        let b = model.graph().constant(value(&model, "b")).unwrap().floats().unwrap().to_vec();
        for (sample, squares) in squares[&h].iter().enumerate() {
            let values = float.run(&data.sample(sample).unwrap()).unwrap();
            let values: Vec<f64> = values[0].floats().unwrap().iter().map(|v| f64::from(*v)).collect();
            for (at, found) in squares.iter().enumerate() {
                let found = f64::from(*found) / DRAWS as f64;
                let moved = |by| divergence(&values, &b, at, by);
                let want = (moved(1e-3) + moved(-1e-3)) / 2e-6;
                assert!((found / want - 1.0).abs() < 0.12, "{sample} {at}: {found} {want}");
            }
        }
    }

    /// Of one sample as of many; not where the outputs do not depend on a block.
    #[test]
    fn values_that_no_gradients_reach_have_no_stakes() {
        for samples in [1, 6] {
            let data = Drawn(samples);
            for (spread, reached) in [(0.7, true), (0.0, false)] {
                let model = two_products(spread);
                let (h, y) = (value(&model, "h"), value(&model, "y"));
                let stakes = BlockStakes::of(&model, &context(&data), 1, &BTreeSet::from([h, y])).unwrap().unwrap();
                assert_eq!((stakes.tell(h), stakes.tell(y)), (reached, true), "{samples} {spread}");
                assert_eq!(stakes.of_sample(y, samples - 1).map(<[f32]>::len), Some(3));
                assert!(stakes.of_sample(y, samples).is_none());
                let alike = stakes.of_samples_alike();
                for sample in 0..samples {
                    let weights = alike.of_sample(y, sample).unwrap();
                    assert!((weights.iter().sum::<f32>() - 3.0).abs() < 1e-5, "{weights:?}");
                }
            }
        }
    }

    #[test]
    fn what_memory_does_not_hold_is_refused_and_no_samples_are_an_error() {
        let (model, data) = (two_products(0.7), Drawn(3));
        let values = BTreeSet::from([value(&model, "h")]);
        let few = PassContext { pair_budget: 0, ..context(&data) };
        let reason = BlockStakes::of(&model, &few, 1, &values).unwrap().unwrap_err();
        assert!(reason.contains("--max-memory") && reason.contains("of 3 samples"), "{reason}");
        let none = PassContext::new(&NoTarget, &Tapes);
        assert!(matches!(BlockStakes::of(&model, &none, 1, &values), Err(PassError::NoData)));
    }
}
