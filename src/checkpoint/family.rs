//! Model families as data: one row says what `config.json` leaves unsaid, and how the tensors are called.
//!
//! A row is the plain llama row with its differences. What a row cannot say, no family here needs.

use serde::Serialize;
use utoipa::ToSchema;

/// What sets a family apart.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// Well-known models of the family, for people.
    pub examples: &'static str,
    pub keys: Keys,
    pub names: Names,
    pub norm: Norm,
    /// The MLP reads the same stream as attention, not what attention left.
    pub parallel: Parallel,
    pub qkv: Qkv,
    /// The projection behind attention.
    pub output: &'static str,
    pub mlp: Mlp,
    pub experts: Option<Experts>,
    /// Linear layers keep their weights as `[inputs, outputs]`.
    pub transposed: bool,
    pub qkv_bias: Bias,
    pub output_bias: Bias,
    pub mlp_bias: Bias,
    pub head_bias: bool,
    pub qk_norm: QkNorm,
    pub activation: &'static str,
    pub window: Window,
    pub rope: Rope,
    pub head_dim: HeadDim,
    pub attention_scale: AttentionScale,
    /// The embedding is multiplied by `√hidden_size`.
    pub scaled_embedding: bool,
    /// `embedding_multiplier`, `residual_multiplier` and `logits_scaling` are read.
    pub multipliers: bool,
    /// `attn_logit_softcapping` is read.
    pub attention_cap: bool,
    /// `final_logit_softcapping` is read.
    pub final_cap: bool,
    /// What an absent `tie_word_embeddings` means.
    pub tied: bool,
}

/// Keys of `config.json` that families spell in their own way.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    pub layer_count: &'static str,
    pub hidden_size: &'static str,
    pub head_count: &'static str,
    pub intermediate_size: &'static str,
    pub max_positions: &'static str,
    pub norm_eps: &'static str,
    pub activation: &'static str,
}

/// Tensor names, without `.weight` and `.bias`.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// In front of all names but the head's. A checkpoint of the bare decoder leaves it out.
    pub base: &'static str,
    pub embedding: &'static str,
    /// Learned positions.
    pub positions: Option<&'static str>,
    /// In front of the number of a layer.
    pub layers: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    /// Norm of what attention reads.
    pub attention_in: Option<&'static str>,
    /// Norm of what attention gives.
    pub attention_out: Option<&'static str>,
    /// Norm of what the MLP reads; without one it reads what attention reads.
    pub mlp_in: Option<&'static str>,
    /// Norm of what the MLP gives.
    pub mlp_out: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    Rms,
    /// RMS norm that multiplies by 1 + weight.
    RmsPlusOne,
    /// Mean and variance, with a bias.
    Layer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parallel {
    Never,
    Always,
    /// `use_parallel_residual`, with this default.
    Key {
        default: bool,
    },
    /// The same, and a parallel layer has one norm only.
    KeyOneNorm,
}

