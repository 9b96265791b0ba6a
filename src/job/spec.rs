//! What is asked: the job spec, its defaults and the rules it must keep.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::complaint::Complaint;

/// One pruning job, as a person writes it. Everything but `model` and
/// `prune.amount` has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// A name for people; it need not be unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Free key/value pairs to find the job by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Fills in the healing values that are not given.
    #[serde(default)]
    pub preset: Preset,
    pub model: ModelSource,
    #[serde(default)]
    pub calibration: CalibrationSpec,
    pub prune: PruneSpec,
    /// Healing methods in the order they run; `[]` heals nothing.
    #[serde(default = "default_heal")]
    pub heal: Vec<HealMethod>,
    #[serde(default)]
    pub eval: EvalSpec,
    #[serde(default)]
    pub export: ExportSpec,
    /// Seeds everything that is drawn at random: same seed, same bytes.
    #[serde(default)]
    pub seed: u64,
}

/// Where unset healing values come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Gromov et al., arXiv 2403.17887, appendix A: per-model values.
    #[default]
    Paper,
    /// The technical review's table 13.2: values by pruning rate.
    Seed,
}

/// Where the base model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSource {
    /// A repository on the Hugging Face Hub, pinned to a commit at admission.
    Hub {
        repo: String,
        #[serde(default = "main_revision")]
        revision: String,
    },
    /// A Hugging Face directory on this machine.
    Path { path: String },
    /// A prefix in an S3 bucket.
    S3 { uri: String },
    /// The checkpoint another job left.
    Job { job_id: Uuid },
}

/// Where text or evaluation items come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum Corpus {
    /// A `.txt`, `.jsonl` or `.parquet` file, plain or gzip/zstd-compressed.
    Path { path: String },
    /// A file of a data set repository on the Hugging Face Hub.
    Hub {
        repo: String,
        file: String,
        #[serde(default = "main_revision")]
        revision: String,
    },
    /// A file uploaded to this service before.
    Upload { upload_id: Uuid },
    /// The text itself.
    Text { text: String },
    /// Text the base model writes itself, sampled with the job's seed: no data needed.
    Model {
        /// How many tokens to write; what the stage needs when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tokens: Option<u64>,
    },
}

impl Default for Corpus {
    fn default() -> Self {
        Self::Model { tokens: None }
    }
}

/// How the distances between layers are measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationSpec {
    pub corpus: Corpus,
    /// Windows to measure on.
    pub samples: u32,
    /// Tokens per window.
    pub seq_len: u32,
    pub position: TokenPosition,
    pub distance: Distance,
    /// Windows per forward pass. The result does not depend on it.
    pub batch_size: u32,
}

impl Default for CalibrationSpec {
    fn default() -> Self {
        Self {
            corpus: Corpus::default(),
            samples: 128,
            seq_len: 512,
            position: TokenPosition::Last,
            distance: Distance::Angular,
            batch_size: 8,
        }
    }
}

/// Which tokens of a window count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenPosition {
    /// The last token only (the paper, eq. 7).
    Last,
    /// The mean over all tokens of the window (the review, section 4.1).
    Mean,
}

/// How far apart two streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// arccos(cos)/π, in `[0, 1]` (the paper, eq. 7).
    Angular,
    /// 1 − cos, in `[0, 2]`.
    Cosine,
}

/// How much to cut and by which rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneSpec {
    /// Required, except with `"strategy": "explicit"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<PruneAmount>,
    #[serde(default)]
    pub strategy: Strategy,
    /// The layers to drop (from 0), with `"strategy": "explicit"` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<u32>>,
    /// Never drop this many layers at the start. `explicit` is not bound by it.
    #[serde(default)]
    pub keep_first: u32,
    /// Never drop this many layers at the end. `explicit` is not bound by it.
    #[serde(default = "one")]
    pub keep_last: u32,
}

/// How many layers to drop.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PruneAmount {
    Layers(u32),
    /// A share of all layers, rounded down, at least one layer.
    Fraction(f64),
}

impl PruneAmount {
    /// The number of layers to drop of `layer_count`.
    #[must_use]
    pub fn layers(self, layer_count: u32) -> u32 {
        match self {
            Self::Layers(n) => n,
            // The small term keeps 0.3 of 10 at three layers: 0.3 * 10 is 2.999… in binary.
            Self::Fraction(f) => ((f * f64::from(layer_count) + 1e-9).floor() as u32).max(1),
        }
    }
}

