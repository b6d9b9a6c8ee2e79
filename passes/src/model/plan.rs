//! The plan: everything decided about the float graph.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::encoding::Encoding;
use crate::id::{NodeId, Site};
use crate::ir::Graph;
use crate::tensor::Tensor;

/// Whether a node runs quantized, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the target will compute it on codes.
    pub quantized: bool,
    /// The rule that decided, one phrase.
    pub reason: String,
}

/// Encodings and rounded codes, by site, the decision for every node that was considered, and float constants that take back
/// part of what rounding loses.
///
/// An encoding at [`Site::Value`] holds for everyone who reads the tensor; one at [`Site::Use`] for that read alone. A
/// tensor never has both with different encodings: one tensor is one decision.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub(crate) encodings: BTreeMap<Site, Encoding>,
    pub(crate) codes: BTreeMap<Site, Arc<Tensor>>,
    pub(crate) decisions: BTreeMap<NodeId, Decision>,
    pub(crate) substitutes: BTreeMap<Site, Arc<Tensor>>,
    pub(crate) losses: BTreeMap<Site, f64>,
    pub(crate) leanings: BTreeMap<Site, Leanings>,
}

/// Where every weight of a tensor would go if it did not have to lie on its point: so many parts of the way to the neighbor above it, of
/// [`GAP`] to the whole way, or below it where negative.
pub type Leanings = Arc<[i8]>;

/// Parts of the way from a point to its neighbor.
pub const GAP: u16 = 256;

impl Plan {
    /// The part of it that runs go by.
    pub(crate) fn to_run(&self) -> Self {
        Self {
            encodings: self.encodings.clone(),
            codes: self.codes.clone(),
            substitutes: self.substitutes.clone(),
            ..Self::default()
        }
    }

    /// The encodings, in the order of their sites.
    pub fn encodings(&self) -> impl Iterator<Item = (Site, &Encoding)> {
        self.encodings.iter().map(|(&site, encoding)| (site, encoding))
    }

    /// The encoding at exactly `site`.
    pub fn encoding(&self, site: Site) -> Option<&Encoding> {
        self.encodings.get(&site)
    }

    /// The encoding that `input` of `node` is read in: its own, or that of the tensor.
    pub fn encoding_of_use(&self, graph: &Graph, node: NodeId, input: u16) -> Option<&Encoding> {
        let value = graph.node(node)?.input(input.into())?;
        self.encoding(Site::Use { node, input }).or_else(|| self.encoding(Site::Value(value)))
    }

    /// The rounded codes at `site`, in the storage type of the encoding's grid.
    pub fn codes(&self, site: Site) -> Option<&Arc<Tensor>> {
        self.codes.get(&site)
    }

    /// What was decided about each node that was considered.
    pub fn decisions(&self) -> impl Iterator<Item = (NodeId, &Decision)> {
        self.decisions.iter().map(|(&node, decision)| (node, decision))
    }

    /// What was decided about `node`.
    pub fn decision(&self, node: NodeId) -> Option<&Decision> {
        self.decisions.get(&node)
    }

    /// The float constants that are read instead of those of the graph, in the order of their sites: corrected biases of nodes
    /// that add them in float. Of the type and shape of what they stand for.
    pub fn substitutes(&self) -> impl Iterator<Item = (Site, &Arc<Tensor>)> {
        self.substitutes.iter().map(|(&site, tensor)| (site, tensor))
    }

    /// The float constant that is read at `site` instead of that of the graph.
    pub fn substitute(&self, site: Site) -> Option<&Arc<Tensor>> {
        self.substitutes.get(&site)
    }

    /// What the codes at `site` lose at the output of their layer over what nearest ones would, both in the squared error around the weight
    /// that rounding aims at (behind rounded layers one that makes up for those), on the samples that they were chosen by and a few of the
    /// rows; `None` where they were not chosen by samples, or were changed since. Where rows make up for one another, one may lose more
    /// than alone.
    pub fn loss_over_nearest(&self, site: Site) -> Option<f64> {
        self.losses.get(&site).copied()
    }

    /// Where weights at `site` would go with all others held, where rounding was to tell (`round-in-order{lean=1}`).
    pub fn leanings(&self, site: Site) -> Option<&Leanings> {
        self.leanings.get(&site)
    }

    /// Lets go of the codes at `site`, and of all that is said of them.
    pub(super) fn forget_codes(&mut self, site: Site) {
        self.codes.remove(&site);
        self.losses.remove(&site);
        self.leanings.remove(&site);
    }

    /// Whether node `id` of `graph` reads or returns something in codes, or codes in the place of a constant.
    pub fn encodes_any_of(&self, graph: &Graph, id: NodeId) -> bool {
        let Some(node) = graph.node(id) else { return false };
        let uses = (0..node.inputs.len()).filter_map(|input| u16::try_from(input).ok());
        let read = uses.into_iter().any(|input| self.encoding_of_use(graph, id, input).is_some());
        read || node.outputs.iter().flatten().any(|value| self.encoding(Site::Value(*value)).is_some())
    }

    /// A plan of one encoding.
    #[must_use]
    pub fn of(site: Site, encoding: Encoding) -> Self {
        Self { encodings: BTreeMap::from([(site, encoding)]), ..Self::default() }
    }

    /// Where constants are encoded that `node` reads transposed.
    pub fn transposed(&self, graph: &Graph, node: NodeId) -> impl Iterator<Item = Site> {
        let inputs = graph.node(node).map(|node| node.inputs.iter().flatten()).into_iter().flatten();
        let transposes = inputs.filter_map(|value| graph.producer(*value)).filter(|(_, made)| made.op.is("Transpose"));
        let sites = transposes.map(|(transpose, _)| Site::Use { node: transpose, input: 0 });
        sites.filter(|site| self.codes.contains_key(site))
    }

    /// What this plan says about the tensors that `node` reads and writes, constants that it reads transposed among them, and nothing
    /// else.
    #[must_use]
    pub fn only_about(&self, graph: &Graph, node: NodeId) -> Self {
        let Some(content) = graph.node(node) else { return Self::default() };
        let values: Vec<_> = content.inputs.iter().chain(&content.outputs).flatten().collect();
        let transposed: Vec<Site> = self.transposed(graph, node).collect();
        let about = |site: &Site| match site {
            Site::Value(value) => values.contains(&value),
            Site::Use { node: reader, .. } => *reader == node || transposed.contains(site),
        };
        self.only(about)
    }

    /// What this plan says at the sites that `wanted` names, without decisions.
    #[must_use]
    pub fn only(&self, wanted: impl Fn(&Site) -> bool) -> Self {
        fn at<T: Clone>(all: &BTreeMap<Site, T>, wanted: impl Fn(&Site) -> bool) -> BTreeMap<Site, T> {
            all.iter().filter(|(site, _)| wanted(site)).map(|(site, what)| (*site, what.clone())).collect()
        }
        Self {
            encodings: at(&self.encodings, &wanted),
            codes: at(&self.codes, &wanted),
            decisions: BTreeMap::new(),
            substitutes: at(&self.substitutes, &wanted),
            losses: at(&self.losses, &wanted),
            leanings: at(&self.leanings, &wanted),
        }
    }

    /// Whether nothing is encoded.
    pub fn is_empty(&self) -> bool {
        self.encodings.is_empty()
    }
}
