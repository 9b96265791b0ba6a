//! How a job stands. The whole state machine is one match.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::report::FailureKind;

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

/// What the user wishes; it stands beside the state, in a column of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wish {
    Cancel,
    Pause,
}

impl Wish {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
        }
    }
}

impl std::str::FromStr for Wish {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Cancel, Self::Pause]
            .into_iter()
            .find(|w| w.name() == name)
            .ok_or_else(|| format!("`{name}` is no wish; the wishes are cancel, pause"))
    }
}

/// What can happen to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A worker took the lease.
    Claim,
    RequestCancel,
    RequestPause,
    /// The user lets a paused job go on.
    Resume,
    /// The attempt produced the result.
    Finish,
    /// The attempt failed; `retries_left` says whether the limit allows another.
    Fail {
        kind: FailureKind,
        retries_left: bool,
    },
    /// The attempt stopped because it was asked to, keeping its records: the
    /// user's wish, or none when the worker is shutting down.
    Stopped {
        wish: Option<Wish>,
    },
    /// A deadline of the job has passed while it waits, or would wait again.
    Expire,
    /// The lease ran out: the worker is gone. `crashes_left` says whether the
    /// job may try once more or has proved to be poison.
    LeaseExpired {
        wish: Option<Wish>,
        crashes_left: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {from} cannot take the change {change:?}")]
pub struct IllegalChange {
    pub from: JobState,
    pub change: Change,
}

impl JobState {
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Running, Self::Paused, Self::Succeeded, Self::Failed, Self::Cancelled];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Terminal states never change.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The whole machine.
    ///
    /// # Errors
    /// [`IllegalChange`] when the table has no such row.
    pub fn after(self, change: Change) -> Result<Self, IllegalChange> {
        use Change as C;
        Ok(match (self, change) {
            (Self::Queued, C::Claim) => Self::Running,
            (Self::Queued | Self::Paused, C::RequestCancel) => Self::Cancelled,
            (Self::Queued, C::RequestPause) => Self::Paused,
            (Self::Queued, C::Expire) => Self::Failed,
            (Self::Paused, C::Resume) => Self::Queued,
            // The wish is noted; the worker hears it with its next heartbeat.
            (Self::Running, C::RequestCancel | C::RequestPause) => Self::Running,
            (Self::Running, C::Finish) => Self::Succeeded,
            (Self::Running, C::Fail { kind, retries_left }) if kind.retryable() && retries_left => {
                Self::Queued
            }
            (Self::Running, C::Fail { .. }) => Self::Failed,
            (Self::Running, C::Stopped { wish }) => Self::stopped(wish),
            (Self::Running, C::LeaseExpired { wish: None, crashes_left: false }) => Self::Failed,
            (Self::Running, C::LeaseExpired { wish, .. }) => Self::stopped(wish),
            (from, change) => return Err(IllegalChange { from, change }),
        })
    }

    const fn stopped(wish: Option<Wish>) -> Self {
        match wish {
            Some(Wish::Cancel) => Self::Cancelled,
            Some(Wish::Pause) => Self::Paused,
            None => Self::Queued,
        }
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for JobState {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            format!("`{name}` is no job state; the states are {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}
