//! `tokenizer.json`: a stranger's tokenizer is refused, or reads a text.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use secateur::engine::model::checkpoint::read_tokenizer;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a directory"));

fuzz_target!(|bytes: &[u8]| {
    let path = DIR.path().join("tokenizer.json");
    std::fs::write(&path, bytes).expect("a file");
    if let Ok(tokenizer) = read_tokenizer(&path) {
        let _ = tokenizer.encode("The sea is wide.", false);
    }
});
