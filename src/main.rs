//! The command `onnx-quant`.

use std::process::ExitCode;

fn main() -> ExitCode {
    onnx_quant::cli::main()
}
