//! `config.json`: read with bounds, by the row of its family, into the shape of a decoder.

use serde_json::{Map, Value};

use super::family::{
    AttentionScale, Bias, Family, HeadDim, Mlp, Parallel, QkNorm, Qkv, Rope as RopeKeys, Window,
};
use super::keys::Keys;
use super::rope::{self, Rope};
use super::{Result, wrong};

/// The shape of a decoder. The file itself is kept as it was, unknown keys and all.
#[derive(Debug, Clone)]
pub struct Config {
    pub(super) raw: Map<String, Value>,
    pub family: &'static Family,
    /// In front of all tensor names but the head's; empty for a checkpoint of the bare decoder.
    pub base: &'static str,
    pub layer_count: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub head_count: usize,
    pub kv_head_count: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub norm_eps: f64,
    pub activation: Activation,
    /// The head is the embedding.
    pub tied: bool,
    /// Attention and MLP read the same stream.
    pub parallel: bool,
    /// Norm of what the MLP reads, where there is one.
    pub mlp_in: Option<&'static str>,
    pub qk_norm: QkNorm,
    /// Scores are multiplied by this.
    pub attention_scale: f64,
    /// Scores `s` become `cap · tanh(s / cap)`; logits likewise.
    pub attention_cap: Option<f64>,
    pub final_cap: Option<f64>,
    pub embedding_scale: f64,
    pub residual_scale: f64,
    pub logit_scale: f64,
    pub experts: Option<ExpertsShape>,
    pub ropes: Vec<Rope>,
    pub layers: Vec<LayerShape>,
    /// The linear layers of a layer without experts: attention's, then the MLP's.
    linears: Vec<LinearShape>,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// How many tokens back attention sees, itself included.
    pub window: Option<usize>,
    /// Which of [`Config::ropes`] rotates queries and keys.
    pub rope: Option<usize>,
    /// Experts in place of the MLP.
    pub sparse: bool,
}

/// The mixture of experts of a sparse layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsShape {
    pub count: usize,
    /// Experts that see a token.
    pub per_token: usize,
    pub width: usize,
    /// The shares of the chosen experts sum to 1.
    pub normalised: bool,
}

/// A linear layer of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    pub role: Role,
    /// Name within the layer, without `.weight`.
    pub name: &'static str,
    pub outputs: usize,
    pub inputs: usize,
    pub bias: bool,
}

/// What a linear layer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Query,
    Key,
    Value,
    QueryKeyValue,
    Output,
    Gate,
    Up,
    GateUp,
    Down,
}

