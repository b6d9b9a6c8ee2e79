//! What a decoder keeps of the past, in codes.

use crate::caches;
use crate::diag::{self, Diagnostic, Place, Severity};
use crate::model::{Edit, Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Writes the caches of a decoder in codes, each row (a token of a head) with a scale and a zero point of its own.
    ///
    /// A cache is a float input that a `Concat` puts what is new behind, and whose result the model returns. Past rows are read through
    /// their codes; those of the run itself are read in float, and rounded once, where they are returned. Where the target's nodes take
    /// computed scales, the input becomes bytes (two codes of 4 bits in each), with inputs `.scale` and `.zero_point` beside it, and so do
    /// the outputs. Nothing is measured: every row brings its range.
    INFO {
        name: "encode-caches",
        source: "Yue et al. 2024 (WKVQuant), arXiv:2402.12065, section 3.1; ranges per token: Liu et al. 2024 (KIVI), arXiv:2402.02750",
        cost: "One walk over the nodes, no data; milliseconds.",
        requires: Facts::NONE,
        establishes: Facts::NONE,
        preserves: Facts::ALL,
        fidelity: PlanOnly,
        options: &[OptionInfo { name: "bits", doc: "of a number in the cache: 8 (default) or 4" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(EncodeCaches::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct EncodeCaches {
    bits: u32,
}

impl EncodeCaches {
    fn new(options: &Options) -> Result<Self, OptionError> {
        match options.count("bits", 8)? {
            bits @ (4 | 8) => Ok(Self { bits: if bits == 4 { 4 } else { 8 } }),
            other => Err(OptionError { option: "bits".into(), problem: format!("{other} is neither 4 nor 8") }),
        }
    }
}

impl Pass for EncodeCaches {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, cx: &PassContext<'_>) -> Result<Patch, PassError> {
        let mut patch = Patch::on(model);
        let graph = model.graph();
        let (caches, others) = caches::find(graph);
        if caches.is_empty() {
            let reason = others.first().map(|(value, reason)| format!(" (`{}`: {reason})", graph.value(*value).name));
            return Err(PassError::Model(format!(
                "no input is a cache{}: a cache is a float input that a Concat puts what is new behind and whose result is returned; \
                 beside it Shape may read it, and one other node where nothing else reads that result",
                reason.unwrap_or_default()
            )));
        }
        for (value, reason) in others {
            let place = Place::Value(graph.value(value).name.clone());
            let message = format!("it is no cache that can be written in codes, and stays in float: {reason}");
            patch.note(Diagnostic::new(diag::FLOAT_CACHE, Severity::Warning, place, message));
        }
        for cache in caches {
            let name = &graph.value(cache.past).name;
            let append = graph.node(cache.append).map(|node| &*node.name);
            let names = [Some(&**name), Some(&*graph.value(cache.present).name), append];
            if names.into_iter().flatten().any(|name| cx.keep_float.contains_key(name)) {
                patch.count("kept float", 1);
                continue;
            }
            let encoding = cache.encoding(self.bits).ok_or_else(|| {
                PassError::Model(format!(
                    "cache `{name}`: two codes of 4 bits do not fill bytes in rows of {}: leave it in float with --keep-float",
                    cache.row.1
                ))
            })?;
            patch.edit(Edit::Encode { site: cache.site, encoding });
            patch.count("caches", 1);
        }
        Ok(patch)
    }
}
