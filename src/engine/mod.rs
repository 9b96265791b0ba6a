//! The five stages on their own: no HTTP, no SQL, no tokio, no network.

pub mod chance;
pub mod damage;
pub mod data;
pub mod distance;
pub mod eval;
pub mod export;
pub mod heal;
pub mod model;
pub mod pipeline;
pub mod profile;
pub mod prune;
pub mod select;
pub mod workspace;

use std::path::Path;

use crate::job::progress::{Event, Observer, Stage};
use crate::job::report::{Failure, FailureKind};

/// Why a stage ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The observer asked to stop; the records so far are kept.
    #[error("stopped on request; the finished part is kept")]
    Stopped,
    #[error(transparent)]
    Failed(#[from] Failure),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self::Failed(Failure { kind, stage: None, message: message.into() })
    }

    /// The spec cannot be met.
    pub fn spec(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Spec, message)
    }

    /// The model's files are missing, damaged or not supported.
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Model, message)
    }

    /// A corpus or item file is missing, damaged or too short.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Data, message)
    }

    /// Our own fault.
    pub fn bug(message: impl std::fmt::Display) -> Self {
        Self::new(FailureKind::Bug, format!("{message}. This is a bug."))
    }

    /// The same error, said to have happened in `stage`.
    #[must_use]
    pub fn at(self, stage: Stage) -> Self {
        match self {
            Self::Failed(f) => Self::Failed(Failure { stage: f.stage.or(Some(stage)), ..f }),
            Self::Stopped => Self::Stopped,
        }
    }
}

/// A storage error that names the path.
pub fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |e| Error::new(FailureKind::Storage, format!("{path}: {e}"))
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::new(FailureKind::Storage, e.to_string())
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        let text = e.to_string();
        let kind = if text.contains("out of memory") || text.contains("OUT_OF_MEMORY") {
            FailureKind::OutOfMemory
        } else if text.contains("Cuda") || text.contains("CUDA") {
            FailureKind::Device
        } else {
            FailureKind::Bug
        };
        Self::new(kind, text)
    }
}

/// What a stage works with: where to compute, whom to tell.
#[derive(Clone, Copy)]
pub struct Cx<'a> {
    pub stage: Stage,
    pub compute: &'a model::Compute,
    pub observer: &'a dyn Observer,
}

impl Cx<'_> {
    /// The seam check: call it between batches.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the run was asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.observer.stop() { Err(Error::Stopped) } else { Ok(()) }
    }

    /// Tells how far `task` is, and checks the seam.
    pub fn advanced(&self, task: &str, done: u64, total: u64, unit: &str) -> Result<()> {
        let (task, unit) = (task.to_owned(), unit.to_owned());
        self.observer.event(Event::Advanced { stage: self.stage, task, done, total, unit });
        self.check()
    }

    /// Tells one value of a series.
    pub fn measured(&self, name: &str, step: u64, value: f64) {
        let name = name.to_owned();
        self.observer.event(Event::Measured { stage: self.stage, name, step, value });
    }

    /// Tells something a person should read.
    pub fn note(&self, message: impl Into<String>) {
        self.observer.event(Event::Noted { stage: Some(self.stage), message: message.into() });
    }
}
