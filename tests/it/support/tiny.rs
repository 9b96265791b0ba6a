//! Tiny models made in code: real Hugging Face directories with seeded random
//! weights and a byte-level tokenizer, ready in a millisecond, no network.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::{Map, Value, json};

/// A model to be written. Start from a family, change fields, [`Tiny::write`].
#[derive(Clone)]
pub struct Tiny {
    pub model_type: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub max_positions: usize,
    pub tied: bool,
    pub qkv_bias: bool,
    /// BF16 or F32.
    pub dtype: Dtype,
    /// Weight files; more than one comes with an index.
    pub shards: usize,
    pub seed: u64,
    /// Layers that pass the stream on unchanged.
    pub identity: Vec<usize>,
    /// Further keys of `config.json`.
    pub config: Map<String, Value>,
}

/// A tensor before it is written.
pub struct Weight {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// 256 bytes and one end-of-text token.
pub const VOCAB: usize = 257;
pub const END_OF_TEXT: u32 = 256;

impl Tiny {
    /// Grouped queries, tied head, bf16: the shape of SmolLM2.
    pub fn llama() -> Self {
        Self {
            model_type: "llama",
            layers: 6,
            hidden: 64,
            intermediate: 128,
            heads: 4,
            kv_heads: 2,
            max_positions: 256,
            tied: true,
            qkv_bias: false,
            dtype: Dtype::BF16,
            shards: 1,
            seed: 7,
            identity: Vec::new(),
            config: Map::new(),
        }
    }

    /// Untied head, sliding window.
    pub fn mistral() -> Self {
        let config = object(json!({"sliding_window": 16}));
        Self { model_type: "mistral", tied: false, config, ..Self::llama() }
    }

    /// Biases on q, k and v, and the per-layer keys of newer configs.
    pub fn qwen2() -> Self {
        let config =
            object(json!({"use_sliding_window": false, "sliding_window": null, "max_window_layers": 4}));
        Self { model_type: "qwen2", qkv_bias: true, config, ..Self::llama() }
    }

    /// All tensors, in the order of their names in the file.
    pub fn weights(&self) -> Vec<Weight> {
        let mut out = Draw { rng: ChaCha8Rng::seed_from_u64(self.seed), weights: Vec::new() };
        let (h, f) = (self.hidden, self.intermediate);
        let head_dim = h / self.heads;
        let kv = self.kv_heads * head_dim;
        out.matrix("model.embed_tokens.weight", VOCAB, h, 1.0);
        for l in 0..self.layers {
            let at = format!("model.layers.{l}");
            let out_scale = if self.identity.contains(&l) { 0.0 } else { 0.7 };
            for (name, n, k, scale) in [
                ("self_attn.q_proj", h, h, 1.5),
                ("self_attn.k_proj", kv, h, 1.5),
                ("self_attn.v_proj", kv, h, 1.0),
                ("self_attn.o_proj", h, h, out_scale),
                ("mlp.gate_proj", f, h, 1.0),
                ("mlp.up_proj", f, h, 1.0),
                ("mlp.down_proj", h, f, out_scale),
            ] {
                out.matrix(&format!("{at}.{name}.weight"), n, k, scale / (k as f32).sqrt());
                if self.qkv_bias && matches!(name.split('.').nth(1), Some("q_proj" | "k_proj" | "v_proj")) {
                    out.vector(&format!("{at}.{name}.bias"), n, 0.0, 0.2);
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                out.vector(&format!("{at}.{norm}.weight"), h, 1.0, 0.1);
            }
        }
        out.vector("model.norm.weight", h, 1.0, 0.1);
        if !self.tied {
            out.matrix("lm_head.weight", VOCAB, h, 1.0 / (h as f32).sqrt());
        }
        out.weights
    }

    pub fn config_json(&self) -> Value {
        let dtype = if self.dtype == Dtype::F32 { "float32" } else { "bfloat16" };
        let mut config = object(json!({
            "architectures": [match self.model_type {
                "mistral" => "MistralForCausalLM",
                "qwen2" => "Qwen2ForCausalLM",
                _ => "LlamaForCausalLM",
            }],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "vocab_size": VOCAB,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "torch_dtype": dtype,
        }));
        config.extend(self.config.clone());
        Value::Object(config)
    }

    /// Writes the model to `dir`, which is made if need be, and returns it.
    pub fn write(&self, dir: impl AsRef<Path>) -> PathBuf {
        self.write_with(dir, |_| {})
    }

    /// As [`Tiny::write`], with a last change to every tensor.
    pub fn write_with(&self, dir: impl AsRef<Path>, change: impl Fn(&mut Weight)) -> PathBuf {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).unwrap();
        let mut weights = self.weights();
        weights.iter_mut().for_each(change);
        write_json(&dir.join("config.json"), &self.config_json());
        write_json(&dir.join("tokenizer.json"), &tokenizer_json());
        write_json(
            &dir.join("tokenizer_config.json"),
            &json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}),
        );
        write_json(&dir.join("generation_config.json"), &json!({"eos_token_id": END_OF_TEXT}));
        fs::write(dir.join("LICENSE"), "made in a test\n").unwrap();
        self.write_weights(dir, &weights);
        dir.to_owned()
    }

    fn write_weights(&self, dir: &Path, weights: &[Weight]) {
        if self.shards == 1 {
            return write_shard(&dir.join("model.safetensors"), weights, self.dtype);
        }
        let mut weight_map = Map::new();
        let per_shard = weights.len().div_ceil(self.shards);
        for (i, shard) in weights.chunks(per_shard).enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards);
            write_shard(&dir.join(&file), shard, self.dtype);
            weight_map.extend(shard.iter().map(|w| (w.name.clone(), json!(file))));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index);
    }
}

