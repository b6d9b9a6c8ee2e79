//! Graphs from the wire, bodies included.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use passes::diag::{self, Diagnostic, Place, Severity};
use passes::id::{Name, ValueId};
use passes::ir::{Attrs, Body, Builder, Graph, Node, Notes, OpKey};
use passes::ops;
use passes::tensor::Tensor;
use proto::onnx::attribute_proto::AttributeType;
use proto::onnx::{AttributeProto, GraphProto, NodeProto};

use super::function::{Library, Versioned};
use super::{ImportError, attribute, name, opset, tensor, types};
use crate::load::ExternalFiles;

/// What import needs besides the graph.
pub(super) struct Context<'a> {
    pub(super) opsets: &'a BTreeMap<Name, u32>,
    pub(super) functions: &'a Library,
    pub(super) files: &'a mut ExternalFiles,
    pub(super) notes: &'a mut Vec<Diagnostic>,
    /// Bodies around what is being read.
    pub(super) depth: usize,
}

/// Bodies inside bodies deeper than this are refused: a function that calls itself from a body never ends.
const MAX_DEPTH: usize = 48;

type Versions = BTreeMap<Name, u32>;

/// The domain of `node`, empty for ai.onnx.
pub(super) fn domain(node: &NodeProto) -> &str {
    if node.domain() == "ai.onnx" { "" } else { node.domain() }
}

/// An error about `node`, named by its first output where it has no name.
pub(super) fn node_error(node: &NodeProto, problem: impl Into<String>) -> ImportError {
    let named = if node.name().is_empty() { node.output.first().map_or("", String::as_str) } else { node.name() };
    ImportError::Node { node: named.to_owned(), op: node.op_type().to_owned(), problem: problem.into() }
}

/// The main graph.
pub(super) fn import(wire: GraphProto, mut context: Context<'_>) -> Result<Graph, ImportError> {
    let mut counter = 0;
    Ok(scope(wire, None, &mut context, &mut counter)?.finish()?)
}

/// One graph; what it reads and does not define stays undefined in the builder. `versions`: those of the function that the
/// graph is a body in, where they are not the model's.
fn scope(
    wire: GraphProto,
    versions: Option<&Versions>,
    context: &mut Context<'_>,
    counter: &mut usize,
) -> Result<Builder, ImportError> {
    let mut builder = Builder::new(wire.name(), wire.doc_string());
    let nodes = context.functions.inlined(wire.node, counter)?;
    // Every name of the file is taken before any is made up.
    for named in nodes.iter().flat_map(|v| &v.node.output).filter(|output| !output.is_empty()) {
        builder.value(named);
    }
    let mut constants: Vec<(&str, Arc<Tensor>)> = Vec::new();
    for initializer in &wire.initializer {
        constants.push((initializer.name(), tensor::tensor(initializer, context.files)?));
    }
    for sparse in &wire.sparse_initializer {
        let named = sparse.values.as_ref().map_or("", |v| v.name());
        constants.push((named, tensor::densified(sparse, context.files)?));
    }
    // An input with an initializer is a constant: old exporters list every weight as an input.
    let initialized: BTreeSet<&str> = constants.iter().map(|(named, _)| *named).collect();
    for input in wire.input.iter().filter(|input| !initialized.contains(input.name())) {
        builder.input(input.name(), types::of_info(input))?;
    }
    for (named, tensor) in constants {
        builder.constant(named, tensor)?;
    }
    for output in &wire.output {
        builder.value(output.name());
    }
    // Entries for tensors that are no more are usual; what an input or a constant is, it says itself.
    for info in wire.value_info.iter().chain(&wire.output) {
        if let Some(value) = builder.find(info.name()).filter(|_| !builder.is_defined(info.name())) {
            builder.set_type(value, types::of_info(info));
        }
    }
    for mut versioned in nodes {
        versioned.opsets = versioned.opsets.or_else(|| versions.cloned());
        node(versioned, &mut builder, context, counter)?;
    }
    for output in &wire.output {
        builder.output(output.name());
    }
    Ok(builder)
}

