//! What a model costs on programmable logic, layer by layer, before anybody synthesizes it.
//!
//! Integers by FINN-R's formulas, minifloats by their published ratio to integers, single multiply-accumulates also as synthesized with
//! Yosys: every figure says where it comes from.

pub mod mac;
pub mod mvau;
pub mod sweep;

use passes::encoding;
use passes::grid::{self, Grid};
use passes::id::{NodeId, Site};
use passes::ir::{Graph, Node};
use passes::model::Model;
use passes::ops;
use passes::target::Scheme;
use serde_json::{Value, json};

use mac::{Format, Source};
use mvau::{Cost, Folding, Shape};

/// One layer and its cost.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The node.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// Its size.
    pub shape: Shape,
    /// Formats of weight and activation.
    pub formats: (Format, Format),
    /// Bits that its sums need.
    pub accumulator: u32,
    /// How much is computed at once.
    pub folding: Folding,
    /// What it takes.
    pub cost: Cost,
    /// How that is known.
    pub source: Source,
}

/// The linear layers of `model`: with the formats of their codes where they have some, of `scheme` otherwise. Layers in float, of unknown
/// size, or in formats that no circuit is known for, come back by name with the reason.
pub fn layers(model: &Model, scheme: Option<Scheme>, most: Folding) -> (Vec<Layer>, Vec<(String, String)>) {
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for (id, node) in model.graph().nodes() {
        if ops::linear(model.graph(), id).is_none() {
            continue;
        }
        match layer(model, (id, node), scheme, most) {
            Ok(layer) => known.push(layer),
            Err(reason) => unknown.push((node.name.to_string(), reason)),
        }
    }
    (known, unknown)
}

fn layer(model: &Model, (id, node): (NodeId, &Node), scheme: Option<Scheme>, most: Folding) -> Result<Layer, String> {
    let graph = model.graph();
    let roles = ops::linear(graph, id).ok_or("it has no weight")?;
    let shape = shape(graph, id, node).ok_or("its size is not known")?;
    let plan = model.plan();
    let site = Site::Use { node: id, input: roles.weight };
    let planned = plan.encoding(site).zip(plan.encoding_of_use(graph, id, roles.activation));
    let (weight, activation) = match (planned, scheme) {
        (Some((weight, activation)), _) => (weight.grid, activation.grid),
        (None, Some(scheme)) => {
            of_scheme(&scheme).ok_or_else(|| format!("{scheme} has no format for both operands"))?
        }
        (None, None) => return Err("it is float: say --scheme, or quantize it".into()),
    };
    let format =
        |grid: &dyn Grid| Format::of(grid).ok_or_else(|| format!("no circuit is known for {}", grid.info().about.name));
    let formats = (format(weight)?, format(activation)?);
    let signed = activation.range().0 < 0.0;
    let accumulator = of_codes(model, id).unwrap_or_else(|| match formats {
        (Format::Int { bits: w }, Format::Int { bits: a }) => mvau::accumulator_of_types(shape.inputs, w, a, signed),
        // For 1024 terms; more of them need a bit for every doubling.
        _ => mac::mac(formats.0, formats.1).accumulator + (shape.inputs.div_ceil(1024)).next_power_of_two().ilog2(),
    });
    let folding = Folding::within(&shape, most);
    let (cost, source) = mvau::cost(&shape, folding, formats, accumulator);
    let (name, op) = (node.name.to_string(), node.op.display());
    Ok(Layer { name, op, shape, formats, accumulator, folding, cost, source })
}

/// The grids of weights and activations that `scheme` names.
fn of_scheme(scheme: &Scheme) -> Option<(&'static dyn Grid, &'static dyn Grid)> {
    let named = |format: Option<&str>, bits: u32| match format {
        Some(name) => grid::find(name),
        None => grid::find(&format!("int{bits}")),
    };
    Some((named(scheme.weight_format, scheme.weight_bits)?, named(scheme.activation_format, scheme.activation_bits?)?))
}

