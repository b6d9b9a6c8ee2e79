//! Every vector-Jacobian product against central differences in f64.

use std::collections::BTreeSet;

use super::*;
use crate::ir::{Attr, Attrs, OpKey};
use crate::seed;

/// One call to check: operator, version, attributes, inputs.
struct Case {
    op: &'static str,
    opset: u32,
    attrs: Vec<(&'static str, Attr)>,
    inputs: Vec<Value<f64>>,
    outputs: usize,
    /// Inputs from here on are constants of models, whose gradient nobody wants.
    constant_from: usize,
}

fn int(value: i64) -> Attr {
    Attr::Int(value)
}

fn list(values: &[i64]) -> Attr {
    Attr::Ints(values.into())
}

fn word(text: &str) -> Attr {
    Attr::String(text.as_bytes().to_vec().into())
}

/// Numbers between −2 and 2, away from kinks at whole numbers and at each other.
fn real(shape: &[usize]) -> Value<f64> {
    let n: usize = shape.iter().product();
    let at = |i: usize| {
        let x = 4.0 * seed::uniform(i as u64 * 7 + n as u64) - 2.0;
        let fraction = x - x.floor();
        x.floor() + 0.1 + 0.8 * fraction + 1e-3 * i as f64
    };
    Value::Real(Array::from_shape_vec(shape, (0..n).map(at).collect()).unwrap())
}

fn positive(shape: &[usize]) -> Value<f64> {
    match real(shape) {
        Value::Real(array) => Value::Real(array.mapv(|x: f64| x.abs() + 0.3).into_shared()),
        whole @ Value::Whole(_) => whole,
    }
}

fn fixed(values: &[f64]) -> Value<f64> {
    Value::Real(Array::from_shape_vec(vec![values.len()], values.to_vec()).unwrap())
}

fn whole(values: &[i64]) -> Value<f64> {
    Value::Whole(Array::from_shape_vec(vec![values.len()], values.to_vec()).unwrap())
}

fn case(op: &'static str, inputs: Vec<Value<f64>>) -> Case {
    Case { op, opset: 17, attrs: Vec::new(), inputs, outputs: 1, constant_from: usize::MAX }
}

impl Case {
    fn with(mut self, name: &'static str, value: Attr) -> Self {
        self.attrs.push((name, value));
        self
    }

    fn opset(self, opset: u32) -> Self {
        Self { opset, ..self }
    }

    fn constant_from(self, constant_from: usize) -> Self {
        Self { constant_from, ..self }
    }

    fn outputs(self, outputs: usize) -> Self {
        Self { outputs, ..self }
    }

