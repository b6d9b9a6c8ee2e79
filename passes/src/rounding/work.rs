//! Tiles of a layer: cut out, worked on in parallel, put back.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::held_out::{self, Part};
use super::layer::Layer;
use super::tile::{LANES, Quadratic, Tile};
use crate::encoding::Encoding;
use crate::grid::Grid;
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::model::{Edit, Model, Patch, bias};
use crate::ops;
use crate::parallel;
use crate::pass::{PassContext, PassError, Wish};
use crate::simd::vectorized;

/// New points and scales of a layer, in the order of storage.
pub(super) struct Rounded {
    pub(super) points: Vec<f32>,
    scales: Vec<f32>,
}

/// Tiles of a group, each with the rows that it holds.
type Cut = Vec<(Vec<usize>, Tile)>;

/// What every method that rounds by data wishes for.
pub(super) fn wishes(model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
    let graph = model.graph();
    // Where activations have no fixed ranges, convolutions stay in float.
    let only_products = !cx.scheme.fixes_ranges();
    graph
        .nodes()
        .filter(|(_, node)| cx.target.rule(&node.op).is_some() && !cx.keep_float.contains_key(&*node.name))
        .filter(|(_, node)| !(only_products && node.op.is("Conv")))
        .filter_map(|(id, _)| super::layer::rows_of(graph, id, &ops::linear(graph, id)?))
        .filter(|(value, _)| crate::simulate::is_float_activation(graph, *value))
        .map(|(value, rows)| (value, Wish::Gram(rows)))
        .collect()
}

/// The layers that can be rounded by data: measured, and with a weight of their own.
pub(super) fn layers(model: &Model) -> Vec<Layer<'_>> {
    let graph = model.graph();
    let users = Users::of(graph);
    let own = |layer: &Layer<'_>| {
        let Site::Use { node, input } = layer.site else { return false };
        let value = graph.node(node).and_then(|node| node.input(input.into()));
        value.is_some_and(|value| users.of_value(value).len() == 1)
    };
    let nodes = graph.nodes().map(|(id, _)| id);
    nodes.filter_map(|id: NodeId| Layer::of(model, id)).filter(|layer| layer.has_gram() && own(layer)).collect()
}

/// Runs `work` on the tiles of every group of `layer`, starting from `points` where there are some, after `prepare`.
pub(super) fn over_tiles<P: Sync>(
    layer: &Layer<'_>,
    points: Option<&[f32]>,
    prepare: impl Fn(&Quadratic) -> P + Sync,
    work: impl Fn(&mut [Tile], &Quadratic, &P) + Sync,
) -> Option<Rounded> {
    over_groups(layer, points, &neighbors, prepare, |_, tiles, q, prepared| work(tiles, q, prepared))
}

/// The same, where `work` gets the number of the group and tiles of the rows that `rows` lists, tile by tile, for so many rows of a group.
pub(super) fn over_groups<P: Sync>(
    layer: &Layer<'_>,
    points: Option<&[f32]>,
    rows: &(dyn Fn(usize, usize) -> Vec<Vec<usize>> + Sync),
    prepare: impl Fn(&Quadratic) -> P + Sync,
    work: impl Fn(usize, &mut [Tile], &Quadratic, &P) + Sync,
) -> Option<Rounded> {
    let weights = layer.goal()?;
    let per_group = layer.rows / layer.groups;
    let groups: Vec<usize> = (0..layer.groups).collect();
    let tiles_of = |group: &usize| -> Option<Cut> {
        let h = layer.quadratic(*group)?;
        let q = Quadratic::new(&h, layer.columns);
        let prepared = prepare(&q);
        let mut rows = rows(*group, per_group);
        rows.iter_mut().flatten().for_each(|row| *row += group * per_group);
        let mut tiles = parallel::map(&rows, |rows| cut(layer, &weights, points, rows));
        work(*group, &mut tiles, &q, &prepared);
        Some(rows.into_iter().zip(tiles).collect())
    };
    let tiles: Option<Vec<Cut>> = parallel::map(&groups, tiles_of).into_iter().collect();
    let mut rounded = Rounded { points: vec![0.0; weights.len()], scales: layer.encoding.scale.to_vec() };
    for (rows, tile) in tiles?.into_iter().flatten() {
        put_back(layer, &tile, &rows, &mut rounded);
    }
    Some(rounded)
}

