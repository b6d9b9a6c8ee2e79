//! Edits of a plan as bytes, for a [`crate::journal`].
//!
//! Numbers are little-endian; lists and names begin with their length. What is read may be anything: it is checked against what is there
//! before memory is asked for.

use std::sync::Arc;

use super::Edit;
use crate::encoding::{Encoding, Granularity};
use crate::grid;
use crate::id::{NodeId, Site, ValueId};
use crate::journal::Journal;
use crate::tensor::{DType, Tensor};

/// `edits` as bytes; `None` where one is of a kind that no plan is made of.
pub(crate) fn write(edits: &[Edit]) -> Option<Vec<u8>> {
    let mut out = Writer(Vec::new());
    out.size(edits.len());
    for edit in edits {
        match edit {
            Edit::Encode { site, encoding } => {
                out.0.push(0);
                out.site(*site);
                out.encoding(encoding);
            }
            Edit::Round { site, codes } => {
                out.0.push(1);
                out.site(*site);
                out.tensor(codes);
            }
            Edit::Substitute { site, tensor } => {
                out.0.push(2);
                out.site(*site);
                out.tensor(tensor);
            }
            _ => return None,
        }
    }
    Some(out.0)
}

/// The edits that `journal` keeps under `key`, where it does.
pub(crate) fn kept(journal: &dyn Journal, key: &str) -> Option<Vec<Edit>> {
    read(&journal.get(key)?)
}

/// Keeps `edits` in `journal` under `key`; those of kinds that no plan is made of are left out as a whole.
///
/// # Errors
/// What is wrong, in words, where they cannot be kept.
pub(crate) fn keep(journal: &dyn Journal, key: &str, edits: &[Edit]) -> Result<(), String> {
    let Some(bytes) = write(edits) else { return Ok(()) };
    journal.put(key, &bytes).map_err(|problem| format!("what was learned cannot be kept: {problem}"))
}

/// The edits that `bytes` stand for; `None` where they stand for none.
pub(crate) fn read(bytes: &[u8]) -> Option<Vec<Edit>> {
    let mut from = Reader(bytes);
    let count = from.size(2)?;
    let mut edits = Vec::with_capacity(count);
    for _ in 0..count {
        let kind = from.byte()?;
        let site = from.site()?;
        edits.push(match kind {
            0 => Edit::Encode { site, encoding: from.encoding()? },
            1 => Edit::Round { site, codes: Arc::new(from.tensor()?) },
            2 => Edit::Substitute { site, tensor: Arc::new(from.tensor()?) },
            _ => return None,
        });
    }
    from.0.is_empty().then_some(edits)
}

