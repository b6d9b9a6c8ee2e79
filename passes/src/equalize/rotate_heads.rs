//! Rotation of the values that attention heads hand on.

use super::hadamard::Hadamard;
use super::rotate::{self, rows};
use super::value_path::ValuePath;
use crate::ir::walk::Users;
use crate::ir::{Graph, Node};
use crate::model::{Model, Patch};
use crate::pass::{Facts, OptionError, OptionInfo, Options, Pass, PassContext, PassEntry, PassError, PassInfo};

crate::declare_pass! {
    /// Turns what attention heads hand on into another basis: v' = v R for every head, R a Hadamard matrix of the size of a head with
    /// random signs.
    ///
    /// Shares of attention mix tokens, not channels: P (v R) = (P v) R. So the weight that computes v is multiplied by R, head by head, and
    /// the one that reads P v by Rᵀ, and no node is added. Done between a product with a constant weight and the next one, where only a
    /// product of two activations, reshapes, transpositions and the copies of grouped heads stand between them, and nobody else reads
    /// what is turned. A cache between them is one such reader.
    INFO {
        name: "rotate-heads",
        source: "Liu et al. 2024 (SpinQuant), arXiv:2405.16406, section 3 (R2); Ashkboos et al. 2024, arXiv:2404.00456, section 4, stage 1b",
        cost: "m d log d multiply-adds for both weights of m × d; no data.",
        requires: Facts::SHAPES,
        establishes: Facts::NONE,
        preserves: Facts::SHAPES,
        fidelity: UpToRounding,
        options: &[OptionInfo { name: "seed", doc: "which random signs, 0 by default" }],
    }
}

pub(super) const ENTRY: PassEntry =
    PassEntry { info: &INFO, build: |options| Ok(Box::new(RotateHeads::new(options)?)) };

/// See [`INFO`].
#[derive(Debug)]
struct RotateHeads {
    seed: u64,
}

impl RotateHeads {
    fn new(options: &Options) -> Result<Self, OptionError> {
        Ok(Self { seed: rotate::seed(options)? })
    }
}

impl Pass for RotateHeads {
    fn info(&self) -> &'static PassInfo {
        &INFO
    }

    fn run(&self, model: &Model, _: &PassContext<'_>) -> Result<Patch, PassError> {
        let graph = model.graph();
        let users = Users::of(graph);
        let mut patch = Patch::on(model);
        for (id, _) in graph.nodes() {
            let is_new = |path: &ValuePath| !graph.value(path.weight).name.ends_with(TURNED);
            let Some(path) = ValuePath::through(graph, &users, id).filter(is_new) else { continue };
            let rotation = Hadamard::new(path.size, self.seed);
            let mark = patch.mark();
            match turn(graph, &path, &rotation, &mut patch) {
                Some(()) => patch.count("heads", 1),
                None => patch.roll_back(&mark),
            }
        }
        Ok(patch)
    }
}

/// Behind the names of what is turned: once is enough.
const TURNED: &str = ".turned";

/// Computes `path` in the basis of `rotation`, and lets its reader read that.
fn turn(graph: &Graph, path: &ValuePath, rotation: &Hadamard, patch: &mut Patch) -> Option<()> {
    let turned = path.rebuilt(graph, TURNED, patch, |tensor| rows(tensor, None, rotation))?;
    let reader = graph.node(path.reader).filter(|_| !patch.touches(path.reader))?;
    let weight = reader.input(1)?;
    let made = rows(&graph.constant(weight)?.transposed()?, None, rotation)?.transposed()?;
    let made = patch.constant(&format!("{}{TURNED}", graph.value(weight).name), made);
    let inputs = vec![Some(turned), Some(made)];
    patch.replace(path.reader, Node { inputs, ..reader.clone() });
    Some(())
}