    fn node(&self) -> Node {
        let (domain, name) = self.op.split_once(':').unwrap_or(("", self.op));
        Node {
            name: self.op.into(),
            op: OpKey { domain: domain.into(), name: name.into(), opset: self.opset },
            inputs: vec![None; self.inputs.len()],
            outputs: (0..self.outputs).map(|i| Some(crate::id::ValueId(u32::try_from(i).unwrap()))).collect(),
            attrs: self.attrs.iter().map(|(name, value)| ((*name).into(), value.clone())).collect::<Attrs>(),
            bodies: Vec::new(),
            notes: None,
        }
    }
}

fn unary() -> Vec<Case> {
    let ops = [
        "Relu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "Exp",
        "Neg",
        "Abs",
        "Softplus",
        "Softsign",
        "HardSwish",
        "Mish",
        "Sin",
        "Cos",
        "Identity",
        "Dropout",
        "Gelu",
        "Swish",
        "LeakyRelu",
        "Elu",
        "Celu",
        "ThresholdedRelu",
        "HardSigmoid",
        "Cast",
        "com.microsoft:Gelu",
        "com.microsoft:FastGelu",
        "com.microsoft:QuickGelu",
    ];
    let mut cases: Vec<Case> = ops.into_iter().map(|op| case(op, vec![real(&[3, 5])])).collect();
    cases.extend(["Log", "Sqrt", "Reciprocal"].into_iter().map(|op| case(op, vec![positive(&[7])])));
    cases.push(case("Gelu", vec![real(&[9])]).with("approximate", word("tanh")));
    cases.push(case("Clip", vec![real(&[11]), fixed(&[-0.5]), fixed(&[0.9])]).constant_from(1));
    cases.push(case("Clip", vec![real(&[11])]).with("min", Attr::Float(-0.3)).opset(6));
    cases
}

fn arithmetic() -> Vec<Case> {
    let mut cases = Vec::new();
    for op in ["Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"] {
        cases.push(case(op, vec![real(&[2, 3, 4]), real(&[3, 1])]));
        cases.push(case(op, vec![real(&[4]), real(&[2, 3, 4])]));
        cases.push(case(op, vec![real(&[2, 3]), positive(&[2, 3])]));
    }
    cases.push(case("Div", vec![real(&[2, 3]), positive(&[3])]));
    cases.push(case("Pow", vec![positive(&[2, 3]), real(&[3])]));
    cases.push(case("Pow", vec![real(&[2, 3]), fixed(&[2.0])]).constant_from(1));
    cases.push(case("PRelu", vec![real(&[2, 3, 4]), real(&[3, 1])]));
    cases.push(case("Sum", vec![real(&[2, 3]), real(&[3]), real(&[2, 1])]));
    cases.push(case("Where", vec![whole(&[1, 0, 1]), real(&[2, 3]), real(&[1, 3])]));
    cases.push(case("MatMul", vec![real(&[2, 3, 4]), real(&[4, 5])]));
    cases.push(case("MatMul", vec![real(&[2, 3, 4]), real(&[2, 4, 5])]));
    cases.push(case("MatMul", vec![real(&[2, 1, 3, 4]), real(&[3, 4, 2])]));
    cases.push(case("MatMul", vec![real(&[4]), real(&[2, 4, 3])]));
    cases.push(case("MatMul", vec![real(&[2, 3, 4]), real(&[4])]));
    cases.push(case("Gemm", vec![real(&[3, 4]), real(&[4, 2]), real(&[2])]).with("alpha", Attr::Float(0.5)));
    cases.push(
        case("Gemm", vec![real(&[4, 3]), real(&[2, 4]), real(&[3, 1])])
            .with("transA", int(1))
            .with("transB", int(1))
            .with("beta", Attr::Float(2.0)),
    );
    cases
}

fn movement() -> Vec<Case> {
    let x = || real(&[2, 3, 4]);
    vec![
        case("Reshape", vec![x(), whole(&[0, -1])]),
        case("Flatten", vec![x()]).with("axis", int(2)),
        case("Squeeze", vec![real(&[1, 3, 1]), whole(&[0])]),
        case("Unsqueeze", vec![x(), whole(&[0, -1])]),
        case("Transpose", vec![x()]).with("perm", list(&[1, 2, 0])),
        case("Transpose", vec![x()]),
        case("Expand", vec![real(&[3, 1]), whole(&[2, 1, 4])]),
        case("Tile", vec![x(), whole(&[1, 2, 3])]),
        case("Slice", vec![x(), whole(&[1, 0]), whole(&[3, 9]), whole(&[1, 2]), whole(&[1, 2])]),
        case("Slice", vec![x(), whole(&[-1]), whole(&[-100]), whole(&[2]), whole(&[-2])]),
        case("Slice", vec![x()]).with("starts", list(&[1])).with("ends", list(&[2])).opset(9),
        case("Gather", vec![x(), whole(&[0, 2, -1, 0])]).with("axis", int(1)),
        case("Pad", vec![x(), whole(&[0, 1, 2, 0, 0, 1])]),
        case("Concat", vec![x(), real(&[2, 1, 4])]).with("axis", int(1)),
        case("Split", vec![x(), whole(&[1, 3])]).with("axis", int(-1)).outputs(2),
        case("Split", vec![x()]).with("axis", int(1)).opset(18).outputs(2),
        case("DepthToSpace", vec![real(&[1, 8, 2, 3])]).with("blocksize", int(2)),
        case("DepthToSpace", vec![real(&[1, 8, 2, 3])]).with("blocksize", int(2)).with("mode", word("CRD")),
        case("SpaceToDepth", vec![real(&[1, 2, 4, 6])]).with("blocksize", int(2)),
        case("Resize", vec![real(&[1, 2, 3, 4]), fixed(&[]), fixed(&[1.0, 1.0, 2.0, 1.5])])
            .constant_from(1)
            .with("mode", word("linear")),
        case("Resize", vec![real(&[1, 2, 3, 4]), fixed(&[]), fixed(&[1.0, 1.0, 2.0, 2.0])])
            .constant_from(1)
            .with("coordinate_transformation_mode", word("asymmetric"))
            .with("nearest_mode", word("floor")),
        case("Resize", vec![real(&[1, 1, 3, 4]), fixed(&[]), fixed(&[]), whole(&[1, 1, 5, 3])])
            .constant_from(1)
            .with("mode", word("linear"))
            .with("coordinate_transformation_mode", word("align_corners")),
        case("Upsample", vec![real(&[1, 2, 3, 4]), fixed(&[1.0, 1.0, 2.0, 2.0])]).constant_from(1).opset(9),
    ]
}

fn sums() -> Vec<Case> {
    let x = || real(&[2, 3, 4]);
    let mut cases = Vec::new();
    for op in ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"] {
        cases.push(case(op, vec![x(), whole(&[0, -1])]).opset(18).with("keepdims", int(0)));
        cases.push(case(op, vec![x()]).with("axes", list(&[1])));
        cases.push(case(op, vec![x()]));
    }
    cases.push(case("GlobalAveragePool", vec![real(&[2, 3, 2, 2])]));
    cases.push(case("GlobalMaxPool", vec![real(&[2, 3, 2, 2])]));
    for op in ["Softmax", "LogSoftmax"] {
        cases.push(case(op, vec![x()]));
        cases.push(case(op, vec![x()]).with("axis", int(1)));
        cases.push(case(op, vec![x()]).with("axis", int(1)).opset(11));
    }
    cases.push(case("LayerNormalization", vec![x(), real(&[4]), real(&[4])]));
    cases.push(case("LayerNormalization", vec![x(), real(&[3, 4])]).with("axis", int(1)));
    cases.push(case("RMSNormalization", vec![x(), real(&[4])]).opset(23));
    cases.push(case("SimplifiedLayerNormalization", vec![x(), real(&[4])]));
    cases.push(case("com.microsoft:SimplifiedLayerNormalization", vec![x(), real(&[4])]));
    cases.push(case("InstanceNormalization", vec![real(&[2, 3, 2, 3]), real(&[3]), real(&[3])]));
    let statistics = || vec![real(&[3]), real(&[3]), real(&[3]), positive(&[3])];
    for shape in [&[2, 3, 2, 3][..], &[4, 3]] {
        let inputs = [vec![real(shape)], statistics()].concat();
        cases.push(case("BatchNormalization", inputs).constant_from(3));
    }
    let group = case("GroupNormalization", vec![real(&[2, 4, 2, 3]), real(&[4]), real(&[4])]);
    cases.push(group.opset(21).with("num_groups", int(2)));
    cases
}