/// Neighbors in one tile.
fn neighbors(_: usize, rows: usize) -> Vec<Vec<usize>> {
    (0..rows).step_by(LANES).map(|start| (start..rows.min(start + LANES)).collect()).collect()
}

/// The rows of `group`, which has so many, neighbors in one tile.
pub(super) fn consecutive(group: usize, rows: usize) -> Vec<Vec<usize>> {
    let mut all = neighbors(group, rows);
    all.iter_mut().flatten().for_each(|row| *row += group * rows);
    all
}

/// What `work`, after `prepare`, loses on `parts` of `layer` by the moments of `judge`, as they were measured.
pub(super) fn loss_of<P: Sync>(
    layer: &Layer<'_>,
    judge: &Layer<'_>,
    parts: &[Part],
    prepare: impl Fn(&Quadratic) -> P + Sync,
    work: impl Fn(&mut [Tile], &Quadratic, &P) + Sync,
) -> Option<f64> {
    let weights = layer.goal()?;
    let of_group = |parts: &&[Part]| -> Option<f64> {
        let group = parts.first()?.0;
        let q = Quadratic::new(&layer.quadratic(group)?, layer.columns);
        let prepared = prepare(&q);
        let mut tiles: Vec<Tile> =
            parts.iter().map(|(_, rows)| cut(layer, &weights, None, &rows.clone().collect::<Vec<_>>())).collect();
        work(&mut tiles, &q, &prepared);
        let judge = Quadratic::new(&judge.raw_quadratic(group)?, layer.columns);
        let losses = parallel::map(&tiles, |tile| {
            let losses = vectorized(
                #[inline(always)]
                || tile.losses(&judge),
            );
            losses[..tile.live].iter().sum::<f64>()
        });
        Some(losses.into_iter().sum())
    };
    let groups: Vec<&[Part]> = parts.chunk_by(|a, b| a.0 == b.0).collect();
    parallel::map(&groups, of_group).into_iter().sum()
}

/// Runs `work` on every tile of every layer that was rounded and measured.
pub(super) fn polish(
    model: &Model,
    cx: &PassContext<'_>,
    name: &'static str,
    work: impl Fn(&mut Tile, &dyn Grid, &Quadratic) + Sync,
) -> Result<Patch, PassError> {
    let mut patch = Patch::on(model);
    let layers = layers(model);
    cx.progress.begin(name, layers.len() as u64);
    for layer in layers.iter().filter(|layer| layer.scales_are_own()) {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        if let Some(codes) = model.plan().codes(layer.site) {
            let points = layer.points(codes);
            let grid = layer.encoding.grid;
            let polished = over_tiles(
                layer,
                Some(&points),
                |_| (),
                |tiles, q, ()| parallel::each(tiles, |tile| work(tile, grid, q)),
            );
            let polished = polished.and_then(|polished| polished.in_reach(model, layer, || Some(points)));
            if let Some(polished) = polished {
                polished.edits(model, layer).into_iter().for_each(|edit| patch.edit(edit));
                patch.count("polished", 1);
            }
        }
        cx.progress.step();
    }
    cx.progress.end();
    Ok(patch)
}

