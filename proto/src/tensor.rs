//! A tensor's payload, whichever of the wire's eight fields it lies in.

use bytes::Bytes;

use crate::error::DecodeError;
use crate::external::ExternalRef;
use crate::limits::{count_elements, payload_bytes};
use crate::onnx::TensorProto;
use crate::onnx::tensor_proto::{DataLocation, DataType};

/// The values of a tensor, as they lie.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// Little-endian, row-major, densely packed (sub-byte values low bits first); a slice of the decoded buffer where the
    /// wire had `raw_data`.
    Bytes(Bytes),
    /// One byte string per element.
    Strings(Vec<Vec<u8>>),
    /// In another file.
    External(ExternalRef),
}

/// Bits of one element of ONNX element type `code`; `None` for strings and for codes that the schema does not know.
pub fn element_bits(code: i32) -> Option<u32> {
    Some(match DataType::try_from(code).ok()? {
        DataType::Undefined | DataType::String => return None,
        DataType::Uint2 | DataType::Int2 => 2,
        DataType::Uint4 | DataType::Int4 | DataType::Float4e2m1 => 4,
        DataType::Float6e2m3 | DataType::Float6e3m2 => 6,
        DataType::Uint8
        | DataType::Int8
        | DataType::Bool
        | DataType::Float8e4m3fn
        | DataType::Float8e4m3fnuz
        | DataType::Float8e5m2
        | DataType::Float8e5m2fnuz
        | DataType::Float8e8m0 => 8,
        DataType::Uint16 | DataType::Int16 | DataType::Float16 | DataType::Bfloat16 => 16,
        DataType::Float | DataType::Int32 | DataType::Uint32 => 32,
        DataType::Int64 | DataType::Double | DataType::Uint64 | DataType::Complex64 => 64,
        DataType::Complex128 => 128,
    })
}

/// The payload of `tensor`, checked against its shape and element type.
///
/// # Errors
/// [`DecodeError::Tensor`] when the element type is unknown, a dimension is impossible, two payload fields are filled,
/// or the payload does not have the bytes that the shape asks for.
pub fn payload(tensor: &TensorProto) -> Result<Payload, DecodeError> {
    let name = tensor.name();
    let elements = count_elements(name, &tensor.dims)?;
    let filled = filled_fields(tensor);
    if filled.len() > 1 {
        return Err(DecodeError::tensor(name, format!("has two payloads: {}", filled.join(" and "))));
    }
    if tensor.data_location() == DataLocation::External {
        if let Some(field) = filled.first() {
            return Err(DecodeError::tensor(name, format!("is external but also has `{field}`")));
        }
        return ExternalRef::parse(tensor).map(Payload::External);
    }
    if tensor.data_type() == DataType::String as i32 {
        if tensor.raw_data.as_ref().is_some_and(|raw| !raw.is_empty()) {
            return Err(DecodeError::tensor(name, "strings cannot lie in `raw_data`"));
        }
        expect_count(name, "string_data", tensor.string_data.len(), elements)?;
        return Ok(Payload::Strings(tensor.string_data.clone()));
    }
    let bits = element_bits(tensor.data_type())
        .ok_or_else(|| DecodeError::tensor(name, format!("unknown element type {}", tensor.data_type())))?;
    let wanted = payload_bytes(name, elements, bits)?;
    let bytes = match &tensor.raw_data {
        Some(raw) if filled.is_empty() || filled == ["raw_data"] => raw.clone(),
        _ => typed(tensor, elements, bits)?,
    };
    if bytes.len() != wanted {
        return Err(DecodeError::tensor(
            name,
            format!("has {} payload bytes where shape {:?} needs {wanted}", bytes.len(), tensor.dims),
        ));
    }
    Ok(Payload::Bytes(bytes))
}

fn filled_fields(tensor: &TensorProto) -> Vec<&'static str> {
    let all = [
        ("raw_data", tensor.raw_data.as_ref().is_some_and(|raw| !raw.is_empty())),
        ("float_data", !tensor.float_data.is_empty()),
        ("int32_data", !tensor.int32_data.is_empty()),
        ("int64_data", !tensor.int64_data.is_empty()),
        ("double_data", !tensor.double_data.is_empty()),
        ("uint64_data", !tensor.uint64_data.is_empty()),
        ("string_data", !tensor.string_data.is_empty()),
    ];
    all.into_iter().filter(|(_, filled)| *filled).map(|(name, _)| name).collect()
}

