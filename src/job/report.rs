//! What came out: the results of the stages and the failures that travel.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::budget::BudgetReport;
use super::heal::HealSettings;
use super::progress::Stage;
pub use super::scores::{
    Comparison, Decision, Estimate, EvalReport, ExactMatch, Exported, Flaw, Generation, Likeness, Overlap,
    Perplexity, PerplexityChange, Scores, Speed, TaskChange, TaskScore, Verdict, WrittenText,
};
use super::spec::{GgufType, JobSpec, Strategy, TokenPosition, Zones};

/// Files that a run leaves in its workspace for people to look at, beside directories of weights and plots.
pub const FILES: [&str; 7] = [
    "profile.json",
    "selection.json",
    "eval.json",
    "report.json",
    "report.html",
    "provenance.json",
    "SHA256SUMS",
];

/// A run of layers `start..start + len`, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Block {
    pub start: u32,
    pub len: u32,
}

impl Block {
    #[must_use]
    pub const fn layers(self) -> Range<u32> {
        self.start..self.start + self.len
    }

    /// The blocks that `layers`, ascending, are.
    #[must_use]
    pub fn runs(layers: &[u32]) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for layer in layers {
            match runs.last_mut() {
                Some(run) if run.start + run.len == *layer => run.len += 1,
                Some(_) | None => runs.push(Self { start: *layer, len: 1 }),
            }
        }
        runs
    }
}

/// How far every block of layers turns the residual stream (`profile.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LayerProfile {
    pub layer_count: u32,
    /// Windows measured.
    pub samples: u32,
    /// Tokens read, all windows together.
    pub tokens: u64,
    pub position: TokenPosition,
    /// `"pi"`: arccos(cos)/π; `"cosine"`: 1 − cos.
    pub unit: String,
    /// `by_len[n-1][l]`: mean distance between the stream entering layer `l`
    /// and the one entering layer `l + n` (`l + n = layer_count`: leaving the
    /// last layer, before the final norm). Row `n-1` has `layer_count - n + 1` entries.
    pub by_len: Vec<Vec<f64>>,
    /// Standard error of each cell of `by_len`, over samples.
    pub stderr: Vec<Vec<f64>>,
    /// Block influence `1 - E[cos]` of each layer.
    pub influence: Vec<f64>,
    /// `E[|h_{l+1} - h_l| / |h_l|]` of each layer.
    pub relative_magnitude: Vec<f64>,
    /// Mean norm of the stream entering each layer, and of the one leaving the last.
    pub norm: Vec<f64>,
    /// The larger z-score of `influence` and `relative_magnitude`, of each layer.
    #[serde(default)]
    pub cross_axis: Vec<f64>,
    /// Standard errors over samples, each of the shape of what it is named after.
    #[serde(default)]
    pub influence_stderr: Vec<f64>,
    #[serde(default)]
    pub relative_magnitude_stderr: Vec<f64>,
    #[serde(default)]
    pub cross_axis_stderr: Vec<f64>,
    #[serde(default)]
    pub norm_stderr: Vec<f64>,
    /// How much each layer adds to the stream, attention and MLP apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contribution: Vec<Contribution>,
    /// What leaving out each single layer does; empty unless asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ablation: Vec<Ablation>,
    /// What the head reads from the stream entering each layer, and from the one leaving the last; empty unless
    /// asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_lens: Vec<LensReading>,
    /// `confidence[n-1]`: how sure it is that the nearest block of `n` layers is the nearest, from the standard
    /// error of its difference to the runner-up; in `[0.5, 1]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub confidence: Vec<f64>,
    /// Windows that were asked for.
    #[serde(default)]
    pub samples_asked: u32,
    /// Sampling ended before all windows were read, because the nearest block was sure enough.
    #[serde(default)]
    pub stopped_early: bool,
}

impl LayerProfile {
    /// Mean distance across `block`.
    ///
    /// # Panics
    /// When the block is empty or leaves the model.
    #[must_use]
    pub fn distance(&self, block: Block) -> f64 {
        self.by_len[block.len as usize - 1][block.start as usize]
    }
}