fn cut(layer: &Layer<'_>, weights: &[f32], points: Option<&[f32]>, rows: &[usize]) -> Tile {
    let gather = |from: &[f32]| {
        let column = |column: usize| {
            let mut lanes = [0.0; LANES];
            lanes.iter_mut().zip(rows).for_each(|(lane, row)| *lane = from[layer.index(*row, column)]);
            lanes
        };
        (0..layer.columns).map(column).collect::<Vec<_>>()
    };
    let per_block = |of: &dyn Fn(usize) -> f32, rest: f32| {
        let block = |block: usize| {
            let mut lanes = [rest; LANES];
            lanes.iter_mut().zip(rows).for_each(|(lane, row)| *lane = of(layer.scale_index(*row, block)));
            lanes
        };
        (0..layer.blocks()).map(block).collect::<Vec<_>>()
    };
    Tile {
        live: rows.len(),
        weights: gather(weights),
        points: points.map_or_else(|| vec![[0.0; LANES]; layer.columns], gather),
        scales: per_block(&|index| layer.encoding.scale[index], 1.0),
        zeros: per_block(&|index| layer.encoding.zero_point[index] as f32, 0.0),
        block: layer.block(),
    }
}

fn put_back(layer: &Layer<'_>, tile: &Tile, rows: &[usize], into: &mut Rounded) {
    for (lane, &row) in rows.iter().enumerate() {
        for (column, points) in tile.points.iter().enumerate() {
            into.points[layer.index(row, column)] = points[lane];
        }
        for (block, scales) in tile.scales.iter().enumerate() {
            into.scales[layer.scale_index(row, block)] = scales[lane];
        }
    }
}

/// Tiles of a weight by which its codes are compared with nearest ones.
const COMPARED: usize = 8;

/// The sums of both numbers.
fn sum(pairs: Vec<[f64; 2]>) -> [f64; 2] {
    pairs.into_iter().fold([0.0; 2], |[a, b], [x, y]| [a + x, b + y])
}

impl Rounded {
    /// The edit that says what it loses around the weight that rounding aims at, over what the nearest points to that in the scales that
    /// were assigned do, on a few rows, by the moments as they were measured; `None` where those lose nothing.
    pub(super) fn compared(&self, layer: &Layer<'_>) -> Option<Edit> {
        let weights = layer.goal()?;
        let grid = layer.encoding.grid;
        let of_rows = |rows: &Vec<usize>, q: &Quadratic| -> [f64; 2] {
            let mut nearest = cut(layer, &weights, None, rows);
            nearest.nearest(grid);
            let chosen = self.tile(layer, &weights, rows);
            let loss = |tile: &Tile| {
                let losses = vectorized(
                    #[inline(always)]
                    || tile.losses(q),
                );
                losses[..tile.live].iter().sum::<f64>()
            };
            [loss(&chosen), loss(&nearest)]
        };
        let of_group = |parts: &&[Part]| -> Option<[f64; 2]> {
            let q = Quadratic::new(&layer.raw_quadratic(parts.first()?.0)?, layer.columns);
            let rows: Vec<Vec<usize>> = parts.iter().map(|(_, rows)| rows.clone().collect()).collect();
            Some(sum(parallel::map(&rows, |rows| of_rows(rows, &q))))
        };
        let parts = held_out::parts(layer, COMPARED);
        let groups: Vec<&[Part]> = parts.chunk_by(|a, b| a.0 == b.0).collect();
        let losses: Option<Vec<[f64; 2]>> = parallel::map(&groups, of_group).into_iter().collect();
        let [chosen, nearest] = sum(losses?);
        let over_nearest = chosen / nearest;
        over_nearest.is_finite().then_some(Edit::Compare { site: layer.site, over_nearest })
    }

    /// The tile of `rows`, whose `weights` it should come near to, as it is.
    pub(super) fn tile(&self, layer: &Layer<'_>, weights: &[f32], rows: &[usize]) -> Tile {
        let mut tile = cut(layer, weights, Some(&self.points), rows);
        for (block, scales) in tile.scales.iter_mut().enumerate() {
            scales.iter_mut().zip(rows).for_each(|(s, row)| *s = self.scales[layer.scale_index(*row, block)]);
        }
        tile
    }

    /// What the codes stand for, in the order of storage.
    pub(super) fn decoded(&self, layer: &Layer<'_>) -> Vec<f32> {
        let mut values = self.points.clone();
        for row in 0..layer.rows {
            for column in 0..layer.columns {
                values[layer.index(row, column)] *= self.scales[layer.scale_index(row, column / layer.block())];
            }
        }
        values
    }

