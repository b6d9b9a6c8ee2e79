//! Samples: every file form gives the same tensors.

use passes::exec::Dataset as _;

use super::fixture;

#[test]
fn fixtures_hold_128_single_samples() {
    let imported = onnx_quant::import::file(&fixture("models/digits-resnet.onnx")).unwrap();
    let slots = onnx_quant::dataset::Slot::of(imported.model.graph());
    let data = onnx_quant::dataset::Files::open(&fixture("data/digits"), slots.clone(), None, None).unwrap();
    assert_eq!((data.len(), data.n_files(), data.is_split()), (128, 4, true));
    let sample = &data.sample(77).unwrap()[0];
    assert_eq!(sample.shape(), [1, 1, 28, 28]);
    let few = onnx_quant::dataset::Files::open(&fixture("data/digits"), slots, None, Some(40)).unwrap();
    assert_eq!(few.len(), 40);
    assert_eq!(few.sample(39).unwrap(), data.sample(39).unwrap());
    assert!(few.sample(40).is_err());
}
