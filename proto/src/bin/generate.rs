//! Regenerates `src/gen/onnx.rs` from `onnx.proto`; run in the repository root after changing the schema.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = protox::compile(["proto/onnx.proto"], ["proto"])?;
    prost_build::Config::new().bytes([".onnx.TensorProto.raw_data"]).out_dir("proto/src/gen").compile_fds(files)?;
    Ok(())
}