fn expect_count(name: &str, field: &str, found: usize, wanted: u64) -> Result<(), DecodeError> {
    if found as u64 == wanted {
        return Ok(());
    }
    Err(DecodeError::tensor(name, format!("`{field}` has {found} entries where the shape needs {wanted}")))
}

/// Brings a typed field to the packed little-endian form.
fn typed(tensor: &TensorProto, elements: u64, bits: u32) -> Result<Bytes, DecodeError> {
    let name = tensor.name();
    let data_type = DataType::try_from(tensor.data_type()).unwrap_or(DataType::Undefined);
    let mut out = Vec::new();
    match data_type {
        DataType::Float | DataType::Complex64 => {
            expect_count(name, "float_data", tensor.float_data.len(), elements * u64::from(bits) / 32)?;
            out.extend(tensor.float_data.iter().flat_map(|v| v.to_le_bytes()));
        }
        DataType::Double | DataType::Complex128 => {
            expect_count(name, "double_data", tensor.double_data.len(), elements * u64::from(bits) / 64)?;
            out.extend(tensor.double_data.iter().flat_map(|v| v.to_le_bytes()));
        }
        DataType::Int64 => {
            expect_count(name, "int64_data", tensor.int64_data.len(), elements)?;
            out.extend(tensor.int64_data.iter().flat_map(|v| v.to_le_bytes()));
        }
        DataType::Uint64 => {
            expect_count(name, "uint64_data", tensor.uint64_data.len(), elements)?;
            out.extend(tensor.uint64_data.iter().flat_map(|v| v.to_le_bytes()));
        }
        DataType::Uint32 => {
            expect_count(name, "uint64_data", tensor.uint64_data.len(), elements)?;
            for &value in &tensor.uint64_data {
                let value = u32::try_from(value)
                    .map_err(|_| DecodeError::tensor(name, format!("{value} does not fit uint32")))?;
                out.extend(value.to_le_bytes());
            }
        }
        _ => {
            // Everything else lies in `int32_data`: one entry per element, or per byte for packed types.
            let per_entry = bits.max(8);
            let entries = payload_bytes(name, elements, bits)? as u64 / u64::from(per_entry / 8);
            expect_count(name, "int32_data", tensor.int32_data.len(), entries)?;
            let bytes = per_entry as usize / 8;
            out.extend(tensor.int32_data.iter().flat_map(|v| v.to_le_bytes().into_iter().take(bytes)));
        }
    }
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(data_type: DataType, dims: &[i64]) -> TensorProto {
        TensorProto { data_type: Some(data_type as i32), dims: dims.to_vec(), ..TensorProto::default() }
    }

    #[test]
    fn typed_fields_become_packed_bytes() {
        let mut half = tensor(DataType::Float16, &[2]);
        half.int32_data = vec![0x3c00, 0xbc00];
        assert_eq!(payload(&half).ok(), Some(Payload::Bytes(Bytes::from_static(&[0, 0x3c, 0, 0xbc]))));
        // int4 1, -2, 7: low nibble first, the odd one padded with zero.
        let mut int4 = tensor(DataType::Int4, &[3]);
        int4.int32_data = vec![0xe1, 0x07];
        assert_eq!(payload(&int4).ok(), Some(Payload::Bytes(Bytes::from_static(&[0xe1, 0x07]))));
    }

    #[test]
    fn contradictions_are_refused() {
        let mut both = tensor(DataType::Float, &[1]);
        both.float_data = vec![1.0];
        both.raw_data = Some(Bytes::from_static(&[0; 4]));
        assert!(payload(&both).is_err());
        let mut short = tensor(DataType::Float, &[1 << 40]);
        short.raw_data = Some(Bytes::from_static(&[0; 4]));
        assert!(payload(&short).is_err());
        assert!(payload(&tensor(DataType::Float, &[2])).is_err(), "no payload at all");
        assert!(payload(&tensor(DataType::Float, &[0])).is_ok(), "an empty tensor needs none");
        assert!(payload(&TensorProto { data_type: Some(99), ..TensorProto::default() }).is_err());
    }
}
