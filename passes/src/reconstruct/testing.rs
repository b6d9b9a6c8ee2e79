//! A small model with its samples, and an executor that runs it on a tape: for tests of gradients.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::encoding::Encoding;
use crate::exec::{DataError, Dataset, ExecError, Executor, Session};
use crate::grad::{self, Slot, Tape, Value};
use crate::id::Site;
use crate::ir::{Graph, Node};
use crate::journal::Journal;
use crate::model::{Edit, Model, Patch};
use crate::pass::{PassContext, PassManager, Pipeline};
use crate::seed;
use crate::target::{Goal, LowerError, Lowered, Rule, Scheme, Target, TargetInfo};
use crate::tensor::Tensor;

/// How many numbers a sample of the model has.
pub(super) const READ: usize = 4;

/// Two products with `tanh` between them; `spread` is that of the second weight.
pub(super) fn two_products(spread: f64) -> Model {
    two_products_of(5, spread)
}

/// The same with so many numbers between them.
pub(crate) fn two_products_of(width: usize, spread: f64) -> Model {
    two_products_around("%h = Tanh(%p)", width, spread)
}

/// The same with other nodes, which make `%h` of `%p`, between them.
pub(crate) fn two_products_around(between: &str, width: usize, spread: f64) -> Model {
    let text = format!(
        "graph (%x: f32[1,4]) -> (%y: f32[1,3]) {{
        %a = const f32[4,{width}] rand(seed=1, std=0.7)
        %b = const f32[{width},3] rand(seed=2, std={spread:.3})
        %p = MatMul(%x, %a)
        {between}
        %y = MatMul(%h, %b)
    }}"
    );
    let model = crate::text::parse(&text).unwrap();
    let pipeline = Pipeline::parse("infer-shapes", &crate::catalogue::passes()).unwrap();
    let mut model = PassManager::default().run(&pipeline, model, &mut PassContext::new(&NoTarget, &Tapes)).unwrap().0;
    let products: Vec<_> = model.graph().nodes().filter(|(_, n)| n.op.is("MatMul")).map(|(id, _)| id).collect();
    let mut patch = Patch::on(&model);
    for node in products {
        let encoding = Encoding::per_tensor(crate::grid::find("int4").unwrap(), 0.3, 0);
        patch.edit(Edit::Encode { site: Site::Use { node, input: 1 }, encoding });
    }
    model.apply(patch).unwrap();
    model
}

/// So many samples of it.
pub(crate) struct Drawn(pub(crate) usize);

impl Dataset for Drawn {
    fn len(&self) -> usize {
        self.0
    }

    fn name(&self, index: usize) -> String {
        format!("sample {index}")
    }

    #[expect(clippy::cast_possible_truncation, reason = "numbers drawn at random")]
    fn sample(&self, index: usize) -> Result<Vec<Tensor>, DataError> {
        let value = |at: usize| (4.0 * seed::uniform(seed::mixed(index as u64) ^ at as u64) - 2.0) as f32;
        Ok(vec![Tensor::of([1, READ], (0..READ).map(value).collect())])
    }
}

/// Runs every node by its rule.
#[derive(Debug)]
pub(crate) struct Tapes;

/// A graph on a tape.
struct Taped {
    tape: Tape,
    constants: Vec<(Slot, Value<f32>)>,
    inputs: Vec<Slot>,
    outputs: Vec<Slot>,
}

impl Executor for Tapes {
    fn name(&self) -> &'static str {
        "tapes"
    }

    fn prepare(&self, graph: &Graph) -> Result<Box<dyn Session>, ExecError> {
        let mut tape = Tape::default();
        let mut slots = std::collections::BTreeMap::new();
        let inputs: Vec<Slot> =
            graph.inputs().iter().map(|value| *slots.entry(*value).or_insert(tape.leaf(false))).collect();
        let mut constants = Vec::new();
        for (_, node) in graph.nodes() {
            let read = |value: crate::id::ValueId, tape: &mut Tape| {
                *slots.entry(value).or_insert_with(|| {
                    let slot = tape.leaf(false);
                    constants.push((slot, grad::value_of(graph.constant(value).unwrap()).unwrap()));
                    slot
                })
            };
            let made = step(node, &mut tape, read);
            slots.extend(node.outputs.iter().flatten().copied().zip(made));
        }
        let outputs = graph.outputs().iter().map(|value| slots[value]).collect();
        Ok(Box::new(Taped { tape, constants, inputs, outputs }))
    }
}

fn step(node: &Node, tape: &mut Tape, mut read: impl FnMut(crate::id::ValueId, &mut Tape) -> Slot) -> Vec<Slot> {
    let inputs = node.inputs.iter().map(|value| value.map(|value| read(value, tape))).collect();
    tape.push(&node.name, grad::rule(node).unwrap(), inputs, node.outputs.len())
}

impl Session for Taped {
    fn run(&self, feeds: &[Tensor]) -> Result<Vec<Tensor>, ExecError> {
        let feeds = self.inputs.iter().copied().zip(feeds.iter().map(|feed| grad::value_of(feed).unwrap()));
        let values = self.tape.forward(self.constants.iter().cloned().chain(feeds)).unwrap();
        let tensor = |slot: &Slot| {
            let array = values.real(*slot).unwrap();
            Tensor::of(array.shape(), array.iter().copied().collect())
        };
        Ok(self.outputs.iter().map(tensor).collect())
    }
}

/// Takes everything and runs nothing.
#[derive(Debug)]
pub(crate) struct NoTarget;

impl Target for NoTarget {
    fn info(&self) -> &'static TargetInfo {
        static INFO: TargetInfo =
            TargetInfo { about: crate::about::About { name: "none", doc: "Nothing.", source: "tests" }, version: "0" };
        &INFO
    }

    fn rules(&self) -> &'static [Rule] {
        &[]
    }

    fn pipeline(&self, _: Goal, _: &Scheme) -> Cow<'static, str> {
        Cow::Borrowed("")
    }

    fn refuses(&self, _: &Scheme) -> Option<String> {
        None
    }

    fn lower(&self, _: &Model) -> Result<Lowered, LowerError> {
        unreachable!("nothing is written here")
    }
}

/// A journal in memory that takes standings of so many bytes.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) room: u64,
    pub(super) records: Mutex<BTreeMap<String, Vec<u8>>>,
    /// The size of every standing that it was given.
    pub(super) standings: Mutex<Vec<u64>>,
}

impl Journal for Memory {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.records.lock().unwrap().get(key).cloned()
    }

    fn put(&self, key: &str, record: &[u8]) -> Result<(), String> {
        self.records.lock().unwrap().insert(key.to_owned(), record.to_vec());
        Ok(())
    }

    fn room(&self) -> Option<u64> {
        Some(self.room)
    }

    fn standing(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn stand(&self, _: &str, state: &[u8]) -> Result<(), String> {
        self.standings.lock().unwrap().push(state.len() as u64);
        Ok(())
    }
}
