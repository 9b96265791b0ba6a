//! What methods of healing that train have in common: how long, how fast, on what loss, by which optimizer.

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// What is asked of a training; the method, or the preset, has the word on what is not.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TrainingSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    #[serde(default)]
    pub schedule: Schedule,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u32>,
    /// Optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    /// Windows per optimizer step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<u32>,
    /// Tokens per window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// How much of the gradient's mean is kept from step to step (`AdamW`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// The same of the mean of its square.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Added to the root of the square's mean (`AdamW`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Bits of each of the optimizer's two moments of a parameter.
    #[serde(default)]
    pub moment_bits: MomentBits,
    /// Norm that longer gradients are scaled down to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_gradient_norm: Option<f64>,
    /// Learn what the base model predicts, beside the text itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
    /// Steps between resume points; there is one every few minutes in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u32>,
}

/// A training with nothing left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Training {
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup_steps: u32,
    pub steps: u32,
    pub batch_size: u32,
    pub seq_len: u32,
    pub weight_decay: f64,
    #[serde(default = "beta1")]
    pub beta1: f64,
    #[serde(default = "beta2")]
    pub beta2: f64,
    #[serde(default = "eps")]
    pub eps: f64,
    #[serde(default)]
    pub moment_bits: MomentBits,
    #[serde(default = "max_gradient_norm")]
    pub max_gradient_norm: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
    pub checkpoint_every: u32,
}

/// What a preset says of a training.
pub struct Defaults {
    pub learning_rate: f64,
    pub batch_size: u32,
    pub steps: u32,
    pub warmup_steps: u32,
    pub seq_len: u32,
}

/// As in `torch`.
const fn beta1() -> f64 {
    0.9
}

const fn beta2() -> f64 {
    0.999
}

const fn eps() -> f64 {
    1e-8
}

/// As in transformers' Trainer.
const fn max_gradient_norm() -> f64 {
    1.0
}

impl TrainingSpec {
    /// What is asked, and else the word of `defaults`; no window is longer than `most` tokens.
    #[must_use]
    pub fn settled(&self, defaults: &Defaults, most: u32) -> Training {
        let steps = self.steps.unwrap_or(defaults.steps);
        Training {
            learning_rate: self.learning_rate.unwrap_or(defaults.learning_rate),
            schedule: self.schedule,
            // A short run must not spend itself on warming up.
            warmup_steps: self.warmup_steps.unwrap_or_else(|| defaults.warmup_steps.min(steps / 5)),
            steps,
            batch_size: self.batch_size.unwrap_or(defaults.batch_size),
            seq_len: self.seq_len.unwrap_or(defaults.seq_len).min(most),
            weight_decay: self.weight_decay.unwrap_or(0.0),
            beta1: self.beta1.unwrap_or_else(beta1),
            beta2: self.beta2.unwrap_or_else(beta2),
            eps: self.eps.unwrap_or_else(eps),
            moment_bits: self.moment_bits,
            max_gradient_norm: self.max_gradient_norm.unwrap_or_else(max_gradient_norm),
            distill: self.distill.clone(),
            checkpoint_every: self.checkpoint_every.unwrap_or(50),
        }
    }
}

impl Training {
    /// Windows that are trained on, each as often as it comes.
    #[must_use]
    pub const fn windows(&self) -> usize {
        self.steps as usize * self.batch_size as usize
    }
}

/// The base model as a teacher (arXiv 1503.02531).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistillSpec {
    /// Share of the loss that is about what the base predicts, above 0 and up to 1; the rest is about the text itself.
    pub weight: f64,
    /// How many of the tokens that the base finds likeliest are taught at each place.
    pub top_k: u32,
    /// Weight of what the stream behind each cut lacks of the base model's there, its square relative to the square of
    /// the latter (arXiv 2403.17887, footnote 9), in nats; 0 for none.
    #[serde(skip_serializing_if = "is_zero")]
    pub seam: f64,
}

impl Default for DistillSpec {
    fn default() -> Self {
        Self { weight: 0.5, top_k: 64, seam: 0.0 }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    #[default]
    Cosine,
    Linear,
    Constant,
}

/// An enum of a few numbers, which in JSON are these numbers: a derive over the names could not know.
macro_rules! numbers {
    ($(#[$about:meta])* $name:ident, $description:literal, $field:literal: $($(#[$of:meta])* $variant:ident = $number:literal),+) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "u8", into = "u8")]
        pub enum $name { $($(#[$of])* $variant),+ }

        impl TryFrom<u8> for $name {
            type Error = String;
            fn try_from(bits: u8) -> Result<Self, String> {
                match bits {
                    $($number => Ok(Self::$variant),)+
                    _ => Err(format!("{} must be one of {:?}, not {bits}", $field, [$($number),+])),
                }
            }
        }

        impl From<$name> for u8 {
            fn from(bits: $name) -> Self {
                match bits { $($name::$variant => $number),+ }
            }
        }

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                ObjectBuilder::new()
                    .schema_type(Type::Integer)
                    .description(Some($description))
                    .enum_values(Some([$($number),+]))
                    .into()
            }
        }

        impl ToSchema for $name {}
    };
}

numbers! {
    /// Bits per weight of the frozen base while adapters are trained.
    BaseBits, "Bits per weight of the frozen base while adapters are trained.", "bits":
    /// NF4 with double quantisation (arXiv 2305.14314).
    #[default]
    Four = 4,
    /// Blockwise absmax int8.
    Eight = 8,
    /// The checkpoint's own 16-bit values.
    Sixteen = 16
}

/// What four bits say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FourBits {
    /// Which of sixteen quantiles of the normal distribution (arXiv 2305.14314), in blocks of 64.
    #[default]
    Nf4,
    /// Which of sixteen equal steps, in blocks of 32: as in a GGUF file of that type.
    #[serde(rename = "q4_0")]
    Q4,
}

impl FourBits {
    #[must_use]
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub fn is_nf4(&self) -> bool {
        *self == Self::Nf4
    }
}

/// How the frozen base is kept while adapters are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseFormat {
    Sixteen,
    Int8,
    Four(FourBits),
}

numbers! {
    /// Bits of each of the optimizer's two moments of a parameter.
    MomentBits, "Bits of each of the optimizer's two moments of a parameter.", "moment_bits":
    /// Float32.
    #[default]
    ThirtyTwo = 32,
    /// Blockwise, on a scale whose steps are fine where values are small (arXiv 2110.02861).
    Eight = 8
}