/// `max(z(a), z(b))` of each layer: low where both are low (arXiv 2609.02083). A value that is the same for all
/// layers tells nothing and counts as 0.
#[must_use]
pub fn cross_axis(a: &[f64], b: &[f64]) -> Vec<f64> {
    let z = |values: &[f64]| -> Vec<f64> {
        let (mean, spread) = mean_and_spread(values);
        values.iter().map(|v| if spread > 0.0 { (v - mean) / spread } else { 0.0 }).collect()
    };
    z(a).into_iter().zip(z(b)).map(|(a, b)| a.max(b)).collect()
}

/// Mean and standard deviation over layers.
#[must_use]
pub fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count).sqrt())
}

/// Mean norm of what the halves of a layer add to the stream, relative to the stream they add it to
/// (the review, section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Contribution {
    pub attention: f64,
    pub mlp: f64,
    pub attention_stderr: f64,
    pub mlp_stderr: f64,
}

/// What leaving out one layer does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ablation {
    /// In nats per token, above the intact model.
    pub damage: f64,
    /// Standard error of `damage` over windows, each compared with the intact model on the same one; 0 where it is not
    /// known.
    #[serde(default)]
    pub stderr: f64,
    pub zone: Zone,
}

/// How much a layer is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Zone {
    Needed,
    Mixed,
    Redundant,
}

impl Zone {
    #[must_use]
    pub fn of(damage: f64, bounds: &Zones) -> Self {
        if damage >= bounds.needed {
            Self::Needed
        } else if damage > bounds.redundant {
            Self::Mixed
        } else {
            Self::Redundant
        }
    }
}

/// What the head reads from the stream at one seam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LensReading {
    /// Negative log-likelihood per token, in nats.
    pub loss: f64,
    /// Share of tokens where the likeliest next token is the whole model's.
    pub agreement: f64,
}

/// A block that could have been dropped, and its score (less is better).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Candidate {
    pub start: u32,
    pub score: f64,
}

/// The layers to drop (`selection.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LayerSelection {
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    pub strategy: Strategy,
    /// Score of what is dropped, in the strategy's own unit; 0 where it has none.
    pub score: f64,
    /// All places where the block, or the single layer, could have been.
    pub candidates: Vec<Candidate>,
    /// `auto`: every cut it weighed, the chosen one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub considered: Vec<Considered>,
    /// What each strategy that ran would drop, the one that decided first; empty where nothing was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compared: Vec<Compared>,
    /// Damage on text was measured with what a cut takes from the size of the stream made up for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mended: bool,
    /// What went in each round, in the base model's numbers, where there were several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<Vec<u32>>,
}

/// What measuring cost: sets of layers left out, and tokens sent through the model for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cost {
    pub evaluations: u64,
    pub tokens: u64,
}

/// A cut that `auto` weighed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Considered {
    /// The strategies whose cut it is.
    pub strategies: Vec<Strategy>,
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    /// In nats per token; absent where the budget had ended.
    pub damage: Option<f64>,
    /// Standard error of `damage` over windows; 0 where it is not known.
    #[serde(default)]
    pub stderr: f64,
    pub cost: Cost,
    /// Why it was taken or not, for a person.
    pub why: String,
}

/// What one strategy would drop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Compared {
    pub strategy: Strategy,
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    /// Of `dropped`, in nats per token; absent where damage was not measured.
    pub damage: Option<f64>,
    /// Standard error of `damage` over windows; 0 where it is not known.
    #[serde(default)]
    pub stderr: f64,
    /// The strategy's cuts of fewer layers and their damage, ascending by layers; the last one is `dropped`. Whole
    /// where strategies are compared, else what the search came by.
    pub path: Vec<Step>,
    /// What the strategy measured to choose; the same whatever it is compared with.
    pub cost: Cost,
    /// The search ended with its budget: this is the best so far.
    pub budget_exhausted: bool,
}

/// A cut on the way to the one that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// Ascending, from 0.
    pub dropped: Vec<u32>,
    /// In nats per token.
    pub damage: f64,
    /// Standard error of `damage` over windows; 0 where it is not known.
    #[serde(default)]
    pub stderr: f64,
}

/// A checkpoint a stage wrote, named so that a later stage can trust it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointRef {
    /// Directory, relative to the workspace.
    pub path: String,
    /// BLAKE3 over config, tokenizer and every tensor by its name.
    pub digest: String,
    pub layer_count: u32,
    /// Bytes of the weight files.
    pub size_bytes: u64,
    pub parameters: u64,
}

