//! Caches whose channels are of one size.

use crate::caches::{self, Cache};
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::exec::Dataset;
use crate::id::ValueId;
use crate::ir::{Attrs, Graph, Node, OpKey};
use crate::model::{Edit, Model, Patch, Plan};
use crate::pass::{Facts, Pass, PassContext, PassEntry, PassError, PassInfo};
use crate::simulate::Simulation;
use crate::tensor::Tensor;

crate::declare_pass! {
    /// Keeps caches in another basis: every channel of every head less the middle of its range, over half of it.
    ///
    /// ```text
    /// past = past' · s + z,   present' = [past', (new − z) / s]
    /// ```
    ///
    /// A row of codes has one range for all of its channels; where those are of one size, few bits go further. What the model computes
    /// with stays as it was, and so does what it returns but for the caches, which only it reads. Two operations per number of the past and
    /// two per new one, when the model runs. Samples must come without a past, which would be in the old basis: otherwise, and without
    /// samples, caches stay as they are.
    INFO {
        name: "smooth-caches",
        source: "Yue et al. 2024 (WKVQuant), arXiv:2402.12065, section 3.2, the static part of its two-dimensional quantization",
        cost: "One forward pass of the float model per sample.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[],
    }
}

pub(super) const ENTRY: PassEntry = PassEntry { info: &INFO, build: |_| Ok(Box::new(SmoothCaches)) };

/// See [`INFO`].
#[derive(Debug)]
struct SmoothCaches;

/// The least and the largest of every channel.
type Ranges = Vec<(f32, f32)>;

impl Pass for SmoothCaches {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let graph = model.graph();
        // Those that are apart have been smoothed, or are read in a way of their own.
        let whole = |cache: &Cache| !cache.is_apart && cache.axis > 0;
        let caches: Vec<Cache> = caches::find(graph).0.into_iter().filter(whole).collect();
        let Some(dataset) = cx.dataset.filter(|data| !data.is_empty() && !caches.is_empty()) else {
            return Ok(patch);
        };
        let mut outputs = graph.outputs().to_vec();
        let mut names = Vec::new();
        let measured = match measure(graph, cx, dataset, &caches)? {
            Ok(measured) => measured,
            Err((past, sample)) => {
                let place = Place::Value(graph.value(past).name.clone());
                let message = format!(
                    "smooth-caches: {sample} brings a past, whose numbers would mean something else: caches stay as they are; give samples \
                     with none"
                );
                patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, place, message));
                return Ok(patch);
            }
        };
        for (cache, ranges) in caches.iter().zip(measured) {
            let Some(shape) =
                constants_shape(graph, cache).filter(|shape| shape.iter().product::<usize>() == ranges.len())
            else {
                let place = Place::Value(graph.value(cache.past).name.clone());
                let message = "smooth-caches: the extents of its channels are not known";
                patch.note(Diagnostic::new(diag::BLOCKED_REWRITE, Severity::Warning, place, message));
                continue;
            };
            let present = smooth(model, cache, &shape, &ranges, &mut patch);
            outputs.iter_mut().filter(|output| **output == cache.present).for_each(|output| *output = present);
            names.push((cache.present, present));
            patch.count("caches", 1);
        }
        if !names.is_empty() {
            patch.edit(Edit::Interface { inputs: graph.inputs().to_vec(), outputs, names });
        }
        Ok(patch)
    }
}

/// The shape of one number per channel: 1 along the batch and along what grows.
fn constants_shape(graph: &Graph, cache: &Cache) -> Option<Vec<usize>> {
    let shape = graph.value(cache.past).ty.tensor()?.shape.as_ref()?;
    let extent = |(at, dim): (usize, &crate::ir::Dim)| if at == 0 || at == cache.axis { Some(1) } else { dim.known() };
    shape.iter().enumerate().map(extent).collect()
}

