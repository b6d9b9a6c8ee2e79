//! Sizes checked before anything is allocated for them.

use crate::error::DecodeError;

/// The most bytes one serialized protobuf message may have (2 GiB − 1).
pub const MAX_MESSAGE_BYTES: usize = i32::MAX as usize;

/// The highest tensor rank accepted; real models stay below 10.
pub const MAX_RANK: usize = 64;

pub(crate) fn check_message_size(bytes: usize) -> Result<(), DecodeError> {
    if bytes > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLarge { bytes, limit: MAX_MESSAGE_BYTES });
    }
    Ok(())
}

/// The number of elements of a tensor with dimensions `dims`, every one checked.
///
/// # Errors
/// [`DecodeError::Tensor`] for a negative dimension, a rank over [`MAX_RANK`], or a product over `u64`.
pub fn count_elements(name: &str, dims: &[i64]) -> Result<u64, DecodeError> {
    if dims.len() > MAX_RANK {
        return Err(DecodeError::tensor(name, format!("rank {} is over the limit of {MAX_RANK}", dims.len())));
    }
    // A zero anywhere makes the tensor empty, but the product of the other dimensions must still be sane.
    let mut count: u64 = 1;
    let mut empty = false;
    for (axis, &dim) in dims.iter().enumerate() {
        let dim = u64::try_from(dim)
            .map_err(|_| DecodeError::tensor(name, format!("dimension {axis} is negative ({dim})")))?;
        empty |= dim == 0;
        count = count
            .checked_mul(dim.max(1))
            .ok_or_else(|| DecodeError::tensor(name, format!("the product of dimensions {dims:?} overflows")))?;
    }
    Ok(if empty { 0 } else { count })
}

/// The bytes that `elements` values of `bits` bits take when packed densely, rounded up to whole bytes.
///
/// # Errors
/// [`DecodeError::Tensor`] when the size does not fit this machine's address space.
pub fn payload_bytes(name: &str, elements: u64, bits: u32) -> Result<usize, DecodeError> {
    elements
        .checked_mul(u64::from(bits))
        .map(|bits| bits.div_ceil(8))
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or_else(|| DecodeError::tensor(name, format!("{elements} elements of {bits} bits overflow")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_lie_are_refused() {
        assert!(count_elements("w", &[-1]).is_err());
        assert!(count_elements("w", &[i64::MAX, 3]).is_err());
        assert!(count_elements("w", &[1; 65]).is_err());
        assert_eq!(count_elements("w", &[0, 7]).ok(), Some(0));
        assert!(count_elements("w", &[0, i64::MAX, i64::MAX]).is_err());
        assert!(payload_bytes("w", u64::MAX, 32).is_err());
        assert_eq!(payload_bytes("w", 3, 4).ok(), Some(2));
    }
}
