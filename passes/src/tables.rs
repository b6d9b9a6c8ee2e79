//! `com.microsoft::GatherBlockQuantized`: rows out of a table that is packed in blocks, and the tables that heads share with it.
//!
//! Source: ONNX Runtime's ContribOperators.md, and its CPU kernel, against which the layout was checked. For a table \[N, K\] in blocks of S
//! columns: codes u8 \[N, K·bits/8\], the first column in the lowest bits, or 4-bit integers \[N, K\]; scales \[N, K/S\]; zero points packed
//! like codes, 2^(bits−1) where there are none, 0 for 4-bit integers. The bytes are those of a `MatMulNBits` by the table transposed.

use rayon::prelude::*;

use crate::encoding::{Encoding, Granularity};
use crate::id::{NodeId, ValueId};
use crate::ir::walk::{User, Users};
use crate::ir::{Graph, Node};
use crate::nbits::{Layout, get, grid_of, mask, narrow, offset_of, put, width};
use crate::tensor::{DType, Tensor};

/// The operator.
pub(crate) const OP: &str = "GatherBlockQuantized";

/// A table as the operator wants it.
pub(crate) struct Packed {
    /// K inputs and N outputs, as of a product with the table transposed.
    pub(crate) layout: Layout,
    pub(crate) codes: Tensor,
    pub(crate) scales: Tensor,
    pub(crate) zero_points: Option<Tensor>,
}

/// Whether `node` takes rows out of its first input.
pub(crate) fn is_gather(node: &Node) -> bool {
    node.op.is("Gather") && node.int("axis", 0) == 0
}

/// The nodes that transpose `table` for nobody but matrix products, on whose right it then stands, each with those products.
pub(crate) fn transposes<'a>(
    graph: &'a Graph,
    users: &'a Users,
    table: ValueId,
) -> impl Iterator<Item = (NodeId, Vec<NodeId>)> + 'a {
    users.of_value(table).iter().filter_map(move |user| {
        let User::Input { node: id, input: 0 } = user else { return None };
        let node = graph.node(*id).filter(|node| turns(node))?;
        let products: Vec<NodeId> =
            users.of_value(node.output(0)?).iter().map(|user| product(graph, *user)).collect::<Option<_>>()?;
        (!products.is_empty()).then_some((*id, products))
    })
}

/// Whether `node` swaps two axes.
pub(crate) fn turns(node: &Node) -> bool {
    node.op.is("Transpose") && node.ints("perm").is_none_or(|perm| perm == [1, 0])
}

fn product(graph: &Graph, user: User) -> Option<NodeId> {
    match user {
        User::Input { node, input: 1 } if graph.node(node)?.op.is("MatMul") => Some(node),
        _ => None,
    }
}

/// The layout of `codes` \[N, K\], where both operators take it: integers in whole blocks along the rows.
pub(crate) fn layout(encoding: &Encoding, codes: &Tensor) -> Option<Layout> {
    let ([n, k], Granularity::Block { axis: 1, size: block }) = (codes.shape(), encoding.granularity) else {
        return None;
    };
    let (n, k) = (*n, *k);
    let info = encoding.grid.info();
    let bits = width(info.bits)?;
    let layout = Layout { k, n, block, bits };
    (info.integer && layout.is_sound() && k.is_multiple_of(block)).then_some(layout)
}

/// `codes` \[N, K\] of `encoding` in the layout of bytes, which [`layout`] gave.
pub(crate) fn packed(layout: Layout, encoding: &Encoding, codes: &Tensor) -> Packed {
    let Layout { k, n, bits, .. } = layout;
    let signed = encoding.grid.range().0 < 0.0;
    let offset = offset_of(signed, bits);
    let stored = codes.dtype().bits() as usize;
    let table = translated(stored, |code| encoding_point(encoding, code) + offset, mask(bits));
    let row_bytes = k * stored / 8;
    let mut bytes = vec![0_u8; n * layout.row_bytes()];
    bytes.par_chunks_mut(layout.row_bytes()).zip(codes.bytes().par_chunks(row_bytes)).for_each(|(to, from)| {
        (0..k).for_each(|column| put(to, column, bits, table[usize::from(get(from, column, stored))]));
    });
    let usual = signed && encoding.is_symmetric();
    let zero_points = (!usual).then(|| {
        let mut zeros = vec![0_u8; n * layout.zero_bytes()];
        for (row, points) in
            zeros.chunks_exact_mut(layout.zero_bytes()).zip(encoding.zero_point.chunks(layout.blocks()))
        {
            points.iter().enumerate().for_each(|(at, zero)| put(row, at, bits, narrow(zero + offset)));
        }
        Tensor::of([n, layout.zero_bytes()], zeros)
    });
    Packed {
        layout,
        codes: Tensor::of([n, layout.row_bytes()], bytes),
        scales: Tensor::of([n, layout.blocks()], encoding.scale.to_vec()),
        zero_points,
    }
}

