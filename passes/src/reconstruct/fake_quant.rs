//! Rounding an activation on the tape, with a straight-through gradient.

use crate::encoding::{Encoding, Granularity};
use crate::grad::{self, Array, Call, GradError, Grads, Inputs, Real, Rule};
use crate::seed;

/// x̂ of x, as [`Encoding::simulate`] computes it.
///
/// Inputs: the numbers; a share in thousandths and a seed: that share of the elements, drawn anew from every seed, passes as it
/// is; where it is learned, the logarithm of what the scale is multiplied with. Gradients pass where x lies in the range of the codes.
///
/// Source: Esser et al. 2020 (LSQ), arXiv:1902.08153, equation 3, for the scale; Bengio et al. 2013, arXiv:1308.3432, for passing straight through; Wei et al. 2022 (`QDrop`), arXiv:2203.05740, for the share.
#[derive(Debug)]
pub(super) struct FakeQuant {
    pub(super) encoding: Encoding,
}

impl FakeQuant {
    /// Which elements pass as they are; `None` where none does.
    fn passes<T: Real>(inputs: &Inputs<'_, T>) -> Result<Option<impl Fn(usize) -> bool + use<T>>, GradError> {
        let Some(list) = inputs.list(1)? else { return Ok(None) };
        let [share, seed] = list[..] else { return Err(GradError("a share and a seed are needed".into())) };
        let seed = seed::mixed(seed.cast_unsigned());
        let share = share as f64 / 1000.0;
        Ok((share > 0.0).then_some(move |i: usize| seed::uniform(seed ^ (i as u64)) < share))
    }
}

impl FakeQuant {
    /// The encoding at the scale that is being learned.
    fn scaled<T: Real>(&self, inputs: &Inputs<'_, T>) -> Result<std::borrow::Cow<'_, Encoding>, GradError> {
        let Some(step) = inputs.optional(2)?.and_then(|step| step.iter().next().copied()) else {
            return Ok(std::borrow::Cow::Borrowed(&self.encoding));
        };
        let step = T::narrowed(&Array::from_elem(vec![1], step))[0];
        Ok(std::borrow::Cow::Owned(rescaled(&self.encoding, step)))
    }

    /// Takes away the gradients of what lies outside of the codes of its row.
    fn cut_rows<T: Real>(inputs: &Inputs<'_, T>, encoding: &Encoding, grad: &mut Array<T>) -> Result<(), GradError> {
        let (x, passes) = (inputs.real(0)?, Self::passes(inputs)?);
        let values = T::narrowed(x);
        let misfit = |error: crate::encoding::EncodingError| GradError(error.to_string());
        let of_run = encoding.of_run(&values, x.shape()).map_err(misfit)?;
        let (scale, zero) = of_run.per_element(x.shape()).map_err(misfit)?;
        let (low, high) = encoding.grid.range();
        #[expect(clippy::cast_possible_truncation, reason = "bounds of grids of up to 16 bits")]
        let (low, high) = (low as f32 - 0.5, high as f32 + 0.5);
        for (i, (g, x)) in grad.iter_mut().zip(&values).enumerate() {
            let inside = *x >= (low - zero[i]) * scale[i] && *x <= (high - zero[i]) * scale[i];
            if !inside && passes.as_ref().is_none_or(|passes| !passes(i)) {
                *g = T::zero();
            }
        }
        Ok(())
    }

    /// The gradient by the logarithm of the scale: x̂ − x where a number is rounded, x̂ where it is cut; none of those that pass as they
    /// are.
    fn by_step<T: Real>(call: &Call<'_, T>, encoding: &Encoding) -> Result<Array<T>, GradError> {
        let (x, grad) = (call.inputs.real(0)?, call.grad()?);
        let passes = Self::passes(&call.inputs)?;
        let (low, high) = encoding.grid.range();
        let (scale, zero) = (f64::from(encoding.scale[0]), f64::from(encoding.zero_point[0]));
        let (low, high) = (T::of((low - zero - 0.5) * scale), T::of((high - zero + 0.5) * scale));
        let rounded = call.outputs.first().ok_or_else(|| GradError("it did not run forward".into()))?;
        let mut sum = T::zero();
        for (i, ((g, x), rounded)) in grad.iter().zip(x.iter()).zip(rounded.iter()).enumerate() {
            if passes.as_ref().is_none_or(|passes| !passes(i)) {
                let inside = *x >= low && *x <= high;
                sum += *g * if inside { *rounded - *x } else { *rounded };
            }
        }
        Ok(Array::from_elem(vec![1], sum))
    }
}

/// `encoding` with scales e^`step` times as large.
pub(super) fn rescaled(encoding: &Encoding, step: f32) -> Encoding {
    let scale = encoding.scale.iter().map(|scale| scale * step.exp()).collect();
    Encoding { scale, ..encoding.clone() }
}

impl<T: Real> Rule<T> for FakeQuant {
    fn forward(&self, inputs: &Inputs<'_, T>) -> Result<Vec<Array<T>>, GradError> {
        let x = inputs.real(0)?;
        let mut values = T::narrowed(x);
        self.scaled(inputs)?.simulate(&mut values, x.shape()).map_err(|error| GradError(error.to_string()))?;
        let mut rounded = T::widened(values);
        if let Some(passes) = Self::passes(inputs)? {
            let kept = rounded.iter_mut().zip(x.iter()).enumerate().filter(|(i, _)| passes(*i));
            kept.for_each(|(_, (rounded, x))| *rounded = *x);
        }
        let rounded = Array::from_shape_vec(x.raw_dim(), rounded);
        Ok(vec![rounded.map_err(|error| GradError(error.to_string()))?])
    }

