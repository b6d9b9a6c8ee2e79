//! What a division of channels is folded into: every operator that takes it or hands it on, alone.

use super::attention::Tokens;
use super::equalize::{divided, matrix};
use super::heads::loud;

/// Rows for matrix products.
const ROWS: (&str, Tokens) = ("2,512,16", Tokens(&[2, 512, 16]));
/// Pictures of 16 channels.
const PICTURES: (&str, Tokens) = ("2,16,16,32", Tokens(&[2, 16, 16, 32]));
/// Many small ones.
const SMALL: (&str, Tokens) = ("512,16,2,2", Tokens(&[512, 16, 2, 2]));

/// A constant of 16 numbers; with `loud`, the fourth is 40 times as large.
fn row(name: &str, shape: &str, loud: bool) -> String {
    let value =
        |i: usize| if loud && i == 3 { 40.0 } else { 0.5 + f64::from(u32::try_from(i * 7 % 16).unwrap()) / 16.0 };
    let values: Vec<String> = (0..16).map(|i| format!("{:.4}", value(i))).collect();
    format!("  %{name} = const f32[{shape}] [{}]\n", values.join(", "))
}

/// A kernel of `shape` whose fourth output is 40 times as loud; outputs lie along its `axis`.
fn kernel(name: &str, shape: [usize; 4], axis: usize) -> String {
    let inner: usize = shape[axis + 1..].iter().product();
    let value = |i: usize| {
        let noise = f64::from(u32::try_from((i * 31) % 41).unwrap()) / 20.0 - 1.0;
        if i / inner % shape[axis] == 3 { 40.0 * noise } else { noise }
    };
    let values: Vec<String> = (0..shape.iter().product()).map(|i| format!("{:.3}", value(i))).collect();
    let [a, b, c, d] = shape;
    format!("  %{name} = const f32[{a},{b},{c},{d}] [{}]\n", values.join(", "))
}

/// All that the nodes of a test may name.
fn constants() -> String {
    let transposed = {
        let value = |i: usize| f64::from(u32::try_from((i * 31) % 41).unwrap()) / 20.0 - 1.0;
        let of = |i: usize| format!("{:.3}", if i / 16 == 3 { 40.0 * value(i) } else { value(i) });
        format!("  %wt = const f32[16,16] [{}]\n", (0..256).map(of).collect::<Vec<_>>().join(", "))
    };
    [
        loud("w", 16, 16),
        transposed,
        matrix("wg", 16, 16),
        matrix("wd", 16, 4),
        loud("half", 16, 8),
        loud("rest", 16, 8),
        kernel("k", [16, 16, 1, 1], 0),
        kernel("kg", [16, 8, 1, 1], 0),
        kernel("kt", [16, 16, 1, 1], 1),
        row("gamma", "16", true),
        row("beta", "16", false),
        row("slope", "16", false),
        row("slopes", "16,1,1", false),
        row("shift", "1,16,1,1", false),
        row("bias", "16", false),
        "  %zero = const f32[] [0]\n  %six = const f32[] [6]\n  %one = const f32[] [1]\n  %two = const f32[] [2]\n"
            .into(),
        "  %eps = const f32[] [0.00001]\n  %last = const i64[1] [-1]\n  %behind = const i64[2] [2, 3]\n".into(),
        "  %flat = const i64[3] [0, 0, -1]\n  %pair = const i64[2] [0, -1]\n  %rows = const i64[2] [1024, 16]\n".into(),
        "  %whole = const i64[3] [2, 512, 16]\n  %mixed = const i64[3] [2, 512, 16]\n  %few = const f32[1] [0.3]\n"
            .into(),
    ]
    .concat()
}

/// The model that makes `%t` by `nodes`, and the product that reads it.
fn model(shape: &str, nodes: &[&str], outputs: &str) -> String {
    let nodes = nodes.join("\n  ");
    format!(
        "opset 21\ngraph (%x: f32[{shape}]) -> ({outputs}) {{\n{}  {nodes}\n  %y = MatMul(%t, %wd)\n}}\n",
        constants()
    )
}

/// From a picture to rows of channels.
const TO_ROWS: [&str; 2] = ["%f = Reshape(%p, %flat)", "%t = Transpose(%f) {perm=[0, 2, 1]}"];