/// The encoding and the codes \[N, K\] of a packed table; `None` where sizes or types do not fit.
pub(crate) fn unpacked(
    layout: Layout,
    codes: &Tensor,
    scales: &Tensor,
    zero_points: Option<&Tensor>,
) -> Option<(Encoding, Tensor)> {
    let Layout { k, n, block, bits } = layout;
    let scale = scales.values::<f32>().filter(|scale| scale.iter().all(|s| s.is_finite() && *s != 0.0))?;
    (layout.is_sound() && k.is_multiple_of(block) && scale.len() == n.checked_mul(layout.blocks())?).then_some(())?;
    let bytes = codes.values::<u8>().filter(|bytes| bytes.len() == n * layout.row_bytes())?;
    let zeros = match zero_points {
        Some(zeros) => Some(zeros.values::<u8>().filter(|zeros| zeros.len() == n * layout.zero_bytes())?),
        None => None,
    };
    let grid = grid_of(zeros.is_some(), bits)?;
    let stored = grid.info().storage.bits() as usize;
    let offset = offset_of(zeros.is_none(), bits);
    let table = translated(bits, |code| i32::from(code) - offset, mask(stored));
    let row_bytes = k * stored / 8;
    let mut unpacked = vec![0_u8; n.checked_mul(row_bytes)?];
    unpacked.par_chunks_mut(row_bytes).zip(bytes.par_chunks(layout.row_bytes())).for_each(|(to, from)| {
        (0..k).for_each(|column| put(to, column, stored, table[usize::from(get(from, column, bits))]));
    });
    let zero_point: Vec<i32> = match &zeros {
        Some(zeros) => zeros
            .chunks_exact(layout.zero_bytes())
            .flat_map(|row| (0..layout.blocks()).map(|at| i32::from(get(row, at, bits))))
            .collect(),
        None => vec![0; scale.len()],
    };
    let granularity = Granularity::Block { axis: 1, size: block };
    let encoding = Encoding { grid, granularity, scale: scale.into_owned().into(), zero_point: zero_point.into() };
    Some((encoding, Tensor::new(grid.info().storage, vec![n, k], unpacked.into()).ok()?))
}

#[expect(clippy::cast_possible_truncation, reason = "points of integers of up to 8 bits")]
fn encoding_point(encoding: &Encoding, code: u8) -> i32 {
    encoding.grid.decode(u32::from(code)) as i32
}

/// What every code of so many bits becomes.
fn translated(bits: usize, point: impl Fn(u8) -> i32, mask: u8) -> Vec<u8> {
    (0..=crate::nbits::mask(bits)).map(|code| narrow(point(code)) & mask).collect()
}

/// Whether `dtype` holds codes of a table by itself, without an attribute that says how many bits.
pub(crate) fn is_plain(dtype: DType) -> bool {
    matches!(dtype, DType::I4 | DType::U4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid;

    #[test]
    fn what_is_packed_unpacks() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37) % 29) as f32 / 14.0 - 1.0).collect();
        for (name, zero) in
            [("int4", 0), ("uint4", 7), ("int8", 0), ("uint8", 131), ("int2-in-4", 0), ("uint2-in-4", 1)]
        {
            let encoding = Encoding {
                grid: grid::find(name).unwrap(),
                granularity: Granularity::Block { axis: 1, size: 16 },
                scale: (0..6).map(|i| if i == 4 { -0.2 } else { 0.1 + i as f32 / 100.0 }).collect(),
                zero_point: vec![zero; 6].into(),
            };
            let codes = encoding.encode(&values, &[3, 32]).unwrap();
            let layout = layout(&encoding, &codes).unwrap();
            let packed = packed(layout, &encoding, &codes);
            assert_eq!(packed.codes.shape(), [3, 4 * layout.bits]);
            let back = unpacked(layout, &packed.codes, &packed.scales, packed.zero_points.as_ref()).unwrap();
            assert_eq!(back, (encoding, codes), "{name}");
            let lie = Layout { n: 4, ..layout };
            assert!(unpacked(lie, &packed.codes, &packed.scales, None).is_none());
        }
    }
}
