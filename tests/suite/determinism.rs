//! The same bytes for any thread count, sample order and batch size.

use std::path::Path;

use super::{fixture, quantized, text, tool_ok};

#[test]
fn threads_do_not_matter() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let files: Vec<Vec<u8>> = [["--threads", "1"], ["--threads", "2"], ["--threads", "3"]]
        .iter()
        .zip(&folders)
        .map(|(threads, folder)| std::fs::read(quantized(folder.path(), threads)).unwrap())
        .collect();
    assert!(files[0] == files[1] && files[1] == files[2]);
}

/// Second moments are exact sums: what is rounded by them does not depend on threads, batches or order either. Gradients are drawn, and added
/// up, by what samples are.
#[test]
fn rounding_by_data_is_as_reproducible() {
    let model = fixture("models/digits-resnet.onnx");
    let coupled = "infer-shapes, fold-batch-norm, infer-shapes, drop-dead, calibrate, assign-encodings{weights=mse}, \
                   round-in-order{refit=3, coupled=1}";
    let adaptive = &coupled.replace("coupled=1", "adaptive=0.5");
    for how in [["--recipe", "best"], ["--pipeline", coupled], ["--pipeline", adaptive]] {
        let results: Vec<Vec<u8>> = [("1", 1_usize, 1_usize), ("2", 8, 37), ("3", 32, 11)]
            .iter()
            .map(|&(threads, batch, stride)| {
                let folder = tempfile::tempdir().unwrap();
                // Some neighbors change places too, so that even ones come to be odd.
                let swapped = |row: usize| if stride > 1 && (row / 2).is_multiple_of(3) { row ^ 1 } else { row };
                rebatched(folder.path(), batch, |row| swapped(row * stride % 128));
                let out = folder.path().join("q.onnx");
                let args =
                    ["quantize", text(&model), "--data", text(folder.path()), "-o", text(&out), "--progress", "none"];
                tool_ok(&[&args[..], &how, &["--scheme", "w4a8", "--threads", threads]].concat());
                std::fs::read(out).unwrap()
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{how:?}");
    }
}

/// Writes the fixture's samples as `.safetensors`, `batch` to a file, in the order of `order`.
fn rebatched(folder: &Path, batch: usize, order: impl Fn(usize) -> usize) {
    use passes::exec::Dataset as _;
    let imported = onnx_quant::import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let slots = onnx_quant::dataset::Slot::of(imported.model.graph());
    let data = onnx_quant::dataset::Files::open(&fixture("data/digits"), slots, None, None).unwrap();
    for start in (0..data.len()).step_by(batch) {
        let rows = start..(start + batch).min(data.len());
        let n = rows.len();
        let bytes: Vec<u8> = rows.flat_map(|row| data.sample(order(row)).unwrap()[0].bytes().to_vec()).collect();
        let header =
            format!("{{\"input\":{{\"dtype\":\"F32\",\"shape\":[{n},1,28,28],\"data_offsets\":[0,{}]}}}}", bytes.len());
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend(bytes);
        std::fs::write(folder.join(format!("{start:05}.safetensors")), file).unwrap();
    }
}

#[test]
fn batches_and_order_do_not_matter() {
    let results: Vec<Vec<u8>> = [(1_usize, 1_usize), (8, 1), (32, 37), (5, 11)]
        .iter()
        .map(|&(batch, stride)| {
            let folder = tempfile::tempdir().unwrap();
            // 37 and 11 share no factor with 128: every sample comes once, shuffled.
            rebatched(folder.path(), batch, |row| row * stride % 128);
            let stats = folder.path().join("stats.json");
            let model = fixture("models/digits-resnet.onnx");
            tool_ok(&["stats", text(&model), "--data", text(folder.path()), "-o", text(&stats), "--progress", "none"]);
            std::fs::read(stats).unwrap()
        })
        .collect();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}
