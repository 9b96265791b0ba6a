//! `config.json`: read with bounds, cut with every per-layer key.

use serde_json::{Map, Value};

use super::family::{Family, Window};
use super::rope::Rope;
use crate::engine::{Error, Result};
use crate::job::preset::ModelFacts;

/// The shape of a decoder. The file itself is kept as it was, unknown keys and all.
#[derive(Debug, Clone)]
pub struct Config {
    raw: Map<String, Value>,
    pub model_type: String,
    pub layer_count: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub head_count: usize,
    pub kv_head_count: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub norm_eps: f64,
    /// The head is the embedding.
    pub tied: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Per layer: how many tokens back attention sees, itself included.
    pub windows: Vec<Option<usize>>,
    pub rope: Rope,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
}

/// Bounds no real model passes; a config beyond them is a lie or an attack.
const MAX_LAYERS: usize = 2048;
const MAX_WIDTH: usize = 1 << 18;
const MAX_VOCAB: usize = 1 << 23;
const MAX_POSITIONS: usize = 1 << 26;

/// transformers' `max_window_layers` of qwen2 when the config does not say.
const DEFAULT_WINDOW_START: u64 = 28;

/// Keys that hold one entry a layer.
const PER_LAYER_LISTS: [&str; 2] = ["layer_types", "no_rope_layers"];

impl Config {
    /// Reads the object of a `config.json`.
    ///
    /// # Errors
    /// A model error that names the key: unknown family, missing or absurd value.
    pub fn read(raw: Map<String, Value>) -> Result<Self> {
        let keys = Keys(&raw);
        let model_type = keys.text("model_type")?;
        let family = Family::of(model_type).ok_or_else(|| {
            let known = Family::names();
            Error::model(format!(
                "config.json: model_type \"{model_type}\" is not supported; supported are {known}"
            ))
        })?;
        let layer_count = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let hidden_size = keys.size("hidden_size", MAX_WIDTH)?;
        let head_count = keys.size("num_attention_heads", MAX_WIDTH)?;
        let kv_head_count = keys.size_or("num_key_value_heads", head_count, MAX_WIDTH)?;
        let head_dim = keys.size_or("head_dim", hidden_size / head_count, MAX_WIDTH)?;
        if head_count % kv_head_count != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(Error::model(format!(
                "config.json: {head_count} attention heads, {kv_head_count} key/value heads and head_dim \
                 {head_dim} do not fit together"
            )));
        }
        match keys.text_or("hidden_act", "silu")? {
            "silu" | "swish" => {}
            other => {
                return Err(Error::model(format!("config.json: hidden_act \"{other}\" is not supported")));
            }
        }
        let flag = |key: &str| family.bias_by_config && raw.get(key) == Some(&Value::Bool(true));
        Ok(Self {
            layer_count,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_WIDTH * 4)?,
            head_count,
            kv_head_count,
            head_dim,
            vocab_size: keys.size("vocab_size", MAX_VOCAB)?,
            max_position_embeddings: keys.size_or("max_position_embeddings", 2048, MAX_POSITIONS)?,
            norm_eps: keys.number_or("rms_norm_eps", 1e-6)?,
            tied: raw.get("tie_word_embeddings") == Some(&Value::Bool(true)),
            qkv_bias: family.qkv_bias || flag("attention_bias"),
            o_bias: flag("attention_bias"),
            mlp_bias: flag("mlp_bias"),
            windows: windows(&keys, family, layer_count)?,
            rope: Rope::read(&raw, head_dim)?,
            bos_token: tokens(&raw, "bos_token_id").first().copied(),
            eos_tokens: tokens(&raw, "eos_token_id"),
            model_type: model_type.to_owned(),
            raw,
        })
    }

    /// What a healing preset needs to know.
    pub fn facts(&self) -> ModelFacts {
        ModelFacts {
            model_type: self.model_type.clone(),
            hidden_size: self.hidden_size as u32,
            layer_count: self.layer_count as u32,
            vocab_size: self.vocab_size as u32,
            max_position_embeddings: self.max_position_embeddings as u32,
        }
    }

    /// The file as it was read.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The `config.json` of the same model without these layers: every key that
    /// counts or lists layers is cut with them.
    ///
    /// # Errors
    /// A model error when a per-layer list has another length than the layer count.
    pub fn without_layers(&self, dropped: &[u32]) -> Result<Map<String, Value>> {
        let kept: Vec<usize> = (0..self.layer_count).filter(|l| !dropped.contains(&(*l as u32))).collect();
        let mut raw = self.raw.clone();
        raw.insert("num_hidden_layers".into(), kept.len().into());
        for (key, value) in &mut raw {
            let Value::Array(list) = value else { continue };
            if !PER_LAYER_LISTS.contains(&key.as_str()) {
                if key.contains("layer") {
                    return Err(Error::model(format!(
                        "config.json: the list {key} seems to speak of layers in a way that is not known here; \
                         cutting it blindly could break the checkpoint"
                    )));
                }
                continue;
            }
            if list.len() != self.layer_count {
                return Err(Error::model(format!(
                    "config.json: {key} has {} entries, but the model has {} layers",
                    list.len(),
                    self.layer_count
                )));
            }
            *list = kept.iter().map(|l| list[*l].clone()).collect();
        }
        // Layers from this index on see a window: count how many below it stay.
        let first = raw.get("max_window_layers").and_then(Value::as_u64);
        let unsaid = self.windows.iter().any(Option::is_some).then_some(DEFAULT_WINDOW_START);
        if let Some(first) = first.or(unsaid.filter(|_| raw.contains_key("use_sliding_window"))) {
            let below = kept.iter().filter(|l| (**l as u64) < first).count();
            raw.insert("max_window_layers".into(), below.into());
        }
        Ok(raw)
    }
}

