//! What has been learned so far, as bytes and back.

/// Takes down, one after the other, the numbers that steps change, or puts back those that were taken down: whoever has such numbers
/// shows them in an order that never changes, and one walk serves both ways.
///
/// Numbers are little-endian; lists begin with their length. What is put back may be anything: it is checked against what is there.
#[derive(Debug)]
pub(super) enum Ledger<'a> {
    /// Counts the bytes that taking down would make.
    Count(u64),
    /// Takes down.
    Write(Vec<u8>),
    /// Puts back; `None` once something did not fit.
    Read(Option<&'a [u8]>),
}

impl Ledger<'_> {
    /// A list whose length does not change.
    pub(super) fn floats(&mut self, numbers: &mut [f32]) {
        match self {
            Self::Count(bytes) => *bytes += 8 + 4 * numbers.len() as u64,
            Self::Write(out) => {
                out.extend((numbers.len() as u64).to_le_bytes());
                out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::Read(rest) => {
                if let Some((part, behind)) = rest.take().and_then(|rest| list(rest, 4, Some(numbers.len()))) {
                    let read = part.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                    numbers.iter_mut().zip(read).for_each(|(number, read)| *number = read);
                    *rest = Some(behind);
                }
            }
        }
    }

    /// A list of codes whose length does not change.
    pub(super) fn codes(&mut self, codes: &mut [i8]) {
        match self {
            Self::Count(bytes) => *bytes += 8 + codes.len() as u64,
            Self::Write(out) => {
                out.extend((codes.len() as u64).to_le_bytes());
                out.extend(codes.iter().map(|code| code.cast_unsigned()));
            }
            Self::Read(rest) => {
                if let Some((part, behind)) = rest.take().and_then(|rest| list(rest, 1, Some(codes.len()))) {
                    codes.iter_mut().zip(part).for_each(|(code, read)| *code = read.cast_signed());
                    *rest = Some(behind);
                }
            }
        }
    }

    /// One whole number.
    pub(super) fn whole(&mut self, number: &mut u64) {
        match self {
            Self::Count(bytes) => *bytes += 8,
            Self::Write(out) => out.extend(number.to_le_bytes()),
            Self::Read(rest) => {
                if let Some((read, behind)) = rest.take().and_then(<[u8]>::split_first_chunk::<8>) {
                    *number = u64::from_le_bytes(*read);
                    *rest = Some(behind);
                }
            }
        }
    }

    /// Bytes of any number.
    pub(super) fn bytes(&mut self, bytes: &mut Vec<u8>) {
        match self {
            Self::Count(sum) => *sum += 8 + bytes.len() as u64,
            Self::Write(out) => {
                out.extend((bytes.len() as u64).to_le_bytes());
                out.extend(bytes.iter());
            }
            Self::Read(rest) => {
                if let Some((part, behind)) = rest.take().and_then(|rest| list(rest, 1, None)) {
                    *bytes = part.to_vec();
                    *rest = Some(behind);
                }
            }
        }
    }
}

/// A list of things of `each` bytes at the start of `rest`, of as many as `wanted` where that is known, and what is behind it.
fn list(rest: &[u8], each: usize, wanted: Option<usize>) -> Option<(&[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    (wanted.unwrap_or(length) == length).then_some(())?;
    rest.split_at_checked(length.checked_mul(each)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(ledger: &mut Ledger<'_>, floats: &mut [f32], whole: &mut u64, bytes: &mut Vec<u8>) {
        ledger.floats(floats);
        ledger.whole(whole);
        ledger.bytes(bytes);
    }

    #[test]
    fn numbers_come_back_and_nonsense_is_told() {
        let (mut floats, mut whole, mut bytes) = ([1.5, f32::MIN_POSITIVE, -0.0], u64::MAX, vec![1, 2, 3]);
        let (mut out, mut count) = (Ledger::Write(Vec::new()), Ledger::Count(0));
        show(&mut count, &mut floats, &mut whole, &mut bytes);
        show(&mut out, &mut floats, &mut whole, &mut bytes);
        let Ledger::Write(written) = out else { panic!("{out:?}") };
        assert!(matches!(count, Ledger::Count(n) if n == written.len() as u64));
        let (mut again, mut number, mut list) = ([0.0; 3], 0, Vec::new());
        let mut back = Ledger::Read(Some(&written));
        show(&mut back, &mut again, &mut number, &mut list);
        assert!(matches!(back, Ledger::Read(Some(rest)) if rest.is_empty()), "{back:?}");
        assert_eq!((again.map(f32::to_bits), number, list), (floats.map(f32::to_bits), whole, bytes));
        for cut in 0..written.len() {
            let mut back = Ledger::Read(Some(&written[..cut]));
            show(&mut back, &mut [0.0; 3], &mut 0, &mut Vec::new());
            assert!(matches!(back, Ledger::Read(None)), "{cut}");
        }
        let mut back = Ledger::Read(Some(&written));
        back.floats(&mut [0.0; 4]);
        assert!(matches!(back, Ledger::Read(None)), "another length");
        Ledger::Read(Some(&[0xff; 64])).bytes(&mut Vec::new());
    }
}