fn node(
    versioned: Versioned,
    builder: &mut Builder,
    context: &mut Context<'_>,
    counter: &mut usize,
) -> Result<(), ImportError> {
    let Versioned { node: wire, opsets } = versioned;
    let domain = domain(&wire).to_owned();
    if domain.is_empty() && wire.op_type() == "Constant" {
        return constant(&wire, builder, context);
    }
    let versions = opsets.as_ref().unwrap_or(context.opsets);
    let version = versions.get(domain.as_str()).or_else(|| context.opsets.get(domain.as_str())).copied();
    let Some(version) = version else {
        return Err(node_error(&wire, format!("its domain `{domain}` is not in the model's opset imports")));
    };
    let mut read = |text: &String| (!text.is_empty()).then(|| builder.value(text));
    let mut inputs: Vec<Option<ValueId>> = wire.input.iter().map(&mut read).collect();
    let outputs = wire.output.iter().map(&mut read).collect();
    while inputs.last().is_some_and(Option::is_none) {
        inputs.pop();
    }
    let mut attrs = Attrs::new();
    let mut bodies = Vec::new();
    for attribute in &wire.attribute {
        match attribute::kind(attribute) {
            AttributeType::Graph => bodies.push(body(attribute, &wire, opsets.as_ref(), builder, context, counter)?),
            AttributeType::Graphs => {
                return Err(node_error(&wire, "an attribute with a list of graphs is not supported"));
            }
            _ => {
                let value = attribute::import(attribute, context.files)?;
                if attrs.insert(name(attribute.name()), value).is_some() {
                    return Err(node_error(&wire, format!("attribute `{}` is given twice", attribute.name())));
                }
            }
        }
    }
    let op = OpKey { domain: name(&domain), name: name(wire.op_type()), opset: version };
    if ops::spec(&op).is_none() && !domain.is_empty() {
        let message =
            format!("operator {} is not known here: it is carried untouched and stays in float", op.display());
        let place = Place::Node(name(wire.name()));
        context.notes.push(Diagnostic::new(diag::OPAQUE_OPERATOR, Severity::Note, place, message));
    }
    let node = Node { name: name(wire.name()), op, inputs, outputs, attrs, bodies, notes: notes(&wire) };
    opset::add(builder, node).map_err(|problem| match problem {
        opset::Problem::Refused(problem) => node_error(&wire, problem),
        opset::Problem::Build(error) => error.into(),
    })
}

fn notes(wire: &NodeProto) -> Option<Arc<Notes>> {
    let entries: Vec<(String, String)> =
        wire.metadata_props.iter().map(|entry| (entry.key().to_owned(), entry.value().to_owned())).collect();
    let empty = wire.doc_string().is_empty() && entries.is_empty();
    (!empty).then(|| Arc::new(Notes { doc: wire.doc_string().to_owned(), entries }))
}

fn body(
    attribute: &AttributeProto,
    node: &NodeProto,
    versions: Option<&Versions>,
    builder: &mut Builder,
    context: &mut Context<'_>,
    counter: &mut usize,
) -> Result<Body, ImportError> {
    let graph = attribute.g.clone().ok_or_else(|| node_error(node, "a graph attribute is empty"))?;
    if context.depth >= MAX_DEPTH {
        return Err(node_error(node, format!("bodies nest more than {MAX_DEPTH} deep")));
    }
    context.depth += 1;
    let mut inner = scope(graph, versions, context, counter)?;
    context.depth -= 1;
    for captured in inner.undefined() {
        let outer = builder.value(&captured);
        let ty = builder.get(outer).ty.clone();
        inner.capture(&captured, outer, ty)?;
    }
    Ok(Body { attr: name(attribute.name()), graph: inner.finish()? })
}

/// A `Constant` node as a constant of the graph.
fn constant(wire: &NodeProto, builder: &mut Builder, context: &mut Context<'_>) -> Result<(), ImportError> {
    let output = wire.output.first().ok_or_else(|| node_error(wire, "a Constant without output"))?;
    let attribute = wire.attribute.first().ok_or_else(|| node_error(wire, "a Constant without value"))?;
    let strings = |shape: Vec<usize>, values: &[Vec<u8>]| {
        Tensor::strings(shape, values.iter().map(|s| bytes::Bytes::copy_from_slice(s)).collect())
            .map_err(|e| node_error(wire, e.to_string()))
    };
    let tensor = match (attribute.name(), &attribute.t, &attribute.sparse_tensor) {
        ("value", Some(t), _) => tensor::tensor(t, context.files)?,
        ("sparse_value", _, Some(sparse)) => tensor::densified(sparse, context.files)?,
        ("value_float", ..) => Arc::new(Tensor::scalar(attribute.f())),
        ("value_int", ..) => Arc::new(Tensor::scalar(attribute.i())),
        ("value_string", ..) => Arc::new(strings(Vec::new(), std::slice::from_ref(&attribute.s().to_vec()))?),
        ("value_floats", ..) => Arc::new(Tensor::of([attribute.floats.len()], attribute.floats.clone())),
        ("value_ints", ..) => Arc::new(Tensor::of([attribute.ints.len()], attribute.ints.clone())),
        ("value_strings", ..) => Arc::new(strings(vec![attribute.strings.len()], &attribute.strings)?),
        (other, ..) => return Err(node_error(wire, format!("a Constant with attribute `{other}` and no value"))),
    };
    builder.constant(output, tensor)?;
    Ok(())
}