impl Role {
    /// Attention's, or else the MLP's.
    pub const fn in_attention(self) -> bool {
        match self {
            Self::Query | Self::Key | Self::Value | Self::QueryKeyValue | Self::Output => true,
            Self::Gate | Self::Up | Self::GateUp | Self::Down => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// With the hyperbolic tangent.
    GeluTanh,
    Relu,
}

/// Bounds no real model passes; a config beyond them is a lie or an attack.
const MAX_LAYERS: usize = 2048;
const MAX_WIDTH: usize = 1 << 18;
const MAX_VOCAB: usize = 1 << 23;
const MAX_POSITIONS: usize = 1 << 26;
const MAX_EXPERTS: usize = 1 << 12;

/// transformers' `max_window_layers` when the config does not say.
pub(super) const DEFAULT_WINDOW_START: usize = 28;

/// Gemma's `sliding_window` when the config does not say.
const DEFAULT_PATTERN_WINDOW: usize = 4096;

impl Config {
    /// Reads the object of a `config.json`.
    ///
    /// # Errors
    /// A model error that names the key: unknown family, missing or absurd value, a key
    /// that may change the computation in a way not known here.
    pub fn read(raw: Map<String, Value>) -> Result<Self> {
        let keys = Keys::new(&raw);
        let model_type = keys.text("model_type")?;
        let family = Family::of(model_type).ok_or_else(|| {
            let known = Family::names();
            wrong(format!("config.json: model_type \"{model_type}\" is not supported; supported are {known}"))
        })?;
        if keys.get("quantization_config").is_some() {
            return Err(wrong(
                "config.json: quantization_config says that the weights are packed; give the checkpoint they were made from",
            ));
        }
        let mut config = Self::shape(&keys, family)?;
        config.layers = layers(&keys, &config)?;
        config.linears = linears(&keys, &config)?;
        refuse_unknown(&keys, family)?;
        config.raw.clone_from(&raw);
        Ok(config)
    }

    /// All that is the same for every layer.
    fn shape(keys: &Keys, family: &'static Family) -> Result<Self> {
        let names = family.keys;
        let hidden_size = keys.size(names.hidden_size, MAX_WIDTH)?;
        let head_count = keys.size(names.head_count, MAX_WIDTH)?;
        let kv_head_count = keys.size_or("num_key_value_heads", head_count, MAX_WIDTH)?;
        let head_dim = head_dim(keys, family.head_dim, hidden_size, head_count)?;
        let grouped = matches!(family.qkv, Qkv::Heads(_)) && kv_head_count != head_count;
        if head_count % kv_head_count != 0 || head_dim == 0 || grouped {
            return Err(wrong(format!(
                "config.json: {head_count} attention heads, {kv_head_count} key/value heads and head_dim \
                 {head_dim} do not fit together"
            )));
        }
        let parallel = match family.parallel {
            Parallel::Never => false,
            Parallel::Always => true,
            Parallel::Key { default } => keys.flag_or("use_parallel_residual", default)?,
            Parallel::KeyOneNorm => keys.flag_or("use_parallel_residual", false)?,
        };
        let multiplier = |key: &str| if family.multipliers { keys.number_or(key, 1.0) } else { Ok(1.0) };
        let cap = |read: bool, key: &str| if read { keys.number_if(key) } else { Ok(None) };
        let max_position_embeddings = keys.size_or(names.max_positions, 2048, MAX_POSITIONS)?;
        let embedding_scale = if family.scaled_embedding { (hidden_size as f64).sqrt() } else { 1.0 };
        Ok(Self {
            raw: Map::new(),
            family,
            base: family.names.base,
            layer_count: keys.size(names.layer_count, MAX_LAYERS)?,
            hidden_size,
            // gpt2 leaves it out when it is the usual one.
            intermediate_size: match names.intermediate_size {
                "n_inner" => keys.size_or("n_inner", 4 * hidden_size, MAX_WIDTH * 4)?,
                key => keys.size(key, MAX_WIDTH * 4)?,
            },
            head_count,
            kv_head_count,
            head_dim,
            vocab_size: keys.size("vocab_size", MAX_VOCAB)?,
            max_position_embeddings,
            norm_eps: keys.number_or(names.norm_eps, 1e-6)?,
            activation: activation(keys, family)?,
            tied: keys.flag_or("tie_word_embeddings", family.tied)?,
            parallel,
            mlp_in: family.names.mlp_in.filter(|_| !(parallel && family.parallel == Parallel::KeyOneNorm)),
            qk_norm: match family.qk_norm {
                QkNorm::KeyShared | QkNorm::KeyEach if !keys.flag_or("qk_layernorm", false)? => QkNorm::No,
                norm => norm,
            },
            attention_scale: attention_scale(keys, family.attention_scale, head_dim)?,
            attention_cap: cap(family.attention_cap, "attn_logit_softcapping")?,
            final_cap: cap(family.final_cap, "final_logit_softcapping")?,
            embedding_scale: embedding_scale * multiplier("embedding_multiplier")?,
            residual_scale: multiplier("residual_multiplier")?,
            logit_scale: 1.0 / multiplier("logits_scaling")?,
            experts: experts(keys, family)?,
            ropes: ropes(keys, family, head_dim, max_position_embeddings)?,
            layers: Vec::new(),
            linears: Vec::new(),
            bos_token: keys.tokens("bos_token_id").first().copied(),
            eos_tokens: keys.tokens("eos_token_id"),
        })
    }

    /// The file as it was read.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The linear layers of a layer that adapters can sit on and that are kept in few bits:
    /// attention's, then the MLP's unless experts take its place.
    pub fn linears(&self, layer: usize) -> &[LinearShape] {
        let end = if self.layers[layer].sparse { self.attention_linears() } else { self.linears.len() };
        &self.linears[..end]
    }

    fn attention_linears(&self) -> usize {
        self.linears.iter().filter(|l| l.role.in_attention()).count()
    }

    /// Code that the model's authors ship with it, which is never run.
    pub fn remote_code(&self) -> bool {
        self.raw.contains_key("auto_map")
    }
}

fn head_dim(keys: &Keys, rule: HeadDim, hidden_size: usize, head_count: usize) -> Result<usize> {
    let split = hidden_size / head_count;
    match rule {
        HeadDim::Key => keys.size_or("head_dim", split, MAX_WIDTH),
        HeadDim::KeyOr(default) => keys.size_or("head_dim", default, MAX_WIDTH),
        HeadDim::Split
            if keys.size_or("head_dim", split, MAX_WIDTH)? == split
                && hidden_size.is_multiple_of(head_count) =>
        {
            Ok(split)
        }
        HeadDim::Split => Err(wrong(format!(
            "config.json: hidden_size {hidden_size} must be split evenly over {head_count} heads in this family"
        ))),
    }
}

fn activation(keys: &Keys, family: &Family) -> Result<Activation> {
    let key = family.keys.activation;
    match keys.text_or(key, family.activation)? {
        "silu" | "swish" => Ok(Activation::Silu),
        // The first Gemma configs say gelu and mean the tanh form.
        "gelu" if family.model_type == "gemma" => Ok(Activation::GeluTanh),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh" => {
            Ok(Activation::GeluTanh)
        }
        "relu" => Ok(Activation::Relu),
        other => Err(wrong(format!("config.json: {key} \"{other}\" is not supported"))),
    }
}

fn attention_scale(keys: &Keys, rule: AttentionScale, head_dim: usize) -> Result<f64> {
    let usual = 1.0 / (head_dim as f64).sqrt();
    match rule {
        AttentionScale::HeadDim => Ok(usual),
        AttentionScale::HeadDimIf => Ok(if keys.flag_or("scale_attn_weights", true)? { usual } else { 1.0 }),
        AttentionScale::QueryScalar => Ok(1.0 / keys.number_or("query_pre_attn_scalar", 256.0)?.sqrt()),
        AttentionScale::Multiplier => keys.number_or("attention_multiplier", 1.0),
    }
}

fn experts(keys: &Keys, family: &Family) -> Result<Option<ExpertsShape>> {
    let Some(experts) = family.experts else { return Ok(None) };
    // Both names have been in use for the same thing.
    let count = match keys.get("num_experts") {
        Some(_) => keys.size("num_experts", MAX_EXPERTS)?,
        None => keys.size("num_local_experts", MAX_EXPERTS)?,
    };
    keys.get("num_local_experts");
    let per_token = keys.size("num_experts_per_tok", count)?;
    let normalised = experts.normalised || keys.flag_or("norm_topk_prob", false)?;
    Ok(Some(ExpertsShape {
        count,
        per_token,
        width: keys.size(experts.width_key, MAX_WIDTH * 4)?,
        normalised,
    }))
}

fn ropes(keys: &Keys, family: &Family, head_dim: usize, max_positions: usize) -> Result<Vec<Rope>> {
    let (theta, partial, local) = match family.rope {
        RopeKeys::No => return Ok(Vec::new()),
        RopeKeys::Keys { theta, partial } => (theta, partial, None),
        RopeKeys::SomeLayers { theta } => (theta, None, None),
        RopeKeys::Local { theta, local } => (theta, None, Some(local)),
    };
    let (older, newer) = (keys.object("rope_scaling")?, keys.object("rope_parameters")?);
    let nested = |kind: &str| match &newer {
        Some(newer) => newer.object(kind),
        None => Ok(None),
    };
    // The local rotation of gemma3 is never scaled by the older form.
    let (global, sliding) = match local {
        None => (older.or(newer), None),
        Some(_) => (older.or(nested("full_attention")?), nested("sliding_attention")?),
    };
    let original_positions = keys.number_if("original_max_position_embeddings")?;
    let read = |parameters: Option<Keys>, theta: (&str, f64)| {
        let inner = |key: &str| match &parameters {
            Some(parameters) => parameters.number_if(key),
            None => Ok(None),
        };
        // gpt_neox has had both names for either value.
        let outer = keys.number_or(theta.0, keys.number_or("rope_theta", theta.1)?)?;
        let share = match partial {
            None => 1.0,
            Some((key, default)) => {
                let outer = keys.number_or(key, keys.number_or("partial_rotary_factor", default)?)?;
                inner("partial_rotary_factor")?.unwrap_or(outer)
            }
        };
        let rotated = (head_dim as f64 * share) as usize;
        if share > 1.0 || rotated == 0 || !rotated.is_multiple_of(2) {
            return Err(wrong(format!(
                "config.json: {rotated} of {head_dim} dimensions of a head cannot be rotated"
            )));
        }
        let theta = inner("rope_theta")?.unwrap_or(outer);
        Rope::read(parameters.as_ref(), &rope::Shape { theta, rotated, max_positions, original_positions })
    };
    let mut ropes = vec![read(global, theta)?];
    if let Some(local) = local {
        ropes.push(read(sliding, local)?);
    }
    Ok(ropes)
}

/// Window, rotation and experts of each layer.
fn layers(keys: &Keys, config: &Config) -> Result<Vec<LayerShape>> {
    let (family, count) = (config.family, config.layer_count);
    let rotated = rotated(keys, family, count)?;
    let windows = windows(keys, family, count, &rotated)?;
    let sparse = sparse(keys, family, count)?;
    let local = matches!(family.rope, RopeKeys::Local { .. });
    let shape = |l: usize| LayerShape {
        window: windows[l].1,
        rope: rotated[l].then_some(usize::from(local && windows[l].0)),
        sparse: sparse[l],
    };
    Ok((0..count).map(shape).collect())
}

fn rotated(keys: &Keys, family: &Family, count: usize) -> Result<Vec<bool>> {
    match family.rope {
        RopeKeys::No => return Ok(vec![false; count]),
        RopeKeys::Keys { .. } | RopeKeys::Local { .. } => return Ok(vec![true; count]),
        RopeKeys::SomeLayers { .. } => {}
    }
    let interval = keys.size_or("no_rope_layer_interval", 4, MAX_LAYERS)?;
    let Some(list) = keys.per_layer("no_rope_layers", count)? else {
        return Ok((0..count).map(|l| (l + 1) % interval != 0).collect());
    };
    // 1 rotates, whatever the name says.
    let flag = |v: &Value| v.as_u64().map(|n| n != 0).or(v.as_bool());
    let flags: Option<Vec<bool>> = list.iter().map(flag).collect();
    flags.ok_or_else(|| wrong("config.json: no_rope_layers must list 0 or 1 for each layer"))
}

/// Per layer: whether it is of the sliding kind, and its window.
fn windows(
    keys: &Keys,
    family: &Family,
    count: usize,
    rotated: &[bool],
) -> Result<Vec<(bool, Option<usize>)>> {
    let given = keys.get("sliding_window").map(|_| keys.size("sliding_window", MAX_POSITIONS)).transpose()?;
    let used = keys.flag_or("use_sliding_window", false)?;
    let from =
        keys.get("max_window_layers").and_then(Value::as_u64).map_or(DEFAULT_WINDOW_START, |n| n as usize);
    let pattern = |default| match keys.get("sliding_window_pattern") {
        Some(_) => keys.size("sliding_window_pattern", MAX_LAYERS),
        None => keys.size_or("_sliding_window_pattern", default, MAX_LAYERS),
    };
    let types = keys.per_layer("layer_types", count)?;
    let unsaid: Vec<bool> = match family.window {
        Window::Full => vec![false; count],
        Window::Every { .. } => vec![true; count],
        Window::EveryIf => vec![used; count],
        Window::Upper => (0..count).map(|l| used && given.is_some() && l >= from).collect(),
        Window::Pattern(default) => {
            let pattern = pattern(default)?;
            (0..count).map(|l| (l + 1) % pattern != 0).collect()
        }
        Window::Unrotated => rotated.iter().map(|rotated| used && given.is_some() && !rotated).collect(),
    };
    let window = match family.window {
        // Null says that there is none; absent leaves the default.
        Window::Every { default } if !keys.has("sliding_window") => default,
        Window::Pattern(_) if !keys.has("sliding_window") => Some(DEFAULT_PATTERN_WINDOW),
        Window::Upper => given.filter(|_| used),
        _ => given,
    };
    let listed = matches!(family.window, Window::Upper | Window::Pattern(_) | Window::Unrotated);
    let kind = |l: usize| -> Result<bool> {
        let said = match types.map(|t| t[l].as_str()) {
            None if matches!(family.window, Window::Pattern(_)) => unsaid[l],
            None => return Ok(unsaid[l]),
            Some(Some("full_attention")) => false,
            Some(Some("sliding_attention")) => true,
            Some(_) => {
                return Err(wrong(format!(
                    "config.json: layer_types[{l}] is not a kind of layer known here"
                )));
            }
        };
        if said && window.is_none() {
            return Err(wrong(format!(
                "config.json: layer {l} is one of sliding attention, but sliding_window is not given"
            )));
        }
        if !listed && said != (unsaid[l] && window.is_some()) {
            return Err(wrong(format!(
                "config.json: layer_types[{l}] is {}, but model_type {} has no layers of several kinds",
                types.map_or("", |t| t[l].as_str().unwrap_or_default()),
                family.model_type
            )));
        }
        Ok(said)
    };
    (0..count).map(|l| Ok((kind(l)?, window.filter(|_| kind(l).is_ok_and(|sliding| sliding))))).collect()
}

fn sparse(keys: &Keys, family: &Family, count: usize) -> Result<Vec<bool>> {
    match family.experts {
        None => Ok(vec![false; count]),
        Some(experts) if !experts.some_layers => Ok(vec![true; count]),
        Some(_) => {
            let dense = keys.indices("mlp_only_layers", count)?;
            let step = keys.size_or("decoder_sparse_step", 1, MAX_LAYERS)?;
            Ok((0..count).map(|l| !dense.contains(&l) && (l + 1) % step == 0).collect())
        }
    }
}

fn linears(keys: &Keys, config: &Config) -> Result<Vec<LinearShape>> {
    let family = config.family;
    let bias = |rule: Bias| match rule {
        Bias::Never => Ok(false),
        Bias::Always => Ok(true),
        Bias::Key(key, default) => keys.flag_or(key, default),
    };
    let (h, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.head_count * config.head_dim, config.kv_head_count * config.head_dim);
    let mut out = Vec::new();
    let mut add =
        |role, name, outputs, inputs, bias| out.push(LinearShape { role, name, outputs, inputs, bias });
    let qkv_bias = bias(family.qkv_bias)?;
    match family.qkv {
        Qkv::Apart([query, key, value]) => {
            add(Role::Query, query, q, h, qkv_bias);
            add(Role::Key, key, kv, h, qkv_bias);
            add(Role::Value, value, kv, h, qkv_bias);
        }
        Qkv::Rows(name) => add(Role::QueryKeyValue, name, q + 2 * kv, h, qkv_bias),
        Qkv::Heads(name) => add(Role::QueryKeyValue, name, 3 * q, h, qkv_bias),
    }
    add(Role::Output, family.output, h, q, bias(family.output_bias)?);
    let mlp_bias = bias(family.mlp_bias)?;
    match family.mlp {
        Mlp::Gated { gate, up, down } => {
            add(Role::Gate, gate, f, h, mlp_bias);
            add(Role::Up, up, f, h, mlp_bias);
            add(Role::Down, down, h, f, mlp_bias);
        }
        Mlp::GatedRows { gate_up, down } => {
            add(Role::GateUp, gate_up, 2 * f, h, mlp_bias);
            add(Role::Down, down, h, f, mlp_bias);
        }
        Mlp::Plain { up, down } => {
            add(Role::Up, up, f, h, mlp_bias);
            add(Role::Down, down, h, f, mlp_bias);
        }
    }
    Ok(out)
}

/// Keys that change nothing of what a finished model computes, though their names sound so.
const HARMLESS: [&str; 26] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "activation_function",
    "attention_softmax_in_fp32",
    "attn_implementation",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "hidden_act",
    "hidden_activation",
    "initializer_factor",
    "layer_norm_epsilon",
    "max_window_layers",
    "mlp_type",
    "no_rope_layer_interval",
    "norm_type",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "scale_attention_softmax_in_fp32",
    "scale_attn_weights",
    "sliding_window_pattern",
    "tie_encoder_decoder",
    "use_cache",
];

