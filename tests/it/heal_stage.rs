//! The heal stage on files: merged as trained, judged on what is written, kept or thrown away.

use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::Dtype;
use secateur::engine::heal::backward::mean_loss;
use secateur::engine::heal::{WindowsOf, Wound, heal};
use secateur::engine::model::generate::continue_text;
use secateur::engine::model::lora::Adapter;
use secateur::engine::model::{Batch, Checkpoint, Compute, Decoder};
use secateur::engine::prune::Cut;
use secateur::engine::workspace::Workspace;
use secateur::engine::{Cx, Result};
use secateur::job::progress::{Silent, Stage};
use secateur::job::report::HealReport;
use secateur::job::spec::{Corpus, JobSpec};
use serde_json::{Value, json};

use crate::support::tiny::{Tiny, VOCAB};

/// A pattern to learn: counting, from different starts.
fn windows(_: &Corpus, seq_len: usize, most: usize) -> Result<Vec<Vec<u32>>> {
    let token = |n: usize, i: usize| ((n * 7 + i) % (VOCAB - 1)) as u32;
    Ok((0..most.min(24)).map(|n| (0..seq_len).map(|i| token(n, i)).collect()).collect())
}

fn compute() -> Compute {
    Compute::cpu(None)
}

/// Prunes two layers of a tiny float32 model and heals with these QLoRA values.
fn healed(dir: &Path, qlora: Value) -> (Vec<HealReport>, Vec<String>) {
    healed_on(dir, qlora, &mut windows)
}

fn qlora() -> Value {
    json!({
        "method": "qlora", "rank": 4, "steps": 12, "batch_size": 2, "seq_len": 24, "warmup_steps": 0,
        "learning_rate": 0.01, "dropout": 0.0, "bits": 16
    })
}

fn healed_on(dir: &Path, qlora: Value, windows: WindowsOf) -> (Vec<HealReport>, Vec<String>) {
    let mut method = self::qlora();
    method.as_object_mut().unwrap().extend(qlora.as_object().unwrap().clone());
    healed_by(dir, json!([method]), windows)
}

/// The same with these methods.
fn healed_by(dir: &Path, methods: Value, windows: WindowsOf) -> (Vec<HealReport>, Vec<String>) {
    healed_with(dir, methods, false, windows)
}

/// The same with these methods, one on the other or compared.
fn healed_with(
    dir: &Path,
    methods: Value,
    compare: bool,
    windows: WindowsOf,
) -> (Vec<HealReport>, Vec<String>) {
    let base =
        Checkpoint::open(&Tiny { dtype: Dtype::F32, ..Tiny::llama() }.write(dir.join("base"))).unwrap();
    let spec = json!({
        "model": {"from": "path", "path": "base"},
        "prune": {"amount": {"layers": 2}, "keep_first": 1},
        "heal": methods,
        "compare_heals": compare,
    });
    let spec = JobSpec::read(spec).unwrap();
    let workspace = Workspace::open(&dir.join("workspace")).unwrap();
    let compute = compute();
    let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &Silent };
    let pruned = Cut::plan(base.index(), &[2, 3], None).unwrap().write(&workspace, cx).unwrap();
    let wound = Wound { spec: &spec, base: &base, dropped: &[2, 3], pruned: &pruned };
    heal(&wound, windows, &workspace, &dir.join("scratch"), cx).unwrap()
}

fn open(dir: &Path, name: &str) -> Checkpoint {
    Checkpoint::open(&dir.join("workspace").join(name)).unwrap()
}

