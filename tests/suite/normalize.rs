//! Folds keep the function, and leave what is in codes alone.

use std::sync::Arc;

use onnx_quant::{exec, targets};
use passes::encoding::Encoding;
use passes::exec::Executor;
use passes::id::Site;
use passes::model::Model;
use passes::pass::{PassContext, PassManager, Pipeline, Trace};
use passes::tensor::Tensor;

use super::equalize::same_within;

/// Numbers at random, the same in every run.
struct Dice(u64);

impl Dice {
    /// A number below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }

    /// So many numbers from `low` to `high`.
    fn rolls(&mut self, many: usize, low: usize, high: usize) -> Vec<usize> {
        (0..many).map(|_| low + self.roll(high - low + 1)).collect()
    }

    /// A tensor of numbers from -1 to 1.
    fn noise(&mut self, shape: &[usize]) -> Tensor {
        let elements: usize = shape.iter().product();
        let values: Vec<f32> = (0..elements).map(|_| self.roll(2001) as f32 / 1000.0 - 1.0).collect();
        Tensor::of(shape, values)
    }

    /// A constant as it stands in the text form: numbers from a half to two, of either sign.
    fn constant(&mut self, name: &str, shape: &[usize]) -> String {
        let mut values = Vec::new();
        for _ in 0..shape.iter().product::<usize>() {
            let sign = ["", "-"][self.roll(2)];
            let size = 0.5 + self.roll(1501) as f32 / 1000.0;
            values.push(format!("{sign}{size:.3}"));
        }
        format!("  %{name} = const f32{shape:?} [{}]\n", values.join(", "))
    }
}

fn executor(model: &Model) -> Box<dyn Executor> {
    (exec::find("auto").unwrap().build)(&model.meta).unwrap()
}

/// The model that `source` says, what `steps` make of it, and what they said.
fn run(source: &str, steps: &str) -> (Model, Model, Trace) {
    let before = passes::text::parse(source).unwrap_or_else(|e| panic!("{e}\n{source}"));
    let executor = executor(&before);
    let mut cx = PassContext::new(targets::TARGETS[0], executor.as_ref());
    let pipeline = Pipeline::parse(&format!("infer-shapes, {steps}"), &passes::catalogue::passes()).unwrap();
    let ran = PassManager::new(Vec::new(), true).run(&pipeline, before.clone(), &mut cx);
    let (after, trace) = ran.unwrap_or_else(|e| panic!("{e}\n{source}"));
    (before, after, trace)
}

/// What `steps` make of the model that `source` says; numbers at random must give what they gave.
fn folded(source: &str, steps: &str, dice: &mut Dice) -> Model {
    let (before, after, _) = run(source, steps);
    let graph = before.graph();
    let mut feeds = Vec::new();
    for &input in graph.inputs() {
        let shape = graph.value(input).ty.tensor().unwrap().known_shape().unwrap();
        feeds.push(dice.noise(&shape));
    }
    let what = format!("{steps}\n{source}");
    same_within(&before, &after, executor(&before).as_ref(), &feeds, 1e-4, &what);
    after
}

/// s = 2 and 1/2: means are β, deviations |γ|, whatever mean and variance were before.
#[test]
fn what_training_saw_outlives_the_fold() {
    for (gamma, deviation) in [("[2, 1]", [2.0, 1.0]), ("[2, -1]", [2.0, 1.0])] {
        let source = format!(
            "graph (%x: f32[1,2,4,4]) -> (%y) {{
              %w = const f32[2,2,1,1] [1, 0, 0, 1]
              %gamma = const f32[2] {gamma}
              %beta = const f32[2] [0, 0.5]
              %mean = const f32[2] [1, 0]
              %var = const f32[2] [1, 4]
              %c = Conv(%x, %w)
              %y = BatchNormalization(%c, %gamma, %beta, %mean, %var) {{epsilon=0.0}}
            }}"
        );
        let (before, after, _) = run(&source, "fold-batch-norm");
        let value = after.graph().outputs()[0];
        assert!(before.stats().trained(value).is_none());
        let trained = after.stats().trained(value).unwrap();
        assert_eq!((&*trained.mean, &*trained.deviation), (&[0.0_f32, 0.5][..], &deviation[..]));
    }
}

/// What folds into the linear node before it.
const TAILS: [&str; 5] = ["BatchNormalization", "Mul", "Div", "Add", "Sub"];
const FOLDS: &str = "*(fold-batch-norm, fold-affine), drop-dead";