/// A tokenizer for a vocabulary of `size` tokens, the first bytes.
pub fn write_tokenizer(dir: &Path, size: usize) {
    let mut tokenizer = tokenizer_json();
    tokenizer["added_tokens"] = json!([]);
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| (id.as_u64().unwrap() as usize) < size);
    write_json(&dir.join("tokenizer.json"), &tokenizer);
}

/// Draws weights one after the other; the same seed draws the same.
struct Draw {
    rng: ChaCha8Rng,
    weights: Vec<Weight>,
}

impl Draw {
    /// Uniform around 0 with standard deviation `scale`.
    fn matrix(&mut self, name: &str, n: usize, k: usize, scale: f32) {
        self.push(name, vec![n, k], 0.0, scale);
    }

    fn vector(&mut self, name: &str, n: usize, centre: f32, scale: f32) {
        self.push(name, vec![n], centre, scale);
    }

    fn push(&mut self, name: &str, shape: Vec<usize>, centre: f32, scale: f32) {
        let width = scale * 3f32.sqrt();
        let count = shape.iter().product();
        let values = (0..count).map(|_| centre + width * self.rng.random_range(-1.0..1.0f32)).collect();
        self.weights.push(Weight { name: name.into(), shape, values });
    }
}

fn write_shard(path: &Path, weights: &[Weight], dtype: Dtype) {
    let bytes = |w: &Weight| -> Vec<u8> {
        match dtype {
            Dtype::F32 => w.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::BF16 => w.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            other => panic!("tiny models come in F32 and BF16, not {other:?}"),
        }
    };
    let data: Vec<Vec<u8>> = weights.iter().map(bytes).collect();
    let views = weights
        .iter()
        .zip(&data)
        .map(|(w, data)| (w.name.as_str(), TensorView::new(dtype, w.shape.clone(), data).unwrap()));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    serialize_to_file(views, Some(metadata), path).unwrap();
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec_pretty(value).unwrap()).unwrap();
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("{other} is no object"),
    }
}

/// Byte-level BPE without merges: every byte is its own token.
fn tokenizer_json() -> Value {
    let mut vocab = Map::new();
    let mut beyond = 256;
    for byte in 0..=255u32 {
        // GPT-2's printable stand-ins for bytes.
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            byte
        } else {
            beyond += 1;
            beyond - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{
            "id": END_OF_TEXT, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        }],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}
