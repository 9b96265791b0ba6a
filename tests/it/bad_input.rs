//! Whatever a person may get wrong: a clear word that names the thing and the
//! remedy, before anything is computed, and nothing half written.

use std::fs;

use secateur::job::progress::Event;
use serde_json::{Value, json};

use crate::support::program::{Bench, stderr};
use crate::support::tiny::{Tiny, Weight};

/// Runs a spec that must be refused with this exit code and all of these words.
fn refused(bench: &Bench, spec: &Value, code: i32, words: &[&str]) {
    let output = bench.run(spec, "out", &[]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
    if code == 1 {
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    for left in
        ["pruned", "healed", "adapter", "profile.json", "selection.json", "eval.json", "report.json", "parts"]
    {
        assert!(!bench.path("out").join(left).exists(), "{left} was left behind");
    }
}

fn bench() -> Bench {
    Bench::new(&Tiny::llama())
}

#[test]
fn more_layers_than_there_are() {
    let bench = bench();
    let too_many = bench.spec_with("/prune/amount", json!({"layers": 6}));
    refused(&bench, &too_many, 2, &["/prune/amount", "6 layers", "at most 5"]);
    let outside = bench.spec_with("/prune", json!({"strategy": "explicit", "layers": [2, 9]}));
    refused(&bench, &outside, 2, &["/prune/layers/1", "layer 9 does not exist", "0 to 5"]);
}

#[test]
fn a_search_that_cannot_work() {
    let bench = bench();
    let beam = bench.spec_with("/prune/damage", json!({"beam": 0}));
    refused(&bench, &beam, 2, &["/prune/damage/beam", "from 1"]);
    let tasks = bench.spec_with("/prune/strategy", json!("task_accuracy"));
    refused(&bench, &tasks, 2, &["/prune/damage/tasks", "items"]);
    fs::write(bench.path("items.jsonl"), "").unwrap();
    let items = json!({"from": "path", "path": bench.path("items.jsonl")});
    let mut empty = tasks;
    empty["prune"]["damage"] = json!({"tasks": [{"task": "t", "items": items}]});
    refused(&bench, &empty, 1, &["items.jsonl", "no evaluation items"]);
    fs::write(bench.path("short.txt"), "too short").unwrap();
    let corpus = json!({"from": "path", "path": bench.path("short.txt")});
    let short = bench.spec_with("/prune/damage", json!({"corpus": corpus}));
    refused(&bench, &short, 1, &["short.txt", "9 tokens", "seq_len"]);
}

#[test]
fn a_text_with_fewer_windows_than_were_asked_for() {
    let bench = bench();
    fs::write(bench.path("short.txt"), "word ".repeat(20)).unwrap();
    let corpus = json!({"from": "path", "path": bench.path("short.txt")});
    let short = |pointer: &str, more: Value| {
        let mut spec = bench.spec_with(pointer, json!({"corpus": corpus, "seq_len": 32}));
        let there = spec.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        there.extend(more.as_object().unwrap().clone());
        spec
    };
    for (pointer, setting) in
        [("/calibration", "calibration.samples"), ("/prune/damage", "prune.damage.samples")]
    {
        let spec = short(pointer, json!({"samples": 4}));
        refused(&bench, &spec, 1, &["short.txt gives 3 windows", &format!("{setting} asks for 4"), "to 3"]);
    }
    // Damage that nobody measures needs no text, and the default takes what there is.
    let mut spec = short("/prune/damage", json!({"samples": 4}));
    spec["prune"]["strategy"] = json!("block_endpoint");
    bench.succeed(&spec, "unmeasured", &["--until", "select"]);
    // Damage is measured on the calibration's text where it has none of its own.
    for (workspace, spec, notes) in [
        ("calibration", short("/calibration", json!({})), 2),
        ("damage", short("/prune/damage", json!({"samples": 16})), 1),
        ("enough", short("/calibration", json!({"samples": 3})), 1),
    ] {
        let told = bench.succeed(&spec, workspace, &["--until", "select"]);
        let noted =
            |e: &Event| matches!(e, Event::Noted { message, .. } if message.contains("gives 3 windows"));
        assert_eq!(told.iter().filter(|e| noted(e)).count(), notes, "{workspace}");
    }
}

#[test]
fn a_teacher_that_cannot_teach() {
    let bench = bench();
    for (distill, told) in [
        (json!({"weight": 0.0}), "/heal/0/distill/weight"),
        (json!({"weight": 1.5}), "/heal/0/distill/weight"),
        (json!({"top_k": 0}), "/heal/0/distill/top_k"),
        (json!({"temperature": 2}), "/heal/0/distill/temperature"),
    ] {
        refused(&bench, &bench.spec_with("/heal/0/distill", distill), 2, &[told]);
    }
}

#[test]
fn a_repair_that_cannot_work() {
    let bench = bench();
    let with = |method: Value| bench.spec_with("/heal", json!([method]));
    let below = with(json!({"method": "least_squares"}));
    refused(&bench, &below, 2, &["/prune/keep_first", "layer below the cut", "at least 1"]);
    let mut explicit = below.clone();
    explicit["prune"] = json!({"strategy": "explicit", "layers": [3, 0]});
    refused(&bench, &explicit, 2, &["/prune/layers/1", "below layer 0 there is none"]);
    let mut ridge = with(json!({"method": "least_squares", "ridge": -1.0}));
    ridge["prune"]["keep_first"] = json!(1);
    refused(&bench, &ridge, 2, &["/heal/0/ridge", "0 or more"]);
    for (method, told) in [
        (json!({"method": "qlora", "warmup_steps": 9, "steps": 8}), ["/heal/0/warmup_steps", "only 8 steps"]),
        (json!({"method": "qlora", "moment_bits": 16}), ["/heal/0/moment_bits", "8"]),
        (json!({"method": "qlora", "bits": 8, "format": "q4_0"}), ["/heal/0/format", "set `bits` to 4"]),
        (json!({"method": "qlora", "beta2": 1.0}), ["/heal/0/beta2", "less than 1"]),
        (json!({"method": "qlora", "rank": 65}), ["/heal/0/rank", "from 1 to 64"]),
        (json!({"method": "partial", "layers": 99}), ["/heal/0/layers", "from 1 to 6"]),
        (json!({"method": "partial", "head": true}), ["/heal/0/method", "leave `head` out"]),
        (
            json!({"method": "full", "corpus": {"from": "mix", "of": []}}),
            ["/heal/0/corpus/of", "at least one"],
        ),
        (
            json!({"method": "full", "corpus": {"from": "mix", "of": [{"corpus": {"from": "model"}, "weight": 0.0}]}}),
            ["/heal/0/corpus/of/0/weight", "more than 0"],
        ),
        (json!({"method": "reconstruct", "epochs": 0}), ["/heal/0/epochs", "from 1"]),
    ] {
        refused(&bench, &with(method), 2, &told);
    }
    let mixed = json!([{"from": "mix", "of": [{"corpus": {"from": "model"}}]}]);
    refused(&bench, &bench.spec_with("/eval/perplexity", mixed), 2, &["/eval/perplexity/0", "one by one"]);
    refused(&bench, &with(json!({"method": "rescale", "samples": 0})), 2, &["/heal/0/samples", "from 1"]);
    refused(&bench, &with(json!({"method": "rescale", "rank": 8})), 2, &["/heal/0/rank", "`samples`"]);
    refused(
        &bench,
        &with(json!({"method": "resacle"})),
        2,
        &["/heal/0/method", "\"rescale\"", "\"least_squares\""],
    );
    let text = json!({"from": "path", "path": bench.path("held_out.txt")});
    refused(
        &bench,
        &with(json!({"method": "rescale", "corpus": text})),
        2,
        &["/eval/perplexity/0", "heals on"],
    );
    fs::write(bench.path("short.txt"), "too short").unwrap();
    let short = json!({"method": "rescale", "corpus": {"from": "path", "path": bench.path("short.txt")}});
    refused(&bench, &with(short), 1, &["short.txt", "9 tokens", "seq_len"]);
}

#[test]
fn all_complaints_about_a_spec_at_once_each_with_its_place() {
    let bench = bench();
    let mut spec = bench.spec();
    spec["prune"]["amuont"] = json!(3);
    spec["calibration"]["samples"] = json!(0);
    spec["heal"][0]["rank"] = json!(-1);
    refused(&bench, &spec, 2, &["/prune/amuont", "/calibration/samples", "/heal/0/rank"]);
}

#[test]
fn a_spec_that_is_no_json() {
    let bench = bench();
    fs::write(bench.path("spec.json"), "{\"model\": ").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_secateur"))
        .args(["run", "--workspace"])
        .arg(bench.path("out"))
        .arg(bench.path("spec.json"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("spec.json") && stderr(&output).contains("line 1"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_model_or_text_that_is_not_there() {
    let bench = bench();
    let model = bench.spec_with("/model/path", json!(bench.path("nowhere")));
    refused(&bench, &model, 1, &["nowhere", "is not a directory"]);
    for pointer in ["/calibration/corpus/path", "/heal/0/corpus/path", "/eval/perplexity/0/path"] {
        let mut spec = bench.spec();
        *spec.pointer_mut(pointer).unwrap() = json!(bench.path("nothing.txt"));
        refused(&bench, &spec, 1, &["nothing.txt", "check the path"]);
    }
}

#[test]
fn a_checkpoint_without_its_files() {
    for (file, word) in [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("model.safetensors", "model.safetensors"),
    ] {
        let bench = bench();
        fs::remove_file(bench.path("model").join(file)).unwrap();
        refused(&bench, &bench.spec(), 1, &[word]);
    }
}

#[test]
fn a_pickle_under_its_own_name_or_a_false_one() {
    let bench = bench();
    let weights = bench.path("model/model.safetensors");
    fs::remove_file(&weights).unwrap();
    fs::write(bench.path("model/pytorch_model.bin"), b"\x80\x02}q\x00.").unwrap();
    refused(&bench, &bench.spec(), 1, &["pickle (pytorch_model.bin)", "convert it"]);
    for pickle in [&b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."[..], b"PK\x03\x04data.pkl"] {
        fs::write(&weights, pickle).unwrap();
        refused(&bench, &bench.spec(), 1, &["model.safetensors", "is a pickle"]);
    }
}

#[test]
fn a_weight_file_cut_short_anywhere() {
    let bench = bench();
    let weights = bench.path("model/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        refused(&bench, &bench.spec(), 1, &["model.safetensors"]);
    }
}

#[test]
fn a_config_that_lies_about_its_shapes() {
    let lies: [(&str, Value, &str); 6] = [
        ("hidden_size", json!(32), "model.embed_tokens.weight"),
        ("num_hidden_layers", json!(9), "model.layers.6."),
        ("num_hidden_layers", json!(4), "model.layers.4."),
        ("num_key_value_heads", json!(4), "k_proj"),
        ("vocab_size", json!(100_000), "model.embed_tokens.weight"),
        ("num_hidden_layers", json!(-3), "num_hidden_layers"),
    ];
    for (key, value, word) in lies {
        let mut tiny = Tiny::llama();
        tiny.config.insert(key.into(), value);
        let bench = Bench::new(&tiny);
        refused(&bench, &bench.spec(), 1, &[word]);
    }
}

#[test]
fn a_model_of_a_family_that_is_not_known() {
    let mut tiny = Tiny::llama();
    tiny.config.insert("model_type".into(), json!("mamba"));
    let bench = Bench::new(&tiny);
    refused(&bench, &bench.spec(), 1, &["mamba", "llama"]);
}

#[test]
fn a_text_that_is_empty_or_shorter_than_one_window() {
    for file in ["calibration.txt", "healing.txt", "held_out.txt"] {
        let bench = bench();
        fs::write(bench.path(file), "").unwrap();
        refused(&bench, &bench.spec(), 1, &[file, "empty"]);
        fs::write(bench.path(file), "too short").unwrap();
        refused(&bench, &bench.spec(), 1, &[file, "9 tokens", "seq_len"]);
    }
}

#[test]
fn rows_that_do_not_belong_to_this_model() {
    let bench = bench();
    fs::write(bench.path("rows.jsonl"), "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 99999]}\n").unwrap();
    let spec = bench.spec_with("/calibration/corpus/path", json!(bench.path("rows.jsonl")));
    refused(&bench, &spec, 1, &["rows.jsonl", "99999"]);
    fs::write(bench.path("rows.jsonl"), "{\"txet\": \"x\"}\n").unwrap();
    refused(&bench, &spec, 1, &["rows.jsonl"]);
}

#[test]
fn nan_in_the_weights() {
    let bench = bench();
    let poison = |w: &mut Weight| {
        if w.name == "model.layers.3.self_attn.q_proj.weight" {
            w.values[17] = f32::NAN;
        }
    };
    Tiny::llama().write_with(bench.path("model"), poison);
    refused(&bench, &bench.spec(), 1, &["model.layers.3.self_attn.q_proj.weight", "NaN"]);
}

#[test]
fn a_device_that_is_not_there() {
    let bench = bench();
    for device in ["cuda:7", "tpu"] {
        let output = bench.run(&bench.spec(), "out", &["--device", device]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("cpu"), "{}", stderr(&output));
    }
}
