//! The external-data fields of a tensor: parsing, and the rules a location must keep.
//!
//! Only what can be decided without a file system is decided here. That the file exists, is regular and lies inside
//! the model's folder after symlinks are resolved is checked where it is opened.

use crate::error::DecodeError;
use crate::onnx::{StringStringEntryProto, TensorProto};

/// Where a tensor's bytes lie: `length` bytes (to the end of what the shape needs, where absent) from `offset` in the
/// file `location`, relative to the model's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRef {
    /// Relative POSIX path with only normal components.
    pub location: String,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes, where stated.
    pub length: Option<u64>,
}

impl ExternalRef {
    /// Reads the `external_data` entries of `tensor`.
    ///
    /// # Errors
    /// [`DecodeError::Tensor`] when `location` is missing, given twice, absolute, or has a component other than a plain
    /// name; when a number has a sign, blanks or overflows.
    pub fn parse(tensor: &TensorProto) -> Result<Self, DecodeError> {
        let name = tensor.name();
        let mut location = None;
        let mut offset = None;
        let mut length = None;
        for entry in &tensor.external_data {
            let slot_taken = match entry.key() {
                "location" => location.replace(entry.value().to_owned()).is_some(),
                "offset" => offset.replace(number(name, entry)?).is_some(),
                "length" => length.replace(number(name, entry)?).is_some(),
                _ => false, // `checksum` and unknown keys carry nothing that we need
            };
            if slot_taken {
                return Err(DecodeError::tensor(name, format!("external-data key `{}` is given twice", entry.key())));
            }
        }
        let location = location.ok_or_else(|| DecodeError::tensor(name, "external data without a `location`"))?;
        check_location(name, &location)?;
        Ok(Self { location, offset: offset.unwrap_or(0), length })
    }
}

fn number(tensor: &str, entry: &StringStringEntryProto) -> Result<u64, DecodeError> {
    let text = entry.value();
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| {
        DecodeError::tensor(tensor, format!("external-data `{}` is {text:?}, not a plain decimal number", entry.key()))
    })
}

fn check_location(tensor: &str, location: &str) -> Result<(), DecodeError> {
    let refuse = |why: &str| Err(DecodeError::tensor(tensor, format!("external-data location {location:?} {why}")));
    if location.is_empty() || location.bytes().any(|b| b == 0 || b == b'\\') {
        return refuse("is empty or has a NUL or backslash");
    }
    if location.starts_with('/') || location.as_bytes().get(1) == Some(&b':') {
        return refuse("is absolute; it must be relative to the model's folder");
    }
    if location.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("may only have plain names between its slashes");
    }
    Ok(())
}

/// The entries that describe `reference`, in the order the usual writers use.
pub fn external_entries(reference: &ExternalRef) -> Vec<StringStringEntryProto> {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    let mut entries =
        vec![entry("location", reference.location.clone()), entry("offset", reference.offset.to_string())];
    entries.extend(reference.length.map(|length| entry("length", length.to_string())));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(entries: &[(&str, &str)]) -> Result<ExternalRef, DecodeError> {
        let external_data = entries
            .iter()
            .map(|(k, v)| StringStringEntryProto { key: Some((*k).to_owned()), value: Some((*v).to_owned()) })
            .collect();
        ExternalRef::parse(&TensorProto { external_data, ..TensorProto::default() })
    }

    #[test]
    fn locations_that_could_escape_are_refused() {
        for bad in ["", ".", "../x", "a/../../x", "/abs", "C:\\x", "C:/x", "..\\x", "a//b", "a/./b", "x\0"] {
            assert!(parse(&[("location", bad)]).is_err(), "{bad:?} must be refused");
        }
        // Percent signs are ordinary characters: nobody decodes them.
        for good in ["w.bin", "sub/w.bin", "%2e%2e"] {
            assert!(parse(&[("location", good)]).is_ok(), "{good:?} must be taken");
        }
    }

    #[test]
    fn numbers_are_plain_decimals_given_once() {
        for bad in ["-1", "+5", " 5", "5 ", "", "0x10", "99999999999999999999"] {
            assert!(parse(&[("location", "w"), ("offset", bad)]).is_err(), "{bad:?} must be refused");
        }
        assert!(parse(&[("location", "w"), ("offset", "1"), ("offset", "1")]).is_err());
        assert!(parse(&[("offset", "1")]).is_err());
        let whole = parse(&[("location", "w"), ("offset", "4096"), ("length", "8"), ("checksum", "zz")]);
        assert_eq!(whole.ok(), Some(ExternalRef { location: "w".into(), offset: 4096, length: Some(8) }));
    }
}
