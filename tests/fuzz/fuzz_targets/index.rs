//! `model.safetensors.index.json`: no name in it reaches out of the directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secateur::checkpoint::Index;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 4}"#;

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("config.json"), CONFIG).expect("a file");
    std::fs::write(dir.path().join("model.safetensors.index.json"), bytes).expect("a file");
    assert!(Index::read(dir.path()).is_err(), "there are no weights");
});