/// The ranges of the channels of what every cache takes in; or the past that a sample brings, and which.
fn measure(
    graph: &Graph,
    cx: &PassContext<'_>,
    dataset: &dyn Dataset,
    caches: &[Cache],
) -> Result<Result<Vec<Ranges>, (ValueId, String)>, PassError> {
    let taps: Vec<ValueId> = caches.iter().map(|cache| cache.new).collect();
    let float = Simulation::prepare(graph, &Plan::default(), cx.executor, &taps)?;
    let mut ranges: Vec<Ranges> = vec![Vec::new(); caches.len()];
    cx.progress.begin(INFO.about.name, dataset.len() as u64);
    for index in 0..dataset.len() {
        if cx.progress.cancelled() {
            return Err(PassError::Interrupted);
        }
        let feeds = dataset.sample(index)?;
        for cache in caches {
            let at = graph.inputs().iter().position(|input| *input == cache.past);
            if at.and_then(|at| feeds.get(at)).is_some_and(|past| !past.is_empty()) {
                return Ok(Err((cache.past, dataset.name(index))));
            }
        }
        for ((cache, ranges), new) in caches.iter().zip(&mut ranges).zip(float.run(&feeds)?) {
            widen(ranges, &new, cache);
        }
        cx.progress.step();
    }
    cx.progress.end();
    Ok(Ok(ranges))
}

/// Widens `ranges`, one per index of all axes but the first and the one along which `cache` grows, by the numbers of `tensor`.
fn widen(ranges: &mut Ranges, tensor: &Tensor, cache: &Cache) {
    let (shape, axis) = (tensor.shape(), cache.axis);
    let Some(values) = tensor.values::<f32>().filter(|_| shape.len() == cache.row.0 + 1) else { return };
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[1..axis].iter().product();
    let extent = shape[axis];
    if ranges.is_empty() {
        ranges.resize(outer * inner, (f32::INFINITY, f32::NEG_INFINITY));
    }
    if ranges.len() != outer * inner {
        return;
    }
    for (line, run) in values.chunks_exact(inner.max(1)).enumerate() {
        let first = line / extent.max(1) % outer.max(1) * inner;
        for ((low, high), v) in ranges[first..first + inner].iter_mut().zip(run).filter(|(_, v)| v.is_finite()) {
            (*low, *high) = (low.min(*v), high.max(*v));
        }
    }
}

/// Lets the model read `cache` out of the new basis; returns what the caller gets in it.
fn smooth(model: &Model, cache: &Cache, shape: &[usize], ranges: &Ranges, patch: &mut Patch) -> ValueId {
    let graph = model.graph();
    let one = |(low, high): &(f32, f32)| {
        let (half, middle) = ((high - low) / 2.0, f32::midpoint(*low, *high));
        match (half.is_normal(), middle.is_finite()) {
            (true, true) => (half, middle),
            // A constant.
            (false, true) => (1.0, middle),
            (_, false) => (1.0, 0.0),
        }
    };
    let (halves, middles): (Vec<f32>, Vec<f32>) = ranges.iter().map(one).unzip();
    let name = &graph.value(cache.past).name;
    let halves = patch.constant(&format!("{name}.halves"), Tensor::of(shape, halves));
    let middles = patch.constant(&format!("{name}.middles"), Tensor::of(shape, middles));
    let mut step = |op: &str, inputs: [ValueId; 2], name: &str, like: ValueId, attrs: Attrs| {
        let node = Node {
            name: name.into(),
            op: OpKey { domain: "".into(), name: op.into(), opset: model.meta.opset() },
            inputs: inputs.map(Some).to_vec(),
            outputs: Vec::new(),
            attrs,
            bodies: Vec::new(),
            notes: None,
        };
        patch.node(node, name, graph.value(like).ty.clone(), Some(cache.append))
    };
    let plain = Attrs::new;
    let wide = step("Mul", [cache.past, halves], &format!("{name}.wide"), cache.past, plain());
    let past = step("Add", [wide, middles], &format!("{name}.plain"), cache.past, plain());
    let centered = step("Sub", [cache.new, middles], &format!("{name}.centered"), cache.new, plain());
    let even = step("Div", [centered, halves], &format!("{name}.even"), cache.new, plain());
    let concat = graph.node(cache.append).cloned();
    let attrs = concat.as_ref().map(|node| node.attrs.clone()).unwrap_or_default();
    let both = format!("{}.even", graph.value(cache.present).name);
    let present = step("Concat", [cache.past, even], &both, cache.present, attrs);
    if let Some(concat) = concat {
        patch.replace(cache.append, Node { inputs: vec![Some(past), concat.input(1)], ..concat });
    }
    present
}
