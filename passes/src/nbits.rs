//! `com.microsoft::MatMulNBits`: a matrix product whose weight is packed in blocks of 2, 4 or 8 bits.
//!
//! Source: ONNX Runtime's ContribOperators.md, and its CPU kernel, against which the layout was checked. For a weight \[K, N\] in blocks
//! of S inputs: codes u8 \[N, ⌈K/S⌉, S·bits/8\], the first input in the lowest bits; scales \[N, ⌈K/S⌉\]; zero points u8
//! \[N, ⌈⌈K/S⌉·bits/8⌉\] packed alike, 2^(bits−1) where there are none.

use rayon::prelude::*;

use crate::encoding::{Encoding, Granularity};
use crate::grid::{self, Grid};
use crate::id::{NodeId, Site};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::Plan;
use crate::tensor::{DType, Tensor};

/// The domain, and the version that is imported.
pub(crate) const DOMAIN: (&str, u32) = ("com.microsoft", 1);
/// The operator.
pub(crate) const OP: &str = "MatMulNBits";

/// The extents of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Layout {
    /// Inputs.
    pub(crate) k: usize,
    /// Outputs.
    pub(crate) n: usize,
    /// Inputs that share a scale.
    pub(crate) block: usize,
    /// Bits of a code.
    pub(crate) bits: usize,
}

impl Layout {
    /// Whether the operator takes it: 2, 4 or 8 bits, blocks of a power of two from 16 to 256, and sizes that are no lies.
    pub(crate) fn is_sound(self) -> bool {
        let shaped = matches!(self.bits, 2 | 4 | 8)
            && (16..=256).contains(&self.block)
            && self.block.is_power_of_two()
            && self.k > 0
            && self.n > 0;
        let padded = || self.blocks().checked_mul(self.block)?.checked_mul(self.n);
        shaped && padded().is_some_and(|elements| elements < usize::MAX / 8)
    }

    /// Blocks per output.
    pub(crate) fn blocks(self) -> usize {
        self.k.div_ceil(self.block)
    }

    /// Bytes of the codes of one output.
    pub(crate) fn row_bytes(self) -> usize {
        self.blocks() * self.block * self.bits / 8
    }

    /// Bytes of the zero points of one output.
    pub(crate) fn zero_bytes(self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }
}

/// A weight as the operator wants it.
pub(crate) struct Packed {
    pub(crate) layout: Layout,
    pub(crate) codes: Tensor,
    pub(crate) scales: Tensor,
    pub(crate) zero_points: Option<Tensor>,
}

/// The weight of the matrix product `id` packed, where it is integers in blocks along the inputs that nobody else reads, and the
/// activation is float.
pub(crate) fn pack(graph: &Graph, users: &Users, plan: &Plan, id: NodeId, node: &Node) -> Option<Packed> {
    if !node.op.is("MatMul") || plan.encoding_of_use(graph, id, 0).is_some() {
        return None;
    }
    users.only_input(node.input(1)?)?;
    let site = Site::Use { node: id, input: 1 };
    let (encoding, codes) = (plan.encoding(site)?, plan.codes(site)?);
    let Granularity::Block { axis: 0, size } = encoding.granularity else { return None };
    let [k, n] = *codes.shape() else { return None };
    let info = encoding.grid.info();
    let bits = width(info.bits)?;
    // What is one block whole may be padded to one of a size that the operator has.
    let block = if size >= k { k.next_power_of_two().max(16) } else { size };
    let layout = Layout { k, n, block, bits };
    (info.holds_integers() && layout.is_sound()).then(|| packed(layout, encoding, codes))
}

/// The bits in which the operators hold codes of so many; signs are two of the integers of 2 bits.
pub(crate) fn width(bits: u32) -> Option<usize> {
    match bits {
        1 | 2 => Some(2),
        3 | 4 => Some(4),
        5..=8 => Some(8),
        _ => None,
    }
}

