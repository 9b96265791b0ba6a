//! What is happening: stages, events, and the one door out of the engine.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::report::Failure;

/// The stages of a job, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Profile,
    Select,
    Prune,
    Heal,
    /// GGUF files, where they are asked for.
    Export,
    Eval,
    Report,
}

impl Stage {
    pub const ALL: [Self; 7] =
        [Self::Profile, Self::Select, Self::Prune, Self::Heal, Self::Export, Self::Eval, Self::Report];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Profile => "profile",
            Self::Select => "select",
            Self::Prune => "prune",
            Self::Heal => "heal",
            Self::Export => "export",
            Self::Eval => "eval",
            Self::Report => "report",
        }
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Stage {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            format!("`{name}` is no stage; the stages are {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

/// One thing that happened in a run. As JSON lines this is what
/// `secateur run --events jsonl` prints and what a worker reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    StageStarted {
        stage: Stage,
    },
    /// `done` of `total` units of work. `task` names the part of the stage
    /// that counts, e.g. "writing calibration text".
    Advanced {
        stage: Stage,
        task: String,
        done: u64,
        total: u64,
        unit: String,
    },
    /// One value of a series, e.g. `loss` at an optimizer step.
    Measured {
        stage: Stage,
        name: String,
        step: u64,
        value: f64,
    },
    /// Something a person should read; nothing failed.
    Noted {
        stage: Option<Stage>,
        message: String,
    },
    StageFinished {
        stage: Stage,
        /// The record of an earlier run was taken; nothing was computed.
        reused: bool,
        duration_ms: u64,
        /// sha256 over everything the stage's result depends on.
        input_digest: String,
    },
    /// The run ended in failure; nothing follows.
    Failed {
        failure: Failure,
    },
}

/// How a run talks and listens while it works. The only door out of the engine.
pub trait Observer: Send + Sync {
    fn event(&self, event: Event);

    /// True when the run should stop at the next seam, keeping its records.
    fn stop(&self) -> bool {
        false
    }
}

/// Hears nothing, stops nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}