/// Which layers go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The block whose end stream is nearest to its start stream (the paper, eq. 7).
    #[default]
    BlockEndpoint,
    /// The block with the least sum of adjacent distances (the review, section 4.2).
    BlockSum,
    /// The single layers of least block influence (`ShortGPT`, arXiv 2403.03853).
    BlockInfluence,
    /// The single layers that add least to the stream, relative to its norm.
    RelativeMagnitude,
    /// The deepest block that `keep_last` allows (the paper, section 4.4).
    Deepest,
    /// The layers named in `layers`.
    Explicit,
}

/// One way to close the wound.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum HealMethod {
    /// Low-rank adapters over a frozen quantised base, merged into the original weights.
    Qlora(QloraSpec),
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
    /// Bits per weight of the frozen base: 4, 8 or 16.
    #[serde(default)]
    #[schema(value_type = u8, example = 4)]
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
    /// Steps between resume points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u32>,
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

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    #[default]
    Cosine,
    Linear,
    Constant,
}

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
}

impl Default for EvalSpec {
    fn default() -> Self {
        Self { perplexity: vec![Corpus::default()], tasks: Vec::new(), speed: true, seq_len: 1024 }
    }
}

/// One task: evaluation items under a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// The name the score appears under.
    pub task: String,
    /// JSONL of evaluation items.
    pub items: Corpus,
    /// Use only this many items from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// How the result leaves the house.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSpec {
    /// Data type of the written weights; the base model's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<WeightType>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gguf: Vec<String>,
}

/// Floating-point types a checkpoint can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightType {
    Bf16,
    F16,
    F32,
}

fn main_revision() -> String {
    "main".into()
}

const fn one() -> u32 {
    1
}

fn default_heal() -> Vec<HealMethod> {
    vec![HealMethod::Qlora(QloraSpec::default())]
}

/// Longest window and largest counts accepted: beyond any model in the field,
/// small enough that no product of them overflows.
const MAX_SEQ_LEN: u32 = 1 << 20;
const MAX_COUNT: u32 = 1 << 24;
const MAX_TEXT_BYTES: usize = 8 << 20;

impl JobSpec {
    /// All that is wrong with the spec and can be known without the model.
    #[must_use]
    pub fn validate(&self) -> Vec<Complaint> {
        let mut out = Complaints::default();
        self.check_names(&mut out);
        self.check_model(&mut out);
        let c = &self.calibration;
        check_corpus(&c.corpus, "/calibration/corpus", &mut out);
        out.range("/calibration/samples", c.samples, 1, MAX_COUNT);
        out.range("/calibration/seq_len", c.seq_len, 2, MAX_SEQ_LEN);
        out.range("/calibration/batch_size", c.batch_size, 1, 4096);
        self.check_prune(&mut out);
        for (i, HealMethod::Qlora(q)) in self.heal.iter().enumerate() {
            check_qlora(q, &format!("/heal/{i}"), &mut out);
        }
        self.check_eval(&mut out);
        if !self.export.gguf.is_empty() {
            out.add("/export/gguf", "GGUF export is not available in this version; leave it out");
        }
        out.0
    }

    /// All that is wrong with the spec for a model of `layer_count` layers.
    #[must_use]
    pub fn validate_for(&self, layer_count: u32) -> Vec<Complaint> {
        let mut out = Complaints::default();
        let p = &self.prune;
        if let (Strategy::Explicit, Some(layers)) = (p.strategy, &p.layers) {
            for (i, l) in layers.iter().enumerate().filter(|(_, l)| **l >= layer_count) {
                out.add(
                    &format!("/prune/layers/{i}"),
                    format!("layer {l} does not exist: the model has layers 0 to {}", layer_count - 1),
                );
            }
            if layers.len() >= layer_count as usize {
                out.add(
                    "/prune/layers",
                    format!("at least one of the model's {layer_count} layers must stay"),
                );
            }
        } else if let Some(amount) = p.amount {
            let n = amount.layers(layer_count);
            let free = layer_count.saturating_sub(p.keep_first).saturating_sub(p.keep_last);
            let most = free.min(layer_count.saturating_sub(1));
            if n > most {
                let (first, last) = (p.keep_first, p.keep_last);
                out.add(
                    "/prune/amount",
                    format!(
                        "asks for {n} layers, but of the model's {layer_count} at most {most} may go \
                         (keep_first {first}, keep_last {last})"
                    ),
                );
            }
        }
        out.0
    }