/// `%to` as `op` of `%from`, which has so many channels on `axis` of `rank`, and of constants.
fn tail(dice: &mut Dice, op: &str, [from, to]: [&str; 2], channels: usize, [rank, axis]: [usize; 2]) -> String {
    if op == "BatchNormalization" {
        let rows: Vec<String> =
            ["g", "b", "m"].iter().map(|row| dice.constant(&format!("{to}{row}"), &[channels])).collect();
        let variance = dice.constant(&format!("{to}v"), &[channels]).replace('-', "");
        let epsilon = ["", " {epsilon=0.01}"][dice.roll(2)];
        let rows = rows.concat();
        return format!(
            "{rows}{variance}  %{to} = BatchNormalization(%{from}, %{to}g, %{to}b, %{to}m, %{to}v){epsilon}\n"
        );
    }
    let mut full = vec![1; rank];
    full[axis] = channels;
    let shape = match dice.roll(5) {
        0 => Vec::new(),
        1 => vec![1],
        2 => vec![1; rank],
        3 => full,
        _ => full[axis..].to_vec(),
    };
    let constant = dice.constant(&format!("{to}k"), &shape);
    let on_the_left = op != "Div" && dice.roll(2) == 0;
    let operands = if on_the_left { format!("%{to}k, %{from}") } else { format!("%{from}, %{to}k") };
    format!("{constant}  %{to} = {op}({operands})\n")
}

/// `%c`, a convolution at random of the value called `from`.
struct Convolution {
    /// The shape that it can read.
    input: Vec<usize>,
    groups: usize,
    channels: usize,
    text: String,
}

fn convolution(dice: &mut Dice, op: &str, axes: usize, from: &str) -> Convolution {
    let (inputs, groups) = [(3, 1), (4, 2), (4, 4)][dice.roll(3)];
    let of_a_group = 1 + dice.roll(3);
    let channels = groups * of_a_group;
    let transposed = op == "ConvTranspose";
    let kernel = dice.rolls(axes, 1, 3);
    let front = if transposed { [inputs, of_a_group] } else { [channels, inputs / groups] };
    let weight = dice.constant("w", &[&front[..], &kernel[..]].concat());
    let biased = dice.roll(2) == 0;
    let (bias, operands) = if biased { (dice.constant("b", &[channels]), "%w, %b") } else { (String::new(), "%w") };
    let pads = dice.rolls(2 * axes, 0, if transposed { 1 } else { 2 });
    let (strides, dilations) = (dice.rolls(axes, 1, 2), dice.rolls(axes, 1, 2));
    let extents = dice.rolls(axes, 7, 9);
    let text = format!(
        "{weight}{bias}  %c = {op}({from}, {operands}) {{group={groups}, kernel_shape={kernel:?}, pads={pads:?}, \
         strides={strides:?}, dilations={dilations:?}}}\n"
    );
    Convolution { input: [&[2, inputs][..], &extents[..]].concat(), groups, channels, text }
}

#[test]
fn whatever_stands_behind_a_convolution_folds_and_keeps_the_function() {
    let mut dice = Dice(1);
    for round in 0..72 {
        let op = ["Conv", "Conv", "ConvTranspose"][round % 3];
        let axes = 1 + round / 3 % 2;
        let conv = convolution(&mut dice, op, axes, "%x");
        let (first, second) = (TAILS[dice.roll(5)], TAILS[dice.roll(5)]);
        let first = tail(&mut dice, first, ["c", "d"], conv.channels, [axes + 2, 1]);
        let second = tail(&mut dice, second, ["d", "y"], conv.channels, [axes + 2, 1]);
        let source = format!("opset 21\ngraph (%x: f32{:?}) -> (%y) {{\n{}{first}{second}}}\n", conv.input, conv.text);
        let after = folded(&source, FOLDS, &mut dice);
        // The weight of a transposed one holds the channels of one group: left alone.
        let left = if op == "ConvTranspose" && conv.groups > 1 { 3 } else { 1 };
        assert_eq!(after.graph().n_nodes(), left, "{source}");
    }
}

