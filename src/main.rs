//! temp
use std::path::Path;
use passes::pass::*;
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let t=Instant::now();
    let im = match onnx_quant::import::file(Path::new(&args[1])) { Ok(i) => i, Err(e) => { println!("ERR {e}"); std::process::exit(2) } };
    let target = onnx_quant::targets::find("ort-cpu").unwrap();
    let text = std::env::var("PIPE").unwrap_or(target.pipeline(passes::target::Goal::Balanced).to_string());
    let cat = passes::catalogue::passes();
    let pipe = Pipeline::parse(&text, &cat).unwrap();
    println!("import {:?}", t.elapsed());
    let data = onnx_quant::dataset::Files::open(Path::new(&args[2]), onnx_quant::dataset::Slot::of(im.model.graph()), None, None).unwrap();
    println!("data {:?} {}", t.elapsed(), passes::exec::Dataset::len(&data));
    let exec = (onnx_quant::exec::find(&std::env::var("EXEC").unwrap_or("tract".into())).unwrap().build)(&im.model.meta).unwrap();
    let mut cx = PassContext { target, executor: exec.as_ref(), dataset: Some(&data), wishes: Default::default(), keep_float: &Default::default(), threads: 2, tap_budget: 1<<29, progress: &passes::exec::Silent };
    let mut pm = PassManager::default(); pm.check = std::env::var("CHECK").is_ok();
    let (model, trace) = pm.run(&pipe, im.model, &mut cx).unwrap();
    println!("passes {:?}", t.elapsed());
    for s in &trace.steps { println!("{} r{} e{} {:?}", s.0, s.1.rounds, s.1.edits, s.1.counts); }
    for n in trace.notes.iter().take(20) { println!("{n}"); }
    let low = target.lower(&model).unwrap();
    println!("lower {:?}", t.elapsed());
    let a = onnx_quant::emit::model(&low.graph, &low.meta, &Default::default(), "x.onnx");
    onnx_quant::emit::write(a, Path::new(&args[3])).unwrap();
    println!("done {:?}", t.elapsed());
}