    fn backward(&self, call: &Call<'_, T>) -> Result<Grads<T>, GradError> {
        let (x, mut grad) = (call.inputs.real(0)?, call.grad()?.clone());
        let encoding = self.scaled(&call.inputs)?;
        let by_step = if call.wants(2) { Some(Self::by_step(call, &encoding)?) } else { None };
        if let Granularity::DynamicRows { .. } = encoding.granularity {
            Self::cut_rows(&call.inputs, &encoding, &mut grad)?;
        }
        let per_tensor = encoding.granularity == Granularity::Tensor;
        let range = encoding.scale.first().zip(encoding.zero_point.first()).filter(|_| per_tensor);
        // Other granularities have ranges that hold everything, or were cut just above.
        if let Some((scale, zero)) = range {
            let (low, high) = encoding.grid.range();
            let (scale, zero) = (f64::from(*scale), f64::from(*zero));
            let (low, high) = (T::of((low - zero - 0.5) * scale), T::of((high - zero + 0.5) * scale));
            let outside = |x: T| x < low || x > high;
            match Self::passes(&call.inputs)? {
                None => grad = grad::map_two(&grad, x, |g, x| if outside(x) { T::zero() } else { g })?,
                Some(passes) => {
                    let cut =
                        grad.iter_mut().zip(x.iter()).enumerate().filter(|(i, (_, x))| outside(**x) && !passes(*i));
                    cut.for_each(|(_, (g, _))| *g = T::zero());
                }
            }
        }
        Ok(vec![Some(grad), None, by_step])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grad::{Slot, Tape, Value};

    fn run(x: &[f32], share: i64) -> (Vec<f32>, Vec<f32>) {
        let encoding = Encoding::per_tensor(crate::grid::find("uint8").unwrap(), 0.1, 128);
        let mut tape = Tape::default();
        let (input, drop): (Slot, Slot) = (tape.leaf(true), tape.leaf(false));
        let output = tape.push("q", Box::new(FakeQuant { encoding }), vec![Some(input), Some(drop)], 1)[0];
        let array = |values: &[f32]| Array::from_shape_vec(vec![values.len()], values.to_vec()).unwrap();
        let list = Array::from_shape_vec(vec![2], vec![share, 5]).unwrap();
        let leaves = [(input, Value::Real(array(x))), (drop, Value::Whole(list))];
        let values = tape.forward::<f32>(leaves).unwrap();
        let ones = array(&vec![1.0; x.len()]);
        let grads = tape.backward(&values, [(output, ones)], &[input]).unwrap();
        let flat = |array: &Array<f32>| array.iter().copied().collect();
        (flat(values.real(output).unwrap()), flat(grads[0].as_ref().unwrap()))
    }

    /// Codes 0 to 255 less 128, at 0.1: −12.8 to 12.7.
    #[test]
    fn gradients_pass_in_the_range_only() {
        let (values, grads) = run(&[0.04, 0.06, -12.8, 12.7, -13.0, 40.0], 0);
        let want = [0.0, 0.1, -12.8, 12.7, -12.8, 12.7];
        assert!(values.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-5), "{values:?}");
        assert_eq!(grads, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_share_stays_in_float() {
        let x: Vec<f32> = (0..1000_u16).map(|i| f32::from(i) * 0.01 + 0.003).collect();
        let (values, _) = run(&x, 500);
        let kept = values.iter().zip(&x).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
        assert!((400..600).contains(&kept), "{kept}");
        assert_eq!(run(&x, 1000).0, x);
    }

    /// Results, and the gradient of their sum by the logarithm of what the scale is multiplied with.
    fn by_step(x: &[f32], share: i64, step: f32) -> (Vec<f32>, f32) {
        let encoding = Encoding::per_tensor(crate::grid::find("uint8").unwrap(), 0.1, 128);
        let mut tape = Tape::default();
        let (input, drop, scale): (Slot, Slot, Slot) = (tape.leaf(false), tape.leaf(false), tape.leaf(true));
        let inputs = vec![Some(input), Some(drop), Some(scale)];
        let output = tape.push("q", Box::new(FakeQuant { encoding }), inputs, 1)[0];
        let array = |values: &[f32]| Array::from_shape_vec(vec![values.len()], values.to_vec()).unwrap();
        let list = Array::from_shape_vec(vec![2], vec![share, 5]).unwrap();
        let leaves = [(input, Value::Real(array(x))), (drop, Value::Whole(list)), (scale, Value::Real(array(&[step])))];
        let values = tape.forward::<f32>(leaves).unwrap();
        let ones = array(&vec![1.0; x.len()]);
        let grads = tape.backward(&values, [(output, ones)], &[scale]).unwrap();
        let rounded = values.real(output).unwrap().iter().copied().collect();
        (rounded, grads[0].as_ref().unwrap().iter().sum())
    }

    /// x̂ − x where a number is rounded, x̂ where it is cut, nothing where it passes as it is.
    #[test]
    fn a_step_is_moved_by_what_is_rounded_and_what_is_cut() {
        for step in [0.0_f32, 0.3, -0.4] {
            let (low, high) = (-12.8 * step.exp(), 12.7 * step.exp());
            let mut all = 0.0;
            let numbers = [0.04_f32, 0.57, -3.33, 40.0, -40.0];
            for x in numbers {
                let (rounded, got) = by_step(&[x], 0, step);
                let end = x.clamp(low, high);
                let inside = (x - end).abs() < 1e-6;
                let want = if inside { rounded[0] - x } else { rounded[0] };
                assert!((got - want).abs() < 1e-5, "{x} at {step}: {got} {want}");
                assert!(inside || (rounded[0] - end).abs() < 1e-4, "{x} at {step}: {rounded:?} {end}");
                assert!(by_step(&[x], 1000, step).1.abs() < 1e-9, "{x} at {step}");
                all += want;
            }
            let got = by_step(&numbers, 0, step).1;
            assert!((got - all).abs() < 1e-4, "at {step}: {got} {all}");
        }
    }
}