#[test]
fn whatever_stands_behind_a_gemm_folds_and_keeps_the_function() {
    let mut dice = Dice(2);
    for _ in 0..72 {
        let (rows, inputs, channels) = (3, 2 + dice.roll(3), 1 + dice.roll(4));
        let (turned_x, turned_w) = (dice.roll(2), dice.roll(2));
        let x = [[rows, inputs], [inputs, rows]][turned_x];
        let w = [[inputs, channels], [channels, inputs]][turned_w];
        let weight = dice.constant("w", &w);
        let shapes = [vec![], vec![1], vec![channels], vec![1, channels], vec![rows, 1], vec![rows, channels]];
        let kind = dice.roll(shapes.len() + 1);
        let bias = shapes.get(kind).map(|shape| dice.constant("b", shape));
        let operands = if bias.is_some() { "%x, %w, %b" } else { "%x, %w" };
        let bias = bias.unwrap_or_default();
        let (alpha, beta) = (["1.0", "0.5", "-2.0"][dice.roll(3)], ["1.0", "3.0"][dice.roll(2)]);
        let (first, second) = (TAILS[dice.roll(5)], TAILS[dice.roll(5)]);
        let first = tail(&mut dice, first, ["c", "d"], channels, [2, 1]);
        let second = tail(&mut dice, second, ["d", "y"], channels, [2, 1]);
        let source = format!(
            "opset 21\ngraph (%x: f32{x:?}) -> (%y) {{\n{weight}{bias}  %c = Gemm({operands}) {{alpha={alpha}, beta={beta}, \
             transA={turned_x}, transB={turned_w}}}\n{first}{second}}}\n"
        );
        let after = folded(&source, &format!("fold-gemm-scalars, {FOLDS}"), &mut dice);
        // A bias with rows of its own is no bias per channel.
        let left = if kind == 4 || kind == 5 { 3 } else { 1 };
        assert_eq!(after.graph().n_nodes(), left, "{source}");
        let stays = |model: &Model| model.graph().nodes().any(|(_, node)| node.op.is("Gemm"));
        let after = folded(&source, "fold-gemm-scalars, split-gemm", &mut dice);
        assert_eq!(stays(&after), turned_x == 1, "{source}");
        let after = folded(&source, "split-gemm", &mut dice);
        assert_eq!(stays(&after), turned_x == 1 || alpha != "1.0" || beta != "1.0", "{source}");
    }
}

#[test]
fn factors_behind_a_product_fold_and_terms_stay() {
    let mut dice = Dice(3);
    for round in 0..48 {
        let (rank, inputs, channels) = (2 + round % 2, 2 + dice.roll(3), 1 + dice.roll(4));
        let x = &[2, 3, inputs][3 - rank..];
        let stacked = rank == 3 && dice.roll(2) == 0;
        let w = &[2, inputs, channels][usize::from(!stacked)..];
        let weight = dice.constant("w", w);
        // A product has no bias that a term could go into.
        let (first, second) = (TAILS[1 + dice.roll(4)], TAILS[1 + dice.roll(4)]);
        let folds = |op: &str| op == "Mul" || op == "Div";
        let left = match (folds(first), folds(second)) {
            (true, true) => 1,
            (true, false) => 2,
            (false, _) => 3,
        };
        let first = tail(&mut dice, first, ["c", "d"], channels, [rank, rank - 1]);
        let second = tail(&mut dice, second, ["d", "y"], channels, [rank, rank - 1]);
        let source =
            format!("opset 21\ngraph (%x: f32{x:?}) -> (%y) {{\n{weight}  %c = MatMul(%x, %w)\n{first}{second}}}\n");
        let after = folded(&source, FOLDS, &mut dice);
        assert_eq!(after.graph().n_nodes(), left, "{source}");
    }
}

#[test]
fn zeros_around_what_a_convolution_reads_fold_and_keep_the_function() {
    let mut dice = Dice(4);
    for round in 0..40 {
        let axes = 1 + round % 2;
        let conv = convolution(&mut dice, "Conv", axes, "%p");
        let (begins, ends) = (dice.rolls(axes, 0, 2), dice.rolls(axes, 0, 2));
        let pads = [&[0, 0][..], &begins[..], &[0, 0][..], &ends[..]].concat();
        let (zero, operands) = [("", "%x, %n"), ("  %z = const f32[] [0]\n", "%x, %n, %z")][dice.roll(2)];
        let source = format!(
            "opset 21\ngraph (%x: f32{:?}) -> (%c) {{\n{zero}  %n = const i64[{}] {pads:?}\n  %p = Pad({operands})\n{}}}\n",
            conv.input,
            pads.len(),
            conv.text
        );
        let after = folded(&source, "fold-pad", &mut dice);
        assert_eq!(after.graph().n_nodes(), 1, "{source}");
    }
}

