//! Local functions, inlined.

use std::collections::BTreeMap;

use passes::id::Name;
use proto::onnx::{AttributeProto, FunctionProto, GraphProto, NodeProto};

use super::{ImportError, graph};

/// Calls inside calls deeper than this are refused: a function that calls itself never ends.
const MAX_DEPTH: usize = 64;
/// The most nodes that inlining may make, and calls that it may follow, so that a small file cannot ask for billions.
const MAX_NODES: usize = 1_000_000;
const MAX_CALLS: usize = 200_000;

type Key = (String, String, String);

/// The model's own functions.
#[derive(Debug)]
pub(super) struct Library {
    functions: BTreeMap<Key, FunctionProto>,
}

fn key(domain: &str, name: &str, overload: &str) -> Key {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    (domain.to_owned(), name.to_owned(), overload.to_owned())
}

/// A node with the ai.onnx (and other) versions that it is written for.
pub(super) struct Versioned {
    pub(super) node: NodeProto,
    pub(super) opsets: Option<BTreeMap<Name, u32>>,
}

impl Library {
    pub(super) fn of(functions: Vec<FunctionProto>) -> Result<Self, ImportError> {
        let mut by_key = BTreeMap::new();
        for function in functions {
            let key = key(function.domain(), function.name(), function.overload());
            if let Some(twice) = by_key.insert(key, function) {
                return Err(ImportError::Model(format!("function `{}` is defined twice", twice.name())));
            }
        }
        Ok(Self { functions: by_key })
    }

    /// Adds the domains that functions import and the model does not.
    pub(super) fn add_domains(&self, opsets: &mut BTreeMap<Name, u32>) {
        for import in self.functions.values().flat_map(|f| &f.opset_import) {
            let domain = if import.domain() == "ai.onnx" { "" } else { import.domain() };
            if let Ok(version) = u32::try_from(import.version()) {
                opsets.entry(Name::from(domain)).or_insert(version);
            }
        }
    }

    /// `nodes` with every call replaced by the nodes of its function. Names inside are made unique.
    pub(super) fn inlined(&self, nodes: Vec<NodeProto>, counter: &mut usize) -> Result<Vec<Versioned>, ImportError> {
        let mut out = Vec::with_capacity(nodes.len());
        for node in nodes {
            self.inline(Versioned { node, opsets: None }, 0, counter, &mut out)?;
        }
        Ok(out)
    }

    fn inline(
        &self,
        call: Versioned,
        depth: usize,
        counter: &mut usize,
        out: &mut Vec<Versioned>,
    ) -> Result<(), ImportError> {
        let node = &call.node;
        let Some(function) = self.functions.get(&key(node.domain(), node.op_type(), node.overload())) else {
            out.push(call);
            return Ok(());
        };
        let refuse = |problem: String| graph::node_error(node, problem);
        if depth >= MAX_DEPTH {
            return Err(refuse(format!("functions call each other more than {MAX_DEPTH} deep")));
        }
        if out.len() > MAX_NODES {
            return Err(refuse(format!("inlining functions makes more than {MAX_NODES} nodes")));
        }
        *counter += 1;
        if *counter > MAX_CALLS {
            return Err(refuse(format!("the model makes more than {MAX_CALLS} function calls")));
        }
        let prefix =
            format!("{}/{}#{counter}", if node.name().is_empty() { "call" } else { node.name() }, function.name());
        let renaming = Renaming::of(function, node, &prefix);
        let opsets = super::versions(&function.opset_import)?;
        for inner in &function.node {
            let mut inner = inner.clone();
            let attributes = Attributes { call: node, function };
            renaming.apply(&mut inner);
            attributes.resolve(&mut inner);
            let inner = Versioned { node: inner, opsets: Some(opsets.clone()) };
            self.inline(inner, depth + 1, counter, out)?;
        }
        // An output that is an input of the function, or repeated, needs a node of its own.
        for (formal, actual) in function.output.iter().zip(&node.output) {
            let inside = renaming.of_name(formal);
            if !actual.is_empty() && inside != *actual {
                let copy = NodeProto {
                    input: vec![inside],
                    output: vec![actual.clone()],
                    op_type: Some("Identity".into()),
                    ..NodeProto::default()
                };
                out.push(Versioned { node: copy, opsets: Some(opsets.clone()) });
            }
        }
        Ok(())
    }
}

/// Names inside a function to names outside.
struct Renaming {
    names: BTreeMap<String, String>,
    prefix: String,
}

impl Renaming {
    fn of(function: &FunctionProto, call: &NodeProto, prefix: &str) -> Self {
        let mut names = BTreeMap::new();
        for (index, formal) in function.input.iter().enumerate() {
            names.insert(formal.clone(), call.input.get(index).cloned().unwrap_or_default());
        }
        for (formal, actual) in function.output.iter().zip(&call.output) {
            if !actual.is_empty() {
                names.entry(formal.clone()).or_insert_with(|| actual.clone());
            }
        }
        Self { names, prefix: prefix.to_owned() }
    }

    fn of_name(&self, name: &str) -> String {
        if name.is_empty() {
            return String::new();
        }
        self.names.get(name).cloned().unwrap_or_else(|| format!("{}/{name}", self.prefix))
    }

    fn apply(&self, node: &mut NodeProto) {
        if let Some(name) = node.name.as_mut().filter(|name| !name.is_empty()) {
            *name = format!("{}/{name}", self.prefix);
        }
        node.input.iter_mut().chain(&mut node.output).for_each(|name| *name = self.of_name(name));
        for attribute in &mut node.attribute {
            attribute.g.iter_mut().chain(&mut attribute.graphs).for_each(|body| self.apply_to_body(body));
        }
    }

    fn apply_to_body(&self, body: &mut GraphProto) {
        body.node.iter_mut().for_each(|node| self.apply(node));
        let infos = body.input.iter_mut().chain(&mut body.output).chain(&mut body.value_info);
        for name in infos.filter_map(|info| info.name.as_mut()) {
            *name = self.of_name(name);
        }
        let sparse = body.sparse_initializer.iter_mut().filter_map(|sparse| sparse.values.as_mut());
        for name in body.initializer.iter_mut().chain(sparse).filter_map(|tensor| tensor.name.as_mut()) {
            *name = self.of_name(name);
        }
    }
}

/// Values for `ref_attr_name`.
struct Attributes<'a> {
    call: &'a NodeProto,
    function: &'a FunctionProto,
}

impl Attributes<'_> {
    fn resolve(&self, node: &mut NodeProto) {
        node.attribute.retain_mut(|attribute| {
            if attribute.ref_attr_name().is_empty() {
                let bodies = attribute.g.iter_mut().chain(&mut attribute.graphs);
                bodies.flat_map(|body| &mut body.node).for_each(|inner| self.resolve(inner));
                return true;
            }
            match self.value(attribute.ref_attr_name()) {
                Some(value) => {
                    let name = attribute.name.take();
                    *attribute = AttributeProto { name, ref_attr_name: None, ..value.clone() };
                    true
                }
                // Left out by the caller, without default: left out here.
                None => false,
            }
        });
    }

    fn value(&self, name: &str) -> Option<&AttributeProto> {
        let given = self.call.attribute.iter().find(|attribute| attribute.name() == name);
        given.or_else(|| self.function.attribute_proto.iter().find(|attribute| attribute.name() == name))
    }
}
