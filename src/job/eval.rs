//! What is asked of the evaluation: what to measure on, and what must be left of the base model.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::benchmark::Benchmark;
use super::spec::Corpus;

/// What base, pruned and healed checkpoint are measured on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSpec {
    /// Texts for perplexity; by default held-out text the base model writes itself.
    pub perplexity: Vec<Corpus>,
    pub tasks: Vec<TaskSpec>,
    /// Measure prefill and decode speed.
    pub speed: bool,
    /// Tokens per perplexity window (at most what the model can take).
    pub seq_len: u32,
    /// Tokens from one perplexity window to the next: with less than `seq_len` every token but the first of a text
    /// is scored once, with at least `seq_len - stride` tokens before it, the first window apart. Windows stand side
    /// by side when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<u32>,
    /// What to do when healing texts hold 13 words in a row of what is measured on.
    pub overlap: OverlapPolicy,
    /// Have all checkpoints go on from the same prompts; `null` leaves it out, and with it the guard against models
    /// that can no longer write.
    pub generation: Option<GenerationSpec>,
    /// What the result must keep to be shipped.
    pub gates: Gates,
    /// What becomes of the job when the verdict is `reject`.
    pub on_reject: OnReject,
}

/// What becomes of a job that would be judged by what it was healed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverlapPolicy {
    /// The report says how much overlaps.
    #[default]
    Warn,
    /// The job ends before anything is computed.
    Refuse,
}

impl Default for EvalSpec {
    fn default() -> Self {
        Self {
            perplexity: vec![Corpus::default()],
            tasks: Vec::new(),
            speed: true,
            seq_len: 1024,
            stride: None,
            overlap: OverlapPolicy::default(),
            generation: Some(GenerationSpec::default()),
            gates: Gates::default(),
            on_reject: OnReject::default(),
        }
    }
}

/// What the checkpoints write, to be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationSpec {
    /// Text whose windows are gone on from; by default the texts of `perplexity`, else the items of `tasks`, else
    /// text the base model writes itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Corpus>,
    /// Prompts; each is gone on from twice, greedily and sampled.
    pub samples: u32,
    /// Tokens of a prompt, at most.
    pub prompt_tokens: u32,
    /// Tokens to write, at most.
    pub tokens: u32,
    /// Of the sampled texts; 1 is the model as it is.
    pub temperature: f64,
}

impl Default for GenerationSpec {
    fn default() -> Self {
        Self { prompts: None, samples: 32, prompt_tokens: 32, tokens: 64, temperature: 0.8 }
    }
}

/// What the result must keep. A gate is passed or failed where that is sure with `confidence`, and open in between: one
/// that is failed rejects the result, one that is open asks for a review. `null` takes a gate away.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gates {
    /// Accuracy above chance, all tasks together, relative to the base model's.
    pub min_retention: Option<f64>,
    /// Perplexity relative to the base model's, on every text.
    pub max_perplexity_ratio: Option<f64>,
    /// Tokens per second while decoding, relative to the base model's.
    pub min_speedup: Option<f64>,
    /// Per decoded token, on the device of the job.
    pub max_latency_ms: Option<f64>,
    /// Of the weight files.
    pub max_size_bytes: Option<u64>,
    /// Peak memory while the checkpoint is measured, on the device of the job.
    pub max_memory_bytes: Option<u64>,
    /// Of the texts that the base model writes well (see `generation`), the share that the result does not.
    pub max_broken: Option<f64>,
    /// Of intervals, e.g. 0.95.
    pub confidence: f64,
}

impl Default for Gates {
    /// What a person would look at again rather than throw away stays open.
    fn default() -> Self {
        Self {
            min_retention: Some(0.8),
            max_perplexity_ratio: Some(2.0),
            min_speedup: None,
            max_latency_ms: None,
            max_size_bytes: None,
            max_memory_bytes: None,
            max_broken: Some(0.2),
            confidence: 0.95,
        }
    }
}

/// What becomes of a job whose result is rejected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnReject {
    /// It succeeds, and the report says so.
    #[default]
    Report,
    /// It fails once the report is written.
    Fail,
}

/// One task: evaluation items under a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// The name the score appears under.
    pub task: String,
    /// JSONL of evaluation items, or rows of a benchmark as they are published, JSONL or parquet. When absent those
    /// that the Hub has of the benchmark.
    #[serde(default)]
    pub items: Corpus,
    /// Whose form rows have that are not items; the benchmark called like the task when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Benchmark>,
    /// Solved questions that are shown before each: the first of `shots_from`, of the same subject.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shots: u32,
    /// Where they come from, in the form of `items`; of the Hub's where items are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots_from: Option<Corpus>,
    /// Use only this many items from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Accuracy above chance that must be left of the base model's, as `gates.min_retention`, on this task alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_retention: Option<f64>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(count: &u32) -> bool {
    *count == 0
}