#[test]
fn pools_of_any_size_become_convolutions_and_keep_the_function() {
    let mut dice = Dice(5);
    for round in 0..40 {
        let axes = 1 + round % 2;
        let channels = 1 + dice.roll(4);
        let shape = [&[2, channels][..], &dice.rolls(axes, 1, 5)[..]].concat();
        let ones = vec![1; axes];
        let weights = [
            dice.constant("w", &[channels, 3]),
            dice.constant("v", &[&[3, channels][..], &ones[..]].concat()),
            dice.constant("u", &[channels, 3]),
            dice.constant("b", &[3]),
        ]
        .concat();
        let readers = [
            "  %y = Sigmoid(%p)\n",
            "  %f = Flatten(%p)\n  %y = Gemm(%f, %w, %b)\n",
            "  %y = Conv(%p, %v, %b)\n",
            "  %f = Flatten(%p)\n  %m = MatMul(%f, %w)\n  %g = Conv(%p, %v)\n  %h = Flatten(%g)\n  %y = Add(%m, %h)\n",
            "  %f = Flatten(%p)\n  %m = MatMul(%f, %w)\n  %s = Sigmoid(%f)\n  %n = MatMul(%s, %u)\n  %y = Add(%m, %n)\n",
        ][round % 5];
        let source = format!(
            "opset 21\ngraph (%x: f32{shape:?}) -> (%y) {{\n{weights}  %p = GlobalAveragePool(%x)\n{readers}}}\n"
        );
        let after = folded(&source, "pool-to-conv", &mut dice);
        assert!(!after.graph().nodes().any(|(_, node)| node.op.is("GlobalAveragePool")), "{source}");
    }
}

/// Whoever asked for the result of a pool still gets it.
#[test]
fn a_pool_that_the_graph_returns_keeps_the_function() {
    for (outputs, reader) in [("%p", ""), ("%p, %y", "  %y = Relu(%p)\n")] {
        let source =
            format!("opset 21\ngraph (%x: f32[1,2,3,3]) -> ({outputs}) {{\n  %p = GlobalAveragePool(%x)\n{reader}}}\n");
        folded(&source, "pool-to-conv", &mut Dice(6));
    }
}

/// Every encoding of the plan, with the codes at its place.
fn planned(model: &Model) -> Vec<(Site, Encoding, Option<Arc<Tensor>>)> {
    let plan = model.plan();
    plan.encodings().map(|(site, encoding)| (site, encoding.clone(), plan.codes(site).cloned())).collect()
}

const WEIGHT: &str = "  %w = const f32[2,2,1,1] [1, -0.5, 2, 0.75]\n";

#[test]
fn nothing_folds_into_what_is_in_codes() {
    let mut dice = Dice(7);
    let weight = "  %k = const i8[2,2,1,1] [2, 4, -6, 8]\n  %s = const f32[2] [0.5, 0.25]\n  \
                  %w = DequantizeLinear(%k, %s) {axis=0}\n  %d = Conv(%x, %w)\n";
    let bias = format!(
        "{WEIGHT}  %k = const i32[2] [100, -200]\n  %s = const f32[2] [0.01, 0.02]\n  \
         %b = DequantizeLinear(%k, %s) {{axis=0}}\n  %d = Conv(%x, %w, %b)\n"
    );
    let result = format!(
        "{WEIGHT}  %s = const f32[] [0.05]\n  %z = const u8[] [128]\n  %c = Conv(%x, %w)\n  \
         %q = QuantizeLinear(%c, %s, %z)\n  %d = DequantizeLinear(%q, %s, %z)\n"
    );
    for codes in [weight, bias.as_str(), result.as_str()] {
        for op in TAILS {
            let behind = tail(&mut dice, op, ["d", "y"], 2, [4, 1]);
            let source = format!("opset 21\ngraph (%x: f32[1,2,4,4]) -> (%y) {{\n{codes}{behind}}}\n");
            let (_, before, _) = run(&source, "absorb-qdq");
            let (_, after, _) = run(&source, "absorb-qdq, fold-batch-norm, fold-affine");
            assert!(!before.plan().is_empty(), "{source}");
            assert_eq!(planned(&after), planned(&before), "{source}");
            assert_eq!(passes::text::graph(&after), passes::text::graph(&before), "{source}");
            assert!(after.graph().n_nodes() == 2 && after.graph().nodes().any(|(_, node)| node.op.is(op)), "{source}");
        }
    }
}