/// Inputs, outputs and positions of a linear node; an open leading extent counts as one sample.
fn shape(graph: &Graph, id: NodeId, node: &Node) -> Option<Shape> {
    let roles = ops::linear(graph, id)?;
    let weight = graph.constant_input(node, roles.weight.into())?;
    let outputs = *weight.shape().get(roles.out_axis)?;
    let inputs = weight.len().checked_div(outputs)?;
    let dims = graph.value(node.output(0)?).ty.tensor()?.shape.as_ref()?;
    let channels = if node.op.is("Conv") { 1 } else { dims.len().checked_sub(1)? };
    let extent = |(at, dim): (usize, &passes::ir::Dim)| match dim.known() {
        _ if at == channels => Some(1),
        Some(n) => Some(n),
        None => (at == 0).then_some(1),
    };
    let pixels = dims.iter().enumerate().map(extent).try_fold(1_usize, |all, n| all.checked_mul(n?))?;
    inputs.checked_mul(outputs)?.checked_mul(pixels)?;
    Some(Shape { inputs, outputs, pixels })
}

/// The exact bound for the codes of `id`, where weight and activation are integers in codes.
#[expect(clippy::cast_possible_truncation, reason = "whole numbers of up to 16 bits")]
fn of_codes(model: &Model, id: NodeId) -> Option<u32> {
    let graph = model.graph();
    let roles = ops::linear(graph, id)?;
    let site = Site::Use { node: id, input: roles.weight };
    let (weight, codes) = (model.plan().encoding(site)?, model.plan().codes(site)?);
    let activation = model.plan().encoding_of_use(graph, id, roles.activation)?;
    let integers = weight.grid.info().integer && activation.grid.info().integer && weight.is_symmetric();
    (integers && (roles.out_axis == 0 || codes.shape().len() == 2)).then_some(())?;
    let zero = f64::from(*activation.zero_point.first()?);
    let (low, high) = activation.grid.range();
    let outputs = codes.shape()[roles.out_axis];
    let inputs = codes.len().checked_div(outputs)?;
    let all: Vec<i64> = encoding::unpack(codes).into_iter().map(|code| weight.grid.decode(code) as i64).collect();
    let at = |row: usize, column: usize| {
        all[if roles.out_axis == 0 { row * inputs + column } else { column * outputs + row }]
    };
    let rows: Vec<Vec<i64>> = (0..outputs).map(|row| (0..inputs).map(|column| at(row, column)).collect()).collect();
    let range = ((low - zero) as i64, (high - zero) as i64);
    Some(mvau::accumulator_of_codes(rows.iter().map(Vec::as_slice), range))
}

/// All layers side by side: lookup tables, memories and bits add up, the slowest layer sets the pace.
pub fn total(layers: &[Layer]) -> Cost {
    layers.iter().fold(Cost::default(), |sum, layer| Cost {
        lut: sum.lut + layer.cost.lut,
        dsp: sum.dsp + layer.cost.dsp,
        bram: sum.bram + layer.cost.bram,
        cycles: sum.cycles.max(layer.cost.cycles),
        weight_bits: sum.weight_bits + layer.cost.weight_bits,
    })
}

/// The figures for scripts, version 1.
pub fn as_json(layers: &[Layer], unknown: &[(String, String)]) -> Value {
    let figures = |cost: &Cost| json!({ "lut": cost.lut, "dsp": cost.dsp, "bram18": cost.bram, "cycles": cost.cycles, "weight_bits": cost.weight_bits, "lut_cycles": cost.area_time() });
    let row = |layer: &Layer| {
        let mac = mac::mac(layer.formats.0, layer.formats.1);
        json!({
            "name": layer.name, "op": layer.op, "inputs": layer.shape.inputs, "outputs": layer.shape.outputs, "pixels": layer.shape.pixels,
            "weight": layer.formats.0.to_string(), "activation": layer.formats.1.to_string(), "accumulator_bits": layer.accumulator,
            "pe": layer.folding.pe, "simd": layer.folding.simd, "cost": figures(&layer.cost), "source": layer.source.name(),
            "serial_mac": { "lut": mac.lut, "accumulator_bits": mac.accumulator, "source": mac.source.name() },
        })
    };
    json!({
        "version": 1,
        "layers": layers.iter().map(row).collect::<Vec<_>>(),
        "total": figures(&total(layers)),
        "not_counted": unknown.iter().map(|(name, reason)| json!({ "name": name, "reason": reason })).collect::<Vec<_>>(),
    })
}
