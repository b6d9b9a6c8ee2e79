//! Printing.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::id::{Name, Site, ValueId};
use crate::ir::{Attr, Graph, Node, Type, fresh_name, walk};
use crate::model::Model;
use crate::tensor::{DType, Tensor};

/// Constants of more elements are printed as digests.
const SHOWN: usize = 64;

/// The graph of `model`, with its opsets.
pub fn graph(model: &Model) -> String {
    let mut text = String::new();
    for (domain, version) in &model.meta.opsets {
        let space = if domain.is_empty() { "" } else { " " };
        let _ = writeln!(text, "opset {domain}{space}{version}");
    }
    print_graph(&mut text, model.graph(), 0);
    text.push('\n');
    text
}

/// The plan of `model`: every encoding, by place, then the float constants that were corrected.
pub fn plan(model: &Model) -> String {
    let mut text = String::from("plan {\n");
    let place = |site: Site| match site {
        Site::Value(value) => name(&model.graph().value(value).name, '%'),
        Site::Use { node, input } => {
            let node = model.graph().node(node).map_or("?", |node| &node.name);
            format!("{} input {input}", name(node, '@'))
        }
    };
    for (site, encoding) in model.plan().encodings() {
        let place = place(site);
        let grid = encoding.grid.info().about.name;
        let _ = write!(text, "  {place}: {grid} ");
        let _ = match (encoding.granularity, &*encoding.scale, &*encoding.zero_point) {
            (crate::encoding::Granularity::Tensor, [scale], [zero]) => {
                write!(text, "per-tensor, scale {scale:.6e}, zero {zero}")
            }
            (crate::encoding::Granularity::DynamicRows { axis, size }, reach, _) => {
                write!(text, "by rows of {size} along axis {axis} with the ranges of each run, reach {}", reach[0])
            }
            (crate::encoding::Granularity::Dynamic, ..) => write!(text, "with the range of each run"),
            (crate::encoding::Granularity::DynamicBlocks { axis, size }, scale, _) => {
                write!(text, "in blocks of {size} on axis {axis} with the scales of each run, factor {:.6e}", scale[0])
            }
            (granularity, scale, _) => {
                let (low, high) = scale.iter().fold((f32::MAX, 0.0_f32), |(a, b), &s| (a.min(s), b.max(s)));
                write!(text, "{granularity:?}, {} scales {low:.6e} to {high:.6e}", scale.len())
            }
        };
        if let Some(codes) = model.plan().codes(site) {
            let _ = write!(text, ", codes digest {:08x}", codes.digest());
        }
        text.push('\n');
    }
    for (site, tensor) in model.plan().substitutes() {
        let _ = writeln!(text, "  {}: {}", place(site), constant(tensor));
    }
    text.push_str("}\n");
    text
}

