//! The header of a safetensors file: what is accepted lies inside the file, one tensor behind the other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secateur::checkpoint::header;

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("model.safetensors");
    // The first two bytes say how much data follows the header that the rest is.
    let Some((length, text)) = bytes.split_first_chunk::<2>() else { return };
    let data = vec![0; usize::from(u16::from_le_bytes(*length))];
    let whole = [&(text.len() as u64).to_le_bytes()[..], text, &data].concat();
    std::fs::write(&file, &whole).expect("a file");
    let Ok(tensors) = header::read(&file, 0) else { return };
    let mut end = 8 + text.len() as u64;
    for (_, tensor) in tensors {
        assert_eq!(tensor.range.start, end);
        assert_eq!((tensor.range.end - end) * 8, tensor.parameters() * tensor.dtype.bits());
        end = tensor.range.end;
    }
    assert_eq!(end, whole.len() as u64);
});
