//! The weight of a linear node as a matrix, and what it is multiplied with.

use std::sync::Arc;

use super::held_out::Trust;
use crate::encoding::{self, Encoding, Granularity};
use crate::id::{NodeId, Site, ValueId};
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::Model;
use crate::observe::{Cross, Gram, Rows, Window};
use crate::ops::{self, Linear};
use crate::reconstruct::WeightMoments;
use crate::tensor::Tensor;

/// Gram matrices of all groups of a weight together have at most so many entries, half a gibibyte: 11,585 columns, or many groups of large
/// kernels.
const MAX_ENTRIES: usize = 1 << 27;

/// Strides, paddings and dilations from here on are no geometry that a model was trained with.
const MAX_GEOMETRY: usize = 1 << 16;

/// An encoded weight: `rows` output channels of `columns` each, cut into `groups` of rows that read different channels.
#[derive(Clone)]
pub(super) struct Layer<'a> {
    pub(super) node: NodeId,
    pub(super) site: Site,
    pub(super) tensor: &'a Tensor,
    pub(super) encoding: &'a Encoding,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) groups: usize,
    /// Whether the weight is stored column by column.
    transposed: bool,
    gram: Option<Arc<Gram>>,
    /// How far those moments are trusted.
    trust: Trust,
    /// What its rows should imitate, instead of its own weight, in the order of storage.
    target: Option<Arc<[f32]>>,
    /// Whether a mean error of the output is taken back in a bias.
    centered: bool,
    /// Columns of zeros, whose inputs are multiplied apart.
    kept: Arc<[usize]>,
}

/// The tensor that the linear node `id` reads and how rows are cut out of it, where one weight row is one row of products.
pub(super) fn rows_of(graph: &Graph, id: NodeId, roles: &Linear) -> Option<(ValueId, Rows)> {
    let node = graph.node(id)?;
    let weight = graph.constant_input(node, roles.weight.into())?;
    let value = node.input(roles.activation.into())?;
    let rows = match &*node.op.name {
        "MatMul" | "Gemm" if roles.weight == 1 && weight.shape().len() == 2 && node.int("transA", 0) == 0 => Rows::Last,
        "Conv" => Rows::Windows(window(node, weight.shape())?),
        _ => return None,
    };
    let columns = match rows {
        Rows::Last => weight.shape()[1 - roles.out_axis],
        Rows::Windows(_) => weight.shape()[1..].iter().product(),
    };
    let entries = columns.checked_mul(columns)?.checked_mul(rows.groups())?;
    (entries <= MAX_ENTRIES).then_some((value, rows))
}

/// Why the encoded weight of the linear node `id` is not rounded by data, whatever is measured; `None` where it can be.
pub(super) fn beyond_data(graph: &Graph, users: &Users, id: NodeId) -> Option<&'static str> {
    let roles = ops::linear(graph, id)?;
    let weight = graph.node(id)?.input(roles.weight.into())?;
    if users.only_input(weight).is_none() {
        return Some("several nodes read its weight");
    }
    if rows_of(graph, id, &roles).is_some() {
        return None;
    }
    let shape = graph.constant(weight)?.shape();
    let columns = shape.iter().product::<usize>().checked_div(*shape.get(roles.out_axis)?)?;
    let groups = usize::try_from(graph.node(id)?.int("group", 1)).unwrap_or(1).max(1);
    let entries = columns.checked_mul(columns).and_then(|entries| entries.checked_mul(groups));
    let is_large = entries.is_none_or(|entries| entries > MAX_ENTRIES);
    Some(if is_large {
        "it reads so many columns that their second moments would take more than half a gibibyte"
    } else {
        "it is not a product of rows as they lie there: its weight is on the left or has batches, or it is a convolution that is transposed, pads \
         by itself (auto_pad) or runs along three axes"
    })
}