/// `sigil` and the name, quoted where it has to be.
fn name(text: &str, sigil: char) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:-".contains(c);
    // A colon at the end would be taken for the one before a type.
    if !text.is_empty() && text.chars().all(plain) && !text.ends_with(':') {
        format!("{sigil}{text}")
    } else {
        format!("{sigil}{}", quoted(text))
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn value(graph: &Graph, id: ValueId) -> String {
    name(&graph.value(id).name, '%')
}

fn typed(graph: &Graph, id: ValueId) -> String {
    let shown = value(graph, id);
    match &graph.value(id).ty {
        Type::Tensor(ty) if ty.dtype.is_some() || ty.shape.is_some() => format!("{shown}: {ty}"),
        Type::Tensor(_) => shown,
        Type::Opaque(_) => format!("{shown}: opaque"),
    }
}

fn list(graph: &Graph, ids: &[ValueId]) -> String {
    ids.iter().map(|&id| typed(graph, id)).collect::<Vec<_>>().join(", ")
}

fn print_graph(text: &mut String, graph: &Graph, depth: usize) {
    let indent = "  ".repeat(depth + 1);
    let _ = writeln!(text, "graph ({}) -> ({}) {{", list(graph, graph.inputs()), list(graph, graph.outputs()));
    let users = walk::Users::of(graph);
    for id in graph.value_ids().filter(|id| !users.of_value(*id).is_empty()) {
        if let Some(tensor) = graph.constant(id) {
            let _ = writeln!(text, "{indent}{} = {}", value(graph, id), constant(tensor));
        }
    }
    let mut names = BTreeSet::new();
    for (_, node) in graph.nodes() {
        let _ = write!(text, "{indent}");
        print_node(text, graph, node, &mut names, depth);
        text.push('\n');
    }
    let _ = write!(text, "{}}}", "  ".repeat(depth));
}

fn print_node(text: &mut String, graph: &Graph, node: &Node, names: &mut BTreeSet<Name>, depth: usize) {
    let refs = |ids: &[Option<ValueId>]| {
        let shown = ids.iter().map(|id| id.map_or_else(|| "_".to_owned(), |id| value(graph, id)));
        shown.collect::<Vec<_>>().join(", ")
    };
    let op = if node.op.domain.is_empty() {
        node.op.name.to_string()
    } else {
        format!("{}::{}", node.op.domain, node.op.name)
    };
    let _ = write!(text, "{} = {op}({})", refs(&node.outputs), refs(&node.inputs));
    let mut attrs: Vec<(&str, String)> = node.attrs.iter().map(|(key, attr)| (&**key, attribute(attr))).collect();
    for body in &node.bodies {
        let mut inner = String::new();
        print_graph(&mut inner, &body.graph, depth + 1);
        attrs.push((&body.attr, inner));
    }
    attrs.sort();
    if !attrs.is_empty() {
        let shown: Vec<String> = attrs.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        let _ = write!(text, " {{{}}}", shown.join(", "));
    }
    let made_up = fresh_name(&node.op.name, |taken| names.contains(taken));
    if *node.name != *made_up {
        let _ = write!(text, " {}", name(&node.name, '@'));
    }
    names.insert(node.name.clone());
}

/// A float that reads back the same and never looks like a whole number.
fn float(value: f32) -> String {
    let shown = format!("{value:?}");
    if value.is_nan() { "nan".into() } else { shown }
}

fn attribute(attr: &Attr) -> String {
    fn joined<T>(values: &[T], show: impl Fn(&T) -> String) -> String {
        format!("[{}]", values.iter().map(show).collect::<Vec<_>>().join(", "))
    }
    let text = |bytes: &bytes::Bytes| match std::str::from_utf8(bytes) {
        Ok(text) => quoted(text),
        Err(_) => format!("hex({})", hex(bytes)),
    };
    match attr {
        Attr::Int(value) => value.to_string(),
        Attr::Float(value) => float(*value),
        Attr::String(value) => text(value),
        Attr::Tensor(tensor) => constant(tensor),
        Attr::Ints(values) => joined(values, ToString::to_string),
        Attr::Floats(values) => joined(values, |v| float(*v)),
        Attr::Strings(values) => joined(values, text),
        Attr::Tensors(tensors) => joined(tensors, |t| constant(t)),
        Attr::Opaque(bytes) => format!("opaque({})", hex(bytes)),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn constant(tensor: &Tensor) -> String {
    let dims: Vec<String> = tensor.shape().iter().map(ToString::to_string).collect();
    format!("const {}[{}] {}", tensor.dtype().name(), dims.join(","), payload(tensor))
}

fn payload(tensor: &Tensor) -> String {
    fn all<T: std::fmt::Display>(values: impl IntoIterator<Item = T>) -> String {
        format!("[{}]", values.into_iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", "))
    }
    if tensor.len() > SHOWN {
        return format!("digest {:08x}{}", tensor.digest(), moments(tensor));
    }
    if let Some(strings) = tensor.as_strings() {
        return all(strings.iter().map(|s| quoted(&String::from_utf8_lossy(s))));
    }
    match tensor.dtype() {
        DType::F32 => all(tensor
            .floats()
            .unwrap_or_default()
            .iter()
            .map(|v| if v.is_nan() { "nan".into() } else { format!("{v}") })),
        DType::F64 => all(tensor.values::<f64>().unwrap_or_default().iter()),
        DType::Bool => all(tensor.bytes().iter().map(|b| *b != 0)),
        DType::U64 => all(tensor.values::<u64>().unwrap_or_default().iter()),
        dtype if dtype.is_integer() => all(tensor.integers().unwrap_or_default()),
        _ => format!("hex({})", hex(tensor.bytes())),
    }
}

/// Mean and standard deviation, for a glance at a large constant.
fn moments(tensor: &Tensor) -> String {
    let Some(values) = tensor.floats() else { return String::new() };
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    format!(" mean {mean:.3e} std {:.3e}", variance.sqrt())
}