/// One of two readers reads a tensor in codes: folded or not, it still does.
#[test]
fn a_fold_keeps_the_codes_in_which_a_convolution_reads() {
    let mut dice = Dice(8);
    for op in TAILS {
        let behind = tail(&mut dice, op, ["c", "y"], 2, [4, 1]);
        let source = format!(
            "opset 21\ngraph (%x: f32[1,2,4,4]) -> (%y, %r) {{\n{WEIGHT}  %s = const f32[] [0.05]\n  %z = const u8[] [128]\n  \
             %q = QuantizeLinear(%x, %s, %z)\n  %d = DequantizeLinear(%q, %s, %z)\n  %c = Conv(%d, %w)\n  %r = Relu(%x)\n{behind}}}\n"
        );
        let (_, after, _) = run(&source, "absorb-qdq, fold-batch-norm, fold-affine");
        let (conv, _) = after.graph().nodes().find(|(_, node)| node.op.is("Conv")).unwrap();
        assert!(after.plan().encoding_of_use(after.graph(), conv, 0).is_some(), "{source}");
    }
}

/// A normalization with these statistics behind a convolution; `%n` is an input.
fn normalized(gamma: &str, mean: &str, variance: &str, epsilon: &str) -> String {
    format!(
        "opset 21\ngraph (%x: f32[1,2,3,3], %n: f32[2]) -> (%y) {{\n{WEIGHT}  %g = const f32[2] [{gamma}]\n  %b = const f32[2] [0.5, -1]\n  \
         %m = const f32[2] [0.25, 2]\n  %v = const f32[2] [{variance}]\n  %c = Conv(%x, %w)\n  \
         %y = BatchNormalization(%c, %g, %b, {mean}, %v) {{epsilon={epsilon}}}\n}}\n"
    )
}

#[test]
fn normalizations_without_a_sound_factor_stay() {
    for (gamma, mean, variance, epsilon, says) in [
        ("1, 2", "%m", "-1, 1", "0.001", "a variance is not positive"),
        ("1, 2", "%m", "1, -0.001", "0.001", "a variance is not positive"),
        ("1, 2", "%m", "0, 1", "0.0", "a variance is not positive"),
        ("2000000, 1", "%m", "1, 1", "0.001", "a factor is over 1e6"),
        ("1, 1", "%m", "1, 0", "1e-13", "a factor is over 1e6"),
        ("1, 2", "%n", "1, 1", "0.001", "a statistic is not constant"),
    ] {
        let (_, after, trace) = run(&normalized(gamma, mean, variance, epsilon), FOLDS);
        let stays = after.graph().nodes().any(|(_, node)| node.op.is("BatchNormalization"));
        assert!(stays && after.graph().n_nodes() == 2, "{says}");
        assert!(trace.notes.iter().any(|note| note.message.contains(says)), "{says}: {:?}", trace.notes);
    }
}

#[test]
fn factors_of_zero_and_below_fold_and_keep_the_function() {
    for gamma in ["0, 1", "-2, 3", "0, -0.5"] {
        let after = folded(&normalized(gamma, "%m", "0.5, 3", "0.001"), FOLDS, &mut Dice(9));
        assert_eq!(after.graph().n_nodes(), 1, "{gamma}");
    }
}

#[test]
fn convolutions_that_share_a_weight_fold_each_by_itself() {
    let mut dice = Dice(10);
    let weight = dice.constant("w", &[3, 2, 3, 3]);
    let first = tail(&mut dice, "BatchNormalization", ["c", "y"], 3, [4, 1]);
    let second = tail(&mut dice, "BatchNormalization", ["d", "z"], 3, [4, 1]);
    let source = format!(
        "opset 21\ngraph (%x: f32[1,2,5,5]) -> (%y, %z) {{\n{weight}  %c = Conv(%x, %w)\n  %d = Conv(%x, %w) {{strides=[2, 2]}}\n\
         {first}{second}}}\n"
    );
    let after = folded(&source, FOLDS, &mut dice);
    let weights: Vec<_> = after.graph().nodes().map(|(_, node)| node.input(1)).collect();
    assert!(weights.len() == 2 && weights[0] != weights[1], "{weights:?}");
}

#[test]
fn quotients_that_are_no_factors_stay() {
    for operands in ["%k, %c", "%c, %z"] {
        let source = format!(
            "opset 21\ngraph (%x: f32[1,2,4,4]) -> (%y) {{\n{WEIGHT}  %k = const f32[2,1,1] [1, 2]\n  %z = const f32[2,1,1] [1, 0]\n  \
             %c = Conv(%x, %w)\n  %y = Div({operands})\n}}\n"
        );
        let (_, after, _) = run(&source, FOLDS);
        assert_eq!(after.graph().n_nodes(), 2, "{operands}");
    }
}