fn window(node: &Node, weight: &[usize]) -> Option<Window> {
    let spatial = weight.len().checked_sub(2).filter(|n| (1..=2).contains(n))?;
    if node.text("auto_pad", "NOTSET") != "NOTSET" {
        return None;
    }
    let list = |name: &str, at: usize, default: usize| {
        let given = node.ints(name).map_or(Some(default), |l| usize::try_from(*l.get(at)?).ok());
        given.filter(|&n| n < MAX_GEOMETRY)
    };
    let pair = |name: &str, default: usize| -> Option<[usize; 2]> {
        Some([list(name, 0, default)?, if spatial == 2 { list(name, 1, default)? } else { default }])
    };
    let pads = match spatial {
        2 => [list("pads", 0, 0)?, list("pads", 1, 0)?, list("pads", 2, 0)?, list("pads", 3, 0)?],
        _ => [list("pads", 0, 0)?, 0, list("pads", 1, 0)?, 0],
    };
    Some(Window {
        kernel: [weight[2], if spatial == 2 { weight[3] } else { 1 }],
        strides: pair("strides", 1)?,
        dilations: pair("dilations", 1)?,
        pads,
        groups: usize::try_from(node.int("group", 1)).ok().filter(|&g| g > 0 && weight[0].is_multiple_of(g))?,
        thinned_for: None,
    })
}

/// The rows of zeros in the weight of node `id` whose inputs are multiplied apart, where `encoding` has a 0 for them.
fn kept_rows(graph: &Graph, id: NodeId, encoding: &Encoding) -> Vec<usize> {
    let has_zero = encoding.grid.nearest(0.0) == 0.0;
    ops::kept_rows(graph, id).filter(|_| has_zero).map_or_else(Vec::new, |kept| kept.rows)
}

impl<'a> Layer<'a> {
    /// The encoded weight of node `id`; `None` where it has none or is no matrix.
    pub(super) fn of(model: &'a Model, id: NodeId) -> Option<Self> {
        let graph = model.graph();
        let roles = ops::linear(graph, id)?;
        let node = graph.node(id)?;
        let site = Site::Use { node: id, input: roles.weight };
        let encoding = model.plan().encoding(site)?;
        let tensor = graph.constant_input(node, roles.weight.into())?;
        let (value, cut) = rows_of(graph, id, &roles)?;
        let rows = tensor.shape()[roles.out_axis];
        let columns = tensor.len().checked_div(rows)?;
        let gram = model.stats().gram(value, cut).filter(|gram| gram.columns == columns).cloned();
        let bias = roles.bias.map(|input| Site::Use { node: id, input });
        let layer = Self {
            node: id,
            site,
            tensor,
            encoding,
            rows,
            columns,
            groups: cut.groups(),
            transposed: roles.out_axis == 1,
            gram,
            trust: Trust::default(),
            target: None,
            centered: bias.is_some_and(|bias| model.plan().encoding(bias).is_some()),
            kept: kept_rows(graph, id, encoding).into(),
        };
        let along_rows = match encoding.granularity {
            Granularity::Tensor => true,
            Granularity::Dynamic | Granularity::DynamicBlocks { .. } | Granularity::DynamicRows { .. } => false,
            Granularity::Axis(axis) => axis == roles.out_axis,
            Granularity::Block { axis, .. } => axis != roles.out_axis && tensor.shape().len() == 2,
        };
        (along_rows && layer.rows.is_multiple_of(layer.groups)).then_some(layer)
    }

    /// Whether second moments of its input were measured.
    pub(super) fn has_gram(&self) -> bool {
        self.gram.is_some()
    }

    /// Whether rows do not share scales, so that each can have those that fit it.
    pub(super) fn scales_are_own(&self) -> bool {
        self.encoding.granularity != Granularity::Tensor || self.rows == 1
    }

    /// Columns of zeros, whose inputs are multiplied apart.
    pub(super) fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// The position of (row, column) in the stored weight.
    pub(super) fn index(&self, row: usize, column: usize) -> usize {
        if self.transposed { column * self.rows + row } else { row * self.columns + column }
    }

    /// The number of columns that share a scale.
    pub(super) fn block(&self) -> usize {
        match self.encoding.granularity {
            Granularity::Block { size, .. } => size.clamp(1, self.columns.max(1)),
            _ => self.columns.max(1),
        }
    }

