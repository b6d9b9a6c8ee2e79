//! What decodes, encodes to something that decodes to the same.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(model) = proto::decode(bytes::Bytes::copy_from_slice(data)) {
        let once = proto::encode(&model);
        let again = proto::decode(once.clone().into()).expect("what was encoded decodes");
        assert_eq!(proto::encode(&again), once);
        let mut streamed = Vec::new();
        proto::encode_to(again, &mut streamed).expect("a vector takes everything");
        assert_eq!(streamed, once);
    }
});
