//! What GGUF, the file format of llama.cpp, calls a model: its architecture, the keys of its shape and the names of its
//! tensors. Both wings use it: the API to refuse at once what cannot be written, the engine to write.

use super::config::{Activation, Config, Role};
use super::family::{AttentionScale, Norm, QkNorm, Qkv};
use super::rope::Scaling;

/// An architecture of llama.cpp that computes what a family of ours does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// Our family.
    model_type: &'static str,
    /// Its name in GGUF.
    pub name: &'static str,
    /// It rotates neighbours, where Hugging Face rotates the first half of a head with the second: rows of queries and
    /// keys change places.
    neighbours: bool,
    /// Biases it reads.
    biases: Biases,
    /// It reads the frequencies of Llama 3.1's rotation.
    frequencies: bool,
    /// Without a head of its own it takes the embedding for it.
    ties: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Biases {
    No,
    Any,
    /// Of queries, keys and values, and it wants them.
    Attention,
}

/// Families whose layers may go without llama.cpp noticing. Not here are those for which it knows by the number of a
/// layer what the layer is (gemma2, gemma3, smollm3), for then a cut makes it another model.
const ARCHITECTURES: [Architecture; 7] = [
    LLAMA,
    Architecture { model_type: "mistral", ..LLAMA },
    Architecture { model_type: "granite", name: "granite", ..LLAMA },
    Architecture { model_type: "qwen2", name: "qwen2", biases: Biases::Attention, ..PLAIN },
    Architecture { model_type: "qwen3", name: "qwen3", ..PLAIN },
    Architecture { model_type: "olmo2", name: "olmo2", ties: false, ..PLAIN },
    Architecture { model_type: "gemma", name: "gemma", ..PLAIN },
];

const LLAMA: Architecture = Architecture {
    model_type: "llama",
    name: "llama",
    neighbours: true,
    biases: Biases::Any,
    frequencies: true,
    ties: true,
};

const PLAIN: Architecture =
    Architecture { neighbours: false, biases: Biases::No, frequencies: false, ..LLAMA };

/// A tensor of ours and its place in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub ours: String,
    pub name: String,
    pub part: Part,
    pub turn: Turn,
}

/// What a tensor is, for the choice of its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A norm or a bias.
    Vector,
    Embedding,
    Head,
    Matrix {
        layer: usize,
        role: Role,
    },
}

/// How the values of a tensor differ from ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    AsIs,
    /// One is added to each.
    PlusOne,
    /// In each of so many heads, row `2i + j` is our row `i + j · half`.
    Neighbours {
        heads: usize,
    },
}

impl Turn {
    /// Our row that becomes row `row` of `rows`.
    #[must_use]
    pub fn source(self, row: usize, rows: usize) -> usize {
        match self {
            Self::AsIs | Self::PlusOne => row,
            Self::Neighbours { heads } => {
                let size = rows / heads;
                let (head, within) = (row / size, row % size);
                head * size + within / 2 + within % 2 * (size / 2)
            }
        }
    }

    /// The row that our row `row` of `rows` becomes.
    #[must_use]
    pub fn target(self, row: usize, rows: usize) -> usize {
        match self {
            Self::AsIs | Self::PlusOne => row,
            Self::Neighbours { heads } => {
                let size = rows / heads;
                let (head, within) = (row / size, row % size);
                head * size + 2 * (within % (size / 2)) + within / (size / 2)
            }
        }
    }
}

/// A value of a GGUF file's description.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    I32s(Vec<i32>),
    F32(f32),
    F32s(Vec<f32>),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
}

/// Whether models of this family can be written as GGUF, most of them.
#[must_use]
pub fn known(model_type: &str) -> bool {
    ARCHITECTURES.iter().any(|known| known.model_type == model_type)
}

