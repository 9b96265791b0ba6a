//! What is asked: the job spec and its defaults. The rules it must keep are in
//! [`super::rules`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

pub use super::eval::{EvalSpec, Gates, GenerationSpec, OnReject, OverlapPolicy, TaskSpec};
pub use super::heal::{
    FullSpec, HealMethod, LeastSquaresSpec, PartialSpec, QloraSpec, ReconstructSpec, RescaleSpec,
};
pub use super::placement::{Deadlines, Resources};
pub use super::prune::{DamageMeasure, DamageSpec, Measures, PruneAmount, PruneSpec, Strategy};
pub use super::training::{BaseBits, BaseFormat, DistillSpec, FourBits, MomentBits, Schedule, TrainingSpec};

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
    /// Run each method from the same cut instead, and keep the one that lowers the held-out loss most.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compare_heals: bool,
    #[serde(default)]
    pub eval: EvalSpec,
    #[serde(default)]
    pub export: ExportSpec,
    /// Bring the result to the Hugging Face Hub once the job has succeeded: the service does, `secateur run` does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<PublishSpec>,
    /// Seeds everything that is drawn at random: same seed, same bytes.
    #[serde(default)]
    pub seed: u64,
    /// Of the jobs of one tenant that wait, those of higher priority go first.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schema(minimum = -100, maximum = 100)]
    pub priority: i16,
    #[serde(default, skip_serializing_if = "is_default")]
    pub deadlines: Deadlines,
    #[serde(default, skip_serializing_if = "is_default")]
    pub resources: Resources,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl JobSpec {
    /// What the result is called: the job's name, or else the model's.
    #[must_use]
    pub fn title(&self) -> String {
        let last = |path: &str| path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        self.name.clone().unwrap_or_else(|| match &self.model {
            ModelSource::Hub { repo, .. } => last(repo),
            ModelSource::Path { path } => last(path),
            ModelSource::S3 { uri } => last(uri),
            ModelSource::Job { job_id } => job_id.to_string(),
        })
    }

    /// Whether damage is to be measured with the size of the stream made up for: where healing does that without
    /// training, and where `auto` weighs cuts that will be healed at all.
    #[must_use]
    pub fn mends_streams(&self) -> bool {
        let repairs = self.heal.iter().any(|method| match method {
            HealMethod::Rescale(_) | HealMethod::LeastSquares(_) | HealMethod::Reconstruct(_) => true,
            HealMethod::Qlora(_) | HealMethod::Partial(_) | HealMethod::Full(_) => false,
        });
        repairs || !self.heal.is_empty() && self.prune.strategies().contains(&Strategy::Auto)
    }

    /// All tasks, to choose layers by and to be judged by.
    pub fn tasks_mut(&mut self) -> impl Iterator<Item = &mut TaskSpec> {
        self.prune.damage.tasks.iter_mut().chain(&mut self.eval.tasks)
    }

    /// Every text of the spec and its place, as a JSON pointer.
    pub fn corpora_mut(&mut self) -> Vec<(String, &mut Corpus)> {
        let mut all = self.calibration.corpus.texts_mut("/calibration/corpus".to_string());
        let damage = &mut self.prune.damage;
        let of_damage = damage.corpus.iter_mut();
        all.extend(of_damage.flat_map(|corpus| corpus.texts_mut("/prune/damage/corpus".to_string())));
        all.extend(items_of(&mut damage.tasks, "/prune/damage/tasks"));
        let healing = self.heal.iter_mut().enumerate();
        all.extend(
            healing.flat_map(|(i, method)| method.corpus_mut().texts_mut(format!("/heal/{i}/corpus"))),
        );
        let texts = self.eval.perplexity.iter_mut().enumerate();
        all.extend(texts.map(|(i, corpus)| (format!("/eval/perplexity/{i}"), corpus)));
        all.extend(items_of(&mut self.eval.tasks, "/eval/tasks"));
        let prompts = self.eval.generation.as_mut().and_then(|generation| generation.prompts.as_mut());
        all.extend(prompts.map(|corpus| ("/eval/generation/prompts".to_string(), corpus)));
        all
    }
}

fn items_of<'a>(tasks: &'a mut [TaskSpec], at: &str) -> Vec<(String, &'a mut Corpus)> {
    let of_task = |(i, task): (usize, &'a mut TaskSpec)| {
        let shots = task.shots_from.iter_mut().map(move |corpus| (format!("{at}/{i}/shots_from"), corpus));
        std::iter::once((format!("{at}/{i}/items"), &mut task.items)).chain(shots)
    };
    tasks.iter_mut().enumerate().flat_map(of_task).collect()
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
    /// Several texts, in windows by turns: to calibrate, to choose and to heal on, not to be judged by.
    Mix { of: Vec<Share> },
}

/// A text of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Share {
    #[schema(no_recursion)]
    pub corpus: Corpus,
    /// How many windows it gives, relative to the others.
    #[serde(default = "one")]
    pub weight: f64,
}

const fn one() -> f64 {
    1.0
}

