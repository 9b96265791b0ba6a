//! Benchmarks that are known by name: where their rows are published, and that each has a form of its own
//! (`engine/data/benchmark.rs` makes items of them).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::eval::TaskSpec;
use super::spec::Corpus;

/// A benchmark, by its name in lm-evaluation-harness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Benchmark {
    ArcChallenge,
    ArcEasy,
    Boolq,
    Gsm8k,
    Hellaswag,
    LambadaOpenai,
    Mmlu,
    /// Its answers themselves, not their letters: "cloze".
    MmluContinuation,
    Openbookqa,
    Piqa,
    Sciq,
    Winogrande,
}

/// Where a benchmark is published on the Hub.
struct Published {
    repo: &'static str,
    config: &'static str,
    split: &'static str,
    /// The split that shots come from.
    shots: &'static str,
}

impl Benchmark {
    pub const ALL: [Self; 12] = [
        Self::ArcChallenge,
        Self::ArcEasy,
        Self::Boolq,
        Self::Gsm8k,
        Self::Hellaswag,
        Self::LambadaOpenai,
        Self::Mmlu,
        Self::MmluContinuation,
        Self::Openbookqa,
        Self::Piqa,
        Self::Sciq,
        Self::Winogrande,
    ];

    /// Its name in a spec.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ArcChallenge => "arc_challenge",
            Self::ArcEasy => "arc_easy",
            Self::Boolq => "boolq",
            Self::Gsm8k => "gsm8k",
            Self::Hellaswag => "hellaswag",
            Self::LambadaOpenai => "lambada_openai",
            Self::Mmlu => "mmlu",
            Self::MmluContinuation => "mmlu_continuation",
            Self::Openbookqa => "openbookqa",
            Self::Piqa => "piqa",
            Self::Sciq => "sciq",
            Self::Winogrande => "winogrande",
        }
    }

    /// The benchmark of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|benchmark| benchmark.name() == name)
    }

    const fn published(self) -> Published {
        let (repo, config, split, shots) = match self {
            Self::ArcChallenge => ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
            Self::ArcEasy => ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
            Self::Boolq => ("aps/super_glue", "boolq", "validation", "train"),
            Self::Gsm8k => ("openai/gsm8k", "main", "test", "train"),
            Self::Hellaswag => ("Rowan/hellaswag", "default", "validation", "train"),
            Self::LambadaOpenai => ("EleutherAI/lambada_openai", "default", "test", "test"),
            Self::Mmlu | Self::MmluContinuation => ("cais/mmlu", "all", "test", "dev"),
            Self::Openbookqa => ("allenai/openbookqa", "main", "test", "train"),
            Self::Piqa => ("baber/piqa", "default", "validation", "train"),
            Self::Sciq => ("allenai/sciq", "default", "test", "train"),
            Self::Winogrande => ("allenai/winogrande", "winogrande_xl", "validation", "train"),
        };
        Published { repo, config, split, shots }
    }

    /// Its rows, as the Hub converts every data set: parquet, one folder a split.
    #[must_use]
    pub fn rows(self) -> Corpus {
        let Published { repo, config, split, .. } = self.published();
        converted(repo, config, split)
    }

    /// The rows whose answers are shown before.
    #[must_use]
    pub fn shot_rows(self) -> Corpus {
        let Published { repo, config, shots, .. } = self.published();
        converted(repo, config, shots)
    }
}

fn converted(repo: &str, config: &str, split: &str) -> Corpus {
    Corpus::Hub {
        repo: repo.into(),
        file: format!("{config}/{split}/0000.parquet"),
        revision: "refs/convert/parquet".into(),
    }
}

impl TaskSpec {
    /// All items of a file.
    #[must_use]
    pub fn of(task: &str, items: Corpus) -> Self {
        Self {
            task: task.into(),
            items,
            format: None,
            shots: 0,
            shots_from: None,
            limit: None,
            min_retention: None,
        }
    }

    /// The form of its rows, where they are not items already.
    #[must_use]
    pub fn benchmark(&self) -> Option<Benchmark> {
        self.format.or_else(|| Benchmark::named(&self.task))
    }

    /// Its items, and what shots come from.
    pub fn corpora_mut(&mut self) -> impl Iterator<Item = &mut Corpus> {
        std::iter::once(&mut self.items).chain(&mut self.shots_from)
    }

    /// Names the rows of a benchmark where the spec names none.
    pub fn settle(&mut self) {
        let Some(benchmark) = self.benchmark() else { return };
        if self.items == Corpus::default() {
            self.items = benchmark.rows();
            if self.shots > 0 && self.shots_from.is_none() {
                self.shots_from = Some(benchmark.shot_rows());
            }
        }
    }
}