    fn check_names(&self, out: &mut Complaints) {
        if self.name.as_ref().is_some_and(|n| n.is_empty() || n.chars().count() > 200) {
            out.add("/name", "must have 1 to 200 characters");
        }
        if self.labels.len() > 64 {
            out.add("/labels", "at most 64 labels");
        }
        for (key, value) in &self.labels {
            if key.is_empty() || key.len() > 64 || value.len() > 256 {
                let key = key.replace('~', "~0").replace('/', "~1");
                out.add(&format!("/labels/{key}"), "a key has 1 to 64 bytes, a value at most 256");
            }
        }
    }

    fn check_model(&self, out: &mut Complaints) {
        match &self.model {
            ModelSource::Hub { repo, revision } => check_repo(repo, revision, "/model", out),
            ModelSource::Path { path } => check_path(path, "/model/path", out),
            ModelSource::S3 { .. } => out.add(
                "/model/from",
                "models from S3 are not available in this version; use \"hub\", \"path\" or \"job\"",
            ),
            ModelSource::Job { .. } => {}
        }
    }

    fn check_prune(&self, out: &mut Complaints) {
        let p = &self.prune;
        match (p.strategy, &p.layers, p.amount) {
            (Strategy::Explicit, None, _) => {
                out.add("/prune/layers", "name the layers to drop, e.g. [20, 21, 22]");
            }
            (Strategy::Explicit, Some(layers), amount) => {
                let mut unique = layers.clone();
                unique.sort_unstable();
                unique.dedup();
                if layers.is_empty() {
                    out.add("/prune/layers", "name at least one layer");
                } else if unique.len() != layers.len() {
                    out.add("/prune/layers", "names a layer twice");
                }
                if amount.is_some() {
                    out.add("/prune/amount", "leave it out: with \"explicit\", `layers` says how many");
                }
            }
            (_, Some(_), _) => out.add("/prune/layers", "only with \"strategy\": \"explicit\""),
            (_, None, None) => {
                out.add("/prune/amount", "required: {\"layers\": n} or {\"fraction\": 0.0 to 1.0}");
            }
            (_, None, Some(PruneAmount::Layers(0))) => {
                out.add("/prune/amount/layers", "must be at least 1");
            }
            (_, None, Some(PruneAmount::Fraction(f))) if !(f > 0.0 && f < 1.0) => {
                out.add("/prune/amount/fraction", "must be more than 0 and less than 1");
            }
            (_, None, Some(_)) => {}
        }
        out.range("/prune/keep_first", p.keep_first, 0, MAX_COUNT);
        out.range("/prune/keep_last", p.keep_last, 0, MAX_COUNT);
    }

    fn check_eval(&self, out: &mut Complaints) {
        out.range("/eval/seq_len", self.eval.seq_len, 2, MAX_SEQ_LEN);
        for (i, corpus) in self.eval.perplexity.iter().enumerate() {
            let at = format!("/eval/perplexity/{i}");
            check_corpus(corpus, &at, out);
            self.check_leak(corpus, &at, out);
        }
        for (i, task) in self.eval.tasks.iter().enumerate() {
            let at = format!("/eval/tasks/{i}");
            if task.task.is_empty() || task.task.len() > 100 {
                out.add(&format!("{at}/task"), "must have 1 to 100 characters");
            }
            if self.eval.tasks[..i].iter().any(|t| t.task == task.task) {
                out.add(
                    &format!("{at}/task"),
                    format!("`{}` is there already; names must differ", task.task),
                );
            }
            if task.limit == Some(0) {
                out.add(&format!("{at}/limit"), "must be at least 1");
            }
            check_corpus(&task.items, &format!("{at}/items"), out);
            if matches!(task.items, Corpus::Model { .. }) {
                out.add(
                    &format!("{at}/items"),
                    "a model cannot write evaluation items; use \"path\" or \"text\"",
                );
            }
        }
    }

    /// Healing on the text that judges the healing would flatter it.
    fn check_leak(&self, corpus: &Corpus, at: &str, out: &mut Complaints) {
        let healed_on = self.heal.iter().any(|HealMethod::Qlora(q)| q.corpus == *corpus);
        if healed_on && !matches!(corpus, Corpus::Model { .. }) {
            out.add(at, "is the text the job heals on; measure on text that healing never sees");
        }
    }
}

