//! A constant zero Pad into the convolution after it.

use crate::ir::{Attr, Graph, Node};
use crate::model::Patch;
use crate::pass::{Facts, Miss, PassEntry, PassInfo, Rewrite, RewriteSite, Sweep};

crate::declare_pass! {
    /// Folds a `Pad` with constant zeros around the spatial axes into the `Conv` that reads it.
    ///
    /// Exact: the convolution pads with zeros itself. Declines when the padded tensor has another reader, when the padding
    /// is not constant, negative, not zero-valued or reaches batch or channels, and when the convolution chooses its own
    /// padding (`auto_pad`).
    INFO {
        name: "fold-pad",
        source: "ONNX operator specification, Conv-22 and Pad-21",
        cost: "One walk over the nodes.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: Exact,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(Sweep(FoldPad))) };

/// See [`INFO`].
#[derive(Debug)]
struct FoldPad;

impl Rewrite for FoldPad {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn anchors(&self) -> &'static [&'static str] {
        &["Conv"]
    }

    fn rewrite(&self, site: &RewriteSite<'_>, patch: &mut Patch) -> Result<(), Miss> {
        let conv = site.node;
        let input = conv.input(0).ok_or(Miss::NoMatch)?;
        let (pad_id, pad) = site.sole_producer(input).filter(|(_, node)| node.op.is("Pad")).ok_or(Miss::NoMatch)?;
        let plan = site.model.plan();
        if patch.touches(pad_id)
            || plan.encodes_any_of(site.graph(), pad_id)
            || site.model.plan().encoding_of_use(site.graph(), site.id, 0).is_some()
        {
            return Err(Miss::NoMatch);
        }
        if conv.text("auto_pad", "NOTSET") != "NOTSET" {
            return Err(Miss::Blocked("the convolution chooses its own padding".into()));
        }
        let weight_rank = site.graph().constant_input(conv, 1).map(|w| w.shape().len());
        let rank = weight_rank.or(site.graph().value(input).ty.rank()).ok_or(Miss::NoMatch)?;
        let added = spatial_padding(site.graph(), pad, rank)?;
        let own = conv.ints("pads").map_or_else(|| vec![0; added.len()], <[i64]>::to_vec);
        if own.len() != added.len() {
            return Err(Miss::NoMatch);
        }
        let sum: Option<Vec<i64>> = own.iter().zip(&added).map(|(a, b)| a.checked_add(*b)).collect();
        let mut folded = conv.clone();
        folded.attrs.insert("pads".into(), Attr::Ints(sum.ok_or(Miss::NoMatch)?));
        folded.inputs[0] = pad.input(0);
        patch.replace(site.id, folded);
        patch.erase(pad_id);
        patch.count("folded", 1);
        Ok(())
    }
}

/// Begins, then ends, of the spatial axes.
fn spatial_padding(graph: &Graph, pad: &Node, rank: usize) -> Result<Vec<i64>, Miss> {
    let blocked = |reason: &'static str| Miss::Blocked(reason.into());
    if pad.text("mode", "constant") != "constant" {
        return Err(blocked("the padding repeats or mirrors values"));
    }
    if pad.input(2).is_some() && graph.constant_input(pad, 2).and_then(|v| v.single_float()) != Some(0.0) {
        return Err(blocked("the padding is not known to be zero"));
    }
    let pads = graph.constant_input(pad, 1).and_then(|p| p.integers());
    let pads = pads.filter(|_| pad.input(3).is_none()).ok_or(blocked("the padding is not constant"))?;
    if pads.len() != 2 * rank || rank < 3 || pads.iter().any(|&n| n < 0) {
        return Err(blocked("the padding is negative or does not fit the rank"));
    }
    let (begins, ends) = pads.split_at(rank);
    if begins[..2].iter().chain(&ends[..2]).any(|&n| n != 0) {
        return Err(blocked("the padding reaches batch or channels"));
    }
    Ok([&begins[2..], &ends[2..]].concat())
}
