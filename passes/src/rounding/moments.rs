//! What rounding a weight costs, told by second moments of what its node reads: over what the node returns, so that weights compare.

use std::collections::BTreeSet;

use super::held_out::{self, Part};
use super::layer::Layer;
use super::tile::Quadratic;
use super::{gptq, work};
use crate::encoding::Encoding;
use crate::id::{NodeId, ValueId};
use crate::model::Model;
use crate::parallel;
use crate::pass::{PassContext, Wish};
use crate::sensitivity::Form;

/// Tiles of a weight that stand for all of it.
const TILES: usize = 8;

/// What [`losses`] goes by.
pub(crate) fn wished(model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
    work::wishes(model, cx)
}

/// What the weight of node `id` loses in each of `encodings`, over what it returns; `None` where no moments were measured.
pub(crate) fn losses(model: &Model, id: NodeId, encodings: &[Encoding], form: Form) -> Option<Vec<f64>> {
    let layer = Layer::of(model, id).filter(Layer::has_gram)?;
    let parts = held_out::parts(&layer, TILES);
    // Tiles begin with all points at 0, where the error is the weight itself.
    let signal = work::loss_of(&layer, &layer, &parts, |_| (), |_, _, ()| {})?;
    let lost = match form {
        Form::Weights => return None,
        Form::Moments => encodings.iter().map(|e| solved(&layer.written(e), &parts)).collect::<Option<Vec<f64>>>()?,
        Form::Pivots => expected(&layer, &parts, encodings)?,
    };
    let share = |lost: f64| if signal > 0.0 && lost.is_finite() { (lost / signal).max(0.0) } else { 0.0 };
    Some(lost.into_iter().map(share).collect())
}

/// tr(Δ H Δᵀ) of the codes that GPTQ chooses.
fn solved(layer: &Layer<'_>, parts: &[Part]) -> Option<f64> {
    let (method, grid) = (super::find("gptq")?, layer.encoding.grid);
    work::loss_of(
        layer,
        layer,
        parts,
        |q| method.prepare(q),
        |tiles, q, prepared| match prepared.as_deref() {
            Some(prepared) => prepared.round_all(tiles, grid, q),
            None => parallel::each(tiles, |tile| tile.nearest(grid)),
        },
    )
}

/// Σ Dⱼ sⱼ² / 12, encoding by encoding: nothing is rounded.
fn expected(layer: &Layer<'_>, parts: &[Part], encodings: &[Encoding]) -> Option<Vec<f64>> {
    let mut lost = vec![0.0; encodings.len()];
    for parts in parts.chunk_by(|a, b| a.0 == b.0) {
        let q = Quadratic::new(&layer.quadratic(parts.first()?.0)?, layer.columns);
        let pivots = gptq::column_pivots(&q)?;
        for (lost, encoding) in lost.iter_mut().zip(encodings) {
            let layer = layer.written(encoding);
            for row in parts.iter().flat_map(|(_, rows)| rows.clone()) {
                for (column, pivot) in pivots.iter().enumerate() {
                    let scale = f64::from(encoding.scale[layer.scale_index(row, column / layer.block())]);
                    *lost += pivot * scale * scale / 12.0;
                }
            }
        }
    }
    Some(lost)
}