impl Architecture {
    /// The architecture that computes what `config` says.
    ///
    /// # Errors
    /// Why there is none, for a person.
    pub fn of(config: &Config) -> Result<Self, String> {
        let model_type = config.family.model_type;
        let Some(known) = ARCHITECTURES.iter().find(|known| known.model_type == model_type) else {
            let all: Vec<&str> = ARCHITECTURES.iter().map(|known| known.model_type).collect();
            return Err(format!(
                "a {model_type} model cannot be written as GGUF so that llama.cpp computes the same after a cut; \
                 possible are {}",
                all.join(", ")
            ));
        };
        match known.lacks(config) {
            None => Ok(*known),
            Some(what) => Err(format!(
                "llama.cpp's architecture \"{}\" does not know what this model has: {what}",
                known.name
            )),
        }
    }

    /// What it would compute otherwise than `config` says.
    fn lacks(self, config: &Config) -> Option<String> {
        let gemma = config.family.norm == Norm::RmsPlusOne;
        let activation = if gemma { Activation::GeluTanh } else { Activation::Silu };
        let usual = 1.0 / (config.head_dim as f64).sqrt();
        let own_scale = config.family.attention_scale == AttentionScale::Multiplier;
        let biases = |attention: bool| {
            let of = (0..config.layer_count).flat_map(|layer| config.linears(layer));
            of.filter(move |linear| linear.bias && linear.role.in_attention() == attention)
        };
        let refused = match self.biases {
            Biases::Any => false,
            Biases::No => biases(true).chain(biases(false)).next().is_some(),
            Biases::Attention => {
                biases(true).any(|linear| linear.role == Role::Output) || biases(false).next().is_some()
            }
        };
        if config.activation != activation {
            return Some("its activation".into());
        }
        if !own_scale && (config.attention_scale - usual).abs() > 1e-9 {
            return Some("how attention is scaled".into());
        }
        if refused {
            return Some("biases".into());
        }
        if gemma && !config.tied {
            return Some("a head that is not the embedding".into());
        }
        if !matches!(config.family.qkv, Qkv::Apart(_)) {
            return Some("queries, keys and values in one matrix".into());
        }
        config.ropes.iter().find_map(|rope| match rope.scaling() {
            Scaling::No | Scaling::Linear { .. } | Scaling::Yarn { usual: true, .. } => None,
            Scaling::Llama3 { .. } if self.frequencies => None,
            Scaling::Llama3 { .. } | Scaling::Yarn { .. } | Scaling::Long => {
                Some("how the rotation is scaled".into())
            }
        })
    }

