//! What is asked of healing: the methods, in the order they run, and what each of them takes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::preset::{ModelFacts, whole};
use super::spec::{Corpus, Preset};
use super::training::{BaseBits, BaseFormat, FourBits, Training, TrainingSpec};

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
    /// Trains the layer below the cut to give the stream that the base model has behind it (arXiv 2403.19135).
    Reconstruct(ReconstructSpec),
    /// Trains the last layers, and the head, as they are (arXiv 2411.15558).
    Partial(PartialSpec),
    /// Trains all layers as they are.
    Full(FullSpec),
}

/// What is done with each of the methods, which hold fields of the same name.
macro_rules! each {
    ($method:expr, $spec:ident => $work:expr) => {
        match $method {
            Self::Qlora($spec) => $work,
            Self::Rescale($spec) => $work,
            Self::LeastSquares($spec) => $work,
            Self::Reconstruct($spec) => $work,
            Self::Partial($spec) => $work,
            Self::Full($spec) => $work,
        }
    };
}

impl HealMethod {
    /// Its name in a spec.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Qlora(_) => "qlora",
            Self::Rescale(_) => "rescale",
            Self::LeastSquares(_) => "least_squares",
            Self::Reconstruct(_) => "reconstruct",
            Self::Partial(_) => "partial",
            Self::Full(_) => "full",
        }
    }

    /// The text it works on. It must not be a text the job is evaluated on.
    #[must_use]
    pub const fn corpus(&self) -> &Corpus {
        each!(self, spec => &spec.corpus)
    }

    pub const fn corpus_mut(&mut self) -> &mut Corpus {
        each!(self, spec => &mut spec.corpus)
    }

    /// How it trains by optimizer steps on the text itself, where it does.
    #[must_use]
    pub const fn training(&self) -> Option<&TrainingSpec> {
        match self {
            Self::Qlora(spec) => Some(&spec.training),
            Self::Partial(spec) => Some(&spec.training),
            Self::Full(spec) => Some(&spec.training),
            Self::Rescale(_) | Self::LeastSquares(_) | Self::Reconstruct(_) => None,
        }
    }

    /// What the spec says, and the preset's word where it says nothing. `dropped` of the base model's layers have
    /// been cut.
    #[must_use]
    pub fn settings(&self, preset: Preset, facts: &ModelFacts, dropped: u32) -> HealSettings {
        let most = facts.max_position_embeddings;
        let left = facts.layer_count.saturating_sub(dropped);
        let head = |asked: Option<bool>| asked.unwrap_or(!facts.tied);
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
            Self::Reconstruct(spec) => HealSettings::Reconstruct(ReconstructSettings {
                samples: spec.samples,
                seq_len: spec.seq_len.min(most),
                epochs: spec.epochs,
                learning_rate: spec.learning_rate,
            }),
            Self::Partial(spec) => HealSettings::Whole(WholeSettings {
                last_layers: spec.layers.min(left),
                head: head(spec.head),
                training: whole(&spec.training, preset, facts, dropped),
            }),
            Self::Full(spec) => HealSettings::Whole(WholeSettings {
                last_layers: left,
                head: head(spec.head),
                training: whole(&spec.training, preset, facts, dropped),
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
            Self::Reconstruct(_) | Self::Partial(_) | Self::Full(_) if facts.experts => Some(format!(
                "{name} does not train experts, which are most of {model}; leave it out, qlora takes its attention"
            )),
            Self::Partial(PartialSpec { head, .. }) | Self::Full(FullSpec { head, .. })
                if facts.tied && *head == Some(true) =>
            {
                Some(format!(
                    "{name} cannot train the head of this {model}, which is its embedding as well; leave `head` out"
                ))
            }
            Self::Reconstruct(_) | Self::Partial(_) | Self::Full(_) => None,
        }
    }
}