/// A digest of all that `plan` says about tensors: the same for equal plans, on every machine.
pub(crate) fn digest(plan: &super::Plan) -> u64 {
    let mut out = Writer(Vec::new());
    for (site, encoding) in plan.encodings() {
        out.site(site);
        out.encoding(encoding);
        out.0.extend(plan.codes(site).map_or(0, |codes| codes.digest()).to_le_bytes());
        // What is learned begins there.
        let leanings = plan.leanings(site).into_iter().flat_map(|leanings| leanings.iter());
        out.0.extend(leanings.map(|leaning| leaning.cast_unsigned()));
    }
    for (site, tensor) in plan.substitutes() {
        out.site(site);
        out.0.extend(tensor.digest().to_le_bytes());
    }
    // FNV-1a.
    out.0.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

struct Writer(Vec<u8>);

impl Writer {
    fn size(&mut self, n: usize) {
        self.0.extend((n as u64).to_le_bytes());
    }

    fn site(&mut self, site: Site) {
        let (kind, id, input) = match site {
            Site::Value(ValueId(id)) => (0, id, 0),
            Site::Use { node: NodeId(id), input } => (1, id, input),
        };
        self.0.push(kind);
        self.0.extend(id.to_le_bytes());
        self.0.extend(input.to_le_bytes());
    }

    fn encoding(&mut self, encoding: &Encoding) {
        let name = encoding.grid.info().about.name;
        self.size(name.len());
        self.0.extend(name.as_bytes());
        let (kind, axis, size) = match encoding.granularity {
            Granularity::Tensor => (0, 0, 0),
            Granularity::Axis(axis) => (1, axis, 0),
            Granularity::Block { axis, size } => (2, axis, size),
            Granularity::Dynamic => (3, 0, 0),
            Granularity::DynamicBlocks { axis, size } => (4, axis, size),
            Granularity::DynamicRows { axis, size } => (5, axis, size),
        };
        self.0.push(kind);
        self.size(axis);
        self.size(size);
        self.size(encoding.scale.len());
        self.0.extend(encoding.scale.iter().flat_map(|scale| scale.to_le_bytes()));
        self.size(encoding.zero_point.len());
        self.0.extend(encoding.zero_point.iter().flat_map(|zero| zero.to_le_bytes()));
    }

    fn tensor(&mut self, tensor: &Tensor) {
        self.0.extend(tensor.dtype().code().to_le_bytes());
        self.size(tensor.shape().len());
        tensor.shape().iter().for_each(|dim| self.size(*dim));
        self.size(tensor.bytes().len());
        self.0.extend(tensor.bytes().iter());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<usize> {
        usize::try_from(u64::from_le_bytes(self.take(8)?.try_into().ok()?)).ok()
    }

    /// A length of things of at least so many bytes each, of which there is room for as many.
    fn size(&mut self, each: usize) -> Option<usize> {
        let n = self.number()?;
        (n.checked_mul(each)? <= self.0.len()).then_some(n)
    }

    fn site(&mut self) -> Option<Site> {
        let kind = self.byte()?;
        let id = u32::from_le_bytes(self.take(4)?.try_into().ok()?);
        let input = u16::from_le_bytes(self.take(2)?.try_into().ok()?);
        match kind {
            0 => Some(Site::Value(ValueId(id))),
            1 => Some(Site::Use { node: NodeId(id), input }),
            _ => None,
        }
    }

    fn encoding(&mut self) -> Option<Encoding> {
        let n = self.size(1)?;
        let grid = grid::find(std::str::from_utf8(self.take(n)?).ok()?)?;
        let kind = self.byte()?;
        let (axis, size) = (self.number()?, self.number()?);
        let granularity = match kind {
            0 => Granularity::Tensor,
            1 => Granularity::Axis(axis),
            2 => Granularity::Block { axis, size },
            3 => Granularity::Dynamic,
            4 => Granularity::DynamicBlocks { axis, size },
            5 => Granularity::DynamicRows { axis, size },
            _ => return None,
        };
        let n = self.size(4)?;
        let scale = self.take(4 * n)?.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let n = self.size(4)?;
        let zero_point = self.take(4 * n)?.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        Some(Encoding { grid, granularity, scale, zero_point })
    }

    fn tensor(&mut self) -> Option<Tensor> {
        let dtype = DType::from_code(i32::from_le_bytes(self.take(4)?.try_into().ok()?).into())?;
        let rank = self.size(8)?;
        let shape = (0..rank).map(|_| self.number()).collect::<Option<Vec<usize>>>()?;
        let n = self.size(1)?;
        Tensor::new(dtype, shape, self.take(n)?.to_vec().into()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_come_back_and_nonsense_does_not() {
        let encoding = Encoding::per_axis(grid::find("int4").unwrap(), 1, vec![0.5, 0.25]);
        let codes = Arc::new(encoding.encode(&[1.0, -0.5, 0.25, 0.75], &[2, 2]).unwrap());
        let site = Site::Use { node: NodeId(7), input: 1 };
        let tensor = Arc::new(Tensor::of([2], vec![1.5_f32, f32::MIN_POSITIVE]));
        let edits = [
            Edit::Encode { site, encoding },
            Edit::Round { site, codes },
            Edit::Substitute { site: Site::Value(ValueId(3)), tensor },
        ];
        let bytes = write(&edits).unwrap();
        let again = read(&bytes).unwrap();
        assert_eq!(format!("{again:?}"), format!("{edits:?}"));
        assert_eq!(write(&again).unwrap(), bytes);
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut]).is_none(), "{cut}");
        }
        assert!(read(&[0xff; 64]).is_none(), "no memory is asked for what is not there");
        assert!(write(&[Edit::Erase(NodeId(0))]).is_none());
    }
}