#[test]
fn the_merged_checkpoint_computes_what_pruned_and_adapter_compute_together() {
    let dir = tempfile::tempdir().unwrap();
    let (reports, left) = healed(dir.path(), json!({}));
    assert_eq!(left, ["healed", "adapter"]);
    assert!(!reports[0].reverted);
    let pruned = open(dir.path(), "pruned");
    let merged = Decoder::open(&open(dir.path(), "healed"), &compute()).unwrap();
    let plain = Decoder::open(&pruned, &compute()).unwrap();
    let saved = std::fs::read(dir.path().join("workspace/adapter/adapter_model.safetensors")).unwrap();
    let saved = candle_core::safetensors::load_buffer(&saved, &Device::Cpu).unwrap();
    let config = std::fs::read(dir.path().join("workspace/adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();

    let tokens: Vec<u32> = (0..20).map(|i| i * 11 % 256).collect();
    let tokens = Batch::of(&[&tokens]);
    let pass = plain.pass(&tokens);
    let mut x = plain.embed(&tokens).unwrap();
    for layer in 0..pruned.config().layer_count {
        let adapter = |(i, name): (usize, &str)| {
            let part = |ab: &str| {
                saved[&format!("base_model.model.model.layers.{layer}.mlp.{name}.lora_{ab}.weight")].clone()
            };
            (i, Adapter { a: part("A"), b: part("B"), scale, dropout: None })
        };
        let targets = [(4, "gate_proj"), (5, "up_proj"), (6, "down_proj")];
        let adapted = plain.layer(layer).unwrap().with_adapters(targets.map(adapter));
        x = adapted.forward(&x, &pass, None).unwrap();
    }
    let difference = |a: &Tensor, b: &Tensor| -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    };
    let want = plain.forward(&tokens).unwrap();
    assert!(difference(&x, &want) > 0.01, "the adapter changes nothing");
    assert!(difference(&x, &merged.forward(&tokens).unwrap()) < 1e-3);
}

#[test]
fn the_held_out_loss_in_the_report_is_that_of_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let (reports, _) = healed(dir.path(), json!({}));
    // 24 windows: a tenth, two of them, are held out, and they are the last ones.
    let held_out = windows(&Corpus::default(), 24, 24).unwrap().split_off(22);
    for (name, said) in [("pruned", reports[0].held_out_before), ("healed", reports[0].held_out_after)] {
        let decoder = Decoder::open(&open(dir.path(), name), &compute()).unwrap();
        let compute = compute();
        let cx = Cx { stage: Stage::Heal, compute: &compute, observer: &Silent };
        let found = mean_loss(&decoder, &held_out, cx).unwrap();
        assert!((found - said).abs() < 1e-9, "{name}: {found} {said}");
    }
    assert!(reports[0].held_out_after < reports[0].held_out_before);
}

