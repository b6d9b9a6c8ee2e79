//! What the user says about nodes and tensors by name.

use std::collections::{BTreeMap, BTreeSet};

use globset::Glob;
use passes::id::ValueId;
use passes::ir::Graph;
use passes::pass::nearest;
use passes::target::{KeepFloat, Scheme, Schemes, Target};

use crate::driver::Error;

/// `--set PATTERN=SCHEME`; no scheme keeps what matches in float.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// A glob over names of nodes and tensors.
    pub pattern: String,
    /// How they are written; `None` is float.
    pub scheme: Option<Scheme>,
}

/// What was asked for, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    pub(crate) keep_float: KeepFloat,
    pub(crate) schemes: Schemes,
}

/// What `keep_float` and `set` say about the names in `graph`.
///
/// # Errors
/// [`Error::Input`] for a pattern that is none or matches nothing, [`Error::Target`] for a scheme that cannot stand beside `base`.
pub(crate) fn overrides(
    keep_float: &[String],
    set: &[Set],
    graph: &Graph,
    base: Scheme,
    target: &dyn Target,
) -> Result<Overrides, Error> {
    let names = Names::of(graph);
    let mut overrides = Overrides::default();
    for pattern in keep_float {
        let option = format!("--keep-float {pattern}");
        let matched = names.matching(&option, pattern)?;
        let makers = names.makers_of(&matched);
        overrides.keep_float.extend(matched.into_iter().chain(makers).map(|name| (name, option.clone())));
    }
    for Set { pattern, scheme } in set {
        let option = format!("--set {pattern}={}", scheme.map_or("float".into(), |scheme| scheme.to_string()));
        let matched = names.matching(&option, pattern)?;
        match scheme {
            // The last one counts.
            None => {
                overrides.schemes.retain(|name, _| !matched.contains(name));
                let makers = names.makers_of(&matched);
                overrides.keep_float.extend(matched.into_iter().chain(makers).map(|name| (name, option.clone())));
            }
            Some(scheme) => {
                check(&option, *scheme, base, target)?;
                names.some_weight(&option, &matched)?;
                for name in matched {
                    if overrides.keep_float.get(&name).is_some_and(|option| option.starts_with("--set ")) {
                        overrides.keep_float.remove(&name);
                    }
                    overrides.schemes.insert(name, *scheme);
                }
            }
        }
    }
    Ok(overrides)
}

fn check(option: &str, scheme: Scheme, base: Scheme, target: &dyn Target) -> Result<(), Error> {
    let activations = |scheme: Scheme| (scheme.activation_bits, scheme.activation_format, scheme.dynamic);
    if activations(scheme) != activations(base) {
        return Err(Error::Target(format!(
            "{option}: only weights can differ from --scheme {base}; use the same activations, or `float` for all of a node"
        )));
    }
    match target.refuses(&scheme) {
        Some(what) => Err(Error::Target(format!("{option}: the target cannot take it: {what}"))),
        None => Ok(()),
    }
}

/// Everything in a graph that has a name.
struct Names {
    all: Vec<String>,
    /// Names of constants, with those of the nodes that read them: folding gives constants new names, nodes keep theirs.
    readers: Vec<(String, String)>,
    /// Names of tensors, with those of the nodes that make them: splitting gives tensors new makers, nodes keep their names.
    makers: Vec<(String, String)>,
    /// The nodes that have weights.
    weighted: BTreeSet<String>,
}

/// The operators whose weights a scheme is about.
const WITH_WEIGHTS: &[&str] = &["Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits"];

impl Names {
    fn of(graph: &Graph) -> Self {
        let nodes = graph.nodes().map(|(_, node)| node.name.to_string());
        let values = graph.value_ids().map(|id| graph.value(id).name.to_string());
        // What is computed from constants alone stands for them.
        let mut roots: BTreeMap<ValueId, Vec<String>> = BTreeMap::new();
        let (mut readers, mut makers, mut weighted) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (_, node) in graph.nodes() {
            let made = node.outputs.iter().flatten().map(|output| graph.value(*output).name.to_string());
            makers.extend(made.map(|name| (name, node.name.to_string())));
            let of = |value: &ValueId| match graph.constant(*value) {
                Some(_) => Some(vec![graph.value(*value).name.to_string()]),
                None => roots.get(value).cloned(),
            };
            let found: Vec<Option<Vec<String>>> = node.inputs.iter().flatten().map(of).collect();
            let constant = !found.is_empty() && found.iter().all(Option::is_some);
            let names: Vec<String> = found.into_iter().flatten().flatten().collect();
            if constant && node.bodies.is_empty() {
                roots.extend(node.outputs.iter().flatten().map(|output| (*output, names.clone())));
            }
            if !names.is_empty() && WITH_WEIGHTS.contains(&&*node.op.name) {
                weighted.insert(node.name.to_string());
            }
            readers.extend(names.into_iter().map(|name| (name, node.name.to_string())));
        }
        Self { all: nodes.chain(values).collect(), readers, makers, weighted }
    }

    /// Refuses an option that is about weights and matches none.
    fn some_weight(&self, option: &str, matched: &[String]) -> Result<(), Error> {
        if matched.iter().any(|name| self.weighted.contains(name)) {
            return Ok(());
        }
        let first = matched.first().map_or("", String::as_str);
        Err(Error::Input(format!(
            "{option} changes nothing: `{first}` and whatever else it matches are no convolutions or matrix products with weights, nor \
             weights of such; `inspect` lists the nodes"
        )))
    }

    /// The names of the nodes that make what is called by one of `names`.
    fn makers_of(&self, names: &[String]) -> Vec<String> {
        let names: BTreeSet<&String> = names.iter().collect();
        self.makers.iter().filter(|(tensor, _)| names.contains(tensor)).map(|(_, node)| node.clone()).collect()
    }

    /// The names that match, and those of nodes that read a constant whose name does.
    fn matching(&self, option: &str, pattern: &str) -> Result<Vec<String>, Error> {
        let glob = Glob::new(pattern).map_err(|e| Error::Input(format!("{option}: {e}")))?.compile_matcher();
        let mut matching: Vec<String> = self.all.iter().filter(|name| glob.is_match(name)).cloned().collect();
        if matching.is_empty() {
            let near = nearest(pattern, self.all.iter().map(String::as_str));
            let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(Error::Input(format!("{option} matches no node and no tensor{near}")));
        }
        let readers = self.readers.iter().filter(|(constant, _)| glob.is_match(constant));
        matching.extend(readers.map(|(_, node)| node.clone()));
        Ok(matching)
    }
}

impl std::str::FromStr for Set {
    type Err = String;

    /// `PATTERN=SCHEME` or `PATTERN=float`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, scheme) = text.rsplit_once('=').ok_or("write PATTERN=SCHEME, as in 'head*=w8a16'")?;
        let scheme = match scheme {
            "float" => None,
            text => Some(Scheme::parse(text).ok_or_else(|| format!("`{text}` is no scheme, and not `float`"))?),
        };
        Ok(Self { pattern: pattern.to_owned(), scheme })
    }
}

/// The option that keeps a node in float so that the loss stays under the one allowed.
pub(crate) fn kept_for_drop(names: &[String], allowed: f64) -> BTreeMap<String, String> {
    names.iter().map(|name| (name.clone(), format!("--max-drop {allowed}"))).collect()
}
