//! The decoder agrees with transformers in float32, on goldens made by `tests/golden/make_golden.py`.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::serialize_to_file;
use secateur::engine::model::generate::continue_text;
use secateur::engine::model::{Checkpoint, Compute, Decoder};
use serde_json::Value;

/// Largest difference to transformers; the numbers are of the order of 1 to 10.
const F32_TOLERANCE: f32 = 1e-4;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A model directory of the golden's weights with the config in one of its forms.
fn model(name: &str, form: &str, dir: &Path) -> Decoder {
    let bytes = fs::read(golden(&format!("{name}.safetensors"))).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let weights: Vec<_> = all.tensors().into_iter().filter(|(n, _)| !n.starts_with("golden.")).collect();
    serialize_to_file(weights, None, &dir.join("model.safetensors")).unwrap();
    let configs: Value = serde_json::from_slice(&fs::read(golden(&format!("{name}.json"))).unwrap()).unwrap();
    fs::write(dir.join("config.json"), configs[form].to_string()).unwrap();
    let compute = Compute { device: Device::Cpu, dtype: DType::F32 };
    Decoder::open(&Checkpoint::open(dir).unwrap(), &compute).unwrap()
}

fn assert_close(what: &str, ours: &Tensor, theirs: &Tensor) {
    assert_eq!(ours.dims(), theirs.dims(), "{what}");
    let difference = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference <= F32_TOLERANCE, "{what} differs by {difference}");
}

fn agrees(name: &str) {
    for form in ["newer", "older"] {
        let dir = tempfile::tempdir().unwrap();
        let decoder = model(name, form, dir.path());
        let golden =
            candle_core::safetensors::load(golden(&format!("{name}.safetensors")), &Device::Cpu).unwrap();
        let of = |key: &str| golden[&format!("golden.{key}")].clone();
        let ids = of("ids").to_dtype(DType::U32).unwrap();
        let x = decoder.embed(&ids).unwrap();
        assert_close(&format!("{name}, {form}: stream 0"), &x, &of("stream.0"));
        let count = decoder.config().layer_count;
        let last = decoder.layers(x, 0..count, |seam, stream| {
            assert_close(&format!("{name}, {form}: stream {seam}"), stream, &of(&format!("stream.{seam}")));
            Ok(())
        });
        let logits = decoder.logits(&last.unwrap().flatten_to(1).unwrap()).unwrap();
        assert_close(&format!("{name}, {form}: logits"), &logits, &of("logits").flatten_to(1).unwrap());
        // Greedy text goes through the KV cache; the prompt is the first sequence's beginning.
        let text: Vec<u32> = of("greedy").to_dtype(DType::U32).unwrap().to_vec1().unwrap();
        let (prompt, rest) = text.split_at(8);
        let written = continue_text(&decoder, prompt, rest.len(), 0.0, 0, |_| {}).unwrap();
        let until_end =
            rest.iter().position(|id| decoder.config().eos_tokens.contains(id)).unwrap_or(rest.len());
        assert!(until_end > 0, "the golden text says nothing");
        assert_eq!(written, rest[..until_end], "{name}, {form}: greedy text");
    }
}

#[test]
fn llama_with_llama3_rope_scaling_and_an_untied_head_agrees_with_transformers() {
    agrees("llama3");
}

#[test]
fn mistral_with_a_window_shorter_than_the_text_agrees_with_transformers() {
    agrees("mistral_window");
}

#[test]
fn qwen2_with_biases_and_a_tied_head_agrees_with_transformers() {
    agrees("qwen2_bias");
}

#[test]
fn llama_with_its_own_head_dim_agrees_with_transformers() {
    agrees("llama_head_dim");
}
