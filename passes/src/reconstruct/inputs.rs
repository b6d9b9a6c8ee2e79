//! What a block reads while it is learned.

use std::borrow::Cow;

use super::samples::Sample;
use crate::grad::Value;
use crate::pass::OptionError;
use crate::seed;

/// Whose numbers a block reads while it is learned. It is judged on those that it will read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inputs {
    /// What the rounded blocks before it give.
    Quantized,
    /// What the float model gives there.
    Float,
    /// Element by element one or the other, drawn anew in every step.
    Mixed,
}

/// The share of elements that come from the float model where both are mixed.
const FLOAT_SHARE: f64 = 0.5;

/// Draws apart from those that leave activations inside a block in float.
const DRAWS: u64 = 0x6d69_7865_6400;

impl Inputs {
    pub(super) fn of(name: &str) -> Result<Self, OptionError> {
        match name {
            "quantized" => Ok(Self::Quantized),
            "float" => Ok(Self::Float),
            "mixed" => Ok(Self::Mixed),
            other => {
                let problem = format!("`{other}` is none of quantized, float, mixed");
                Err(OptionError { option: "inputs".into(), problem })
            }
        }
    }

    /// Whether what the float model gives is read.
    pub(super) fn reads_floats(self) -> bool {
        self != Self::Quantized
    }

    /// What is read of `sample`, of which the float model gives `float`, in a step of this `seed`.
    pub(super) fn read<'s>(
        self,
        sample: &'s Sample,
        float: Option<&'s Vec<Value<f32>>>,
        seed: u64,
    ) -> Cow<'s, [Value<f32>]> {
        match (self, float) {
            (Self::Float, Some(float)) => Cow::Borrowed(float),
            (Self::Mixed, Some(float)) => {
                let draw = |tensor: usize| seed::mixed(seed ^ DRAWS).wrapping_add((tensor as u64) << 48);
                let pairs = sample.feeds.iter().zip(float).enumerate();
                Cow::Owned(pairs.map(|(tensor, (planned, float))| mixed(planned, float, draw(tensor))).collect())
            }
            _ => Cow::Borrowed(&sample.feeds),
        }
    }
}

/// Every element from one of both.
///
/// Source: Wei et al. 2022 (`QDrop`), arXiv:2203.05740, section 4.
fn mixed(planned: &Value<f32>, float: &Value<f32>, seed: u64) -> Value<f32> {
    let (Value::Real(planned), Value::Real(float)) = (planned, float) else { return planned.clone() };
    let mut mixed = planned.clone();
    let drawn = |index: &usize| seed::uniform(seed ^ *index as u64) < FLOAT_SHARE;
    for (index, (element, float)) in mixed.iter_mut().zip(float.iter()).enumerate() {
        if drawn(&index) {
            *element = *float;
        }
    }
    Value::Real(mixed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grad::Array;

    fn of(values: impl Iterator<Item = f32>) -> Value<f32> {
        let values: Vec<f32> = values.collect();
        Value::Real(Array::from_shape_vec(vec![values.len()], values).unwrap())
    }

    #[test]
    fn every_element_comes_from_one_of_both_and_the_draw_from_the_seed() {
        let (planned, float) = (of((0..1000_u16).map(f32::from)), of((0..1000_u16).map(|i| -1.0 - f32::from(i))));
        let draw = |seed| match mixed(&planned, &float, seed) {
            Value::Real(values) => values.iter().copied().collect::<Vec<f32>>(),
            Value::Whole(_) => unreachable!("numbers stay numbers"),
        };
        let drawn = draw(7);
        let n = drawn.iter().filter(|v| **v < 0.0).count();
        assert!((400..600).contains(&n), "{n}");
        for (i, value) in (0_u16..).zip(&drawn) {
            let i = f32::from(i);
            assert!([i, -1.0 - i].contains(value), "{value}");
        }
        assert_eq!(drawn, draw(7));
        assert_ne!(drawn, draw(8));
    }
}