fn windows(keys: &Keys, family: &Family, layer_count: usize) -> Result<Vec<Option<usize>>> {
    let window = match (family.window == Window::Full, keys.0.get("sliding_window")) {
        (true, _) | (_, Some(Value::Null)) => None,
        (_, Some(_)) => Some(keys.size("sliding_window", MAX_POSITIONS)?),
        (_, None) => match family.window {
            Window::Every(tokens) => Some(tokens),
            Window::Full | Window::Upper => None,
        },
    };
    let types = match keys.0.get("layer_types") {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) if list.len() == layer_count => Some(list),
        Some(_) => {
            return Err(Error::model(format!(
                "config.json: layer_types must list one entry for each of the {layer_count} layers"
            )));
        }
    };
    let upper_from = match family.window {
        Window::Full | Window::Every(_) => 0,
        Window::Upper if keys.0.get("use_sliding_window") == Some(&Value::Bool(true)) => {
            keys.0.get("max_window_layers").and_then(Value::as_u64).unwrap_or(DEFAULT_WINDOW_START) as usize
        }
        Window::Upper => usize::MAX,
    };
    (0..layer_count)
        .map(|l| match types.map(|t| t[l].as_str()) {
            None => Ok(window.filter(|_| l >= upper_from)),
            Some(Some("full_attention")) => Ok(None),
            Some(Some("sliding_attention")) => match window {
                Some(_) => Ok(window),
                None => Err(Error::model(format!(
                    "config.json: layer_types[{l}] asks for sliding attention, but sliding_window is not given"
                ))),
            },
            Some(_) => {
                Err(Error::model(format!("config.json: layer_types[{l}] is not a kind of layer known here")))
            }
        })
        .collect()
}

/// One id or a list of ids.
fn tokens(raw: &Map<String, Value>, key: &str) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match raw.get(key) {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Typed look-ups that name the key when something is wrong.
pub(super) struct Keys<'a>(pub &'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.0.get(key).and_then(Value::as_str);
        value.ok_or_else(|| Error::model(format!("config.json: {key} is missing or not a text")))
    }

    fn text_or(&self, key: &str, default: &'static str) -> Result<&'a str> {
        if self.0.contains_key(key) { self.text(key) } else { Ok(default) }
    }

    fn size(&self, key: &str, most: usize) -> Result<usize> {
        match self.0.get(key).and_then(Value::as_u64) {
            Some(n) if n >= 1 && n <= most as u64 => Ok(n as usize),
            Some(n) => Err(Error::model(format!("config.json: {key} is {n}; 1 to {most} would be sensible"))),
            None => Err(Error::model(format!("config.json: {key} is missing or not a whole number"))),
        }
    }

    fn size_or(&self, key: &str, default: usize, most: usize) -> Result<usize> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(key, most),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        match self.0.get(key).and_then(Value::as_f64) {
            Some(n) if n.is_finite() && n > 0.0 => Ok(n),
            _ => Err(Error::model(format!("config.json: {key} is missing or not a positive number"))),
        }
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.number(key),
        }
    }
}