    /// Blocks in a row.
    pub(super) fn blocks(&self) -> usize {
        self.columns.div_ceil(self.block())
    }

    /// The position of the scale of a block of a row.
    pub(super) fn scale_index(&self, row: usize, block: usize) -> usize {
        match self.encoding.granularity {
            Granularity::Tensor
            | Granularity::Dynamic
            | Granularity::DynamicBlocks { .. }
            | Granularity::DynamicRows { .. } => 0,
            Granularity::Axis(_) => row,
            Granularity::Block { .. } if self.transposed => block * self.rows + row,
            Granularity::Block { .. } => row * self.blocks() + block,
        }
    }

    /// The same layer behind rounded ones: with the moments of what it reads then, and with a bias that takes the mean error
    /// back, or without.
    pub(super) fn behind(self, gram: Arc<Gram>, centered: bool) -> Self {
        Self { gram: Some(gram).filter(|gram| gram.columns == self.columns), centered, ..self }
    }

    /// The same layer with its weight in another encoding, which cuts it alike.
    pub(super) fn written<'e>(&self, encoding: &'e Encoding) -> Layer<'e>
    where
        'a: 'e,
    {
        Layer { encoding, ..self.clone() }
    }

    /// The same layer with another weight to imitate.
    pub(super) fn towards(self, target: Option<Vec<f32>>) -> Self {
        Self { target: target.map(Arc::from), ..self }
    }

    /// The same layer with other moments of what it reads.
    pub(super) fn measured_by(&self, gram: Arc<Gram>) -> Self {
        Self { gram: Some(gram).filter(|gram| gram.columns == self.columns), ..self.clone() }
    }

    /// The same layer with H = (1 − η) C + η A tr C / tr A for the share η, C being the moments of what it reads and A those of the
    /// gradients of its weight, on a float input that lies `drift` from what it reads; as it is where either tells nothing.
    ///
    /// Source: Edalati et al. 2024 (OAC), arXiv:2405.15025; the mix ours.
    #[expect(clippy::cast_possible_truncation, reason = "moments are f32")]
    pub(super) fn adapted(&self, moments: &WeightMoments, share: f64, drift: Option<&Cross>) -> Self {
        let fits = moments.columns == self.columns && moments.groups() == self.groups;
        let Some(gram) = self.gram.as_ref().filter(|_| fits && share > 0.0) else { return self.clone() };
        let d = self.columns;
        // `shrunk` keeps off the diagonal what C is worth: of A less is kept, where it is worth less.
        let keep = (moments.kept() / self.share_kept().max(f64::MIN_POSITIVE)).min(1.0);
        let mut mixed = Gram::clone(gram);
        for group in 0..self.groups {
            let (h, means) = (gram.group(group), gram.group_means(group));
            let mean = |j: usize| if self.centered { f64::from(means[j]) } else { 0.0 };
            // Gradients are of what the float model reads.
            let moved = drift.filter(|_| self.centered).map(|drift| drift.group_means(group));
            let float = |j: usize| mean(j) + moved.map_or(0.0, |moved| moved[j]);
            let own = |i: usize, j: usize| f64::from(h[i * d + j]) - mean(i) * mean(j);
            let other = |i: usize, j: usize| {
                moments.centered(group, (i, j), (float(i), float(j))) * if i == j { 1.0 } else { keep }
            };
            let trace = |of: &dyn Fn(usize, usize) -> f64| (0..d).map(|j| of(j, j).max(0.0)).sum::<f64>();
            let (of_own, of_other) = (trace(&own), trace(&other));
            let share = if of_own > 0.0 && of_other > 0.0 { share } else { 0.0 };
            let scale = if share > 0.0 { share * of_own / of_other } else { 0.0 };
            let into = mixed.moments[group * d * d..][..d * d].chunks_exact_mut(d).enumerate();
            into.for_each(|(i, row)| {
                let entry = |j: usize| ((1.0 - share) * own(i, j) + scale * other(i, j)) as f32;
                row.iter_mut().enumerate().for_each(|(j, v)| *v = entry(j));
            });
            // They are taken away already.
            mixed.means[group * d..][..d].fill(0.0);
        }
        Self { gram: Some(Arc::new(mixed)), ..self.clone() }
    }

    /// The same layer, its moments being trusted so far.
    pub(super) fn trusted(&self, trust: Trust) -> Self {
        Self { trust, ..self.clone() }
    }

    /// What rounding should come near to, in the order in which it is stored.
    pub(super) fn goal(&self) -> Option<std::borrow::Cow<'_, [f32]>> {
        self.target.as_deref().map(std::borrow::Cow::Borrowed).or_else(|| self.weights())
    }

    /// The means of the columns of `group`, where a bias takes back what they carry.
    pub(super) fn means(&self, group: usize) -> Option<&[f32]> {
        self.gram.as_ref().filter(|_| self.centered).map(|gram| gram.group_means(group))
    }

    /// How far its moments are trusted.
    #[cfg(test)]
    pub(super) fn trust(&self) -> Trust {
        self.trust
    }

    /// The share that is kept of what was measured off the diagonal: few rows overfit.
    pub(super) fn share_kept(&self) -> f64 {
        let effective = self.trust.rows * self.gram.as_ref().map_or(0.0, |gram| gram.effective);
        effective / (effective + self.columns as f64)
    }

    /// The weight in the order in which it is stored.
    pub(super) fn weights(&self) -> Option<std::borrow::Cow<'a, [f32]>> {
        self.tensor.floats()
    }

    /// The points (code less zero point) that `codes` stand for, in the order of storage.
    #[expect(clippy::cast_possible_truncation, reason = "points of grids of up to 16 bits are exact in f32")]
    pub(super) fn points(&self, codes: &Tensor) -> Vec<f32> {
        let mut points: Vec<f32> =
            encoding::unpack(codes).into_iter().map(|code| self.encoding.grid.decode(code) as f32).collect();
        if !self.encoding.is_symmetric() {
            for row in 0..self.rows {
                for column in 0..self.columns {
                    let zero = self.encoding.zero_point[self.scale_index(row, column / self.block())];
                    points[self.index(row, column)] -= zero as f32;
                }
            }
        }
        points
    }

    /// The matrix H whose quadratic form is the squared error of the output of `group`; `None` where nothing was measured.
    ///
    /// Few rows overfit: off the diagonal H is shrunk by α = d / (n + d) for n effective rows (diagonal shrinkage keeps what
    /// nearest rounding would minimize), and its [`Trust`] may add to the diagonal. Where a bias takes the mean error back, H is the
    /// covariance.
    pub(super) fn quadratic(&self, group: usize) -> Option<Vec<f32>> {
        self.shrunk(group, self.share_kept(), self.trust.floor)
    }

    /// The same as it was measured.
    pub(super) fn raw_quadratic(&self, group: usize) -> Option<Vec<f32>> {
        self.shrunk(group, 1.0, 0.0)
    }

    #[expect(clippy::cast_possible_truncation, reason = "a factor between 0 and 1, and moments in f32")]
    fn shrunk(&self, group: usize, keep: f64, floor: f64) -> Option<Vec<f32>> {
        let gram = self.gram.as_ref()?;
        let d = self.columns;
        let mut h = gram.group(group).to_vec();
        let means = gram.group_means(group);
        let keep = keep as f32;
        for (i, row) in h.chunks_exact_mut(d).enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                if self.centered {
                    *value -= means[i] * means[j];
                }
                *value = if i == j { value.max(0.0) } else { *value * keep };
            }
        }
        // What is multiplied apart has no say: nearest, its codes stay 0.
        for &k in &*self.kept {
            h[k * d..][..d].fill(0.0);
            h.iter_mut().skip(k).step_by(d).for_each(|v| *v = 0.0);
        }
        if floor > 0.0 {
            let mean = h.iter().step_by(d + 1).map(|v| f64::from(*v)).sum::<f64>() / d.max(1) as f64;
            h.iter_mut().step_by(d + 1).for_each(|v| *v += (floor * mean) as f32);
        }
        // A channel beyond what f32 holds squared would make nonsense of every row.
        h.iter().all(|v| v.is_finite()).then_some(h)
    }
}