#[derive(Default)]
struct Complaints(Vec<Complaint>);

impl Complaints {
    fn add(&mut self, pointer: &str, message: impl Into<String>) {
        self.0.push(Complaint { pointer: pointer.into(), message: message.into() });
    }

    fn range(&mut self, pointer: &str, value: u32, low: u32, high: u32) {
        if !(low..=high).contains(&value) {
            self.add(pointer, format!("must be from {low} to {high}, not {value}"));
        }
    }

    fn positive(&mut self, pointer: &str, value: Option<f64>, high: f64) {
        if value.is_some_and(|v| !(v > 0.0 && v <= high)) {
            self.add(pointer, format!("must be more than 0 and at most {high}"));
        }
    }
}

fn check_qlora(q: &QloraSpec, at: &str, out: &mut Complaints) {
    check_corpus(&q.corpus, &format!("{at}/corpus"), out);
    let counts = [
        ("rank", q.rank, 1, 1024),
        ("steps", q.steps, 1, MAX_COUNT),
        ("batch_size", q.batch_size, 1, 4096),
        ("seq_len", q.seq_len, 2, MAX_SEQ_LEN),
        ("checkpoint_every", q.checkpoint_every, 1, MAX_COUNT),
        ("warmup_steps", q.warmup_steps, 0, MAX_COUNT),
    ];
    for (name, value, low, high) in counts {
        if let Some(value) = value {
            out.range(&format!("{at}/{name}"), value, low, high);
        }
    }
    out.positive(&format!("{at}/alpha"), q.alpha, 65_536.0);
    out.positive(&format!("{at}/learning_rate"), q.learning_rate, 1.0);
    if q.dropout.is_some_and(|d| !(0.0..1.0).contains(&d)) {
        out.add(&format!("{at}/dropout"), "must be at least 0 and less than 1");
    }
    if q.weight_decay.is_some_and(|d| !(0.0..=1.0).contains(&d)) {
        out.add(&format!("{at}/weight_decay"), "must be from 0 to 1");
    }
    if q.targets.as_ref().is_some_and(Vec::is_empty) {
        out.add(&format!("{at}/targets"), "name at least one linear layer, e.g. \"down_proj\"");
    }
}

fn check_corpus(corpus: &Corpus, at: &str, out: &mut Complaints) {
    match corpus {
        Corpus::Path { path } => check_path(path, &format!("{at}/path"), out),
        Corpus::Hub { repo, revision, file } => {
            check_repo(repo, revision, at, out);
            if file.is_empty()
                || file.contains('\0')
                || file.split('/').any(|part| part.is_empty() || part == "..")
            {
                out.add(&format!("{at}/file"), "must be the path of a file inside the repository");
            }
        }
        Corpus::Upload { .. } => {
            out.add(
                &format!("{at}/from"),
                "uploads are not available in this version; use \"path\" or \"text\"",
            );
        }
        Corpus::Text { text } if text.trim().is_empty() => out.add(&format!("{at}/text"), "is empty"),
        Corpus::Text { text } if text.len() > MAX_TEXT_BYTES => {
            out.add(&format!("{at}/text"), "is longer than 8 MiB; put it into a file");
        }
        Corpus::Model { tokens: Some(0) } => out.add(&format!("{at}/tokens"), "must be at least 1"),
        Corpus::Text { .. } | Corpus::Model { .. } => {}
    }
}

fn check_path(path: &str, at: &str, out: &mut Complaints) {
    if path.is_empty() || path.contains('\0') {
        out.add(at, "must be the path of a file or directory");
    }
}

/// `owner/name` and a revision, in the Hub's own alphabet: nothing that could
/// climb out of a cache directory or change a URL.
fn check_repo(repo: &str, revision: &str, at: &str, out: &mut Complaints) {
    let plain = |s: &str| {
        !s.is_empty()
            && s.len() <= 96
            && !s.starts_with(['.', '-'])
            && !s.contains("..")
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = repo.split('/').collect();
    if parts.len() > 2 || !parts.iter().all(|p| plain(p)) {
        out.add(&format!("{at}/repo"), "must look like owner/name");
    }
    if !revision.split('/').all(plain) {
        out.add(&format!("{at}/revision"), "must be a branch, a tag or a commit");
    }
}