/// Parts of names of keys that change a computation.
const TELLING: [&str; 25] = [
    "activation",
    "alibi",
    "attention",
    "attn",
    "bias",
    "cap",
    "embed",
    "expert",
    "factor",
    "gate",
    "head",
    "layer",
    "moe",
    "multiplier",
    "norm",
    "parallel",
    "position",
    "quant",
    "residual",
    "rope",
    "rotary",
    "router",
    "scal",
    "sparse",
    "window",
];

/// A key nobody asked for, whose name says that it changes the computation, and whose value does not
/// switch it off, is refused: better no answer than another model's.
fn refuse_unknown(keys: &Keys, family: &Family) -> Result<()> {
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64().is_some_and(|n| n == 0.0 || (n - 1.0).abs() < f64::EPSILON),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    };
    let harmless = |key: &str| {
        HARMLESS.contains(&key)
            || key.contains("dropout")
            || key.contains("pdrop")
            || ["output_", "summary_"].iter().any(|prefix| key.starts_with(prefix))
    };
    let telling = |key: &str| TELLING.iter().any(|part| key.contains(part));
    match keys.unasked().find(|(key, value)| telling(key) && !harmless(key) && !off(value)) {
        None => Ok(()),
        Some((key, value)) => Err(wrong(format!(
            "config.json: {key} ({value}) is not known for model_type {} and may change what the model computes; \
             if it does not, take it out of config.json",
            family.model_type
        ))),
    }
}
