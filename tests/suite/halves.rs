//! Graphs in 16-bit floats: what they say comes back, what they cannot say is named.

use super::{fixture, text, tool, tool_ok};

fn parsed(text: &str) -> passes::model::Model {
    passes::text::parse(text).unwrap()
}

#[test]
fn a_graph_in_16_bits_comes_back_as_it_was() {
    // Every number here is one of 16 bits.
    let model = parsed(
        "opset 21
graph (%x: f32[batch,4], %shape: i64[2]) -> (%y: f32[?,?], %c: f32[?]) {
  %w = const f32[4,4] [1, 0.5, -2, 3, 1, 1, 1, 1, 0.25, 4, 5, 6, 7, 8, 9, 10]
  %h = MatMul(%x, %w)
  %zeros = ConstantOfShape(%shape)
  %n = Shape(%x)
  %c = Cast(%n) {to = 1}
  %s = Add(%h, %zeros)
  %y = Relu(%s)
}
",
    );
    let meta = std::sync::Arc::new(model.meta.as_ref().clone());
    let lowered = passes::target::Lowered { graph: model.graph().clone(), meta, notes: Vec::new() };
    let half = passes::half::narrow(lowered).unwrap().graph;
    let of_type = |graph: &passes::ir::Graph, dtype| {
        graph.value_ids().filter(|id| graph.value(*id).ty.dtype() == Some(dtype)).count()
    };
    assert!(of_type(&half, passes::tensor::DType::F16) >= 4, "{half:?}");
    // What goes in and out keeps its type.
    let names = |ids: &[passes::id::ValueId], graph: &passes::ir::Graph| -> Vec<String> {
        ids.iter().map(|id| graph.value(*id).name.to_string()).collect()
    };
    assert_eq!(names(half.outputs(), &half), ["y", "c"]);
    assert_eq!(half.value(half.outputs()[0]).ty.dtype(), Some(passes::tensor::DType::F32));
    let back = passes::half::widen(passes::model::Model::new(half, model.meta.as_ref().clone()).unwrap()).unwrap();
    assert_eq!(of_type(back.graph(), passes::tensor::DType::F16), 0);
    let weight =
        back.graph().value_ids().find_map(|id| back.graph().constant(id).filter(|t| t.shape() == [4, 4])).unwrap();
    assert_eq!(weight.values::<f32>().unwrap()[..4], [1.0, 0.5, -2.0, 3.0]);
}

#[test]
fn what_16_bits_cannot_say_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data, out) =
        (fixture("models/digits-resnet.onnx"), fixture("data/digits"), folder.path().join("x.onnx"));
    let base = ["quantize", text(&model), "--data", text(&data), "-o", text(&out), "--rest", "f16"];
    let refused = tool(&[&base[..], &["--target", "ort-cpu"]].concat());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("leave --rest f16 out"));
    assert!(!out.exists());
    tool_ok(&[&base[..], &["--target", "tensorrt"]].concat());
}

/// Masks of attention lie beyond 65504, and now and then a factor does: each is named, with how many of its numbers.
#[test]
fn numbers_beyond_16_bits_are_named() {
    let plain = parsed(
        "opset 21
graph (%x: f32[2,4], %shape: i64[1]) -> (%y) {
  %w = const f32[4,4] [1, 0.5, -2, 3, 1, 1, 1, 1, 0.25, 4, 5, 6, 7, 8, 9, 10]
  %huge = const f32[4] [1, -1e9, 70000, -inf]
  %held = const f32[4] [0.1, 65504, -65519, 1e-9]
  %h = MatMul(%x, %w)
  %s = Add(%h, %huge)
  %t = Add(%s, %held)
  %mask = ConstantOfShape(%shape) {value=const f32[1] [-3e38]}
  %y = Add(%t, %mask)
}
",
    );
    let executor = (onnx_quant::exec::find("auto").unwrap().build)(&plain.meta).unwrap();
    let target = onnx_quant::targets::find("tensorrt").unwrap();
    let mut cx = passes::pass::PassContext::new(target, executor.as_ref());
    let pipeline = passes::pass::Pipeline::parse("infer-shapes, round-to-half", &passes::catalogue::passes()).unwrap();
    let (model, trace) = passes::pass::PassManager::new(Vec::new(), true).run(&pipeline, plain, &mut cx).unwrap();
    let said: Vec<String> = trace.notes.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].contains("OQ5003") && said[0].contains("`huge`") && said[0].contains("2 of its 4"), "{said:#?}");
    assert!(said[1].contains("ConstantOfShape") && said[1].contains("1 of its 1"), "{said:#?}");
    let graph = model.graph();
    let huge = graph.value_ids().find(|id| &*graph.value(*id).name == "huge").unwrap();
    let cut = graph.constant(huge).unwrap().values::<f32>().unwrap().into_owned();
    assert_eq!(cut, [1.0, -65504.0, 65504.0, f32::NEG_INFINITY]);
}