/// The integers of so many bits that packed codes are read as: unsigned where they have zero points, signed where they have not.
pub(crate) fn grid_of(zero_points: bool, bits: usize) -> Option<&'static dyn Grid> {
    let sign = if zero_points { "uint" } else { "int" };
    grid::find(&format!("{sign}{bits}{}", if bits == 2 { "-in-4" } else { "" }))
}

/// What is added to a signed point to make it a code of the operator, whose own zero point that is.
pub(crate) fn offset_of(signed: bool, bits: usize) -> i32 {
    if signed { 1 << (bits - 1) } else { 0 }
}

fn packed(layout: Layout, encoding: &Encoding, codes: &Tensor) -> Packed {
    let Layout { k, n, block, bits } = layout;
    let signed = encoding.grid.range().0 < 0.0;
    let offset = offset_of(signed, bits);
    let stored = codes.dtype().bits() as usize;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "codes of up to 8 bits")]
    let table: Vec<u8> =
        (0..1_u32 << stored).map(|code| (encoding.grid.decode(code) as i32 + offset) as u8 & mask(bits)).collect();
    let zero_of = |column: usize, at: usize| encoding.zero_point[at * n + column] + offset;
    let mut bytes = vec![0_u8; n * layout.row_bytes()];
    let mut zeros = vec![0_u8; n * layout.zero_bytes()];
    let per_byte = 8 / bits;
    bytes.par_chunks_mut(STRIP * layout.row_bytes()).enumerate().for_each(|(strip, rows)| {
        let columns = strip * STRIP..n.min((strip + 1) * STRIP);
        let mut line = [0_u8; STRIP];
        for input in 0..k {
            let line = &mut line[..columns.len()];
            expand(codes.bytes(), input * n + columns.start, stored, line);
            let (place, shift) = (input / per_byte, input % per_byte * bits);
            for (byte, code) in rows.iter_mut().skip(place).step_by(layout.row_bytes()).zip(line) {
                *byte |= table[usize::from(*code)] << shift;
            }
        }
        // Beyond the last input the code of zero.
        for (row, column) in rows.chunks_exact_mut(layout.row_bytes()).zip(columns) {
            (k..layout.blocks() * block)
                .for_each(|input| put(row, input, bits, narrow(zero_of(column, input / block))));
        }
    });
    for (column, row) in zeros.chunks_exact_mut(layout.zero_bytes()).enumerate() {
        (0..layout.blocks()).for_each(|at| put(row, at, bits, narrow(zero_of(column, at))));
    }
    let places = (0..n).flat_map(|column| (0..layout.blocks()).map(move |at| at * n + column));
    let scales: Vec<f32> = places.map(|place| encoding.scale[place]).collect();
    let usual = signed && encoding.is_symmetric();
    Packed {
        layout,
        codes: Tensor::of([n, layout.blocks(), block * bits / 8], bytes),
        scales: Tensor::of([n, layout.blocks()], scales),
        zero_points: (!usual).then(|| Tensor::of([n, layout.zero_bytes()], zeros)),
    }
}

/// So many rows or columns are worked on at a time: their lines fit the nearest cache.
const STRIP: usize = 64;

pub(crate) fn mask(bits: usize) -> u8 {
    u8::MAX >> (8 - bits)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "codes of up to 8 bits")]
pub(crate) fn narrow(code: i32) -> u8 {
    code as u8
}

pub(crate) fn put(row: &mut [u8], index: usize, bits: usize, code: u8) {
    row[index * bits / 8] |= code << (index * bits % 8);
}

pub(crate) fn get(row: &[u8], index: usize, bits: usize) -> u8 {
    (row[index * bits / 8] >> (index * bits % 8)) & mask(bits)
}

