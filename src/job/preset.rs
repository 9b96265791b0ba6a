//! Healing values that the spec leaves open: the paper's, by model, and the
//! review's, by pruning rate.

use super::heal::{QloraSettings, QloraSpec};
use super::spec::Preset;
use super::training::{Defaults, Training, TrainingSpec};

/// What a preset needs to know of the base model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// `model_type` of `config.json`.
    pub model_type: String,
    pub hidden_size: u32,
    /// Layers before pruning.
    pub layer_count: u32,
    pub vocab_size: u32,
    pub max_position_embeddings: u32,
    /// Has layers with experts, which carry no adapters.
    pub experts: bool,
    /// All that reads the residual stream norms it first: its size is nothing to it.
    pub scale_free: bool,
    /// The head is the embedding, too.
    pub tied: bool,
    /// What the MLP gives joins the stream as it is, without a norm of its own.
    pub plain_mlp: bool,
    /// Why it cannot be written as GGUF, where it cannot.
    pub no_gguf: Option<String>,
}

/// What the preset says of a training of adapters. `dropped` of the base model's layers have been cut.
fn defaults(preset: Preset, facts: &ModelFacts, dropped: u32) -> (u32, Defaults) {
    match preset {
        Preset::Paper => paper(facts),
        Preset::Seed => seed(f64::from(dropped) / f64::from(facts.layer_count)),
    }
}

impl QloraSpec {
    /// What the spec says, and the preset's word where it says nothing.
    /// `dropped` of the base model's layers have been cut.
    #[must_use]
    pub fn settings(&self, preset: Preset, facts: &ModelFacts, dropped: u32) -> QloraSettings {
        let (rank, defaults) = defaults(preset, facts, dropped);
        let rank = self.rank.unwrap_or(rank);
        QloraSettings {
            rank,
            // The paper sets alpha = rank (appendix A.1); so does the review by silence.
            alpha: self.alpha.unwrap_or(f64::from(rank)),
            dropout: self.dropout.unwrap_or(0.05),
            targets: self.targets.clone().unwrap_or_else(|| targets(facts)),
            bits: self.bits,
            format: self.format,
            training: self.training.settled(&defaults, facts.max_position_embeddings),
        }
    }
}

/// Whole weights move all together and so in smaller steps than adapters.
pub(super) fn whole(training: &TrainingSpec, preset: Preset, facts: &ModelFacts, dropped: u32) -> Training {
    let (_, defaults) = defaults(preset, facts, dropped);
    training.settled(&Defaults { learning_rate: 1e-4, ..defaults }, facts.max_position_embeddings)
}

/// The MLP (arXiv 2403.17887, appendix A.1); attention where experts take its place.
fn targets(facts: &ModelFacts) -> Vec<String> {
    let names: &[&str] = if facts.experts {
        &["q_proj", "k_proj", "v_proj", "o_proj"]
    } else {
        &["gate_proj", "up_proj", "down_proj"]
    };
    names.iter().map(ToString::to_string).collect()
}

/// arXiv 2403.17887, appendix A: batch 16, 5000 steps, warm-up 100, cosine;
/// rank 64 and 3e-4 unless a sweep said otherwise.
fn paper(facts: &ModelFacts) -> (u32, Defaults) {
    let (rank, learning_rate, seq_len) =
        match (facts.model_type.as_str(), facts.hidden_size, facts.layer_count, facts.vocab_size) {
            ("llama", 4096, 32, 32_000) => (2, 3e-4, 2048),
            ("llama", 5120, 40, 32_000) => (64, 3e-4, 4096),
            ("llama", 8192, 80, 32_000) => (8, 3e-5, 4096),
            ("mistral", 4096, 32, 32_000) => (4, 3e-6, 2048),
            ("phi", 2560, 32, 51_200) => (64, 2e-4, 2048),
            _ => (64, 3e-4, 2048),
        };
    (rank, Defaults { learning_rate, batch_size: 16, steps: 5000, warmup_steps: 100, seq_len })
}

/// The review's table 13.2, by the share of layers cut; where it gives a range
/// (steps, batch size), the larger value. It names no window length: 512.
fn seed(rate: f64) -> (u32, Defaults) {
    let (rank, learning_rate, steps, warmup_steps) = match rate {
        r if r < 0.2 => (8, 1e-4, 150, 10),
        r if r < 0.3 => (8, 5e-5, 250, 20),
        r if r < 0.4 => (16, 5e-5, 400, 30),
        _ => (16, 2e-5, 500, 40),
    };
    let batch_size = if rate < 0.4 { 4 } else { 2 };
    (rank, Defaults { learning_rate, batch_size, steps, warmup_steps, seq_len: 512 })
}