#[test]
fn healing_that_hurts_is_thrown_away_whatever_the_method() {
    for (method, own) in [
        (qlora(), true),
        // It makes this model surer of all it says; the text of the others is not what it would say.
        (json!({"method": "rescale", "seq_len": 24}), false),
        (json!({"method": "least_squares", "seq_len": 24}), true),
        (json!({"method": "reconstruct", "seq_len": 24, "learning_rate": 0.01}), true),
        (json!({"method": "full", "seq_len": 24, "steps": 6, "batch_size": 2, "learning_rate": 0.01}), true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        // Judged by what the pruned model says of itself, which it could hardly say better.
        let mut own_words = |corpus: &Corpus, seq_len: usize, most: usize| {
            let mut all = windows(corpus, seq_len, most)?;
            if !own {
                return Ok(all);
            }
            let pruned = Decoder::open(&open(dir.path(), "pruned"), &compute())?;
            for window in all.iter_mut().rev().take(2) {
                window.truncate(1);
                window.extend(continue_text(&pruned, &window.clone(), seq_len - 1, 0.0, 0)?);
                assert!(window.len() > 4, "{window:?}");
            }
            Ok(all)
        };
        let (reports, left) = healed_by(dir.path(), json!([method]), &mut own_words);
        assert!(reports[0].reverted && reports[0].checkpoint.is_none(), "{:?}", reports[0]);
        assert!(reports[0].held_out_after >= reports[0].held_out_before);
        assert!(left.is_empty());
        for name in ["healed", "healing", "adapter"] {
            assert!(!dir.path().join("workspace").join(name).exists(), "{name}");
        }
    }
}

#[test]
fn whole_layers_that_were_trained_are_in_the_files_and_all_else_keeps_its_bytes() {
    let training = json!({
        "steps": 12, "batch_size": 2, "seq_len": 24, "warmup_steps": 0, "learning_rate": 0.003, "moment_bits": 8
    });
    for (method, layers) in [("partial", 3..4), ("full", 0..4)] {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = json!({"method": method});
        spec.as_object_mut().unwrap().extend(training.as_object().unwrap().clone());
        if method == "partial" {
            spec["layers"] = json!(1);
        }
        let (reports, left) = healed_by(dir.path(), json!([spec]), &mut windows);
        assert_eq!(left, ["healed"], "{method}");
        assert!(reports[0].held_out_after < 0.97 * reports[0].held_out_before, "{method}: {:?}", reports[0]);
        let (pruned, healed) = (open(dir.path(), "pruned"), open(dir.path(), "healed"));
        let mut changed = 0;
        for name in pruned.index().tensors.keys() {
            let linear =
                name.contains("_proj.") && layers.clone().any(|l| name.contains(&format!(".layers.{l}.")));
            let same = pruned.values(name).unwrap() == healed.values(name).unwrap();
            assert_eq!(same, !linear, "{method}: {name}");
            changed +=
                u64::from(linear) * pruned.index().tensors[name].shape.iter().product::<usize>() as u64;
        }
        assert_eq!(reports[0].trainable_parameters, changed, "{method}");
    }
}

#[test]
fn of_methods_compared_on_one_cut_the_best_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let longer = json!({"steps": 24});
    let mut better = qlora();
    better.as_object_mut().unwrap().extend(longer.as_object().unwrap().clone());
    let mut hopeless = qlora();
    hopeless["learning_rate"] = json!(1e-9);
    let methods = json!([hopeless, better, qlora()]);
    let (reports, left) = healed_with(dir.path(), methods, true, &mut windows);
    assert_eq!(left, ["healed", "adapter"]);
    let kept: Vec<bool> = reports.iter().map(|report| report.checkpoint.is_some()).collect();
    assert_eq!(kept, [false, true, false]);
    assert!(reports[2].passed_over && !reports[2].reverted && !reports[1].passed_over);
    // All began with the cut.
    assert!(reports.iter().all(|report| report.held_out_before == reports[0].held_out_before));
    let digest = &reports[1].checkpoint.as_ref().unwrap().digest;
    assert_eq!(open(dir.path(), "healed").digest().unwrap(), *digest);
}

#[test]
fn methods_go_on_from_what_the_one_before_left() {
    let dir = tempfile::tempdir().unwrap();
    let (reports, left) = healed_by(dir.path(), json!([qlora(), qlora()]), &mut windows);
    assert!(!reports[0].reverted && !reports[1].reverted);
    assert_eq!(reports[1].held_out_before, reports[0].held_out_after);
    assert!(reports[1].held_out_after < reports[0].held_out_after);
    // Neither adapter alone makes of the pruned checkpoint what is healed.
    assert_eq!(left, ["healed"]);
    assert!(!dir.path().join("workspace/adapter").exists());
    let healed = open(dir.path(), "healed").digest().unwrap();
    assert_eq!(reports[1].checkpoint.as_ref().unwrap().digest, healed);
}

#[test]
fn what_adapters_do_not_touch_keeps_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    healed(dir.path(), json!({"targets": ["down_proj"]}));
    let (pruned, healed) = (open(dir.path(), "pruned"), open(dir.path(), "healed"));
    for name in pruned.names() {
        let same = pruned.bytes(name).unwrap() == healed.bytes(name).unwrap();
        assert_eq!(same, !name.ends_with("down_proj.weight"), "{name}");
    }
}
