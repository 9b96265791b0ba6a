//! Healing values that the spec leaves open: the paper's, by model, and the
//! review's, by pruning rate.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::heal::DistillSpec;
use super::spec::{BaseBits, Preset, QloraSpec, Schedule};

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
    /// What the MLP gives joins the stream as it is, without a norm of its own.
    pub plain_mlp: bool,
}

/// QLoRA with nothing left open: what a heal stage really runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct QloraSettings {
    pub rank: u32,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Vec<String>,
    pub bits: BaseBits,
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup_steps: u32,
    pub steps: u32,
    pub batch_size: u32,
    pub seq_len: u32,
    pub weight_decay: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
    pub checkpoint_every: u32,
}

impl QloraSpec {
    /// What the spec says, and the preset's word where it says nothing.
    /// `dropped` of the base model's layers have been cut.
    #[must_use]
    pub fn settings(&self, preset: Preset, facts: &ModelFacts, dropped: u32) -> QloraSettings {
        let d = match preset {
            Preset::Paper => paper(facts),
            Preset::Seed => seed(f64::from(dropped) / f64::from(facts.layer_count)),
        };
        let rank = self.rank.unwrap_or(d.rank);
        let steps = self.steps.unwrap_or(d.steps);
        QloraSettings {
            rank,
            // The paper sets alpha = rank (appendix A.1); so does the review by silence.
            alpha: self.alpha.unwrap_or(f64::from(rank)),
            dropout: self.dropout.unwrap_or(0.05),
            targets: self.targets.clone().unwrap_or_else(|| targets(facts)),
            bits: self.bits,
            learning_rate: self.learning_rate.unwrap_or(d.learning_rate),
            schedule: self.schedule,
            // A short run must not spend itself on warming up.
            warmup_steps: self.warmup_steps.unwrap_or_else(|| d.warmup_steps.min(steps / 5)),
            steps,
            batch_size: self.batch_size.unwrap_or(d.batch_size),
            seq_len: self.seq_len.unwrap_or(d.seq_len).min(facts.max_position_embeddings),
            weight_decay: self.weight_decay.unwrap_or(0.0),
            distill: self.distill.clone(),
            checkpoint_every: self.checkpoint_every.unwrap_or(50),
        }
    }
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

struct Defaults {
    rank: u32,
    learning_rate: f64,
    batch_size: u32,
    steps: u32,
    warmup_steps: u32,
    seq_len: u32,
}

/// arXiv 2403.17887, appendix A: batch 16, 5000 steps, warm-up 100, cosine;
/// rank 64 and 3e-4 unless a sweep said otherwise.
fn paper(facts: &ModelFacts) -> Defaults {
    let (rank, learning_rate, seq_len) =
        match (facts.model_type.as_str(), facts.hidden_size, facts.layer_count, facts.vocab_size) {
            ("llama", 4096, 32, 32_000) => (2, 3e-4, 2048),
            ("llama", 5120, 40, 32_000) => (64, 3e-4, 4096),
            ("llama", 8192, 80, 32_000) => (8, 3e-5, 4096),
            ("mistral", 4096, 32, 32_000) => (4, 3e-6, 2048),
            ("phi", 2560, 32, 51_200) => (64, 2e-4, 2048),
            _ => (64, 3e-4, 2048),
        };
    Defaults { rank, learning_rate, batch_size: 16, steps: 5000, warmup_steps: 100, seq_len }
}

/// The review's table 13.2, by the share of layers cut; where it gives a range
/// (steps, batch size), the larger value. It names no window length: 512.
fn seed(rate: f64) -> Defaults {
    let (rank, learning_rate, steps, warmup_steps) = match rate {
        r if r < 0.2 => (8, 1e-4, 150, 10),
        r if r < 0.3 => (8, 5e-5, 250, 20),
        r if r < 0.4 => (16, 5e-5, 400, 30),
        _ => (16, 2e-5, 500, 40),
    };
    let batch_size = if rate < 0.4 { 4 } else { 2 };
    Defaults { rank, learning_rate, batch_size, steps, warmup_steps, seq_len: 512 }
}
