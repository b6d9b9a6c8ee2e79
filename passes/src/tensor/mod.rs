//! Tensors: a shape, an element type, and a payload that is shared, never copied.
//!
//! The payload is packed little-endian bytes, as on the wire: for a weight, a slice of the mapped file, possibly
//! unaligned, read only when a solver wants it. Typed access borrows where the bytes happen to be aligned and copies
//! where not.

mod dtype;
mod element;

pub use dtype::DType;
pub use element::Element;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use half::{bf16, f16};
use rayon::prelude::*;

/// A dense, row-major tensor.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone, PartialEq)]
enum Data {
    Bytes(Bytes),
    Strings(Arc<[Bytes]>),
}

/// A payload that does not fit its shape.
#[derive(Debug, thiserror::Error)]
#[error("shape {shape:?} of `{dtype}` needs {wanted} bytes, got {found}")]
pub struct TensorError {
    shape: Vec<usize>,
    dtype: &'static str,
    wanted: String,
    found: usize,
}

/// The number of elements of `shape`, or `None` on overflow. Zeros do not excuse the rest: the product of the other
/// dimensions must fit too, so that every partial product does.
pub fn count(shape: &[usize]) -> Option<usize> {
    let rest = shape.iter().filter(|&&d| d != 0).try_fold(1_usize, |n, &d| n.checked_mul(d))?;
    Some(if shape.contains(&0) { 0 } else { rest })
}