    /// Whether there are rows in whose scales the bias of the node would saturate.
    pub(super) fn saturates(&self, model: &Model, layer: &Layer<'_>) -> bool {
        let encoding = Encoding { scale: self.scales.as_slice().into(), ..layer.encoding.clone() };
        bias::saturated(model, layer.node, &encoding).iter().any(|row| *row < layer.rows)
    }

    /// The same, but for rows in whose scales the bias of the node would saturate: those keep the scales that were assigned, and the points
    /// that `kept` has chosen in these.
    pub(super) fn in_reach(
        mut self,
        model: &Model,
        layer: &Layer<'_>,
        kept: impl FnOnce() -> Option<Vec<f32>>,
    ) -> Option<Self> {
        let encoding = Encoding { scale: self.scales.as_slice().into(), ..layer.encoding.clone() };
        let mut rows = bias::saturated(model, layer.node, &encoding);
        rows.retain(|row| *row < layer.rows);
        if rows.is_empty() {
            return Some(self);
        }
        let points = kept()?;
        for row in rows {
            for at in (0..layer.columns).map(|column| layer.index(row, column)) {
                self.points[at] = points[at];
            }
            for at in (0..layer.blocks()).map(|block| layer.scale_index(row, block)) {
                self.scales[at] = layer.encoding.scale[at];
            }
        }
        Some(self)
    }

    /// The edits that write this into the plan. Where scales changed, the bias of the node, whose scale is that of the input
    /// times that of the weight, is encoded and rounded anew.
    pub(super) fn edits(self, model: &Model, layer: &Layer<'_>) -> Vec<Edit> {
        let compared = self.compared(layer);
        let codes = Arc::new(layer.encoding.pack_points(&self.points, layer.tensor.shape()));
        let Some(mut edits) = self.scaled(model, layer) else {
            return Vec::new(); // what was chosen before stays
        };
        edits.push(Edit::Round { site: layer.site, codes });
        edits.extend(compared);
        edits
    }

    /// The edits that write its scales into the plan: none where they are the same, `None` where the bias would saturate.
    pub(super) fn scaled(self, model: &Model, layer: &Layer<'_>) -> Option<Vec<Edit>> {
        let encoding = Encoding { scale: self.scales.into(), ..layer.encoding.clone() };
        if encoding == *layer.encoding {
            return Some(Vec::new());
        }
        let mut edits = bias::behind_weight(model, layer.node, &encoding)?;
        edits.push(Edit::Encode { site: layer.site, encoding });
        Some(edits)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::clip_weights::{Form, clip};
    use super::*;
    use crate::observe::Gram;

    /// Rows 0 and 2 lie on the grid of half their scale. The bias of row 2 leaves no room for that.
    const SOURCE: &str = "graph (%x: f32[8,4]) -> (%y: f32[8,3]) {
        %w = const f32[4,3] [0.15, 0.3, 0.5, 0.45, -0.3, -0.5, -0.15, 0.6, 1.5, 0.75, 0.3, -1.5]
        %b = const f32[3] [1, 1, 1500000000]
        %y = Gemm(%x, %w, %b)
    }";

    /// A layer with a bias that is encoded, and with a large one in row 2; its node.
    pub(in super::super) fn with_a_large_bias() -> (Model, NodeId) {
        let mut model = crate::text::parse(SOURCE).unwrap();
        let node = model.graph().nodes().next().unwrap().0;
        let grid = |name: &str| crate::grid::find(name).unwrap();
        let mut patch = Patch::on(&model);
        for (input, encoding) in [
            (0, Encoding::per_tensor(grid("uint8"), 1.0, 0)),
            (1, Encoding::per_axis(grid("int4"), 1, vec![0.3, 0.3, 1.0])),
            (2, Encoding::per_axis(grid("int32"), 0, vec![0.3, 0.3, 1.0])),
        ] {
            patch.edit(Edit::Encode { site: Site::Use { node, input }, encoding });
        }
        model.apply(patch).unwrap();
        (model, node)
    }