fn windows() -> Vec<Case> {
    let conv = |x: &[usize], w: &[usize], bias: usize| case("Conv", vec![real(x), real(w), real(&[bias])]);
    let turned = |x: &[usize], w: &[usize], bias: usize| case("ConvTranspose", vec![real(x), real(w), real(&[bias])]);
    vec![
        conv(&[2, 3, 5, 4], &[4, 3, 3, 3], 4).with("pads", list(&[1, 1, 1, 1])),
        conv(&[1, 4, 5, 6], &[6, 2, 3, 2], 6)
            .with("group", int(2))
            .with("strides", list(&[2, 1]))
            .with("pads", list(&[0, 1, 2, 0])),
        conv(&[1, 3, 6, 6], &[3, 1, 3, 3], 3).with("group", int(3)).with("pads", list(&[1, 1, 1, 1])),
        conv(&[1, 2, 6, 6], &[4, 1, 3, 3], 4).with("group", int(2)).with("strides", list(&[2, 2])),
        conv(&[1, 2, 7, 7], &[3, 2, 3, 3], 3).with("dilations", list(&[2, 2])),
        conv(&[2, 3, 3, 3], &[5, 3, 1, 1], 5),
        conv(&[1, 3, 9], &[4, 3, 3], 4).with("strides", list(&[2])).with("pads", list(&[1, 1])),
        conv(&[1, 2, 5, 5], &[2, 2, 2, 2], 2).with("auto_pad", word("SAME_UPPER")).with("strides", list(&[2, 2])),
        conv(&[1, 2, 5, 5], &[2, 2, 2, 2], 2).with("auto_pad", word("SAME_LOWER")),
        turned(&[1, 3, 3, 4], &[3, 2, 3, 3], 2).with("strides", list(&[2, 2])).with("pads", list(&[1, 1, 1, 1])),
        turned(&[1, 4, 3], &[4, 1, 2], 2).with("group", int(2)).with("strides", list(&[2])),
        turned(&[1, 2, 3, 3], &[2, 2, 3, 3], 2).with("strides", list(&[2, 2])).with("output_padding", list(&[1, 1])),
        turned(&[1, 4, 3, 3], &[4, 1, 2, 2], 4).with("group", int(4)).with("strides", list(&[2, 2])),
        case("AveragePool", vec![real(&[1, 2, 5, 5])])
            .with("kernel_shape", list(&[3, 3]))
            .with("pads", list(&[1, 1, 1, 1]))
            .with("strides", list(&[2, 2])),
        case("AveragePool", vec![real(&[1, 2, 5])])
            .with("kernel_shape", list(&[2]))
            .with("pads", list(&[1, 0]))
            .with("count_include_pad", int(1)),
        case("MaxPool", vec![real(&[1, 2, 5, 6])])
            .with("kernel_shape", list(&[3, 2]))
            .with("pads", list(&[1, 0, 1, 0]))
            .with("strides", list(&[2, 2]))
            .with("ceil_mode", int(1)),
    ]
}

