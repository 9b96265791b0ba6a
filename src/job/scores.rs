//! What the evaluation came to: scores of each checkpoint, what they are beside the base model's, and the verdict.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::report::GgufFile;

/// Perplexity of one checkpoint on one corpus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Perplexity {
    pub corpus: String,
    /// `exp(nll_per_token)`.
    pub value: f64,
    /// Mean negative log-likelihood per scored token, in nats.
    pub nll_per_token: f64,
    /// The paper's normalised loss: `nll_per_token / ln(vocab_size)`.
    pub nll_over_ln_vocab: f64,
    /// `exp(total nll / words of the scored text)`.
    pub word_perplexity: f64,
    /// Scored tokens.
    pub tokens: u64,
    /// Standard error of `value`, from how windows differ; 0 where there is only one.
    #[serde(default)]
    pub stderr: f64,
}

/// Accuracy of one checkpoint on one task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TaskScore {
    pub task: String,
    /// Share of right answers; of those that are written, by `exact_match.strict`.
    pub acc: f64,
    /// Accuracy by log-likelihood per character; absent where choices have no length of their own.
    pub acc_norm: Option<f64>,
    /// Standard error of `acc`.
    pub stderr: f64,
    pub n: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// Of answers that the model writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<ExactMatch>,
    /// `exp` of the mean negative log-likelihood of a continuation, where the items are such (LAMBADA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Accuracy that guessing gives.
    #[serde(default)]
    pub chance: f64,
    /// Items that stand in the file once more; they count each time.
    #[serde(default)]
    pub duplicates: u64,
    /// Items whose context is longer than the model can take: cut from the left.
    #[serde(default)]
    pub truncated: u64,
}

/// Share of written answers that are right, as `exact_match` of the task `gsm8k` of lm-evaluation-harness.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExactMatch {
    /// The number behind the first "####" is the answer.
    pub strict: f64,
    /// The last number is the answer.
    pub flexible: f64,
    pub flexible_stderr: f64,
}

/// How fast one checkpoint runs on this device, one text at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Speed {
    /// Median over rounds.
    pub prefill_tokens_per_s: f64,
    /// Median over rounds.
    pub decode_tokens_per_s: f64,
    /// Time per decoded token, the median of all.
    pub latency_ms: f64,
    /// That of the slowest twentieth, at least.
    #[serde(default)]
    pub latency_p95_ms: f64,
    /// Time to read the prompt and give the first token, median and 95th percentile of rounds.
    #[serde(default)]
    pub first_token_ms: f64,
    #[serde(default)]
    pub first_token_p95_ms: f64,
    #[serde(default)]
    pub prompt_tokens: u32,
    /// In each round.
    #[serde(default)]
    pub decoded_tokens: u32,
    /// Rounds, in each of which all checkpoints had a turn.
    #[serde(default)]
    pub rounds: u32,
}

/// All that was measured of one checkpoint, on its written files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Scores {
    pub layer_count: u32,
    pub parameters: u64,
    /// Bytes of the weight files.
    pub size_bytes: u64,
    /// Parameters of embedding and head: what cutting layers cannot shrink.
    pub embedding_parameters: u64,
    pub perplexity: Vec<Perplexity>,
    pub tasks: Vec<TaskScore>,
    pub speed: Option<Speed>,
    /// Peak resident memory of the process while this checkpoint was measured.
    pub peak_memory_bytes: u64,
    /// Floating-point operations of the products with weights for one token; attention adds four for each head
    /// dimension, layer and token before it.
    #[serde(default)]
    pub flops_per_token: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
}

/// `eval.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EvalReport {
    pub base: Scores,
    pub pruned: Scores,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed: Option<Scores>,
    /// The pruned and the healed checkpoint, each beside the base model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compared: Vec<Comparison>,
    /// The GGUF files of the checkpoint to ship.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gguf: Vec<Exported>,
    /// What healing texts have in common with what was measured on; only where there is something.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overlap: Vec<Overlap>,
}

/// A GGUF file, and what its weights come to: taken from the very file, and computed with by our own decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Exported {
    #[serde(flatten)]
    pub file: GgufFile,
    pub sha256: String,
    /// How many times smaller than the base model's weight files it is.
    pub compression: f64,
    pub perplexity: Vec<Perplexity>,
    pub tasks: Vec<TaskScore>,
}