/// The codes of so many `bits` from `first` on, one per element of `into`.
fn expand(bytes: &[u8], first: usize, bits: usize, into: &mut [u8]) {
    match bits {
        8 => into.copy_from_slice(&bytes[first..first + into.len()]),
        4 if first.is_multiple_of(2) => {
            let last = into.len() / 2;
            let bytes = &bytes[first / 2..(first + into.len()).div_ceil(2)];
            let mut pairs = into.chunks_exact_mut(2);
            for (pair, byte) in pairs.by_ref().zip(bytes) {
                pair[0] = byte & 15;
                pair[1] = byte >> 4;
            }
            pairs.into_remainder().iter_mut().for_each(|code| *code = bytes[last] & 15);
        }
        _ => into.iter_mut().enumerate().for_each(|(at, code)| *code = get(bytes, first + at, bits)),
    }
}

/// The encoding and the codes \[K, N\] of a packed weight; `None` where sizes or types do not fit.
pub(crate) fn unpacked(
    layout: Layout,
    codes: &Tensor,
    scales: &Tensor,
    zero_points: Option<&Tensor>,
) -> Option<(Encoding, Tensor)> {
    let Layout { k, n, block, bits } = layout;
    let (bytes, scales) = (codes.values::<u8>()?, scales.values::<f32>()?);
    let zeros = match zero_points {
        Some(zeros) => Some(zeros.values::<u8>()?),
        None => None,
    };
    let fits = bytes.len() == n.checked_mul(layout.row_bytes())?
        && scales.len() == n.checked_mul(layout.blocks())?
        && zeros.as_ref().is_none_or(|zeros| zeros.len() == n * layout.zero_bytes());
    if !fits || scales.iter().any(|s| !s.is_finite() || *s == 0.0) {
        return None;
    }
    let grid = grid_of(zeros.is_some(), bits)?;
    let zero_of = |column: usize, at: usize| {
        zeros.as_ref().map_or(0, |zeros| i32::from(get(&zeros[column * layout.zero_bytes()..], at, bits)))
    };
    let groups = || (0..layout.blocks()).flat_map(|at| (0..n).map(move |column| (at, column)));
    let zero_point: Vec<i32> = groups().map(|(at, column)| zero_of(column, at)).collect();
    let scale: Vec<f32> = groups().map(|(at, column)| scales[column * layout.blocks() + at]).collect();
    let codes = unpacked_codes(layout, &bytes, grid.info().storage, zeros.is_none())?;
    let granularity = Granularity::Block { axis: 0, size: block.min(k) };
    Some((Encoding { grid, granularity, scale: scale.into(), zero_point: zero_point.into() }, codes))
}