fn all() -> Vec<Case> {
    [unary(), arithmetic(), movement(), sums(), windows()].into_iter().flatten().collect()
}

/// A tape of one step, and the slots of its inputs and outputs.
fn tape(case: &Case) -> (Tape, Vec<Slot>, Vec<Slot>) {
    let mut tape = Tape::default();
    let slots: Vec<Slot> = case
        .inputs
        .iter()
        .enumerate()
        .map(|(at, input)| tape.leaf(matches!(input, Value::Real(_)) && at < case.constant_from))
        .collect();
    let rule = rule(&case.node()).unwrap_or_else(|error| panic!("{}: {error}", case.op));
    let outputs = tape.push(case.op, rule, slots.iter().copied().map(Some).collect(), case.outputs);
    (tape, slots, outputs)
}

/// Σ c y over all outputs, with fixed numbers c.
fn weighted(values: &Values<f64>, outputs: &[Slot]) -> f64 {
    let sum = |slot: &Slot| values.real(*slot).unwrap().iter().enumerate().map(|(i, y)| weight(i) * y).sum::<f64>();
    outputs.iter().map(sum).sum()
}

fn weight(i: usize) -> f64 {
    seed::uniform(i as u64 + 1000) - 0.3
}

#[test]
fn every_product_agrees_with_central_differences() {
    for case in all() {
        let (tape, slots, outputs) = tape(&case);
        let run = |inputs: &[Value<f64>]| tape.forward(slots.iter().copied().zip(inputs.iter().cloned())).unwrap();
        let values = run(&case.inputs);
        let seeds = outputs.iter().map(|slot| {
            let output = values.real(*slot).unwrap();
            (*slot, Array::from_shape_vec(output.raw_dim(), (0..output.len()).map(weight).collect()).unwrap())
        });
        let grads = tape.backward(&values, seeds, &slots).unwrap();
        for (at, grad) in grads.iter().enumerate() {
            let Value::Real(input) = &case.inputs[at] else { continue };
            if at >= case.constant_from {
                continue;
            }
            let grad = grad.as_ref().unwrap_or_else(|| panic!("{} has none for input {at}", case.op));
            for i in 0..input.len() {
                let moved = |by: f64| {
                    let mut inputs = case.inputs.clone();
                    let mut array = input.clone();
                    *array.iter_mut().nth(i).unwrap() += by;
                    inputs[at] = Value::Real(array);
                    weighted(&run(&inputs), &outputs)
                };
                let step = 1e-5;
                let want = (moved(step) - moved(-step)) / (2.0 * step);
                let got = *grad.iter().nth(i).unwrap();
                assert!(
                    (want - got).abs() < 1e-6 * (1.0 + want.abs()),
                    "{} {:?}: input {at}, element {i}: {got}, by differences {want}",
                    case.op,
                    case.attrs
                );
            }
        }
    }
}

#[test]
fn every_rule_is_checked() {
    let checked: BTreeSet<&str> = all().iter().map(|case| case.op.rsplit(':').next().unwrap_or(case.op)).collect();
    for row in RULES.iter().flat_map(|rows| rows.iter()) {
        assert!(checked.contains(row.op), "no case for {}", row.op);
    }
}
