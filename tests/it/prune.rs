//! Dropping layers from files.

use std::fs;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use secateur::engine::model::{Batch, Checkpoint, Decoder};
use secateur::engine::prune::Cut;
use secateur::job::progress::Stage;
use secateur::job::spec::WeightType;
use serde_json::{Value, json};

use crate::support::rig::{Rig, windows};
use crate::support::tiny::Tiny;

fn cut(rig: &Rig, base: &Checkpoint, dropped: &[u32], dtype: Option<WeightType>) -> Checkpoint {
    let cut = Cut::plan(base.index(), dropped, dtype).unwrap();
    let reference = cut.write(&rig.workspace(), rig.cx(Stage::Prune)).unwrap();
    let pruned = Checkpoint::open(&rig.path("workspace").join(&reference.path)).unwrap();
    assert_eq!(reference.digest, pruned.digest().unwrap());
    assert_eq!(reference.parameters, pruned.parameters());
    assert_eq!(reference.size_bytes, pruned.size_bytes());
    pruned
}

/// The stream leaving the last layer of `kept`, in this order.
fn forward_over(decoder: &Decoder, kept: &[usize]) -> Vec<f32> {
    let tokens = windows(2, 24);
    let batch: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let batch = Batch::of(&batch);
    let (mut x, pass) = (decoder.embed(&batch).unwrap(), decoder.pass(&batch));
    for l in kept {
        x = decoder.layers(x, &pass, *l..l + 1, |_, _| Ok(())).unwrap();
    }
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_pruned_forward_is_the_forward_that_skips_the_block() {
    for tiny in [Tiny::llama(), Tiny::mistral(), Tiny::qwen2()] {
        let rig = Rig::new();
        let base = rig.base(&tiny);
        let pruned = cut(&rig, &base, &[1, 3, 4], None);
        let skipping = forward_over(&Decoder::open(&base, &rig.compute).unwrap(), &[0, 2, 5]);
        let plain = forward_over(&Decoder::open(&pruned, &rig.compute).unwrap(), &[0, 1, 2]);
        assert_eq!(skipping, plain, "{}", tiny.model_type);
    }
}

#[test]
fn every_tensor_that_stays_keeps_its_bytes() {
    let rig = Rig::new();
    let base = rig.base(&Tiny { shards: 3, ..Tiny::qwen2() });
    let pruned = cut(&rig, &base, &[2, 3], None);
    let old_layer = |new: usize| if new < 2 { new } else { new + 2 };
    for name in pruned.names() {
        let old = match name.strip_prefix("model.layers.").and_then(|r| r.split_once('.')) {
            Some((l, rest)) => format!("model.layers.{}.{rest}", old_layer(l.parse().unwrap())),
            None => name.to_owned(),
        };
        assert_eq!(pruned.bytes(name).unwrap(), base.bytes(&old).unwrap(), "{name}");
    }
    let per_layer = base.names().filter(|n| n.starts_with("model.layers.0.")).count();
    assert_eq!(pruned.names().count(), base.names().count() - 2 * per_layer);
}

#[test]
fn every_per_layer_key_of_the_config_is_cut_and_the_rest_stays() {
    let rig = Rig::new();
    let types: Vec<&str> =
        (0..6).map(|l| if l % 2 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    let mut tiny = Tiny::qwen2();
    tiny.config.insert("use_sliding_window".into(), json!(true));
    tiny.config.insert("sliding_window".into(), json!(16));
    tiny.config.insert("layer_types".into(), json!(types));
    tiny.config.insert("a_key_of_the_future".into(), json!({"kept": [1, 2]}));
    let pruned = cut(&rig, &rig.base(&tiny), &[1, 2], None);
    let raw = pruned.config().raw();
    assert_eq!(raw["num_hidden_layers"], json!(4));
    assert_eq!(
        raw["layer_types"],
        json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"])
    );
    assert_eq!(raw["max_window_layers"], json!(2), "two of the first four layers are gone");
    assert_eq!(raw["a_key_of_the_future"], json!({"kept": [1, 2]}));
}

#[test]
fn a_list_of_layers_that_does_not_fit_the_model_is_refused_by_its_name() {
    let rig = Rig::new();
    let mut tiny = Tiny::llama();
    tiny.config.insert("strange_layer_list".into(), json!([1, 2, 3]));
    let error = Checkpoint::open(&tiny.write(rig.path("strange"))).err().unwrap().to_string();
    assert!(error.contains("strange_layer_list"), "{error}");
}

#[test]
fn tokenizer_and_licence_come_along_but_never_code_or_pickles() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    for name in ["modeling_x.py", "pytorch_model.bin", "optimizer.pt", "LICENSE.py", "chat_template.jinja"] {
        fs::write(base.dir().join(name), "x").unwrap();
    }
    let pruned = cut(&rig, &base, &[1], None);
    let mut names: Vec<String> =
        fs::read_dir(pruned.dir()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "LICENSE",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    let tokenizer = |c: &Checkpoint| fs::read(c.dir().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&pruned), tokenizer(&base));
}

#[test]
fn another_type_of_weights_is_written_when_asked_for() {
    let rig = Rig::new();
    let base = rig.base(&Tiny { dtype: Dtype::F32, ..Tiny::llama() });
    let pruned = cut(&rig, &base, &[0], Some(WeightType::Bf16));
    assert_eq!(pruned.config().raw()["torch_dtype"], Value::from("bfloat16"));
    let read = |c: &Checkpoint, name: &str| -> Tensor { c.tensor(name, DType::F32, &Device::Cpu).unwrap() };
    let rounded: Vec<f32> = read(&pruned, "model.norm.weight").to_vec1().unwrap();
    let exact: Vec<f32> = read(&base, "model.norm.weight").to_vec1().unwrap();
    for (r, e) in rounded.iter().zip(&exact) {
        assert_eq!(r.to_bits(), half::bf16::from_f32(*e).to_f32().to_bits());
    }
    assert!(pruned.names().all(|n| pruned.info(n).unwrap().dtype.name() == "BF16"));
}

#[test]
fn a_second_cut_takes_the_place_of_the_first() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    assert_eq!(cut(&rig, &base, &[1], None).config().layer_count, 5);
    assert_eq!(cut(&rig, &base, &[1, 2, 3], None).config().layer_count, 3);
    assert!(!rig.path("workspace/parts/pruned").exists());
}

#[test]
fn a_pruned_model_can_be_pruned_again() {
    let rig = Rig::new();
    let base = rig.base(&Tiny::llama());
    let once = cut(&rig, &base, &[4], None);
    let other = Rig::new();
    let twice = cut(&other, &once, &[2], None);
    let at_once = cut(&Rig::new(), &base, &[2, 4], None);
    for name in at_once.names() {
        assert_eq!(twice.bytes(name).unwrap(), at_once.bytes(name).unwrap());
    }
}