type Case = (&'static str, &'static [&'static str]);

const OF_ROWS: &[Case] = &[
    ("norm", &["%t = LayerNormalization(%x, %gamma) {axis=-1}"]),
    ("norm with a shift", &["%t = LayerNormalization(%x, %gamma, %beta) {axis=2}"]),
    (
        "root mean square norm in primitives",
        &[
            "%q = Pow(%x, %two)",
            "%m = ReduceMean(%q, %last) {keepdims=1}",
            "%e = Add(%m, %eps)",
            "%r = Sqrt(%e)",
            "%n = Div(%x, %r)",
            "%t = Mul(%gamma, %n)",
        ],
    ),
    (
        "norm in primitives",
        &[
            "%m = ReduceMean(%x, %last) {keepdims=1}",
            "%c = Sub(%x, %m)",
            "%q = Mul(%c, %c)",
            "%v = ReduceMean(%q, %last) {keepdims=1}",
            "%e = Add(%v, %eps)",
            "%r = Sqrt(%e)",
            "%n = Div(%c, %r)",
            "%g = Mul(%n, %gamma)",
            "%t = Add(%g, %beta)",
        ],
    ),
    ("product", &["%t = MatMul(%x, %w)"]),
    ("constant factor", &["%h = MatMul(%x, %wg)", "%t = Mul(%h, %gamma)"]),
    ("one factor for all", &["%h = MatMul(%x, %w)", "%t = Mul(%few, %h)"]),
    ("constant denominator", &["%h = MatMul(%x, %w)", "%t = Div(%h, %beta)"]),
    ("constant numerator", &["%s = Sigmoid(%x)", "%p = Add(%s, %one)", "%t = Div(%gamma, %p)"]),
    ("shift", &["%h = MatMul(%x, %w)", "%t = Add(%h, %beta)"]),
    ("one shift for all", &["%h = MatMul(%x, %w)", "%t = Sub(%h, %few)"]),
    ("what is taken from a constant", &["%h = MatMul(%x, %w)", "%t = Sub(%beta, %h)"]),
    ("sum of two", &["%h = MatMul(%x, %w)", "%g = MatMul(%x, %wg)", "%t = Add(%h, %g)"]),
    ("second operand of a product", &["%s = Sigmoid(%x)", "%h = MatMul(%x, %w)", "%t = Mul(%s, %h)"]),
    ("numerator", &["%s = Sigmoid(%x)", "%p = Add(%s, %one)", "%h = MatMul(%x, %w)", "%t = Div(%h, %p)"]),
    ("relu", &["%h = MatMul(%x, %w)", "%t = Relu(%h)"]),
    ("leaky relu", &["%h = MatMul(%x, %w)", "%t = LeakyRelu(%h) {alpha=0.1}"]),
    ("relu with slopes", &["%h = MatMul(%x, %w)", "%t = PRelu(%h, %slope)"]),
    ("clamp from 0 on", &["%h = MatMul(%x, %w)", "%t = Clip(%h, %zero)"]),
    ("gemm", &["%r = Reshape(%x, %rows)", "%t = Gemm(%r, %w)"]),
    ("transposed gemm", &["%r = Reshape(%x, %rows)", "%t = Gemm(%r, %wt, %beta) {transB=1}"]),
    ("gemm and one bias for all", &["%r = Reshape(%x, %rows)", "%t = Gemm(%r, %w, %few)"]),
    ("rows put in another shape", &["%r = Reshape(%x, %rows)", "%h = MatMul(%r, %w)", "%t = Reshape(%h, %whole)"]),
    ("tensors side by side", &["%a = MatMul(%x, %half)", "%b = MatMul(%x, %rest)", "%t = Concat(%a, %b) {axis=-1}"]),
    ("tensors one behind the other", &["%a = MatMul(%x, %w)", "%b = MatMul(%x, %w)", "%t = Concat(%a, %b) {axis=1}"]),
];

const OF_PICTURES: &[Case] = &[
    ("convolution", &["%p = Conv(%x, %k)"]),
    ("convolution with a bias", &["%p = Conv(%x, %k, %bias)"]),
    ("convolution of groups", &["%p = Conv(%x, %kg, %bias) {group=2}"]),
    ("transposed convolution", &["%p = ConvTranspose(%x, %kt, %bias)"]),
    ("relu with a slope for every channel", &["%c = Conv(%x, %k)", "%p = PRelu(%c, %slopes)"]),
    ("shift of channels", &["%c = Conv(%x, %k)", "%p = Add(%c, %shift)"]),
    ("maximum", &["%c = Conv(%x, %k)", "%p = MaxPool(%c) {kernel_shape=[3, 3], pads=[1, 1, 1, 1]}"]),
    ("average", &["%c = Conv(%x, %k)", "%p = AveragePool(%c) {kernel_shape=[3, 3], pads=[1, 1, 1, 1]}"]),
];

const OF_SMALL: &[Case] = &[
    ("pooled", &["%c = Conv(%x, %k)", "%r = Relu(%c)", "%p = GlobalAveragePool(%r)", "%t = Flatten(%p)"]),
    ("pooled by the largest", &["%c = Conv(%x, %k)", "%p = GlobalMaxPool(%c)", "%t = Squeeze(%p, %behind)"]),
    ("pooled and reshaped", &["%c = Conv(%x, %k)", "%p = GlobalAveragePool(%c)", "%t = Reshape(%p, %pair)"]),
];

/// The cases with what they read.
fn cases() -> Vec<(&'static str, &'static (&'static str, Tokens), Vec<&'static str>)> {
    let rows = OF_ROWS.iter().map(|(name, nodes)| (*name, &ROWS, nodes.to_vec()));
    let pictures = OF_PICTURES.iter().map(|(name, nodes)| (*name, &PICTURES, [nodes, &TO_ROWS[..]].concat()));
    rows.chain(pictures).chain(OF_SMALL.iter().map(|(name, nodes)| (*name, &SMALL, nodes.to_vec()))).collect()
}

#[test]
fn a_division_is_folded_into_whatever_takes_it() {
    for (name, (shape, data), nodes) in cases() {
        let source = model(shape, &nodes, "%y");
        let (before, after, counts) = divided(&source, data, "smooth", "w8a8");
        assert!(counts.contains("\"folded\": 1"), "{name}: {counts}");
        // What reads the input may be divided by a node of its own.
        let inserted = usize::from(counts.contains("inserted"));
        assert_eq!(before.graph().n_nodes() + inserted, after.graph().n_nodes(), "{name}");
    }
}

/// Between two layers ranges of weights are balanced along all these ways; one weight that two nodes read stays.
#[test]
fn ranges_of_weights_are_balanced_along_the_same_ways() {
    for (name, (shape, data), nodes) in cases() {
        let (_, _, counts) = divided(&model(shape, &nodes, "%y"), data, "equalize-layers{from=weights}", "w8a8");
        let linear = ["MatMul(", "Gemm(", "Conv(", "ConvTranspose("];
        let writes = nodes.iter().any(|node| linear.iter().any(|op| node.contains(op)));
        assert_eq!(counts.contains("channels"), writes && name != "tensors one behind the other", "{name}: {counts}");
    }
}

#[test]
fn weights_alone_are_scaled_along_the_same_ways() {
    for (name, (shape, data), nodes) in cases().into_iter().step_by(3) {
        let (_, _, counts) = divided(&model(shape, &nodes, "%y"), data, "awq", "w3a16g8");
        assert!(counts.contains("folded"), "{name}: {counts}");
    }
}

#[test]
fn a_division_that_would_change_something_else_is_not_folded() {
    let rows: &[Case] = &[
        ("a curve", &["%h = MatMul(%x, %w)", "%t = Sigmoid(%h)"]),
        ("a clamp that ends", &["%h = MatMul(%x, %w)", "%t = Clip(%h, %zero, %six)"]),
        ("another reader on the way", &["%h = MatMul(%x, %w)", "%t = Relu(%h)", "%z = Neg(%h)"]),
        ("a norm over other axes too", &["%t = LayerNormalization(%x, %gamma) {axis=1}"]),
        ("a weight that is computed", &["%v = Neg(%w)", "%u = Add(%v, %m)", "%t = MatMul(%x, %u)", "%z = Neg(%m)"]),
    ];
    let extra = "  %mm = const f32[16,16] rand(seed=4)\n";
    for (name, nodes) in rows {
        let outputs = if nodes.iter().any(|node| node.starts_with("%z")) { "%y, %z" } else { "%y" };
        let source = model(ROWS.0, nodes, outputs).replace("  %zero =", &format!("{extra}  %zero ="));
        let source =
            source.replace("  %v = Neg(%w)", "  %s = ReduceMean(%x) {keepdims=0}\n  %m = Mul(%mm, %s)\n  %v = Neg(%w)");
        let (_, _, counts) = divided(&source, &ROWS.1, "smooth", "w8a8");
        assert!(!counts.contains("folded"), "{name}: {counts}");
    }
    // Rows that mix channels.
    let mixed = ["%c = Conv(%x, %k)", "%t = Reshape(%c, %mixed)"];
    let (_, _, counts) = divided(&model(PICTURES.0, &mixed, "%y"), &PICTURES.1, "smooth", "w8a8");
    assert!(!counts.contains("folded"), "{counts}");
}

/// Options name nodes: what takes a division keeps its name.
#[test]
fn nodes_keep_their_names() {
    let source = model(ROWS.0, &["%h = MatMul(%x, %w)", "%t = Relu(%h)"], "%y");
    let (before, after, counts) = divided(&source, &ROWS.1, "smooth", "w8a8");
    assert!(counts.contains("folded"), "{counts}");
    let names =
        |model: &passes::model::Model| model.graph().nodes().map(|(_, n)| n.name.to_string()).collect::<Vec<_>>();
    assert!(names(&before).iter().all(|name| names(&after).contains(name)), "{:?}", names(&after));
}
