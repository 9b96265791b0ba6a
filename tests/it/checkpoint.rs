//! Model directories as they describe themselves: hostile ones are refused before anything is reserved.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use secateur::checkpoint::{Config, Index};
use secateur::engine::model::Checkpoint;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::tiny::Tiny;

fn model(tiny: &Tiny) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path());
    dir
}

fn refusal(dir: &Path) -> String {
    Index::read(dir).map(|_| ()).expect_err("it is refused").message
}

/// A weight file with this header and so many bytes behind it.
fn weights(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn a_header_that_lies_is_refused_with_file_and_reason() {
    let dir = model(&Tiny::llama());
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let two = |second: &str| {
        format!(
            r#"{{"a": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
                "b": {{"dtype": "F32", "shape": [2], "data_offsets": {second}}}}}"#
        )
    };
    let twice = r#"{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                    "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}"#;
    let name =
        |name: &str| format!(r#"{{"{name}": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}"#);
    let huge = "18446744073709551615";
    for (bytes, reason) in [
        (weights(&two("[4, 12]"), 12), "overlaps"),
        (weights(&two("[12, 20]"), 20), "leaves a gap"),
        (weights(&two("[8, 16]"), 8), "its header describes"),
        (weights(&two("[8, 16]"), 17), "its header describes"),
        (weights(&entry("F32", "[3]", "[0, 8]"), 8), "does not take the bytes"),
        (weights(&entry("F32", "[2]", "[8, 0]"), 8), "does not take the bytes"),
        (weights(&entry("F32", &format!("[{huge}, {huge}]"), "[0, 8]"), 8), "does not take the bytes"),
        (
            weights(&entry("U8", "[4611686018427387904]", "[0, 4611686018427387904]"), 8),
            "does not take the bytes",
        ),
        (weights(&entry("U8", "[1]", &format!("[18446744073709551614, {huge}]")), 8), "lies at"),
        (weights(&entry("U8", "[1,1,1,1,1,1,1,1,1]", "[0, 1]"), 1), "does not take the bytes"),
        (weights(&entry("F3", "[2]", "[0, 8]"), 8), "unknown type"),
        (weights(twice, 2), "twice"),
        (weights(&name("../../etc/passwd"), 1), "no name of a tensor"),
        (weights(&name("a/b"), 1), "no name of a tensor"),
        (weights("[]", 0), "no readable header"),
        (weights(r#"{"a": 1}"#, 0), "no readable header"),
        (u64::MAX.to_le_bytes().to_vec(), "not a safetensors file"),
        (99_999_999u64.to_le_bytes().to_vec(), "its header alone takes"),
        (Vec::new(), "shorter than any header"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j".to_vec(), "is a pickle"),
        (b"PK\x03\x04 zip of pickles".to_vec(), "is a pickle"),
    ] {
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let said = refusal(dir.path());
        assert!(said.contains("model.safetensors") && said.contains(reason), "{reason}: {said}");
    }
}

#[test]
fn an_index_cannot_reach_out_of_its_directory() {
    let dir = model(&Tiny { shards: 2, ..Tiny::llama() });
    let index = dir.path().join("model.safetensors.index.json");
    for file in ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "pytorch_model.bin", ""] {
        fs::write(&index, json!({"weight_map": {"a": file}}).to_string()).unwrap();
        assert!(refusal(dir.path()).contains("no name of a safetensors file"), "{file}");
    }
    for empty in
        [json!({}), json!({"weight_map": {}}), json!({"weight_map": []}), json!({"weight_map": {"a": 1}})]
    {
        fs::write(&index, empty.to_string()).unwrap();
        assert!(refusal(dir.path()).contains("model.safetensors.index.json"));
    }
}

fn config(changes: &Value) -> Result<Config, String> {
    let mut raw = json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "vocab_size": 10
    });
    raw.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Config::read(raw.as_object().unwrap().clone()).map_err(|failure| failure.message)
}