/// A GGUF file of the checkpoint to ship.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GgufFile {
    #[serde(rename = "type")]
    pub kind: GgufType,
    /// Relative to the workspace.
    pub path: String,
    pub size_bytes: u64,
    /// Of all tensors, for each parameter; some tensors keep more bits than the type's.
    pub bits_per_weight: f64,
}

/// Loss at one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LossPoint {
    pub step: u32,
    /// Mean negative log-likelihood per token of the step's windows, in nats.
    pub loss: f64,
    pub learning_rate: f64,
}

/// What one method of healing did (part of `report.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HealReport {
    pub method: String,
    pub settings: HealSettings,
    /// Trained parameters; 0 where nothing is trained.
    pub trainable_parameters: u64,
    /// Tokens it worked on.
    pub tokens: u64,
    /// Empty where nothing is trained.
    pub curve: Vec<LossPoint>,
    /// What was done at each cut, where that is what the method does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<Repaired>,
    /// The optimizer step at which the loss was no number, if there was one: training ended, and what was kept is from
    /// before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diverged_at: Option<u32>,
    /// Held-out loss per token of the checkpoint it began with, in nats.
    pub held_out_before: f64,
    /// Held-out loss per token of the healed checkpoint, measured on the written files.
    pub held_out_after: f64,
    /// The held-out loss did not get less, and what was healed was thrown away.
    pub reverted: bool,
    /// It was compared with other methods, and another one lowered the loss more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passed_over: bool,
    /// The healed checkpoint; absent when reverted or passed over.
    pub checkpoint: Option<CheckpointRef>,
}

/// What was done at one cut without training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Repaired {
    /// The block that went, counted in the base model.
    pub block: Block,
    /// What the residual stream behind the cut is multiplied by, in effect; 1 where it is not.
    pub factor: f64,
    /// Mean square of what the stream behind the cut lacks of the base model's, relative to the mean square of the
    /// latter.
    pub error_before: f64,
    pub error_after: f64,
}

/// How long a stage took and whether an earlier record served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageSummary {
    pub stage: Stage,
    pub reused: bool,
    pub duration_ms: u64,
}

/// The whole result (`report.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    pub secateur_version: String,
    pub spec: JobSpec,
    /// How the number of layers was found, where a budget asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetReport>,
    /// Base model: BLAKE3 over config, tokenizer and every tensor by its name.
    pub model_digest: String,
    pub profile: LayerProfile,
    pub selection: LayerSelection,
    pub pruned: CheckpointRef,
    pub heal: Vec<HealReport>,
    pub eval: EvalReport,
    /// Absent in reports of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Sentences a person should read before using the result.
    pub remarks: Vec<String>,
    /// sha256 of every file of the shipped checkpoints, by path in the workspace.
    pub files: BTreeMap<String, String>,
}

/// Why a job failed; the only error that travels between processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: FailureKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// What is wrong, where, and what to do, for a person.
    pub message: String,
}

/// Classes of failure, by who can do something about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The spec cannot be met.
    Spec,
    /// The model's files are missing, damaged or not supported.
    Model,
    /// A corpus or item file is missing, damaged or too short.
    Data,
    OutOfMemory,
    /// The device failed.
    Device,
    /// Disk or object store failed or is full.
    Storage,
    /// The result does not pass the gates, and the spec wants the job to fail then (`eval.on_reject`).
    Rejected,
    /// The process that ran the attempt died without a word.
    Crash,
    /// Too many attempts ended without a result.
    AttemptsSpent,
    /// It waited longer for a worker than `deadlines.max_queue_s` allows.
    QueueDeadline,
    /// It ran longer than `deadlines.max_run_s` allows.
    RunDeadline,
    /// Our own fault.
    Bug,
}

impl FailureKind {
    /// Whether another attempt may end differently. Exhaustive on purpose: a
    /// new kind must say.
    #[must_use]
    pub const fn retryable(self) -> bool {
        match self {
            Self::Device | Self::Storage | Self::Crash => true,
            Self::Spec
            | Self::Model
            | Self::Data
            | Self::OutOfMemory
            | Self::Rejected
            | Self::AttemptsSpent
            | Self::QueueDeadline
            | Self::RunDeadline
            | Self::Bug => false,
        }
    }
}
