//! The wire form of ONNX models: `decode`, `encode`, and the generated messages.
//!
//! The messages are prost's, generated from the pinned public `onnx.proto` and checked in, so that no protoc is
//! needed. Tensor payloads (`TensorProto.raw_data`) are [`bytes::Bytes`] slices of the buffer handed to [`decode`]:
//! when that buffer is a memory map, no weight is copied. The schema is proto2, so field presence survives, and a
//! model written by the usual exporters re-encodes to the same bytes.
//!
//! This crate knows messages, sizes and the external-data fields; it does not know graphs, what a tensor means, or
//! the file system. Fields newer than the pinned schema are dropped by prost: [`is_newer_than_schema`] tells, so that
//! the caller can warn.

mod error;
mod external;
mod limits;
mod stream;
mod tensor;

/// The generated messages, one type per message of `onnx.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    rustdoc::all,
    reason = "generated code"
)]
pub mod onnx {
    include!("gen/onnx.rs");
}

pub use error::DecodeError;
pub use external::{ExternalRef, external_entries};
pub use limits::{MAX_MESSAGE_BYTES, MAX_RANK, count_elements, payload_bytes};
pub use stream::encode_to;
pub use tensor::{Payload, element_bits, payload};

use bytes::Bytes;
use prost::Message as _;

/// The newest IR version that the pinned schema describes.
pub const SCHEMA_IR_VERSION: i64 = 14;

/// Decodes a `ModelProto`. Payloads are slices of `bytes`; nothing is interpreted beyond the wire format.
///
/// # Errors
/// [`DecodeError::Wire`] when the bytes are no protobuf message, are truncated, or nest deeper than the decoder's
/// limit of 100 messages; [`DecodeError::TooLarge`] past 2 GiB, which protobuf cannot frame.
pub fn decode(bytes: Bytes) -> Result<onnx::ModelProto, DecodeError> {
    limits::check_message_size(bytes.len())?;
    Ok(onnx::ModelProto::decode(bytes)?)
}

/// Decodes a single `TensorProto`, the layout of ONNX test-data `.pb` files.
///
/// # Errors
/// As for [`decode`].
pub fn decode_tensor(bytes: Bytes) -> Result<onnx::TensorProto, DecodeError> {
    limits::check_message_size(bytes.len())?;
    Ok(onnx::TensorProto::decode(bytes)?)
}

/// Encodes a message to bytes in one allocation. For models with large payloads prefer [`encode_to`].
pub fn encode<M: prost::Message>(message: &M) -> Vec<u8> {
    message.encode_to_vec()
}

/// Decodes one of the generated messages, for the small pieces that callers carry around opaquely.
///
/// # Errors
/// As for [`decode`].
pub fn decode_message<M: prost::Message + Default>(bytes: Bytes) -> Result<M, DecodeError> {
    limits::check_message_size(bytes.len())?;
    Ok(M::decode(bytes)?)
}

/// Whether `model` says that it was written for a newer IR than the schema here, so that fields may have been dropped.
pub fn is_newer_than_schema(model: &onnx::ModelProto) -> bool {
    model.ir_version.unwrap_or(0) > SCHEMA_IR_VERSION
}
