//! What can be wrong with bytes that claim to be a model.

/// Why a message or a tensor payload was refused. Messages name the tensor or field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes are not the protobuf message they should be: truncated, malformed or nested too deep.
    #[error("not a readable ONNX protobuf: {0}")]
    Wire(#[from] prost::DecodeError),
    /// A protobuf message cannot be larger than 2 GiB.
    #[error("the message has {bytes} bytes; protobuf stops at {limit}: larger models keep weights in external data")]
    TooLarge {
        /// Size of the buffer.
        bytes: usize,
        /// The limit that it exceeds.
        limit: usize,
    },
    /// A tensor that contradicts itself: its shape, type and payload do not fit together.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// The tensor's name; empty for unnamed attribute payloads.
        tensor: String,
        /// What is wrong, with both sides of the mismatch.
        problem: String,
    },
}

impl DecodeError {
    pub(crate) fn tensor(name: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { tensor: name.to_owned(), problem: problem.into() }
    }
}