/// How much of what judges a checkpoint it may have learned by heart while it was healed: 13 words in a row count, in
/// any case and punctuation (Brown et al., arXiv 2005.14165, appendix C).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Overlap {
    /// The task or text that is measured on.
    pub measured: String,
    /// The healing text.
    pub healed_on: String,
    /// Of a task items, of a text runs of 13 words.
    pub common: u64,
    pub total: u64,
}

/// What was measured, and where it lies with the confidence asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// A cut checkpoint beside the base model, on the same items, windows and prompts. Intervals come from a paired
/// bootstrap over those, those of speed from the rounds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Comparison {
    /// `pruned` or `healed`.
    pub checkpoint: String,
    pub perplexity: Vec<PerplexityChange>,
    pub tasks: Vec<TaskChange>,
    /// Of all tasks together: the sum of accuracies above chance over the base model's. Absent where the base model
    /// does no better than chance.
    pub retention: Option<Estimate>,
    /// Broken texts more than of the base model, as a share of those that are sound with it; absent where most of the
    /// base model's are broken.
    pub broken: Option<Estimate>,
    /// Tokens per second over the base model's: median, least and most of the rounds.
    pub prefill_speedup: Option<Estimate>,
    pub decode_speedup: Option<Estimate>,
}

/// Perplexity of a cut checkpoint over the base model's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PerplexityChange {
    pub corpus: String,
    pub ratio: Estimate,
}

/// Accuracy of a cut checkpoint beside the base model's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TaskChange {
    pub task: String,
    /// `acc` of the cut checkpoint less that of the base model.
    pub difference: Estimate,
    /// Share of resamples in which the cut checkpoint does worse.
    pub worse: f64,
    /// Accuracy above chance over the base model's; absent where the latter is not sure.
    pub retention: Option<Estimate>,
}

/// What a checkpoint wrote after the prompts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Generation {
    /// Mean of the texts'.
    pub repetition: f64,
    /// Mean of the texts', in nats per token.
    pub surprise: f64,
    /// Share of texts that are broken.
    pub broken: f64,
    /// To what the base model wrote; absent for the base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likeness: Option<Likeness>,
    /// Greedy ones first, in the order of the prompts.
    pub texts: Vec<WrittenText>,
}

/// How like the base model's texts are. All but `similarity` compare the greedy ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Likeness {
    /// Of the corpus, as sacrebleu defines it (13a, exponential smoothing), 0 to 100.
    pub bleu: f64,
    /// chrF2 of the corpus, as sacrebleu defines it, 0 to 100.
    pub chrf: f64,
    /// Mean F-measure of the longest common subsequence of words, as rouge-score defines it, 0 to 1.
    pub rouge_l: f64,
    /// Mean cosine of the base model's mean streams over both texts, leaving its last layer.
    pub similarity: f64,
}

/// What a checkpoint wrote after one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WrittenText {
    pub prompt: String,
    pub text: String,
    /// Else the likeliest token was taken each time.
    pub sampled: bool,
    pub tokens: u32,
    /// Share of its runs of four tokens that stand in it before.
    pub repetition: f64,
    /// Negative log-likelihood per token under the base model, in nats.
    pub surprise: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flaw: Option<Flaw>,
}

/// The known signs of a model that can no longer write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// It stops at once.
    Empty,
    /// More than half of its runs of four tokens stand in it before; nine tenths where it was not sampled.
    Repetitive,
    /// Three tenths of its letters are of a script that neither prompts nor base texts have.
    Drifted,
    /// Its surprise is past a quarter of the way from the base texts' to that of tokens drawn blindly.
    Unlikely,
}

/// Whether the result can be shipped, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Verdict {
    pub decision: Decision,
    /// `pruned` or `healed`.
    pub checkpoint: String,
    /// A sentence for each gate that is not passed; for each gate where all are.
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// All gates are passed.
    Ship,
    /// None is failed, but not all are passed.
    Review,
    /// A gate is failed.
    Reject,
}

impl Decision {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ship => "ship",
            Self::Review => "review",
            Self::Reject => "reject",
        }
    }
}
