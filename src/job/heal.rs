//! What is asked of healing: the methods, in the order they run, and what each of them takes.

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::preset::{ModelFacts, QloraSettings};
use super::spec::{Corpus, Preset};

/// One way to close the wound.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum HealMethod {
    /// Low-rank adapters over a frozen quantised base, merged into the original weights.
    Qlora(QloraSpec),
    /// Makes up for what the cut takes from the size of the residual stream (arXiv 2507.18212); trains nothing.
    Rescale(RescaleSpec),
    /// Has the MLP below the cut do what a linear map can do for the layers that went (arXiv 2505.02819); trains
    /// nothing.
    LeastSquares(LeastSquaresSpec),
}

impl HealMethod {
    /// Its name in a spec.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Qlora(_) => "qlora",
            Self::Rescale(_) => "rescale",
            Self::LeastSquares(_) => "least_squares",
        }
    }

    /// The text it works on. It must not be a text the job is evaluated on.
    #[must_use]
    pub const fn corpus(&self) -> &Corpus {
        match self {
            Self::Qlora(spec) => &spec.corpus,
            Self::Rescale(spec) => &spec.corpus,
            Self::LeastSquares(spec) => &spec.corpus,
        }
    }

    pub const fn corpus_mut(&mut self) -> &mut Corpus {
        match self {
            Self::Qlora(spec) => &mut spec.corpus,
            Self::Rescale(spec) => &mut spec.corpus,
            Self::LeastSquares(spec) => &mut spec.corpus,
        }
    }

    /// What the spec says, and the preset's word where it says nothing. `dropped` of the base model's layers have
    /// been cut.
    #[must_use]
    pub fn settings(&self, preset: Preset, facts: &ModelFacts, dropped: u32) -> HealSettings {
        let most = facts.max_position_embeddings;
        match self {
            Self::Qlora(spec) => HealSettings::Qlora(spec.settings(preset, facts, dropped)),
            Self::Rescale(spec) => HealSettings::Rescale(RescaleSettings {
                samples: spec.samples,
                seq_len: spec.seq_len.min(most),
            }),
            Self::LeastSquares(spec) => HealSettings::LeastSquares(LeastSquaresSettings {
                samples: spec.samples,
                seq_len: spec.seq_len.min(most),
                ridge: spec.ridge,
            }),
        }
    }

    /// Why it would not be exact for such a model, for a person; none where it is.
    #[must_use]
    pub fn refused_for(&self, facts: &ModelFacts) -> Option<String> {
        let (model, name) = (&facts.model_type, self.name());
        match self {
            Self::Qlora(_) => None,
            Self::Rescale(_) if facts.scale_free => None,
            Self::Rescale(_) => Some(format!(
                "{name} cannot be exact for {model}: its layers read the residual stream without a norm, so its size \
                 cannot be made up for behind the cut; leave it out, qlora takes this family"
            )),
            Self::LeastSquares(_) if facts.plain_mlp => None,
            Self::LeastSquares(_) => Some(format!(
                "{name} cannot be exact for {model}: a norm follows its MLP, and a linear map does not pass through \
                 it into the projection before; leave it out, qlora takes this family"
            )),
        }
    }
}

/// A method with nothing left open: what a heal stage really runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum HealSettings {
    Qlora(QloraSettings),
    LeastSquares(LeastSquaresSettings),
    Rescale(RescaleSettings),
}

impl HealSettings {
    /// Tokens per window.
    #[must_use]
    pub const fn seq_len(&self) -> u32 {
        match self {
            Self::Qlora(settings) => settings.seq_len,
            Self::Rescale(settings) => settings.seq_len,
            Self::LeastSquares(settings) => settings.seq_len,
        }
    }

    /// Windows it works on.
    #[must_use]
    pub const fn windows(&self) -> usize {
        match self {
            Self::Qlora(settings) => settings.steps as usize * settings.batch_size as usize,
            Self::Rescale(settings) => settings.samples as usize,
            Self::LeastSquares(settings) => settings.samples as usize,
        }
    }
}

/// What is asked of `rescale`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RescaleSpec {
    /// Text to measure the streams on.
    pub corpus: Corpus,
    /// Windows to measure on, beside those that judge.
    pub samples: u32,
    /// Tokens per window.
    pub seq_len: u32,
}

impl Default for RescaleSpec {
    fn default() -> Self {
        Self { corpus: Corpus::default(), samples: 32, seq_len: 512 }
    }
}

/// `rescale` with nothing left open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RescaleSettings {
    pub samples: u32,
    pub seq_len: u32,
}

/// What is asked of `least_squares`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LeastSquaresSpec {
    /// Text to fit on.
    pub corpus: Corpus,
    /// Windows to fit on, beside those that judge; their tokens should be many times the model's width.
    pub samples: u32,
    /// Tokens per window.
    pub seq_len: u32,
    /// Weight of leaving the MLP as it is, as a share of the mean square of what it gives.
    pub ridge: f64,
}

impl Default for LeastSquaresSpec {
    fn default() -> Self {
        Self { corpus: Corpus::default(), samples: 128, seq_len: 512, ridge: 0.01 }
    }
}

/// `least_squares` with nothing left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeastSquaresSettings {
    pub samples: u32,
    pub seq_len: u32,
    pub ridge: f64,
}

/// What is asked of QLoRA; unset values come from the preset
/// ([`super::preset`]), which needs to know the model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QloraSpec {
    /// Text to heal on. It must not be a text the job is evaluated on.
    #[serde(default)]
    pub corpus: Corpus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Linear layers that get an adapter, by name: `q_proj`, …, `down_proj`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    #[serde(default)]
    pub bits: BaseBits,
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
    /// Learn what the base model predicts, beside the text itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
    /// Steps between resume points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u32>,
}

/// The base model as a teacher (arXiv 1503.02531).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistillSpec {
    /// Share of the loss that is about what the base predicts, above 0 and up to 1; the rest is about the text itself.
    pub weight: f64,
    /// How many of the tokens that the base finds likeliest are taught at each place.
    pub top_k: u32,
}

impl Default for DistillSpec {
    fn default() -> Self {
        Self { weight: 0.5, top_k: 64 }
    }
}

/// Bits per weight of the frozen base while adapters are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum BaseBits {
    /// NF4 with double quantisation (arXiv 2305.14314).
    #[default]
    Four,
    /// Blockwise absmax int8.
    Eight,
    /// The checkpoint's own 16-bit values.
    Sixteen,
}

impl TryFrom<u8> for BaseBits {
    type Error = String;
    fn try_from(bits: u8) -> Result<Self, String> {
        match bits {
            4 => Ok(Self::Four),
            8 => Ok(Self::Eight),
            16 => Ok(Self::Sixteen),
            _ => Err(format!("bits must be 4, 8 or 16, not {bits}")),
        }
    }
}

impl From<BaseBits> for u8 {
    fn from(bits: BaseBits) -> Self {
        match bits {
            BaseBits::Four => 4,
            BaseBits::Eight => 8,
            BaseBits::Sixteen => 16,
        }
    }
}

/// The numbers themselves, which a derive over the names cannot know.
impl PartialSchema for BaseBits {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .description(Some("Bits per weight of the frozen base while adapters are trained."))
            .enum_values(Some([4, 8, 16]))
            .into()
    }
}

impl ToSchema for BaseBits {}

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    #[default]
    Cosine,
    Linear,
    Constant,
}
