//! Tensors from the wire: slices of the mapped file wherever they can be.

use std::sync::Arc;

use bytes::Bytes;
use passes::tensor::{DType, Tensor};
use proto::onnx::{SparseTensorProto, TensorProto};
use proto::{DecodeError, Payload};

use super::ImportError;
use crate::load::ExternalFiles;

/// The most bytes that a sparse tensor may become.
const MAX_DENSIFIED: usize = 256 << 20;

/// The tensor `wire`; external payloads are read through `files`.
///
/// # Errors
/// [`ImportError`] when it contradicts itself or its data cannot be read.
pub fn tensor(wire: &TensorProto, files: &mut ExternalFiles) -> Result<Arc<Tensor>, ImportError> {
    let payload = proto::payload(wire)?;
    let shape = shape(wire.name(), &wire.dims)?;
    let problem = |problem: String| ImportError::Model(format!("tensor `{}`: {problem}", wire.name()));
    if wire.segment.is_some() {
        return Err(problem("it is stored in segments, which no reader supports".into()));
    }
    let dtype = DType::from_code(wire.data_type().into());
    let dtype = dtype.ok_or_else(|| problem(format!("unknown element type {}", wire.data_type())))?;
    let made = match payload {
        Payload::Bytes(bytes) => Tensor::new(dtype, shape, bytes),
        Payload::Strings(strings) => Tensor::strings(shape, strings.into_iter().map(Bytes::from).collect()),
        Payload::External(reference) => {
            let elements = proto::count_elements(wire.name(), &wire.dims)?;
            let wanted = proto::payload_bytes(wire.name(), elements, dtype.bits())?;
            Tensor::new(dtype, shape, files.read(wire.name(), &reference, wanted)?)
        }
    };
    made.map(Arc::new).map_err(|e| problem(e.to_string()))
}

fn shape(name: &str, dims: &[i64]) -> Result<Vec<usize>, ImportError> {
    proto::count_elements(name, dims)?;
    let narrow = |&d: &i64| usize::try_from(d).map_err(|_| ImportError::Model(format!("tensor `{name}` is too large")));
    dims.iter().map(narrow).collect()
}

/// The dense form of a sparse tensor.
///
/// # Errors
/// [`ImportError`] when indices are out of range or not ascending, or the dense form would be over 256 MiB.
pub(super) fn densified(wire: &SparseTensorProto, files: &mut ExternalFiles) -> Result<Arc<Tensor>, ImportError> {
    let (Some(values), Some(indices)) = (&wire.values, &wire.indices) else {
        return Err(ImportError::Model("a sparse tensor lacks values or indices".into()));
    };
    let problem = |problem: String| ImportError::Model(format!("sparse tensor `{}`: {problem}", values.name()));
    let dims = shape(values.name(), &wire.dims)?;
    let (values, indices) = (tensor(values, files)?, tensor(indices, files)?);
    let width = values.dtype().bits() as usize / 8;
    let elements = passes::tensor::count(&dims).ok_or_else(|| problem("its shape overflows".into()))?;
    let bytes = elements.checked_mul(width).filter(|&b| b <= MAX_DENSIFIED && width > 0);
    let mut dense = vec![0_u8; bytes.ok_or_else(|| problem("its dense form would be over 256 MiB".into()))?];
    let places =
        linear_indices(&indices, &dims, values.len()).ok_or_else(|| problem("its indices do not fit".into()))?;
    if places.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(problem("its indices are not ascending".into()));
    }
    for (place, value) in places.into_iter().zip(values.bytes().chunks_exact(width)) {
        dense[place * width..(place + 1) * width].copy_from_slice(value);
    }
    Tensor::new(values.dtype(), dims, dense.into())
        .map(Arc::new)
        .map_err(|e| ImportError::Decode(DecodeError::Tensor { tensor: String::new(), problem: e.to_string() }))
}

/// Row-major positions from linear indices `[nnz]` or coordinates `[nnz, rank]`.
fn linear_indices(indices: &Tensor, dims: &[usize], count: usize) -> Option<Vec<usize>> {
    let flat = indices.integers()?;
    let total: usize = dims.iter().product();
    let rank = dims.len();
    let places: Option<Vec<usize>> = match indices.shape() {
        [n] if *n == count => flat.iter().map(|&i| usize::try_from(i).ok()).collect(),
        [n, r] if *n == count && *r == rank && rank > 0 => flat
            .chunks_exact(rank)
            .map(|at| {
                at.iter().zip(dims).try_fold(0_usize, |place, (&i, &dim)| {
                    let i = usize::try_from(i).ok().filter(|&i| i < dim)?;
                    Some(place * dim + i)
                })
            })
            .collect(),
        _ => None,
    };
    places.filter(|places| places.iter().all(|&p| p < total))
}
