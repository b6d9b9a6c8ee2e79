//! The Rust types that tensors can be read and made as.
//!
//! Payloads are little-endian, and so are the machines we run on: a big-endian build is refused here.

use std::borrow::Cow;

use bytemuck::Pod;
use bytes::Bytes;

use super::DType;

/// A Rust type with an element type of its own.
pub trait Element: Pod + Send + Sync + PartialEq + std::fmt::Debug {
    /// That element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}

elements! {
    f32 => F32, f64 => F64, i8 => I8, u8 => U8, i16 => I16, u16 => U16, i32 => I32, u32 => U32, i64 => I64, u64 => U64,
}

/// Keeps a typed vector alive behind its bytes, so that no copy is made.
struct Owner<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(target_endian = "little")]
pub(super) fn into_bytes<T: Element>(values: Vec<T>) -> Bytes {
    Bytes::from_owner(Owner(values))
}

#[cfg(target_endian = "little")]
pub(super) fn from_bytes<T: Element>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(values) => Cow::Borrowed(values),
        Err(_) => Cow::Owned(bytemuck::allocation::pod_collect_to_vec(bytes)),
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("payloads are little-endian: a big-endian build needs byte swaps in `into_bytes` and `from_bytes`");