#[test]
fn a_key_that_may_change_the_computation_is_refused_by_name_and_others_are_not() {
    for (key, value) in [
        ("attn_logit_softcapping", json!(30.0)),
        ("sliding_window_size", json!(128)),
        ("num_experts_per_tok", json!(2)),
        ("rotary_base_scaling", json!(8.0)),
        ("use_alibi", json!(true)),
        ("layer_scale", json!([1.0, 2.0])),
        ("clip_qkv_norm", json!(8.0)),
    ] {
        let said = config(&json!({ key: value })).unwrap_err();
        assert!(said.contains(key), "{said}");
    }
    for (key, value) in [
        ("attention_dropout", json!(0.1)),
        ("attn_logit_softcapping", json!(null)),
        ("use_alibi", json!(false)),
        ("_name_or_path", json!("somewhere")),
        ("transformers_version", json!("4.40.0")),
        ("a_key_of_the_future", json!({"kept": [1, 2]})),
    ] {
        assert!(config(&json!({ key: value })).is_ok(), "{key}");
    }
    for (key, value, word) in [
        ("model_type", json!("mamba"), "mamba"),
        ("hidden_act", json!("xielu"), "xielu"),
        ("rope_scaling", json!({"rope_type": "spiral", "factor": 2.0}), "spiral"),
        ("quantization_config", json!({"bits": 4}), "quantization_config"),
        ("layer_types", json!(["full_attention"]), "layer_types"),
        ("num_attention_heads", json!(3), "do not fit together"),
        ("num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("hidden_size", json!(-8), "hidden_size"),
        ("vocab_size", json!(1e300), "vocab_size"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
    ] {
        let said = config(&json!({"num_key_value_heads": 2, key: value})).unwrap_err();
        assert!(said.contains(word), "{said}");
    }
}

/// Ten thousand broken directories: each is read or refused, none ends the process or takes long.
#[test]
fn no_byte_of_a_checkpoint_can_break_the_reader() {
    let dir = model(&Tiny { layers: 2, hidden: 8, intermediate: 8, heads: 2, kv_heads: 1, ..Tiny::qwen2() });
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for file in ["config.json", "model.safetensors"] {
        let path = dir.path().join(file);
        let whole = fs::read(&path).unwrap();
        // Of the weights only the header is read, and it lies at the beginning.
        let end = whole.len().min(6000);
        for _ in 0..1500 {
            let mut broken = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..end.min(broken.len()));
                match rng.random_range(0..4) {
                    0 => broken[at] = rng.random(),
                    1 => broken[at] = *b"0123456789-\"{}[],:.e".get(rng.random_range(0..20)).unwrap(),
                    2 => drop(broken.splice(at..at, std::iter::repeat_n(b'9', rng.random_range(1..20)))),
                    _ => drop(broken.drain(at..(at + rng.random_range(1..40)).min(broken.len()))),
                }
            }
            fs::write(&path, broken).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
                let count = checkpoint.config().layer_count as u32;
                let _ = checkpoint.config().without_layers(&[count - 1]);
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    assert!(Checkpoint::open(dir.path()).is_ok());
}

fn secateur(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_secateur")).args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn inspect_tells_what_a_checkpoint_is_and_what_leaving_out_layers_saves() {
    let dir = model(&Tiny::llama());
    let path = dir.path().to_str().unwrap();
    let output = secateur(&["inspect", path, "--json", "--layers", "2,3"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(found["model_type"], "llama");
    assert_eq!(found["layer_count"], 6);
    assert_eq!(found["parameters"], checkpoint.parameters());
    assert_eq!(found["embedding_parameters"], 257 * 64);
    let per_layer = (checkpoint.parameters() - 257 * 64 - 64) / 6;
    assert_eq!(found["savings"][0]["parameters"], 2 * per_layer);
    assert_eq!(found["savings"][1]["layers"], 3);
    assert!(said(&secateur(&["inspect", path])).contains("family"));
    let refused = secateur(&["inspect", path, "--layers", "6"]);
    assert!(!refused.status.success() && said(&refused).contains("one must stay"), "{}", said(&refused));
}

#[test]
fn models_lists_every_family() {
    let found: Value = serde_json::from_slice(&secateur(&["models", "--json"]).stdout).unwrap();
    let types: Vec<&str> =
        found.as_array().unwrap().iter().map(|f| f["model_type"].as_str().unwrap()).collect();
    assert!(types.contains(&"llama") && types.contains(&"gpt_neox"), "{types:?}");
    assert!(said(&secateur(&["models"])).contains("query_key_value"));
}

#[test]
fn prune_leaves_layers_out_of_files_and_nothing_half_done() {
    let dir = model(&Tiny { shards: 3, ..Tiny::llama() });
    let (base, out) = (dir.path().to_str().unwrap(), dir.path().join("cut"));
    let out = out.to_str().unwrap();
    let output = secateur(&["prune", base, "--drop", "1-2,4", "--prove", "--out", out]);
    assert!(output.status.success() && said(&output).contains("6 -> 3 layers"), "{}", said(&output));
    let (whole, cut) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(Path::new(out)).unwrap());
    assert_eq!(
        cut.bytes("model.layers.2.mlp.up_proj.weight").unwrap(),
        whole.bytes("model.layers.5.mlp.up_proj.weight").unwrap()
    );
    for (drop, to, word) in [
        ("1", out, "is there already"),
        ("6", "new", "0 to 5"),
        ("0-5", "new", "one must stay"),
        ("3-1", "new", "no range"),
        ("one", "new", "no number of a layer"),
    ] {
        let refused = secateur(&["prune", base, "--drop", drop, "--out", to]);
        assert!(!refused.status.success() && said(&refused).contains(word), "{}", said(&refused));
    }
    assert!(!Path::new("new").exists() && !dir.path().join("cut.part").exists());
}
