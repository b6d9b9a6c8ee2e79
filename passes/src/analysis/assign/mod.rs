//! Which nodes run on codes, and how each of their tensors is written.

mod encode;
mod formats;
mod logarithm;
mod parameters;
mod select;
mod tables;
mod weights;
mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use crate::caches;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::encoding::Encoding;
use crate::grid::{self, Grid};
use crate::id::{NodeId, ValueId};
use crate::ir::{Graph, Node};
use crate::model::{Decision, Edit, Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo, Wish};
use crate::target::{Accepts, Scheme};
use crate::tensor::Tensor;
use crate::{observe, ops};
pub(super) use weights::{WeightScale, holds_zero};
use width::Wide;

crate::declare_pass! {
    /// Decides which nodes run on codes and how each of their tensors is written.
    ///
    /// The target's table says which operators it runs on codes, when that pays, and what their results must be. Heavy
    /// operators (convolutions, matrix products) come first; cheap ones follow where all their activations are codes
    /// already and someone quantized reads the result. Activations are asymmetric per tensor, with zero at the lowest code
    /// for tensors that are never negative; weights symmetric per output channel; biases 32-bit at input scale times
    /// weight scale, the weight scale raised where a bias would not fit. A tensor that a float node reads too is rounded
    /// only for its quantized readers, unless its producer must write codes; one of which readers want other bits (`others`), for each. Every decision records its reason.
    INFO {
        name: "assign-encodings",
        source: "Jacob et al. 2018, arXiv:1712.05877, section 2; placement after the target's measured rules",
        cost: "One look at the sketch of every tensor and, for ranges by least squares, 20 to 60 roundings of every weight. No data.",
        requires: Facts::CALIBRATED,
        establishes: Facts::ENCODED,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[
            OptionInfo { name: "observer", doc: "how activation ranges are chosen: min-max, percentile, mse (default), entropy" },
            OptionInfo { name: "products", doc: "the same for what matrix products read, where outliers carry meaning; as observer by default" },
            OptionInfo { name: "keep", doc: "the share that percentile keeps, 0.9999 by default" },
            OptionInfo { name: "least-db", doc: "matrix products whose activation would keep fewer decibels of its usual values stay in float; off by default" },
            OptionInfo { name: "reach", doc: "the share of a token's range that its codes span, in schemes of `tok`: 0.9 for 4 bits and fewer, else 1" },
            OptionInfo {
                name: "formats",
                doc: "asked (default): that of the scheme; search: of all small floats of as many bits the one that fits each weight best; both: activations of fixed ranges too, format and range together",
            },
            OptionInfo {
                name: "others",
                doc: "bits of integers, of fixed ranges, for activations that no layer or matrix product multiplies and for what the model is given, where the scheme has fewer; as the scheme says by default, and where its activations are floats",
            },
            OptionInfo { name: "weights", doc: "how weight scales are chosen: min-max, mse (default), or cfp, which cuts outliers off long rows" },
        ],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(AssignEncodings::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct AssignEncodings {
    observer: Box<dyn observe::Observer>,
    /// For what matrix products read.
    products: Box<dyn observe::Observer>,
    weights: WeightScale,
    /// Matrix products whose activation keeps fewer decibels than this stay in float.
    least: Option<f64>,
    /// What share of a token's range its codes span.
    reach: Option<f64>,
    /// Whether every weight has the small float that fits it best.
    search: bool,
    /// Whether activations of fixed ranges have, too.
    fits: bool,
    /// Bits of activations that nothing multiplies, and of what the model is given, where the scheme has fewer.
    others: Option<u32>,
}

/// That share for integers of 4 bits and fewer: what is cut off costs less than finer steps gain. Source: Ashkboos et al. 2024,
/// arXiv:2404.00456, section 5.
const REACH: f32 = 0.9;

impl AssignEncodings {
    /// What share of a token's range its codes span.
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and 1")]
    fn reach(&self, cx: &PassContext<'_>) -> f32 {
        let narrow = cx.scheme.activation_format.is_none() && cx.scheme.activation_bits.is_some_and(|bits| bits <= 4);
        self.reach.map_or(if narrow { REACH } else { 1.0 }, |reach| reach as f32)
    }

    /// The scheme of activations that have more bits than `scheme` says, where there are any.
    fn others(&self, scheme: Scheme) -> Option<Scheme> {
        let more = self.others.filter(|more| scheme.activation_bits.is_some_and(|bits| bits < *more));
        let activation_bits = more.filter(|_| scheme.activation_format.is_none())?;
        Some(Scheme { activation_bits: Some(activation_bits), ..scheme })
    }

    fn new(options: &Options) -> Result<Self, OptionError> {
        let keep = options.number("keep")?;
        let find = |option: &str, name: &str| {
            observe::find(name, keep).ok_or_else(|| {
                let names: Vec<&str> = observe::OBSERVERS.iter().map(|entry| entry.about.name).collect();
                OptionError { option: option.into(), problem: format!("`{name}` is none of {}", names.join(", ")) }
            })
        };
        let name = options.text("observer", "mse");
        let observer = find("observer", name)?;
        let products = find("products", options.text("products", name))?;
        let reach = options.number("reach")?;
        if reach.is_some_and(|reach| !(0.1..=1.0).contains(&reach)) {
            return Err(OptionError { option: "reach".into(), problem: "it must lie between 0.1 and 1".into() });
        }
        let (search, fits) = match options.text("formats", "asked") {
            "asked" => (false, false),
            "search" => (true, false),
            "both" => (true, true),
            other => {
                let problem = format!("`{other}` is none of asked, search, both");
                return Err(OptionError { option: "formats".into(), problem });
            }
        };
        let others = match options.count("others", 0)? {
            0 => None,
            bits @ (2..=8 | 16) => u32::try_from(bits).ok(),
            _ => {
                return Err(OptionError {
                    option: "others".into(),
                    problem: "integers have 2 to 8 bits, or 16".into(),
                });
            }
        };
        let weights = WeightScale::of(options)?;
        Ok(Self { observer, products, weights, least: options.number("least-db")?, reach, search, fits, others })
    }
}

/// How a node is to be written.
#[derive(Clone, Copy)]
struct Goal {
    scheme: Scheme,
    weights: WeightScale,
    weight_grid: &'static dyn Grid,
    accepts: &'static Accepts,
}

/// How nodes are to be written: all alike but those that the user named.
struct Goals {
    base: Goal,
    by_node: BTreeMap<NodeId, Goal>,
    /// Those whose format was searched for, which come before the others.
    found: BTreeMap<NodeId, Goal>,
}

impl Goals {
    fn new(model: &Model, cx: &PassContext<'_>, weights: WeightScale) -> Result<Self, PassError> {
        let goal = |scheme: Scheme| {
            Goal::new(scheme, weights, cx.target.accepts()).ok_or_else(|| {
                PassError::Model(format!("scheme {scheme}: there are no weights of {} bits", scheme.weight_bits))
            })
        };
        let mut by_node = BTreeMap::new();
        for (id, node) in model.graph().nodes() {
            let weight = ops::linear(model.graph(), id).and_then(|roles| node.input(roles.weight.into()));
            let by_name = |name: &str| cx.schemes.get(name);
            let asked = by_name(&node.name).or_else(|| by_name(&model.graph().value(weight?).name));
            if let Some(scheme) = asked {
                by_node.insert(id, goal(*scheme)?);
            }
        }
        Ok(Self { base: goal(cx.scheme)?, by_node, found: BTreeMap::new() })
    }

    fn of(&self, node: NodeId) -> &Goal {
        self.found.get(&node).or_else(|| self.by_node.get(&node)).unwrap_or(&self.base)
    }
}

/// The edits that write the weight of the encoded linear node `id`, and its bias, in another scheme of the same activations.
pub(super) fn reencode(
    model: &Model,
    id: NodeId,
    (scheme, weights): (Scheme, WeightScale),
    accepts: &'static Accepts,
) -> Option<Vec<Edit>> {
    let goal = Goal::new(scheme, weights, accepts)?;
    let graph = model.graph();
    let roles = ops::linear(graph, id)?;
    match model.plan().encoding_of_use(graph, id, roles.activation) {
        Some(input) if !input.granularity.is_dynamic() => {
            Some(parameters::parameters(model, id, *input.scale.first()?, &goal)?.edits)
        }
        _ => Some(vec![parameters::weight_alone(model, id, &goal)?]),
    }
}

/// How `tensor` would be written in the place of the weight of product `id`, whose activation has no fixed range.
pub(super) fn encoding_in_place(
    graph: &Graph,
    id: NodeId,
    tensor: &Tensor,
    (scheme, weights): (Scheme, WeightScale),
    accepts: &'static Accepts,
) -> Option<Encoding> {
    let goal = Goal::new(scheme, weights, accepts)?;
    parameters::of_weight(tensor, graph.node(id)?, ops::linear(graph, id)?.out_axis, &goal)
}

impl Goal {
    fn new(scheme: Scheme, weights: WeightScale, accepts: &'static Accepts) -> Option<Self> {
        let scheme = accepts.completed(scheme);
        let grid = weights::weight_grid(&scheme)?;
        let narrow = || grid::find(&format!("{}-narrow", grid.info().about.name)).unwrap_or(grid);
        let weight_grid = if accepts.narrow && scheme.block.is_none() { narrow() } else { grid };
        Some(Self { scheme, weights, weight_grid, accepts })
    }

    /// Whether the weight of `node` has one scale per output channel.
    fn by_channel(&self, node: &Node) -> bool {
        self.accepts.per_channel(&node.op)
    }

    /// Integers of as many bits as activations have.
    fn integers(&self, unsigned: bool) -> &'static dyn Grid {
        let bits = self.scheme.activation_bits.unwrap_or(8);
        let name = format!("{}int{bits}{}", if unsigned { "u" } else { "" }, if bits < 4 { "-in-8" } else { "" });
        grid::find(&name).unwrap_or_else(|| unreachable!("schemes name grids that are in the table"))
    }

    fn activation_grid(&self) -> &'static dyn Grid {
        if let Some(format) = self.scheme.activation_block() {
            return format.element;
        }
        let Some(name) = self.scheme.activation_format else { return self.integers(true) };
        grid::find(name).unwrap_or_else(|| unreachable!("schemes name grids that are in the table"))
    }
}

impl Pass for AssignEncodings {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn wishes(&self, model: &Model, cx: &PassContext<'_>) -> BTreeSet<(ValueId, Wish)> {
        let values = match cx.scheme.fixes_ranges() {
            true => select::wishes(model, cx.target, cx.keep_float),
            false if cx.scheme.measures() => {
                let selection = select::products(model, cx, &select::Coarse::new());
                encode::read_by_products(model.graph(), &selection)
            }
            // Only to tell which products lose too much.
            false
                if cx.scheme.dynamic.is_some()
                    && self.least.is_some()
                    && cx.dataset.is_some_and(|data| !data.is_empty()) =>
            {
                let selection = select::products(model, cx, &select::Coarse::new());
                encode::read_by_products(model.graph(), &selection)
            }
            false => BTreeSet::new(),
        };
        // What cuts ranges is judged by other samples than those that it goes by.
        let judges = self.observer.is_judged() || self.products.is_judged() || self.fits;
        let wishes = [Some(Wish::Distribution), judges.then_some(Wish::Judges)];
        values.into_iter().flat_map(|value| wishes.iter().flatten().map(move |wish| (value, *wish))).collect()
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let caches = caches::encoded(model.graph(), model.plan());
        let n = model.plan().encodings().count();
        if n > caches.len() {
            return Err(PassError::Model(format!(
                "the model is quantized already ({n} tensors are): give the float model it was made from"
            )));
        }
        let mut goals = Goals::new(model, cx, self.weights)?;
        if self.search {
            goals.found = formats::search(model, cx, &goals);
        }
        let formats = if self.fits { formats::of_activations(cx, &goals.base) } else { Vec::new() };
        if self.fits && formats.is_empty() {
            return Err(PassError::Model(format!(
                "formats=both: activations of scheme {} are no small floats with fixed ranges: ask for formats=search, or for a scheme such as \
                 wfp8afp8",
                cx.scheme
            )));
        }
        let observers = encode::Observers { usual: self.observer.as_ref(), products: self.products.as_ref(), formats };
        let select = |coarse: &select::Coarse| {
            if cx.scheme.fixes_ranges() {
                select::select(model, cx.target, cx.keep_float, coarse)
            } else {
                select::products(model, cx, coarse)
            }
        };
        let mut selection = select(&select::Coarse::new());
        // Steps of floats grow with the number: no outlier takes them away from the rest.
        let rounds = cx.scheme.activation_bits.is_some() && goals.base.activation_grid().info().integer;
        if let Some(least) = self.least.filter(|_| rounds) {
            let read = encode::read_by_products(model.graph(), &selection);
            let kept = encode::kept(model, &read, &read, &observers, &goals);
            selection = select(&kept.into_iter().filter(|(_, kept)| *kept < least).collect());
        }
        if cx.scheme.fixes_ranges() {
            let asked = self.others(cx.scheme);
            if let Some(problem) = asked.and_then(|scheme| cx.target.refuses(&scheme)) {
                return Err(PassError::Model(format!(
                    "what `others` asks of activations cannot be written: {problem}"
                )));
            }
            let others = asked.and_then(|scheme| Goal::new(scheme, self.weights, cx.target.accepts()));
            let wide = others.map(|_| Wide::of(model.graph(), &selection)).unwrap_or_default();
            let others = (&wide, &others.unwrap_or(goals.base));
            encode::encode(model, &selection, &observers, &goals, others, &mut patch);
        } else {
            encode::encode_products(model, &selection, &goals, self.reach(cx), &mut patch)?;
        }
        if let Some(goal) = cx.embeddings.and_then(|scheme| Goal::new(scheme, self.weights, cx.target.accepts())) {
            tables::encode(model, cx, (&goal, &goals), &mut selection, &mut patch)?;
        }
        for (node, choice) in &selection.choices {
            let quantized = choice.is_quantized();
            patch.count(if quantized { "quantized" } else { "kept float" }, 1);
            if let select::Choice::Float { reason, notable: true } = choice {
                let name = model.graph().node(*node).map(|n| Arc::clone(&n.name)).unwrap_or_default();
                patch.note(Diagnostic::new(diag::KEPT_FLOAT, Severity::Note, Place::Node(name), reason.clone()));
            }
            let mut reason = choice.reason();
            if let Some(goal) = goals.by_node.get(node).filter(|_| quantized) {
                let _ = write!(reason, "; {} by `--set`", goal.scheme);
            }
            if let Some(goal) = goals.found.get(node).filter(|_| quantized) {
                let _ = write!(reason, "; {} fits its weight best", goal.weight_grid.info().about.name);
                patch.count("formats found", 1);
            }
            patch.edit(Edit::Decide { node: *node, decision: Decision { quantized, reason } });
        }
        Ok(patch)
    }
}
