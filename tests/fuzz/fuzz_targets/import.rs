//! Any bytes: an error, or a model that exports and imports again.
#![no_main]

use onnx_quant::emit::{self, Emit};
use onnx_quant::import;
use onnx_quant::load::ExternalFiles;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(wire) = proto::decode(bytes::Bytes::copy_from_slice(data)) else { return };
    let mut files = ExternalFiles::beside(std::path::Path::new("/nonexistent/m.onnx"));
    let Ok(imported) = import::model(wire, &mut files) else { return };
    let artifact = emit::model(imported.model.graph(), &imported.model.meta, &Emit::default(), "m.onnx");
    import::model(artifact.model, &mut files).expect("what was exported imports");
});
