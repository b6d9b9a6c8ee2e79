//! Clamps with bounds in attributes or inputs.

use super::real::{map, map_two};
use super::{Array, Call, GradError, Grads, Inputs, Real, Row, Rule, row};
use crate::ir::{Attr, Node};

pub(super) static ROWS: &[Row] = &[row("Clip", |node| Ok(Box::new(Clip::of(node))))];

/// `min(max(x, low), high)`.
#[derive(Debug)]
struct Clip {
    attributes: (Option<f64>, Option<f64>),
}

impl Clip {
    fn of(node: &Node) -> Self {
        let bound = |name: &str| match node.attrs.get(name) {
            Some(Attr::Float(value)) => Some(f64::from(*value)),
            _ => None,
        };
        Self { attributes: (bound("min"), bound("max")) }
    }

    fn bounds<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<(T, T), GradError> {
        let bound = |at: usize, attribute: Option<f64>, rest: f64| -> Result<T, GradError> {
            let given = inputs.optional(at)?.and_then(|array| array.iter().next().copied());
            Ok(given.unwrap_or_else(|| T::of(attribute.unwrap_or(rest))))
        };
        Ok((bound(1, self.attributes.0, f64::NEG_INFINITY)?, bound(2, self.attributes.1, f64::INFINITY)?))
    }
}

impl<T: Real> Rule<T> for Clip {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let (low, high) = self.bounds(inputs)?;
        let clamp = |x: T| {
            let x = if x < low { low } else { x };
            if x > high { high } else { x }
        };
        Ok(vec![map(inputs.real(0)?, clamp)?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (low, high) = self.bounds(&call.inputs)?;
        // Beyond the bounds nothing passes; on them it does, as in training frameworks.
        let passed = |g: T, x: T| if x >= low && x <= high { g } else { T::zero() };
        Ok(vec![Some(map_two(call.grad()?, call.inputs.real(0)?, passed)?)])
    }
}