    /// The keys of the model's shape, layers counted as they are now.
    #[must_use]
    pub fn shape(self, config: &Config) -> Vec<(String, Value)> {
        let mut out = Vec::new();
        let mut put = |key: &str, value: Value| out.push((format!("{}.{key}", self.name), value));
        let size = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
        put("block_count", size(config.layer_count));
        put("context_length", size(context_length(config)));
        put("embedding_length", size(config.hidden_size));
        put("feed_forward_length", size(config.intermediate_size));
        put("attention.head_count", size(config.head_count));
        put("attention.head_count_kv", size(config.kv_head_count));
        put("attention.key_length", size(config.head_dim));
        put("attention.value_length", size(config.head_dim));
        put("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32));
        put("vocab_size", size(config.vocab_size));
        if let Some(rope) = config.ropes.first() {
            put("rope.dimension_count", size(2 * rope.pairs()));
            put("rope.freq_base", Value::F32(rope.theta() as f32));
            match rope.scaling() {
                Scaling::No | Scaling::Llama3 { .. } | Scaling::Long => {}
                Scaling::Linear { factor } => {
                    put("rope.scaling.type", Value::Text("linear".into()));
                    put("rope.scaling.factor", Value::F32(*factor as f32));
                }
                Scaling::Yarn { factor, original, .. } => {
                    put("rope.scaling.type", Value::Text("yarn".into()));
                    put("rope.scaling.factor", Value::F32(*factor as f32));
                    put("rope.scaling.original_context_length", size(*original as usize));
                }
            }
        }
        if config.family.multipliers {
            put("attention.scale", Value::F32(config.attention_scale as f32));
            put("embedding_scale", Value::F32(config.embedding_scale as f32));
            put("residual_scale", Value::F32(config.residual_scale as f32));
            put("logit_scale", Value::F32(1.0 / config.logit_scale as f32));
        }
        out
    }

    /// Every tensor of the model.
    #[must_use]
    pub fn tensors(self, config: &Config) -> Vec<Named> {
        let names = config.family.names;
        let one = |ours: String, name: &str, part, turn| Named { ours, name: name.into(), part, turn };
        let norm = if config.family.norm == Norm::RmsPlusOne { Turn::PlusOne } else { Turn::AsIs };
        let mut out = vec![one(config.embedding(), "token_embd.weight", Part::Embedding, Turn::AsIs)];
        for layer in 0..config.layer_count {
            self.of_layer(config, layer, norm, &mut out);
        }
        out.push(one(config.tensor(names.final_norm), "output_norm.weight", Part::Vector, norm));
        if !config.tied {
            let head = format!("{}.weight", names.head);
            out.push(one(head, "output.weight", Part::Head, Turn::AsIs));
        } else if !self.ties {
            out.push(one(config.embedding(), "output.weight", Part::Head, Turn::AsIs));
        }
        out
    }

    fn of_layer(self, config: &Config, layer: usize, norm: Turn, out: &mut Vec<Named>) {
        let mut put = |ours: &str, name: &str, part, turn| {
            let (ours, name) = (config.in_layer(layer, ours), format!("blk.{layer}.{name}"));
            out.push(Named { ours, name, part, turn });
        };
        let norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"];
        for (ours, name) in config.norms().into_iter().zip(norms) {
            if let Some(ours) = ours {
                put(&format!("{ours}.weight"), &format!("{name}.weight"), Part::Vector, norm);
            }
        }
        for linear in config.linears(layer) {
            let turn = match linear.role {
                Role::Query if self.neighbours => Turn::Neighbours { heads: config.head_count },
                Role::Key if self.neighbours => Turn::Neighbours { heads: config.kv_head_count },
                _ => Turn::AsIs,
            };
            let name = linear_name(linear.role);
            let part = Part::Matrix { layer, role: linear.role };
            put(&format!("{}.weight", linear.name), &format!("{name}.weight"), part, turn);
            if linear.bias {
                put(&format!("{}.bias", linear.name), &format!("{name}.bias"), Part::Vector, turn);
            }
        }
        if config.qk_norm != QkNorm::No {
            for which in ["q", "k"] {
                let (ours, name) =
                    (format!("self_attn.{which}_norm.weight"), format!("attn_{which}_norm.weight"));
                put(&ours, &name, Part::Vector, norm);
            }
        }
    }

    /// What the wavelengths of the rotation are multiplied by, where they are not one formula.
    #[must_use]
    pub fn rope_factors(self, config: &Config) -> Option<&[f64]> {
        config.ropes.iter().find_map(|rope| match rope.scaling() {
            Scaling::Llama3 { factors } => Some(factors.as_slice()),
            Scaling::No | Scaling::Linear { .. } | Scaling::Yarn { .. } | Scaling::Long => None,
        })
    }
}

/// Tokens llama.cpp may read at once. It sees all of them from every layer, so where a layer of ours sees a window
/// only, the window is as far as both agree.
#[must_use]
pub fn context_length(config: &Config) -> usize {
    let windows = config.layers.iter().filter_map(|layer| layer.window);
    windows.fold(config.max_position_embeddings, usize::min)
}

const fn linear_name(role: Role) -> &'static str {
    match role {
        Role::Query => "attn_q",
        Role::Key => "attn_k",
        Role::Value => "attn_v",
        Role::QueryKeyValue => "attn_qkv",
        Role::Output => "attn_output",
        Role::Gate => "ffn_gate",
        Role::Up | Role::GateUp => "ffn_up",
        Role::Down => "ffn_down",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_change_places_find_back() {
        let turn = Turn::Neighbours { heads: 3 };
        let order: Vec<usize> = (0..8).map(|row| turn.source(row, 24)).collect();
        assert_eq!(order, [0, 4, 1, 5, 2, 6, 3, 7]);
        assert!((0..24).all(|row| turn.target(turn.source(row, 24), 24) == row));
    }
}