impl Tensor {
    /// A tensor over packed little-endian `bytes`.
    ///
    /// # Errors
    /// [`TensorError`] when `bytes` does not have exactly the size that `shape` and `dtype` ask for.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Bytes) -> Result<Self, TensorError> {
        let wanted = count(&shape).and_then(|n| dtype.bytes_for(n));
        if dtype == DType::String || wanted != Some(bytes.len()) {
            let wanted = wanted.map_or_else(|| "too many".to_owned(), |n| n.to_string());
            return Err(TensorError { shape, dtype: dtype.name(), wanted, found: bytes.len() });
        }
        Ok(Self { dtype, shape, data: Data::Bytes(bytes) })
    }

    /// A tensor of strings.
    ///
    /// # Errors
    /// [`TensorError`] when the count of `strings` is not that of `shape`.
    pub fn strings(shape: Vec<usize>, strings: Vec<Bytes>) -> Result<Self, TensorError> {
        if count(&shape) != Some(strings.len()) {
            return Err(TensorError { shape, dtype: "string", wanted: "one entry each".into(), found: strings.len() });
        }
        Ok(Self { dtype: DType::String, shape, data: Data::Strings(strings.into()) })
    }

    /// A tensor that owns `values`.
    ///
    /// # Panics
    /// When the count of `values` is not that of `shape`: both come from the caller's own arithmetic.
    pub fn of<T: Element>(shape: impl Into<Vec<usize>>, values: Vec<T>) -> Self {
        let shape = shape.into();
        assert_eq!(count(&shape), Some(values.len()), "a bug in onnx-quant: values do not fill shape {shape:?}");
        Self { dtype: T::DTYPE, shape, data: Data::Bytes(element::into_bytes(values)) }
    }

    /// A rank-0 tensor.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::of([], vec![value])
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// The packed little-endian payload; empty for strings.
    pub fn bytes(&self) -> &Bytes {
        static NONE: Bytes = Bytes::new();
        match &self.data {
            Data::Bytes(bytes) => bytes,
            Data::Strings(_) => &NONE,
        }
    }

    /// The strings, where it is a tensor of strings.
    pub fn as_strings(&self) -> Option<&[Bytes]> {
        match &self.data {
            Data::Strings(strings) => Some(strings),
            Data::Bytes(_) => None,
        }
    }

    /// The values, if they are of type `T`: borrowed where the payload is aligned.
    pub fn values<T: Element>(&self) -> Option<Cow<'_, [T]>> {
        (self.dtype == T::DTYPE).then(|| element::from_bytes(self.bytes()))
    }

    /// The same values under another shape of the same count.
    ///
    /// # Errors
    /// [`TensorError`] when the counts differ.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Self, TensorError> {
        if count(&shape) != Some(self.len()) {
            let wanted = format!("{} elements", self.len());
            return Err(TensorError { found: count(&shape).unwrap_or(0), shape, dtype: self.dtype.name(), wanted });
        }
        Ok(Self { dtype: self.dtype, shape, data: self.data.clone() })
    }

    /// The transpose \[N, M\] of an f32 matrix \[M, N\]; `None` for anything else.
    pub fn transposed(&self) -> Option<Self> {
        /// Lines of so many columns stay in the cache.
        const STRIP: usize = 16;
        let [rows, columns] = *self.shape() else { return None };
        let values = self.values::<f32>()?;
        let mut turned = vec![0.0_f32; values.len()];
        turned.par_chunks_mut((STRIP * rows).max(1)).enumerate().for_each(|(strip, part)| {
            for (row, line) in values.chunks_exact(columns.max(1)).enumerate() {
                let from = &line[strip * STRIP..];
                part.iter_mut().skip(row).step_by(rows).zip(from).for_each(|(to, from)| *to = *from);
            }
        });
        Some(Self::of([columns, rows], turned))
    }

    /// Float values of any width as f32 (f64 is rounded); `None` for other types. Borrowed for aligned f32.
    pub fn floats(&self) -> Option<Cow<'_, [f32]>> {
        match self.dtype {
            DType::F32 => self.values::<f32>(),
            DType::F16 => Some(self.half_floats(|bits| f16::from_bits(bits).to_f32())),
            DType::Bf16 => Some(self.half_floats(|bits| bf16::from_bits(bits).to_f32())),
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is asked for")]
            DType::F64 => Some(self.values::<f64>()?.iter().map(|&v| v as f32).collect::<Vec<_>>().into()),
            _ => None,
        }
    }

    /// Integers and booleans as i64; `None` for other types and for u64 values over `i64::MAX`.
    pub fn integers(&self) -> Option<Vec<i64>> {
        fn widen<T: Element + Into<i64>>(tensor: &Tensor) -> Option<Vec<i64>> {
            Some(tensor.values::<T>()?.iter().map(|&v| v.into()).collect())
        }
        match self.dtype {
            DType::I64 => self.values::<i64>().map(Cow::into_owned),
            DType::I32 => widen::<i32>(self),
            DType::I16 => widen::<i16>(self),
            DType::I8 => widen::<i8>(self),
            DType::U32 => widen::<u32>(self),
            DType::U16 => widen::<u16>(self),
            DType::U8 => widen::<u8>(self),
            DType::U64 => self.values::<u64>()?.iter().map(|&v| i64::try_from(v).ok()).collect(),
            DType::Bool => Some(self.bytes().iter().map(|&b| i64::from(b != 0)).collect()),
            _ => None,
        }
    }

    /// The one element of an integer tensor, whatever its rank.
    pub fn single_integer(&self) -> Option<i64> {
        if self.len() != 1 {
            return None;
        }
        self.integers()?.first().copied()
    }

    /// The one element of a float tensor, whatever its rank.
    pub fn single_float(&self) -> Option<f32> {
        if self.len() != 1 {
            return None;
        }
        self.floats()?.first().copied()
    }

    /// A 32-bit FNV-1a hash of type, shape and payload, for text and reports.
    pub fn digest(&self) -> u32 {
        let mut hash = 0x811c_9dc5_u32;
        let mut eat = |byte: u8| hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        self.dtype.name().bytes().for_each(&mut eat);
        self.shape.iter().flat_map(|d| d.to_le_bytes()).for_each(&mut eat);
        match &self.data {
            Data::Bytes(bytes) => bytes.iter().copied().for_each(&mut eat),
            Data::Strings(strings) => strings.iter().flat_map(|s| s.iter().copied().chain([0])).for_each(&mut eat),
        }
        hash
    }

    fn half_floats(&self, widen: impl Fn(u16) -> f32) -> Cow<'_, [f32]> {
        self.bytes().chunks_exact(2).map(|b| widen(u16::from_le_bytes([b[0], b[1]]))).collect::<Vec<_>>().into()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} digest {:08x}", self.dtype.name(), self.shape, self.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_swaps_rows_and_columns_of_any_number() {
        for (rows, columns) in [(0, 0), (0, 3), (4, 0), (1, 1), (3, 2), (5, 40), (33, 17)] {
            let at = |i: usize, j: usize| (i * 100 + j) as f32;
            let values: Vec<f32> = (0..rows).flat_map(|i| (0..columns).map(move |j| at(i, j))).collect();
            let want: Vec<f32> = (0..columns).flat_map(|j| (0..rows).map(move |i| at(i, j))).collect();
            let turned = Tensor::of([rows, columns], values).transposed().unwrap();
            assert_eq!((turned.shape(), &*turned.values::<f32>().unwrap()), (&[columns, rows][..], &want[..]));
        }
        assert!(Tensor::of([2], vec![1.0_f32, 2.0]).transposed().is_none());
        assert!(Tensor::of([1, 2], vec![1_i64, 2]).transposed().is_none());
    }

    #[test]
    fn unaligned_payloads_read_the_same() {
        let aligned = Tensor::of([2], vec![1.5_f32, -2.0]);
        let mut shifted = vec![0_u8];
        shifted.extend_from_slice(aligned.bytes());
        let unaligned = Tensor::new(DType::F32, vec![2], Bytes::from(shifted).slice(1..)).unwrap();
        assert_eq!(unaligned.values::<f32>().unwrap(), aligned.values::<f32>().unwrap());
    }

    #[test]
    fn a_payload_must_fit_its_shape() {
        assert!(Tensor::new(DType::F32, vec![2], Bytes::from_static(&[0; 4])).is_err());
        assert!(Tensor::new(DType::F32, vec![usize::MAX, 2], Bytes::new()).is_err());
        assert!(Tensor::new(DType::F32, vec![0, usize::MAX, 2], Bytes::new()).is_err());
        assert!(Tensor::new(DType::I4, vec![3], Bytes::from_static(&[0xe1, 0x07])).is_ok());
    }

    #[test]
    fn halves_widen() {
        let tensor = Tensor::new(DType::F16, vec![1], Bytes::from_static(&[0x00, 0x3c])).unwrap();
        assert_eq!(tensor.floats().unwrap().as_ref(), [1.0]);
    }
}