impl Corpus {
    /// The texts it is of: itself, or those that are mixed.
    #[must_use]
    pub fn texts(&self) -> Vec<&Self> {
        match self {
            Self::Mix { of } => of.iter().flat_map(|share| share.corpus.texts()).collect(),
            Self::Path { .. }
            | Self::Hub { .. }
            | Self::Upload { .. }
            | Self::Text { .. }
            | Self::Model { .. } => vec![self],
        }
    }

    /// The same with their places, for a corpus at `at`.
    fn texts_mut(&mut self, at: String) -> Vec<(String, &mut Self)> {
        match self {
            Self::Mix { of } => {
                let of = of.iter_mut().enumerate();
                of.flat_map(|(i, share)| share.corpus.texts_mut(format!("{at}/of/{i}/corpus"))).collect()
            }
            Self::Path { .. }
            | Self::Hub { .. }
            | Self::Upload { .. }
            | Self::Text { .. }
            | Self::Model { .. } => vec![(at, self)],
        }
    }
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
    /// Windows to measure on. A text that gives fewer is refused; with the default of 128 what it gives is measured.
    pub samples: u32,
    /// Tokens per window.
    pub seq_len: u32,
    pub position: TokenPosition,
    pub distance: Distance,
    /// Windows per forward pass. The result does not depend on it.
    pub batch_size: u32,
    /// Stop sampling when the nearest block is the nearest with this confidence, e.g. 0.95.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
    /// Measure the damage of leaving out each single layer, as `prune.damage` says.
    pub ablation: bool,
    /// What `ablation` calls needed and what redundant.
    pub zones: Zones,
    /// Read the head from the stream entering every layer (the review, section 5.3).
    pub logit_lens: bool,
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
            confidence: None,
            ablation: false,
            zones: Zones::default(),
            logit_lens: false,
        }
    }
}

impl CalibrationSpec {
    /// Whether text that gives fewer windows than `samples` is to be refused. Only the default is nobody's demand.
    /// The number tells, not whether somebody wrote it: specs are shown, stored and run again with their defaults
    /// written down, and must mean the same then.
    #[must_use]
    pub fn insists_on_samples(&self) -> bool {
        self.samples != Self::default().samples
    }
}

/// Bounds on the damage of leaving out one layer, in nats per token; 0.02 is two per cent of perplexity.
/// A layer between them is mixed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Zones {
    /// A layer is needed from this damage on.
    pub needed: f64,
    /// A layer is redundant up to this damage.
    pub redundant: f64,
}

impl Default for Zones {
    /// The review, section 7.2: one needed layer costs two per cent, half of twenty redundant ones five.
    fn default() -> Self {
        Self { needed: 0.02, redundant: 0.005 }
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

/// How the result leaves the house.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSpec {
    /// Data type of the written weights; the base model's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<WeightType>,
    /// Write the result as GGUF files for llama.cpp too, one of each type, and measure each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gguf: Vec<GgufType>,
}

/// Where the checkpoint goes on the Hugging Face Hub, with its model card, as one commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishSpec {
    /// `owner/name`; made when it is not there. The service must have been started with `--publish-to` this owner.
    #[schema(example = "my-team/smollm2-24-layers")]
    pub repo: String,
    /// Only its owner sees a repository that is made; one that is there stays as it is.
    #[serde(default = "yes")]
    pub private: bool,
}

const fn yes() -> bool {
    true
}

/// Types of GGUF files. As in llama.cpp, norms and biases stay float32, a quantised file keeps its head in 6 or 8 bits,
/// and a row that does not fill the blocks of its type takes the next larger one that it fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GgufType {
    F16,
    Bf16,
    /// 8 bits, and a scale for each 32 weights.
    #[serde(rename = "q8_0")]
    Q8,
    /// 6 bits in blocks of 256.
    #[serde(rename = "q6_k")]
    Q6K,
    /// 5 bits in blocks of 256, 6 for half of what tells most (llama.cpp's `Q5_K_M`).
    #[serde(rename = "q5_k")]
    Q5K,
    /// 4 bits in blocks of 256, 6 for half of what tells most (llama.cpp's `Q4_K_M`).
    #[serde(rename = "q4_k")]
    Q4K,
    /// 4 bits, and a scale for each 32 weights.
    #[serde(rename = "q4_0")]
    Q4,
}

impl GgufType {
    pub const ALL: [Self; 7] = [Self::F16, Self::Bf16, Self::Q8, Self::Q6K, Self::Q5K, Self::Q4K, Self::Q4];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q4K => "q4_k",
            Self::Q4 => "q4_0",
        }
    }

    /// Bits for a weight, its share of the scales included; mixtures by what they come to as a rule.
    #[must_use]
    pub const fn bits_per_weight(self) -> f64 {
        match self {
            Self::F16 | Self::Bf16 => 16.0,
            Self::Q8 => 8.5,
            Self::Q6K => 6.56,
            Self::Q5K => 5.7,
            Self::Q4K => 4.9,
            Self::Q4 => 4.5,
        }
    }
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

fn default_heal() -> Vec<HealMethod> {
    vec![HealMethod::Qlora(QloraSpec::default())]
}