    /// Moments of four columns that have nothing to do with one another.
    pub(in super::super) fn independent() -> Arc<Gram> {
        let moments = (0..16).map(|at| if at % 5 == 0 { 1.0 } else { 0.0 }).collect();
        Arc::new(Gram { columns: 4, moments, means: vec![0.0; 4], count: 60, effective: 1e12 })
    }

    /// Convolutions in two groups of 20 rows, products stored either way: rows come back to where they were cut, in whatever order.
    #[test]
    fn rows_go_back_to_where_they_were() {
        let gram = |columns: usize, groups: usize| {
            let moments = (0..groups * columns * columns).map(|at| 1.0 + (at % 7) as f32).collect();
            Arc::new(Gram { columns, moments, means: vec![0.0; groups * columns], count: 60, effective: 1e12 })
        };
        for (x, w, node, axis, columns, groups) in [
            ("1,4,3,3", "40,2,1,1", "Conv(%x, %w) {group=2, kernel_shape=[1,1]}", 0, 2, 2),
            ("8,3", "3,40", "MatMul(%x, %w)", 1, 3, 1),
            ("8,3", "40,3", "Gemm(%x, %w) {transB=1}", 0, 3, 1),
        ] {
            let text =
                format!("graph (%x: f32[{x}]) -> (%y) {{\n%w = const f32[{w}] rand(seed=1, std=1)\n%y = {node}\n}}");
            let mut model = crate::text::parse(&text).unwrap();
            let id = model.graph().nodes().next().unwrap().0;
            let grid = crate::grid::find("int4").unwrap();
            let encoding = Encoding::per_axis(grid, axis, (1..41_u8).map(|row| 0.01 * f32::from(row)).collect());
            let mut patch = Patch::on(&model);
            patch.edit(Edit::Encode { site: Site::Use { node: id, input: 1 }, encoding });
            model.apply(patch).unwrap();
            let layer = Layer::of(&model, id).unwrap().behind(gram(columns, groups), false);
            let nearest = |tiles: &mut [Tile]| tiles.iter_mut().for_each(|tile| tile.nearest(grid));
            let straight = over_tiles(&layer, None, |_| (), |tiles, _, ()| nearest(tiles)).unwrap();
            let rows = |group: usize, rows: usize| -> Vec<Vec<usize>> {
                let order: Vec<usize> = (0..rows).map(|row| (row * 7 + group) % rows).collect();
                order.chunks(LANES).map(<[usize]>::to_vec).collect()
            };
            let mixed = over_groups(&layer, None, &rows, |_| (), |_, tiles, _, ()| nearest(tiles)).unwrap();
            assert_eq!((straight.points, straight.scales), (mixed.points, mixed.scales), "{node}");
        }
    }

    #[test]
    fn only_rows_whose_bias_would_saturate_keep_their_scales() {
        let (model, node) = with_a_large_bias();
        let layer = Layer::of(&model, node).unwrap().behind(independent(), true);
        let grid = layer.encoding.grid;
        let clipped = || {
            let work = |tiles: &mut [Tile], q: &Quadratic, (): &()| {
                parallel::each(tiles, |tile| {
                    clip(tile, grid, q, Form::Diagonal);
                    tile.nearest(grid);
                });
            };
            over_tiles(&layer, None, |_| (), work).unwrap()
        };
        assert_eq!(clipped().scales, [0.15, 0.3, 0.5]);
        assert!(clipped().scaled(&model, &layer).is_none(), "the bias fits");
        let fitting = clipped().in_reach(&model, &layer, || Some(vec![7.0; 12])).unwrap();
        assert_eq!(fitting.scales, [0.15, 0.3, 1.0]);
        let kept = |row: usize| (0..4).all(|column| (fitting.points[layer.index(row, column)] - 7.0).abs() < 1e-6);
        assert_eq!([0, 1, 2].map(kept), [false, false, true]);
        assert!(fitting.scaled(&model, &layer).is_some());
    }
}