/// How queries, keys and values are stored.
#[derive(Debug, Clone, Copy)]
pub enum Qkv {
    Apart([&'static str; 3]),
    /// One matrix: all queries, then all keys, then all values.
    Rows(&'static str),
    /// One matrix: query, key and value of the first head, then of the next.
    Heads(&'static str),
}

#[derive(Debug, Clone, Copy)]
pub enum Mlp {
    /// `down(act(gate) * up)`.
    Gated { gate: &'static str, up: &'static str, down: &'static str },
    /// The same, gate and up in one matrix.
    GatedRows { gate_up: &'static str, down: &'static str },
    /// `down(act(up))`.
    Plain { up: &'static str, down: &'static str },
}

/// A mixture of experts in place of the MLP.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    pub router: &'static str,
    /// In front of the number of an expert.
    pub experts: &'static str,
    /// gate, up and down of an expert.
    pub linears: [&'static str; 3],
    /// Key with the width of an expert.
    pub width_key: &'static str,
    /// The chosen experts' shares always sum to 1; else `norm_topk_prob` decides.
    pub normalised: bool,
    /// `mlp_only_layers` and `decoder_sparse_step` say which layers have experts; else all.
    pub some_layers: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Bias {
    Never,
    Always,
    Key(&'static str, bool),
}

/// Norm of queries and keys before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    No,
    /// The family's norm over each head, one weight for all heads.
    Head,
    /// RMS norm over all heads together.
    Whole,
    /// `qk_layernorm`: layer norm with bias over each head, one weight for all.
    KeyShared,
    /// `qk_layernorm`: layer norm over each head, each with its own weight.
    KeyEach,
}

/// How a family says which layers see only a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// No layer does.
    Full,
    /// `sliding_window` holds for every layer; absent means this many tokens.
    Every { default: Option<usize> },
    /// The same, if `use_sliding_window`.
    EveryIf,
    /// `layer_types`; without it from layer `max_window_layers` on, if `use_sliding_window`.
    Upper,
    /// `layer_types`; without it all but each so-manieth layer (`sliding_window_pattern`, with this default).
    Pattern(usize),
    /// `layer_types`; without it the layers without rotation, if `use_sliding_window`.
    Unrotated,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rope {
    /// Positions are learned.
    No,
    /// Keys of the base and of the share of each head that is rotated, with their defaults.
    Keys { theta: (&'static str, f64), partial: Option<(&'static str, f64)> },
    /// As the first key, but sliding layers have a base of their own.
    Local { theta: (&'static str, f64), local: (&'static str, f64) },
    /// As the first key, but `no_rope_layers` are not rotated.
    SomeLayers { theta: (&'static str, f64) },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadDim {
    /// `hidden_size / heads`, whatever the config says.
    Split,
    /// `head_dim`, else `hidden_size / heads`.
    Key,
    /// `head_dim`, else this.
    KeyOr(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionScale {
    /// `1/√head_dim`.
    HeadDim,
    /// `1/√head_dim`, unless `scale_attn_weights` is off.
    HeadDimIf,
    /// 1/√`query_pre_attn_scalar`.
    QueryScalar,
    /// `attention_multiplier`.
    Multiplier,
}

const THETA: (&str, f64) = ("rope_theta", 10_000.0);

const LLAMA: Family = Family {
    model_type: "llama",
    examples: "Llama 1, 2, 3, 3.1; TinyLlama; SmolLM 1, 2",
    keys: Keys {
        layer_count: "num_hidden_layers",
        hidden_size: "hidden_size",
        head_count: "num_attention_heads",
        intermediate_size: "intermediate_size",
        max_positions: "max_position_embeddings",
        norm_eps: "rms_norm_eps",
        activation: "hidden_act",
    },
    names: Names {
        base: "model.",
        embedding: "embed_tokens",
        positions: None,
        layers: "layers.",
        final_norm: "norm",
        head: "lm_head",
        attention_in: Some("input_layernorm"),
        attention_out: None,
        mlp_in: Some("post_attention_layernorm"),
        mlp_out: None,
    },
    norm: Norm::Rms,
    parallel: Parallel::Never,
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    output: "self_attn.o_proj",
    mlp: Mlp::Gated { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" },
    experts: None,
    transposed: false,
    qkv_bias: Bias::Key("attention_bias", false),
    output_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    head_bias: false,
    qk_norm: QkNorm::No,
    activation: "silu",
    window: Window::Full,
    rope: Rope::Keys { theta: THETA, partial: None },
    head_dim: HeadDim::Key,
    attention_scale: AttentionScale::HeadDim,
    scaled_embedding: false,
    multipliers: false,
    attention_cap: false,
    final_cap: false,
    tied: false,
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    examples: "Mistral 7B, Mistral Nemo, Mistral Small",
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    window: Window::Every { default: Some(4096) },
    ..LLAMA
};

const MIXTRAL: Family = Family {
    model_type: "mixtral",
    examples: "Mixtral 8x7B, 8x22B",
    experts: Some(Experts {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts.",
        linears: ["w1", "w3", "w2"],
        width_key: "intermediate_size",
        normalised: true,
        some_layers: false,
    }),
    window: Window::Every { default: None },
    rope: Rope::Keys { theta: ("rope_theta", 1e6), partial: None },
    ..MISTRAL
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    examples: "Qwen1.5, Qwen2, Qwen2.5",
    qkv_bias: Bias::Always,
    window: Window::Upper,
    ..MISTRAL
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    examples: "Qwen3",
    qkv_bias: Bias::Key("attention_bias", false),
    output_bias: Bias::Key("attention_bias", false),
    qk_norm: QkNorm::Head,
    head_dim: HeadDim::KeyOr(128),
    ..QWEN2
};

const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    examples: "Qwen3-30B-A3B",
    experts: Some(Experts {
        router: "mlp.gate",
        experts: "mlp.experts.",
        linears: ["gate_proj", "up_proj", "down_proj"],
        width_key: "moe_intermediate_size",
        normalised: false,
        some_layers: true,
    }),
    window: Window::EveryIf,
    head_dim: HeadDim::Key,
    ..QWEN3
};

const GEMMA: Family = Family {
    model_type: "gemma",
    examples: "Gemma 2B, 7B; CodeGemma",
    norm: Norm::RmsPlusOne,
    mlp_bias: Bias::Never,
    activation: "gelu_pytorch_tanh",
    head_dim: HeadDim::KeyOr(256),
    scaled_embedding: true,
    tied: true,
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    examples: "Gemma 2",
    keys: Keys { activation: "hidden_activation", ..LLAMA.keys },
    names: Names {
        attention_out: Some("post_attention_layernorm"),
        mlp_in: Some("pre_feedforward_layernorm"),
        mlp_out: Some("post_feedforward_layernorm"),
        ..LLAMA.names
    },
    window: Window::Pattern(2),
    attention_scale: AttentionScale::QueryScalar,
    attention_cap: true,
    final_cap: true,
    ..GEMMA
};

const GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    examples: "Gemma 3 270M, 1B (text)",
    qk_norm: QkNorm::Head,
    window: Window::Pattern(6),
    rope: Rope::Local { theta: ("rope_theta", 1e6), local: ("rope_local_base_freq", 10_000.0) },
    // transformers reads the key for no computation.
    attention_cap: false,
    ..GEMMA2
};

const PHI: Family = Family {
    model_type: "phi",
    examples: "Phi-1, Phi-1.5, Phi-2",
    keys: Keys { norm_eps: "layer_norm_eps", ..LLAMA.keys },
    names: Names { final_norm: "final_layernorm", mlp_in: None, ..LLAMA.names },
    norm: Norm::Layer,
    parallel: Parallel::Always,
    output: "self_attn.dense",
    mlp: Mlp::Plain { up: "mlp.fc1", down: "mlp.fc2" },
    qkv_bias: Bias::Always,
    output_bias: Bias::Always,
    mlp_bias: Bias::Always,
    head_bias: true,
    qk_norm: QkNorm::KeyShared,
    activation: "gelu_new",
    rope: Rope::Keys { theta: THETA, partial: Some(("partial_rotary_factor", 0.5)) },
    ..LLAMA
};

const PHI3: Family = Family {
    model_type: "phi3",
    examples: "Phi-3, Phi-3.5, Phi-4",
    qkv: Qkv::Rows("self_attn.qkv_proj"),
    mlp: Mlp::GatedRows { gate_up: "mlp.gate_up_proj", down: "mlp.down_proj" },
    window: Window::Every { default: None },
    rope: Rope::Keys { theta: THETA, partial: Some(("partial_rotary_factor", 1.0)) },
    ..MISTRAL
};

const GPT2: Family = Family {
    model_type: "gpt2",
    examples: "GPT-2, DistilGPT2",
    keys: Keys {
        layer_count: "n_layer",
        hidden_size: "n_embd",
        head_count: "n_head",
        intermediate_size: "n_inner",
        max_positions: "n_positions",
        norm_eps: "layer_norm_epsilon",
        activation: "activation_function",
    },
    names: Names {
        base: "transformer.",
        embedding: "wte",
        positions: Some("wpe"),
        layers: "h.",
        final_norm: "ln_f",
        attention_in: Some("ln_1"),
        mlp_in: Some("ln_2"),
        ..LLAMA.names
    },
    norm: Norm::Layer,
    qkv: Qkv::Rows("attn.c_attn"),
    output: "attn.c_proj",
    mlp: Mlp::Plain { up: "mlp.c_fc", down: "mlp.c_proj" },
    transposed: true,
    qkv_bias: Bias::Always,
    output_bias: Bias::Always,
    mlp_bias: Bias::Always,
    activation: "gelu_new",
    rope: Rope::No,
    head_dim: HeadDim::Split,
    attention_scale: AttentionScale::HeadDimIf,
    tied: true,
    ..LLAMA
};

const GPT_NEOX: Family = Family {
    model_type: "gpt_neox",
    examples: "Pythia, GPT-NeoX-20B, RedPajama-INCITE",
    keys: Keys { norm_eps: "layer_norm_eps", ..LLAMA.keys },
    names: Names {
        base: "gpt_neox.",
        embedding: "embed_in",
        final_norm: "final_layer_norm",
        head: "embed_out",
        ..LLAMA.names
    },
    norm: Norm::Layer,
    parallel: Parallel::Key { default: true },
    qkv: Qkv::Heads("attention.query_key_value"),
    output: "attention.dense",
    mlp: Mlp::Plain { up: "mlp.dense_h_to_4h", down: "mlp.dense_4h_to_h" },
    qkv_bias: Bias::Key("attention_bias", true),
    output_bias: Bias::Key("attention_bias", true),
    mlp_bias: Bias::Always,
    activation: "gelu",
    rope: Rope::Keys { theta: ("rotary_emb_base", 10_000.0), partial: Some(("rotary_pct", 0.25)) },
    head_dim: HeadDim::Split,
    ..LLAMA
};

const OLMO2: Family = Family {
    model_type: "olmo2",
    examples: "OLMo 2",
    names: Names {
        attention_in: None,
        attention_out: Some("post_attention_layernorm"),
        mlp_in: None,
        mlp_out: Some("post_feedforward_layernorm"),
        ..LLAMA.names
    },
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::Whole,
    ..LLAMA
};

const SMOLLM3: Family = Family {
    model_type: "smollm3",
    examples: "SmolLM3",
    window: Window::Unrotated,
    rope: Rope::SomeLayers { theta: ("rope_theta", 2e6) },
    tied: true,
    ..LLAMA
};

const GRANITE: Family = Family {
    model_type: "granite",
    examples: "Granite 3",
    attention_scale: AttentionScale::Multiplier,
    multipliers: true,
    ..LLAMA
};

const STARCODER2: Family = Family {
    model_type: "starcoder2",
    examples: "StarCoder2",
    keys: Keys { norm_eps: "norm_epsilon", ..LLAMA.keys },
    norm: Norm::Layer,
    mlp: Mlp::Plain { up: "mlp.c_fc", down: "mlp.c_proj" },
    qkv_bias: Bias::Key("use_bias", true),
    output_bias: Bias::Key("use_bias", true),
    mlp_bias: Bias::Key("use_bias", true),
    activation: "gelu_pytorch_tanh",
    window: Window::Every { default: None },
    tied: true,
    ..LLAMA
};

const STABLELM: Family = Family {
    model_type: "stablelm",
    examples: "StableLM 2, StableLM Zephyr",
    keys: Keys { norm_eps: "layer_norm_eps", ..LLAMA.keys },
    norm: Norm::Layer,
    parallel: Parallel::KeyOneNorm,
    qkv_bias: Bias::Key("use_qkv_bias", false),
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::KeyEach,
    rope: Rope::Keys { theta: THETA, partial: Some(("partial_rotary_factor", 0.25)) },
    head_dim: HeadDim::Split,
    ..LLAMA
};

/// Every family there is.
pub static FAMILIES: [Family; 18] = [
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    PHI,
    PHI3,
    GPT2,
    GPT_NEOX,
    OLMO2,
    SMOLLM3,
    GRANITE,
    STARCODER2,
    STABLELM,
];

impl Family {
    /// The row of a `model_type`.
    pub fn of(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|f| f.model_type == model_type)
    }

    /// All `model_type`s, for messages.
    pub fn names() -> String {
        FAMILIES.each_ref().map(|f| f.model_type).join(", ")
    }

    /// What the family supports, for people and programs.
    pub fn card(&self) -> ModelFamily {
        let attention = match self.qkv {
            Qkv::Apart(names) => names.to_vec(),
            Qkv::Rows(name) | Qkv::Heads(name) => vec![name],
        };
        let mlp = match self.mlp {
            _ if self.experts.is_some() => Vec::new(),
            Mlp::Gated { gate, up, down } => vec![gate, up, down],
            Mlp::GatedRows { gate_up, down } => vec![gate_up, down],
            Mlp::Plain { up, down } => vec![up, down],
        };
        let targets = attention.into_iter().chain([self.output]).chain(mlp);
        ModelFamily {
            model_type: self.model_type,
            examples: self.examples,
            profile: true,
            prune: true,
            heal: true,
            heal_targets: targets.map(|name| name.rsplit('.').next().unwrap_or(name)).collect(),
            experts: self.experts.is_some(),
            gguf: super::gguf::known(self.model_type),
        }
    }
}

/// A family of models and what can be done with it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelFamily {
    /// `model_type` of `config.json`.
    #[schema(example = "llama")]
    pub model_type: &'static str,
    /// Well-known models of the family.
    pub examples: &'static str,
    pub profile: bool,
    pub prune: bool,
    pub heal: bool,
    /// Linear layers that healing can put adapters on.
    pub heal_targets: Vec<&'static str>,
    /// A mixture of experts; experts are pruned with their layers, but carry no adapters.
    pub experts: bool,
    /// Export as GGUF.
    pub gguf: bool,
}
