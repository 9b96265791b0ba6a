//! `tokenizer.json`: a stranger's tokenizer is read or refused.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use secateur::engine::model::checkpoint::read_tokenizer;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(|| {
    // The library's own panics are caught and told as errors; others still end the run.
    std::panic::set_hook(Box::new(|_| {}));
    tempfile::tempdir().expect("a directory")
});

fuzz_target!(|bytes: &[u8]| {
    let path = DIR.path().join("tokenizer.json");
    std::fs::write(&path, bytes).expect("a file");
    let _ = read_tokenizer(&path);
});