/// Codes \[K, N\] in `storage`, of rows \[N, …\] of codes of the operator.
fn unpacked_codes(layout: Layout, bytes: &[u8], storage: DType, signed: bool) -> Option<Tensor> {
    let Layout { k, n, bits, .. } = layout;
    let stored = storage.bits() as usize;
    let offset = offset_of(signed, bits);
    let table: Vec<u8> = (0..=mask(bits)).map(|code| narrow(i32::from(code) - offset) & mask(stored)).collect();
    let mut codes = vec![0_u8; (k.checked_mul(n)?.checked_mul(stored)?).div_ceil(8)];
    // A strip of inputs has whole bytes; so have lines of as many columns as fill them.
    let (per_byte, whole) = (8 / stored, n.is_multiple_of(8 / stored));
    codes.par_chunks_mut(STRIP * n * stored / 8).enumerate().for_each(|(strip, part)| {
        let inputs = strip * STRIP..k.min((strip + 1) * STRIP);
        let mut line = [0_u8; STRIP];
        for (column, row) in bytes.chunks_exact(layout.row_bytes()).enumerate() {
            let line = &mut line[..inputs.len()];
            expand(row, inputs.start, bits, line);
            if whole {
                let (place, shift) = (column / per_byte, column % per_byte * stored);
                for (byte, code) in part.iter_mut().skip(place).step_by(n / per_byte).zip(line) {
                    *byte |= table[usize::from(*code)] << shift;
                }
            } else {
                let put_one = |(at, code): (usize, &u8)| put(part, at * n + column, stored, table[usize::from(*code)]);
                line.iter().enumerate().for_each(put_one);
            }
        }
    });
    Tensor::new(storage, vec![k, n], codes.into()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks() {
        // 40 inputs leave a ragged tail of 8; 3 outputs.
        let values: Vec<f32> = (0..120).map(|i| ((i * 37) % 29) as f32 / 14.0 - 1.0).collect();
        for (name, zero) in
            [("int4", 0), ("uint4", 7), ("int8", 0), ("uint8", 131), ("int2-in-4", 0), ("uint2-in-4", 1)]
        {
            let grid = grid::find(name).unwrap();
            let encoding = Encoding {
                grid,
                granularity: Granularity::Block { axis: 0, size: 16 },
                scale: (0..9).map(|i| if i == 4 { -0.2 } else { 0.1 + i as f32 / 100.0 }).collect(),
                zero_point: vec![zero; 9].into(),
            };
            let codes = encoding.encode(&values, &[40, 3]).unwrap();
            let bits = grid.info().bits as usize;
            let packed = packed(Layout { k: 40, n: 3, block: 16, bits }, &encoding, &codes);
            assert_eq!(packed.codes.shape(), [3, 3, 2 * bits]);
            let back = unpacked(packed.layout, &packed.codes, &packed.scales, packed.zero_points.as_ref()).unwrap();
            assert_eq!(back, (encoding, codes), "{name}");
        }
    }

    /// Signs come back as the integers of 2 bits that they are, and what pads them is 0.
    #[test]
    fn signs_are_packed_in_two_bits() {
        let values: Vec<f32> = (0..120).map(|i| ((i * 37) % 29) as f32 / 14.0 - 1.0).collect();
        let encoding = Encoding {
            grid: grid::find("bipolar").unwrap(),
            granularity: Granularity::Block { axis: 0, size: 16 },
            scale: (0..9).map(|i| 0.1 + i as f32 / 100.0).collect(),
            zero_point: vec![0; 9].into(),
        };
        let codes = encoding.encode(&values, &[40, 3]).unwrap();
        let packed = packed(Layout { k: 40, n: 3, block: 16, bits: 2 }, &encoding, &codes);
        let (back, same) = unpacked(packed.layout, &packed.codes, &packed.scales, None).unwrap();
        assert!(packed.zero_points.is_none() && back.reads_like(&encoding) && same == codes, "{back:?}");
        assert_eq!(back.decode(&same).unwrap(), encoding.decode(&codes).unwrap());
        // Of the last block of every output 8 inputs are padding: the code 2, which stands for 0.
        assert!(packed.codes.bytes().chunks(12).all(|row| row[10..] == [0b1010_1010; 2]), "{:?}", packed.codes);
    }

    #[test]
    fn sizes_that_do_not_fit_are_no_layout() {
        let sound = Layout { k: 64, n: 2, block: 32, bits: 4 };
        assert!(sound.is_sound());
        for lie in [
            Layout { bits: 3, ..sound },
            Layout { block: 24, ..sound },
            Layout { block: 8, ..sound },
            Layout { block: 0, ..sound },
            Layout { bits: 0, ..sound },
            Layout { k: 0, ..sound },
            Layout { n: 0, ..sound },
            Layout { k: usize::MAX, ..sound },
            Layout { n: usize::MAX / 2, ..sound },
        ] {
            assert!(!lie.is_sound(), "{lie:?}");
        }
        let (codes, scales) = (Tensor::of([2, 2, 16], vec![0_u8; 64]), Tensor::of([2, 2], vec![1.0_f32; 4]));
        assert!(unpacked(sound, &codes, &scales, None).is_some());
        assert!(unpacked(Layout { k: 65, ..sound }, &codes, &scales, None).is_none());
        assert!(unpacked(sound, &codes, &Tensor::of([4], vec![0.0_f32; 4]), None).is_none());
    }
}