/// A method with nothing left open: what a heal stage really runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum HealSettings {
    Qlora(QloraSettings),
    Whole(WholeSettings),
    LeastSquares(LeastSquaresSettings),
    Reconstruct(ReconstructSettings),
    Rescale(RescaleSettings),
}

impl HealSettings {
    /// Tokens per window.
    #[must_use]
    pub const fn seq_len(&self) -> u32 {
        match self {
            Self::Qlora(settings) => settings.training.seq_len,
            Self::Whole(settings) => settings.training.seq_len,
            Self::Rescale(settings) => settings.seq_len,
            Self::LeastSquares(settings) => settings.seq_len,
            Self::Reconstruct(settings) => settings.seq_len,
        }
    }

    /// Windows it works on.
    #[must_use]
    pub const fn windows(&self) -> usize {
        match self {
            Self::Qlora(settings) => settings.training.windows(),
            Self::Whole(settings) => settings.training.windows(),
            Self::Rescale(settings) => settings.samples as usize,
            Self::LeastSquares(settings) => settings.samples as usize,
            Self::Reconstruct(settings) => settings.samples as usize,
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
    /// Linear layers that get an adapter, by name: `q_proj`, …, `down_proj`; or `attention`, `ffn`, `all`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    #[serde(default)]
    pub bits: BaseBits,
    /// What 4 bits say: `nf4`, or `q4_0` as llama.cpp has it.
    #[serde(default, skip_serializing_if = "FourBits::is_nf4")]
    pub format: FourBits,
    #[serde(flatten)]
    pub training: TrainingSpec,
}

/// QLoRA with nothing left open: what a heal stage really runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct QloraSettings {
    pub rank: u32,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Vec<String>,
    pub bits: BaseBits,
    #[serde(default, skip_serializing_if = "FourBits::is_nf4")]
    pub format: FourBits,
    #[serde(flatten)]
    pub training: Training,
}

impl QloraSettings {
    /// How the base is kept.
    #[must_use]
    pub const fn base(&self) -> BaseFormat {
        match self.bits {
            BaseBits::Four => BaseFormat::Four(self.format),
            BaseBits::Eight => BaseFormat::Int8,
            BaseBits::Sixteen => BaseFormat::Sixteen,
        }
    }
}

/// What is asked of `partial`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialSpec {
    /// Text to heal on. It must not be a text the job is evaluated on.
    #[serde(default)]
    pub corpus: Corpus,
    /// How many of the last layers are trained.
    #[serde(default = "last_layers")]
    pub layers: u32,
    /// Train the head, too: by default where it is not the embedding as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<bool>,
    #[serde(flatten)]
    pub training: TrainingSpec,
}

/// Three, as arXiv 2411.15558 has it.
const fn last_layers() -> u32 {
    3
}

/// What is asked of `full`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FullSpec {
    /// Text to heal on. It must not be a text the job is evaluated on.
    #[serde(default)]
    pub corpus: Corpus,
    /// Train the head, too: by default where it is not the embedding as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<bool>,
    #[serde(flatten)]
    pub training: TrainingSpec,
}

/// `partial` or `full` with nothing left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WholeSettings {
    /// How many of the last layers are trained: all linear layers of each.
    pub last_layers: u32,
    pub head: bool,
    #[serde(flatten)]
    pub training: Training,
}

/// What is asked of `reconstruct`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReconstructSpec {
    /// Text to fit on.
    pub corpus: Corpus,
    /// Windows to fit on, beside those that judge.
    pub samples: u32,
    /// Tokens per window.
    pub seq_len: u32,
    /// How often each window is gone through.
    pub epochs: u32,
    pub learning_rate: f64,
}

impl Default for ReconstructSpec {
    fn default() -> Self {
        Self { corpus: Corpus::default(), samples: 128, seq_len: 512, epochs: 4, learning_rate: 1e-3 }
    }
}

/// `reconstruct` with nothing left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReconstructSettings {
    pub samples: u32,
    pub seq_len: u32,
    pub epochs: u32,
    pub learning_rate: f64,
}
